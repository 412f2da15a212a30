"""The part of the command line that all training programs share."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from bentos.training import registration, tracking
from bentos.training.outcome import Outcome, Progress


def add_options(parser: argparse.ArgumentParser, folder: Path) -> None:
    """Where the result goes: --out, MLflow, --register."""
    group = parser.add_argument_group("where the result goes")
    group.add_argument(
        "--out", type=Path, default=folder, metavar="DIR", help=f"model folder (default {_short(folder)})"
    )
    group.add_argument(
        "--tracking-uri",
        metavar="URI",
        help="MLflow store (default: the SQLite file mlflow.db in EKIBEN_HOME, ~/.ekiben)",
    )
    group.add_argument(
        "--no-mlflow", action="store_true", help="log no run (saves the seconds that MLflow takes to load)"
    )
    group.add_argument(
        "--register",
        metavar="URL",
        help="upload the model to a running Ekiben, e.g. http://localhost:8000; EKIBEN_TOKEN, if set, is sent",
    )
    group.add_argument("--quiet", action="store_true", help="no progress, only the table and what to do next")


def finish(outcome: Outcome, options: argparse.Namespace, progress: Progress) -> int:
    """Write, log and upload an outcome, and print what to do next. Gives the exit code."""
    out: Path = options.out
    try:
        folder = outcome.write(out)
    except OSError as error:
        print(f"the model cannot be written: {error}", file=sys.stderr)
        return 2
    progress(f"wrote {_short(out)} ({folder.digest[:19]}…)")
    if not options.no_mlflow:
        home = Path(os.environ.get("EKIBEN_HOME") or "~/.ekiben").expanduser().absolute()
        uri = options.tracking_uri or tracking.default_uri(home)
        run = tracking.record(outcome, folder, uri)
        progress(f"logged as run {run} in {uri}")
    print("\nmodel file: " + ", ".join(str(_short(out / "files" / name)) for name in folder.files))
    if options.register:
        try:
            version = registration.register(outcome, folder, options.register, os.environ.get("EKIBEN_TOKEN"))
        except registration.RegistrationError as error:
            print(error, file=sys.stderr)
            return 1
        print(
            f"{version.get('model')} version {version.get('version')} is {version.get('state')}: {version.get('url')}"
        )
    else:
        print("upload it with either of\n" + registration.how_to_upload(_short(out), folder.files, outcome.kind))
    return 0


def _short(path: Path) -> Path:
    """Relative to the current folder where that is shorter to type."""
    try:
        return path.absolute().relative_to(Path.cwd())
    except ValueError:
        return path
