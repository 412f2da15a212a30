"""What a served model can do to the machine, the service and its neighbours: a project whose requests are programs."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from registry.confinement import landlock

Home = Any  # tests/build_service/conftest.py, which tests cannot import
Model = Callable[..., bytes]
Until = Callable[..., Any]

SECRET = "s3cret-of-the-operator"
SERVICE = """
import bentoml

@bentoml.service
class Project:
    @bentoml.api
    def predict(self, inputs: list[str]) -> dict:
        answers = []
        for source in inputs:
            known = {}
            try:
                exec(source, known)
                answers.append(str(known.get("result", "done")))
            except BaseException as error:
                answers.append(type(error).__name__)
        return {"outputs": answers}
"""
SAMPLE = {"inputs": ["result = 1 + 1"]}
isolated = pytest.mark.skipif(
    landlock.version() == 0 and os.geteuid() != 0, reason="neither Landlock nor another user keeps a model here"
)


def project() -> bytes:
    files = {
        "p/bentofile.yaml": "service: service:Project\n",
        "p/requirements.txt": "bentoml==1.4.40\n",
        "p/service.py": SERVICE,
    }
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    return out.getvalue()


@pytest.fixture(scope="module")
def served(server: Home, model: Model) -> Iterator[Home]:
    """A service whose operator has secrets, with a neighbour `churn` and the project `own`."""
    server.stop()
    server.settings = {"EKIBEN_LOG_BYTES": str(256 * 1024), "EKIBEN_MODEL_DISK": "8Mi"}
    before = dict(os.environ)
    os.environ["AWS_SECRET_ACCESS_KEY"] = SECRET
    try:
        server.start()
        os.environ.update(before)
        server.upload(model(), name="churn")
        own = server.upload(project(), "p.tar", name="own", sample=SAMPLE)
        assert own["state"] == "live", own
        yield server
    finally:
        os.environ.pop("AWS_SECRET_ACCESS_KEY", None)


def ask(home: Home, source: str, deployment: str = "own") -> str:
    with home.http() as client:
        answer = client.post(f"/inference/{deployment}/predict", json={"inputs": [source]})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["outputs"][0])


@isolated
def test_a_model_writes_nothing_but_its_scratch_folder(served: Home) -> None:
    packages = ask(served, "import bentoml; result = bentoml.__file__")
    assert packages.startswith(str(served.path))
    for place in (
        Path(packages).parent / "written.py",
        Path(packages).parents[1] / "written.pth",
        served.path / "written",
        served.path / "objects" / "written",
        Path(ask(served, "import os; result = os.environ['EKIBEN_BENTO']")) / "src" / "written.py",
        Path(ask(served, "import os; result = os.environ['EKIBEN_MODEL_DIR']")) / "written",
        Path(ask(served, "import os; result = os.environ['PYTHONPATH']")) / "bentos" / "written.py",
        Path("/tmp/ekiben-written"),
        Path("/var/tmp/ekiben-written"),
    ):
        assert ask(served, f"open({str(place)!r}, 'w')") in ("PermissionError", "OSError", "FileNotFoundError"), place
        assert not place.exists()
    assert ask(served, "import tempfile; tempfile.mkstemp(); open(tempfile.gettempdir() + '/own', 'w')") == "done"
    # what a project may use for its own threads and processes
    assert ask(served, "import multiprocessing; multiprocessing.Lock()") == "done"


@isolated
def test_a_model_reads_nothing_of_the_service_or_of_its_neighbours(served: Home) -> None:
    (neighbour,) = (path for path in (served.path / "objects").rglob("*.txt") if path.name == "churn.txt")
    for path in (served.path / "ekiben.db", served.path / "server.log", served.path / "token", neighbour):
        assert path.exists()
        assert ask(served, f"result = open({str(path)!r}, 'rb').read(10)") in ("PermissionError", "FileNotFoundError")
    service = served.process.pid
    assert ask(served, f"result = open('/proc/{service}/environ', 'rb').read()") == "PermissionError"
    assert ask(served, f"result = open('/proc/{service}/mem', 'rb')") == "PermissionError"
    if landlock.version() >= 6 or os.geteuid() == 0:
        assert ask(served, f"import os, signal; os.kill({service}, signal.SIGCONT)") == "PermissionError"
    assert SECRET not in ask(served, "import os; result = dict(os.environ)")


def test_the_service_keeps_no_secret_in_its_environment(served: Home) -> None:
    for process in (psutil.Process(served.process.pid), *psutil.Process(served.process.pid).children(recursive=True)):
        with suppress(FileNotFoundError):
            assert SECRET.encode() not in Path(f"/proc/{process.pid}/environ").read_bytes(), process
            assert SECRET.encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes(), process


def test_a_process_that_forked_away_ends_with_its_deployment(served: Home, until: Until) -> None:
    served.call("PUT", "/deployments/forks", json={"model": "own", "version": 1})
    served.settled("forks")
    source = """
import os, subprocess, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(3, 100)
        os.execve(sys.executable, [sys.executable, '-c', 'import time; time.sleep(600)', 'forked-away'], {})
    os._exit(0)
os.wait()
"""
    assert ask(served, source, "forks") == "done"
    away = until(lambda: [process for process in psutil.process_iter() if _last_word(process) == "forked-away"])
    served.call("DELETE", "/deployments/forks", 204)
    until(lambda: not any(process.is_running() for process in away))


def _last_word(process: psutil.Process) -> str:
    with suppress(psutil.Error, IndexError):
        return process.cmdline()[-1]
    return ""


def test_a_request_for_much_memory_fails_alone(served: Home) -> None:
    before = ask(served, "import os; result = os.getpid()")
    assert ask(served, "result = len(bytes(3 << 30))") == "MemoryError"
    assert ask(served, "import os; result = os.getpid()") == before


def test_memory_over_the_default_limit_is_named_and_the_model_starts_again(served: Home, until: Until) -> None:
    """The limit that a project has in a cluster, 1 GiB, though its deployment names none."""
    crashes = _crashes(served)
    with served.http() as client:
        taking = "import time; result = [b'x' * (16 << 20) for _ in range(76)]; time.sleep(30)"
        assert client.post("/inference/own/predict", json={"inputs": [taking]}).status_code in (502, 503)
    crash = until(lambda: _crashes(served)[len(crashes) :])[0]
    assert "its limit of 1Gi" in crash
    until(lambda: served.get("/deployments/own")["ready"] == 1)
    assert ask(served, "result = 1 + 1") == "2"


def test_a_scratch_folder_that_is_full_is_named_and_emptied(served: Home, until: Until) -> None:
    crashes = _crashes(served)
    own = "import tempfile; own = tempfile.gettempdir() + '/'\n"
    assert (
        ask(served, f"{own}open(own + 'large', 'wb').write(b'x' * (9 << 20))") == "OSError"
    )  # one file alone is bounded by the kernel
    assert ask(served, f"{own}for each in 'ab': open(own + each, 'wb').write(b'x' * (6 << 20))") == "done"
    assert "scratch folder" in until(lambda: _crashes(served)[len(crashes) :])[0]
    until(lambda: served.get("/deployments/own")["ready"] == 1)
    assert ask(served, f"{own}import os; result = [each for each in os.listdir(own) if len(each) == 1]") == "[]"


def _crashes(home: Home) -> list[str]:
    events = home.get("/deployments/own/events")["items"]
    return [event["message"] for event in reversed(events) if event["reason"] == "Crashed"]


def test_a_flood_of_lines_keeps_its_log_small_and_the_last_ones_in_it(served: Home, until: Until) -> None:
    ask(served, "for number in range(20_000): print('flood', number, 'x' * 80, flush=True)\nprint('over', flush=True)")
    folder = served.path / "deployments" / "own"

    def written() -> Any:
        with served.http() as client:
            return "over" in client.get("/deployments/own/logs").text.splitlines()

    until(written)
    for log in folder.glob("*.log"):
        assert sum(path.stat().st_size for path in folder.glob(f"{log.name}*")) <= 256 * 1024
