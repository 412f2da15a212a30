"""A Keras network of pictures on the CPU: loaded as data, compiled and warmed up before the first request.

Nothing here imports TensorFlow before it is asked to: that takes seconds, and must find its settings in place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from bentos.serving import keras_rows, row_proof, tensorflow_rows
from bentos.serving.problems import StartError
from bentos.serving.row_flow import Rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_TRIALS = 4
_HINT = "save it with model.save('NAME.keras'); its input is uint8 pictures [n, height, width, 3]"


def tensorflow(threads: int = 1) -> Any:
    """The module `tensorflow`, quiet and on the CPU.

    One thread a call: many small requests go side by side, and waiting threads would spin.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    import tensorflow as tf

    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    except RuntimeError:  # it has started already, with the threads that somebody else chose
        pass
    return tf


@contextmanager
def as_keras(path: Path) -> Iterator[Path]:
    """The file by a name that ends in `.keras`.

    Keras chooses its reader by the suffix and an upload is recognised by its content: under another suffix a file that
    is a zip and HDF5 at once would be read by a loader that its check was not for.
    """
    if path.suffix == ".keras":
        yield path
        return
    with TemporaryDirectory() as scratch:
        link = Path(scratch, "model.keras")
        link.symlink_to(path.resolve())
        yield link


@dataclass(frozen=True)
class Network:
    """Pictures in, one answer each out. `run` suits `batches.Batches`."""

    height: int
    width: int
    shape: tuple[int, ...]
    """Of the answer to one picture."""
    parameters: int
    most: int
    """Pictures in one call of the network; more are answered in several. 1 where they would change each other's."""
    _call: Any
    sharing: Mapping[str, Any] = field(default_factory=dict)
    """For /metadata: which pictures share a call."""

    @classmethod
    def load(cls, path: Path, most: int = 32) -> Network:
        """Read a `.keras` file and warm it up. Raises StartError `model_load_failed`."""
        tf = tensorflow()
        import keras

        try:
            with as_keras(path) as named:
                model = keras.saving.load_model(named, compile=False, safe_mode=True)
            takes, gives = model.inputs, model.outputs
        except Exception as error:  # Keras raises whatever its layers, h5py and zipfile do
            said = str(error).strip().split("\n")[0][:500]
            raise StartError("model_load_failed", f"{path.name} cannot be loaded by Keras: {said}", _HINT) from error
        _check(path.name, takes, gives)
        _, height, width, _ = takes[0].shape
        call = tf.function(
            lambda pictures: model(pictures, training=False),
            input_signature=[tf.TensorSpec((None, height, width, 3), tf.uint8)],
            autograph=False,
        )
        network = cls(height, width, tuple(gives[0].shape[1:]), int(model.count_params()), most, call)
        network._warm_up()
        (found,) = tensorflow_rows.structure(call.get_concrete_function(), 1, free=False)
        return network._alone_or_together(isinstance(found, Rows) or keras_rows.independent(model))

    def run(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[n, height, width, 3] → [n, …]."""
        import numpy as np

        parts = [self._some(pictures[i : i + self.most]) for i in range(0, len(pictures), self.most)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _some(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Filled up to the next power of two, so that only sizes come that the kernels have been made ready for."""
        import numpy as np

        count = len(pictures)
        room = min(self.most, 1 << (count - 1).bit_length())
        if room > count:
            pictures = np.concatenate([pictures, np.zeros((room - count, *pictures.shape[1:]), np.uint8)])
        return np.asarray(self._call(pictures), np.float32)[:count]

    def _alone_or_together(self, proven: bool) -> Network:
        """The network that takes one picture a call, where more would change an answer."""
        import numpy as np

        rng = np.random.default_rng(0)
        pictures = rng.integers(0, 256, (_TRIALS, self.height, self.width, 3), dtype=np.uint8)
        black = np.zeros_like(pictures[0])
        verdict = row_proof.tried(lambda rows: list(self.run(np.stack(rows))), list(pictures), [black], most=self.most)
        sharing = row_proof.sharing(row_proof.Sharing.REQUESTS, verdict, proven)
        about = row_proof.details(sharing, verdict, proven)
        return replace(self, most=1 if sharing is row_proof.Sharing.ROW else self.most, sharing=about)

    def _warm_up(self) -> None:
        import numpy as np

        sizes = {min(self.most, 1 << power) for power in range(self.most.bit_length() + 1)}
        for size in sorted(sizes):
            self.run(np.zeros((size, self.height, self.width, 3), np.uint8))


def _check(name: str, takes: Any, gives: Any) -> None:
    if len(takes) != 1 or len(gives) != 1:
        message = f"{name} has {len(takes)} inputs and {len(gives)} outputs; one of each is served"
        raise StartError("model_load_failed", message, _HINT)
    shape, dtype = tuple(takes[0].shape), str(takes[0].dtype)
    if dtype != "uint8" or len(shape) != 4 or shape[0] is not None or None in shape[1:3] or shape[3] != 3:
        message = f"the input of {name} is {dtype} {list(shape)}, not uint8 [null, height, width, 3]"
        raise StartError("model_load_failed", message, _HINT)
    answer = tuple(gives[0].shape)
    if len(answer) < 2 or answer[0] is not None or None in answer[1:]:
        message = f"the output of {name} is {list(answer)}, which has no fixed size for a picture"
        raise StartError("model_load_failed", message, _HINT)
