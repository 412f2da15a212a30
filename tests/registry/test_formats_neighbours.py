"""What lies beside a model: it is neither loaded nor taken for the model, and a zip has one reading."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from safetensors.numpy import save

from registry.archive_zip import ZipFault, entries, open_entry
from registry.errors import UserError
from registry.formats import Recognised, recognise


def see(files: dict[str, bytes]) -> Recognised:
    return recognise({path: len(data) for path, data in files.items()}, lambda path: io.BytesIO(files[path]))


def refused(files: dict[str, bytes]) -> UserError:
    with pytest.raises(UserError) as error:
        see(files)
    assert error.value.hint
    return error.value


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def onnx_model(operator: str = "Identity", location: str | None = None) -> bytes:
    info = helper.make_tensor_value_info
    nodes = [helper.make_node(operator, ["x"], ["y"], domain="com.microsoft" if operator == "PyOp" else "")]
    tensors = []
    if location is not None:
        tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", location
        tensors.append(tensor)
    ends = [[info(name, TensorProto.FLOAT, [None, 2])] for name in "xy"]
    model = helper.make_model(
        helper.make_graph(nodes, "g", *ends, tensors), opset_imports=[helper.make_opsetid("", 17)]
    )
    return bytes(model.SerializeToString())


def unknown_first(model: bytes) -> bytes:
    """The same model to protobuf's parser, with a field first that it does not know."""
    return varint(99 << 3) + b"\x01" + model


KERAS = {"config.json": "{}", "metadata.json": '{"keras_version": "3.8.0"}', "model.weights.h5": "HDF"}
EVIL = json.dumps({"module": "os", "class_name": "system", "config": {}})


def zip_of(members: dict[str, str | bytes], comment: bytes = b"") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as target:
        for name, content in members.items():
            target.writestr(name, content)
        target.comment = comment
    return out.getvalue()


@pytest.mark.parametrize(
    ("real", "other"),
    [
        ({"a.bin": onnx_model()}, {"evil.onnx": unknown_first(onnx_model("PyOp"))}),
        ({"a.bin": onnx_model()}, {"EVIL.ONNX": unknown_first(onnx_model("PyOp"))}),
        ({"a.bin": zip_of(KERAS)}, {"evil.keras": b"junk" + zip_of({**KERAS, "config.json": EVIL})}),
        ({"a.onnx": onnx_model()}, {"weights.h5": b"\x89HDF\r\n\x1a\n"}),
        ({"a.onnx": onnx_model()}, {"sub/saved_model.pbtxt": b"x"}),
        ({"a.onnx": onnx_model()}, {"empty.skops": b""}),
        ({"a.onnx": onnx_model(location="b.onnx")}, {"b.onnx": bytes(4)}),
    ],
)
def test_a_file_that_is_named_like_a_model_and_is_not_the_model_is_refused(
    real: dict[str, bytes], other: dict[str, bytes]
) -> None:
    fault = refused({**real, **other})
    assert fault.code in ("unrecognised_model", "onnx_external_data")
    for name in (*real, *other):
        assert name in f"{fault.detail} {fault.hint}"


def test_notes_tables_and_data_beside_a_model_are_taken() -> None:
    notes: dict[str, bytes] = {
        "README.md": b"# Churn",
        "LICENSE": b"MIT",
        "labels.txt": b"no\nyes\n",
        "about.json": b'{"trained": "2026-01-01"}',
        "columns.csv": b"age,income\n",
        "tokenizer.model": b"\x0a\x0e\x0a\x05<unk>",
        "mean.npy": b"\x93NUMPY",
        "empty": b"",
    }
    # raw floats begin with any bytes, also with those of a pickle or of another model
    for start in (b"\x80\x04\x95\x00", b"\x08\x07\x12\x00", b"tree\n"):
        found = see({"m.onnx": onnx_model(location="m.data"), "m.data": start + bytes(64), **notes})
        assert (found.path, found.parts) == ("m.onnx", frozenset({"m.data"}))


def test_a_model_among_the_files_of_a_folder_is_refused() -> None:
    config = json.dumps({"architectures": ["BertModel"], "model_type": "bert"}).encode()
    tokenizer = json.dumps({"model": {"type": "WordLevel", "vocab": {"[UNK]": 0}}}).encode()
    weights = save({"a": np.ones(2, np.float32)})
    folder = {"config.json": config, "tokenizer.json": tokenizer, "model.safetensors": weights}
    assert see({**folder, "tf_model.h5": b"\x89HDF\r\n\x1a\n", "vocab.txt": b"a\nb\n"}).path == "config.json"
    assert refused({**folder, "notes.bak": zip_of(KERAS)}).code == "several_models"
    assert refused({**folder, "other.pb": b"x"}).code == "unrecognised_model"


def test_a_field_whose_key_protobuf_would_cut_is_no_field() -> None:
    """protobuf reads a key as 32 bits: one with more is another field there, such as the operator of a node."""
    plain = onnx_model("Identity").replace(b"\x22\x08Identity", b"\x22\x04PyOp\x32\x02ab")
    assert refused({"m.onnx": plain}).code == "onnx_operator_refused"
    longer = varint(0x22 | 1 << 32)
    hidden = onnx_model("Identity" * 2).replace(b"\x22\x10" + b"Identity" * 2, longer + b"\x04PyOp\x32\x06abcdef")
    assert len(hidden) == len(onnx_model("Identity" * 2))
    assert refused({"m.onnx": hidden}).code == "invalid_model"


# --- one reading of a zip -------------------------------------------------------------------------------------------


END, END64, LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")


def evil_and_good() -> tuple[bytes, bytes, bytes]:
    """Members of a bad model, their directory, and a good zip whose places count from behind these members."""
    evil = zip_of({**KERAS, "config.json": EVIL})
    at = evil.index(b"PK\x01\x02")
    out = io.BytesIO(evil[:at])
    with zipfile.ZipFile(out, "a") as target:
        for name, content in KERAS.items():
            target.writestr(name, content)
    return evil[:at], evil[at : -END.size], out.getvalue()[at:]


def second_end_in_comment() -> bytes:
    """zipfile takes the last signature of an end, whatever its comment's length; this reader took one that fits."""
    members, directory, good = evil_and_good()
    place = len(members) + len(good)
    fake = END.pack(b"PK\x05\x06", 0, 0, 3, 3, len(directory), place, 7)  # there are no seven bytes after it
    comment = directory + fake
    return members + good[:-2] + struct.pack("<H", len(comment)) + comment


def hidden_64bit_end() -> bytes:
    """zipfile reads a 64-bit end wherever there is one; this reader did so only where a number is too large."""
    members, directory, good = evil_and_good()
    last, ending = good.rindex(b"PK\x01\x02"), len(good) - END.size
    place = len(members) + ending
    size = len(directory)
    end64 = END64.pack(b"PK\x06\x06", 44, 45, 45, 0, 0, 3, 3, size, place)
    # all this is the comment of the good directory's last member
    hidden = directory + end64 + LOCATOR.pack(b"PK\x06\x07", 0, place + size, 1)
    entry = bytearray(good[last:ending])
    entry[32:34] = struct.pack("<H", len(hidden))
    fields = list(END.unpack(good[ending:]))
    fields[5] += len(hidden)
    return members + good[:last] + bytes(entry) + hidden + END.pack(*fields)


def name_with_nul() -> bytes:
    """zipfile ends a name at its NUL, and takes the last member of a name."""
    data = zip_of({**KERAS, "config.jsonX": EVIL})
    return data.replace(b"config.jsonX", b"config.json\0")


def renamed_by_an_extra_field() -> bytes:
    """From Python 3.13 on zipfile takes a member's name from Info-ZIP's Unicode path."""
    info = zipfile.ZipInfo("other.json")
    info.extra = struct.pack("<HHBL", 0x7075, 5 + 11, 1, zlib.crc32(b"other.json")) + b"config.json"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as target:
        for name, content in KERAS.items():
            target.writestr(name, content)
        target.writestr(info, EVIL)
    return out.getvalue()


@pytest.mark.parametrize(
    "make",
    [second_end_in_comment, hidden_64bit_end, name_with_nul, renamed_by_an_extra_field],
    ids=lambda f: f.__name__,
)
def test_a_zip_that_zipfile_reads_otherwise_is_refused(make: Callable[[], bytes]) -> None:
    data = make()
    with zipfile.ZipFile(io.BytesIO(data)) as read:
        assert "config.json" in read.namelist()
        if make is not renamed_by_an_extra_field:
            assert read.read("config.json").decode() == EVIL, "what Keras would read"
    assert refused({"m.keras": data}).code in ("invalid_model", "truncated_model")


def test_a_zip_over_two_gibibytes_has_a_64bit_end_that_agrees(tmp_path: Path) -> None:
    """As zipfile writes one where the directory lies past 2 GiB; the file here is sparse."""
    path = tmp_path / "big.zip"
    with path.open("w+b") as out:
        out.seek((1 << 31) + 10)
        out.write(b".")
        with zipfile.ZipFile(out, "a") as target:
            target.writestr("a.txt", "a")
    with path.open("rb") as stream:
        (entry,) = entries(stream, 10)
        with open_entry(stream, entry) as reader:
            assert reader.read() == b"a"


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_zip_that_is_taken_reads_as_zipfile_reads_it(data: st.DataObject) -> None:
    whole = bytearray(zip_of({"a.json": "{}", "b/c.bin": bytes(40)}))
    for _ in range(data.draw(st.integers(1, 4))):
        # the directory and the ends are where the readers could differ
        at = data.draw(st.integers(max(0, len(whole) - 150), len(whole) - 1))
        whole[at] = data.draw(st.integers(0, 255))
    stream = io.BytesIO(bytes(whole))
    try:
        ours = {entry.name: open_entry(stream, entry).read() for entry in entries(stream, 10, model=True)}
    except ZipFault:
        return
    try:
        with zipfile.ZipFile(io.BytesIO(bytes(whole))) as read:
            theirs = {name: read.read(name) for name in read.namelist()}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError):
        return  # refused by the library: nothing is loaded
    assert ours == theirs
