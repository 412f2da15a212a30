"""LightGBM's text format, as written by `Booster.save_model`.

LightGBM's own parser trusts the file's offsets (a wrong `tree_sizes` ends the whole process), so the frame is checked
here: header, every tree where `tree_sizes` says, `end of trees`, and the footer; and of each tree that its arrays have
the right lengths and that its indices stay inside (a wrong one is followed out of memory's bounds, CVE-2024-43598).
Source: LightGBM, src/boosting/gbdt_model_text.cpp; python-package/lightgbm/basic.py (`pandas_categorical`).
"""

from __future__ import annotations

from typing import BinaryIO

from registry.errors import UserError
from registry.formats import bounded_json
from registry.formats.upload import Recognised, Upload, invalid, read_up_to, shown, truncated
from registry.signature import Column, Scalar, Signature

FORMAT = "lightgbm-text"
_SAVE = "booster.save_model('model.txt')"
_LONGEST_LINE = 64 * 1024 * 1024
_LARGEST_FOOTER = 64 * 1024 * 1024
_LARGEST_TREE = 256 * 1024 * 1024
_LONGEST_HEADER = 200  # lines
_BOM = b"\xef\xbb\xbf"

# arrays of a tree that need not be there: how many values fewer than leaves they have
_OPTIONAL_ARRAYS = {
    b"split_gain": 1, b"internal_value": 1, b"internal_weight": 1, b"internal_count": 1, b"leaf_weight": 0,
    b"leaf_count": 0,
}  # fmt: skip

_TASKS = {
    "binary": "binary",
    "cross_entropy": "binary",
    "multiclass": "multiclass",
    "multiclassova": "multiclass",
    "lambdarank": "ranking",
    "rank_xendcg": "ranking",
    **dict.fromkeys(
        ["regression", "regression_l1", "huber", "fair", "poisson", "quantile", "mape", "gamma", "tweedie"],
        "regression",
    ),
}


def recognise(upload: Upload, path: str) -> Recognised | None:
    """The model in a file, None if the file is no LightGBM text. UserError where it is one and cannot be served."""
    head = upload.head(path, 64)
    plain = head.removeprefix(_BOM)
    if not plain.startswith((b"tree\n", b"tree\r\n")):
        return None
    if plain != head or plain.startswith(b"tree\r\n"):
        # LightGBM finds its trees by byte offsets: such a file is refused by it, or ends its process
        raise UserError(
            "text_converted",
            f"{shown(path)} is a LightGBM model that something has converted as text (Windows line ends or a byte "
            "order mark); LightGBM itself cannot read it so.",
            field="file",
            hint=f"Copy the original file in binary mode, run dos2unix on it, or save it again with {_SAVE}.",
        )
    with upload.open(path) as stream:
        header = _header(stream, path)
        _trees(stream, header, path)
        pandas = _footer(stream, path)
    signature, notes = _signature(header, pandas, path)
    return Recognised(FORMAT, path, signature=signature, notes=notes)


def _line(stream: BinaryIO, path: str) -> str:
    line = stream.readline(_LONGEST_LINE)
    if not line.endswith(b"\n"):
        truncated(path, "it ends within a line", _SAVE)
    try:
        return line[:-1].decode()
    except UnicodeDecodeError:
        invalid(path, "its text is not UTF-8", _SAVE)


def _header(stream: BinaryIO, path: str) -> dict[str, str]:
    _line(stream, path)
    header: dict[str, str] = {}
    for _ in range(_LONGEST_HEADER):
        line = _line(stream, path)
        if not line:
            break
        key, _, value = line.partition("=")
        if key in header:
            invalid(path, f"its header has {shown(key)} twice", _SAVE)
        header[key] = value
    for key in ("version", "num_class", "num_tree_per_iteration", "max_feature_idx", "feature_names", "feature_infos"):
        if key not in header:
            invalid(path, f"its header has no {key}", _SAVE)
    return header


def _int(header: dict[str, str], key: str, path: str, largest: int) -> int:
    text = header[key]
    if not text.isascii() or not text.isdigit() or len(text) > 12 or int(text) > largest:
        invalid(path, f"its {key} is {shown(text)!r}", _SAVE)
    return int(text)


def _trees(stream: BinaryIO, header: dict[str, str], path: str) -> None:
    sizes = header.get("tree_sizes")
    if sizes is None:
        invalid(path, "its header has no tree_sizes", _SAVE)
    width = _int(header, "max_feature_idx", path, 50_000_000) + 1
    count = 0
    for word in sizes.split():
        if not word.isascii() or not word.isdigit() or len(word) > 12:
            invalid(path, "its tree_sizes are no sizes", _SAVE)
        mark = f"Tree={count}\n".encode()
        left = int(word)
        if left > _LARGEST_TREE:
            invalid(path, f"tree {count} has {left} bytes", _SAVE)
        start = read_up_to(stream, min(left, len(mark)))
        if start != mark:
            if mark.startswith(start) and len(start) < left:
                truncated(path, f"it ends at tree {count} of {len(sizes.split())}", _SAVE)
            invalid(path, f"tree {count} is not where its header says", _SAVE)
        left -= len(start)
        body = read_up_to(stream, left)
        if len(body) < left:
            truncated(path, f"it ends within tree {count} of {len(sizes.split())}", _SAVE)
        try:
            fault = _tree_fault(body, width)
        except (ValueError, KeyError, IndexError):
            fault = "an array is missing or malformed"
        if fault is not None:
            invalid(path, f"tree {count}: {fault}", _SAVE)
        count += 1
    if count == 0:
        raise UserError(
            "empty_model",
            f"{shown(path)} is a LightGBM model without a single tree; its every prediction is the same.",
            field="file",
            hint="Train for at least one round, with enough rows for min_data_in_leaf.",
        )
    per_iteration = _int(header, "num_tree_per_iteration", path, 1_000_000)
    if per_iteration == 0 or count % per_iteration:
        invalid(path, f"{count} trees do not make up rounds of {per_iteration}", _SAVE)


def _tree_fault(body: bytes, width: int) -> str | None:
    """What is wrong with a tree whose lines these are, None if nothing is. ValueError, KeyError: malformed.

    Leaf i is the child ~i. Each leaf and each inner node but the first is the child of exactly one node, so the
    children in order are -leaves … -1, 1 … leaves - 2: this one comparison leaves no way out of bounds, and no circle
    that could be entered from the first node.
    """
    arrays: dict[bytes, bytes] = {}
    for line in body.split(b"\n"):
        key, equals, value = line.partition(b"=")
        if equals and key in arrays:
            return f"it has {key.decode(errors='replace')[:40]} twice"
        arrays[key] = value
    leaves = int(arrays[b"num_leaves"])
    if len(arrays[b"leaf_value"].split()) != leaves or leaves < 1:
        return "leaf_value has not as many values as there are leaves"
    if leaves > 1:
        for key in (b"threshold", b"decision_type", b"split_feature", b"left_child", b"right_child"):
            if len(arrays[key].split()) != leaves - 1:
                return f"{key.decode()} has not as many values as there are splits"
        for key, count in ((key, leaves - per_split) for key, per_split in _OPTIONAL_ARRAYS.items()):
            # LightGBM ends its process over one of another length
            if key in arrays and len(arrays[key].split()) != count:
                return f"{key.decode()} has not as many values as there are {'leaves' if count == leaves else 'splits'}"
        children = sorted(map(int, (arrays[b"left_child"] + b" " + arrays[b"right_child"]).split()))
        if children != [*range(-leaves, 0), *range(1, leaves - 1)]:
            return "its nodes do not form a tree"
        features = arrays[b"split_feature"].split()
        # few features are split on many times: each is converted once
        if any(not 0 <= int(feature) < width for feature in set(features)):
            return "it splits on a feature that there is not"
        if (fault := _categories_fault(arrays)) is not None:
            return fault
    return _linear_fault(arrays, leaves, width) if int(arrays.get(b"is_linear", b"0")) else None


def _categories_fault(arrays: dict[bytes, bytes]) -> str | None:
    """Categorical splits (lowest bit of decision_type) have the number of a bit set as threshold."""
    sets = int(arrays[b"num_cat"])
    kinds, thresholds = arrays[b"decision_type"].split(), arrays[b"threshold"].split()
    numbers = [float(threshold) for kind, threshold in zip(kinds, thresholds, strict=True) if int(kind) & 1]
    if any(not 0 <= number < sets for number in numbers):
        return "a categorical split has no set of categories"
    if sets == 0:
        return None
    bounds = [int(bound) for bound in arrays[b"cat_boundaries"].split()]
    if len(bounds) != sets + 1 or bounds[0] != 0 or bounds != sorted(bounds):
        return "cat_boundaries are out of order"
    if len(arrays[b"cat_threshold"].split()) != bounds[-1]:
        return "cat_threshold has not as many values as cat_boundaries says"
    return None


def _linear_fault(arrays: dict[bytes, bytes], leaves: int, width: int) -> str | None:
    counts = [int(count) for count in arrays[b"num_features"].split()]
    features = arrays[b"leaf_features"].split()
    if len(counts) != leaves or min(counts) < 0 or len(arrays[b"leaf_const"].split()) != leaves:
        return "its linear leaves are not as many as its leaves"
    if not sum(counts) == len(features) == len(arrays[b"leaf_coeff"].split()):
        return "a linear leaf has not as many coefficients as features"
    if any(not 0 <= int(feature) < width for feature in set(features)):
        return "a linear leaf uses a feature that there is not"
    return None


def _footer(stream: BinaryIO, path: str) -> list[list[Scalar]] | None:
    """Checks all that follows the trees; the levels of pandas' categorical columns, in column order."""
    text = read_up_to(stream, _LARGEST_FOOTER + 1)
    if len(text) > _LARGEST_FOOTER:
        invalid(path, f"more than {_LARGEST_FOOTER} bytes follow its trees", _SAVE)
    try:
        lines = text.decode().split("\n")
    except UnicodeDecodeError:
        invalid(path, "its text is not UTF-8", _SAVE)
    position = 0
    while position < len(lines) and not lines[position]:
        position += 1
    if position == len(lines) or lines[position] != "end of trees":
        if position == len(lines) or (position == len(lines) - 1 and "end of trees".startswith(lines[position])):
            truncated(path, "'end of trees' is missing", _SAVE)
        invalid(path, "'end of trees' is not where its header says", _SAVE)
    # the line of pandas' levels is the last one and may hold any character but a line end
    last = len(lines) - 1
    while last > position and not lines[last]:
        last -= 1
    pandas: list[list[Scalar]] | None = None
    complete = False
    if lines[last].startswith("pandas_categorical:"):
        pandas = _pandas(lines[last].removeprefix("pandas_categorical:"), path)
        complete = True
        last -= 1
    rest = lines[position : last + 1]
    if "parameters:" in rest and "end of parameters" not in rest:
        truncated(path, "'end of parameters' is missing", _SAVE)
    if not complete:
        while rest and not rest[-1]:
            rest.pop()
        if rest[-1] != "end of parameters":
            truncated(path, "'end of parameters' is not its last line", _SAVE)
    return pandas


def _pandas(text: str, path: str) -> list[list[Scalar]] | None:
    try:
        levels = bounded_json.loads(text.encode(), "its pandas_categorical")
    except (ValueError, RecursionError):
        truncated(path, "its last line, pandas_categorical, is cut", _SAVE)
    if levels is None:
        return None
    if not isinstance(levels, list) or not all(
        isinstance(some, list) and all(isinstance(level, (str, int, float, bool)) for level in some) for some in levels
    ):
        invalid(path, "pandas_categorical is no list of levels", _SAVE)
    return levels


def _signature(
    header: dict[str, str], pandas: list[list[Scalar]] | None, path: str
) -> tuple[Signature, tuple[str, ...]]:
    width = _int(header, "max_feature_idx", path, 50_000_000) + 1
    # counted before they are split: a line of spaces would become gigabytes
    named, described = (header[key].count(" ") + 1 for key in ("feature_names", "feature_infos"))
    if named != width or described != width:
        invalid(path, f"it names {named} features and describes {described}, max_feature_idx is {width - 1}", _SAVE)
    names = header["feature_names"].split(" ")
    infos = header["feature_infos"].split(" ")
    if len(set(names)) != width:
        invalid(path, "two of its features have one name", _SAVE)
    notes: list[str] = []
    codes = [_codes(info) for info in infos]
    levels, known = _levels(codes, infos, pandas)
    if not known:
        notes.append("Which columns pandas_categorical belongs to is not certain; levels are not checked.")
    columns = []
    for index, name in enumerate(names):
        if index in levels:
            columns.append(Column(name, "category", levels[index]))
        elif codes[index] is not None:
            # codes given as numbers; unseen ones count as missing
            columns.append(
                Column(name, "category", tuple(sorted(codes[index] or ())) if known and not pandas else None)
            )
        else:
            columns.append(Column(name, "number"))
    own_names = names != [f"Column_{index}" for index in range(width)]
    words = header.get("objective", "").split()
    task = _TASKS.get(words[0] if words else "", "unknown")
    classes = _int(header, "num_class", path, 1_000_000)
    known_classes: tuple[Scalar, ...] | None = None
    if task == "multiclass":
        known_classes = tuple(range(classes)) if classes <= 10_000 else None
    elif task == "binary":
        known_classes = (0, 1)
    return Signature(tuple(columns), own_names, width, task=task, classes=known_classes), tuple(notes)


def _codes(info: str) -> list[int] | None:
    """Category codes of `-1:1:0:2` (-1 is the bin of missing values); None for `[min:max]` and `none`."""
    if info == "none" or info.startswith("["):
        return None
    codes = []
    for word in info.split(":"):
        try:
            code = int(word) if len(word) <= 12 else -1
        except ValueError:
            return None
        if code >= 0:
            codes.append(code)
    return codes


def _levels(
    codes: list[list[int] | None], infos: list[str], pandas: list[list[Scalar]] | None
) -> tuple[dict[int, tuple[Scalar, ...]], bool]:
    """Levels by feature index, and whether the assignment is certain.

    The file lists levels in column order without saying of which columns. Categorical columns show in feature_infos,
    except constant ones, which show as `none` like any constant column.
    """
    if not pandas:
        return {}, True
    shown_as = [index for index, found in enumerate(codes) if found is not None]
    if len(shown_as) != len(pandas):
        shown_as = [index for index, found in enumerate(codes) if found is not None or infos[index] == "none"]
    if len(shown_as) != len(pandas):
        return {}, False
    for index, levels in zip(shown_as, pandas, strict=True):
        if max(codes[index] or [-1]) >= len(levels):
            return {}, False
    return {index: tuple(levels) for index, levels in zip(shown_as, pandas, strict=True)}, True
