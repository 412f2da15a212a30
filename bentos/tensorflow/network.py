"""A Keras v3 file or a SavedModel folder as one compiled function of named tensors.

A function is traced once, for rows of any number: no request makes TensorFlow trace again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from bentos import serving
from bentos.serving import keras_rows, tensorflow_rows
from bentos.serving.networks import as_keras, tensorflow
from bentos.serving.row_flow import Rows, Value
from bentos.serving.tensors import DTYPES, Tensor, Tensors, value_schema

_KERAS_HINT = "save it with model.save('model.keras'), once it has been built by an Input or by a first call"
_SAVED_HINT = "save it with model.export('folder'), or with tf.saved_model.save and signatures={'serving_default': …}"

# names that Keras makes up count on from model to model (registry/formats/keras.py has the same)
_MADE_UP = re.compile(r"keras_tensor(_\d+)?|input_layer(_\d+)?|input_\d+|inputs|args_0")


@dataclass(frozen=True)
class Output:
    """What the model gives a row. `shape` is without the batch; None where it is not known before."""

    name: str
    dtype: str
    shape: tuple[int | None, ...] | None
    batched: bool
    single: bool = False
    """Its first axis is always of size 1."""

    def json_schema(self) -> dict[str, Any]:
        return {} if self.shape is None or self.dtype not in DTYPES else value_schema(self.dtype, self.shape)


@dataclass(frozen=True)
class Network:
    """`call` takes tensors by input name and gives them by output name."""

    inputs: Tensors
    outputs: tuple[Output, ...]
    separable: bool
    """The model takes several rows in one call."""
    structure: tuple[Value, ...]
    """For each output what its graph makes of the rows."""
    call: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    details: Mapping[str, Any]


def load(folder: serving.ModelFolder) -> Network:
    """The network of a version. Raises StartError `model_load_failed` when it cannot be served."""
    if folder.format == "tensorflow-savedmodel":
        return _saved_model(folder)
    return _keras(folder)


def _keras(folder: serving.ModelFolder) -> Network:
    tf = tensorflow()
    import keras

    path = folder.path(folder.model_file(lambda name: name.lower().endswith(".keras")))
    try:
        with as_keras(path) as named:
            model = keras.saving.load_model(named, compile=False, safe_mode=True)
    except Exception as error:  # Keras raises whatever its layers, h5py and zipfile do
        raise _failed(f"{path.name} cannot be loaded by Keras {keras.__version__}", error, _KERAS_HINT) from error
    try:
        flat, answers = list(model.inputs), list(model.outputs)
    except (AttributeError, TypeError, ValueError) as error:  # it was never built
        raise _failed(f"{path.name} does not say what it takes", error, _KERAS_HINT) from error
    # a chain of layers has one of each; what else says what it takes was made from its inputs
    chain = isinstance(model, keras.Sequential)
    takes, gives = (flat[0], answers[0]) if chain else (model.input, model.output)
    if any(getattr(t, "sparse", False) or getattr(t, "ragged", False) for t in flat):
        message = f"{path.name} takes sparse or ragged tensors, which rows of JSON are not"
        raise serving.StartError("model_load_failed", message, "give the model an Input of a dense tensor")
    names = list(takes) if isinstance(takes, dict) else [t.name for t in flat]
    tensors = [takes[name] for name in names] if isinstance(takes, dict) else flat
    if isinstance(gives, dict):
        outputs = list(gives)
    elif len(answers) == 1:
        outputs = ["output"]
    else:
        outputs = list(dict.fromkeys(getattr(model, "output_names", ())))
        outputs = outputs if len(outputs) == len(answers) else [f"output_{i}" for i in range(len(answers))]
    specs = [
        tf.TensorSpec((None, *t.shape[1:]), t.dtype, name=f"input_{i}") for i, t in enumerate(tensors)
    ]  # the batch that a model was built with binds nobody

    def run(*values: Any) -> list[Any]:
        if isinstance(takes, dict):
            answer = model(dict(zip(names, values, strict=True)), training=False)
        else:
            answer = model(keras.tree.pack_sequence_as(takes, list(values)), training=False)
        return [answer[name] for name in outputs] if isinstance(answer, dict) else keras.tree.flatten(answer)

    try:
        traced = tf.function(run, input_signature=specs, autograph=False).get_concrete_function()
    except Exception as error:
        raise _failed(f"{path.name} cannot be compiled", error, _KERAS_HINT) from error

    _check(path.name, traced.graph.as_graph_def())

    def call(feed: Mapping[str, Any]) -> Mapping[str, Any]:
        values = traced(*(tf.constant(feed[n], s.dtype) for n, s in zip(names, specs, strict=True)))
        return dict(zip(outputs, values, strict=True))

    return _network(
        dict(zip(names, specs, strict=True)),
        dict(zip(outputs, traced.structured_outputs, strict=True)),
        call,
        {"keras": keras.__version__, "parameters": int(model.count_params())},
        traced,
        independent=keras_rows.independent(model),
    )


def _saved_model(folder: serving.ModelFolder) -> Network:
    tf = tensorflow()
    path = PurePosixPath(folder.model_file(lambda name: PurePosixPath(name).name == "saved_model.pb"))
    if path.name != "saved_model.pb":
        message = f"this version has no saved_model.pb among its {len(folder.files)} files"
        raise serving.StartError("model_load_failed", message, _SAVED_HINT)
    top = path.parent
    shown = "the SavedModel" if top == PurePosixPath(".") else f"the SavedModel {top}"
    place = folder.root / "files" / top
    try:
        for graph in _graphs(place / "saved_model.pb"):
            _check(shown, graph, saved=True)
        loaded = tf.saved_model.load(str(place))
        signatures = dict(loaded.signatures)
    except serving.StartError:
        raise
    except Exception as error:  # errors of the file system, of protobuf, and of restoring variables
        raise _failed(f"{shown} cannot be loaded by TensorFlow {tf.__version__}", error, _SAVED_HINT) from error
    name = "serving_default" if "serving_default" in signatures else next(iter(signatures), None)
    if name is None or (name != "serving_default" and len(signatures) > 1):
        message = f"{shown} has the signatures {sorted(signatures)}, none of which is serving_default"
        raise serving.StartError("model_load_failed", message[:1000], _SAVED_HINT)
    signature = signatures[name]
    # the signature has no order of its own
    specs = dict(sorted(signature.structured_input_signature[1].items()))

    def call(feed: Mapping[str, Any]) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = signature(**{n: tf.constant(feed[n], s.dtype) for n, s in specs.items()})
        return answer

    # variables live as long as what was loaded does, not as long as its signature
    call.loaded = loaded  # type: ignore[attr-defined]
    return _network(
        specs,
        dict(sorted(signature.structured_outputs.items())),
        call,
        {"signature": name, "tensorflow": tf.__version__},
        signature,
    )


def operators() -> frozenset[str]:
    """Return the operators that a graph may have: those that an upload is accepted with. registry/formats also checks
    where the files of `_FILES` come from."""
    listed: list[str] = json.loads(Path(__file__).with_name("operators.json").read_text("utf-8"))
    return frozenset(listed)


_FILES = frozenset((
    "InitializeTableFromTextFile", "InitializeTableFromTextFileV2", "RestoreV2", "Restore", "RestoreSlice", "SaveV2",
    "Save",
    "SaveSlices", "MergeV2Checkpoints",
))  # fmt: skip
"""What a SavedModel's own initialisers and saver have besides."""


def _graphs(path: Path) -> list[Any]:
    from tensorflow.core.protobuf import saved_model_pb2

    return [each.graph_def for each in saved_model_pb2.SavedModel.FromString(path.read_bytes()).meta_graphs]


def _check(name: str, graph: Any, saved: bool = False) -> None:
    """Look at a GraphDef once more as TensorFlow itself read it, before any of it runs. Raises StartError."""
    found = {node.op for nodes in (graph.node, *(f.node_def for f in graph.library.function)) for node in nodes}
    odd = found - operators() - (_FILES if saved else frozenset())
    if odd:
        message = f"{name} has operators that are not served: {', '.join(sorted(odd))[:500]}"
        raise serving.StartError("model_load_failed", message, "build the network from Keras' own layers")


def _network(
    specs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    call: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    details: Mapping[str, Any],
    function: Any,
    independent: bool = False,
) -> Network:
    """`function` is what `call` runs; `independent`: its layers are known to answer each row by itself."""
    if not specs:
        raise serving.StartError("model_load_failed", "the model has no inputs", "export a model with inputs")
    tensors = Tensors(tuple(_tensor(name, spec) for name, spec in specs.items()))
    if len(specs) == 1 and _MADE_UP.fullmatch(made_up := tensors.names[0]):
        tensors, inner = Tensors((replace(tensors.all[0], name="input"),)), call

        def call(feed: Mapping[str, Any]) -> Mapping[str, Any]:
            return inner({made_up: feed["input"]})

    given = tuple(_output(name, spec) for name, spec in outputs.items())
    fixed = {_batch(spec) for spec in specs.values()} - {None}
    if tensors.batched and any(size != 1 for size in fixed):
        message = f"the model takes exactly {min(fixed, key=str)} rows at once"
        raise serving.StartError("model_load_failed", message, "export it with a first axis of None")
    structure = tensorflow_rows.structure(function, len(given), tensors.free)
    if independent:
        structure = tuple(
            found if isinstance(found, Rows) or each.shape is None else Rows(len(each.shape) + 1)
            for found, each in zip(structure, given, strict=True)
        )
    return Network(tensors, given, tensors.batched and not fixed, structure, call, details)


def _batch(spec: Any) -> int | None:
    return spec.shape[0] if spec.shape.rank else None


def _tensor(name: str, spec: Any) -> Tensor:
    dtype = spec.dtype.name
    if dtype not in DTYPES:
        message = f"the input {name!r} is a tensor of {dtype}, which cannot be sent as JSON"
        raise serving.StartError("model_load_failed", message, "export the model with tensors of numbers or text")
    sizes = None if spec.shape.rank is None else tuple(spec.shape[1:])
    return Tensor(name, dtype, sizes, spec.shape.rank != 0)


def _output(name: str, spec: Any) -> Output:
    rank = spec.shape.rank
    batched = rank is None or (rank > 0 and spec.shape[0] is None)
    single = bool(rank) and spec.shape[0] == 1
    sizes = None if rank is None else tuple(spec.shape[1:] if batched or single else spec.shape)
    return Output(name, spec.dtype.name, sizes, batched, single)


def _failed(what: str, error: Exception, hint: str) -> serving.StartError:
    said = str(error).strip().split("\n")[0][:500]
    return serving.StartError("model_load_failed", f"{what}: {said}", hint)
