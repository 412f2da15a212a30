"""Bento projects: found by their files' names and text; never imported."""

from __future__ import annotations

import re
import tomllib

from registry.formats.upload import Recognised, Upload

FORMAT = "bento-project"
KIND = "project"
_LARGEST_TEXT = 4 << 20
_MOST_SOURCES = 200
_SERVICE = re.compile(
    r"^@bentoml\.service\b|^@service\b|\bbentoml\.images\.(?:Python)?Image\b|\bbentoml\.Service\(", re.M
)
_IMPORT = re.compile(r"^(?:import|from)\s+bentoml\b", re.M)


def recognise(upload: Upload) -> Recognised | None:
    """The project in an upload, None if there is none: bentofile.yaml, else [tool.bentoml] in pyproject.toml, else a
    Python file at the top that makes a BentoML service."""
    for name in ("bentofile.yaml", "bentofile.yml"):
        if name in upload.sizes:
            return Recognised(FORMAT, name, kind=KIND)
    if "pyproject.toml" in upload.sizes:
        try:
            body = tomllib.loads(_text(upload, "pyproject.toml"))
        except (tomllib.TOMLDecodeError, RecursionError, ValueError):
            body = {}
        tool = body.get("tool")
        if isinstance(tool, dict) and "bentoml" in tool:
            return Recognised(FORMAT, "pyproject.toml", kind=KIND)
    sources = sorted(path for path in upload.sizes if path.endswith(".py") and "/" not in path)
    # service.py is what BentoML itself looks for
    for path in sorted(sources, key=lambda name: name != "service.py")[:_MOST_SOURCES]:
        text = _text(upload, path)
        if _IMPORT.search(text) and _SERVICE.search(text):
            return Recognised(FORMAT, path, kind=KIND)
    return None


def _text(upload: Upload, path: str) -> str:
    return upload.head(path, _LARGEST_TEXT).decode(errors="replace")
