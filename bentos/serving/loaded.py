"""Which modules a process had to compile: where it may not write, the platform compiles for those that follow."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path


def record(file: Path) -> None:
    """Write the paths of the imported sources that have no bytecode, as a JSON list."""
    found = []
    for module in list(sys.modules.values()):
        spec = getattr(module, "__spec__", None)
        source, cached = getattr(spec, "origin", None), getattr(spec, "cached", None)
        if isinstance(source, str) and isinstance(cached, str) and not os.path.exists(cached):
            found.append(source)
    if found:
        with contextlib.suppress(OSError):
            file.write_text(json.dumps(sorted(found)), encoding="utf-8")
