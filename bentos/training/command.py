"""The part of the command line that all training programs share."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from bentos.training import registration, tracking
from bentos.training.gate import HELD, Gate
from bentos.training.outcome import Outcome, Progress, short_digest


def positive(text: str) -> int:
    """An option's value that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def add_options(parser: argparse.ArgumentParser, folder: Path) -> None:
    """Where the result goes: --out, MLflow, --register, --gate."""
    group = parser.add_argument_group("where the result goes")
    group.add_argument(
        "--out", type=Path, default=folder, metavar="DIR", help=f"model folder (default {_short(folder)})"
    )
    group.add_argument(
        "--tracking-uri",
        metavar="URI",
        help="MLflow (default: MLFLOW_TRACKING_URI, or the SQLite file mlflow.db in EKIBEN_HOME, ~/.ekiben)",
    )
    group.add_argument(
        "--no-mlflow", action="store_true", help="log no run (saves the seconds that MLflow takes to load)"
    )
    group.add_argument(
        "--register",
        metavar="URL",
        help="upload the model to a running Ekiben, e.g. http://localhost:8000; EKIBEN_TOKEN, if set, is sent",
    )
    group.add_argument(
        "--gate",
        action="store_true",
        help="with --register: release the model only if it is not worse than the live one on the same held-out data",
    )
    group.add_argument(
        "--metrics", type=Path, metavar="FILE", help="write the metrics, and what they are of, as JSON too"
    )
    group.add_argument("--quiet", action="store_true", help="no progress, only the table and what to do next")


def finish(outcome: Outcome, options: argparse.Namespace, progress: Progress, gate: Gate | None = None) -> int:
    """Write, log and upload an outcome, and print what to do next. Gives the exit code."""
    out: Path = options.out
    if options.gate and (gate is None or not options.register):
        print("--gate needs --register URL" if gate else f"{outcome.kind} has no evaluation gate", file=sys.stderr)
        return 2
    try:
        folder = outcome.write(out)
    except OSError as error:
        print(f"the model cannot be written: {error}", file=sys.stderr)
        return 2
    progress(f"wrote {_short(out)} ({folder.digest[:19]}…)")
    run = None
    if not options.no_mlflow:
        home = Path(os.environ.get("EKIBEN_HOME") or "~/.ekiben").expanduser().absolute()
        uri = options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or tracking.default_uri(home)
        run = tracking.record(outcome, folder, uri)
        progress(f"logged as run {run} in {uri}")
        outcome = replace(outcome, run=run)
    if options.metrics:
        body = {
            "kind": outcome.kind,
            "digest": folder.digest,
            "run": run,
            "dataset": outcome.dataset_digest,
            "parameters": dict(outcome.parameters),
            "metrics": dict(outcome.metrics),
        }
        options.metrics.write_text(json.dumps(body, indent=2) + "\n")
    print("\nmodel file: " + ", ".join(str(_short(out / "files" / name)) for name in folder.files))
    if not options.register:
        print(
            "upload it with either of\n"
            + registration.how_to_upload(_short(out), folder.files, outcome.name, outcome.kind)
        )
        return 0
    service = registration.Service(options.register, os.environ.get("EKIBEN_TOKEN"))
    decision = None
    try:
        if options.gate and gate is not None:
            version, decision = registration.register_behind(gate, outcome, folder, service, progress)
        else:
            version = service.upload(outcome, folder, deploy=True)
    except registration.RegistrationError as error:
        print(error, file=sys.stderr)
        return 1
    if decision is not None:
        print(decision)
    print(f"{version.get('model')} version {version.get('version')} is {version.get('state')}: {version.get('url')}")
    return 0


def is_decided(name: str, dataset_digest: str, options: argparse.Namespace) -> bool:
    """Whether --register's service has a version that was trained on this very data and is live, or was held back.

    False where that cannot be told: training anew does no harm.
    """
    if not options.register:
        return False
    service = registration.Service(options.register, os.environ.get("EKIBEN_TOKEN"))
    try:
        newest = service.newest(name)
    except registration.RegistrationError:
        return False
    if newest is None or newest["labels"].get("dataset") != short_digest(dataset_digest):
        return False
    return newest["state"] == "live" or newest["labels"].get("gate.decision") == HELD


def _short(path: Path) -> Path:
    """Relative to the current folder where that is shorter to type."""
    try:
        return path.absolute().relative_to(Path.cwd())
    except ValueError:
        return path
