"""Hugging Face folders are known by their content, and refused whole where a part is missing or would run code."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from bentos.transformers.example import files as example_files
from registry.errors import UserError
from registry.formats import FORMATS, Recognised, check_needs, choose_kind, recognise
from registry.formats.transformers import WITHOUT_TORCH
from registry.kinds import Kinds

KINDS = Kinds.load(Path(__file__).parents[2] / "bentos")
CONFIG = {"architectures": ["BertModel"], "model_type": "bert"}
TOKENIZER = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"}}


def see(files: dict[str, bytes]) -> Recognised:
    return recognise({name: len(data) for name, data in files.items()}, lambda name: io.BytesIO(files[name]))


def refused(files: dict[str, bytes]) -> UserError:
    with pytest.raises(UserError) as raised:
        see(files)
    assert raised.value.hint
    return raised.value


def folder(**more: bytes | None) -> dict[str, bytes]:
    """config.json, tokenizer.json and safetensors of two tensors; `__` in a name stands for a dot."""
    files = {
        "config.json": json.dumps(CONFIG).encode(),
        "tokenizer.json": json.dumps(TOKENIZER).encode(),
        "model.safetensors": tensors("a", "b"),
        **{name.replace("__", "."): data for name, data in more.items()},
    }
    return {name: data for name, data in files.items() if data is not None}


def tensors(*names: str) -> bytes:
    return save({name: np.ones((2, 3), np.float32) for name in names})


def sharded(places: dict[str, str], shards: dict[str, bytes]) -> dict[str, bytes]:
    index = {"metadata": {"total_size": 48}, "weight_map": places}
    return {**folder(model__safetensors=None), "model.safetensors.index.json": json.dumps(index).encode(), **shards}


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_a_folder_with_onnx_and_one_with_safetensors_go_to_the_kind_transformers() -> None:
    onnx = see(example_files())
    assert (onnx.format, onnx.path, onnx.signature) == ("transformers-onnx", "config.json", None)
    assert choose_kind(onnx, KINDS) == "transformers"
    weights = see(folder())
    assert weights.format == "transformers-safetensors"
    assert weights.notes == ("A bert model of 2 tensors, with its tokenizer.",)
    assert choose_kind(weights, KINDS) == "transformers"


def test_a_folder_within_a_folder_and_onnx_within_onnx_are_found() -> None:
    files = example_files()
    moved = {f"shop/{name}": data for name, data in files.items() if name != "model.onnx"}
    found = see({**moved, "shop/onnx/model.onnx": files["model.onnx"], "shop/README.md": b"# shop"})
    assert (found.format, found.path) == ("transformers-onnx", "shop/config.json")
    assert "shop/onnx/model.onnx" in found.parts
    both = see({**files, "model.safetensors": tensors("a")})
    assert both.format == "transformers-onnx"
    assert any("can be left out" in note for note in both.notes)


def test_shards_must_all_be_there_be_whole_and_hold_what_the_index_says() -> None:
    places = {"a": ONE, "b": TWO}
    whole = {ONE: tensors("a"), TWO: tensors("b")}
    assert see(sharded(places, whole)).notes == ("A bert model of 2 tensors, with its tokenizer.",)
    missing = refused(sharded(places, {ONE: whole[ONE]}))
    assert missing.code == "truncated_model"
    assert f"1 of 2 shards are missing, such as {TWO}" in missing.detail
    assert refused(sharded(places, {**whole, TWO: whole[TWO][:-1]})).code == "truncated_model"
    assert refused(sharded(places, {**whole, TWO: b""})).code == "truncated_model"
    assert "'b'" not in refused(sharded(places, {**whole, TWO: tensors("c")})).detail
    assert "the tensor b is not in it" in refused(sharded(places, {**whole, TWO: tensors("c")})).detail
    assert (
        "does not name stray.safetensors"
        in refused(sharded(places, {**whole, "stray.safetensors": ONE.encode()})).detail
    )
    assert refused(sharded({"a": "../../etc/passwd"}, whole)).code == "truncated_model"
    without = {**folder(model__safetensors=None), **whole}
    assert "2 files of weights and no index" in refused(without).detail


def test_pickled_weights_are_refused_with_the_way_to_safetensors_and_onnx() -> None:
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}))
    legacy = pickle.dumps({"a": [1.0]})
    for name, data in (("pytorch_model.bin", zipped.getvalue()), ("pytorch_model.bin", legacy), ("more.dat", legacy)):
        error = refused({**folder(model__safetensors=None), name: data})
        assert error.code == "pickle_refused"
        assert name in error.detail
        assert "safe_serialization=True" in (error.hint or "")
        assert "optimum-cli" in (error.hint or "")
    # beside good weights it is refused too: what is kept as a version must not hold one
    assert refused({**example_files(), "pytorch_model.bin": legacy}).code == "pickle_refused"


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_the_folders_own_is_refused(name: str) -> None:
    body: dict[str, Any] = {**CONFIG, "auto_map": {"AutoModel": "modeling.Mine"}}
    error = refused({**folder(), name: json.dumps(body).encode()})
    assert error.code == "transformers_code"
    assert name in error.detail


def test_a_model_that_generates_is_sent_to_an_llm_server() -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    error = refused({**folder(), "config.json": json.dumps(config).encode()})
    assert error.code == "transformers_task"
    assert "LLM server" in (error.hint or "")


@pytest.mark.parametrize("keys", [["-1", "0", "1"], ["1", "2", "3"], ["0", "2"], ["a", "b"], ["00"]])
def test_names_of_classes_that_are_not_numbered_from_0_are_refused(keys: list[str]) -> None:
    config = {"model_type": "bert", "id2label": {key: key for key in keys}}
    error = refused(folder(**{"config.json": json.dumps(config).encode()}))
    assert error.code == "transformers_labels"
    assert keys[0] in error.detail


def test_a_masked_language_model_is_not_taken_for_an_embedding() -> None:
    config = json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}).encode()
    error = refused(folder(**{"config.json": config}))
    assert (error.code, "BertForMaskedLM" in error.detail) == ("transformers_task", True)
    assert see(folder(**{"config.json": config, "modules.json": b"[]"})).format == "transformers-safetensors"


def test_what_is_missing_is_named() -> None:
    assert refused(folder(tokenizer__json=None)).code == "transformers_no_tokenizer"
    assert refused(folder(model__safetensors=None)).code == "transformers_no_weights"
    assert refused(folder(tokenizer__json=b'{"version": "1.0"}')).code == "invalid_model"
    adapter = folder(adapter_config__json=b"{}")
    assert refused(adapter).code == "transformers_adapter"
    broken = {**example_files(), "model.onnx": example_files()["model.onnx"][:-200]}
    assert refused(broken).code == "truncated_model"
    two = {**example_files(), "onnx/model_quantized.onnx": example_files()["model.onnx"]}
    assert refused(two).code == "several_models"


def test_other_uploads_with_a_config_json_are_left_to_their_recognisers() -> None:
    network = example_files()["model.onnx"]
    assert see({"model.onnx": network, "config.json": json.dumps({"model_type": "vit"}).encode()}).format == "onnx"
    assert see({"model.onnx": network, "config.json": b'{"rate": 3}', "tokenizer.json": b"{}"}).format == "onnx"


def test_weights_that_need_torch_are_refused_unless_the_requirements_bring_it() -> None:
    config = json.dumps({"architectures": ["DebertaV2Model"], "model_type": "deberta-v2"}).encode()
    found = see({**folder(), "config.json": config})
    for named in (None, "", "numpy", "torchvision==0.2\ntransformers", "torch==2.9.1"):
        with pytest.raises(UserError) as raised:
            check_needs(found, named)
        assert raised.value.code == "transformers_needs_torch"
        assert "optimum-cli" in (raised.value.hint or "")
        assert raised.value.field == ("requirements" if named else "file")
    check_needs(found, "# ours\ntorch==2.9.1+cpu\nTransformers>=4.57")
    check_needs(found, '[[package]]\nname = "torch"\n[[package]]\nname = "transformers"')
    check_needs(see(folder()), None)


def test_registry_and_kind_agree_which_families_need_no_torch() -> None:
    from bentos.serving.encoders import FAMILIES

    assert WITHOUT_TORCH == FAMILIES


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(["model_type", "architectures", "auto_map", "weight_map", "model", "a"])
BODIES = st.dictionaries(NAMES, ANY, max_size=4).map(lambda body: json.dumps(body).encode()) | st.binary(max_size=40)
PATHS = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json", "model.safetensors"]


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.sampled_from([*PATHS, "model.onnx", "x/config.json", "pytorch_model.bin"]), BODIES, min_size=1)
)
def test_whatever_a_folder_holds_it_is_recognised_or_refused(changed: dict[str, bytes]) -> None:
    with contextlib.suppress(UserError):  # any other exception would be an answer 500
        assert see({**folder(), **changed}).format in FORMATS
