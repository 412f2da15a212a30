"""TensorFlow SavedModel: a folder with saved_model.pb and variables/. The graph is walked, never loaded.

A graph is a program: what it may do is checked by tensorflow_graph.py. Here is what it takes and what it gives.
Field numbers: tensorflow/core/protobuf/{saved_model,meta_graph}.proto.
"""

from __future__ import annotations

from dataclasses import replace

from registry.errors import UserError
from registry.formats.keras import plain_name
from registry.formats.protobuf import Fault, Wire
from registry.formats.tensorflow_graph import Program
from registry.formats.upload import Recognised, Upload, invalid, shown, truncated
from registry.signature import Signature, Tensor

FORMAT = "tensorflow-savedmodel"
_SAVE = "model.export('folder')"
_MOST_TENSORS = 10_000

# tensorflow.DataType
_DTYPES = {
    1: "float32", 2: "float64", 3: "int32", 4: "uint8", 5: "int16", 6: "int8", 7: "string", 8: "complex64", 9: "int64",
    10: "bool", 14: "bfloat16", 17: "uint16", 18: "complex128", 19: "float16", 20: "resource", 21: "variant",
    22: "uint32", 23: "uint64",
}  # fmt: skip


def recognise(upload: Upload) -> Recognised | None:
    """The SavedModel in an upload, None if there is no saved_model.pb in it."""
    found = [path for path in upload.sizes if path.rpartition("/")[2] == "saved_model.pb"]
    if not found:
        return None
    if len(found) > 1:
        raise UserError(
            "several_models",
            f"The upload holds several SavedModels: {', '.join(shown(place) for place in sorted(found)[:5])}.",
            field="file",
            hint="Upload the folder of one SavedModel.",
        )
    path = found[0]
    if upload.sizes[path] == 0:
        truncated(path, "it is empty", _SAVE)
    # SavedModel: field 1 saved_model_schema_version = 1, field 2 the first MetaGraphDef
    if upload.head(path, 3) != b"\x08\x01\x12":
        invalid(path, "it does not begin as a SavedModel", _SAVE)
    folder = path.rpartition("/")[0]
    prefix = f"{folder}/variables/" if folder else "variables/"
    names = [name.removeprefix(prefix) for name in upload.sizes if name.startswith(prefix)]
    if any(name.startswith("variables.data") for name in names) != ("variables.index" in names):
        truncated(path, "its variables/ folder is not whole", _SAVE)
    with upload.open(path) as stream:
        graph = _Graph(Wire(stream, upload.sizes[path]), path)
        assets = f"{folder}/assets/" if folder else "assets/"
        try:
            graph.walk(frozenset(name.removeprefix(assets) for name in upload.sizes if name.startswith(assets)))
        except Fault as fault:
            if fault.cut:
                truncated(path, str(fault), _SAVE)
            invalid(path, str(fault), _SAVE)
    return Recognised(FORMAT, path, signature=graph.signature(), parts=_parts(upload, folder))


def _parts(upload: Upload, folder: str) -> frozenset[str]:
    """The files that TensorFlow writes beside saved_model.pb."""
    top = f"{folder}/" if folder else ""
    folders = tuple(f"{top}{name}/" for name in ("variables", "assets", "assets.extra", "debug"))
    files = {f"{top}fingerprint.pb", f"{top}keras_metadata.pb"}
    return frozenset(path for path in upload.sizes if path in files or path.startswith(folders))


class _Graph:
    """What saved_model.pb says of its signatures; UserError where it holds what is not served."""

    def __init__(self, wire: Wire, path: str) -> None:
        self._wire, self._path = wire, path
        self._signatures: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    def walk(self, assets: frozenset[str]) -> None:
        program = Program(self._wire, self._path)
        graphs = 0
        for number, wire, at, length in self._wire.fields(0, self._wire.size):
            if (number, wire) == (2, 2):
                graphs += 1
                if graphs > 1:
                    raise UserError(
                        "several_models",
                        f"{shown(self._path)} holds several MetaGraphs; one is served.",
                        field="file",
                        hint=f"Save the one for serving alone, with {_SAVE} or tf.saved_model.save.",
                    )
                self._meta_graph(at, at + length, program)
        program.check(assets)

    def signature(self) -> Signature:
        """Of what the service calls: `serving_default`, or the only one."""
        name = "serving_default" if "serving_default" in self._signatures else next(iter(self._signatures), "")
        if name not in self._signatures or (name != "serving_default" and len(self._signatures) > 1):
            raise UserError(
                "no_signature",
                f"{shown(self._path)} has no signature serving_default"
                + (f", but {shown(', '.join(sorted(self._signatures)))}." if self._signatures else "."),
                field="file",
                hint=f"Save it with {_SAVE}, or name a function: tf.saved_model.save(model, 'folder', "
                "signatures={'serving_default': …}).",
            )
        inputs, outputs = self._signatures[name]
        if len(inputs) == 1:
            inputs = [replace(inputs[0], name=plain_name(inputs[0].name))]
        return Signature(
            tensors=tuple(sorted(inputs, key=lambda tensor: tensor.name)),
            outputs=tuple(sorted(outputs, key=lambda tensor: tensor.name)),
        )

    def _meta_graph(self, start: int, end: int, program: Program) -> None:
        for number, wire, at, length in self._wire.fields(start, end):
            if wire != 2:
                continue
            if number == 2:
                program.read_graph(at, at + length)
            elif number == 3:
                program.read_saver(at, at + length)
            elif number == 4:
                program.read_collection(at, at + length)
            elif number == 5:
                name = self._named_signature(at, at + length)
                program.read_signature(name, at, at + length)
            elif number == 6:
                program.read_asset(at, at + length)
            elif number == 7:
                program.read_objects(at, at + length)

    def _named_signature(self, start: int, end: int) -> str:
        name = ""
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        for number, wire, at, length in self._wire.fields(start, end):
            if (number, wire) == (1, 2):
                name = self._wire.text(at, length)
            elif (number, wire) == (2, 2):
                for inner, inner_wire, place, size in self._wire.fields(at, at + length):
                    if inner_wire == 2 and inner in (1, 2):
                        (inputs if inner == 1 else outputs).append(self._tensor(place, place + size))
        if len(inputs) + len(outputs) > _MOST_TENSORS:
            raise Fault("a signature has too many tensors")
        if not name.startswith("__saved_model_"):  # TensorFlow's own: how to initialise and train
            self._signatures[name] = (inputs, outputs)
        return name

    def _tensor(self, start: int, end: int) -> Tensor:
        """An entry of a map: its key, and a TensorInfo."""
        name, dtype, shape = "", "unknown", None
        for number, wire, at, length in self._wire.fields(start, end):
            if (number, wire) == (1, 2):
                name = self._wire.text(at, length)
            elif (number, wire) == (2, 2):
                for inner, inner_wire, place, size in self._wire.fields(at, at + length):
                    if (inner, inner_wire) == (2, 0):
                        dtype = _DTYPES.get(place, "unknown")
                    elif (inner, inner_wire) == (3, 2):
                        shape = self._shape(place, place + size)
        return Tensor(name, dtype, shape)

    def _shape(self, start: int, end: int) -> tuple[int | None, ...] | None:
        sizes: list[int | None] = []
        for number, wire, at, length in self._wire.fields(start, end):
            if (number, wire) == (3, 0) and at:
                return None
            if (number, wire) == (2, 2):
                size = 0
                for inner, inner_wire, value, _ in self._wire.fields(at, at + length):
                    if (inner, inner_wire) == (1, 0):
                        size = value
                sizes.append(None if size >> 63 else size)  # -1 as a number without a sign
        return tuple(sizes)
