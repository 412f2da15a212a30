"""The figures of kinds: the client that asks as fast as it is answered, and the table that is made of what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from benchmarks import kinds
from benchmarks.figures import ROOT
from registry.kinds import Kinds
from scripts import kinds as tables


class Echo(BaseHTTPRequestHandler):
    """Gives bodies back on /predict; /wrong has no answer."""

    protocol_version = "HTTP/1.1"
    seen: list[bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.seen.append(body)
        self.send_response(200 if self.path == "/predict" else 500)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    Echo.seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def ask(port: int, path: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "body").write_bytes(b"x" * 300_000)  # more than comes in one piece
    argv = [str(port), path, str(folder / "body"), "3", "0.5", "0"]
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.closed_loop", *argv], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_every_connection_asks_again_once_it_was_answered(port: int, tmp_path: Path) -> None:
    done = ask(port, "/predict", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0 < found["calls"] <= len(Echo.seen)
    assert found["per_second"] == found["calls"] / 0.5
    assert 0 < found["p50_ms"] <= found["p99_ms"]
    assert {len(body) for body in Echo.seen} == {300_000}


def test_an_answer_that_is_an_error_ends_the_measurement(port: int, tmp_path: Path) -> None:
    done = ask(port, "/wrong", tmp_path)
    assert done.returncode == 1
    assert "500" in done.stderr


def test_an_example_has_no_quality(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EKIBEN_HOME", str(tmp_path))
    kind = Kinds.load(kinds.BENTOS).named("ranker")
    with pytest.raises(kinds.Absent, match="make train"):
        kinds.quality(kind)(None)  # type: ignore[arg-type]


def test_the_table_has_a_row_for_each_kind_and_one_for_those_that_were_asked_without_batching() -> None:
    speed = {"per_second_1": 100, "per_second_16": 400, "ready_s": 3.5, "pss_mib": 210}
    speed |= {f"{name}_{count}": count for name in ("p50_ms", "p99_ms") for count in (1, 16)}
    serving = {"figure": "models.violation.serving", "detail": speed | {f"unbatched_{k}": v for k, v in speed.items()}}
    quality = {"figure": "models.violation.quality", "value": 0.98}
    quality["detail"] = {"metric": "auc", "baseline": "auc_prior", "baseline_value": 0.5}
    image = {"figure": "models.violation.image", "value": 301, "detail": {"mib": {"base": 40, "deps": 260, "code": 1}}}
    head, _, *rows = tables.figures(ROOT, [serving, quality, image]).splitlines()
    assert {row.count("|") for row in rows} == {head.count("|")}
    names = [row.split("|")[1].strip() for row in rows]
    assert sorted(names) == sorted([*Kinds.load(ROOT / "bentos").names, "violation, no batching"])
    row = rows[names.index("violation")]
    assert "| auc 0.98 (auc_prior 0.5) | 100, 400 | 1 / 1 ms | 16 / 16 ms | 3.5 s | 210 MiB | 260 + 1 + 0 MiB |" in row
