"""The graph of an ONNX file by its protobuf wire format: operators, shapes, small constants; weights are passed over.

ONNX Runtime shows neither a graph's operators nor whether a shape is missing or empty, and the onnx package is not in
the kind's environment. Source of field numbers: onnx/onnx.proto.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LARGEST_VALUES = 64
"""Elements of a constant that are read: axes, shapes, scales."""

_FLOAT, _INT32, _INT64, _BOOL, _DOUBLE = 1, 6, 7, 9, 11
_PACKED = {_FLOAT: "f", _INT32: "i", _INT64: "q", _BOOL: "?", _DOUBLE: "d"}

Size = int | str | None


class Unreadable(Exception):
    """The bytes are not those of an ONNX model, as far as they are read here."""


@dataclass(frozen=True)
class Constant:
    dims: tuple[int, ...]
    values: tuple[float, ...] | None = None
    """Elements of a small tensor of numbers."""


@dataclass(frozen=True)
class Node:
    operator: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Described:
    """An input or output. `shape` is None where the model does not give one, of a size where it names none."""

    name: str
    tensor: bool
    shape: tuple[Size, ...] | None


@dataclass
class Graph:
    opset: int = 0
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Constant] = field(default_factory=dict)
    inputs: list[Described] = field(default_factory=list)
    outputs: list[Described] = field(default_factory=list)
    functions: bool = False
    """The model brings operators of its own."""


def read(path: Path) -> Graph:
    """The main graph of a file. Raises Unreadable."""
    with path.open("rb") as stream:
        try:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:  # empty
            raise Unreadable(str(error)) from error
        with data:
            graph = Graph()
            try:
                for number, value in _fields(data, 0, len(data)):
                    if number == 7 and isinstance(value, slice):
                        _graph(data, value, graph)
                    elif number == 8 and isinstance(value, slice):
                        _opset(data, value, graph)
                    elif number == 25:
                        graph.functions = True
            except (IndexError, struct.error, UnicodeDecodeError, OverflowError) as error:
                raise Unreadable(str(error)) from error
    return graph


def _fields(data: Any, start: int, end: int) -> Iterator[tuple[int, int | float | slice]]:
    """Number and value of each field: a number, or where its bytes are."""
    at = start
    while at < end:
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
        elif wire == 2:
            length, at = _varint(data, at)
            if at + length > end:
                raise Unreadable("a field reaches past its end")
            yield number, slice(at, at + length)
            at += length
        elif wire == 5:
            yield number, struct.unpack("<f", data[at : at + 4])[0]
            at += 4
        elif wire == 1:
            yield number, struct.unpack("<d", data[at : at + 8])[0]
            at += 8
        else:
            raise Unreadable(f"wire type {wire}")


def _varint(data: Any, at: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        byte = data[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, at
        shift += 7
        if shift > 63:
            raise Unreadable("a number has too many bytes")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _text(data: Any, place: slice) -> str:
    return str(bytes(data[place]), "utf-8")


def _whole(data: Any, value: Any) -> list[int]:
    """A repeated field of whole numbers: one of them, or packed."""
    if not isinstance(value, slice):
        return [_signed(int(value))]
    found, at = [], value.start
    while at < value.stop:
        number, at = _varint(data, at)
        found.append(_signed(number))
    return found


def _opset(data: Any, place: slice, graph: Graph) -> None:
    domain, version = "", 0
    for number, value in _fields(data, place.start, place.stop):
        if number == 1 and isinstance(value, slice):
            domain = _text(data, value)
        elif number == 2 and isinstance(value, int):
            version = value
    if domain in ("", "ai.onnx"):
        graph.opset = version


def _graph(data: Any, place: slice, graph: Graph) -> None:
    for number, value in _fields(data, place.start, place.stop):
        if not isinstance(value, slice):
            continue
        if number == 1:
            graph.nodes.append(_node(data, value))
        elif number == 5:
            name, constant = _tensor(data, value)
            graph.constants[name] = constant
        elif number == 11:
            graph.inputs.append(_described(data, value))
        elif number == 12:
            graph.outputs.append(_described(data, value))


def _node(data: Any, place: slice) -> Node:
    inputs, outputs, operator, domain = [], [], "", ""
    attributes: dict[str, Any] = {}
    for number, value in _fields(data, place.start, place.stop):
        if not isinstance(value, slice):
            continue
        if number == 1:
            inputs.append(_text(data, value))
        elif number == 2:
            outputs.append(_text(data, value))
        elif number == 4:
            operator = _text(data, value)
        elif number == 5:
            name, found = _attribute(data, value)
            attributes[name] = found
        elif number == 7:
            domain = _text(data, value)
    return Node(operator, "" if domain == "ai.onnx" else domain, tuple(inputs), tuple(outputs), attributes)


def _attribute(data: Any, place: slice) -> tuple[str, Any]:
    """Name and value. A list where the field is repeated; a graph, or what is not read, is None."""
    name, kind = "", 0
    found: Any = None
    whole: list[int] = []
    for number, value in _fields(data, place.start, place.stop):
        if number == 1 and isinstance(value, slice):
            name = _text(data, value)
        elif number == 20 and isinstance(value, int):
            kind = value
        elif number == 2 and isinstance(value, float):
            found = value
        elif number == 3 and isinstance(value, int):
            found = _signed(value)
        elif number == 4 and isinstance(value, slice):
            found = bytes(data[value])[:100].decode("utf-8", "replace")
        elif number == 5 and isinstance(value, slice):
            found = _tensor(data, value)[1]
        elif number == 8:
            whole += _whole(data, value)
    return name, (whole if whole or kind == 7 else found)


def _tensor(data: Any, place: slice) -> tuple[str, Constant]:
    name, kind = "", 0
    dims: list[int] = []
    raw: slice | None = None
    plain: list[float] = []
    floats: list[Any] = []
    for number, value in _fields(data, place.start, place.stop):
        if number == 1:
            dims += _whole(data, value)
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8 and isinstance(value, slice):
            name = _text(data, value)
        elif number == 9 and isinstance(value, slice):
            raw = value
        elif number in (5, 7) and not (isinstance(value, slice) and value.stop - value.start > 10 * _LARGEST_VALUES):
            plain += _whole(data, value)
        elif number in (4, 10):
            floats.append(value)
    count = 1
    for size in dims:
        count *= size
    values: tuple[float, ...] | None = None
    if count <= _LARGEST_VALUES and kind in _PACKED:
        code = _PACKED[kind]
        if raw is not None and raw.stop - raw.start == count * struct.calcsize(code):
            values = struct.unpack(f"<{count}{code}", data[raw])
        elif len(plain) == count:
            values = tuple(plain)
        elif floats:
            values = tuple(_floats(data, floats, code))
        values = values if values is not None and len(values) == count else None
    return name, Constant(tuple(dims), values)


def _floats(data: Any, fields: list[Any], code: str) -> Iterator[float]:
    for each in fields:
        if isinstance(each, slice):
            yield from struct.unpack(f"<{(each.stop - each.start) // struct.calcsize(code)}{code}", data[each])
        else:
            yield each


def _described(data: Any, place: slice) -> Described:
    name, tensor, shape = "", False, None
    for number, value in _fields(data, place.start, place.stop):
        if not isinstance(value, slice):
            continue
        if number == 1:
            name = _text(data, value)
        elif number == 2:
            for inner, part in _fields(data, value.start, value.stop):
                if inner == 1 and isinstance(part, slice):
                    tensor, shape = True, _shape(data, part)
    return Described(name, tensor, shape)


def _shape(data: Any, place: slice) -> tuple[Size, ...] | None:
    for number, value in _fields(data, place.start, place.stop):
        if number == 2 and isinstance(value, slice):
            sizes = []
            for inner, part in _fields(data, value.start, value.stop):
                if inner == 1 and isinstance(part, slice):
                    sizes.append(_size(data, part))
            return tuple(sizes)
    return None


def _size(data: Any, place: slice) -> Size:
    for number, value in _fields(data, place.start, place.stop):
        if number == 1 and isinstance(value, int):
            return value if _signed(value) >= 0 else None
        if number == 2 and isinstance(value, slice):
            return _text(data, value) or None
    return None
