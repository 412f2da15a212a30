"""predict"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ekiben._commands import Json, Url, session
from ekiben._errors import UsageError


def add(app: typer.Typer) -> None:
    app.command()(predict)


def predict(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The deployment.")],
    data: Annotated[
        str | None, typer.Option("--data", "-d", metavar="JSON", help="The body, or a list of rows.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FILE", help=".json, .jsonl or .csv; - for standard input.")
    ] = None,
    seconds: Annotated[float, typer.Option("--timeout", help="Seconds to wait for the answer.", min=0.001)] = 60.0,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Call a model.

    \b
    ekiben predict churn -d '[{"age": 31, "plan": "pro"}]'
    ekiben predict churn -f rows.csv
    cat rows.json | ekiben predict churn

    A list of rows is sent as {"inputs": rows}; an object is sent as it is, but for the outputs of a sample.
    """
    import sys

    from ekiben import _documents

    if data is not None and file is not None:
        raise UsageError("both --data and --file are given", code="usage", hint="give one of them")
    if data is not None:
        value = _documents.parse(data.encode(), ".json", "--data", "data")
    elif file is not None:
        value = _documents.parse(_documents.read(file, "file"), file.suffix.lower(), str(file), "file")
    elif sys.stdin.isatty():
        raise UsageError(
            "there is nothing to predict", code="usage", hint="-d JSON, -f FILE, or rows on standard input"
        )
    else:
        value = _documents.parse(_documents.read(Path("-")), ".json", "standard input")
    body, _ = _documents.split(value)  # a sample's file may hold what is expected too
    with session(ctx, url, as_json) as (client, out):
        out.value(client.predict(name, body, seconds=seconds))
