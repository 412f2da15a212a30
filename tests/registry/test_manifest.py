from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import UserError
from registry.manifest import (
    RESERVED,
    Attachment,
    File,
    Manifest,
    check_name,
    check_path,
    name_from_filename,
)

SHA = "ab" * 32
FILES = (File("churn.txt", 1733211, SHA), File("a/b.json", 3, "00" * 32))


def code_of(error: pytest.ExceptionInfo[UserError]) -> str:
    assert error.value.hint
    return error.value.code


def test_bytes_are_those_of_the_design():
    manifest = Manifest("lightgbm", "lightgbm-text", FILES, sample=Attachment(210, SHA), python="3.11")
    assert manifest.to_bytes() == (
        b'{"expected":null,"files":[{"path":"a/b.json","sha256":"' + b"00" * 32 + b'","size":3},{"path":"churn.txt",'
        b'"sha256":"' + b"ab" * 32 + b'","size":1733211}],"format":"lightgbm-text","kind":"lightgbm","python":"3.11",'
        b'"requirements":null,"sample":{"sha256":"' + b"ab" * 32 + b'","size":210},"schema":"ekiben.manifest.v1"}'
    )
    assert manifest.digest.startswith("sha256:")
    assert manifest.size == 1733214


def test_the_model_is_named_where_there_are_several_files_and_only_there():
    manifest = Manifest("onnx", "onnx", FILES, model="a/b.json")
    assert b'"kind":"onnx","model":"a/b.json","python":null' in manifest.to_bytes()
    assert Manifest.parse(manifest.to_bytes()) == manifest
    without = Manifest("onnx", "onnx", FILES)
    assert b"model" not in without.to_bytes(), "versions from before keep their bytes and digests"
    assert without.digest != manifest.digest
    assert Manifest.parse(without.to_bytes()) == without
    with pytest.raises(UserError, match="one file"):
        Manifest("onnx", "onnx", FILES[:1], model="churn.txt")


files = st.lists(
    st.builds(File, st.from_regex(r"[a-z]{1,5}\.x", fullmatch=True), st.integers(0, 1 << 40), st.just(SHA)),
    min_size=1,
    unique_by=lambda file: file.path,
)


@given(files, st.randoms())
def test_digest_does_not_depend_on_file_order_and_parse_is_the_inverse(some, random):
    shuffled = list(some)
    random.shuffle(shuffled)
    one, other = Manifest("k", "f", tuple(some)), Manifest("k", "f", tuple(shuffled))
    assert one == other
    assert one.digest == other.digest
    assert Manifest.parse(one.to_bytes()) == one


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_a_bad_manifest(data):
    with pytest.raises(UserError) as error:
        Manifest.parse(data)
    assert code_of(error) == "bad_manifest"


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "ekiben.manifest.v2"},
        {"kind": "a/b"},
        {"kind": None},
        {"files": []},
        {"files": [{"path": "../x", "size": 1, "sha256": SHA}]},
        {"files": [{"path": "x", "size": -1, "sha256": SHA}]},
        {"files": [{"path": "x", "size": True, "sha256": SHA}]},
        {"files": [{"path": "x", "size": 1, "sha256": SHA.upper()}]},
        {"files": [{"path": "x", "size": 1, "sha256": SHA}, {"path": "x", "size": 1, "sha256": SHA}]},
        {"files": [{"path": "x", "size": 1, "sha256": SHA}, {"path": "x/y", "size": 1, "sha256": SHA}]},
        {"files": [{"path": "x", "size": 1, "sha256": SHA, "mode": 1}]},
        {"files": [{"path": 7, "size": 1, "sha256": SHA}, {"path": "x", "size": 1, "sha256": SHA}]},
        {"files": "x"},
        {"sample": {"path": "x", "size": 1, "sha256": SHA}},
        {"requirements": {"path": "setup.py", "size": 1, "sha256": SHA}},
        {"python": "3.11; x"},
        {"name": "churn"},
        {"model": "x"},
        {"model": ""},
        {"model": None},
        {"model": ["churn.txt"]},
    ],
)
def test_a_manifest_with_anything_odd_is_refused(change):
    body = json.loads(Manifest("lightgbm", "lightgbm-text", FILES).to_bytes()) | change
    with pytest.raises(UserError) as error:
        Manifest.parse(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
    assert code_of(error) == "bad_manifest"


def test_a_manifest_that_is_not_canonical_is_refused():
    data = Manifest("lightgbm", "lightgbm-text", FILES).to_bytes()
    with pytest.raises(UserError, match="canonical"):
        Manifest.parse(data + b"\n")


@pytest.mark.parametrize("name", ["churn", "a", "x" * 40, "m-2", "predict-2"])
def test_usable_names(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "Churn", "a_b", "-a", "a-", "x" * 41, "2024", "a.b", "a\n", "ä", "../x", "a b", "\ud800"]
)
def test_bad_names_are_refused_with_a_usable_suggestion(name):
    with pytest.raises(UserError) as error:
        check_name(name)
    assert code_of(error) == "bad_name"
    assert error.value.field == "name"
    suggestion = (error.value.hint or "").split("name=")[1].rstrip(".")
    assert check_name(suggestion) == suggestion


@pytest.mark.parametrize("name", ["predict", "docs.json", "v2", "models", "metrics"])
def test_reserved_names_are_refused_with_a_usable_suggestion(name):
    with pytest.raises(UserError) as error:
        check_name(name)
    assert code_of(error) == "reserved_name"
    suggestion = (error.value.hint or "").split("name=")[1].rstrip(".")
    assert check_name(suggestion) == suggestion


@pytest.mark.parametrize(
    ("filename", "name"),
    [
        ("churn.txt", "churn"),
        ("Churn Model (v2).txt", "churn-model-v2"),
        ("/home/me/été.tar.gz", "ete"),
        ("C:\\x\\model.onnx", "model"),
        ("2024.json", "m-2024"),
        ("predict.txt", "predict-model"),
        ("漢字.txt", "model"),
        ("", "model"),
        ("x" * 99, "x" * 40),
        ("resnet-1.5.onnx", "resnet-1-5"),
    ],
)
def test_names_are_made_from_file_names(filename, name):
    assert name_from_filename(filename) == name


@given(st.text())
def test_a_name_made_from_any_file_name_is_usable(filename):
    assert check_name(name_from_filename(filename))
    assert check_name(name_from_filename(filename, has_suffix=False))


def test_every_reserved_word_is_itself_refused():
    for word in RESERVED:
        with pytest.raises(UserError):
            check_name(word)


@pytest.mark.parametrize("path", ["a", "a/b.txt", "ä/漢字", "a b", ".hidden", "a..b", "..."])
def test_safe_paths(path):
    assert check_path(path) == path


@pytest.mark.parametrize(
    "path",
    [
        "", "/", "/a", "a/", "a//b", ".", "..", "a/..", "../a", "a/./b", "a\\b", "C:/x", "C:x", "a\x00b", "a\nb",
        "a\x7f", "a\x85b", "a\u202eb", "a\u2028b", "\ud800", "x" * 256, "a/" * 32 + "a", "/".join(["x" * 200] * 5),
    ],
)  # fmt: skip
def test_unsafe_paths_are_refused(path):
    with pytest.raises(UserError) as error:
        check_path(path, field="files[0].path")
    assert code_of(error) == "bad_path"
    assert error.value.field == "files[0].path"
    assert error.value.detail.isascii()
