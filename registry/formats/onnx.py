"""ONNX models, walked by their protobuf wire format; weights are passed over by seeking, so that memory stays bounded.

Nothing of protobuf's or ONNX's own parsers runs on the user's bytes here. Source of field numbers: onnx/onnx.proto.
"""

from __future__ import annotations

from typing import NoReturn

from registry.errors import UserError
from registry.formats.neighbours import is_named_like_a_model
from registry.formats.protobuf import Fault, Wire
from registry.formats.upload import Recognised, Upload, shown
from registry.signature import Signature, Tensor

FORMAT = "onnx"
_SAVE = "onnx.save(model, 'model.onnx')"
_DEEPEST = 40
_MOST_INPUTS = 10_000
_MOST_NAMES = 2_000_000  # initializers

# onnx.TensorProto.DataType
_DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 8: "string", 9: "bool",
    10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 14: "complex64", 15: "complex128", 16: "bfloat16",
    17: "float8e4m3fn", 18: "float8e4m3fnuz", 19: "float8e5m2", 20: "float8e5m2fnuz", 21: "uint4", 22: "int4",
    23: "float4e2m1", 24: "float8e8m0", 25: "uint2", 26: "int2",
}  # fmt: skip

# wire type of each known field of ModelProto: anything else is no ONNX model
_MODEL = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}

# Operators that read a file, hold a program of another device or run code, in ONNX Runtime's own domains.
_REFUSED_OPERATORS = frozenset({"EPContext", "PyOp", "Snpe", "ATen"})

# Domains whose operators ONNX Runtime itself has. Those of others are in libraries that a model cannot bring, or are
# functions
# of the model, which are walked.
_DOMAINS = frozenset((
    "", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training", "com.microsoft", "com.microsoft.nchwc",
    "com.ms.internal.nhwc",
))  # fmt: skip

# ONNX Runtime reads a file with this name, or with these bytes there, as its own format, whatever else it is.
_ORT_SUFFIX = ".ort"
_ORT_MARK = b"ORTM"


def recognise(upload: Upload, path: str) -> Recognised | None:
    """The model in a file, None if the file is no ONNX model. UserError where it is one and cannot be served."""
    head = upload.head(path, 64)
    if not _looks_like(head):
        return None
    with upload.open(path) as stream:
        walk = _Model(Wire(stream, upload.sizes[path]), upload, path)
        try:
            walk.model()
        except Fault as fault:
            if not walk.certain:
                return None
            code, word = ("truncated_model", "not complete") if fault.cut else ("invalid_model", "damaged")
            raise UserError(
                code,
                f"{shown(path)} is an ONNX model that is {word}: {fault}.",
                field="file",
                hint=f"Upload the file again; if it is so at its source too, save it again with {_SAVE}.",
            ) from fault
    if not walk.has_graph or not walk.opsets:
        return None
    if head[4:8] == _ORT_MARK or path.lower().endswith(_ORT_SUFFIX):
        raise UserError(
            "onnx_ort_format",
            f"{shown(path)} can be read as ONNX and as ONNX Runtime's own format, which says something else.",
            field="file",
            hint=f"Save the model as ONNX with another producer_name: {_SAVE}.",
        )
    walk.check_operators()
    return Recognised(FORMAT, path, signature=walk.signature(), notes=walk.notes(), parts=walk.parts())


def _looks_like(head: bytes) -> bool:
    """Whether the first fields are those of ModelProto: exporters write ir_version first, or opset_import."""
    if len(head) < 2:
        return False
    if head[0] == 0x08:
        return 1 <= head[1] <= 64
    return head[0] in (0x12, 0x1A, 0x3A, 0x42)


class _Model:
    def __init__(self, wire: Wire, upload: Upload, path: str) -> None:
        self._wire = wire
        self._upload = upload
        self._path = path
        self.certain = False  # enough was seen to call a fault a fault of an ONNX model
        self.has_graph = False
        self.opsets: dict[str, int] = {}
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._initializers: set[str] = set()
        self._external: set[str] = set()
        self._used: set[tuple[str, str]] = set()  # domain, operator
        self._own: set[tuple[str, str]] = set()  # functions of the model

    def model(self) -> None:
        wire = self._wire
        graphs: list[tuple[int, int]] = []
        seen: set[int] = set()
        fault: Fault | None = None
        try:
            for number, kind, at, length in wire.fields(0, wire.size):
                if _MODEL.get(number) != kind:
                    raise Fault(f"field {number} is no field of a model")
                if number == 1 and not 1 <= at <= 64:
                    raise Fault("its ir_version is out of range")
                seen.add(number)
                if number == 7:
                    graphs.append((at, at + length))
                elif number == 8:
                    self._opset(at, at + length)
                elif number == 20:
                    self._training(at, at + length)
                elif number == 25:
                    self._function(at, at + length, 0)
        except Fault as caught:
            fault = caught
        # other protobuf files begin alike: only a graph, or a cut where one may have been, makes it a faulty ONNX model
        cut = fault is not None and fault.cut
        begun = cut and wire.last[1] == _MODEL.get(wire.last[0])
        self.certain = 1 in seen and (7 in seen or begun or (cut and len(seen) > 1))
        if fault is not None:
            raise fault
        if len(graphs) > 1:
            raise Fault("it has two graphs")
        if not graphs:
            return
        self.has_graph = True
        self._graph(*graphs[0], depth=0)
        if self.opsets and not self._outputs:
            raise Fault("its graph has no output")

    def _opset(self, start: int, end: int) -> None:
        domain, version = "", 0
        for number, kind, at, length in self._wire.fields(start, end):
            if number == 1 and kind == 2:
                domain = self._wire.text(at, length)
            elif number == 2 and kind == 0:
                version = at
        self.opsets["ai.onnx" if domain == "" else domain] = version

    def _training(self, start: int, end: int) -> None:
        for number, kind, at, length in self._wire.fields(start, end):
            if number in (1, 2) and kind == 2:
                self._graph(at, at + length, depth=1)

    def _function(self, start: int, end: int, depth: int) -> None:
        name = domain = ""
        for number, kind, at, length in self._wire.fields(start, end):
            if number == 1 and kind == 2:
                name = self._wire.text(at, length)
            elif number == 10 and kind == 2:
                domain = self._wire.text(at, length)
            elif number == 7 and kind == 2:
                self._node(at, at + length, depth + 1)
            elif number == 11 and kind == 2:
                self._attribute(at, at + length, depth + 1)
        self._own.add((domain, name))

    def _graph(self, start: int, end: int, depth: int) -> None:
        if depth > _DEEPEST:
            raise Fault("its graphs are nested too deeply")
        for number, kind, at, length in self._wire.fields(start, end):
            if kind != 2:
                raise Fault(f"field {number} is no field of a graph")
            if number == 1:
                self._node(at, at + length, depth)
            elif number == 5:
                name = self._tensor(at, at + length)
                if depth == 0:
                    self._initializers.add(name)
                    if len(self._initializers) > _MOST_NAMES:
                        raise Fault("it has too many initializers")
            elif number == 15:
                name = self._sparse(at, at + length)
                if depth == 0:
                    self._initializers.add(name)
            elif number in (11, 12) and depth == 0:
                side = self._inputs if number == 11 else self._outputs
                side.append(self._value_info(at, at + length))
                # models of old IR versions name every initializer as an input too
                if len(side) > _MOST_NAMES:
                    raise Fault("it has too many inputs or outputs")

    def _node(self, start: int, end: int, depth: int) -> None:
        operator = domain = ""
        for number, kind, at, length in self._wire.fields(start, end):
            if number == 4 and kind == 2:
                operator = self._wire.text(at, length)
            elif number == 7 and kind == 2:
                domain = self._wire.text(at, length)
            elif number == 5 and kind == 2:
                self._attribute(at, at + length, depth)
        if operator in _REFUSED_OPERATORS:
            raise UserError(
                "onnx_operator_refused",
                f"{shown(self._path)} uses the operator {operator}, which loads a file or code of its own.",
                field="file",
                hint="Export the model without execution-provider contexts or Python operators.",
            )
        self._used.add((domain, operator))

    def check_operators(self) -> None:
        """UserError `onnx_operator_refused` for an operator of a domain that neither ONNX Runtime nor the model has."""
        unknown = sorted(each for each in self._used - self._own if each[0] not in _DOMAINS)
        if unknown:
            domain, operator = unknown[0]
            raise UserError(
                "onnx_operator_refused",
                f"{shown(self._path)} uses the operator {shown(operator)} of the domain {shown(domain)!r}, which ONNX "
                "Runtime does not have.",
                field="file",
                hint="Export the model with operators of ONNX and ONNX Runtime alone, or pack it with the library of "
                "that operator: ekiben init --from FILE.",
            )

    def _attribute(self, start: int, end: int, depth: int) -> None:
        for number, kind, at, length in self._wire.fields(start, end):
            if kind != 2:
                continue
            if number in (5, 10):
                self._tensor(at, at + length)
            elif number in (6, 11):
                self._graph(at, at + length, depth + 1)
            elif number in (22, 23):
                self._sparse(at, at + length)

    def _sparse(self, start: int, end: int) -> str:
        name = ""
        for number, kind, at, length in self._wire.fields(start, end):
            if number in (1, 2) and kind == 2:
                found = self._tensor(at, at + length)
                name = found if number == 1 else name
        return name

    def _tensor(self, start: int, end: int) -> str:
        """The tensor's name; its external data is checked on the way."""
        name, external, entries = "", False, []
        for number, kind, at, length in self._wire.fields(start, end):
            if number == 8 and kind == 2:
                name = self._wire.text(at, length)
            elif number == 13 and kind == 2:
                entries.append(self._entry(at, at + length))
                if len(entries) > 100:
                    raise Fault("a tensor has too many entries of external data")
            elif number == 14 and kind == 0:
                external = at == 1
        if external or entries:
            self._check_external(name, entries)
        return name

    def _entry(self, start: int, end: int) -> tuple[str, str]:
        key = value = ""
        for number, kind, at, length in self._wire.fields(start, end):
            if number == 1 and kind == 2:
                key = self._wire.text(at, length)
            elif number == 2 and kind == 2:
                value = self._wire.text(at, length)
        return key, value

    def _check_external(self, name: str, entries: list[tuple[str, str]]) -> None:
        facts = dict(entries)
        if len(facts) != len(entries):
            self._refuse_external(name, "names a fact twice")
        location = facts.get("location", "")
        if location in ("", ".", "..") or any(sign in location for sign in "/\\:\0"):
            self._refuse_external(name, f"points to {shown(location)!r}, which is no plain file name")
        folder = self._path.rpartition("/")[0]
        place = f"{folder}/{location}" if folder else location
        if place == self._path or place not in self._upload.sizes:
            self._refuse_external(name, f"is in the file {shown(location)!r}, which is not part of this upload")
        if is_named_like_a_model(place):
            self._refuse_external(name, f"is in the file {shown(location)!r}, which is named like a model")
        size = self._upload.sizes[place]
        numbers = []
        for key in ("offset", "length"):
            text = facts.get(key, "0")
            if not text.isascii() or not text.isdigit() or len(text) > 18:
                self._refuse_external(name, f"has no number as its {key}")
            numbers.append(int(text))
        if sum(numbers) > size:
            self._refuse_external(name, f"reaches past the end of {shown(location)!r} ({size} bytes)")
        self._external.add(place)

    def _refuse_external(self, name: str, why: str) -> NoReturn:
        raise UserError(
            "onnx_external_data",
            f"The tensor {shown(name)!r} of {shown(self._path)} keeps its data outside the file and {why}.",
            field="file",
            hint="Upload the .onnx file together with its data files in one folder, or save it as one file: "
            "onnx.save(model, 'model.onnx', save_as_external_data=False).",
        )

    def _value_info(self, start: int, end: int) -> Tensor:
        name, dtype, shape = "", "unknown", None
        for number, kind, at, length in self._wire.fields(start, end):
            if number == 1 and kind == 2:
                name = self._wire.text(at, length)
            elif number == 2 and kind == 2:
                dtype, shape = self._type(at, at + length)
        return Tensor(name, dtype, shape)

    def _type(self, start: int, end: int) -> tuple[str, tuple[int | str | None, ...] | None]:
        for number, kind, at, length in self._wire.fields(start, end):
            if kind != 2:
                continue
            if number in (1, 8):
                return self._tensor_type(at, at + length)
            if number in (4, 5, 9):
                return {4: "sequence", 5: "map", 9: "optional"}[number], None
        return "unknown", None

    def _tensor_type(self, start: int, end: int) -> tuple[str, tuple[int | str | None, ...] | None]:
        dtype = "unknown"
        shape: tuple[int | str | None, ...] | None = None
        for number, kind, at, length in self._wire.fields(start, end):
            if number == 1 and kind == 0:
                dtype = _DTYPES.get(at, "unknown")
            elif number == 2 and kind == 2:
                axes: list[int | str | None] = []
                for inner, inner_kind, inner_at, inner_length in self._wire.fields(at, at + length):
                    if inner == 1 and inner_kind == 2:
                        axes.append(self._axis(inner_at, inner_at + inner_length))
                        if len(axes) > 64:
                            raise Fault("a shape has too many axes")
                shape = tuple(axes)
        return dtype, shape

    def _axis(self, start: int, end: int) -> int | str | None:
        for number, kind, at, length in self._wire.fields(start, end):
            if number == 1 and kind == 0:
                # a negative size (some exporters write -1) means free
                return at if at < 1 << 40 else None
            if number == 2 and kind == 2:
                return self._wire.text(at, length) or None
        return None

    def signature(self) -> Signature:
        inputs = tuple(tensor for tensor in self._inputs if tensor.name not in self._initializers)
        if len(inputs) > _MOST_INPUTS or len(self._outputs) > _MOST_INPUTS:
            raise UserError(
                "invalid_model",
                f"{shown(self._path)} has more than {_MOST_INPUTS} inputs or outputs.",
                field="file",
                hint="Combine the inputs into tensors before exporting.",
            )
        width = None
        if len(inputs) == 1 and (shape := inputs[0].shape) is not None and len(shape) == 2:
            width = shape[1] if isinstance(shape[1], int) else None
        return Signature(n_features=width, tensors=inputs, outputs=tuple(self._outputs))

    def parts(self) -> frozenset[str]:
        """The files that hold its external data."""
        return frozenset(self._external)

    def notes(self) -> tuple[str, ...]:
        notes = []
        if self._external:
            notes.append(f"Keeps data in {len(self._external)} more file(s) of the upload.")
        return tuple(notes)
