"""Files beside a model. None of them is ever loaded, and none may be taken for the model by its name."""

from __future__ import annotations

from registry.errors import UserError
from registry.formats.upload import Recognised, Upload, shown

# What libraries save trained models as. Suffixes that notes, tables, tokenizers and external data have too (.bin,
# .data, .json, .model, .npy, .npz, .txt) are not among them.
_MODEL_SUFFIXES = (
    ".cbm", ".ckpt", ".dill", ".gguf", ".h5", ".hdf5", ".joblib", ".keras", ".mlmodel", ".onnx", ".ort", ".pb",
    ".pbtxt", ".cpb", ".pickle", ".pkl", ".pt", ".pth", ".safetensors", ".skops", ".tflite", ".ubj",
)  # fmt: skip


def is_named_like_a_model(path: str) -> bool:
    """Whether a library or a person would take the file for a model by its suffix."""
    return path.lower().endswith(_MODEL_SUFFIXES)


def refuse_named_like_models(upload: Upload, found: Recognised) -> None:
    """UserError `unrecognised_model` if a file that is not the model's is named like one."""
    for path in sorted(upload.sizes):
        if path != found.path and path not in found.parts and is_named_like_a_model(path):
            raise UserError(
                "unrecognised_model",
                f"{shown(path)} is named like a model, and the model of this upload is {shown(found.path)}.",
                field="file",
                hint=f"Upload {shown(found.path)} without it. If {shown(path)} is the model, save it again in a known "
                "format.",
            )
