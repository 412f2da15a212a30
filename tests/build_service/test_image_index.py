"""The hourly job of image search on a running service: what is live grows, and rests where nothing is new."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.bentos import kinds

Home = Any  # tests/build_service/conftest.py, which tests cannot import

PATIENCE = 600


@pytest.mark.thorough
@pytest.mark.timeout(3 * PATIENCE)
def test_new_pictures_go_live_behind_the_gate_and_nothing_new_is_no_release(
    server: Home, run_folder: Path, tmp_path: Path
) -> None:
    from bentos.image_search import data
    from bentos.image_search.searching import png

    folder = kinds.example("image_search", run_folder)
    form = {**kinds.form(kinds.found()["image_search"], folder), "name": "image-search"}
    with server.http(timeout=PATIENCE + 60) as client:
        answer = client.post(f"/models?wait={PATIENCE}", files=kinds.files(folder), data=form)
    assert (answer.status_code, answer.json()["state"]) == (201, "live"), f"{answer.text}\n{server.log()}"
    (tmp_path / "pictures").mkdir()
    picture = png(data.draw(np.random.default_rng(5), 1)[0][0])
    (tmp_path / "pictures" / "newcomer.png").write_bytes(picture)

    def job() -> str:
        options = ["--live", server.url, "--register", server.url, "--gate", "--no-mlflow", "--quiet", "--new-only"]
        command = [sys.executable, "-m", "bentos.image_search.index", *options, "--out", str(tmp_path / "model")]
        done = subprocess.run(
            [*command, "--add", str(tmp_path / "pictures")],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env={**os.environ, "EKIBEN_HOME": str(server.path)},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "it may be released" in job()
    version = server.get("/models/image-search/versions/2")
    assert (version["state"], version["labels"]["gate.decision"]) == ("live", "released")
    assert float(version["labels"]["gate.value"]) >= 0.99
    network = [
        {f["path"]: f["sha256"] for f in server.get(f"/models/image-search/versions/{n}")["files"]} for n in (1, 2)
    ]
    assert network[0]["embedding.keras"] == network[1]["embedding.keras"]
    assert network[0]["catalogue.usearch"] != network[1]["catalogue.usearch"]
    with server.http() as client:
        found = client.post(
            "/inference/image-search/predict?k=1", content=picture, headers={"content-type": "image/png"}
        )
    assert found.json()["similar"][0]["id"] == "newcomer"
    assert "nothing has changed" in job()
    server.get("/models/image-search/versions/3", 404)
