"""The library that every kind shares, and the wrapper that serves any Bento: `python -m bentos.serving`.

Nothing is imported before it is asked for: the wrapper must set up its environment before BentoML is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "About": "about",
    "Column": "schema",
    "ModelFolder": "model",
    "Problem": "problems",
    "StartError": "problems",
    "Table": "schema",
    "answer": "answers",
    "folder": "settings",
    "image": "images",
    "offer": "routes",
    "write_model": "model",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
