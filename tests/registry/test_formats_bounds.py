"""What a small file may make its recognition, and later its loading, do: documents and zips are bounded beforehand."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry import formats, signature
from registry.errors import UserError
from registry.formats import bounded_json
from registry.formats.upload import Recognised
from registry.signature import Column, Signature

MIB = 1 << 20
BOMB = b"[" + b"[]," * bounded_json.MOST_VALUES + b"[]]"
DEEP = b"[" * (bounded_json.DEEPEST + 1) + b"]" * (bounded_json.DEEPEST + 1)


def refused(path: str, data: bytes) -> UserError:
    with pytest.raises(UserError) as error:
        formats.recognise({path: len(data)}, lambda _: io.BytesIO(data))
    assert error.value.hint
    return error.value


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as target:
        for name, content in members.items():
            target.writestr(name, content)
    return out.getvalue()


def skops(schema: bytes, **members: bytes) -> bytes:
    return zipped({"schema.json": b'{"__loader__": "ObjectNode", "content": ' + schema + b"}", **members})


def keras(config: bytes, metadata: bytes = b'{"keras_version": "3"}') -> bytes:
    return zipped({"config.json": config, "metadata.json": metadata, "model.weights.h5": b"x"})


def safetensors(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


def xgboost(names: bytes) -> bytes:
    return b'{"version":[3,0,0],"learner":{"feature_names":' + names + b"}}"


def lightgbm(names: str, levels: str = "null") -> bytes:
    text = (
        "tree\nversion=v4\nnum_class=1\nnum_tree_per_iteration=1\nmax_feature_idx=0\nobjective=regression\n"
        f"feature_names={names}\nfeature_infos=[0:1]\ntree_sizes=SIZE\n\n"
    )
    tree = "Tree=0\nnum_leaves=1\nnum_cat=0\nleaf_value=1\nis_linear=0\n\n\n"
    end = f"end of trees\n\nparameters:\nend of parameters\n\npandas_categorical:{levels}\n"
    return (text.replace("SIZE", str(len(tree))) + tree + end).encode()


@pytest.mark.parametrize("document", [BOMB, DEEP], ids=["many values", "deep"])
@pytest.mark.parametrize(
    ("path", "make"),
    [
        ("m.skops", skops),
        ("m.keras", keras),
        ("m.keras", lambda document: keras(b"{}", document)),
        ("m.safetensors", lambda document: safetensors(b'{"a":' + document + b"}")),
        ("m.json", xgboost),
        ("m.txt", lambda document: lightgbm("x", document.decode())),
    ],
)
def test_documents_in_models_have_a_bound_on_values_and_depth(path: str, make: Any, document: bytes) -> None:
    error = refused(path, make(document))
    # XGBoost's walker has a depth of its own
    assert error.code in ("upload_too_costly", "invalid_model" if path == "m.json" else "")


def test_documents_beside_models_have_the_same_bound() -> None:
    tokenizer = b'{"model":{"vocab":' + BOMB + b"}}"
    files = {"config.json": b'{"model_type":"bert"}', "tokenizer.json": tokenizer, "model.safetensors": b"x"}
    with pytest.raises(UserError, match="values") as error:
        formats.recognise({path: len(data) for path, data in files.items()}, lambda path: io.BytesIO(files[path]))
    assert error.value.code == "upload_too_costly"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=50)
@given(json_values)
def test_ordinary_documents_are_read_as_json_reads_them(value: Any) -> None:
    text = json.dumps(value).encode()
    assert bounded_json.loads(text, "it") == value


def test_brackets_and_commas_within_strings_do_not_count() -> None:
    text = json.dumps({"chat_template": '[,{"\\' * bounded_json.MOST_VALUES, "more": "\\"}).encode()
    assert set(bounded_json.loads(text, "it")) == {"chat_template", "more"}


def test_text_that_is_no_json_is_looked_through_in_linear_time() -> None:
    for text in (b'"' + b"\\a" * MIB, b'"\\' * MIB, b"[{" * MIB, b"]" * MIB):
        with pytest.raises((ValueError, RecursionError, UserError)):
            bounded_json.loads(text, "it")


def test_documents_within_strings_of_a_skops_schema_are_bounded() -> None:
    """skops parses the content of such a node by itself."""
    inner = {
        "__class__": "str",
        "__module__": "builtins",
        "__loader__": "JsonNode",
        "content": "[" + "[]," * MIB + "[]]",
    }
    error = refused("m.skops", skops(json.dumps(inner).encode()))
    assert error.code == "invalid_model"


@pytest.mark.parametrize("name", ["0.npy", "0.npz"])
def test_a_model_may_not_unpack_to_hundreds_of_times_its_size(name: str) -> None:
    zeros = b"\x93NUMPY" + bytes(66 * MIB)
    member = zeros if name == "0.npy" else zipped({"data.npy": zeros})
    assert len(member if name == "0.npz" else zipped({name: zeros})) < MIB
    error = refused("m.skops", skops(b"{}", **{name: member}))
    assert error.code == "archive_bomb"


def test_arrays_within_an_array_file_are_read_wherever_they_lie() -> None:
    """A packed .npz within a packed zip cannot be searched, only read from its start again."""
    inner = zipped({f"{name}.npy": b"\x93NUMPY" + bytes(100_000) for name in "abc"}, zipfile.ZIP_STORED)
    error = refused("m.skops", skops(b"{}", **{"0.npz": inner}))
    assert error.code == "invalid_model"  # for its schema, which is none


def test_a_line_of_names_is_counted_before_it_is_split() -> None:
    error = refused("m.txt", lightgbm("x " * (8 * MIB)))
    assert f"it names {8 * MIB + 1} features" in error.detail


def test_requirements_are_searched_in_linear_time() -> None:
    found = Recognised("transformers-safetensors", "", needs=("torch",))
    with pytest.raises(UserError):
        formats.check_needs(found, "\n" * 200_000)
    formats.check_needs(found, "numpy\n  torch==2.0\n")


def test_a_sample_is_checked_in_time_of_its_size_and_the_models() -> None:
    """Not in their product: rows by optional columns, or values by levels."""
    optional = Signature(tuple(Column(f"c{number}", required=False) for number in range(20_000)), named=True)
    assert signature.check_sample(optional, {"inputs": [{}] * 50_000}) == 50_000
    levels = (*range(200_000), "text")
    category = Signature((Column("c", "category", levels),), named=True)
    assert signature.check_sample(category, {"inputs": [{"c": "text"}] * 50_000}) == 50_000


def test_a_record_is_told_its_first_fault_in_the_order_of_the_columns() -> None:
    columns = Signature((Column("a"), Column("b"), Column("c")), named=True)
    for row, where in (
        ({"c": "x", "a": 1}, "sample.inputs[0].b"),
        ({"c": 1, "b": 1, "a": "x"}, "sample.inputs[0].a"),
        ({"a": "x"}, "sample.inputs[0].a"),
        ({"a": 1, "d": 1}, "sample.inputs[0].d"),
    ):
        with pytest.raises(UserError) as error:
            signature.check_sample(columns, {"inputs": [row]})
        assert error.value.field == where
