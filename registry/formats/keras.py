"""Keras v3 `.keras` files: a zip with config.json, metadata.json and the weights. Read as data; nothing is imported.

Keras' loading imports what config.json names (CVE-2025-1550, -8747, -9906), and reads files that it names
(CVE-2025-12058): every object in it must be of those modules of Keras that make up networks, and words come in the file
and not by a path.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, BinaryIO, NoReturn

from registry.archive_zip import Entry, ZipFault, open_entry
from registry.errors import UserError
from registry.formats import bounded_json
from registry.formats.upload import Recognised, invalid, read_up_to, shown, truncated
from registry.signature import Signature, Tensor

FORMAT = "keras-v3"
_SAVE = "model.save('model.keras')"
_LARGEST_CONFIG = 32 << 20
_MOST_AXES = 32
_MADE_UP = re.compile(r"keras_tensor(_\d+)?|input_layer(_\d+)?|input_\d+|inputs|args_0")

# Modules of Keras whose objects make up a network. Not: utilities, callbacks, data sets, exports, saving, applications.
_MODULES = re.compile(
    r"keras(\.src)?(\.(layers|models|initializers|regularizers|constraints|activations|ops|dtype_policies|quantizers|random|"
    r"optimizers|losses|metrics)(\.[a-z][a-z0-9_]*)*)?"
)
_PATHS = ("vocabulary", "idf_weights")
"""Settings of layers that hold a list, or the path of a file to read it from."""
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
            about = bounded_json.loads(read_up_to(reader, _LARGEST_CONFIG + 1), "its metadata.json")
        with open_entry(stream, config) as reader:
            text = read_up_to(reader, _LARGEST_CONFIG + 1)
        body = bounded_json.loads(text, "its config.json", pairs=_object(path))
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
    version = shown(str(about["keras_version"]))[:20]
    return Recognised(FORMAT, path, signature=_signature(body), notes=(f"Saved by Keras {version}.",))


def plain_name(name: str) -> str:
    """Of a model's only input: a name that Keras made up counts on from model to model, so it is none to call it by."""
    return "input" if _MADE_UP.fullmatch(name) else name


def _signature(model: dict[str, Any]) -> Signature | None:
    """The inputs, and the names of several outputs, of a Sequential or Functional model; None where it does not say."""
    config = model.get("config")
    layers = config.get("layers") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(layers, list):
        return None
    inputs = [_input(layer) for layer in layers if isinstance(layer, dict) and layer.get("class_name") == "InputLayer"]
    tensors = {tensor.name: tensor for tensor in inputs if tensor is not None}
    if not tensors or len(tensors) != len(inputs):
        return None
    if model.get("class_name") == "Sequential":
        if len(tensors) != 1:
            return None
        names: dict[str, str] = {name: name for name in tensors}
        outputs: list[str] = []
    else:
        names, outputs = _named(config.get("input_layers")), list(_named(config.get("output_layers")))
    if not names or not set(names.values()) <= set(tensors):
        return None
    taken = [Tensor(name, tensors[layer].dtype, tensors[layer].shape) for name, layer in names.items()]
    if len(taken) == 1:
        taken = [replace(taken[0], name=plain_name(taken[0].name))]
    given = tuple(Tensor(name, "unknown") for name in outputs) if len(outputs) > 1 else ()
    return Signature(tensors=tuple(taken), outputs=given)


def _input(layer: dict[str, Any]) -> Tensor | None:
    config = layer.get("config")
    if not isinstance(config, dict):
        return None
    shape, name, dtype = config.get("batch_shape"), config.get("name"), config.get("dtype")
    if isinstance(dtype, dict):  # a policy
        inner = dtype.get("config")
        dtype = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(name, str) or not isinstance(dtype, str) or not isinstance(shape, list) or not shape:
        return None
    if len(shape) > _MOST_AXES or not all(axis is None or type(axis) is int for axis in shape):
        return None
    return Tensor(name, dtype, (None, *shape[1:]))  # the batch that it was built with binds nobody


def _named(ends: Any) -> dict[str, str]:
    """Name → layer of a model's inputs or outputs: `[layer, 0, 0]`, a list of these, or an object of these by name."""

    def layer(end: Any) -> str | None:
        return end[0] if isinstance(end, list) and len(end) == 3 and isinstance(end[0], str) else None

    if (only := layer(ends)) is not None:
        return {only: only}
    if isinstance(ends, dict):
        listed = [(str(name), layer(end)) for name, end in ends.items()]
    elif isinstance(ends, list):
        listed = [(layer(end) or "", layer(end)) for end in ends]
    else:
        return {}
    return {name: found for name, found in listed if found is not None} if all(end for _, end in listed) else {}


def _object(path: str) -> Any:
    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        body = dict(pairs)
        if len(body) != len(pairs):
            invalid(path, "an object in its config.json has a key twice", _SAVE)
        name, module = body.get("class_name"), body.get("module")
        if isinstance(name, str) and name in _CODE:
            _refuse(path, f"a {name} layer or function, which is code")
        if "class_name" in body and isinstance(module, str) and not _MODULES.fullmatch(module):
            _refuse(path, f"{module}.{name}, which is no part of a network")
        for key in _PATHS:
            if isinstance(body.get(key), str):
                _refuse(path, f"a layer whose {key} is the path of a file, {body[key]!r}")
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
