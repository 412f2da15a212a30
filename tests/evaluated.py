"""A process of its own that loads a saved model and evaluates it: `python -m tests.evaluated KIND MLFLOW_URI MODEL…`.

Prints one JSON object: by model (as `registry.runs.load` takes it) its digest, by version the run that made it, and the
metrics of the last model.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path

from bentos.serving.model import ModelFolder
from registry import runs
from registry.origin import VERSION_URI


def main(kind: str, uri: str, models: list[str]) -> None:
    training = importlib.import_module(f"bentos.{kind}.train")
    client = runs.client_of(uri)
    digests, made_by, metrics = {}, {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, named in enumerate(models):
            folder = ModelFolder.read(runs.load(client, named, Path(scratch) / str(number)))
            folder.verify()
            digests[named] = folder.digest
            if version := VERSION_URI.fullmatch(named):
                made_by[named] = client.get_model_version(version["name"], version["version"] or "1").run_id
        metrics = training.evaluate(folder, training.Settings.small())
    print(json.dumps({"digests": digests, "runs": made_by, "metrics": metrics}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
