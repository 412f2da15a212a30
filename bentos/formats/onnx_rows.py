"""What ONNX's operators do to the rows of a request (bentos/serving/row_flow.py).

Operators and their versions: https://onnx.ai/onnx/operators. One that is not in these tables proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bentos.formats.onnx_graph import Constant, Graph, Node
from bentos.serving import row_flow as flow
from bentos.serving.row_flow import Fixed, Rows, Sizes, Value, names

_ML = "ai.onnx.ml"
_OLDEST = 7
"""The opset from which on operators broadcast as NumPy does."""

_ELEMENTWISE = names(
    "Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast Ceil Celu "
    "Clip Cos Cosh Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish IsInf IsNaN LeakyRelu "
    "Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu Shrink Sigmoid "
    "Sign Sin Sinh Softplus Softsign Sqrt StringConcat Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor"
)
_REDUCE = names(
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare"
)
_PICTURES = names(
    "AveragePool Conv ConvInteger ConvTranspose DepthToSpace GlobalAveragePool GlobalLpPool GlobalMaxPool "
    "GroupNormalization InstanceNormalization LRN LpPool MaxPool QLinearConv SpaceToDepth"
)
"""The first axis is the batch, and all other inputs are constants; more outputs than the first are not followed."""
_TABLES = names("Binarizer Imputer LinearRegressor Normalizer SVMRegressor Scaler TreeEnsemble TreeEnsembleRegressor")
_CLASSIFIERS = frozenset({"LinearClassifier", "SVMClassifier", "TreeEnsembleClassifier"})

_RANDOM = names("Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike")
_TAKES_MISSING = frozenset({("", "IsNaN"), (_ML, "Imputer")})

Rule = Callable[["_Step"], Sequence[Value]]


def outputs(graph: Graph, free: bool) -> dict[str, Value]:
    """What each output of the graph is. `free`: rows may differ in size, so that none is known to fill a block."""
    if graph.functions or 0 < graph.opset < _OLDEST:
        return {}
    known: dict[str, Value] = {name: _constant(each) for name, each in graph.constants.items()}
    for described in graph.inputs:
        if described.name not in known:
            known[described.name] = Rows(len(described.shape)) if described.tensor and described.shape else None
    for node in graph.nodes:
        step = _Step(node, [known.get(name) if name else None for name in node.inputs], graph.opset, free)
        known.update(zip(node.outputs, _outputs(step), strict=False))
    return {each.name: known.get(each.name) for each in graph.outputs}


def takes_missing(graph: Graph) -> bool:
    """Whether an operator says where a missing value (NaN) leads."""
    for node in graph.nodes:
        tracked = node.attributes.get("nodes_missing_value_tracks_true")
        if (node.domain, node.operator) in _TAKES_MISSING or (isinstance(tracked, list) and any(tracked)):
            return True
    return False


def draws(graph: Graph) -> bool:
    """Whether it may draw at random, here or in a graph or function within."""
    within = ("If", "Loop", "Scan", "SequenceMap", "Dropout")
    known = _RANDOM.union(within)
    return graph.functions or any(node.operator in known for node in graph.nodes)


def trains(graph: Graph) -> bool:
    """Whether a normalisation keeps the mean of what it saw: ONNX Runtime changes it from call to call."""
    return any(node.operator == "BatchNormalization" and node.attributes.get("training_mode") for node in graph.nodes)


def _constant(constant: Constant) -> Fixed:
    return Fixed(constant.dims, constant.values)


class _Step:
    """A node with what its inputs are."""

    def __init__(self, node: Node, values: Sequence[Value], opset: int, free: bool) -> None:
        self.node, self.values, self.opset, self.free = node, values, opset, free

    def __getitem__(self, at: int) -> Value:
        return self.values[at] if at < len(self.values) else None

    def given(self, at: int) -> bool:
        return at < len(self.node.inputs) and bool(self.node.inputs[at])

    @property
    def present(self) -> list[Value]:
        return [value for at, value in enumerate(self.values) if self.given(at)]

    def attribute(self, name: str, default: Any = None) -> Any:
        return self.node.attributes.get(name, default)

    def axes(self, at: int = 1) -> Sequence[int] | None:
        """`axes`, an attribute of old versions and an input of new ones; None where there are none, or not known."""
        named = self.attribute("axes")
        return named if named is not None else (flow.whole(self[at]) if self.given(at) else None)


def _outputs(step: _Step) -> Sequence[Value]:
    node = step.node
    if node.domain == _ML:
        return _of_ml(step)
    if node.domain:
        return ()
    operator = node.operator
    if operator in _ELEMENTWISE:
        return [_elementwise(step)]
    if operator in _REDUCE or operator in ("ArgMax", "ArgMin"):
        return [_reduced(step)]
    if operator in _PICTURES:
        return [_picture(step)]
    rule = _RULES.get(operator)
    return rule(step) if rule is not None else ()


def _elementwise(step: _Step) -> Value:
    operator, values = step.node.operator, step.present
    if any(isinstance(each, Sizes) for each in values):
        if operator == "Cast":
            return values[0]
        if operator in ("Add", "Sub", "Mul", "Div") and len(values) == 2:
            return flow.arithmetic(values[0], values[1], operator)
        if operator == "Equal":
            return flow.equal(values[0], values[1])
        return flow.chosen(*values) if operator == "Where" and len(values) == 3 else None
    if operator == "Cast" and isinstance(values[0], Fixed):
        return values[0]
    return flow.elementwise(values)


def _reduced(step: _Step) -> Value:
    keep = bool(step.attribute("keepdims", 1))
    if step.node.operator in ("ArgMax", "ArgMin"):
        return flow.reduced(step[0], [step.attribute("axis", 0)], keep)
    axes = step.axes()
    if not axes and not step.given(1) and step.attribute("noop_with_empty_axes", 0):
        return flow.same(step.values[:1])
    return flow.reduced(step[0], axes or None, keep)


def _einsum(step: _Step) -> Sequence[Value]:
    return [flow.contracted(step.attribute("equation", ""), step.values)]


def _picture(step: _Step) -> Value:
    first = step[0]
    if isinstance(first, Rows) and first.axis == 0 and all(isinstance(each, Fixed) for each in step.present[1:]):
        return first
    return None


def _softmax(step: _Step) -> Sequence[Value]:
    if step.opset >= 13:
        return [flow.along(step[0], step.attribute("axis", -1))]
    return [flow.from_axis(step[0], step.attribute("axis", 1))]


def _batch_normalization(step: _Step) -> Sequence[Value]:
    """Of opset 9 and later: before that, it depends on more than its attributes whether it is trained further."""
    trained = step.attribute("training_mode", 0) or len(step.node.outputs) > 1
    return [None if trained or step.opset < 9 else _picture(step)]


def _mean_variance(step: _Step) -> Sequence[Value]:
    return [flow.reduced(step[0], step.attribute("axes", [0, 2, 3]), keep=True)]


def _dropout(step: _Step) -> Sequence[Value]:
    return [None if step.given(2) or step.opset < 7 else flow.same(step.values[:1])]


def _gemm(step: _Step) -> Sequence[Value]:
    first, second, bias = step[0], step[1], step[2]
    if not isinstance(first, Rows) or first.rank != 2 or not isinstance(second, Fixed):
        return [None]
    if first.axis != (1 if step.attribute("transA", 0) else 0):
        return [None]
    product = Rows(2, 0, first.blocks)
    return [flow.elementwise([product, bias]) if step.given(2) else product]


def _integer_product(step: _Step) -> Sequence[Value]:
    points = [step[at] for at in (2, 3) if step.given(at)]
    return [flow.multiplied(step[0], step[1]) if all(isinstance(each, Fixed) for each in points) else None]


def _quantized_product(step: _Step) -> Sequence[Value]:
    rest = [step[at] for at in (1, 2, 4, 5, 6, 7)]
    return [flow.multiplied(step[0], step[3]) if all(isinstance(each, Fixed) for each in rest) else None]


def _quantized(step: _Step) -> Sequence[Value]:
    first, scale = step[0], step[1]
    if not all(isinstance(each, Fixed) for each in step.present[1:]):
        return [None]
    if isinstance(first, Rows) and isinstance(scale, Fixed) and scale.dims is not None:
        each = len(scale.dims) > 0 and scale.dims != (1,)
        return [flow.along(first, step.attribute("axis", 1)) if each else first]
    return [Fixed(first.dims) if isinstance(first, Fixed) else None]


def _topk(step: _Step) -> Sequence[Value]:
    found = flow.along(step[0], step.attribute("axis", -1)) if isinstance(step[1], Fixed) else None
    return [found, found]


def _cumulative(step: _Step) -> Sequence[Value]:
    axes = flow.whole(step[1])
    return [flow.along(step[0], axes[0]) if axes else None]


def _split(step: _Step) -> Sequence[Value]:
    fixed = not step.given(1) or isinstance(step[1], Fixed)
    if isinstance(step[0], Sizes) or not fixed:
        return ()
    found = flow.sliced(step[0], [step.attribute("axis", 0)])
    return [found] * len(step.node.outputs)


def _slice(step: _Step) -> Sequence[Value]:
    known = flow.entries(step[0])
    starts, ends = step.attribute("starts"), step.attribute("ends")
    axes = step.attribute("axes")
    if starts is None:
        if not all(isinstance(each, Fixed) for each in step.present[1:]):
            return [None]
        starts, ends = flow.whole(step[1]), flow.whole(step[2])
        axes = flow.whole(step[3]) if step.given(3) else None
        if step.given(3) and axes is None:
            return [None]
    steps = flow.whole(step[4]) if step.given(4) else (1,)
    if known is not None and isinstance(step[0], Sizes):
        if starts is None or ends is None or steps is None or len(starts) != 1:
            return [None]
        return [flow.sized(known[slice(starts[0], ends[0], steps[0])])]
    if axes is None:
        count = len(starts) if starts is not None else None
        if count is None:
            return [None]
        axes = range(count)
    return [flow.sliced(step[0], axes)]


def _concat(step: _Step) -> Sequence[Value]:
    return [flow.joined(step.values, step.attribute("axis", 1))]


def _gather_elements(step: _Step) -> Sequence[Value]:
    alike = isinstance(step[0], Rows) and step[0] == step[1]
    return [flow.along(step[0], step.attribute("axis", 0)) if alike else None]


def _reshape(step: _Step) -> Sequence[Value]:
    named = step.attribute("shape")
    shape = flow.sized(named) if named is not None else step[1]
    return [flow.reshaped(step[0], shape, step.free, keeps_zero=not step.attribute("allowzero", 0))]


def _flatten(step: _Step) -> Sequence[Value]:
    first, axis = step[0], step.attribute("axis", 1)
    if not isinstance(first, Rows):
        return [Fixed() if isinstance(first, Fixed) else None]
    axis = flow.axis_of(axis, first.rank)
    if first.axis != 0 or axis < 1:
        return [None]
    return [Rows(2, 0, first.blocks or axis > 1)]


def _squeeze(step: _Step) -> Sequence[Value]:
    return [flow.squeezed(step[0], step.axes())]


def _unsqueeze(step: _Step) -> Sequence[Value]:
    axes = step.axes()
    return [None if axes is None else flow.unsqueezed(step[0], axes)]


def _shape(step: _Step) -> Sequence[Value]:
    found = flow.entries(flow.shape_of(step[0]))
    if found is None:
        return [None]
    return [flow.sized(found[step.attribute("start", 0) : step.attribute("end", len(found))])]


def _constant_node(step: _Step) -> Sequence[Value]:
    for name in ("value_int", "value_float"):
        if (single := step.attribute(name)) is not None:
            return [Fixed((), (single,))]
    if (listed := step.attribute("value_ints")) is not None:
        return [Fixed((len(listed),), tuple(listed))]
    value = step.attribute("value")
    return [_constant(value) if isinstance(value, Constant) else Fixed()]


def _one_hot(step: _Step) -> Sequence[Value]:
    if not isinstance(step[0], Rows) or not all(isinstance(each, Fixed) for each in step.present[1:]):
        return [None]
    return [flow.unsqueezed(step[0], [flow.axis_of(step.attribute("axis", -1), step[0].rank + 1)])]


def _pad(step: _Step) -> Sequence[Value]:
    first = step[0]
    pads = step.attribute("pads") or (flow.whole(step[1]) if step.given(1) else None)
    if not isinstance(first, Rows) or pads is None or step.given(3) or len(pads) != 2 * first.rank:
        return [None]
    return [first if pads[first.axis] == 0 == pads[first.axis + first.rank] else None]


def _resize(step: _Step) -> Sequence[Value]:
    first = step[0]
    scales = flow.entries(step[2 if step.node.operator == "Resize" and step.opset >= 11 else 1])
    if not isinstance(first, Rows) or step.attribute("axes") is not None:
        return [None]
    if scales and len(scales) == first.rank and scales[first.axis] == 1:
        return [first]
    sizes = flow.entries(step[3]) if step.given(3) else None
    fits = sizes is not None and len(sizes) == first.rank and sizes[first.axis] == flow.ROWS
    return [first if fits and not first.blocks else None]


def _recurrent(step: _Step) -> Sequence[Value]:
    """LSTM, GRU, RNN: the batch is the second axis, with `layout` the first."""
    layout = step.attribute("layout", 0)
    batch = 0 if layout else 1
    first = step[0]
    states = [step[at] for at in (5, 6) if step.given(at)]
    fixed = all(isinstance(step[at], Fixed) for at in (1, 2, 3, 7) if step.given(at))
    fits = first == Rows(3, batch) and fixed and all(each == Rows(3, batch) for each in states)
    if not fits or (step.given(4) and step[4] != Rows(1)):
        return ()
    state = Rows(3, batch)
    return [Rows(4, 0 if layout else 2), state, state]


def _first_only(rule: Callable[[_Step], Value]) -> Rule:
    return lambda step: [rule(step)]


_RULES: dict[str, Rule] = {
    "BatchNormalization": _batch_normalization,
    "Concat": _concat,
    "Constant": _constant_node,
    "ConstantOfShape": _first_only(lambda step: flow.filled(step[0])),
    "CumSum": _cumulative,
    "DequantizeLinear": _quantized,
    "Dropout": _dropout,
    "Einsum": _einsum,
    "Expand": _first_only(lambda step: flow.expanded(step[0], step[1])),
    "Flatten": _flatten,
    "GRU": _recurrent,
    "Gather": _first_only(lambda step: flow.gathered(step[0], step[1], step.attribute("axis", 0))),
    "GatherElements": _gather_elements,
    "Gemm": _gemm,
    "Hardmax": _softmax,
    "Identity": _first_only(lambda step: step[0]),
    "LSTM": _recurrent,
    "LayerNormalization": _first_only(
        lambda step: (
            flow.from_axis(step[0], step.attribute("axis", -1))
            if all(isinstance(each, Fixed) for each in step.present[1:])
            else None
        )
    ),
    "LogSoftmax": _softmax,
    "LpNormalization": _first_only(lambda step: flow.along(step[0], step.attribute("axis", -1))),
    "MatMul": _first_only(lambda step: flow.multiplied(step[0], step[1])),
    "MatMulInteger": _integer_product,
    "MeanVarianceNormalization": _mean_variance,
    "OneHot": _one_hot,
    "Pad": _pad,
    "QLinearMatMul": _quantized_product,
    "QuantizeLinear": _quantized,
    "RNN": _recurrent,
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _first_only(lambda step: flow.repeated(step[0], step[1])),
    "TopK": _topk,
    "Transpose": _first_only(lambda step: flow.transposed(step[0], step.attribute("perm"))),
    "Unsqueeze": _unsqueeze,
    "Upsample": _resize,
}


def _of_ml(step: _Step) -> Sequence[Value]:
    """Operators of tables take rows of [n, columns]; of one axis alone they make one row."""
    operator, first = step.node.operator, step[0]
    if operator in ("CategoryMapper", "LabelEncoder"):
        return [flow.same(step.values)]
    if operator == "OneHotEncoder":
        return [flow.unsqueezed(first, [first.rank]) if isinstance(first, Rows) else None]
    if operator == "ZipMap":
        return [Rows(1) if first == Rows(2) else None]
    if operator == "FeatureVectorizer":
        return [Rows(2) if all(each == Rows(2) for each in step.values) else None]
    if operator == "ArrayFeatureExtractor":
        taken = isinstance(first, Rows) and first.axis < first.rank - 1 and isinstance(step[1], Fixed)
        return [first if taken else None]
    if not isinstance(first, Rows) or first.rank != 2 or first.axis != 0:
        return ()
    if operator in _CLASSIFIERS:
        return [Rows(1, 0, first.blocks), first]
    return [first] if operator in _TABLES else ()
