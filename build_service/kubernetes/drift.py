"""Whether an object of the cluster is still as it was applied. Pure.

The server fills in defaults and others add fields of their own, so an object holds what is wanted if it says all of it,
and was applied by these very words: a field that is no longer wanted shows in the digest of the words only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from build_service.kubernetes import names
from build_service.quantities import parse_amount

_KEYS = (
    "name",
    "containerPort",
    "mountPath",
    "port",
    "key",
    "type",
    "topologyKey",
    "path",
)  # by which lists are merged
_AMOUNTS = ("requests", "limits", "hard")


def holds(live: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """`wanted` as it was sealed (`manifests.sealed`); its fencing token does not count."""
    marks = {key: value for key, value in wanted["metadata"]["annotations"].items() if key != names.FENCE}
    # Objects of a list do not say what they are.
    said = {key: value for key, value in wanted.items() if key not in ("apiVersion", "kind")}
    return _within(live, {**said, "metadata": {**wanted["metadata"], "annotations": marks}}, "")


def fence(live: Mapping[str, Any]) -> int:
    """Fencing token of the lease that the object was applied under."""
    text = (live["metadata"].get("annotations") or {}).get(names.FENCE, "0")
    return int(text) if text.isdigit() else 0


def _within(live: Any, wanted: Any, field: str) -> bool:
    if isinstance(wanted, Mapping):
        if not isinstance(live, Mapping):
            return not wanted and live is None  # an empty object may be left out
        if field in _AMOUNTS:
            return all(key in live and _same_amount(live[key], value) for key, value in wanted.items())
        return all(_within(live.get(key), value, key) for key, value in wanted.items())
    if isinstance(wanted, Sequence) and not isinstance(wanted, str):
        if not isinstance(live, Sequence) or isinstance(live, str):
            return not wanted and live is None
        return _all_within(live, wanted)
    if field == "sizeLimit":
        return live is not None and _same_amount(live, wanted)
    return bool(live == wanted) or (live is None and wanted == "")  # the server leaves out what is empty


def _all_within(live: Sequence[Any], wanted: Sequence[Any]) -> bool:
    key = next((key for key in _KEYS if wanted and all(_is_key(each, key) for each in wanted)), None)
    if key is None or len({str(each[key]) for each in wanted}) != len(wanted):
        return len(live) == len(wanted) and all(_within(a, b, "") for a, b in zip(live, wanted, strict=True))
    found = {each[key]: each for each in live if _is_key(each, key)}
    return all(each[key] in found and _within(found[each[key]], each, "") for each in wanted)


def _is_key(each: Any, key: str) -> bool:
    """In the matches of an HTTPRoute, `path` is no name but an object."""
    return isinstance(each, Mapping) and isinstance(each.get(key), str | int)


def _same_amount(live: Any, wanted: Any) -> bool:
    return parse_amount(str(live)) == parse_amount(str(wanted))
