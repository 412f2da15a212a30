"""`make demo`: the whole way of a model on this machine, with the real parts and plain curl.

Trains a small ranker, starts the service with a state folder of its own, uploads, calls, rolls to a second version
under load, rolls back, and counts the calls that failed.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STATE = ROOT / ".ekiben" / "demo"
_TOKEN = STATE / "home" / "token"
_BUILD_SECONDS = 300


class Failed(Exception):
    """A step did not give what it must give."""


def main() -> int:
    started = time.monotonic()
    shutil.rmtree(STATE, ignore_errors=True)
    STATE.mkdir(parents=True)
    server: subprocess.Popen[bytes] | None = None
    try:
        first = _train("lambdamart", seed=1)
        second = _train("regression", seed=2)
        server, url = _start()
        _demo(url, first, second)
    except Failed as failure:
        print(f"\ndemo failed: {failure}\nthe service's log is {STATE / 'server.log'}", file=sys.stderr)
        return 1
    finally:
        if server is not None:
            server.send_signal(signal.SIGTERM)
            server.wait()
    print(f"\nAll of it in {time.monotonic() - started:.0f} s. What to try next:")
    print("  make up                                        keep the service running on http://localhost:8000")
    print("  source .venv/bin/activate                      put `ekiben` on the path")
    print("  ekiben push YOUR_MODEL --sample rows.json      LightGBM, XGBoost, ONNX, scikit-learn (skops)")
    print("  ekiben --help                                  and docs/guide.md")
    return 0


def _demo(url: str, first: Path, second: Path) -> None:
    _say("Upload: one file with curl. The answer comes before it is built.")
    answer = _curl(*_form(first), f"{url}/models")
    _show(answer, "model", "version", "kind", "state", "digest")

    _say("Follow the build.")
    version = _follow(url, 1)
    _show(version, "state", "verified", "seconds")

    _say("Call it: by its name, and as the default deployment.")
    request = first / "sample.json"
    by_name = _curl("-H", "content-type: application/json", "-d", f"@{request}", f"{url}/inference/ranker/predict")
    default = _curl("-H", "content-type: application/json", "-d", f"@{request}", f"{url}/inference/predict")
    print("  " + json.dumps(by_name)[:160] + " …")
    if by_name != default or "ranking" not in by_name:
        raise Failed("the two endpoints answered differently, or without a ranking")

    _say("A second version goes live while a client keeps calling.")
    caller = _Caller(f"{url}/inference/ranker/predict", request.read_bytes())
    caller.start()
    _curl(*_form(second), f"{url}/models")
    version = _follow(url, 2)
    _show(version, "state", "verified", "seconds")
    caller.until("2")

    _say("Roll back: a new revision that points at the old build; nothing is rebuilt.")
    _curl("-X", "POST", f"{url}/deployments/ranker/rollback", own=True)
    caller.until("1")
    caller.stop()
    revisions = _curl(f"{url}/deployments/ranker/revisions")["items"]
    for revision in reversed(revisions):
        print(f"  revision {revision['revision']}: version {revision['version']}  {revision['state']}")

    counts = ", ".join(f"version {number}: {count}" for number, count in sorted(caller.versions.items()))
    print(f"\n  {caller.calls} calls while it rolled twice ({counts}); failed: {caller.failed}")
    if caller.failed or set(caller.versions) != {"1", "2"}:
        raise Failed(f"calls failed or a version was never seen: {caller.errors[:3]}")


class _Caller(threading.Thread):
    """A client that calls again and again and notes which version answered."""

    def __init__(self, url: str, body: bytes) -> None:
        super().__init__(daemon=True)
        self._request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        # Loopback calls bypass proxies.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._ended = threading.Event()
        self.calls = self.failed = 0
        self.versions: dict[str, int] = {}
        self.errors: list[str] = []
        self.last = ""

    def run(self) -> None:
        while not self._ended.is_set():
            self.calls += 1
            try:
                with self._opener.open(self._request, timeout=30) as response:
                    response.read()
                    self.last = response.headers["Ekiben-Version"]
                    self.versions[self.last] = self.versions.get(self.last, 0) + 1
            except (OSError, urllib.error.HTTPError) as error:
                self.failed += 1
                self.errors.append(repr(error))
            time.sleep(0.01)

    def until(self, version: str) -> None:
        deadline = time.monotonic() + _BUILD_SECONDS
        while self.last != version:
            if time.monotonic() > deadline:
                raise Failed(f"version {version} never answered; errors: {self.errors[:3]}")
            time.sleep(0.05)

    def stop(self) -> None:
        self._ended.set()
        self.join()


def _train(variant: str, seed: int) -> Path:
    folder = STATE / f"ranker-{variant}"
    _say(f"Train a small ranker ({variant}) on simulated picture searches.")
    command = [
        sys.executable, "-m", "bentos.ranker.train", "--small", "--variant", variant, "--seed", str(seed),
        "--out", str(folder), "--no-mlflow",
    ]  # fmt: skip
    _print_command(["python", *command[1:]])
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"training ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    lines = iter(done.stdout.splitlines())
    for line in lines:
        if "NDCG" in line:  # the table of results
            print("  " + line)
            for row in lines:
                if not row.strip():
                    break
                print("  " + row)
    return folder


def _start() -> tuple[subprocess.Popen[bytes], str]:
    _say("Start the service.")
    environment = {**os.environ, "EKIBEN_HOME": str(STATE / "home"), "EKIBEN_PORT": "0"}
    log = (STATE / "server.log").open("wb")
    server = subprocess.Popen(
        [sys.executable, "-m", "build_service"], cwd=ROOT, env=environment, stdout=log, stderr=log
    )
    address = STATE / "home" / "url"
    for _ in range(600):
        if server.poll() is not None:
            raise Failed(f"the service ended: {(STATE / 'server.log').read_text()[-2000:]}")
        if address.exists():
            url = address.read_text().strip()
            print(f"  {url}")
            return server, url
        time.sleep(0.1)
    raise Failed("the service did not start within a minute")


def _form(folder: Path) -> list[str]:
    manifest = json.loads((folder / "manifest.json").read_text())
    model = folder / "files" / manifest["files"][0]["path"]
    return [
        "-F", f"file=@{model}", "-F", "name=ranker", "-F", "kind=ranker", "-F", "force=true",
        "-F", f"sample=<{folder / 'sample.json'}", "-F", f"expected=<{folder / 'expected.json'}",
    ]  # fmt: skip


def _follow(url: str, number: int) -> dict[str, Any]:
    last = ""
    deadline = time.monotonic() + _BUILD_SECONDS
    while time.monotonic() < deadline:
        version = _curl(f"{url}/models/ranker/versions/{number}", quiet=True)
        now = version["state"] + (f": {version['stage']}" if version.get("stage") else "")
        if now != last:
            print(f"  {now}")
            last = now
        if version["state"] == "live":
            return version
        if version["state"] in ("failed", "rolled_back"):
            raise Failed(f"version {number} is {version['state']}: {version['reason']} ({version['hint']})")
        time.sleep(0.1)
    raise Failed(f"version {number} was not live in time")


def _curl(*arguments: str, quiet: bool = False, own: bool = False) -> dict[str, Any]:
    """`own`: with the token of the state folder, which is needed to change what is served."""
    command = ["curl", "--silent", "--show-error", "--noproxy", "*", *arguments]
    if own:
        command += ["-H", f"Authorization: Bearer {_TOKEN.read_text().strip()}"]
    if not quiet:
        _print_command(["curl", *arguments], f' -H "Authorization: Bearer $(cat {_TOKEN})"' if own else "")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"curl: {done.stderr.strip()}")
    answer: dict[str, Any] = json.loads(done.stdout)
    if "code" in answer and "status" in answer:
        raise Failed(f"{answer['code']}: {answer['detail']} ({answer.get('hint')})")
    return answer


def _print_command(command: list[str], more: str = "") -> None:
    text = (shlex.join(command) + more).replace(str(ROOT) + "/", "")
    print(f"  $ {text}")


def _say(text: str) -> None:
    print(f"\n▸ {text}", flush=True)


def _show(answer: dict[str, Any], *keys: str) -> None:
    for key in keys:
        print(f"  {key}: {json.dumps(answer.get(key))}")


if __name__ == "__main__":
    sys.exit(main())
