"""init"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ekiben._commands import Json, printing


def add(app: typer.Typer) -> None:
    app.command()(init)


def init(
    ctx: typer.Context,
    model: Annotated[Path, typer.Option("--from", metavar="FILE", help="A trained model, joblib and pickle included.")],
    folder: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="Where to; else the file's stem.")] = None,
    as_json: Json = False,
) -> None:
    """Write a ten-line project around a model file.

    \b
    ekiben init --from churn.joblib churn/
    ekiben push churn/

    The project is the place for preprocessing, and the way for pickles: the file is copied, never loaded. The versions
    in requirements.txt are those of this Python's environment, so run it where the model was trained.
    """
    from ekiben import _project

    out = printing(ctx, as_json)
    made = _project.write(model, folder or Path(_project.stem(model)))
    if out.as_json:
        out.value({"folder": str(made.folder), "files": list(made.files), "notes": list(made.notes)})
        return
    out.ticks(f"{made.folder}: {', '.join(made.files)}")
    for note in made.notes:
        out.note(f"note: {note}")
    out.line(f"put preprocessing into {made.folder / 'service.py'}, then: ekiben push {made.folder}")
