"""TensorFlow SavedModel: a folder with saved_model.pb and variables/. Only the frame is looked at."""

from __future__ import annotations

from registry.formats.upload import Recognised, Upload, invalid, truncated

FORMAT = "tensorflow-savedmodel"
_SAVE = "model.export('folder')"


def recognise(upload: Upload) -> Recognised | None:
    """The SavedModel in an upload, None if there is no saved_model.pb in it."""
    found = [path for path in upload.sizes if path.rpartition("/")[2] == "saved_model.pb"]
    if not found:
        return None
    path = min(found, key=lambda place: (place.count("/"), place))
    if upload.sizes[path] == 0:
        truncated(path, "it is empty", _SAVE)
    # SavedModel: field 1 saved_model_schema_version = 1, field 2 the first MetaGraphDef
    if upload.head(path, 3) != b"\x08\x01\x12":
        invalid(path, "it does not begin as a SavedModel", _SAVE)
    folder = path.rpartition("/")[0]
    prefix = f"{folder}/variables/" if folder else "variables/"
    names = [name.removeprefix(prefix) for name in upload.sizes if name.startswith(prefix)]
    if any(name.startswith("variables.data") for name in names) != ("variables.index" in names):
        truncated(path, "its variables/ folder is not whole", _SAVE)
    return Recognised(FORMAT, folder)
