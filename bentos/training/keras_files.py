"""Training in Keras that repeats: the same seed gives the same weights, and the same weights the same file."""

from __future__ import annotations

import io
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from bentos.serving.networks import tensorflow

_LONG_AGO = (1980, 1, 1, 0, 0, 0)
_DATE = "1980-01-01@00:00:00"


def start(seed: int) -> Any:
    """TensorFlow on one core with all its sources of chance seeded; layers are named as in a new process."""
    tf = tensorflow(threads=1)
    import keras

    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()
    return tf


def keras_bytes(model: Any) -> bytes:
    """A `.keras` file without what differs from one saving to the next: the time, and the addresses of objects."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.keras"
        model.save(path)
        with zipfile.ZipFile(path) as saved:
            members = {entry.filename: saved.read(entry) for entry in saved.infolist()}
    members["metadata.json"] = json.dumps(json.loads(members["metadata.json"]) | {"date_saved": _DATE}).encode()
    members["config.json"] = json.dumps(_counted(json.loads(members["config.json"]), {})).encode()
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as canonical:
        for name in sorted(members):
            canonical.writestr(zipfile.ZipInfo(name, _LONG_AGO), members[name])
    return target.getvalue()


def _counted(value: Any, seen: dict[int, int]) -> Any:
    """With `shared_object_id`s, which are addresses, as the numbers 1, 2, … in the order they appear."""
    if isinstance(value, list):
        return [_counted(each, seen) for each in value]
    if isinstance(value, dict):
        return {
            name: seen.setdefault(each, len(seen) + 1) if name == "shared_object_id" else _counted(each, seen)
            for name, each in value.items()
        }
    return value
