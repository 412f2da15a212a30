"""skops files: a zip with schema.json, the tree of objects, and arrays beside it. Read as data; nothing is imported.

skops decides at loading what it trusts, and has had ways around that (CVE-2025-54886); here every node of the tree is
held against a fixed list (skops_types.py), whatever skops itself would say. Source: skops 0.13, skops/io.
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO, NoReturn, cast

from registry.archive import check_zip
from registry.archive_zip import Entry, Reopened, ZipFault, entries, open_entry
from registry.errors import UserError
from registry.formats import bounded_json
from registry.formats import skops_types as types
from registry.formats.pickles import is_pickle
from registry.formats.upload import Recognised, invalid, read_up_to, shown, truncated
from registry.signature import Column, Scalar, Signature

FORMAT = "skops"
_SAVE = "skops.io.dump(model, 'model.skops')"
_LARGEST_SCHEMA = 256 << 20
_MOST_MEMBERS = 100_000
_LARGEST_NPY = 1 << 20  # of arrays that are read for the signature
_MOST_ARRAYS = 100  # of a .npz
_LARGEST_NESTED = 1 << 20  # bytes of JSON documents within strings of the schema, together
_LATEST_PROTOCOL = 2

_DTYPES = frozenset(
    "numpy." + name
    for name in [
        "bool",
        "bool_",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "intp",
        "uintp",
        "longlong",
        "ulonglong",
        "float16",
        "float32",
        "float64",
        "longdouble",
        "complex64",
        "complex128",
        "clongdouble",
        "str_",
        "bytes_",
        "datetime64",
        "timedelta64",
        "void",
        "object_",
        "float128",
        "complex256",
    ]
)
_PLAIN_TYPES = frozenset("builtins." + name for name in ("int", "float", "str", "bool", "list", "set", "tuple", "dict"))
_UFUNC_MODULES = ("numpy", "numpy._core._multiarray_umath", "numpy.core._multiarray_umath", "numpy._core.umath",
                  "numpy.core.fromnumeric", "numpy._core.fromnumeric", "numpy._core.multiarray", "numpy.lib",
                  "numpy.lib._function_base_impl")  # fmt: skip
_SCIPY_MODULES = ("scipy.special", "scipy.special._ufuncs", "scipy.special._special_ufuncs")
_FUNCTIONS = (
    types.FUNCTIONS
    | {f"{module}.{name}" for module in _UFUNC_MODULES for name in types.NUMPY_FUNCTIONS}
    | {f"{module}.{name}" for module in _SCIPY_MODULES for name in types.SCIPY_FUNCTIONS}
)
_BIT_GENERATORS = frozenset({"MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"})
_SPARSE = frozenset(
    f"scipy.sparse._{form}.{form}_{sort}"
    for form in ("csr", "csc", "coo", "bsr", "dia", "dok", "lil")
    for sort in ("matrix", "array")
)

# For each loader of skops, the types that it may make. Loaders that are not here call what the file names.
_ALLOWED: dict[str, frozenset[str]] = {
    "DictNode": frozenset({"builtins.dict", "collections.OrderedDict", "sklearn.utils._bunch.Bunch"}),
    "DefaultDictNode": frozenset({"collections.defaultdict"}),
    "ListNode": frozenset({"builtins.list", "sklearn.compose._column_transformer._RemainderColsList"}),
    "SetNode": frozenset({"builtins.set", "builtins.frozenset"}),
    "TupleNode": frozenset({"builtins.tuple"}),
    "BytesNode": frozenset({"builtins.bytes"}),
    "BytearrayNode": frozenset({"builtins.bytearray"}),
    "SliceNode": frozenset({"builtins.slice"}),
    "JsonNode": frozenset({"builtins.str"}),
    "NdArrayNode": _DTYPES | {"numpy.ndarray"},
    "MaskedArrayNode": frozenset({"numpy.ma.MaskedArray", "numpy.ma.core.MaskedArray"}),
    "DTypeNode": frozenset({"numpy.dtype"}),
    "RandomStateNode": frozenset({"numpy.random.mtrand.RandomState", "numpy.random.RandomState"}),
    "RandomGeneratorNode": frozenset({"numpy.random._generator.Generator", "numpy.random.Generator"}),
    "SparseMatrixNode": _SPARSE,
    "TreeNode": frozenset({"sklearn.tree._tree.Tree"}),
    "LossNode": types.LOSSES,
    "ObjectNode": types.OBJECTS,
    "FunctionNode": _FUNCTIONS,
    "TypeNode": _PLAIN_TYPES | _DTYPES,
}


def accepted() -> list[str]:
    """Every type that is accepted, sorted: the same list as bentos/formats/trusted.json, by which files are loaded."""
    return sorted(frozenset[str]().union(*_ALLOWED.values()))


@dataclass(frozen=True, slots=True)
class _Node:
    """A node whose type was accepted, with as much of its content as the signature may need."""

    loader: str
    type: str
    content: Any = field(repr=False)


def recognise(stream: BinaryIO, members: list[Entry], path: str) -> Recognised | None:
    """The model in a zip with these members, None if it has no schema.json of skops."""
    by_name = {entry.name: entry for entry in members}
    schema = by_name.get("schema.json")
    if schema is None:
        return None
    if schema.size > _LARGEST_SCHEMA:
        invalid(path, f"its schema.json has {schema.size} bytes", _SAVE)
    try:
        with open_entry(stream, schema) as reader:
            text = read_up_to(reader, _LARGEST_SCHEMA + 1)
        if b'"__loader__"' not in text:
            return None
        _check_members(stream, members, path)
    except ZipFault as fault:
        truncated(path, fault.what, _SAVE)
    checker = _Checker(path, by_name)
    try:
        root = bounded_json.loads(text, "its schema.json", pairs=checker.node)
    except (ValueError, RecursionError):
        invalid(path, "its schema.json is not JSON", _SAVE)
    if not isinstance(root, _Node):
        invalid(path, "its schema.json describes no object", _SAVE)
    if not root.type.startswith("sklearn."):
        raise UserError(
            "no_estimator",
            f"{shown(path)} holds a {shown(root.type)}, no scikit-learn estimator.",
            field="file",
            hint=f"Save the fitted estimator or pipeline itself: {_SAVE}.",
        )
    return Recognised(FORMAT, path, signature=_signature(stream, by_name, root))


def _check_members(stream: BinaryIO, members: list[Entry], path: str) -> None:
    names: set[str] = set()
    for entry in members:
        if entry.name in names:
            invalid(path, f"it holds {shown(entry.name)!r} twice", _SAVE)
        names.add(entry.name)
        if entry.name == "schema.json":
            continue
        with open_entry(stream, entry) as reader:
            start = read_up_to(reader, 4096)
        if start.startswith(b"\x93NUMPY"):
            if re.search(rb"'descr':[^}]*?'[<>|=]?O[0-9]*'", start):
                _pickled(path, entry.name)
        elif entry.name.endswith(".bin"):
            continue  # bytes objects: skops gives them to the estimator as they are
        elif start.startswith(b"PK\x03\x04") and entry.name.endswith(".npz"):
            # sparse matrices: read by scipy with allow_pickle=False, and unpacked then
            inner = Reopened(partial(open_entry, stream, entry), entry.size)
            check_zip(entries(cast(BinaryIO, inner), _MOST_ARRAYS))
        elif is_pickle(start):
            _pickled(path, entry.name)
        else:
            invalid(path, f"its member {shown(entry.name)!r} is no array", _SAVE)


def _pickled(path: str, name: str) -> NoReturn:
    raise UserError(
        "pickle_refused",
        f"{shown(path)} holds {shown(name)!r}, a pickle: loading it would run code that the file chooses.",
        field="file",
        hint=f"Save the fitted estimator with {_SAVE}; or pack it as your own code: ekiben init --from FILE.",
    )


class _Checker:
    """Turns each object of schema.json, innermost first, into a checked _Node."""

    def __init__(self, path: str, members: dict[str, Entry]) -> None:
        self._path = path
        self._members = members
        self._numbers: dict[int, tuple[str, str, str | None]] = {}
        self._nested = 0

    def node(self, pairs: list[tuple[str, Any]]) -> Any:
        body = dict(pairs)
        if len(body) != len(pairs):
            invalid(self._path, "an object in its schema.json has a key twice", _SAVE)
        loader = body.get("__loader__")
        if not isinstance(loader, str):
            if "__loader__" in body and not isinstance(loader, _Node):
                invalid(self._path, "a node in its schema.json has no loader", _SAVE)
            return body
        module, name = body.get("__module__"), body.get("__class__")
        if not isinstance(module, str) or not isinstance(name, str):
            invalid(self._path, "a node in its schema.json has no type", _SAVE)
        full = f"{module}.{name}"
        if full not in _ALLOWED.get(loader, frozenset()):
            self._untrusted(loader, full)
        protocol = body.get("protocol")
        if protocol is not None and (type(protocol) is not int or not 0 <= protocol <= _LATEST_PROTOCOL):
            invalid(self._path, "its protocol is not known", _SAVE)
        file = body.get("file")
        if file is not None and (not isinstance(file, str) or file not in self._members):
            invalid(self._path, "an array of its schema.json is missing", _SAVE)
        content = body.get("content", file)
        if loader == "JsonNode" and isinstance(content, str) and content.lstrip()[:1] in ("[", "{"):
            self._nested += len(content)  # skops parses it again; it writes plain values alone there
            if self._nested > _LARGEST_NESTED:
                invalid(self._path, "its schema.json has JSON documents within strings", _SAVE)
        if loader == "RandomGeneratorNode":
            self._random(content)
        elif loader in ("ReduceNode", "TreeNode", "LossNode"):
            content = None
        elif loader == "DictNode":
            self._source(content)
        said = (loader, full, content if loader == "JsonNode" and isinstance(content, str) else None)
        # skops takes the first node of a number for every later one: another would be loaded than is checked
        number = body.get("__id__")
        if number is not None and (type(number) is not int or self._numbers.setdefault(number, said) != said):
            invalid(self._path, "two nodes of its schema.json have one number", _SAVE)
        return _Node(loader, full, content)

    def _source(self, content: Any) -> None:
        """Vectorizers take texts; with another `input` they would open the files that a request names. Whose
        attributes a dictionary holds is not asked, as a node may stand for others."""
        source = content.get("input") if isinstance(content, dict) else None
        if not isinstance(source, _Node):
            return
        if source.loader == "NdArrayNode" or _literal(source) in ("filename", "file"):
            raise UserError(
                "skops_reads_files",
                f"{shown(self._path)} holds a vectorizer with input={shown(repr(_literal(source)))}: it would open "
                "files that a request names.",
                field="file",
                hint="Make the vectorizer with input='content', which takes the texts themselves.",
            )

    def _random(self, content: Any) -> None:
        """numpy finds the bit generator by a plain string in the state, which skops then calls."""
        state = content.get("bit_generator") if isinstance(content, dict) else None
        inner = state.content if isinstance(state, _Node) else None
        word = inner.get("bit_generator") if isinstance(inner, dict) else None
        if not isinstance(word, _Node) or _literal(word) not in _BIT_GENERATORS:
            self._untrusted("RandomGeneratorNode", f"numpy.random.{_literal(word)}")

    def _untrusted(self, loader: str, full: str) -> NoReturn:
        raise UserError(
            "skops_untrusted_type",
            f"{shown(self._path)} holds {shown(full)} ({shown(loader)}), which is not on the list of types served.",
            field="file",
            hint="Use scikit-learn's own steps (no lambdas, partial or bound methods, no classes of your own or of "
            "other packages), or pack the model with its code: ekiben init --from FILE.",
        )


def _literal(node: Any) -> Any:
    """The value of a JsonNode; None where it is none."""
    if not isinstance(node, _Node) or node.loader != "JsonNode" or not isinstance(node.content, str):
        return None
    try:
        return json.loads(node.content)
    except (ValueError, RecursionError):
        return None


def _attributes(node: Any) -> dict[str, Any]:
    if isinstance(node, _Node) and node.loader == "ObjectNode" and isinstance(node.content, _Node):
        inner = node.content.content
        return inner if isinstance(inner, dict) else {}
    return {}


def _steps(node: Any) -> list[Any]:
    """The estimators of a pipeline in order; of a search its best estimator's; else the estimator alone."""
    found: list[Any] = []
    for _ in range(20):
        attributes = _attributes(node)
        if isinstance(node, _Node) and node.type == "sklearn.pipeline.Pipeline":
            steps = attributes.get("steps")
            pairs = steps.content if isinstance(steps, _Node) and isinstance(steps.content, list) else []
            found = [
                pair.content[1]
                for pair in pairs
                if isinstance(pair, _Node) and isinstance(pair.content, list) and len(pair.content) == 2
            ]
            break
        if "best_estimator_" not in attributes:
            found = [node]
            break
        node = attributes["best_estimator_"]
    return found


def _signature(stream: BinaryIO, members: dict[str, Entry], root: _Node) -> Signature | None:
    outer = _attributes(root)
    steps = _steps(root)
    width: Any = None
    names: list[Scalar] | None = None
    for node in [root, *steps]:
        attributes = _attributes(node)
        if width is None:
            width = _literal(attributes.get("n_features_in_"))
            names = _values(stream, members, attributes.get("feature_names_in_"))
        if width is not None or (steps and node is steps[0]):
            break
    if not isinstance(width, int) or isinstance(width, bool) or not 0 < width <= 1_000_000:
        width = None
    last = steps[-1] if steps else root
    classes = _values(stream, members, outer.get("classes_")) or _values(
        stream, members, _attributes(last).get("classes_")
    )
    task = "unknown"
    kind = last.type.rpartition(".")[2] if isinstance(last, _Node) else ""
    if classes is not None:
        task = "binary" if len(classes) == 2 else "multiclass"
    elif "Regress" in kind or kind in _REGRESSORS:
        task = "regression"
    if names is not None and (len(names) != width or not all(isinstance(name, str) for name in names)):
        names = None
    # what a column holds is settled by the transformers: a name alone says nothing
    columns = tuple(Column(str(name), "unknown") for name in names or ())
    known = None if classes is None or len(classes) > 10_000 else tuple(classes)
    return Signature(columns, bool(columns), width, task=task, classes=known)


_REGRESSORS = frozenset(
    [
        "SVR",
        "NuSVR",
        "LinearSVR",
        "Ridge",
        "RidgeCV",
        "Lasso",
        "LassoCV",
        "LassoLars",
        "LassoLarsCV",
        "LassoLarsIC",
        "Lars",
        "LarsCV",
        "ElasticNet",
        "ElasticNetCV",
        "BayesianRidge",
        "KernelRidge",
        "MultiTaskLasso",
        "MultiTaskElasticNet",
        "OrthogonalMatchingPursuit",
        "PLSCanonical",
        "TransformedTargetRegressor",
    ]
)


def _values(stream: BinaryIO, members: dict[str, Entry], node: Any) -> list[Scalar] | None:
    """A one-dimensional array of names or labels; None where it is absent, of another sort, or large."""
    if not isinstance(node, _Node) or node.loader != "NdArrayNode" or node.type != "numpy.ndarray":
        return None
    if isinstance(node.content, list):  # an object array: JSON in the schema, no pickle
        values = [_literal(item) for item in node.content]
        return values if all(isinstance(value, (str, int, float, bool)) for value in values) else None
    entry = members.get(node.content) if isinstance(node.content, str) else None
    if entry is None or entry.size > _LARGEST_NPY:
        return None
    try:
        with open_entry(stream, entry) as reader:
            return npy_values(read_up_to(reader, _LARGEST_NPY))
    except ZipFault:
        return None


_HEADER = re.compile(
    rb"\{'descr': '([<>|])([biufU])(\d{1,6})', 'fortran_order': (?:False|True), 'shape': \((\d{1,9}),\), \}\s*"
)


def npy_values(data: bytes) -> list[Scalar] | None:
    """The values of a one-dimensional .npy of booleans, numbers or text; else None. Nothing is evaluated."""
    if data[:6] != b"\x93NUMPY" or len(data) < 10:
        return None
    length, start = int.from_bytes(data[8:10], "little"), 10
    if data[6] != 1:
        length, start = int.from_bytes(data[8:12], "little"), 12
    match = _HEADER.fullmatch(data[start : start + length])
    if match is None:
        return None
    order = "big" if match[1] == b">" else "little"
    kind, width, count = match[2], int(match[3]), int(match[4])
    size = width * 4 if kind == b"U" else width
    body = data[start + length :]
    if len(body) != size * count or not size:
        return None
    items = [body[at : at + size] for at in range(0, len(body), size)]
    if kind == b"U":
        try:
            return [item.decode("utf-32-be" if order == "big" else "utf-32-le").rstrip("\0") for item in items]
        except UnicodeDecodeError:
            return None
    if kind == b"b":
        return [item != b"\0" for item in items]
    if kind == b"f":
        letter = {2: "e", 4: "f", 8: "d"}.get(width)
        if letter is None:
            return None
        return [struct.unpack((">" if order == "big" else "<") + letter, item)[0] for item in items]
    return [int.from_bytes(item, "big" if order == "big" else "little", signed=kind == b"i") for item in items]


if __name__ == "__main__":  # python -m registry.formats.skops > bentos/formats/trusted.json
    print(json.dumps(accepted(), indent=0))
