"""Lets a service read its own files where its folder lies below one whose name starts with a dot.

BentoML (1.4.40, `resolve_user_filepath`) refuses a file of the service's own folder when any folder above it is hidden,
as `~/.ekiben` is: `Image().requirements_file("requirements.txt")` then fails at import. The rule is meant for the path
that the user wrote, so here it is applied to that path only. Needs nothing but the standard library and BentoML: the
builder's inspector loads this file by its path.
"""

from __future__ import annotations

from pathlib import Path


def allow() -> None:
    """Replace BentoML's check by one that looks at the path below the current folder only."""
    from _bentoml_sdk import images

    strict = images.resolve_user_filepath

    def resolve(filepath: str, ctx: str | None, secure: bool = True) -> str:
        try:
            found: str = strict(filepath, ctx, secure)
            return found
        except ValueError:
            here = Path(ctx).resolve() if ctx else Path.cwd().resolve()
            path = (here / filepath).resolve()
            if Path(filepath).is_absolute() or not path.is_relative_to(here) or not path.is_file():
                raise
            if any(part.startswith(".") for part in path.relative_to(here).parts):
                raise
            return str(path)

    images.resolve_user_filepath = resolve
