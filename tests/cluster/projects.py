"""Small Bento projects with code of their own, as users upload them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

_SERVICE = """
import os, time
import bentoml

@bentoml.service
class Own:
    def __init__(self):
        {start}

    @bentoml.api
    def predict(self, inputs: list[float]) -> dict:
        return {{"outputs": {outputs}}}
"""


def project(folder: Path, *, start: str = "pass", outputs: str = "[2 * x for x in inputs]") -> Path:
    """A project that doubles; `start` and `outputs` are Python that does something else."""
    return packed(folder, {"service.py": _SERVICE.format(start=start, outputs=outputs)}, "service:Own")


def packed(folder: Path, files: Mapping[str, str], service: str) -> Path:
    """An archive of the files, with what BentoML wants to know."""
    whole = {"bentofile.yaml": f"service: {service}\n", "requirements.txt": "bentoml==1.4.40\n", **files}
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / "own.tar"
    with tarfile.open(place, "w") as archive:
        for name, text in whole.items():
            entry = tarfile.TarInfo(f"own/{name}")
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return place
