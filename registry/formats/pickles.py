"""Pickles in all their wrappings: known, never read by unpickling, and refused as data with the way out."""

from __future__ import annotations

import re
import zlib
from typing import NoReturn

from registry.archive import sort_of, unpacked
from registry.archive_zip import Entry
from registry.errors import UserError
from registry.formats.upload import Upload, read_up_to, shown

_LOOK = 1 << 16

# Old pickles have no magic number. What makes them dangerous is the GLOBAL opcode: c, module and attribute, a line
# each; Python's own pickler remembers it at once (p or q), or calls it. A list of words looks alike, but does not end
# with STOP.
_OLD_GLOBAL = re.compile(rb"c[A-Za-z_][\w.]{0,200}\n[A-Za-z_][\w.]{0,200}\n(?:p\d+\n|q|\()")
_OLD_START = re.compile(rb"(?:\(l?p?\d*\n?|\]q|\}q|c[A-Za-z_]|I\d|F\d|S'|V|\(dp|\(lp|\(i)")
_STOP = b"."
_ZLIB = (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")
# compressions of joblib's that are not looked into; nothing else that is uploaded begins so
_JOBLIB = {b"ZF0x": "an old joblib file", b"\x04\x22\x4d\x18": "lz4-compressed data, as joblib writes pickles"}


def is_pickle(start: bytes, last: bytes | None = None) -> bool:
    """Whether a file that starts with these bytes is a pickle of any protocol; `last` is its last byte where known."""
    if len(start) >= 2 and start[0] == 0x80 and 2 <= start[1] <= 5:
        return True
    if last not in (None, _STOP):
        return False
    return _OLD_START.match(start) is not None and _OLD_GLOBAL.search(start[:4096]) is not None


def refuse_pickle(upload: Upload, path: str) -> None:
    """UserError `pickle_refused` if the file is a pickle, plain or compressed as joblib does it."""
    start = upload.head(path, _LOOK)
    with upload.open(path) as stream:
        stream.seek(upload.sizes[path] - 1)
        last = stream.read(1)
    if is_pickle(start, last):
        refuse(path, "a Python pickle", _library(start))
    inner = _unpacked(upload, path, start)
    if is_pickle(inner):
        refuse(path, "a compressed Python pickle, as joblib writes it", _library(inner))
    for magic, name in _JOBLIB.items():
        if start.startswith(magic):
            refuse(path, name, "unknown")


def _unpacked(upload: Upload, path: str, start: bytes) -> bytes:
    """The first bytes of what a compressed file holds; nothing where it is not compressed, or damaged."""
    try:
        if start.startswith(_ZLIB):
            return zlib.decompressobj().decompress(start, _LOOK)
        sort = sort_of(start)
        if sort in ("gz", "bz2", "xz"):
            with upload.open(path) as stream:
                return read_up_to(unpacked(stream, sort), _LOOK)
    except (zlib.error, UserError):
        pass
    return b""


def refuse_zipped_pickle(members: list[Entry], path: str, heads: dict[str, bytes]) -> None:
    """UserError `pickle_refused` if a zip holds a pickle: torch's .pt, or a pickle that was zipped. `heads` are the
    first bytes of each member."""
    names = {entry.name for entry in members}
    torch = any(name == "data.pkl" or name.endswith("/data.pkl") for name in names)
    for name, start in sorted(heads.items()):
        if is_pickle(start):
            library = "torch" if torch else _library(start)
            refuse(path, f"a zip that holds the pickle {shown(name)!r}", library)
        if name.lower().endswith((".pkl", ".pickle", ".joblib", ".dill")):
            refuse(path, f"a zip that holds {shown(name)!r}, a pickle by its name", "unknown")


def _library(start: bytes) -> str:
    for library, marks in (
        ("torch", (b"torch",)),
        ("lightgbm", (b"lightgbm",)),
        ("xgboost", (b"xgboost",)),
        ("catboost", (b"catboost",)),
        ("keras", (b"keras", b"tensorflow")),
        ("sklearn", (b"sklearn",)),
    ):
        if any(mark in start for mark in marks):
            return library
    return "unknown"


_WAYS_OUT = {
    "sklearn": "Export it from scikit-learn with skops.io.dump(model, 'model.skops')",
    "torch": "Export it from torch with torch.onnx.export(model, example, 'model.onnx'), or save the weights as "
    "safetensors: safetensors.torch.save_file(model.state_dict(), 'model.safetensors')",
    "lightgbm": "Export it from LightGBM with model.booster_.save_model('model.txt') "
    "(a Booster: booster.save_model('model.txt'))",
    "xgboost": "Export it from XGBoost with model.save_model('model.ubj')",
    "catboost": "Export it from CatBoost with model.save_model('model.onnx', format='onnx')",
    "keras": "Export it from Keras with model.save('model.keras')",
    "unknown": "Export the model instead: scikit-learn with skops.io.dump(model, 'model.skops'), LightGBM and XGBoost "
    "with save_model, torch as ONNX or safetensors",
}


def refuse(path: str, what: str, library: str) -> NoReturn:
    raise UserError(
        "pickle_refused",
        f"{shown(path)} is {what}: loading it would run whatever code the file chooses, so it is not accepted as data.",
        field="file",
        hint=f"{_WAYS_OUT[library]}. To serve it as it is, as your own code with your preprocessing: "
        "ekiben init --from FILE.",
    )
