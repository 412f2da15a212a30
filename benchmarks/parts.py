"""The real parts that figures are measured with, and one scratch folder that is emptied at the end.

Everything a run makes lives under benchmarks/scratch/: `kept/` (a base image and its packages, used again by the next
run) and `run-PID/`, which goes when the run ends, however it ends.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.figures import ROOT, Absent

WORK = ROOT / "benchmarks" / "scratch"
MIB = 1024 * 1024
GIB = 1024 * MIB
_LONGEST = 900.0  # seconds of any one program
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback calls bypass proxies


class Failed(Exception):
    """A program ended with an error, or something answered wrong."""


def say(text: str) -> None:
    print(f"    {text}", flush=True)


def needs(*programs: str) -> None:
    """Raises Absent for programs that this machine does not have."""
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        raise Absent(f"{', '.join(missing)} not installed (apt-get install {' '.join(missing)})")


def run(
    argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path = ROOT, **options: Any
) -> tuple[str, float]:
    """(standard output, seconds) of a program. Raises Failed with the end of what it said."""
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [str(part) for part in argv],
            env=None if env is None else dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_LONGEST,
            **options,
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{Path(str(argv[0])).name} took longer than {_LONGEST:.0f} s") from error
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        words = (done.stderr + done.stdout)[-1500:].decode(errors="replace").strip()
        raise Failed(f"{Path(str(argv[0])).name} ended with exit code {done.returncode}: {words}")
    return done.stdout.decode(errors="replace"), seconds


def environment(**changes: str) -> dict[str, str]:
    """This machine's environment without settings of Ekiben's or BentoML's own.

    Both sides may write bytecode, as on any machine where they are installed: a warm cache includes it.
    """
    unwanted = ("EKIBEN_", "BENTOML_", "PYTHONDONTWRITEBYTECODE")
    plain = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    return {**plain, "BENTOML_DO_NOT_TRACK": "True", **changes}


def get_json(url: str, **headers: str) -> Any:
    with _DIRECT.open(urllib.request.Request(url, headers=headers), timeout=60) as response:
        return json.loads(response.read())


def status(url: str) -> int:
    """Of a GET. Raises OSError where nothing listens, or it is refused."""
    with _DIRECT.open(url, timeout=60) as response:
        return int(response.status)


def post(url: str, data: bytes = b"", method: str = "POST", **headers: str) -> tuple[bytes, Mapping[str, str]]:
    request = urllib.request.Request(url, data, headers, method=method)
    with _DIRECT.open(request, timeout=300) as response:
        return response.read(), response.headers


def seconds(stamp: str) -> float:
    """RFC 3339 in UTC as seconds since 1970; what is finer than a microsecond is cut."""
    head, dot, fraction = stamp.removesuffix("Z").partition(".")
    return datetime.datetime.fromisoformat(f"{head}{dot}{fraction[:6]}+00:00").timestamp()


class Peak(contextlib.AbstractContextManager["Peak"]):
    """The largest resident memory of a process, or of it and its descendants together, looked at every 20 ms.

    Pages that processes share count once for each: the sum is never less than what is really used.
    """

    def __init__(self, pid: int, tree: bool) -> None:
        self._pid, self._tree = pid, tree
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self.bytes = max(self.bytes, resident(self._pid, self._tree))


def resident(pid: int, tree: bool = False) -> int:
    total = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in [process, *(process.children(recursive=True) if tree else ())]:
            with contextlib.suppress(psutil.Error):
                total += one.memory_info().rss
    return total


@dataclass(frozen=True)
class Registry:
    """A running docker-registry."""

    host: str
    folder: Path

    def size(self, repository: str, tag: str) -> int:
        """Bytes of an image as stored: its layers and its config."""
        url = f"http://{self.host}/v2/{repository}/manifests/{tag}"
        manifest = get_json(url, Accept="application/vnd.oci.image.manifest.v1+json")
        return int(manifest["config"]["size"] + sum(layer["size"] for layer in manifest["layers"]))


@contextlib.contextmanager
def registry(folder: Path) -> Iterator[Registry]:
    """Debian's docker-registry with an empty store in `folder`, on a free loopback port."""
    needs("docker-registry")
    folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = folder / "config.yml"
    config.write_text(
        "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {json.dumps(str(folder / 'data'))}}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}', secret: benchmark}}\n"
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(["docker-registry", "serve", str(config)], stdout=log, stderr=log)
    try:
        for _ in range(400):
            with contextlib.suppress(OSError):
                _DIRECT.open(f"http://127.0.0.1:{port}/v2/", timeout=5).close()
                break
            if process.poll() is not None:
                raise Failed(f"docker-registry ended: {(folder / 'log').read_text(errors='replace')[-500:]}")
            time.sleep(0.05)
        yield Registry(f"127.0.0.1:{port}", folder)
    finally:
        end(process)
        shutil.rmtree(folder, ignore_errors=True)


def end(process: subprocess.Popen[bytes], seconds: float = 15) -> None:
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Service:
    """A running Ekiben."""

    url: str
    port: int
    pid: int
    home: Path

    @property
    def proof(self) -> dict[str, str]:
        """The header that proves to be the service's own user, for what deletes or changes."""
        return {"Authorization": f"Bearer {(self.home / 'token').read_text().strip()}"}


@contextlib.contextmanager
def service(home: Path, *, module: str = "build_service") -> Iterator[Service]:
    """The real server process with a state folder of its own and the default settings."""
    home.mkdir(parents=True)
    env = environment(EKIBEN_HOME=str(home), EKIBEN_PORT="0", EKIBEN_LOG_LEVEL="WARNING")
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", module], cwd=ROOT, env=env, stdout=log, stderr=log)
    try:
        address = home / "url"
        for _ in range(1200):
            if address.exists() and address.read_text().strip():
                break
            if process.poll() is not None:
                raise Failed(f"the service ended: {(home / 'server.log').read_text(errors='replace')[-800:]}")
            time.sleep(0.05)
        else:
            raise Failed("the service did not start within a minute")
        url = address.read_text().strip()
        yield Service(url, int(url.rsplit(":", 1)[1]), process.pid, home)
    finally:
        end(process, 60)
        shutil.rmtree(home, ignore_errors=True)


def cancel_builds(service: Service) -> None:
    """What the upload starts is another figure's matter, and would take the processor from the copy."""
    for _ in range(200):
        running = [one for one in get_json(f"{service.url}/builds")["items"] if one["state"] in ("queued", "running")]
        if not running:
            return
        for one in running:
            with contextlib.suppress(urllib.error.HTTPError):
                post(f"{service.url}/builds/{one['id']}/cancel", **service.proof)
        time.sleep(0.1)
    raise Failed("builds of the uploads could not be cancelled")


class Bench:
    """What figures share. A part is made when a figure first asks for it, and taken away when the run ends."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.kept = WORK / "kept"
        self.scratch = WORK / f"run-{os.getpid()}"
        self._stack = contextlib.ExitStack()
        self._counter = 0
        self._broken: dict[str, Exception] = {}
        self._made: dict[str, Any] = {}

    def __enter__(self) -> Bench:
        for old in WORK.glob("run-*"):  # of a run that was killed
            if not psutil.pid_exists(int(old.name.removeprefix("run-"))):
                remove(old)
        self.kept.mkdir(parents=True, exist_ok=True)
        self.scratch.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        remove(self.scratch)

    def rounds(self, full: int) -> int:
        return 1 if self.quick else full

    def folder(self, name: str) -> Path:
        """A new empty folder's path."""
        self._counter += 1
        return self.scratch / f"{self._counter:03d}-{name}"

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """Made once; a part that could not be made fails at once when it is asked for again."""
        if name in self._broken:
            raise self._broken[name]
        if name not in self._made:
            try:
                self._made[name] = make()
            except Exception as error:
                self._broken[name] = error
                raise
        return self._made[name]

    def enter(self, context: contextlib.AbstractContextManager[Any]) -> Any:
        """Enter a context that ends with the run."""
        return self._stack.enter_context(context)

    def room(self, size: int) -> None:
        """Raises Absent where the disk has no room for `size` bytes and a gibibyte to spare."""
        free = shutil.disk_usage(self.scratch).free
        if free < size + GIB:
            raise Absent(f"the disk has {free // GIB} GiB free, this needs {(size + GIB) // GIB}")

    @functools.cached_property
    def layout(self) -> Path:
        """The base image of both sides as an OCI layout: Debian with Python and pip, as `python:3.11-slim` has them."""
        found = self.part("layout", lambda: base_layout(self.kept))
        assert isinstance(found, Path)
        return found

    @functools.cached_property
    def base(self) -> Path:
        """The base's description, which an installation of ours has once."""

        def make() -> Path:
            argv = [sys.executable, "-m", "builder_image", "base", "import", str(self.layout), "--name", "debian"]
            run(argv, env=environment(EKIBEN_HOME=str(self.scratch)))
            return self.scratch / "bases" / "debian.toml"

        found = self.part("base", make)
        assert isinstance(found, Path)
        return found

    @functools.cached_property
    def kinds(self) -> Path:
        """A copy of the folder of kinds as it was when the run began: the same code in every round."""
        folder = self.scratch / "bentos"
        shutil.copytree(ROOT / "bentos", folder, ignore=shutil.ignore_patterns("__pycache__", "model", "build"))
        return folder

    def models(self, count: int) -> list[Path]:
        """Folders of small LightGBM models, equal but for their weights; each is trained once."""
        return [self.part(f"model-{seed}", functools.partial(self._model, seed)) for seed in range(count)]

    def new_models(self, count: int) -> list[Path]:
        """Such models that nobody has seen before, no earlier run either: no part of them can be anywhere yet."""
        return [self._model(random.randrange(1 << 16, 1 << 31)) for _ in range(count)]

    def _model(self, seed: int) -> Path:
        from bentos.lightgbm import example

        folder = self.scratch / "models" / f"churn-{seed}"
        folder.parent.mkdir(exist_ok=True)
        example.write(folder, seed=seed + 1)
        return folder


def remove(folder: Path) -> None:
    """A folder and whatever is still mounted in it (containers' storage mounts itself)."""
    with contextlib.suppress(OSError):
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            place = line.split()[4]
            if place.startswith(f"{folder}/"):
                subprocess.run(["umount", "--lazy", place], check=False, capture_output=True)
    shutil.rmtree(folder, ignore_errors=True)


_CONTAINERFILE = """FROM oci-debian
ENV PIP_BREAK_SYSTEM_PACKAGES=1
RUN wheel="$(ls /usr/share/python-wheels/pip-*.whl)" && python3 "$wheel/pip" install --no-cache-dir --no-index "$wheel"
"""


def base_layout(kept: Path) -> Path:
    """Made once and kept: Debian by debootstrap (a minute), then Debian's own pip put into it by buildah."""
    layout = kept / "base"
    if (layout / "index.json").exists():
        return layout
    needs("debootstrap", "buildah")
    from benchmarks.make_base import make_base

    say("making the base image (once; kept in benchmarks/scratch/kept)")
    with (kept / "make_base.log").open("wb") as log:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.make_base", str(kept / "debian"), "--cache", str(kept / "packages")],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            timeout=_LONGEST,
        )
    if done.returncode != 0:
        raise Failed(f"make_base failed: {(kept / 'make_base.log').read_text(errors='replace')[-300:].strip()}")
    assert make_base(kept / "debian")
    storage = kept / "storage"
    try:
        env = buildah_environment(storage)
        image, _ = run(["buildah", "pull", "--quiet", f"oci:{kept / 'debian'}"], env=env)
        run(["buildah", "tag", image.strip(), "localhost/oci-debian"], env=env)
        (storage / "Containerfile").write_text(_CONTAINERFILE.replace("oci-debian", "localhost/oci-debian"))
        run(["buildah", "build", "-t", "localhost/base", "-f", storage / "Containerfile", storage], env=env)
        run(["buildah", "push", "localhost/base", f"oci:{kept / 'base.draft'}"], env=env)
    finally:
        remove(storage)
    os.replace(kept / "base.draft", layout)
    return layout


def buildah_environment(storage: Path, insecure: str | None = None) -> dict[str, str]:
    """buildah with a storage of its own, layers cached in it, plain http for one registry."""
    storage.mkdir(parents=True, exist_ok=True)
    config = storage / "storage.conf"
    config.write_text(f'[storage]\ndriver = "overlay"\ngraphroot = "{storage}/graph"\nrunroot = "{storage}/run"\n')
    registries = storage / "registries.conf"
    allowed = "" if insecure is None else f'[[registry]]\nlocation = "{insecure}"\ninsecure = true\n'
    registries.write_text(f"unqualified-search-registries = []\n{allowed}")
    return environment(
        CONTAINERS_STORAGE_CONF=str(config),
        CONTAINERS_REGISTRIES_CONF=str(registries),
        BUILDAH_ISOLATION="chroot",
        BUILDAH_LAYERS="true",
        TMPDIR=str(storage),
    )
