"""Texts in, labels or vectors out: a Hugging Face folder on ONNX Runtime, with the tokenizer's own library.

The tokenizers are loaded in 0.1 s, transformers in 1.8 s. What transformers would read from tokenizer_config.json,
config.json and the files of sentence-transformers is read here: longest input, sides of truncation and padding, names
of labels, which function makes scores of logits, pooling, normalisation, the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bentos.serving import encoders, hugging_face, row_proof
from bentos.serving.hugging_face import Sentences, failed, limit, read_object
from bentos.serving.model import ModelFolder
from bentos.serving.problems import Problem, StartError

Text = str | tuple[str, str]
"""One text, or a pair of texts (of a model that compares two)."""

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Run = Callable[[Integers, Integers, Integers], Floats]
"""Token numbers, which of them count, and their segments, each [n, tokens] → what the network gives."""

MAX_TEXTS = 256
MAX_CHARACTERS = 100_000
"""Of one text. Splitting so much into tokens takes about 0.1 s; no model reads all of it."""
MAX_TOTAL = 1_000_000
"""Characters of all texts of a request."""

_MAX_TOKENS = 4096
"""In one run of the network: the memory of attention grows with it."""
_LONGEST = 512  # where no file says how long an input may be
_TRIALS = ("a text", "no", "What does a long text do to a short one, and a short one to a long one?", "and 1 2 3 4 5")
_MOST_TRIED = 8
"""Texts of unequal length, whose padding must not change an answer."""


def checked(value: Any, place: str) -> str:
    """The text, if it is one that a model can read. Raises Problem naming `place`."""
    if not isinstance(value, str):
        raise Problem("wrong_type", f"{place} is not a text", field=place, hint="send a JSON string")
    if not value.strip():
        raise Problem("empty_text", f"{place} is empty", field=place, hint="send a text with at least one word")
    if len(value) > MAX_CHARACTERS:
        detail = f"{place} has {len(value)} characters; at most {MAX_CHARACTERS} are read"
        raise Problem("text_too_long", detail, field=place, hint="send the part that matters, or several parts")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        detail = f"{place} holds half of a surrogate pair at character {error.start}"
        raise Problem("not_unicode", detail, field=place, hint="send whole characters, in UTF-8") from error
    return value


def checked_all(values: Any, place: str, one: Callable[[Any, str], Text] = checked) -> list[Text]:
    """1 to MAX_TEXTS texts, each by `one`. Raises Problem naming the first that is wrong."""
    if not isinstance(values, list):
        raise Problem("wrong_type", f"{place} is not a list", field=place, hint="send a list of texts")
    if not values:
        raise Problem("no_rows", f"{place} is empty", field=place, hint="send at least one text")
    if len(values) > MAX_TEXTS:
        detail = f"{place} has {len(values)} texts; at most {MAX_TEXTS} are taken at once"
        raise Problem("too_many_rows", detail, field=place, hint="send them in several requests")
    texts = [one(value, f"{place}[{i}]") for i, value in enumerate(values)]
    total = sum(len(text) if isinstance(text, str) else len(text[0]) + len(text[1]) for text in texts)
    if total > MAX_TOTAL:
        detail = f"{place} has {total} characters in all; at most {MAX_TOTAL} are read at once"
        raise Problem("text_too_long", detail, field=place, hint="send them in several requests")
    return texts


@dataclass(frozen=True)
class Pretrained:
    """A Hugging Face folder within a model folder: where its parts are, and what its files say."""

    folder: ModelFolder
    root: str
    """Empty, or a path that ends with a slash."""
    config: dict[str, Any]
    tokenizer_config: dict[str, Any]
    network: str | None
    """The .onnx file; None where there are weights only."""
    weights: tuple[str, ...]
    sentences: Sentences
    longest: int

    @classmethod
    def read(cls, folder: ModelFolder) -> Pretrained:
        """Raises StartError `model_load_failed` where a part is missing or of a kind that is not known here."""
        root = _described(folder).removesuffix("config.json")
        config = read_object(folder, f"{root}config.json")
        told = read_object(folder, f"{root}tokenizer_config.json")
        if f"{root}tokenizer.json" not in folder.files:
            raise failed("there is no tokenizer.json beside config.json", "save it with tokenizer.save_pretrained")
        networks = [path for path in folder.files if path.lower().endswith(".onnx")]
        if len(networks) > 1:
            raise failed(f"there are {len(networks)} .onnx files", "upload one of them")
        sentences = Sentences.read(folder, root)
        return cls(
            folder=folder,
            root=root,
            config=config,
            tokenizer_config=told,
            network=networks[0] if networks else None,
            weights=tuple(path for path in folder.files if path.endswith(".safetensors")),
            sentences=sentences,
            longest=min(_positions(config), limit(told.get("model_max_length")), sentences.longest),
        )

    @property
    def architecture(self) -> str:
        named = self.config.get("architectures")
        return str(named[0]) if isinstance(named, list) and named else ""


class Tokenizer:
    """tokenizer.json with what tokenizer_config.json says about its use."""

    def __init__(self, pretrained: Pretrained) -> None:
        from tokenizers import Tokenizer as Library

        told = pretrained.tokenizer_config
        path = pretrained.folder.path(f"{pretrained.root}tokenizer.json")
        try:
            text = hugging_face.tokenizer_json(path.read_text("utf-8"), told, pretrained.sentences.lowercase)
            self._library = Library.from_str(text)
        except Exception as error:  # the library has no errors of its own
            raise failed(f"tokenizer.json cannot be read: {error}", "save it with tokenizer.save_pretrained") from error
        side = told.get("truncation_side", "right")
        self._library.enable_truncation(pretrained.longest, direction="left" if side == "left" else "right")
        self._library.no_padding()
        self._library.encode_special_tokens = bool(told.get("split_special_tokens"))
        self._left = told.get("padding_side") == "left"
        self._padding = self._padding_number(pretrained)
        self.longest = pretrained.longest
        self._check_ends(told)

    def __call__(self, texts: Sequence[Text]) -> list[Any]:
        """An encoding for each text, cut at the longest input (then its `overflowing` is not empty)."""
        return list(self._library.encode_batch(texts, add_special_tokens=True))

    def padded(self, encodings: Sequence[Any]) -> tuple[Integers, Integers, Integers]:
        """Token numbers, mask and segments as [n, tokens], all as long as the longest of them."""
        width = max(len(encoding.ids) for encoding in encodings)
        ids = np.full((len(encodings), width), self._padding, dtype=np.int64)
        mask, segments = np.zeros_like(ids), np.zeros_like(ids)
        for i, encoding in enumerate(encodings):
            count = len(encoding.ids)
            place = slice(width - count, width) if self._left else slice(0, count)
            ids[i, place], mask[i, place], segments[i, place] = encoding.ids, 1, encoding.type_ids
        return ids, mask, segments

    def prompt_tokens(self, prompt: str) -> int:
        """Return how many tokens a prompt takes at the start of a text, without a special token at its end."""
        encoding = self._library.encode(prompt, add_special_tokens=True)
        return len(encoding.ids) - bool(encoding.special_tokens_mask and encoding.special_tokens_mask[-1])

    def _check_ends(self, told: Mapping[str, Any]) -> None:
        """Raise StartError where tokenizer_config.json wants a token at an end that tokenizer.json does not put there,
        or the other way round."""
        encoding = self._library.encode("a", add_special_tokens=True)
        for setting, name, place in (("add_bos_token", "bos_token", 0), ("add_eos_token", "eos_token", -1)):
            token = told.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if not isinstance(told.get(setting), bool) or not isinstance(token, str) or not encoding.tokens:
                continue
            if (encoding.tokens[place] == token) is not told[setting]:
                raise failed(
                    f"tokenizer_config.json has {setting} {told[setting]}, and tokenizer.json does otherwise",
                    "save the tokenizer again with tokenizer.save_pretrained, so that both agree",
                )

    def _padding_number(self, pretrained: Pretrained) -> int:
        told = pretrained.tokenizer_config.get("pad_token")
        token = told.get("content") if isinstance(told, dict) else told
        known = self._library.token_to_id(token) if isinstance(token, str) else None
        return int(known if known is not None else limit(pretrained.config.get("pad_token_id"), 0))


@dataclass(frozen=True)
class Answers:
    """`values`: scores [n, classes] or vectors [n, width]; `cut`: rows whose end the model did not read."""

    values: NDArray[np.float64]
    cut: tuple[int, ...]


@dataclass(frozen=True)
class TextModel:
    """A network with its tokenizer: a classifier where `labels` is not None, else an encoder of texts."""

    pretrained: Pretrained
    tokenizer: Tokenizer
    labels: tuple[str, ...] | None
    width: int
    """Classes of a classifier, or numbers in a vector."""
    engine: str
    """`onnxruntime` or `torch`."""
    _run: Run = field(repr=False)
    _finished: Callable[[Floats], NDArray[np.float64]] = field(repr=False)
    verdict: row_proof.Verdict = field(default_factory=row_proof.Verdict)

    @classmethod
    def load(cls, folder: ModelFolder) -> TextModel:
        """Raises StartError `model_load_failed` when it cannot be served."""
        pretrained = Pretrained.read(folder)
        tokenizer = Tokenizer(pretrained)
        run, engine = _network(pretrained)
        probe = tokenizer.padded(tokenizer(["a text"]))
        given = _tried(run, probe)
        classifier = _classifies(pretrained, given)
        if not classifier:
            run = _pooled(pretrained.sentences, tokenizer, run, given.ndim)
            given = run(*probe)
        model = cls(
            pretrained=pretrained,
            tokenizer=tokenizer,
            labels=_labels(pretrained, given.shape[1]) if classifier else None,
            width=int(given.shape[1]),
            engine=engine,
            _run=run,
            _finished=_scores(pretrained, given.shape[1]) if classifier else _vectors(pretrained),
        )
        return replace(
            model, verdict=row_proof.tried(lambda texts: list(model(texts).values), _trials(folder), most=_MOST_TRIED)
        )

    def __call__(self, texts: Sequence[Text], place: Callable[[int], str] = "texts[{}]".format) -> Answers:
        """Scores or vectors in the order of the texts. Raises Problem where a text has nothing that can be read.

        Texts of like length share a run, so that little is padded; each has its own where that changes the answers.
        """
        prompt = self.pretrained.sentences.prompt if self.labels is None else ""
        encodings = self.tokenizer([prompt + text for text in texts] if prompt else texts)  # type: ignore[operator]
        for i, encoding in enumerate(encodings):
            if not encoding.ids:
                detail = f"{place(i)} holds nothing that the model's tokenizer knows"
                raise Problem("empty_text", detail, field=place(i), hint="send a text with at least one word")
        values = np.empty((len(texts), self.width), dtype=np.float64)
        shares = _shares([len(encoding.ids) for encoding in encodings])
        for rows in shares if self.verdict.holds else ([row] for row in range(len(texts))):
            batch = self.tokenizer.padded([encodings[row] for row in rows])
            values[rows] = self._finished(self._run(*batch))
        return Answers(values, tuple(i for i, encoding in enumerate(encodings) if encoding.overflowing))

    def details(self) -> dict[str, Any]:
        """For /metadata."""
        about: dict[str, Any] = {
            "task": "embedding" if self.labels is None else "classification",
            "architecture": self.pretrained.architecture,
            "longest_input_tokens": self.tokenizer.longest,
            "engine": self.engine,
            **row_proof.details(row_proof.sharing(row_proof.Sharing.REQUEST, self.verdict), self.verdict),
        }
        if self.labels is None:
            about |= {
                "embedding_size": self.width,
                "pooling": self.pretrained.sentences.pooling,
                "normalised": self.pretrained.sentences.normalised,
            }
        return about


# --- what the folder says ----------------------------------------------------------------------------------------


def _described(folder: ModelFolder) -> str:
    """The config.json of the model: as the manifest names it; in older versions the outermost that describes one."""
    if folder.model is not None:
        return folder.model
    found = [path for path in folder.files if PurePosixPath(path).name == "config.json"]
    found = [path for path in found if _is_described(hugging_face.read_json(folder, path))]
    if not found:
        raise failed("there is no config.json of a model", "save the model with save_pretrained, then export it")
    return min(found, key=lambda path: (path.count("/"), path))


def _is_described(config: Any) -> bool:
    return isinstance(config, dict) and bool({"model_type", "architectures"} & set(config))


def _trials(folder: ModelFolder) -> list[str]:
    """Texts of unequal length, those of the sample first."""
    sample = folder.sample()
    given = [sample.get(key) for key in ("inputs", "texts")] if isinstance(sample, dict) else []
    shown = [each for listed in given if isinstance(listed, list) for each in listed]
    return [*dict.fromkeys(each for each in shown if isinstance(each, str) and each.strip())][:2] + list(_TRIALS)


def _positions(config: dict[str, Any]) -> int:
    """Tokens that the network has positions for."""
    told = limit(config.get("max_position_embeddings"), _LONGEST)
    if config.get("model_type") in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        told -= limit(config.get("pad_token_id"), 1) + 1  # they count from the padding's number on
    return max(told, 3)


# --- the network -------------------------------------------------------------------------------------------------


def _network(pretrained: Pretrained) -> tuple[Run, str]:
    if pretrained.network is not None:
        return _session(pretrained, pretrained.folder.path(pretrained.network)), "onnxruntime"
    if not pretrained.weights:
        raise failed("there is neither an .onnx file nor a .safetensors file", encoders.EXPORT_HINT)
    if pretrained.config.get("model_type") not in encoders.FAMILIES:
        return _torch(pretrained), "torch"
    files = [pretrained.folder.path(path) for path in pretrained.weights]
    classify = _classifier_by_name(pretrained)
    return _session(pretrained, encoders.graph(pretrained.config, encoders.tensors(files), classify)), "onnxruntime"


def _session(pretrained: Pretrained, source: Path | bytes) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # one thread: many small requests go side by side, and waiting threads would spin
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    given = source if isinstance(source, bytes) else str(source)
    try:
        session = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has an exception for each status, without a common base
        message = f"the network cannot be loaded by ONNX Runtime: {str(error)[:500]}"
        raise failed(message, "export it for a lower opset") from error
    inputs = {each.name: each for each in session.get_inputs()}
    odd = [name for name in inputs if name not in ("input_ids", "attention_mask", "token_type_ids", "position_ids")]
    if odd:
        hint = "export the encoder or classifier alone; for a chat with a language model, use an LLM server"
        raise failed(f"the network takes {odd[0]!r}, which is not known here", hint)
    output = _output(session, _classifier_by_name(pretrained))
    types = {name: np.int32 if each.type == "tensor(int32)" else np.int64 for name, each in inputs.items()}

    def run(ids: Integers, mask: Integers, segments: Integers) -> Floats:
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": segments}
        if "position_ids" in inputs:
            feed["position_ids"] = np.maximum(mask.cumsum(axis=1) - 1, 0)
        answer = session.run([output], {name: feed[name].astype(types[name], copy=False) for name in inputs})[0]
        return np.asarray(answer, dtype=np.float32)

    return run


def _output(session: Any, classify: bool) -> str:
    """Return the name of the output that is read: logits of a classifier; else a pooled vector or those of the tokens.

    Raises StartError where there is no such output: logits of something else are not an embedding.
    """
    names = [each.name for each in session.get_outputs()]
    wanted = ("logits",) if classify else ("sentence_embedding", "last_hidden_state", "token_embeddings")
    found = next((name for name in wanted if name in names), None)
    if found is None and not classify and "logits" in names:
        raise failed(
            "the network gives logits, and config.json does not say that it classifies texts",
            "for a classifier, name its architecture …ForSequenceClassification in config.json; for an encoder, "
            "export it with feature-extraction as its task",
        )
    return found or names[0]


def _torch(pretrained: Pretrained) -> Run:
    """The model in torch, where the version's requirements brought torch and transformers."""
    kind = pretrained.config.get("model_type")
    try:
        import torch  # type: ignore[import-not-found,unused-ignore]
        import transformers
    except ImportError as error:
        message = f"a {kind} model in safetensors needs torch, which is not in this environment"
        raise StartError(
            "model_load_failed",
            message,
            f"{encoders.EXPORT_HINT}; or upload it with requirements that name torch and transformers",
        ) from error
    torch.set_num_threads(1)
    loader: Any = transformers.AutoModel
    if _classifier_by_name(pretrained):
        loader = transformers.AutoModelForSequenceClassification
    root = pretrained.folder.path(f"{pretrained.root}config.json").parent
    try:
        model = loader.from_pretrained(
            str(root), local_files_only=True, trust_remote_code=False, use_safetensors=True
        ).eval()
    except Exception as error:  # whatever a model's own code raises
        raise failed(f"transformers cannot load it: {str(error)[:500]}", encoders.EXPORT_HINT) from error
    segmented = int(getattr(model.config, "type_vocab_size", 0) or 0) > 1

    def run(ids: Integers, mask: Integers, segments: Integers) -> Floats:
        more = {"token_type_ids": torch.from_numpy(segments)} if segmented else {}
        with torch.inference_mode():
            given = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), **more)
        values = given.logits if "logits" in given else given.last_hidden_state
        answer: Floats = values.float().numpy()
        return answer

    return run


def _tried(run: Run, probe: tuple[Integers, Integers, Integers]) -> Floats:
    try:
        return run(*probe)
    except StartError:
        raise
    except Exception as error:
        message = f"the network cannot take a text: {str(error)[:500]}"
        raise failed(message, "export it with dynamic axes for the batch and the sequence") from error


def _classifier_by_name(pretrained: Pretrained) -> bool:
    return pretrained.architecture.endswith("ForSequenceClassification")


def _classifies(pretrained: Pretrained, given: Floats) -> bool:
    if given.ndim not in (2, 3) or given.shape[0] != 1:
        raise failed(
            f"the network gives an array of shape {list(given.shape)} for one text",
            "export it with feature-extraction or text-classification as its task",
        )
    if _classifier_by_name(pretrained):
        if given.ndim == 2:
            return True
        raise failed("config.json says a classifier, the network gives a value for each token", encoders.EXPORT_HINT)
    if pretrained.architecture.endswith(_NOT_MEANT_TO_EMBED) and not pretrained.sentences.declared:
        raise failed(
            f"{pretrained.architecture} predicts masked words; the folder does not say that it embeds texts",
            "save the encoder alone (AutoModel), or with sentence-transformers, whose modules.json says how it pools",
        )
    if pretrained.architecture.endswith(_OTHER_TASKS):
        raise failed(
            f"{pretrained.architecture} neither classifies nor embeds texts",
            "serve it from a project: ekiben init; for a chat with a language model, use an LLM server",
        )
    return False


_NOT_MEANT_TO_EMBED = ("ForMaskedLM", "ForPreTraining")
_OTHER_TASKS = (
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForCausalLM",
    "LMHeadModel",
    "ForConditionalGeneration",
)


def _labels(pretrained: Pretrained, classes: int) -> tuple[str, ...]:
    labels = hugging_face.labels(pretrained.config) or tuple(f"LABEL_{i}" for i in range(classes))
    if len(labels) != classes or len(set(labels)) != classes:
        raise failed(
            f"config.json names {len(set(labels))} labels, the network has {classes} classes", "correct its id2label"
        )
    return labels


def _scores(pretrained: Pretrained, classes: int) -> Callable[[Floats], NDArray[np.float64]]:
    """As a CrossEncoder of sentence-transformers was saved, else as transformers' text-classification chooses it."""
    saved = pretrained.config.get("sentence_transformers")
    activation = saved.get("activation_fn") if isinstance(saved, dict) else None
    activation = activation or pretrained.config.get("sbert_ce_default_activation_function")
    if activation is not None:
        named = str(activation).rsplit(".", 1)[-1]
        if named not in _ACTIVATIONS:
            raise failed(
                f"config.json has the activation function {str(activation)[:100]}, which is not known here",
                f"save it with one of {', '.join(_ACTIVATIONS)}",
            )
        return _ACTIVATIONS[named]
    told = pretrained.config.get("problem_type")
    if told == "regression":
        return raw
    if told == "multi_label_classification" or classes == 1:
        return sigmoid
    return softmax


def _vectors(pretrained: Pretrained) -> Callable[[Floats], NDArray[np.float64]]:
    return unit if pretrained.sentences.normalised else raw


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    odds = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    result: NDArray[np.float64] = odds / odds.sum(axis=1, keepdims=True)
    return result


def sigmoid(logits: NDArray[Any]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = 0.5 * (1 + np.tanh(logits.astype(np.float64) / 2))
    return result


def raw(logits: NDArray[Any]) -> NDArray[np.float64]:
    return logits.astype(np.float64)


_ACTIVATIONS = {"Identity": raw, "Sigmoid": sigmoid}
"""Of a CrossEncoder, by the class in torch."""


def unit(vectors: NDArray[Any]) -> NDArray[np.float64]:
    """Of length 1 each."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    result: NDArray[np.float64] = vectors / np.maximum(lengths, 1e-12)
    return result


def _pooled(sentences: Sentences, tokenizer: Tokenizer, run: Run, dimensions: int) -> Run:
    """Return a network that gives one vector a text [n, width], from one that gives one a text or one a token.

    Raises StartError where the prompt must be left out of a pooling that the network does by itself.
    """
    pool = _POOLINGS[sentences.pooling]
    skipped = 0
    if sentences.prompt and not sentences.prompt_is_pooled:
        if dimensions == 2:
            raise failed(
                "its pooling leaves the prompt out (include_prompt), and the network pools by itself",
                "export the network with token_embeddings as output",
            )
        skipped = tokenizer.prompt_tokens(sentences.prompt)

    def pooled(ids: Integers, mask: Integers, segments: Integers) -> Floats:
        hidden = run(ids, mask, segments)
        if hidden.ndim == 2:
            return hidden
        if skipped:
            first = mask.argmax(axis=1)[:, None] + skipped
            mask = np.where(np.arange(mask.shape[1])[None] < first, 0, mask)
        return pool(hidden, mask)

    return pooled


def _mean(hidden: Floats, mask: Integers) -> Floats:
    weight = mask[:, :, None].astype(np.float32)
    result: Floats = (hidden * weight).sum(axis=1) / np.maximum(weight.sum(axis=1), 1e-9)
    return result


def _first(hidden: Floats, mask: Integers) -> Floats:
    result: Floats = hidden[np.arange(len(hidden)), mask.argmax(axis=1)]
    return result


def _last(hidden: Floats, mask: Integers) -> Floats:
    at = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
    result: Floats = hidden[np.arange(len(hidden)), at]
    return result


def _greatest(hidden: Floats, mask: Integers) -> Floats:
    result: Floats = np.where(mask[:, :, None] == 1, hidden, -np.inf).max(axis=1)
    return result


_POOLINGS: dict[str, Callable[[Floats, Integers], Floats]] = {
    "mean": _mean,
    "cls": _first,
    "max": _greatest,
    "lasttoken": _last,
}


def _shares(lengths: Sequence[int]) -> list[list[int]]:
    """Rows that go through the network together: of like length, and not more tokens than memory has room for."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    shares: list[list[int]] = []
    while order:
        most = max(1, math.floor(_MAX_TOKENS / lengths[order[0]]))
        shares.append(order[:most])
        order = order[most:]
    return shares
