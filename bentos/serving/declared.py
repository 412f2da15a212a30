"""The environment variables that a Bento declares (`envs` of its service or bentofile), set before it is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from bentos.serving.problems import StartError

# what decides which code runs, or what the platform has told this process
_KEPT = re.compile(
    r"(?i)EKIBEN_.*|PATH|PYTHON.*|LD_.*|DYLD_.*|GCONV_PATH|GLIBC_TUNABLES|BENTOML_HOME|BENTOML_DO_NOT_TRACK"
)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def read(bento: Path) -> dict[str, str]:
    """Variables of `bento.yaml`, or of a project's `bentofile.yaml`; none for the build only.

    Raises StartError `service_import_failed` where that file is no YAML.
    """
    path = next((p for name in ("bento.yaml", "bentofile.yaml") if (p := bento / name).is_file()), None)
    if path is None:
        return {}
    import yaml

    try:
        document = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        message = f"{path.name} is not YAML: {str(error)[:300]}"
        raise StartError("service_import_failed", message, f"correct {path.name}") from error
    listed = document.get("envs") if isinstance(document, dict) else None
    return runtime(e for e in listed if isinstance(e, dict)) if isinstance(listed, list) else {}


def runtime(envs: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Name → value of the entries that count when the service runs."""
    found = {}
    for entry in envs:
        name, value = entry.get("name"), entry.get("value", "")
        if entry.get("stage", "all") != "build" and isinstance(name, str) and _NAME.fullmatch(name):
            found[name] = "" if value is None else str(value)
    return found


def apply(variables: Mapping[str, str], environ: MutableMapping[str, str]) -> list[str]:
    """Set them, over those of the same name, as a container's image does over its base's. Gives the names left alone:
    those that are the platform's, or that decide which code runs."""
    kept = []
    for name, value in variables.items():
        if _KEPT.fullmatch(name) or "\0" in value:
            kept.append(name)
        else:
            environ[name] = value
    return kept
