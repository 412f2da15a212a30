"""The builder's image holds what the builder imports, and nothing that it does not."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OURS = ("builder_image", "registry")
MODULES = {"python-ulid": "ulid", "pyyaml": "yaml", "tomli-w": "tomli_w"}
"""Names of modules that are not those of their packages."""


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, wherever it stands."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{each.name}" for each in node.names)


def test_the_image_holds_what_is_imported_and_nothing_else() -> None:
    # the inspector runs in the service's own environment
    waiting = [file for file in sorted((ROOT / "builder_image").glob("*.py")) if file.name != "inspector.py"]
    seen, foreign = set(waiting), set()
    while waiting:
        for name in imports(waiting.pop()):
            top = name.partition(".")[0]
            file = ROOT / f"{name.replace('.', '/')}.py"
            if top in OURS and file.exists() and file not in seen:
                seen.add(file)
                waiting.append(file)
            elif top not in OURS and top not in sys.stdlib_module_names:
                foreign.add(top)
    lines = (ROOT / "containerfiles" / "builder.in").read_text().splitlines()
    named = {found[0] for line in lines if (found := re.match(r"[a-z-]+", line))}
    assert {MODULES.get(name, name) for name in named} == foreign
