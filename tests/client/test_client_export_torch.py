"""Models of torch and transformers as files, beside what they answer themselves.

torch is in no environment of this project: from a package index it brings CUDA's libraries on Linux. Where it is
installed (a Mac, an index of CPU wheels, Debian's python3-torch), these tests run; elsewhere they are skipped.
"""

from __future__ import annotations

import ast
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ekiben import _export
from ekiben._errors import ExportError

REASON = "torch is no part of this environment: docs/decisions/0601-texts-without-torch.md says where it can be"


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch", reason=REASON)


@pytest.fixture(scope="module")
def hf(torch: Any) -> Any:
    return pytest.importorskip("transformers", reason=REASON)


SIZES = {"vocab_size": 12, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}


def tokenizer(hf: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "blue", "green", "red", "sky", "tree"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    names = ["input_ids", "attention_mask"]
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=16, model_input_names=names, **special)


def shaken(torch: Any, model: Any) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        for weights in model.parameters():  # those of a new model are so small that mistakes would not show
            weights.add_(torch.randn_like(weights) * 0.3)
    return model.train()


def pushed(model: Any, folder: Path, sample: Any) -> tuple[Path, Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = _export.export(model, folder, sample)
    assert exported.sample is not None
    assert exported.expected is not None
    return exported.files[0], exported.sample["inputs"], exported.expected["outputs"]


def served(folder: Path, root: Path) -> Any:
    """The folder as the server reads it."""
    from bentos.serving import texts, write_model

    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return texts.TextModel.load(write_model(root, kind="transformers", format=None, files=files))


def test_a_module_is_onnx_for_any_number_of_rows(torch: Any, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2)
    ).train()
    rows = np.random.default_rng(0).normal(size=(5, 3))
    folder, inputs, outputs = pushed(model, tmp_path, rows)
    assert model.training  # as it was
    assert inputs == rows.tolist()
    with torch.no_grad():
        truth = model.eval()(torch.tensor(rows, dtype=torch.float32)).numpy()
    np.testing.assert_allclose(outputs, truth, rtol=1e-6)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    for count in (1, 5):
        given = session.run(None, {session.get_inputs()[0].name: rows[:count].astype(np.float32)})[0]
        np.testing.assert_allclose(given, truth[:count], rtol=1e-5, atol=1e-6)


def test_a_tensor_is_a_sample_and_a_module_without_one_is_refused(torch: Any, tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 1)
    _, inputs, outputs = pushed(model, tmp_path, torch.ones(3, 2))
    assert (inputs, len(outputs)) == ([[1.0, 1.0]] * 3, 3)
    with pytest.raises(ExportError, match="exported with a sample"):
        _export.export(model, tmp_path)
    with pytest.raises(ExportError, match="cannot predict its sample"):
        _export.export(model, tmp_path, [[1.0, 2.0, 3.0]])


@pytest.mark.parametrize("family", ["bert", "distilbert", "electra", "mpnet"])
@pytest.mark.parametrize("classify", [False, True], ids=["encoder", "classifier"])
def test_a_model_of_transformers_is_a_folder_that_is_served_the_same(
    torch: Any, hf: Any, tmp_path: Path, family: str, classify: bool
) -> None:
    names = {"bert": "Bert", "distilbert": "DistilBert", "electra": "Electra", "mpnet": "MPNet"}
    sizes: dict[str, Any] = {**SIZES, "max_position_embeddings": 20}
    if family == "distilbert":
        sizes = {"vocab_size": 12, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 12}
    config = getattr(hf, f"{names[family]}Config")(**sizes, **({"num_labels": 3} if classify else {}))
    kind = "ForSequenceClassification" if classify else "Model"
    model = shaken(torch, getattr(hf, f"{names[family]}{kind}")(config))
    pipeline = hf.pipeline(
        "text-classification" if classify else "feature-extraction", model=model, tokenizer=tokenizer(hf)
    )
    sample = ["blue sky", "red tree green unknown blue", "tree"]
    folder, inputs, outputs = pushed(pipeline, tmp_path, sample)
    assert inputs == sample
    assert (folder / "model.onnx").exists() == (family in ("electra", "mpnet"))
    assert bool(list(folder.glob("*.safetensors"))) == (family in ("bert", "distilbert"))
    ours = served(folder, tmp_path / "served")
    assert ours.engine == "onnxruntime"
    values = ours(sample).values
    if classify:
        model.eval()  # the export left dropout as it was
        told = pipeline(sample, top_k=None)
        for row, ranked in zip(outputs, told, strict=True):
            assert row["label"] == ranked[0]["label"]
            assert row["scores"] == pytest.approx({each["label"]: each["score"] for each in ranked}, abs=1e-6)
        outputs = [list(row["scores"].values()) for row in outputs]
    np.testing.assert_allclose(values, outputs, rtol=1e-5, atol=1e-6)


def test_another_architecture_runs_in_torch_where_it_is(torch: Any, hf: Any, tmp_path: Path) -> None:
    model = shaken(torch, hf.ElectraForSequenceClassification(hf.ElectraConfig(**SIZES, num_labels=2))).eval()
    folder = tmp_path / "saved"
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer(hf).save_pretrained(folder)
    ours = served(folder, tmp_path / "served")
    assert ours.engine == "torch"
    inputs = tokenizer(hf)(["blue sky"], return_tensors="pt", return_token_type_ids=True)
    with torch.no_grad():
        truth = torch.softmax(model(**inputs).logits.double(), 1).numpy()
    np.testing.assert_allclose(ours(["blue sky"]).values, truth, atol=1e-6)


def test_a_model_that_generates_is_refused(torch: Any, hf: Any, tmp_path: Path) -> None:
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=12, n_embd=8, n_layer=1, n_head=2))
    pipeline = hf.pipeline("text-generation", model=model, tokenizer=tokenizer(hf))
    with pytest.raises(ExportError, match="neither classifies nor embeds") as raised:
        _export.export(pipeline, tmp_path)
    assert "LLM server" in (raised.value.hint or "")


def test_client_and_server_agree_which_families_need_no_torch() -> None:
    from ekiben._export.transformers import SERVED_FROM_SAFETENSORS

    root = Path(__file__).parents[2]
    tree = ast.parse((root / "bentos" / "serving" / "encoders.py").read_text())
    found = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "FAMILIES"]  # type: ignore[attr-defined]
    assert ast.literal_eval(found[0]) == SERVED_FROM_SAFETENSORS
    made = [json.loads(path.read_text())["model_type"] for path in (root / "tests").rglob("encoders/*/config.json")]
    assert set(made) == set(SERVED_FROM_SAFETENSORS)
