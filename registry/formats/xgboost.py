"""XGBoost's JSON and UBJSON models, as written by `Booster.save_model`.

Source: XGBoost, doc/model.schema and src/learner.cc. Trees are skipped, not read.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from registry.errors import UserError
from registry.formats import skim
from registry.formats.upload import Recognised, Upload, invalid, shown, truncated
from registry.signature import Column, Scalar, Signature

JSON = "xgboost-json"
UBJ = "xgboost-ubj"
_SAVE = "booster.save_model('model.ubj')"
_LEARNER = ("learner",)
_WANTED = frozenset(
    {
        ("version",),
        (*_LEARNER, "feature_names"),
        (*_LEARNER, "feature_types"),
        (*_LEARNER, "learner_model_param"),
        (*_LEARNER, "objective"),
        (*_LEARNER, "gradient_booster", "name"),
        (*_LEARNER, "gradient_booster", "model", "cats"),
        (*_LEARNER, "gradient_booster", "gbtree", "model", "cats"),
    }
)
_ENTERED = frozenset(path[:end] for path in _WANTED for end in range(len(path)))
_DTYPES = {"int": "int", "float": "number", "q": "number", "c": "category", "i": "bool"}
_TASKS = {"binary": "binary", "multi": "multiclass", "rank": "ranking", "reg": "regression", "count": "regression"}


def recognise(upload: Upload, path: str) -> Recognised | None:
    """The model in a file, None if the file is no XGBoost model. UserError where it is one and cannot be served."""
    head = upload.head(path, 4096)
    if head.startswith((b"binf", b"CONFIG-offset:")):
        raise UserError(
            "old_xgboost_binary",
            f"{shown(path)} is a model in XGBoost's old binary format, which today's XGBoost cannot read.",
            field="file",
            hint=f"Load it with the XGBoost that wrote it (before 3.1) and save it with {_SAVE}.",
        )
    if not head.startswith(b"{") and not head.lstrip(b" \t\r\n").startswith(b"{"):
        return None
    binary = len(head) > 1 and head[1] in b"iUIlL#$"
    first_key = b"learner" in head[:64] or b'"version"' in head[:64]
    try:
        with upload.open(path) as stream:
            walk = skim.ubjson_values if binary else skim.json_values
            found = walk(stream, _WANTED.__contains__, _ENTERED.__contains__)
    except skim.Cut:
        if first_key:
            truncated(path, "it ends within a value", _SAVE)
        return None
    except skim.Malformed as error:
        if first_key:
            invalid(path, str(error), _SAVE)
        return None
    if (*_LEARNER, "learner_model_param") not in found or (*_LEARNER, "objective") not in found:
        return None
    return Recognised(UBJ if binary else JSON, path, signature=_signature(found, path))


def _signature(found: dict[skim.Path, Any], path: str) -> Signature:
    parameters = found[(*_LEARNER, "learner_model_param")]
    objective = found[(*_LEARNER, "objective")]
    if not isinstance(parameters, dict) or not isinstance(objective, dict):
        invalid(path, "its parameters are no object", _SAVE)
    if found.get((*_LEARNER, "gradient_booster", "name")) not in ("gbtree", "dart", "gblinear"):
        invalid(path, "its booster is none of gbtree, dart and gblinear", _SAVE)
    width = _number(parameters, "num_feature", path)
    classes = _number(parameters, "num_class", path)
    names = _texts(found, "feature_names", path)
    types = _texts(found, "feature_types", path)
    for what, some in (("feature_names", names), ("feature_types", types)):
        if some and len(some) != width:
            invalid(path, f"it has {len(some)} {what} for {width} features", _SAVE)
    if len(set(names)) != len(names):
        invalid(path, "two of its features have one name", _SAVE)
    levels = _levels(found, names, path)
    columns = tuple(
        Column(
            names[index] if names else f"f{index}",
            _DTYPES.get(types[index], "unknown") if types else "number",
            levels.get(index) if types and types[index] == "c" else None,
        )
        for index in range(width if width <= 1_000_000 else 0)
    )
    named = bool(names) and names != [f"f{index}" for index in range(width)]
    task = _TASKS.get(str(objective.get("name", "")).partition(":")[0], "unknown")
    known: tuple[Scalar, ...] | None = None
    if task == "binary":
        known = (0, 1)
    elif task == "multiclass" and 0 < classes <= 10_000:
        known = tuple(range(classes))
    return Signature(columns, named, width, task=task, classes=known)


def _number(parameters: dict[str, Any], key: str, path: str) -> int:
    text = str(parameters.get(key, "0"))
    if not text.isascii() or not text.isdigit() or len(text) > 10:
        invalid(path, f"its {key} is no number", _SAVE)
    return int(text)


def _texts(found: dict[skim.Path, Any], key: str, path: str) -> list[str]:
    value = found.get((*_LEARNER, key), [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        invalid(path, f"its {key} are no list of names", _SAVE)
    return value


def _levels(found: dict[skim.Path, Any], names: list[str], path: str) -> dict[int, tuple[Scalar, ...]]:
    """Levels by feature index (XGBoost 3.1 and later store them); nothing where they are not as expected.

    UserError `damaged_categories` where their names are cut: up to 3.2 XGBoost counts letters where it should count
    bytes. What is left of a name may still be a word, though another one, so any name that is not ASCII is refused.
    """
    version = found.get(("version",))
    counts_letters = not isinstance(version, list) or not all(isinstance(n, int) for n in version) or version < [3, 3]
    stored = found.get((*_LEARNER, "gradient_booster", "model", "cats")) or found.get(
        (*_LEARNER, "gradient_booster", "gbtree", "model", "cats")
    )
    levels: dict[int, tuple[Scalar, ...]] = {}
    if not isinstance(stored, dict) or not isinstance(stored.get("enc"), list):
        return levels
    for index, entry in enumerate(stored["enc"]):
        if not isinstance(entry, dict) or not isinstance(entry.get("values"), list):
            continue
        values, offsets = entry["values"], entry.get("offsets")
        if not values or not all(isinstance(value, (int, float)) for value in values):
            continue
        if offsets is None:
            levels[index] = tuple(values)
        elif isinstance(offsets, list) and all(isinstance(offset, int) for offset in offsets):
            raw = bytes(int(value) & 0xFF for value in values)
            try:
                raw.decode("ascii" if counts_letters else "utf-8")
                levels[index] = tuple(raw[start:end].decode() for start, end in pairwise(offsets))
            except UnicodeDecodeError as error:
                column = names[index] if index < len(names) else f"f{index}"
                raise UserError(
                    "damaged_categories",
                    f"{shown(path)} holds damaged category names of the column {shown(column)}: "
                    "XGBoost up to 3.2 cuts names that are not ASCII when it saves a model.",
                    field="file",
                    hint="Train with ASCII category names (or their codes as numbers) and save again; or pack the "
                    "mapping of names to codes with the model as a project: ekiben init --from FILE.",
                ) from error
    return levels
