"""Keras v3 `.keras` files: a zip with config.json, metadata.json and the weights. Read as data; nothing is imported.

Keras' loading imports what config.json names (CVE-2025-1550, -8747, -9906), so every object in it must be Keras' own.
"""

from __future__ import annotations

import json
from typing import Any, BinaryIO, NoReturn

from registry.archive_zip import Entry, ZipFault, open_entry
from registry.errors import UserError
from registry.formats.upload import Recognised, invalid, read_up_to, shown, truncated

FORMAT = "keras-v3"
_SAVE = "model.save('model.keras')"
_LARGEST_CONFIG = 32 << 20
_CODE = frozenset({"Lambda", "__lambda__", "TorchModuleWrapper", "JaxLayer", "FlaxLayer", "TFSMLayer", "function"})


def recognise(stream: BinaryIO, members: list[Entry], path: str) -> Recognised | None:
    """The model in a zip with these members, None if it is no .keras file."""
    by_name = {entry.name: entry for entry in members}
    config, metadata = by_name.get("config.json"), by_name.get("metadata.json")
    if config is None or metadata is None:
        return None
    if config.size > _LARGEST_CONFIG or metadata.size > _LARGEST_CONFIG:
        invalid(path, "its config.json is too large", _SAVE)
    try:
        with open_entry(stream, metadata) as reader:
            about = json.loads(read_up_to(reader, _LARGEST_CONFIG + 1).decode())
        with open_entry(stream, config) as reader:
            body = json.loads(read_up_to(reader, _LARGEST_CONFIG + 1).decode(), object_pairs_hook=_object(path))
    except ZipFault as fault:
        truncated(path, fault.what, _SAVE)
    except (ValueError, RecursionError):
        invalid(path, "its config.json is not JSON", _SAVE)
    if not isinstance(about, dict) or "keras_version" not in about or not isinstance(body, dict):
        return None
    if len({entry.name for entry in members}) != len(members):
        invalid(path, "it holds a name twice", _SAVE)
    if "model.weights.h5" not in by_name and not any(name.startswith("model.weights") for name in by_name):
        truncated(path, "it holds no weights", _SAVE)
    return Recognised(FORMAT, path, notes=(f"Saved by Keras {shown(str(about['keras_version']))[:20]}.",))


def _object(path: str) -> Any:
    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        body = dict(pairs)
        if len(body) != len(pairs):
            invalid(path, "an object in its config.json has a key twice", _SAVE)
        name, module = body.get("class_name"), body.get("module")
        if isinstance(name, str) and name in _CODE:
            _refuse(path, f"a {name} layer or function, which is code")
        if "class_name" in body and isinstance(module, str) and not f"{module}.".startswith(("builtins.", "keras.")):
            _refuse(path, f"{module}.{name}, which is not Keras' own")
        registered = body.get("registered_name")
        if "class_name" in body and "module" in body and module is None and registered not in (None, name):
            _refuse(path, f"{registered}, which is not Keras' own")
        return body

    return check


def _refuse(path: str, what: str) -> NoReturn:
    raise UserError(
        "keras_lambda",
        f"{shown(path)} holds {shown(what)}.",
        field="file",
        hint="Take Keras' own layers and save again, or pack the model with its code: ekiben init --from FILE.",
    )
