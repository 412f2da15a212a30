"""What a SavedModel's graph may do: operators by allow-list, files only where TensorFlow itself says which.

A graph is a program, and TensorFlow runs parts of it when it is loaded. Everything is walked: the graph, each function
of its library whether it is called or not, and every attribute that names a function. Four groups of operators:

- those of tensorflow_operators.json: pure, or with state in the process alone (made by scripts/tensorflow_operators.py)
- `_TABLES` fill a table from a text file. The name of that file must come from an asset of the SavedModel, never from a
  request, a constant or another operator
- `_RESTORES`, `_WRITES` belong to the saver: they may be where the saver's own nodes lead, and nowhere that a
  signature, an initialiser or an object of the SavedModel leads
- every other operator is refused, so that those of another device, library or future version are refused as well

What TensorFlow runs differs: with an object graph (TensorFlow 2) functions alone; without one (TensorFlow 1) the
graph's nodes. Source: tensorflow/python/saved_model/{load,load_v1_in_v2,function_deserialization}.py of 2.21.
Field numbers: tensorflow/core/{framework/{graph,function,node_def,attr_value,op_def},protobuf/{meta_graph,saver,
saved_object_graph}}.proto.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import NoReturn

from registry.errors import UserError
from registry.formats.protobuf import Fault, Wire
from registry.formats.upload import shown

_SAVE = "model.export('folder')"
_MOST_NODES = 2_000_000
_MOST_FUNCTIONS = 200_000
_MOST_TOP = 300_000
"""Nodes of the graph itself, which are kept while it is checked; those of functions are not."""
_MOST_PATHS = 1_000
"""Arguments of functions that are followed back to an asset."""
_DEEPEST = 40
"""Levels of functions' names within attributes of functions' names."""

_TABLES = {"InitializeTableFromTextFile": 1, "InitializeTableFromTextFileV2": 1}
_RESTORES = {"RestoreV2": 0, "Restore": 0, "RestoreSlice": 0}
_WRITES = frozenset(("SaveV2", "Save", "SaveSlices", "MergeV2Checkpoints"))
_FILES = frozenset((*_TABLES, *_RESTORES, *_WRITES))
_CALLS = frozenset(("PartitionedCall", "StatefulPartitionedCall"))
_SAME = frozenset(("Identity", "PlaceholderWithDefault"))
_SIGNATURE_OF_START = "__saved_model_init_op"


@cache
def operators() -> frozenset[str]:
    """Return the operators that a graph may have anywhere."""
    text = resources.files("registry.formats").joinpath("tensorflow_operators.json").read_text("utf-8")
    return frozenset(json.loads(text))


@dataclass
class _Node:
    operator: str = ""
    inputs: list[str] = field(default_factory=list)
    called: str | None = None
    """The function of its attribute `f`."""
    functions: set[str] = field(default_factory=set)
    """Every function that any of its attributes names."""


@dataclass
class _Function:
    place: tuple[int, int]
    inputs: list[str] = field(default_factory=list)
    lists: bool = False
    """An argument stands for several tensors, so that positions cannot be counted."""
    files: set[str] = field(default_factory=set)
    """Operators of `_FILES` in its own body."""
    functions: set[str] = field(default_factory=set)
    replaceable: bool = False
    """TensorFlow may swap it for another of the same `api_implements`."""


class Program:
    """A MetaGraph as far as it decides what is run. `read` it, then `check` it. Raises UserError `refused_operator` or
    `saved_model_files`; Fault where it is not well-formed."""

    def __init__(self, wire: Wire, path: str) -> None:
        self._wire, self._path = wire, path
        self._nodes: dict[str, _Node] = {}
        self._functions: dict[str, _Function] = {}
        self._count = 0
        self._saver = {"filename": "", "save": "", "restore": ""}
        self._assets: list[tuple[str, str]] = []
        self._collected: list[tuple[str, str]] = []
        self._starts: set[str] = set()
        self._outputs: set[str] = set()
        self._has_objects = False
        self._bound: dict[str, list[int]] = {}
        self._asset_objects: set[int] = set()
        self._object_functions: set[str] = set()
        self._callers_of: dict[str, list[str]] = {}
        self._nodes_of: dict[str, list[str]] = {}
        self._effects: dict[str, frozenset[str]] = {}

    # reading

    def read_graph(self, start: int, end: int) -> None:
        """A GraphDef; of several in a MetaGraph protobuf makes one."""
        for number, kind, at, length in self._wire.fields(start, end):
            if (number, kind) == (1, 2):
                name, node = self._node(at, at + length)
                if name in self._nodes:
                    raise Fault(f"two nodes have the name {shown(name)}")
                self._nodes[name] = node
                if len(self._nodes) > _MOST_TOP:
                    raise Fault("its graph has too many nodes outside of functions")
            elif (number, kind) == (2, 2):
                for inner, inner_kind, place, size in self._wire.fields(at, at + length):
                    if (inner, inner_kind) == (1, 2):
                        self._function(place, place + size)

    def read_saver(self, start: int, end: int) -> None:
        for number, kind, at, length in self._wire.fields(start, end):
            if kind == 2 and number in (1, 2, 3):
                self._saver[("filename", "save", "restore")[number - 1]] = self._wire.text(at, length)

    def read_asset(self, start: int, end: int) -> None:
        self._assets.append(self._asset(start, end))

    def _asset(self, start: int, end: int) -> tuple[str, str]:
        """(tensor, file) of an AssetFileDef."""
        tensor = file = ""
        for number, kind, at, length in self._wire.once(start, end):
            if (number, kind) == (1, 2):
                for inner, inner_kind, place, size in self._wire.once(at, at + length):
                    if (inner, inner_kind) == (1, 2):
                        tensor = self._wire.text(place, size)
            elif (number, kind) == (2, 2):
                file = self._wire.text(at, length)
        return tensor, file

    def read_signature(self, name: str, start: int, end: int) -> None:
        """The tensors that a SignatureDef gives out; those of the one that starts the model run when it is loaded."""
        into = self._starts if name == _SIGNATURE_OF_START else self._outputs
        for number, kind, at, length in self._wire.fields(start, end):
            if (number, kind) != (2, 2):
                continue
            for inner, inner_kind, place, size in self._wire.fields(at, at + length):
                if (inner, inner_kind) != (2, 2):
                    continue
                for each, each_kind, spot, count in self._wire.fields(place, place + size):
                    if (each, each_kind) == (2, 2):
                        into.update(self._tensors(spot, spot + count, 0))

    def read_collection(self, start: int, end: int) -> None:
        """Names of nodes in a collection (of what to run at the start, of tables, …), and in definitions of local
        variables, whose initialisers TensorFlow runs as well."""
        key = "".join(self._texts(start, end, 1))
        for number, kind, at, length in self._wire.fields(start, end):
            if (number, kind) != (2, 2):
                continue
            for inner, inner_kind, place, size in self._wire.fields(at, at + length):
                if inner_kind != 2:
                    continue
                for each, each_kind, spot, count in self._wire.fields(place, place + size):
                    if (inner, each, each_kind) == (1, 1, 2):
                        self._starts.add(_base(self._wire.text(spot, count)))
                    elif (inner, each, each_kind) == (2, 1, 2) and key == "local_variables":
                        self._starts.update(self._words(spot, spot + count))
                    elif (inner, each, each_kind) == (5, 1, 2) and key == "saved_model_assets":
                        self._collected += self._any(spot, spot + count)

    def read_objects(self, start: int, end: int) -> None:
        """The SavedObjectGraph: which functions Python gets hold of, and what is bound to their last arguments."""
        self._has_objects = True
        index = 0
        for number, kind, at, length in self._wire.fields(start, end):
            if (number, kind) == (1, 2):
                self._object(index, at, at + length)
                index += 1
            elif (number, kind) == (2, 2):
                self._concrete(at, at + length)

    def _any(self, start: int, end: int) -> list[tuple[str, str]]:
        """The AssetFileDef in a google.protobuf.Any; TensorFlow takes it only under its own name."""
        name, found = "", list[tuple[str, str]]()
        for number, kind, at, length in self._wire.once(start, end):
            if (number, kind) == (1, 2):
                name = self._wire.text(at, length)
            elif (number, kind) == (2, 2):
                found = [self._asset(at, at + length)]
        return found if name.rpartition("/")[2] == "tensorflow.AssetFileDef" else []

    def _node(self, start: int, end: int) -> tuple[str, _Node]:
        self._count += 1
        if self._count > _MOST_NODES:
            raise Fault("it has too many nodes")
        name, node = "", _Node()
        seen = set()
        for number, kind, at, length in self._wire.fields(start, end):
            if kind != 2 or number not in (1, 2, 3, 5):
                continue
            if number in seen and number < 3:
                raise Fault("a node has two names or operators")
            seen.add(number)
            if number == 1:
                name = self._wire.text(at, length)
            elif number == 2:
                node.operator = self._wire.text(at, length)
            elif number == 3:
                node.inputs.append(self._wire.text(at, length))
            else:
                self._attribute(at, at + length, node)
        if node.operator not in operators() and node.operator not in _FILES:
            self._refuse(node.operator, name)
        return name, node

    def _attribute(self, start: int, end: int, node: _Node) -> None:
        """An entry of a node's attributes. Only values that name functions are looked at."""
        key = ""
        for number, kind, at, length in self._wire.fields(start, end):
            if (number, kind) == (1, 2):
                key = self._wire.text(at, length)
            elif (number, kind) == (2, 2):
                names = list(self._named(at, at + length, 0))
                node.functions.update(names)
                if key in ("", "f") and names:
                    node.called = names[0] if len(names) == 1 and node.called is None else ""

    def _named(self, start: int, end: int, depth: int) -> Iterator[str]:
        """Every function that an AttrValue names, also as an attribute of such a name."""
        if depth > _DEEPEST:
            raise Fault("its attributes are nested too deeply")
        for number, kind, at, length in self._wire.fields(start, end):
            if kind != 2:
                continue
            if number == 1:
                for inner, inner_kind, place, size in self._wire.fields(at, at + length):
                    if (inner, inner_kind) == (9, 2):
                        yield from self._named_list(place, place + size, depth)
            elif number == 10:
                yield from self._named_list(at, at + length, depth)

    def _named_list(self, start: int, end: int, depth: int) -> Iterator[str]:
        """The name of a NameAttrList, and those that its own attributes hold."""
        for number, kind, at, length in self._wire.fields(start, end):
            if (number, kind) == (1, 2):
                yield self._wire.text(at, length)
            elif (number, kind) == (2, 2):
                for inner, inner_kind, place, size in self._wire.fields(at, at + length):
                    if (inner, inner_kind) == (2, 2):
                        yield from self._named(place, place + size, depth + 1)

    def _function(self, start: int, end: int) -> None:
        name, function = "", _Function((start, end))
        for number, kind, at, length in self._wire.fields(start, end):
            if kind != 2:
                continue
            if number == 1:
                if name:
                    raise Fault("a function has two names")
                name = self._signature(at, at + length, function)
            elif number == 3:
                _, node = self._node(at, at + length)
                function.functions |= node.functions
                if node.operator in _FILES:
                    function.files.add(node.operator)
            elif number == 5:
                for inner, inner_kind, place, size in self._wire.fields(at, at + length):
                    if (inner, inner_kind) == (1, 2) and self._wire.text(place, size) == "api_implements":
                        function.replaceable = True
        if name in self._functions:
            raise Fault(f"two functions have the name {shown(name)}")
        if name in operators() or name in _FILES:
            raise Fault(f"a function has the name of the operator {shown(name)}")
        self._functions[name] = function
        if len(self._functions) > _MOST_FUNCTIONS:
            raise Fault("it has too many functions")

    def _signature(self, start: int, end: int, function: _Function) -> str:
        name = ""
        for number, kind, at, length in self._wire.fields(start, end):
            if (number, kind) == (1, 2):
                name = self._wire.text(at, length)
            elif (number, kind) == (2, 2):
                argument = ""
                for inner, inner_kind, place, size in self._wire.fields(at, at + length):
                    if (inner, inner_kind) == (1, 2):
                        argument = self._wire.text(place, size)
                    elif inner in (5, 6) and inner_kind == 2 and size:
                        function.lists = True
                function.inputs.append(argument)
        return name

    def _tensors(self, start: int, end: int, depth: int) -> Iterator[str]:
        """Nodes of a TensorInfo, of its parts where it is sparse or composite."""
        if depth > _DEEPEST:
            raise Fault("a signature's tensor is nested too deeply")
        for number, kind, at, length in self._wire.fields(start, end):
            if kind != 2:
                continue
            if number == 1:
                yield _base(self._wire.text(at, length))
            elif number == 4:
                for _, inner_kind, place, size in self._wire.fields(at, at + length):
                    if inner_kind == 2:
                        yield _base(self._wire.text(place, size))
            elif number == 5:
                for inner, inner_kind, place, size in self._wire.fields(at, at + length):
                    if (inner, inner_kind) == (2, 2):
                        yield from self._tensors(place, place + size, depth + 1)

    def _words(self, start: int, end: int) -> list[str]:
        """The texts of a VariableDef; none where the bytes are of another sort."""
        try:
            return [_base(self._wire.text(at, length)) for number, kind, at, length in self._wire.fields(start, end)
                    if kind == 2 and number in (1, 2, 3, 4, 6)]  # fmt: skip
        except Fault:
            return []

    def _object(self, index: int, start: int, end: int) -> None:
        """A SavedObject; one that is an asset has nothing that could change its path once it is made."""
        kinds: set[int] = set()
        odd = False
        for number, kind, at, length in self._wire.fields(start, end):
            if kind != 2:
                continue
            if number in (4, 5, 6, 7, 8, 9, 10, 12):
                if number in kinds:
                    raise Fault("an object is of one kind twice")
                kinds.add(number)
            odd |= number in (1, 3, 11, 13, 15) and bool(length)
            if number in (6, 8):
                self._object_functions.update(self._texts(at, at + length, 1))
            elif number == 12:
                self._object_functions.update(self._texts(at, at + length, 2))
        if len(kinds) > 1:
            raise Fault("an object is of two kinds")
        if kinds == {5} and not odd:
            self._asset_objects.add(index)

    def _texts(self, start: int, end: int, wanted: int) -> list[str]:
        return [self._wire.text(at, length) for number, kind, at, length in self._wire.fields(start, end)
                if (number, kind) == (wanted, 2)]  # fmt: skip

    def _concrete(self, start: int, end: int) -> None:
        """An entry of concrete_functions: the name, and the objects that its last arguments are bound to."""
        name, bound = "", list[int]()
        for number, kind, at, length in self._wire.once(start, end):
            if (number, kind) == (1, 2):
                name = self._wire.text(at, length)
            elif (number, kind) == (2, 2):
                for inner, inner_kind, place, size in self._wire.fields(at, at + length):
                    if (inner, inner_kind) == (2, 0):
                        bound.append(place)
                    elif (inner, inner_kind) == (2, 2):
                        spot = place
                        while spot < place + size:
                            value, spot = self._wire.varint(spot, place + size)
                            bound.append(value)
        if name in self._bound:
            raise Fault(f"the function {shown(name)} is described twice")
        self._bound[name] = bound
        self._object_functions.add(name)

    # checking

    def check(self, assets: frozenset[str]) -> None:
        """`assets` are the names of the upload's files in the folder assets/."""
        self._assets = self._assets or self._collected  # as TensorFlow does
        for _, file in self._assets:
            if not file or any(sign in file for sign in "/\\\0") or file in (".", "..") or file not in assets:
                self._refuse_file(f"names the asset {shown(file)!r}, which is no plain file name in its assets/ folder")
        self._link()
        reached = self._closure(self._object_functions)
        saver = self._before([self._saver["save"], self._saver["restore"]])
        saving = self._closure(name for node in saver for name in self._nodes[node].functions)
        if self._has_objects:
            for name in self._object_functions:
                if found := self._effects.get(name, frozenset()) - set(_TABLES):
                    self._refuse_saver(min(found), f"the function {shown(name)}, which starts the model or answers")
        else:
            self._check_nodes(saver)
        for name, function in self._functions.items():
            if function.files and name not in reached | saving and (self._has_objects or function.files & _WRITES):
                self._refuse_saver(min(function.files), f"the function {shown(name)}, which nothing of the saver calls")
            if function.replaceable and name in self._effects:
                self._refuse_saver(min(self._effects[name]), f"the replaceable function {shown(name)}")
        self._check_paths(reached)

    def _link(self) -> None:
        """Fill in which functions and nodes name a function, and which file operators each function leads to."""
        for name, function in self._functions.items():
            for each in function.functions:
                self._callers_of.setdefault(each, []).append(name)
        for name, node in self._nodes.items():
            for each in node.functions:
                self._nodes_of.setdefault(each, []).append(name)
        for operator in sorted(_FILES):
            left = [name for name, function in self._functions.items() if operator in function.files]
            found: set[str] = set()
            while left:
                if (name := left.pop()) not in found:
                    found.add(name)
                    left.extend(self._callers_of.get(name, ()))
            for name in found:
                self._effects[name] = self._effects.get(name, frozenset()) | {operator}

    def _check_nodes(self, saver: set[str]) -> None:
        """Of a graph of TensorFlow 1: nothing that gives an answer or starts the model leads to the saver, and no
        answer to a file."""
        answers, starts = self._before(self._outputs), self._before(self._starts)
        restored = self._before([self._saver["restore"]])
        for name, node in self._nodes.items():
            files = {file for each in node.functions for file in self._effects.get(each, ())} | (
                {node.operator} & _FILES
            )
            saves = files - set(_TABLES)
            if saves and (name in answers or name in starts or name not in saver):
                self._refuse_saver(min(saves), f"the node {shown(name)}, which is not the saver's")
            if files & _WRITES and name in restored:
                self._refuse_saver(min(files & _WRITES), f"the node {shown(name)}, which runs when it is loaded")
            if files & set(_TABLES) and (name in answers or name in restored):
                self._refuse_file(f"fills a table from a file while it answers (node {shown(name)})")

    def _check_paths(self, reached: set[str]) -> None:
        """Follow the name of each file that is opened through arguments of functions, back to an asset or to the
        saver's file name."""
        open_: list[tuple[str, int, str]] = []  # function, argument, what it must be
        done: set[tuple[str, int, str]] = set()
        for name, function in self._functions.items():
            if function.files - _WRITES and (name in reached or not self._has_objects):
                open_ += [(name, place, what) for place, what in self._own_paths(name)]
        if not self._has_objects:
            for name, node in self._nodes.items():
                if node.operator in _TABLES or node.operator in _RESTORES:
                    place, what = _path_input(node.operator)
                    self._check_source(node, place, what, name)
        while open_:
            entry = open_.pop()
            if entry in done:
                continue
            done.add(entry)
            if len(done) > _MOST_PATHS:
                raise Fault("it opens too many files")
            open_ += self._callers(*entry, reached)

    def _own_paths(self, name: str) -> Iterator[tuple[int, str]]:
        """(argument, what it must be) for each operator in a function's body that opens a file."""
        body = self._body(name)
        for node in body.values():
            if node.operator in _TABLES or node.operator in _RESTORES:
                place, what = _path_input(node.operator)
                yield self._argument(name, body, node, place), what

    def _argument(self, name: str, body: Mapping[str, _Node], node: _Node, place: int) -> int:
        """The number of the function's argument that an input of one of its nodes is; refused where it is none."""
        function = self._functions[name]
        tensors = [each for each in node.inputs if not each.startswith("^")]
        if not function.lists and place < len(tensors):
            source = tensors[place]
            for _ in range(_DEEPEST):
                if source in function.inputs and source not in body:
                    if function.inputs.count(source) == 1:
                        return function.inputs.index(source)
                    break
                before = body.get(_base(source))
                if before is None or before.operator != "Identity" or not before.inputs:
                    break
                source = before.inputs[0]
        self._refuse_file(f"opens a file in the function {shown(name)} whose name is not that of an asset")

    def _callers(self, name: str, argument: int, what: str, reached: set[str]) -> Iterator[tuple[str, int, str]]:
        """Each place that gives the argument its value: checked, or an argument of the caller in its turn."""
        if self._has_objects and name in self._object_functions:
            self._check_bound(name, argument, what)
        for caller in self._callers_of.get(name, ()):
            if self._has_objects and caller not in reached:
                continue
            body = self._body(caller)
            for node in body.values():
                if name in node.functions:
                    self._check_call(node, name)
                    if any(_base(each) in body and each.count(":") != 2 for each in node.inputs if each[:1] != "^"):
                        self._refuse_file(f"passes lists of tensors to the function {shown(name)}, which opens a file")
                    yield caller, self._argument(caller, body, node, argument), what
        if not self._has_objects:
            for place in self._nodes_of.get(name, ()):
                self._check_call(self._nodes[place], name)
                self._check_source(self._nodes[place], argument, what, place)

    def _check_call(self, node: _Node, name: str) -> None:
        if node.operator not in _CALLS or node.called != name or node.functions != {name}:
            self._refuse_file(f"calls the function {shown(name)}, which opens a file, by {shown(node.operator)}")

    def _check_bound(self, name: str, argument: int, what: str) -> None:
        """That Python calls the function with an asset there, which is bound, and not a caller's value."""
        bound = self._bound.get(name, [])
        place = argument - (len(self._functions[name].inputs) - len(bound))
        if (
            what != "asset"
            or place < 0
            or len(bound) > len(self._functions[name].inputs)
            or bound[place] not in self._asset_objects
        ):
            self._refuse_file(f"opens a file in the function {shown(name)} whose name is not that of an asset")

    def _check_source(self, node: _Node, place: int, what: str, name: str) -> None:
        """Of a node of the graph itself: its input must be a tensor that TensorFlow sets to the path of an asset or of
        the variables at loading."""
        wanted = {tensor for tensor, _ in self._assets} if what == "asset" else {self._saver["filename"]}
        tensors = [each for each in node.inputs if not each.startswith("^")]
        source = tensors[place] if place < len(tensors) else ""
        for _ in range(_DEEPEST):
            if _tensor(source) in wanted:
                return
            before = self._nodes.get(_base(source))
            if before is None or before.operator not in _SAME or not before.inputs:
                break
            source = before.inputs[0]
        self._refuse_file(
            f"opens a file in the node {shown(name)} whose name is not that of an asset or of its variables"
        )

    def _body(self, name: str) -> dict[str, _Node]:
        start, end = self._functions[name].place
        body: dict[str, _Node] = {}
        for number, kind, at, length in self._wire.fields(start, end):
            if (number, kind) == (3, 2):
                inner, node = self._node(at, at + length)
                if inner in body:
                    raise Fault(f"two nodes of the function {shown(name)} have one name")
                body[inner] = node
        return body

    def _closure(self, names: Iterable[str]) -> set[str]:
        """Functions that these lead to, themselves included. One that is not in the library cannot be called."""
        found: set[str] = set()
        left = list(names)
        while left:
            name = left.pop()
            if name in found or name not in self._functions:
                continue
            found.add(name)
            left.extend(self._functions[name].functions)
        return found

    def _before(self, names: Iterable[str]) -> set[str]:
        """Nodes that have to run for these, themselves included."""
        found: set[str] = set()
        left = [_base(name) for name in names]
        while left:
            name = left.pop()
            if name in found or name not in self._nodes:
                continue
            found.add(name)
            left.extend(_base(each) for each in self._nodes[name].inputs)
        return found

    def _refuse(self, operator: str, node: str) -> NoReturn:
        raise UserError(
            "refused_operator",
            f"{shown(self._path)} has the operator {shown(operator)} (node {shown(node)}), which is not on the list of "
            "operators served.",
            field="file",
            hint=_hint(operator),
        )

    def _refuse_saver(self, operator: str, where: str) -> NoReturn:
        raise UserError(
            "refused_operator",
            f"{shown(self._path)} has the operator {operator} in {where}; only the saver of a SavedModel may have it.",
            field="file",
            hint=f"Save the network with {_SAVE} or tf.saved_model.save, without functions that handle checkpoints.",
        )

    def _refuse_file(self, what: str) -> NoReturn:
        raise UserError(
            "saved_model_files",
            f"{shown(self._path)} reaches for a file that is not its own: it {what}.",
            field="file",
            hint="Make tables from files with tf.lookup.TextFileInitializer before the model is saved, so that "
            "TensorFlow copies the file into assets/; or from tensors.",
        )


def _hint(operator: str) -> str:
    """What to do about an operator, by what is known of it."""
    lower = operator.lower()
    if "pyfunc" in lower:
        return "Replace tf.py_function and tf.numpy_function by TensorFlow's own operations and save it again."
    if "print" in lower or "summary" in lower or "log" in lower:
        return f"Remove tf.print and summaries from the model and save it again with {_SAVE}."
    if any(word in lower for word in ("dataset", "iterator", "reader", "readfile", "matching")):
        return f"Save the network alone, without its data pipeline, with {_SAVE}."
    if lower.startswith("xla"):
        return "Convert it from JAX with native_serialization=False, or export it as ONNX."
    if lower.startswith("simpleml") or "sentencepiece" in lower or "wordpiece" in lower:
        return "Its operator belongs to a further package: pack the model with its code: ekiben init --from FILE."
    return f"Save the network alone with {_SAVE}; or pack the model with its code: ekiben init --from FILE."


def _path_input(operator: str) -> tuple[int, str]:
    return (_TABLES[operator], "asset") if operator in _TABLES else (_RESTORES[operator], "saver")


def _base(name: str) -> str:
    """The node of a tensor's or an input's name."""
    return name.removeprefix("^").partition(":")[0]


def _tensor(name: str) -> str:
    """A tensor's name in full: `node` is `node:0`."""
    return name if ":" in name or not name else f"{name}:0"
