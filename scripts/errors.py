"""docs/errors.md: every error code of the server side, read out of the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

_RAISED = frozenset(
    ("UserError", "InfrastructureError", "EkibenError", "Failure", "StartError", "InputError", "Problem", "NameTaken")
)
_ROOMS = ("registry", "builder_image", "build_service", "bentos/serving", "bentos")


def document(root: Path) -> str:
    """The page, in Markdown."""
    found: dict[str, tuple[str, str]] = {}
    for room in _ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            for code, text in _codes(ast.parse(path.read_text())):
                found.setdefault(code, (path.relative_to(root).as_posix(), text))
    rows = [f"| `{code}` | {text} | `{where}` |" for code, (where, text) in sorted(found.items())]
    return (
        "# Errors\n\n"
        "Every error is `application/problem+json` (RFC 9457) with a stable `code`, the offending `field` where there\n"
        "is one, and a `hint` that says what to do. A failed build, rollout or start of a model has the same codes\n"
        "in `code`, `reason` and `hint` of the version and the deployment. This page is made from the source by\n"
        "`make openapi`.\n\n"
        "| code | what it says | raised in |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"
    )


def _codes(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if name in _RAISED and node.args and isinstance(node.args[0], ast.Constant):
                code = node.args[0].value
                if isinstance(code, str) and code.isidentifier():
                    yield code, _text(node.args[1]) if len(node.args) > 1 else ""


def _text(node: ast.expr) -> str:
    """A message with … where a value stands."""
    if isinstance(node, ast.Constant):
        text = str(node.value)
    elif isinstance(node, ast.JoinedStr):
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    elif isinstance(node, ast.BinOp):
        text = _text(node.left) + _text(node.right)
    else:
        text = "…"
    return " ".join(text.split()).replace("|", "\\|")
