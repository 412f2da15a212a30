"""What an upload is, found by its content from an allow-list. Nothing of the user's is loaded, unpickled or imported,
and no framework's parser touches it.

    recognise(sizes, open)      what the files are, or a UserError that says what is wrong and what to do
    choose_kind(found, …)       which kind serves them
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import BinaryIO, NoReturn

from registry.archive import check_zip
from registry.archive_zip import Entry, ZipFault, entries, is_zip, open_entry
from registry.errors import UserError
from registry.formats import (
    keras,
    lightgbm,
    mlflow,
    neighbours,
    onnx,
    pickles,
    project,
    safetensors,
    skops,
    tensorflow,
    transformers,
    xgboost,
)
from registry.formats.transformers import check_needs
from registry.formats.upload import OpenFile, Recognised, Upload, read_up_to, shown
from registry.kinds import Kinds

__all__ = ["FORMATS", "OpenFile", "Recognised", "Upload", "check_needs", "choose_kind", "recognise"]

FORMATS: Mapping[str, str] = {
    lightgbm.FORMAT: "LightGBM text (booster.save_model)",
    xgboost.JSON: "XGBoost JSON (save_model)",
    xgboost.UBJ: "XGBoost UBJSON (save_model)",
    onnx.FORMAT: "ONNX",
    skops.FORMAT: "scikit-learn through skops",
    safetensors.FORMAT: "safetensors",
    keras.FORMAT: "Keras v3 .keras",
    tensorflow.FORMAT: "TensorFlow SavedModel folder",
    transformers.ONNX: "Hugging Face folder with model.onnx and tokenizer.json",
    transformers.SAFETENSORS: "Hugging Face folder with model.safetensors and tokenizer.json",
    mlflow.FORMAT: "MLflow model folder (lightgbm, xgboost, onnx, sklearn through skops)",
    project.FORMAT: "a folder with a BentoML project",
}

# What people also bring: first bytes, and what to do with it.
_KNOWN_OTHERS: tuple[tuple[bytes, str, str], ...] = (
    (b"CBM1", "a CatBoost model", "Save it with model.save_model('model.onnx', format='onnx')."),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "Save a Keras model with model.save('model.keras')."),
    (b"GGUF", "a GGUF language model", "Serve it from a project with your own code: ekiben init."),
    (b"PAR1", "a Parquet table", "Upload the trained model, not the data."),
    (b"\x93NUMPY", "a NumPy array", "Upload the trained model, not the data."),
    (b"\x7fELF", "a compiled library or program", "Upload the trained model in one of the formats above."),
    (b"\x1f\x8b", "gzip-compressed", "Upload it unpacked, or as .tar.gz."),
    (b"BZh", "bzip2-compressed", "Upload it unpacked."),
    (b"\xfd7zXZ", "xz-compressed", "Upload it unpacked."),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", "Upload it unpacked."),
    (b"{\"name\":\"tree\"", "LightGBM's dump_model, which cannot be loaded", "Use booster.save_model('model.txt')."),
    (b"booster[0]", "XGBoost's dump_model, which cannot be loaded", "Save it with booster.save_model('model.ubj')."),
    (b"<!DOCTYPE", "a web page, perhaps an error page of a download", "Look into the file; download the model again."),
    (b"<html", "a web page, perhaps an error page of a download", "Look into the file; download the model again."),
    (b"version https://git-lfs", "a Git LFS pointer, not the model", "Fetch the model with git lfs pull."),
)  # fmt: skip

_MOST_MODELS = 1000  # files that are looked into
_MOST_ZIPPED = 100_000


def recognise(sizes: Mapping[str, int] | Sequence[tuple[str, int]], open: OpenFile) -> Recognised:
    """What the files are. `sizes` gives each path's size in bytes, `open(path)` a seekable binary stream.

    One file must be a model; others may lie beside it (external data, tokenizers, notes) as long as they neither look
    like a model nor are named like one. UserError otherwise, with code `empty_file`, `unknown_format`,
    `pickle_refused`, `truncated_model`, `invalid_model`, `several_models`, `unrecognised_model`,
    `skops_untrusted_type`, `onnx_external_data`, `keras_lambda` and the like.
    """
    upload = Upload(dict(sizes), open)
    if not upload.sizes:
        raise UserError(
            "empty_upload", "The upload holds no file.", field="file", hint="Send the model as file=@model.txt."
        )
    if (found := project.recognise(upload)) is not None:
        return found
    folder = mlflow.recognise(upload, _file) or tensorflow.recognise(upload) or transformers.recognise(upload)
    found = _only_model(upload, folder)
    neighbours.refuse_named_like_models(upload, found)
    return found


def _only_model(upload: Upload, folder: Recognised | None) -> Recognised:
    """The folder's model, else the file that is one. UserError where there are several, or pickles lie beside it."""
    own = frozenset() if folder is None else folder.parts | {folder.path}
    looked_into = [path for path in sorted(upload.sizes) if path not in own][:_MOST_MODELS]
    if folder is None and len(upload.sizes) == 1 and not upload.sizes[looked_into[0]]:
        raise UserError(
            "empty_file",
            f"{shown(looked_into[0])} is empty.",
            field="file",
            hint="Save the model again and look at the file's size before you send it.",
        )
    models: list[Recognised] = []
    faults: dict[str, UserError] = {}
    for path in looked_into:
        try:
            if upload.sizes[path] and (found := _file(upload, path)) is not None:
                models.append(found)
        except UserError as error:
            faults[path] = error
    # the raw bytes of a part may look like anything, also like a damaged model
    parts = frozenset[str]().union(*(model.parts for model in models))
    models = [model for model in models if model.path not in parts]
    for path, fault in faults.items():
        if path not in parts:
            raise fault
    if folder is not None:
        models.insert(0, folder)
    elif len(models) > 1 and {model.format for model in models} == {safetensors.FORMAT}:
        # shards of one model
        return replace(models[0], parts=frozenset(model.path for model in models[1:]))
    if len(models) > 1:
        raise UserError(
            "several_models",
            f"The upload holds several models: {', '.join(shown(model.path) for model in models[:5])}.",
            field="file",
            hint="Upload one model a version, or a project whose code loads them all: ekiben init.",
        )
    if not models:
        _unknown(upload)
    return models[0]


def _file(upload: Upload, path: str) -> Recognised | None:
    """What one file is; UserError `pickle_refused` where it is a pickle."""
    head = upload.head(path, 8)
    if is_zip(head):
        return _zipped(upload, path)
    recognisers: tuple[Callable[[Upload, str], Recognised | None], ...] = (
        lightgbm.recognise,
        xgboost.recognise,
        onnx.recognise,
        safetensors.recognise,
    )
    for each in recognisers:
        if (found := each(upload, path)) is not None:
            return found
    pickles.refuse_pickle(upload, path)
    return None


def _zipped(upload: Upload, path: str) -> Recognised | None:
    with upload.open(path) as stream:
        try:
            members = entries(stream, _MOST_ZIPPED, model=True)
            check_zip(members)
            names = {entry.name for entry in members}
            if "schema.json" in names and (found := skops.recognise(stream, members, path)) is not None:
                return found
            if "config.json" in names and (found := keras.recognise(stream, members, path)) is not None:
                return found
            pickles.refuse_zipped_pickle(members, path, _heads(stream, members))
        except ZipFault as fault:
            code = "truncated_model" if fault.code == "archive_truncated" else "invalid_model"
            raise UserError(
                code,
                f"{shown(path)} is a zip file that cannot be read: {shown(fault.what)}.",
                field="file",
                hint="Upload the file again; if it is so at its source too, save the model again.",
            ) from fault
    return None


def _heads(stream: BinaryIO, members: list[Entry]) -> dict[str, bytes]:
    heads = {}
    for entry in members[:1000]:
        if entry.size and not entry.folder:
            with open_entry(stream, entry) as reader:
                heads[entry.name] = read_up_to(reader, 4096)
    return heads


def _unknown(upload: Upload) -> NoReturn:
    path = min(upload.sizes, key=lambda name: (-upload.sizes[name], name))
    head = upload.head(path, 64)
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    hint = f"Known are: {'; '.join(FORMATS.values())}."
    what = "is in no format that is known here"
    for magic, name, way in _KNOWN_OTHERS:
        if start.startswith(magic) or (magic.startswith(b"\x89") and head.startswith(magic)):
            what, hint = f"looks like {name}", f"{way} {hint}"
            break
    raise UserError("unknown_format", f"{shown(path)} {what}.", field="file", hint=hint)


def choose_kind(found: Recognised, kinds: Kinds, requested: str | None = None) -> str:
    """The name of the kind that serves what was found: the one asked for, else the generic one of the format.

    UserError `unknown_kind`, `kind_does_not_fit`, or `format_without_kind` where no kind serves the format yet.
    """
    names = [*kinds.names, *([] if project.KIND in kinds.names else [project.KIND])]
    if requested is not None:
        if requested not in names:
            raise UserError(
                "unknown_kind",
                f"There is no kind {shown(requested)!r}.",
                field="kind",
                hint=f"Known are: {', '.join(sorted(names))}. Without kind= it is found from the file.",
            )
        fits = requested == project.KIND if found.format == project.FORMAT else False
        if not fits and requested != project.KIND:
            fits = found.format in kinds.named(requested).formats
        if not fits:
            takes = project.FORMAT if requested == project.KIND else ", ".join(kinds.named(requested).formats)
            serving = [kind.name for kind in kinds.all if found.format in kind.formats]
            others = f"{found.format} is served by: {', '.join(serving)}." if serving else "Leave kind= out."
            raise UserError(
                "kind_does_not_fit",
                f"The upload is {found.format}; the kind {requested} takes {takes}.",
                field="kind",
                hint=others,
            )
        return requested
    if found.kind is not None:
        return found.kind
    kind = kinds.for_format(found.format)
    if kind is None:
        raise UserError(
            "format_without_kind",
            f"{shown(found.path) or 'The upload'} is {FORMATS[found.format]}; no kind serves that yet.",
            field="file",
            hint="Export it as ONNX, or serve it from a project with your own code: ekiben init --from FILE.",
        )
    return kind.name
