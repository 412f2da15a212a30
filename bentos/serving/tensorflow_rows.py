"""What TensorFlow's operators do to the rows of a request (bentos/serving/row_flow.py).

A traced function is walked as its GraphDef, with the functions that it calls. An operator that is not in these tables
proves nothing. Attributes: tensorflow/core/framework/{graph,function,node_def}.proto.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bentos.serving import row_flow as flow
from bentos.serving.problems import StartError
from bentos.serving.row_flow import Fixed, Rows, Sizes, Value, names

_logger = logging.getLogger("ekiben.serving")

_LARGEST_VALUES = 64
_DEEPEST = 20

_ELEMENTWISE = names(
    "Abs Acos Acosh Add AddN AddV2 AsString Asin Asinh Atan Atan2 Atanh Bucketize Cast Ceil CheckNumerics ClipByValue "
    "Cos Cosh Digamma Div DivNoNan Elu EnsureShape Equal Erf Erfc Erfinv Exp Expm1 Floor FloorDiv FloorMod Greater "
    "GreaterEqual Identity Inv IsFinite IsInf IsNan LeakyRelu Less LessEqual Lgamma Log Log1p LogicalAnd LogicalNot "
    "LogicalOr Maximum Minimum Mod Mul MulNoNan Neg NotEqual OnesLike Pow PreventGradient RealDiv Reciprocal "
    "RegexFullMatch RegexReplace Relu Relu6 Rint Round Rsqrt SelectV2 Selu Sigmoid Sign Sin Sinh Snapshot Softplus "
    "Softsign Sqrt Square SquaredDifference StaticRegexFullMatch StaticRegexReplace StopGradient StringLength "
    "StringLower StringStrip StringToHashBucketFast StringToHashBucketStrong StringToNumber StringUpper Sub Tan Tanh "
    "TruncateDiv TruncateMod Xdivy Xlog1py Xlogy ZerosLike"
)
_KEEPS = frozenset({"Identity", "Snapshot", "StopGradient", "PreventGradient", "EnsureShape", "Cast"})
"""Of these, the numbers of a shape stay what they are."""
_REDUCE = names("All Any EuclideanNorm Max Mean Min Prod Sum")
_PICTURES = names(
    "AvgPool AvgPool3D Conv2D Conv3D DepthToSpace DepthwiseConv2dNative LRN MaxPool MaxPool3D MaxPoolV2 ResizeArea "
    "ResizeBicubic ResizeBilinear ResizeNearestNeighbor SpaceToDepth"
)
_RESOURCES = names("VarHandleOp HashTableV2 MutableHashTableV2 LookupTableSizeV2 Rank")
_CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})
_WRITES = re.compile(r"Assign\w*|Resource(Apply|Scatter|StridedSliceAssign|CountUpTo)\w*|\w*TableInsert\w*|\w*Queue\w*")
_SECOND = {"indices": 1, "idx": 1, "batch_mean": 1, "batch_variance": 2, "backprop": 1}
"""Outputs of operators that have several, by name; those called `output` are counted."""

Rule = Callable[["_Step"], Sequence[Value]]


def structure(function: Any, outputs: int, free: bool) -> tuple[Value, ...]:
    """What each output of a concrete function is, in their flat order. `free`: rows may differ in size.

    Raises StartError where the function keeps something from one call to the next.
    """
    unknown = (None,) * outputs
    try:
        walk = Walk(function, free)
    except (ValueError, KeyError, AttributeError, TypeError):  # a graph that TensorFlow itself cannot write out
        _logger.info("the graph of the model cannot be read", exc_info=True)
        return unknown
    if walk.writes:
        message = "the model changes its own variables when it answers, so an answer depends on the calls before it"
        hint = "save it without state, such as stateful=False of a recurrent layer, and call it with training=False"
        raise StartError("model_load_failed", message, hint)
    return tuple(walk.values) if len(walk.values) == outputs else unknown


class Walk:
    """A concrete function of TensorFlow. `values` are its outputs in their flat order."""

    def __init__(self, function: Any, free: bool) -> None:
        self._free = free
        self.writes = False
        """It changes a variable or table: the next answer may depend on this one."""
        definition = function.graph.as_graph_def()
        self._library = {each.signature.name: each for each in definition.library.function}
        self.values: list[Value] = []
        known = dict(_given(function))
        self._walk(definition.node, known, 0)
        self.values = [known.get(each.name) for each in function.outputs]

    def _walk(self, nodes: Any, known: dict[str, Value], depth: int) -> None:
        """Fill `known`, by `name:number`. A function's nodes may come in any order."""
        waiting = {node.name: node for node in nodes}
        done: set[str] = set()
        for first in list(waiting):
            stack = [first]
            while stack:
                name = stack[-1]
                node = waiting.get(name)
                if node is None or name in done:
                    stack.pop()
                    continue
                needed = [_source(each) for each in node.input]
                missing = [each for each in needed if each in waiting and each not in done and each not in stack]
                if missing:
                    stack.extend(missing)
                    continue
                done.add(name)
                stack.pop()
                self._node(node, known, depth)

    def _node(self, node: Any, known: dict[str, Value], depth: int) -> None:
        if f"{node.name}:0" in known:  # an input
            return
        if _WRITES.fullmatch(node.op):
            self.writes = True
        values = [known.get(_place(each)) for each in node.input if not each.startswith("^")]
        if node.op in _CALLS:
            found = self._called(node.attr["f"].func.name, values, depth)
        else:
            found = _outputs(_Step(node, values, self._free))
        for at, value in enumerate(found):
            known[f"{node.name}:{at}"] = value

    def _called(self, name: str, values: Sequence[Value], depth: int) -> Sequence[Value]:
        body = self._library.get(name)
        if body is None or depth > _DEEPEST:
            return ()
        arguments = [each.name for each in body.signature.input_arg]
        known: dict[str, Value] = {f"{each}:0": value for each, value in zip(arguments, values, strict=False)}
        self._walk(body.node_def, known, depth + 1)
        return [known.get(_place(body.ret[each.name])) for each in body.signature.output_arg]


def _given(function: Any) -> Mapping[str, Value]:
    """Inputs are rows, what the function captured is the same for all of them."""
    captured = len(function.captured_inputs)
    tensors = list(function.inputs)
    own = len(tensors) - captured
    shapes = {id(each.handle): tuple(each.shape.as_list()) for each in function.graph.variables if each.shape.rank}
    known: dict[str, Value] = {}
    for tensor in tensors[:own]:
        known[tensor.name] = Rows(tensor.shape.rank) if tensor.shape.rank else None
    for inner, outer in zip(tensors[own:], function.captured_inputs, strict=True):
        dims = shapes.get(id(outer))
        if dims is None and inner.dtype.name not in ("resource", "variant") and inner.shape.rank is not None:
            dims = tuple(inner.shape.as_list())
        known[inner.name] = Fixed(dims)
    return known


def _source(reference: str) -> str:
    return reference.lstrip("^").partition(":")[0]


def _place(reference: str) -> str:
    """`node`, `node:1` in a graph, `node:output:1` in a function → `node:1`."""
    name, _, rest = reference.partition(":")
    if not rest:
        return f"{name}:0"
    output, _, number = rest.rpartition(":")
    if output and output in _SECOND:
        return f"{name}:{_SECOND[output]}"
    return f"{name}:{number}"


class _Step:
    """A node with what its inputs are."""

    def __init__(self, node: Any, values: Sequence[Value], free: bool) -> None:
        self.node, self.values, self.free = node, values, free

    def __getitem__(self, at: int) -> Value:
        return self.values[at] if at < len(self.values) else None

    def flag(self, name: str) -> bool:
        return bool(self.node.attr[name].b) if name in self.node.attr else False

    def number(self, name: str) -> int:
        return int(self.node.attr[name].i) if name in self.node.attr else 0

    def text(self, name: str) -> str:
        return self.node.attr[name].s.decode() if name in self.node.attr else ""

    def numbers(self, name: str) -> list[int]:
        return list(self.node.attr[name].list.i) if name in self.node.attr else []

    def rest_is_fixed(self, first: int = 0) -> bool:
        return all(isinstance(each, Fixed) for at, each in enumerate(self.values) if at != first)


def _outputs(step: _Step) -> Sequence[Value]:
    operator = step.node.op
    if operator in _ELEMENTWISE:
        return [_elementwise(step)]
    if operator in _REDUCE:
        return [_reduced(step)]
    if operator in _PICTURES:
        return [_picture(step)]
    if operator in _RESOURCES:
        return [Fixed()]
    rule = _RULES.get(operator)
    return rule(step) if rule is not None else ()


def _elementwise(step: _Step) -> Value:
    operator, values = step.node.op, step.values
    if operator in _KEEPS and len(values) == 1:
        return values[0]
    if any(isinstance(each, Sizes) for each in values):
        plain = {"AddV2": "Add", "Add": "Add", "Sub": "Sub", "Mul": "Mul", "FloorDiv": "Div"}.get(operator)
        if plain is not None:
            return flow.arithmetic(values[0], values[1], plain)
        if operator == "Equal":
            return flow.equal(values[0], values[1])
        return flow.chosen(*values) if operator == "SelectV2" and len(values) == 3 else None
    if len(values) == 2 and operator in ("Mul", "AddV2", "Sub") and all(isinstance(each, Fixed) for each in values):
        name = {"AddV2": "Add"}.get(operator, operator)
        return flow.arithmetic(values[0], values[1], name) or flow.elementwise(values)
    return flow.elementwise(values)


def _reduced(step: _Step) -> Value:
    if isinstance(step[0], Sizes):
        return flow.product(step[0]) if step.node.op == "Prod" else None
    if step.node.op == "Prod" and isinstance(step[0], Fixed) and step[0].values is not None:
        return flow.product(step[0])
    return flow.reduced(step[0], flow.whole(step[1]), step.flag("keep_dims"))


def _picture(step: _Step) -> Value:
    first = step[0]
    outer = [step.numbers(name)[:1] for name in ("ksize", "strides", "dilations")]
    if any(each not in ([], [1]) for each in outer):
        return None
    return first if isinstance(first, Rows) and first.axis == 0 and step.rest_is_fixed() else None


def _batch_norm(step: _Step) -> Sequence[Value]:
    trained = "is_training" not in step.node.attr or step.flag("is_training")
    return [None if trained else _picture(step)]


def _transposed_convolution(step: _Step) -> Sequence[Value]:
    sizes, gradient = flow.entries(step[0]), step[2]
    fits = sizes is not None and sizes[:1] == (flow.ROWS,) and isinstance(step[1], Fixed)
    return [gradient if fits and isinstance(gradient, Rows) and gradient.axis == 0 and not gradient.blocks else None]


def _constant(step: _Step) -> Sequence[Value]:
    tensor = step.node.attr["value"].tensor
    dims = tuple(each.size for each in tensor.tensor_shape.dim)
    count = 1
    for size in dims:
        count *= size
    if count > _LARGEST_VALUES:
        return [Fixed(dims)]
    import tensorflow as tf

    array = tf.make_ndarray(tensor)
    return [Fixed(dims, tuple(array.ravel().tolist()) if array.dtype.kind in "iufb" else None)]


def _variable(step: _Step) -> Sequence[Value]:
    return [step[0] if isinstance(step[0], Fixed) else None]


def _product(step: _Step) -> Sequence[Value]:
    left, right = step[0], step[1]
    if step.flag("transpose_a") or step.flag("adj_x"):
        left = _swapped(left)
    if step.flag("transpose_b") or step.flag("adj_y"):
        right = _swapped(right)
    return [flow.multiplied(left, right)]


def _swapped(value: Value) -> Value:
    rank = value.rank if isinstance(value, Rows) else len(value.dims or ()) if isinstance(value, Fixed) else 0
    return flow.transposed(value, [*range(rank - 2), rank - 1, rank - 2]) if rank >= 2 else None


def _bias(step: _Step) -> Sequence[Value]:
    channel = 1 if step.text("data_format") == "NCHW" else -1
    return [flow.along(step[0], channel) if isinstance(step[1], Fixed) else None]


def _arg(step: _Step) -> Sequence[Value]:
    return [flow.reduced(step[0], flow.whole(step[1]), keep=False)]


def _along_input(step: _Step) -> Sequence[Value]:
    axes = flow.whole(step[1])
    if not axes:
        return [None]
    return [step[0] if all(flow.along(step[0], axis) is not None for axis in axes) else None]


def _top(step: _Step) -> Sequence[Value]:
    found = flow.along(step[0], -1) if isinstance(step[1], Fixed) else None
    return [found, found]


def _concat(step: _Step) -> Sequence[Value]:
    axes = flow.whole(step.values[-1]) if step.values else None
    return [flow.joined(step.values[:-1], axes[0]) if axes else None]


def _pack(step: _Step) -> Sequence[Value]:
    values, axis = step.values, step.number("axis")
    found = [flow.entries(each) for each in values]
    if all(each is not None and len(each) == 1 for each in found):
        return [flow.sized(each[0] for each in found if each)]
    if all(isinstance(each, Fixed) for each in values):
        return [Fixed()]
    kinds = set(values)
    (first, *others) = kinds
    return [flow.unsqueezed(first, [axis]) if not others and isinstance(first, Rows) else None]


def _unpack(step: _Step) -> Sequence[Value]:
    found, count = flow.entries(step[0]), step.number("num")
    if found is not None and len(found) == count:
        return [flow.sized((each,), scalar=True) for each in found]
    return [flow.reduced(step[0], [step.number("axis")], keep=False)] * count


def _split(step: _Step) -> Sequence[Value]:
    data, axis = (step[1], step[0]) if step.node.op == "Split" else (step[0], step[2])
    axes = flow.whole(axis)
    fixed = step.node.op == "Split" or isinstance(step[1], Fixed)
    return [flow.along(data, axes[0]) if axes and fixed else None] * step.number("num_split")


def _slice(step: _Step) -> Sequence[Value]:
    starts, sizes = flow.whole(step[1]), flow.entries(step[2])
    first = step[0]
    if not isinstance(first, Rows):
        return [Fixed() if isinstance(first, Fixed) and step.rest_is_fixed() else None]
    if starts is None or sizes is None or len(starts) != first.rank or len(sizes) != first.rank:
        return [None]
    whole = starts[first.axis] == 0 and sizes[first.axis] in (-1, flow.ROWS)
    return [first if whole and not (first.blocks and sizes[first.axis] != -1) else None]


def _strided_slice(step: _Step) -> Sequence[Value]:
    masks = {name: step.number(f"{name}_mask") for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")}
    first, begin, end, strides = step[0], *(flow.entries(step[at]) for at in (1, 2, 3))
    if begin is None or end is None or strides is None:
        return [Fixed() if all(isinstance(each, Fixed) for each in step.values) else None]
    known = flow.entries(first)
    if known is not None and not (isinstance(first, Fixed) and len(first.dims or (0,)) > 1):
        return [_sliced_sizes(known, begin, end, strides, masks)]
    if isinstance(first, Fixed):
        return [Fixed() if step.rest_is_fixed() else None]
    return [_sliced_rows(first, len(begin), strides, masks) if isinstance(first, Rows) else None]


def _sliced_sizes(
    known: Sequence[Any], begin: Sequence[Any], end: Sequence[Any], strides: Sequence[Any], masks: Mapping[str, int]
) -> Value:
    if len(begin) != 1 or masks["ellipsis"] or masks["new_axis"] or not isinstance(strides[0], int):
        return None
    start = None if masks["begin"] & 1 else begin[0]
    stop = None if masks["end"] & 1 else end[0]
    if masks["shrink_axis"] & 1:
        inside = isinstance(start, int) and -len(known) <= start < len(known)
        return flow.sized((known[start],), scalar=True) if inside and isinstance(start, int) else None
    if not all(each is None or isinstance(each, int) for each in (start, stop)):
        return None
    return flow.sized(known[slice(start, stop, strides[0])])


def _sliced_rows(value: Rows, count: int, strides: Sequence[Any], masks: Mapping[str, int]) -> Value:
    def has(name: str, at: int) -> bool:
        return bool(masks[name] >> at & 1)

    named = sum(1 for at in range(count) if not has("new_axis", at) and not has("ellipsis", at))
    old, rank, found = 0, 0, -1
    for at in range(count):
        if has("ellipsis", at):
            for _ in range(value.rank - named):
                found = rank if old == value.axis else found
                old, rank = old + 1, rank + 1
        elif has("new_axis", at):
            rank += 1
        else:
            if old == value.axis:
                full = has("begin", at) and has("end", at) and strides[at] == 1 and not has("shrink_axis", at)
                if not full:
                    return None
                found = rank
            old, rank = old + 1, rank + (0 if has("shrink_axis", at) else 1)
    if found < 0:
        if value.axis < old:
            return None
        found = rank + value.axis - old
    rank += value.rank - old
    return None if value.blocks and found != 0 else Rows(rank, found, value.blocks)


def _gather(step: _Step) -> Sequence[Value]:
    axes = flow.whole(step[2])
    batch = step.number("batch_dims")
    data, places = step[0], step[1]
    if not axes:
        return [None]
    if batch == 0:
        return [flow.gathered(data, places, axes[0])]
    rows = isinstance(data, Rows) and isinstance(places, Rows) and data.axis == places.axis == 0
    if rows and isinstance(data, Rows) and isinstance(places, Rows) and not data.blocks and not places.blocks:
        inside = 0 < batch <= flow.axis_of(axes[0], data.rank)
        return [Rows(data.rank + places.rank - batch - 1) if inside else None]
    return [None]


def _embedding(step: _Step) -> Sequence[Value]:
    return [flow.gathered(step[0], step[1], 0) if step.number("batch_dims") == 0 else None]


def _expand_dims(step: _Step) -> Sequence[Value]:
    axes = flow.whole(step[1])
    return [flow.unsqueezed(step[0], axes) if axes else None]


def _pad(step: _Step) -> Sequence[Value]:
    first, pads = step[0], flow.whole(step[1])
    if not isinstance(first, Rows) or pads is None or len(pads) != 2 * first.rank or not step.rest_is_fixed():
        return [None]
    return [first if pads[2 * first.axis] == 0 == pads[2 * first.axis + 1] else None]


def _one_hot(step: _Step) -> Sequence[Value]:
    first = step[0]
    if not isinstance(first, Rows) or not step.rest_is_fixed():
        return [None]
    axis = step.number("axis") if "axis" in step.node.attr else -1
    return [flow.unsqueezed(first, [flow.axis_of(axis, first.rank + 1)])]


def _lookup(step: _Step) -> Sequence[Value]:
    fixed = isinstance(step[0], Fixed) and isinstance(step[2], Fixed)
    return [step[1] if fixed and isinstance(step[1], Rows | Fixed) else None]


def _bincount(step: _Step) -> Sequence[Value]:
    first = step[0]
    return [first if isinstance(first, Rows) and first == Rows(2) and step.rest_is_fixed() else None]


def _only(rule: Callable[[_Step], Value]) -> Rule:
    return lambda step: [rule(step)]


_RULES: dict[str, Rule] = {
    "ArgMax": _arg,
    "ArgMin": _arg,
    "BatchMatMul": _product,
    "BatchMatMulV2": _product,
    "BatchMatMulV3": _product,
    "BiasAdd": _bias,
    "BroadcastTo": _only(lambda step: flow.expanded(step[0], step[1])),
    "ConcatV2": _concat,
    "Const": _constant,
    "Conv2DBackpropInput": _transposed_convolution,
    "Conv3DBackpropInputV2": _transposed_convolution,
    "Cumprod": _along_input,
    "Cumsum": _along_input,
    "DenseBincount": _bincount,
    "Einsum": _only(lambda step: flow.contracted(step.text("equation"), step.values)),
    "ExpandDims": _expand_dims,
    "Fill": _only(lambda step: flow.filled(step[0]) if isinstance(step[1], Fixed) else None),
    "FusedBatchNorm": _batch_norm,
    "FusedBatchNormV2": _batch_norm,
    "FusedBatchNormV3": _batch_norm,
    "GatherV2": _gather,
    "IdentityN": lambda step: step.values,
    "LogSoftmax": _only(lambda step: flow.along(step[0], -1)),
    "LookupTableFindV2": _lookup,
    "MatMul": _product,
    "MirrorPad": _pad,
    "OneHot": _one_hot,
    "Pack": _pack,
    "Pad": _pad,
    "PadV2": _pad,
    "Range": _only(lambda step: Fixed((None,)) if all(isinstance(each, Fixed) for each in step.values) else None),
    "ReadVariableOp": _variable,
    "Reshape": _only(lambda step: flow.reshaped(step[0], step[1], step.free)),
    "ResourceGather": _embedding,
    "ReverseV2": _along_input,
    "Shape": _only(lambda step: flow.shape_of(step[0])),
    "Slice": _slice,
    "Softmax": _only(lambda step: flow.along(step[0], -1)),
    "Split": _split,
    "SplitV": _split,
    "Squeeze": _only(lambda step: flow.squeezed(step[0], step.numbers("squeeze_dims") or None)),
    "StridedSlice": _strided_slice,
    "Tile": _only(lambda step: flow.repeated(step[0], step[1])),
    "TopKV2": _top,
    "Transpose": _only(lambda step: flow.transposed(step[0], flow.whole(step[1])) if flow.whole(step[1]) else None),
    "Unpack": _unpack,
}
