"""Text models of transformers and sentence-transformers as a folder: configuration, tokenizer, and the network.

Encoders of the BERT family are sent as safetensors, which the server runs without torch; others as ONNX. The outputs
are those of torch, finished as the server does it: scores of a classifier, the mean of the tokens of an encoder.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ekiben import _sample
from ekiben._errors import ExportError
from ekiben._export.torch import evaluating, to_onnx
from ekiben._export.written import Written, first_line, predicted

SERVED_FROM_SAFETENSORS = ("bert", "camembert", "distilbert", "roberta", "xlm-roberta")
"""`model_type`; bentos/serving/encoders.py has the same."""

_LONGEST = 512
_BATCH = 16


def write_sentences(model: Any, folder: Path, sample: Any) -> Written:
    """A SentenceTransformer: with its pooling and normalisation."""
    torch = importlib.import_module("torch")
    target = folder / "model"
    network = model[0].auto_model
    _checked(network, model.tokenizer)
    outputs = None if sample is None else predicted(lambda rows: model.encode(_texts(rows)).tolist(), sample)
    model.save(str(target))
    _replace(torch, network, model.tokenizer, target)
    return Written(target, outputs, None)


def write_pipeline(pipeline: Any, folder: Path, sample: Any) -> Written:
    """A pipeline of transformers: its model and its tokenizer."""
    return _write(pipeline.model, pipeline.tokenizer, folder, sample)


def write(model: Any, folder: Path, sample: Any) -> Written:
    """A model of transformers, whose tokenizer is where it was loaded from."""
    transformers = importlib.import_module("transformers")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model.name_or_path)
    except Exception as error:
        raise ExportError(
            f"the model's tokenizer is not where the model came from ({model.name_or_path!r}): {first_line(error)}",
            code="no_tokenizer",
            field="model",
            hint='push transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)',
        ) from error
    return _write(model, tokenizer, folder, sample)


def _write(model: Any, tokenizer: Any, folder: Path, sample: Any) -> Written:
    torch = importlib.import_module("torch")
    _checked(model, tokenizer)
    target = folder / "model"
    outputs = None
    with evaluating(torch, model):
        if sample is not None:
            outputs = predicted(lambda rows: _answers(torch, model, tokenizer, rows), sample)
    model.save_pretrained(str(target), safe_serialization=True)
    tokenizer.save_pretrained(str(target))
    _replace(torch, model, tokenizer, target)
    return Written(target, outputs, None)


def _checked(model: Any, tokenizer: Any) -> None:
    """Raises ExportError for a model that neither classifies nor embeds texts, or has no fast tokenizer."""
    name = type(model).__name__
    if not name.endswith(("ForSequenceClassification", "Model")) or name.endswith("LMHeadModel"):
        raise ExportError(
            f"a {name} neither classifies nor embeds texts",
            code="unknown_model",
            field="model",
            hint="for a chat with a language model, use an LLM server; else push a project: ekiben init",
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ExportError(
            "the model's tokenizer has no tokenizer.json",
            code="no_tokenizer",
            field="model",
            hint="load it with AutoTokenizer.from_pretrained(…, use_fast=True)",
        )


def _replace(torch: Any, model: Any, tokenizer: Any, target: Path) -> None:
    """ONNX in place of safetensors, where the server would need torch for these."""
    if model.config.model_type in SERVED_FROM_SAFETENSORS:
        return
    inputs = _encoded(tokenizer, model, ["a text", "another text"])
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in inputs]
    output = "logits" if _classifies(model) else "last_hidden_state"

    class Plain(torch.nn.Module):  # type: ignore[misc]
        """Takes what ONNX has: tensors by position."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: Any) -> Any:
            return getattr(self.model(**dict(zip(names, tensors, strict=True))), output)

    with evaluating(torch, model):
        axes: dict[str, dict[int, str]] = {str(name): {0: "n", 1: "tokens"} for name in names}
        answer = {0: "n"} if _classifies(model) else {0: "n", 1: "tokens"}
        to_onnx(torch, Plain().eval(), tuple(inputs[name] for name in names), target, axes, {output: answer})
    for path in [*target.glob("*.safetensors"), *target.glob("*.safetensors.index.json")]:
        path.unlink()


def _answers(torch: Any, model: Any, tokenizer: Any, sample: Any) -> list[Any]:
    rows = _texts(sample)
    answers: list[Any] = []
    for start in range(0, len(rows), _BATCH):
        inputs = _encoded(tokenizer, model, rows[start : start + _BATCH])
        given = model(**inputs)
        if _classifies(model):
            answers += _labelled(torch, model, given.logits.double())
        else:
            mask = inputs["attention_mask"][:, :, None].double()
            answers += ((given.last_hidden_state.double() * mask).sum(1) / mask.sum(1)).tolist()
    return answers


def _encoded(tokenizer: Any, model: Any, rows: Sequence[Any]) -> dict[str, Any]:
    longest = min(int(tokenizer.model_max_length), _positions(model.config))
    pairs = [(row["text"], row["text_pair"]) if isinstance(row, dict) and "text_pair" in row else row for row in rows]
    plain = [row["text"] if isinstance(row, dict) else row for row in pairs]
    made = tokenizer(plain, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    wanted = ["input_ids", "attention_mask"]
    if int(getattr(model.config, "type_vocab_size", 0) or 0) > 1:
        wanted.append("token_type_ids")
    return {name: made[name].to(model.device) for name in wanted if name in made}


def _positions(config: Any) -> int:
    told = int(getattr(config, "max_position_embeddings", None) or _LONGEST)
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        told -= int(config.pad_token_id or 1) + 1  # they count from the padding's number on
    return told


def _classifies(model: Any) -> bool:
    return type(model).__name__.endswith("ForSequenceClassification")


def _labelled(torch: Any, model: Any, logits: Any) -> list[dict[str, Any]]:
    """As the text-classification pipeline does it."""
    config = model.config
    if config.problem_type == "regression":
        scores = logits
    elif config.problem_type == "multi_label_classification" or logits.shape[1] == 1:
        scores = torch.sigmoid(logits)
    else:
        scores = torch.softmax(logits, dim=1)
    labels = [config.id2label[number] for number in range(logits.shape[1])]
    answers = []
    for row in scores.tolist():
        best = max(range(len(row)), key=row.__getitem__)
        answers.append({"label": labels[best], "score": row[best], "scores": dict(zip(labels, row, strict=True))})
    return answers


def _texts(sample: Any) -> list[Any]:
    rows = sample["inputs"] if isinstance(sample, dict) else _sample.rows(sample)
    if not all(isinstance(row, (str, dict)) for row in rows):
        raise TypeError("a row is a text, or an object with text and text_pair")
    return list(rows)
