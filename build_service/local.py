"""The local platform: builds and serving as processes on this machine, replaced behind the embedded router.

A revision's processes start beside those of the revision that has the traffic. Each verifies its files, loads its
model and predicts its golden sample before it answers `/readyz`; when all are ready, the router's table moves to them
in one step, and the old ones finish what they have and end.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from build_service import processes
from build_service.launch import DISK_EVERY, Bounded, Launcher, Serving, out_of_memory
from build_service.logs import followed, lines, printed
from build_service.platform import BuildOrder, BuildStatus, Failure, InUse, Observed, RevisionOrder
from build_service.quantities import parse_memory
from build_service.routes import RouteTable, Upstream
from build_service.settings import MIB, Settings
from build_service.sockets import SocketFolder, UnixConnection
from registry.errors import UserError
from registry.kinds import Kinds
from registry.store import ObjectStore

log = structlog.get_logger(__name__)

_TICK_BUSY, _TICK_IDLE = 0.05, 0.5  # seconds between two looks at the processes
_RESTART_FIRST, _RESTART_LONGEST = 0.5, 30.0  # seconds before a process that died is started again
_HEALTHY_SECONDS = 60.0  # a process that was ready for this long has nothing to do with the crashes before it
_TERM_SECONDS = 10.0  # time between SIGTERM and SIGKILL
_PROBE_SECONDS = 1.0  # that a process may be silent when it is asked whether it is ready
_METADATA_SECONDS = 5.0
_PROBES_AT_ONCE = 16
_STARTING = max(2, os.cpu_count() or 1)  # processes of a deployment that start at once: each takes a core for a while


@dataclass(eq=False)
class _Build:
    order: BuildOrder
    process: Bounded
    folder: Path
    started: float

    @property
    def child(self) -> processes.Child:
        return self.process.child


@dataclass(eq=False)
class _Replica:
    order: RevisionOrder
    process: Serving
    upstream: Upstream
    started: float
    probed: bool = False  # at this moment
    ready: bool = False
    ready_since: float = 0.0
    draining_since: float | None = None
    terminated: float | None = None

    @property
    def child(self) -> processes.Child:
        return self.process.child

    @property
    def log(self) -> Path:
        return self.process.log


@dataclass(eq=False)
class _Served:
    """A deployment's processes: those of the revision that has the traffic, and those on their way."""

    wanted: RevisionOrder
    live: RevisionOrder | None = None
    checked: dict[str, Any] | None = None
    replicas: list[_Replica] = field(default_factory=list)
    failures: dict[int, Failure] = field(default_factory=dict)
    restart_at: float = 0.0
    restart_wait: float = _RESTART_FIRST
    crashes: int = 0
    crash: Failure | None = None


class LocalPlatform:
    autoscales = False

    def __init__(
        self,
        settings: Settings,
        store: ObjectStore,
        kinds: Kinds,
        routes: RouteTable,
        wake: Callable[[], None],
        outer: Mapping[str, str],
    ) -> None:
        """`outer`: the environment that this service was started in."""
        self._settings, self._store, self._routes, self._wake = settings, store, routes, wake
        self._root = settings.root
        self._records = self._root / "processes"
        self._lock = threading.RLock()
        self._builds: dict[tuple[str, int], _Build] = {}
        self._served: dict[str, _Served] = {}
        self._ending: list[_Replica] = []
        self._probes = ThreadPoolExecutor(_PROBES_AT_ONCE, "probe")
        self._stop = threading.Event()
        self._wake_watch = threading.Event()
        ended = processes.sweep(self._records)
        if ended:
            log.warning("ended processes of an earlier service", count=ended)
        self._sockets = SocketFolder(self._root)
        self.launcher = Launcher(settings, kinds, outer, self._records)
        self.launcher.clear()
        self._serving_path = self._copy_serving()
        self._thread = threading.Thread(target=self._watch, name="local-platform", daemon=True)
        self._thread.start()
        self._disks = threading.Thread(target=self._measure_disks, name="local-disks", daemon=True)
        self._disks.start()

    # --- builds -----------------------------------------------------------------------------------------------------

    def submit(self, order: BuildOrder) -> None:
        self._model_folder(order.version.location)  # from a bucket it may take long, which holds up nobody here
        with self._lock:
            key = (order.id, order.attempt)
            if key in self._builds:
                return
            folder = self._root / "builds" / order.id
            shutil.rmtree(folder / "work", ignore_errors=True)
            (folder / "work").mkdir(parents=True)
            for name in ("result.json", "progress.jsonl"):
                (folder / name).unlink(missing_ok=True)
            spec = folder / "spec.json"
            spec.write_text(json.dumps(self._spec(order, folder), indent=1))
            self._builds[key] = _Build(order, self.launcher.build(order, spec, folder), folder, time.monotonic())

    def build_status(self, order_id: str, attempt: int) -> BuildStatus:
        with self._lock:
            running = self._builds.get((order_id, attempt))
            if running is None:
                return BuildStatus("missing")
            code = running.child.poll()
        stages = _progress(running.folder / "progress.jsonl")
        stage = stages[-1]["stage"] if stages else None
        if code is None:
            return BuildStatus("running", stage, stages)
        result = _json(running.folder / "result.json")
        running.process.release()
        if code == 0 and result is not None and "error" not in result:
            return BuildStatus("succeeded", stage, result.get("stages", stages), result)
        failure = running.process.killed
        if failure is None and running.process.out_of_memory:
            failure = _build_out_of_memory(self._settings)
        return BuildStatus("failed", stage, stages, None, failure or _build_failure(code, result, stage))

    def cancel(self, order_id: str, attempt: int) -> None:
        with self._lock:
            running = self._builds.pop((order_id, attempt), None)
        if running is not None:
            running.child.kill()
            running.process.release()

    def holds(self, result: dict[str, Any]) -> bool:
        if result.get("environment") is None or result.get("bento") is None:  # an image was all that was wanted
            return False
        python = Path(result["environment"]["dir"], "bin", "python")
        return python.exists() and Path(result["bento"]["dir"], "bento.yaml").exists()

    def in_use(self) -> InUse:
        """Of processes that are still draining too."""
        with self._lock:
            replicas = [*self._ending, *(replica for served in self._served.values() for replica in served.replicas)]
            built = [replica.order.build for replica in replicas]
            return InUse(
                frozenset(order_id for order_id, _ in self._builds),
                frozenset(Path(each[what]["dir"]).name for each in built for what in ("environment", "bento")),
                frozenset(replica.order.version.location for replica in replicas),
            )

    def build_log(self, order_id: str, *, follow: bool) -> Iterator[str]:
        def finished() -> bool:
            with self._lock:
                return not any(key[0] == order_id and build.child.running for key, build in self._builds.items())

        return lines(self._root / "builds" / order_id / "log.txt", follow=follow, finished=finished)

    def _spec(self, order: BuildOrder, folder: Path) -> dict[str, Any]:
        version, settings = order.version, self._settings
        return {
            "schema": "ekiben.build.v1",
            "work": str(folder / "work"),
            "result": str(folder / "result.json"),
            "model": {"dir": str(self._model_folder(version.location))},
            "kind": {"name": version.kind, "dir": str(settings.kinds / version.kind)},
            "serving": str(settings.kinds / "serving"),
            "cache": {"environments": str(self._root / "environments"), "bentos": str(self._root / "bentos")},
            "allow_code": order.allow_code,
            "allowed_packages": list(order.allowed_packages),
            "lock": version.lock,
            "image": order.image,
        }

    # --- serving ----------------------------------------------------------------------------------------------------

    def check(self, deployment: str, resources: dict[str, str], replicas: int, strategy: str) -> None:
        if int(resources.get("gpu", 0)):
            raise UserError(
                "insufficient_gpu",
                f"0 free of {resources['gpu']}: the local platform hands out no GPUs.",
                field="resources.gpu",
                hint="Ask for none; a process on this machine may use what the machine has.",
                status=409,
            )

    def apply(self, order: RevisionOrder) -> None:
        with self._lock:
            served = self._served.get(order.deployment)
            if served is None:
                served = self._served[order.deployment] = _Served(order)
            if served.wanted == order:
                return
            if served.wanted.revision != order.revision:
                served.restart_at, served.restart_wait = 0.0, _RESTART_FIRST
                served.failures.pop(order.revision, None)
            served.wanted = order
            if served.live is not None and served.live.revision == order.revision:
                served.live = order
            for replica in served.replicas:  # bounds that were changed hold for what runs already
                if replica.order.revision == order.revision:
                    replica.order = order
        self._wake_watch.set()

    def ready(self, deployment: str) -> int:
        return self.observe(deployment).ready

    def observe(self, deployment: str) -> Observed:
        with self._lock:
            served = self._served.get(deployment)
            return Observed() if served is None else _observed(served)

    def observe_all(self) -> dict[str, Observed]:
        with self._lock:
            return {name: _observed(served) for name, served in self._served.items()}

    def delete(self, deployment: str) -> None:
        with self._lock:
            served = self._served.pop(deployment, None)
            self._routes.remove(deployment)
            if served is not None:
                for replica in served.replicas:
                    self._drain(replica)
        self._wake_watch.set()

    def serving_log(self, deployment: str, *, follow: bool, ended: Callable[[], bool]) -> Iterator[str]:
        folder = self._root / "deployments" / deployment

        def files() -> list[Path]:
            return list(folder.glob("*.log"))

        def written() -> set[Path]:
            with self._lock:
                served = self._served.get(deployment)
                replicas = [*(served.replicas if served else ()), *self._ending]
                return {replica.log for replica in replicas if replica.order.deployment == deployment}

        if follow:
            return followed(files, written, _log_title, ended=ended)
        newest = sorted(files())[-1:]
        return printed(sorted(written() & set(files())) or newest, _log_title)

    def close(self) -> None:
        """End every process: serving ones get a moment to finish their requests."""
        self._stop.set()
        self._wake_watch.set()
        self._thread.join()
        self._disks.join()
        with self._lock:
            replicas = self._ending + [replica for served in self._served.values() for replica in served.replicas]
            for build in self._builds.values():
                if build.child.poll() is None:
                    build.child.kill()
            for replica in replicas:
                replica.child.terminate()
            deadline = time.monotonic() + _TERM_SECONDS
            for replica in replicas:
                while replica.child.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.02)
                if replica.child.poll() is None:
                    replica.child.kill()
                replica.process.release()
        self.launcher.close()
        self._probes.shutdown(cancel_futures=True)  # whom they ask has ended, so none of them waits
        self._sockets.close()

    # --- the watch: everything below runs in its thread, under the lock ---------------------------------------------

    def _watch(self) -> None:
        while not self._stop.is_set():
            busy = False
            try:
                for replica in self._starting():
                    busy = True
                    self._probe_aside(replica)
                with self._lock:
                    self._bound_builds()
                    for served in list(self._served.values()):
                        self._step(served)
                    busy = self._end_drained() or busy
                    busy = busy or any(build.child.running for build in self._builds.values())
            except Exception:
                log.exception("the local platform's watch stumbled")
            self._wake_watch.wait(_TICK_BUSY if busy else _TICK_IDLE)
            self._wake_watch.clear()

    def _measure_disks(self) -> None:
        """In a thread of its own and without the lock, as a folder of many files takes long to look at."""
        while not self._stop.wait(DISK_EVERY):
            with self._lock:
                running: list[Bounded] = [build.process for build in self._builds.values()]
                running += [replica.process for served in self._served.values() for replica in served.replicas]
            for process in running:
                if self._stop.is_set():
                    return
                if process.child.process.returncode is None:
                    process.measure_disk()

    def _starting(self) -> list[_Replica]:
        with self._lock:
            return [replica for served in self._served.values() for replica in served.replicas if not replica.ready]

    def _probe_aside(self, replica: _Replica) -> None:
        """Ask in a thread of its own, so that a process that hangs holds up no other; one question at a time."""
        if not replica.probed:
            replica.probed = True
            self._probes.submit(self._probe, replica)

    def _probe(self, replica: _Replica) -> None:
        try:
            if not _is_ready(replica.upstream):
                return
            checked = _metadata(replica.upstream).get("checked")
            self.launcher.loaded(replica.process, replica.order)
            with self._lock:
                replica.ready, replica.ready_since = True, time.monotonic()
                served = self._served.get(replica.order.deployment)
                if served is not None and replica.order.revision == served.wanted.revision:
                    served.checked = checked
            self._wake_watch.set()
        finally:
            replica.probed = False

    def _step(self, served: _Served) -> None:
        wanted = served.wanted
        self._reap(served)
        # Processes of revisions that are neither wanted nor live are stopped.
        live = served.live.revision if served.live else None
        for replica in list(served.replicas):
            if replica.order.revision not in (wanted.revision, live):
                self._retire(served, replica)
        replaces = wanted.strategy == "replace" and live is not None and live != wanted.revision
        if replaces and wanted.revision not in served.failures:
            for replica in [r for r in served.replicas if r.order.revision == live]:
                self._retire(served, replica)
            self._publish(served)
            if any(r.order.deployment == wanted.deployment for r in self._ending):
                return  # the memory is not free yet
        mine = [replica for replica in served.replicas if replica.order.revision == wanted.revision]
        if wanted.revision not in served.failures and time.monotonic() >= served.restart_at:
            try:
                starting = sum(not replica.ready for replica in mine)
                for _ in range(min(wanted.replicas - len(mine), _STARTING - starting)):
                    mine.append(self._launch(served, wanted))
            except OSError as error:
                log.exception("a serving process could not be started", deployment=wanted.deployment)
                failure = Failure(
                    "start_failed",
                    f"The process of the model could not be started: {error}.",
                    hint="Look at the room on the disk of the state folder.",
                    user=False,
                )
                if wanted.proven:
                    self._crashed(served, failure)
                else:
                    served.failures[wanted.revision] = failure
                self._wake()
        ready = [replica for replica in mine if replica.ready]
        if len(ready) > wanted.replicas:
            for replica in ready[wanted.replicas :]:
                self._retire(served, replica)
            ready = ready[: wanted.replicas]
        if live != wanted.revision and len(ready) >= wanted.replicas:
            served.live, live = wanted, wanted.revision
            served.restart_wait = _RESTART_FIRST
            log.info("traffic moved", deployment=wanted.deployment, revision=wanted.revision)
            self._wake()
        self._publish(served)
        if live == wanted.revision:
            for replica in [r for r in served.replicas if r.order.revision != live]:
                self._retire(served, replica)

    def _publish(self, served: _Served) -> None:
        live = served.live
        if live is None:
            return
        self._routes.set(
            live.deployment,
            [
                replica.upstream
                for replica in served.replicas
                if replica.ready and replica.order.revision == live.revision
            ],
        )

    def _launch(self, served: _Served, order: RevisionOrder) -> _Replica:
        # Bound here, so that the child needs no right to the folder; it listens once it is ready.
        listening, path = self._sockets.bind()
        with listening:
            process = self._serve(order, listening.fileno())
        replica = _Replica(order, process, Upstream(order.revision, socket=path), time.monotonic())
        served.replicas.append(replica)
        return replica

    def _serve(self, order: RevisionOrder, listening: int) -> Serving:
        version, settings = order.version, self._settings
        environment, bento = Path(order.build["environment"]["dir"]), Path(order.build["bento"]["dir"])
        model, folder = self._model_folder(version.location), settings.kind_folders.get(version.kind)
        variables = {
            "BENTOML_DO_NOT_TRACK": "True",
            "PYTHONPATH": str(self._serving_path),
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "EKIBEN_BENTO": str(bento),
            "EKIBEN_MODEL_DIR": str(model),
            "EKIBEN_MODEL_DIGEST": version.digest,
            "EKIBEN_MODEL_NAME": version.name,
            "EKIBEN_MODEL_VERSION": str(version.number),
            "EKIBEN_MODEL_METADATA": json.dumps({"labels": version.labels}),
            "EKIBEN_URL_PREFIX": f"/inference/{order.deployment}",
            "EKIBEN_SOCKET_FD": str(listening),
            "EKIBEN_MAX_BODY_BYTES": str(settings.inference_body),
            "EKIBEN_REQUEST_SECONDS": str(settings.inference_seconds),
            "EKIBEN_PASS_HEADERS": ",".join(settings.pass_headers),
            **({"EKIBEN_FOLDER": folder} if folder else {}),
        }
        read = [environment, bento, model, self._serving_path, *([Path(folder)] if folder else [])]
        return self.launcher.serve(order, variables, read, [listening])

    def _reap(self, served: _Served) -> None:
        """Processes that ended by themselves: a failure of a revision on its way, or a crash to recover from."""
        live = served.live.revision if served.live else None
        for replica in list(served.replicas):
            self.launcher.bound_serving(replica.process, replica.order)
            code = replica.child.poll()
            if code is None:
                continue
            served.replicas.remove(replica)
            self._sockets.remove(replica.upstream)
            failure = replica.process.killed or _serving_failure(code, replica.process)
            replica.process.release()
            log.warning(
                "serving process ended",
                deployment=replica.order.deployment,
                revision=replica.order.revision,
                exit_code=code,
                code=failure.code,
                reason=failure.message,
            )
            if replica.order.proven or replica.order.revision == live or replica.ready:
                if replica.ready and time.monotonic() - replica.ready_since > _HEALTHY_SECONDS:
                    served.restart_wait = _RESTART_FIRST
                self._crashed(served, failure)
            else:
                served.failures[replica.order.revision] = failure
            self._wake()

    @staticmethod
    def _crashed(served: _Served, failure: Failure) -> None:
        served.crashes, served.crash = served.crashes + 1, failure
        served.restart_at = time.monotonic() + served.restart_wait
        served.restart_wait = min(served.restart_wait * 2, _RESTART_LONGEST)

    def _bound_builds(self) -> None:
        for build in self._builds.values():
            process, settings = build.process, self._settings
            if not process.child.running or process.killed is not None:
                continue
            memory = process.due()
            if time.monotonic() - build.started > settings.build_seconds:
                process.killed = Failure(
                    "build_timeout",
                    f"The build took longer than {settings.build_seconds:.0f} s.",
                    hint="Raise EKIBEN_BUILD_SECONDS, or look at the build's log for what takes so long.",
                )
            elif memory and process.child.memory() > settings.build_memory:
                process.killed = _build_out_of_memory(settings)
            elif process.disk > parse_memory(settings.build_disk) + 2 * build.order.version.size:
                process.killed = Failure(
                    "build_out_of_disk",
                    f"The build's working folder took more than {settings.build_disk}, and its model's files.",
                    hint="Raise EKIBEN_BUILD_DISK.",
                )
            if process.killed is not None:
                process.child.kill()
                self._wake()

    def _retire(self, served: _Served, replica: _Replica) -> None:
        served.replicas.remove(replica)
        self._drain(replica)

    def _drain(self, replica: _Replica) -> None:
        replica.draining_since = time.monotonic()
        self._ending.append(replica)

    def _end_drained(self) -> bool:
        for replica in list(self._ending):
            assert replica.draining_since is not None
            waited = time.monotonic() - replica.draining_since
            if replica.child.poll() is not None:
                replica.process.release()
                self._ending.remove(replica)
                self._sockets.remove(replica.upstream)
            elif replica.terminated is None:
                # The router may have taken the upstream a moment before the table moved: one tick passes first.
                if waited > _TICK_BUSY and (replica.upstream.in_flight == 0 or waited > self._settings.drain_seconds):
                    replica.child.terminate()
                    replica.terminated = time.monotonic()
            elif time.monotonic() - replica.terminated > _TERM_SECONDS:
                replica.child.kill()
        return bool(self._ending)

    def _model_folder(self, location: str) -> Path:
        return self._store.checkout(location, self._root / "checkouts" / location)

    def _copy_serving(self) -> Path:
        """A folder that holds `bentos.serving` and nothing else of this installation, named by its content."""
        kinds = self._settings.kinds
        sources = [kinds / "__init__.py", *sorted((kinds / "serving").rglob("*"))]
        files = [path for path in sources if path.is_file() and path.suffix != ".pyc"]
        digest = hashlib.sha256()
        for path in files:
            digest.update(f"{path.relative_to(kinds)}\0".encode() + path.read_bytes() + b"\0")
        target = self._root / "serving" / digest.hexdigest()[:16]
        if not target.exists():
            temporary = target.with_name(f"{target.name}.{os.getpid()}")
            for path in files:
                copy = temporary / "bentos" / path.relative_to(kinds)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
            with contextlib.suppress(OSError):
                temporary.rename(target)
            shutil.rmtree(temporary, ignore_errors=True)
        return target


def _observed(served: _Served) -> Observed:
    live = served.live.revision if served.live else None
    ready = sum(1 for replica in served.replicas if replica.ready and replica.order.revision == live)
    failure = served.failures.get(served.wanted.revision)
    return Observed(
        live,
        ready,
        served.checked,
        served.wanted.revision if failure is not None else None,
        failure,
        served.crashes,
        served.crash,
        served.wanted.terms,
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _log_title(path: Path) -> str:
    """Which process a log is of, for its reader: the file's name is its revision and when it started."""
    revision, _, started = path.stem.partition("-")
    time_of_day = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(int(started) / 1e9))
    return f"==> revision {int(revision)}, process started {time_of_day} <=="


def _progress(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text()
    except OSError:
        return []
    stages = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            stages.append(json.loads(line))
    return stages


def _is_ready(upstream: Upstream) -> bool:
    return _asked(upstream, "/readyz", _PROBE_SECONDS) is not None


def _metadata(upstream: Upstream) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        value = json.loads(_asked(upstream, "/metadata", _METADATA_SECONDS) or b"")
        return value if isinstance(value, dict) else {}
    return {}


def _asked(upstream: Upstream, path: str, seconds: float) -> bytes | None:
    """What a serving process answers; None unless it answers 200."""
    assert upstream.socket is not None, "processes of this platform listen on Unix sockets"
    connection = UnixConnection(upstream.socket, seconds)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.read(1 << 20) if response.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _build_failure(code: int, result: Any, stage: str | None) -> Failure:
    error = (result or {}).get("error")
    if isinstance(error, dict):
        return Failure(
            str(error.get("code", "build_failed")),
            str(error.get("message", "The build failed.")),
            error.get("hint"),
            error.get("stage", stage),
            user=code == 2,
        )
    return Failure(
        "build_crashed",
        f"The build ended without a result (exit code {code}) in stage {stage or 'start'}.",
        hint="The build's log has its last words.",
        stage=stage,
        user=False,
    )


def _build_out_of_memory(settings: Settings) -> Failure:
    return Failure(
        "build_out_of_memory",
        f"The build used more than {settings.build_memory // MIB} MiB of memory.",
        hint="Raise EKIBEN_BUILD_MEMORY.",
    )


def _serving_failure(code: int, process: Serving) -> Failure:
    if process.out_of_memory:
        return out_of_memory(process.limit)
    words = process.words()
    if isinstance(words, dict) and "message" in words:
        return Failure(str(words.get("code", "serving_failed")), str(words["message"]), words.get("hint"))
    tail = ""
    with contextlib.suppress(OSError):
        tail = "\n".join(process.log.read_text(errors="replace").splitlines()[-5:])
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return Failure("serving_crashed", f"The model's process {how}. Its last words: {tail or '(none)'}")
