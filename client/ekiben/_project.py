"""A ten-line Bento project around a model file, for models that need code: pickles, and preprocessing.

The file is never loaded. Which packages a pickle needs is read off its bytes: it names each class that it holds by
module and name, and these stand in it as text.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import importlib.metadata
import lzma
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ekiben._errors import UsageError

_CHUNK = 1024 * 1024
_LONGEST_NAME = 512

# GLOBAL "c module\nname\n" of protocols up to 3; two short strings and STACK_GLOBAL of protocol 4 and later, each
# string perhaps put into the memo (\x94).
_GLOBAL = re.compile(rb"c([A-Za-z_][\w.]{0,200})\n([A-Za-z_][\w.]{0,200})\n")
_STACK_GLOBAL = re.compile(rb"\x8c(.)([A-Za-z_][\w.]{0,200}?)\x94?\x8c(.)([A-Za-z_][\w.]{0,200}?)\x94?\x93", re.DOTALL)


@dataclass(frozen=True)
class Written:
    """The project: its folder, its files, and what the user should know of it."""

    folder: Path
    files: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Recipe:
    """How a sort of file is loaded and asked, as lines of Python, and the distributions that takes."""

    imports: tuple[str, ...]
    load: str
    predict: str
    distributions: tuple[str, ...]


_RECIPES = {
    "joblib": _Recipe(("import joblib",), "joblib.load(FILE)", "self.model.predict(rows)", ("joblib",)),
    "pickle": _Recipe(("import pickle",), "pickle.loads(FILE.read_bytes())", "self.model.predict(rows)", ()),
    "lightgbm": _Recipe(
        ("import lightgbm",), "lightgbm.Booster(model_file=FILE)", "self.model.predict(rows)", ("lightgbm",)
    ),
    "xgboost": _Recipe(
        ("import xgboost",),
        "xgboost.Booster(model_file=FILE)",
        "self.model.predict(xgboost.DMatrix(rows, enable_categorical=True))",
        ("xgboost-cpu", "xgboost"),
    ),
    "onnx": _Recipe(
        ("import onnxruntime",),
        "onnxruntime.InferenceSession(FILE)",
        'self.model.run(None, {self.model.get_inputs()[0].name: rows.to_numpy("float32")})[0]',
        ("onnxruntime",),
    ),
    "skops": _Recipe(
        ("from skops import io",),
        "io.load(FILE, trusted=io.get_untrusted_types(file=FILE))",
        "self.model.predict(rows)",
        ("skops", "scikit-learn"),
    ),
}


def stem(model: Path) -> str:
    return re.sub(r"[^a-z0-9]+", "-", model.name.partition(".")[0].lower()).strip("-") or "model"


def write(model: Path, folder: Path) -> Written:
    """Write the project; the folder may exist but must be empty. Raises UsageError, leaving nothing behind."""
    try:
        size = model.stat().st_size
    except OSError as error:
        raise UsageError(f"{model} cannot be read: {error.strerror}", code="no_such_file", field="from") from None
    if not model.is_file() or size == 0:
        raise UsageError(f"{model} is {'empty' if model.is_file() else 'no file'}", code="empty_file", field="from")
    sort = recognise(model)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"{folder} is there already, and not empty",
            code="folder_exists",
            hint="name another: ekiben init --from FILE DIR",
        )
    # The name stands in Python, in YAML and as a pattern: plain characters mean the same in all three.
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", model.name).strip("-")
    names = modules(model) if sort in ("joblib", "pickle") else frozenset()
    recipe = _RECIPES[sort]
    requirements, notes = _requirements(recipe, names)
    texts = {
        "service.py": service(plain, recipe, pandas="pandas" in _installed()),
        "bentofile.yaml": _BENTOFILE.replace("FILE", plain),
        "requirements.txt": "".join(f"{line}\n" for line in requirements),
    }
    if plain in texts:
        raise UsageError(f"a model cannot be named {model.name}", code="bad_name", field="from", hint="rename the file")
    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, "utf-8")
        shutil.copyfile(model, folder / plain)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        if existed:
            folder.mkdir()
        raise UsageError(f"{folder} cannot be written: {error.strerror}", code="not_writable") from None
    return Written(folder, (*texts, plain), tuple(notes))


def recognise(model: Path) -> str:
    """joblib | pickle | lightgbm | xgboost | onnx | skops, by the first bytes and the name. Raises UsageError."""
    with model.open("rb") as stream:
        head = stream.read(64)
    suffix = model.suffix.lower()
    if head.startswith(b"tree\n"):
        return "lightgbm"
    if head.startswith(b"PK\x03\x04") and suffix == ".skops":
        return "skops"
    if suffix in (".joblib", ".jl"):
        return "joblib"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        # joblib's own files are pickles with arrays between, which only joblib can read.
        return "joblib" if _holds(model, b"joblib.numpy_pickle") else "pickle"
    if suffix == ".onnx":
        return "onnx"
    if suffix == ".ubj" or (suffix == ".json" and _holds(model, b'"learner"')):
        return "xgboost"
    if suffix in (".pkl", ".pickle", ".gz", ".z", ".xz", ".bz2"):
        return "joblib"  # a compressed dump; joblib finds the compression by itself
    raise UsageError(
        f"{model} is no model that a project can be written for",
        code="unknown_format",
        field="from",
        hint="known: joblib, pickle, LightGBM text, XGBoost JSON, ONNX, skops",
    )


def modules(model: Path) -> frozenset[str]:
    """Modules whose classes a pickle holds, read off its bytes in constant memory; nothing is loaded."""
    found: set[str] = set()
    tail = b""
    with contextlib.suppress(OSError, EOFError, zlib.error, lzma.LZMAError):
        for chunk in _plain(model):
            window = tail + chunk
            found.update(match[1].decode("ascii", "ignore") for match in _GLOBAL.finditer(window))
            for match in _STACK_GLOBAL.finditer(window):
                if match[1][0] == len(match[2]) and match[3][0] == len(match[4]):
                    found.add(match[2].decode("ascii", "ignore"))
            tail = window[-_LONGEST_NAME:]
    return frozenset(found)


def service(file: str, recipe: _Recipe, *, pandas: bool) -> str:
    """The text of service.py."""
    imports = sorted(["import bentoml", *(["import pandas"] if pandas else ["import numpy"]), *recipe.imports])
    table = "pandas.DataFrame(inputs)" if pandas else "numpy.asarray(inputs)"
    return _SERVICE.format(
        file=file,
        imports="\n".join(imports),
        constant=f'FILE = Path(__file__).parent / "{file}"',
        load=recipe.load if "FILE.read" in recipe.load else recipe.load.replace("FILE", "str(FILE)"),
        table=table,
        predict=recipe.predict
        if pandas
        else recipe.predict.replace('rows.to_numpy("float32")', 'rows.astype("float32")'),
    )


_SERVICE = '''"""Serves {file}."""

from pathlib import Path
from typing import Any

{imports}

{constant}


@bentoml.service
class Model:
    def __init__(self) -> None:
        self.model = {load}

    @bentoml.api
    def predict(self, inputs: list[Any]) -> dict[str, Any]:
        rows = {table}  # preprocessing goes here
        return {{"outputs": {predict}.tolist()}}
'''

_BENTOFILE = """service: "service:Model"
include:
  - "*.py"
  - FILE
python:
  requirements_txt: requirements.txt
"""


def _requirements(recipe: _Recipe, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Pinned lines for what the recipe and the pickle need, and notes on what could not be found."""
    installed = _installed()
    wanted: dict[str, str] = {}
    notes: list[str] = []
    for top in sorted({name.partition(".")[0] for name in names}):
        if top == "__main__":
            notes.append("the model holds classes of your script or notebook (__main__): import them in service.py")
        elif top in installed:
            wanted.update({name: _version(name) for name in installed[top]})
        elif top not in sys.stdlib_module_names and top not in ("copy_reg", "__builtin__"):
            notes.append(
                f"the model needs the module {top}, which is not installed here: copy {top}.py into the project"
            )
    found = [name for name in recipe.distributions if _has(name)]
    if recipe.distributions and not found:
        notes.append(
            f"{recipe.distributions[0]} is not installed here, so requirements.txt does not pin it: add its version"
        )
        wanted[recipe.distributions[0]] = ""
    # Alternatives such as xgboost-cpu and xgboost hold the same module; the first one that is there will do.
    alternatives = "xgboost" in recipe.distributions
    wanted.update({name: _version(name) for name in (found[:1] if alternatives else found)})
    for name in ("pandas",) if "pandas" in installed else ("numpy",):
        wanted[name] = _version(name) if _has(name) else ""
    lines = [f"{name}=={version}" if version else name for name, version in sorted(wanted.items())]
    return lines, notes


def _installed() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def _has(name: str) -> bool:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version(name)
        return True
    return False


def _version(name: str) -> str:
    # A local part (2.4.0+cu121) is on no public index.
    return importlib.metadata.version(name).partition("+")[0]


def _plain(model: Path) -> Iterator[bytes]:
    """The bytes of a file, decompressed if it is compressed as joblib does it."""
    with model.open("rb") as stream:
        head = stream.read(8)
        stream.seek(0)
        opener = _opener(head)
        source: Any = opener(stream) if opener else stream
        if head[:1] == b"\x78" and opener is None:
            inflate = zlib.decompressobj()
            while chunk := stream.read(_CHUNK):
                while chunk:
                    yield inflate.decompress(chunk, _CHUNK)
                    chunk = inflate.unconsumed_tail
            return
        while chunk := source.read(_CHUNK):
            yield chunk


def _opener(head: bytes) -> Callable[[BinaryIO], Any] | None:
    if head.startswith(b"\x1f\x8b"):
        return lambda stream: gzip.GzipFile(fileobj=stream)
    if head.startswith(b"BZh"):
        return bz2.BZ2File
    if head.startswith((b"\xfd7zXZ", b"\x5d\x00")):
        return lzma.LZMAFile
    return None


def _holds(model: Path, text: bytes) -> bool:
    tail = b""
    with model.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            if text in tail + chunk:
                return True
            tail = chunk[-len(text) :]
    return False
