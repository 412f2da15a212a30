"""The operators that a TensorFlow graph may have: registry/formats/tensorflow_operators.json and the copy of the kind.

python -m scripts.tensorflow_operators --write    make them again (needs TensorFlow; minutes)
python -m scripts.tensorflow_operators --check    fail if they are not current

An operator is on the list if one of three holds, and none of `LEFT_OUT` does:

- a layer or operation of Keras emits it at inference, traced here (`keras_graphs`);
- it belongs to a family of pure functions of tensors (`FAMILIES`) and TensorFlow does not call it stateful: what people
  write in serving signatures, such as tf.strings, tf.image, tf.linalg, tf.ragged and parsers of tf.train.Example;
- it is in `REVIEWED`: state that lives in the process (variables, tables, lists), and calls of the graph's functions.

TensorFlow's own definition of each operator is checked last (`doubts`): none of them may take a file, an address,
memory of a device or a serialized graph.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scripts import keras_layers

ROOT = Path(__file__).resolve().parents[1]
PLACES = (
    ROOT / "registry" / "formats" / "tensorflow_operators.json",
    ROOT / "bentos" / "tensorflow" / "operators.json",
)

# Modules tensorflow.python.ops.gen_NAME_ops whose operators are functions of their tensors alone.
FAMILIES = (
    "array", "bitwise", "count", "ctc", "image", "linalg", "list", "manip", "math", "nn", "optional", "parsing",
    "ragged_array", "ragged_conversion", "ragged_math", "set", "sparse", "special_math", "spectral",
    "random_index_shuffle", "stateless_random", "stateless_random_ops_v2", "string",
)  # fmt: skip

REVIEWED = {
    "calls of the graph's own functions, which are checked as well": (
        "PartitionedCall", "StatefulPartitionedCall", "If", "StatelessIf", "Case", "StatelessCase", "While",
        "StatelessWhile",
    ),
    "control flow of TensorFlow 1": (
        "Enter", "Exit", "LoopCond", "Merge", "NextIteration", "Switch", "ControlTrigger", "NoOp", "Placeholder",
        "PlaceholderV2", "RefEnter", "RefExit", "RefIdentity", "RefMerge", "RefNextIteration", "RefSwitch",
    ),
    "checks that end a request with an error": ("Assert", "CheckNumerics", "CheckNumericsV2"),
    "variables, which live in the process": (
        "VarHandleOp", "ReadVariableOp", "VarIsInitializedOp", "VariableShape", "AssignVariableOp",
        "AssignAddVariableOp",
        "AssignSubVariableOp", "ResourceGather", "ResourceGatherNd", "ResourceScatterAdd", "ResourceScatterUpdate",
        "ResourceStridedSliceAssign", "DestroyResourceOp", "DisableCopyOnRead", "Variable", "VariableV2", "Assign",
        "AssignAdd", "AssignSub", "IsVariableInitialized", "ScatterUpdate", "ScatterAdd", "TemporaryVariable",
        "DestroyTemporaryVariable",
    ),
    "tables, whose content comes from the graph or from an asset (InitializeTableFromTextFile is checked on its own)": (
        "HashTable", "HashTableV2", "MutableHashTable", "MutableHashTableV2", "MutableDenseHashTable",
        "MutableDenseHashTableV2", "MutableHashTableOfTensors", "MutableHashTableOfTensorsV2", "AnonymousHashTable",
        "AnonymousMutableHashTable", "AnonymousMutableDenseHashTable", "AnonymousMutableHashTableOfTensors",
        "InitializeTable", "InitializeTableV2", "LookupTableFind", "LookupTableFindV2", "LookupTableSize",
        "LookupTableSizeV2", "LookupTableInsert", "LookupTableInsertV2", "LookupTableRemoveV2", "LookupTableExport",
        "LookupTableExportV2", "LookupTableImport", "LookupTableImportV2",
    ),
    "lists and stacks of tensors": (
        "TensorArrayV3", "TensorArrayReadV3", "TensorArrayWriteV3", "TensorArrayScatterV3", "TensorArrayGatherV3",
        "TensorArraySizeV3", "TensorArraySplitV3", "TensorArrayConcatV3", "TensorArrayCloseV3", "TensorArrayGradV3",
        "StackV2", "StackPushV2", "StackPopV2", "StackCloseV2", "DynamicPartition", "DynamicStitch",
        "ParallelDynamicStitch",
    ),
    "random numbers": (
        "RandomUniform", "RandomUniformInt", "RandomStandardNormal", "TruncatedNormal", "RandomShuffle", "Multinomial",
        "ParameterizedTruncatedNormal", "RandomGammaGrad", "RandomGamma", "RandomPoissonV2", "RngReadAndSkip",
        "RngSkip",
        "StatefulStandardNormalV2", "StatefulTruncatedNormal", "StatefulUniform", "StatefulUniformFullInt",
        "StatefulUniformInt", "StatefulRandomBinomial", "NonDeterministicInts", "SampleDistortedBoundingBox",
        "SampleDistortedBoundingBoxV2", "StatelessRandomGetAlg", "StatelessRandomGetKeyCounter",
        "StatelessRandomGetKeyCounterAlg", "StatelessShuffle",
    ),
    "spectrograms and WAV data that come as a tensor": ("AudioSpectrogram", "DecodeWav", "EncodeWav", "Mfcc"),
    "networks of Keras 2 hold both variants of a recurrent layer": (
        "CudnnRNN", "CudnnRNNV2", "CudnnRNNV3", "CudnnRNNCanonicalToParams", "CudnnRNNCanonicalToParamsV2",
        "CudnnRNNParamsSize", "BlockLSTM", "BlockLSTMV2", "LSTMBlockCell", "GRUBlockCell",
    ),
    "of earlier versions": ("GuaranteeConst", "Empty", "EuclideanNorm", "Timestamp", "RaggedRange"),
    "names of files as text; nothing is opened": ("ShardedFilename", "ShardedFilespec"),
}  # fmt: skip

# Purposely not on the list, although a family or a layer has it.
LEFT_OUT = {
    r"ImmutableConst": "maps a file into memory",
    r"Debug.*|Print.*|.*Summary.*|.*Logger": "writes files or floods a log",
    r".*Dataset.*|.*Iterator.*": "reads files; takes serialized graphs",
    r".*PyFunc.*|PythonFunc": "calls Python",
    r"Xla.*|_.*|TPU.*|TRT.*|.*Mlir.*|TfLite.*": "a program of another compiler or device",
    r"Send|Recv|Rpc.*|.*Rpc.*|Collective.*|Nccl.*": "speaks to other processes",
    r"DecodeProto.*|EncodeProto": "its descriptor is a file of its choosing",
    r"(Read|Write)File|MatchingFiles|(De)?[Ss]erializeIterator|.*Reader.*|.*Writer.*|.*Queue.*|.*Stage.*|Barrier.*":
        "reads or writes files, or waits for another thread",
    r"Abort|.*Fail.*": "ends the process",
    r"GenerateVocabRemapping|LoadAndRemapMatrix": "reads a file of its choosing",
    r"SymbolicGradient|RemoteCall|MapDefun|Batch(Function)?|Unbatch.*|For|DeviceIndex|FakeParam|ToBool|.*Remote.*":
        "not needed to answer a request, and calls functions",
    r"DecodeCompressed|EncodeCompressed": "a few bytes become gigabytes",
    r"CompositeTensorVariant.*|ParseTensor|SerializeTensor|OptionalFromValue":
        "makes objects of a type that the data names",
    r"Uniform(Quantize|Dequantize|Requantize|Quantized).*|Quantized.*|QuantizeDown.*|Requantiz.*|QuantizeV2|Batch"
    r"(Matrix|Cholesky|Self|Svd|FFT|IFFT).*|Skipgram|.*Sparse.*Accumulator.*|ExperimentalD.*": "out of use",
    r"(Serialize|Deserialize|AddMany|TakeMany|Add).*Sparse.*|TakeManySparse.*": "hands objects on between calls",
    r"GetSessionHandle.*|GetSessionTensor|DeleteSessionTensor": "hands objects on between calls",
    r".*NcclReduce.*|ConfigureDistributed.*|.*Embedding(Activations|.*TPU.*)": "of another device",
}  # fmt: skip

# Words in an operator's definition that mean a file, an address, memory or a program. Fields of records and of CSV
# are data.
_DOUBTFUL = re.compile(
    r"file|path|address|host|port\b|memory_region|graph|module|proto|device|container_dir|url|socket"
)
_EXAMINED = frozenset((
    "ShardedFilename", "ShardedFilespec",  # joins texts
    "VarHandleOp",  # allowed_devices: a list that is empty outside of distributed training
    "PartitionedCall", "StatefulPartitionedCall",  # config_proto: options of the optimizer and executor
))  # fmt: skip


def operators() -> list[str]:
    """Every operator that is accepted, sorted."""
    from tensorflow.python.framework import op_def_registry

    found = set(traced())
    for family in FAMILIES:
        for name in _family(family):
            definition = op_def_registry.get(name)
            if definition is not None and not definition.is_stateful:
                found.add(name)
    for names in REVIEWED.values():
        found.update(names)
    kept = {name for name in found if not any(re.fullmatch(pattern, name) for pattern in LEFT_OUT)}
    if wrong := sorted(doubts(kept)):
        raise SystemExit(f"These take more than tensors: {', '.join(wrong)}. Put them into LEFT_OUT or _EXAMINED.")
    return sorted(kept)


def doubts(names: set[str]) -> Iterator[str]:
    """Operators whose definition names a file, a function or the like, without having been examined."""
    from tensorflow.python.framework import op_def_registry

    calls = set(next(iter(REVIEWED.values())))
    for name in names:
        definition = op_def_registry.get(name)
        if definition is None:
            yield f"{name} (not an operator of this TensorFlow)"
            continue
        words = [a.name for a in definition.attr if a.type in ("string", "list(string)")]
        words += [argument.name for argument in definition.input_arg]
        if name not in _EXAMINED and any(_DOUBTFUL.search(word) for word in words):
            yield f"{name} ({', '.join(word for word in words if _DOUBTFUL.search(word))})"
        if name not in calls and any(a.type in ("func", "list(func)") for a in definition.attr):
            yield f"{name} (calls functions)"


def traced() -> set[str]:
    """Operators of every layer and operation of Keras at inference, and of what `model.export` adds."""
    found: set[str] = set()
    for graph in keras_graphs():
        found |= operators_of(graph)
    return found


def operators_of(graph: Any) -> set[str]:
    """Operators of a GraphDef and its functions."""
    functions = {f.signature.name for f in graph.library.function}
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    return {node.op for node in nodes} - functions


def keras_graphs() -> Iterator[Any]:
    """The GraphDef of each layer, and of each operation with the first arguments that it takes."""
    import keras
    import tensorflow as tf

    def graph(call: Callable[..., Any], specs: list[Any]) -> Any:
        return tf.function(call, autograph=False).get_concrete_function(*specs).graph.as_graph_def()

    for layer, specs in keras_layers.layers():
        yield graph(functools.partial(_call, layer), specs)
    offers = [[tf.TensorSpec(shape, kind)] * count for count in (1, 2, 3) for shape, kind in _OFFERS]
    found: set[int] = set()
    for module in (keras.ops, keras.activations):
        for name in sorted(dir(module)):
            function = getattr(module, name)
            if not inspect.isfunction(function) or name.startswith("_") or id(function) in found:
                continue
            found.add(id(function))
            left = _MOST_GRAPHS
            for offer in offers:
                with contextlib.suppress(Exception):  # most functions take few of the arguments on offer
                    yield graph(function, offer)
                    left -= 1
                if not left:
                    break


_OFFERS = (
    ((2, 3), "float32"), ((2, 3), "int32"), ((3, 3), "float32"), ((2, 8, 8, 3), "float32"), ((2, 3), "bool"),
    ((3,), "float32"),
)  # fmt: skip
_MOST_GRAPHS = 3
"""Of one operation: for numbers of either sort, and for shapes."""


def _call(layer: Any, *values: Any) -> Any:
    return keras_layers.called(layer, values)


def _family(name: str) -> list[str]:
    module = importlib.import_module(f"tensorflow.python.ops.gen_{name if name.endswith('v2') else name + '_ops'}")
    return sorted(set(re.findall(r'_apply_op_helper\(\s*"(\w+)"', inspect.getsource(module))))


def document() -> str:
    """The list as JSON, a line each."""
    return json.dumps(operators(), indent=0) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--write", action="store_true")
    choice.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="-1", KERAS_BACKEND="tensorflow")
    text = document()
    stale = [place for place in PLACES if not place.exists() or place.read_text() != text]
    for place in stale:
        if arguments.write:
            place.write_text(text)
        print(f"{'wrote' if arguments.write else 'not current:'} {place.relative_to(ROOT)}")
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
