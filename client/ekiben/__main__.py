"""The command `ekiben`."""

from __future__ import annotations

import contextlib
import signal
import sys
from typing import Annotated

import typer

import ekiben
from ekiben._commands import Chosen, Commands, Json, Url, access, call, change, images, look, machine, project, send


def app() -> typer.Typer:
    """The whole command line, in the order of a first day."""
    made = typer.Typer(
        cls=Commands,
        help="Hand Ekiben a trained model; it hands you back a running, versioned HTTP endpoint.",
        epilog="First steps: ekiben up; ekiben push churn.txt --sample rows.json; ekiben predict churn -f rows.json",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    made.callback()(_options)
    for module in (machine, send, call, look, change, project, images, access):
        module.add(made)
    return made


def main() -> None:
    try:
        app()()
    except KeyboardInterrupt:  # between two of Typer's own places for it
        sys.exit(130)
    finally:
        # From here on the interpreter only ends: an interrupt that comes now is too late to change anything.
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ekiben {ekiben.__version__}")
        raise typer.Exit


def _options(
    ctx: typer.Context,
    url: Url = None,
    as_json: Json = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    ctx.obj = Chosen(url, as_json)


if __name__ == "__main__":
    main()
