"""The command line: one module a group of verbs. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ekiben._errors import EkibenError, UsageError
from ekiben._output import Output, output

if TYPE_CHECKING:
    from ekiben._client import Client

Url = Annotated[str | None, typer.Option("--url", metavar="URL", help="The server; else EKIBEN_URL, else the login.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for programs.")]


class Commands(TyperGroup):
    """Turns our errors into messages and exit codes: 1 failed, 2 wrong usage, 130 interrupted; never a traceback."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)  # in the order of the day, not of the alphabet

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EkibenError as error:
            _shown(ctx).error(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            _shown(ctx).note("interrupted")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # The reader went away (`ekiben logs … | head`): nothing to say, and nothing left to flush into.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise typer.Exit(0) from None


@dataclass
class Chosen:
    """What the options before the command said, and the output in use, for errors."""

    url: str | None = None
    as_json: bool = False
    shown: Output | None = None


@contextmanager
def session(ctx: typer.Context, url: str | None, as_json: bool) -> Iterator[tuple[Client, Output]]:
    """The client and the output of one command; options after the command win over those before it."""
    from ekiben._client import Client

    out = printing(ctx, as_json)
    with Client(url or chosen(ctx).url) as client:
        yield client, out


def printing(ctx: typer.Context, as_json: bool) -> Output:
    out = output(as_json or chosen(ctx).as_json, os.environ)
    chosen(ctx).shown = out
    return out


def chosen(ctx: typer.Context) -> Chosen:
    return ctx.find_root().ensure_object(Chosen)


def _shown(ctx: Any) -> Output:
    known = ctx.find_root().obj
    if isinstance(known, Chosen):
        return known.shown or output(known.as_json, os.environ)
    return output(False, os.environ)


def named(text: str, what: str = "NAME:VERSION") -> tuple[str, int | None]:
    """`churn:3` as ("churn", 3), `churn` as ("churn", None)."""
    name, colon, number = text.partition(":")
    if colon and not number.isdecimal():
        raise UsageError(f"{text!r} is not {what}", code="bad_name", hint="like churn:3")
    return name, int(number) if colon else None
