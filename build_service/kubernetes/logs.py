"""Logs of builds: collected from the pods while they run, and kept in chunks in the object store.

    builds/ID/ATTEMPT/log/NNNNNN     lines `TIME STEP TEXT`, as they came
    builds/ID/ATTEMPT/log/end        how it ended: `complete`, or `truncated` when the pod was lost before its last word

Whoever reads, reads the chunks; whichever replica holds the build's lease writes them, and goes on after the last line
of the one before.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from build_service.kubernetes import names, reasons
from build_service.kubernetes.cluster import Cluster, ClusterError, NotThere
from registry.errors import EkibenError
from registry.store import ObjectMissing, ObjectStore

log = structlog.get_logger(__name__)

Object = Mapping[str, Any]

_POLL_SECONDS = 1.0
_CHUNK = 64 * 1024  # bytes of a chunk that is not waited with
_MANY = 60  # chunks; from there on they are made less often
_PATIENT_SECONDS = 5.0
_LEFT_SECONDS = 60.0  # without a question for it an attempt that runs is another replica's
_LONGEST_LINE = 16 * 1024
_TRUNCATED = "The rest of this log is truncated: the build's pod is gone."


@dataclass(eq=False)
class _Collected:
    """One attempt. `step` and `since` say where in the pod's logs we are."""

    build: str
    attempt: int
    chunks: int = 0
    step: int = 0
    since: str = ""
    pod: str = ""  # UID of the one that it is read from
    pending: list[str] = field(default_factory=list)
    size: int = 0
    written: float = field(default_factory=time.monotonic)
    asked: float = field(default_factory=time.monotonic)
    stages: list[dict[str, Any]] = field(default_factory=list)
    ended: bool = False

    @property
    def prefix(self) -> str:
        return f"builds/{self.build}/{self.attempt}/log"


class BuildLogs:
    """`pod_of(build, attempt)` gives the pod of an attempt as it is known; None when there is none (any more).
    `over(build, attempt)`: nothing more comes of the attempt's Job."""

    def __init__(
        self,
        cluster: Cluster,
        namespace: str,
        store: ObjectStore,
        pod_of: Callable[[str, int], Object | None],
        over: Callable[[str, int], bool],
        wake: Callable[[], None],
    ) -> None:
        self._cluster, self._namespace, self._store = cluster, namespace, store
        self._pod_of, self._over, self._wake = pod_of, over, wake
        self._lock = threading.Lock()
        self._open: dict[tuple[str, int], _Collected] = {}
        self._stop, self._look = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="build-logs", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._look.set()
        if self._thread.ident is not None:
            self._thread.join(10)

    def collect(self, build: str, attempt: int) -> None:
        """From now on, until it ends or nobody asks for it any more."""
        with self._lock:
            if (found := self._open.get((build, attempt))) is not None:
                found.asked = time.monotonic()
            else:
                self._open[build, attempt] = _Collected(build, attempt, chunks=-1)
                self._look.set()

    def restart(self, build: str, attempt: int) -> None:
        """The attempt begins: what is kept under its number or a later one is of an earlier series of attempts."""
        with self._lock:
            for key in [key for key in self._open if key[0] == build and key[1] >= attempt]:
                del self._open[key]
        for stale in {number for number in self._attempts(build) if number >= attempt}:
            self._store.delete(f"builds/{build}/{stale}")

    def stages(self, build: str, attempt: int) -> list[dict[str, Any]]:
        """What the steps said that they are doing."""
        with self._lock:
            found = self._open.get((build, attempt))
            return list(found.stages) if found else []

    def forget(self, build: str, attempt: int) -> None:
        """Nobody asks for its stages any more; its log is collected to its end all the same."""
        with self._lock:
            found = self._open.get((build, attempt))
            if found is not None and found.ended:
                del self._open[build, attempt]

    def read(self, build: str, *, follow: bool) -> Iterator[str]:
        """Lines of the newest attempt. An empty string: nothing at the moment."""
        attempt, number, step = 0, 0, ""
        while True:
            if attempt == 0:
                attempt = max(self._attempts(build), default=0)
            ended = attempt > 0 and self._exists(f"builds/{build}/{attempt}/log/end")  # asked before reading
            try:
                if attempt == 0:
                    raise ObjectMissing(build)
                with self._store.open(f"builds/{build}/{attempt}/log/{number:06d}") as stream:
                    text = stream.read().decode(errors="replace")
            except ObjectMissing:
                if ended or not follow:
                    return
                yield ""
                continue
            number += 1
            for line in text.splitlines():
                _, now_in, said = (*line.split(" ", 2), "", "")[:3]
                if now_in != step:
                    step = now_in
                    yield f"==> {step} <=="
                if said:
                    yield said

    def _attempts(self, build: str) -> list[int]:
        found = [info.key.split("/")[2] for info in self._store.list(f"builds/{build}/")]
        return [int(text) for text in found if text.isdigit()]

    def _exists(self, key: str) -> bool:
        try:
            self._store.open(key).close()
        except ObjectMissing:
            return False
        return True

    # --- the collector's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                for each in [each for each in self._open.values() if self._is_left(each)]:
                    del self._open[each.build, each.attempt]
                found = [each for each in self._open.values() if not each.ended]
            for each in found:
                try:
                    self._step(each)
                except (EkibenError, OSError) as error:  # the store or the cluster is away: the lines are still there
                    log.info("the log of a build waits", build=each.build, error=str(error)[:300])
                except Exception:
                    log.exception("the log of a build stumbled", build=each.build)
            self._look.wait(_POLL_SECONDS if found else None)
            self._look.clear()

    def _is_left(self, each: _Collected) -> bool:
        silent = time.monotonic() - each.asked > _LEFT_SECONDS
        return silent and not each.ended and not self._over(each.build, each.attempt)

    def _step(self, each: _Collected) -> None:
        if each.chunks < 0:
            self._resume(each)
        over = self._over(each.build, each.attempt)  # asked before reading
        pod = self._pod_of(each.build, each.attempt)
        if pod is not None:
            if _is_another(pod, each):  # the cluster pushed the first one away, and the Job made another
                each.step, each.since = 0, ""
            each.pod = pod["metadata"]["uid"]
            self._read_pod(each, pod)
        failed = pod is not None and _failed(pod) and (over or not reasons.disrupted(pod))
        done = each.step >= len(names.STEPS) or failed
        if not done and over and pod is None:
            self._take(each, each.since or "-", names.STEPS[min(each.step, 2)], _TRUNCATED)
            done = True
        patience = _POLL_SECONDS if each.chunks < _MANY else _PATIENT_SECONDS
        if each.pending and (done or each.size > _CHUNK or time.monotonic() - each.written >= patience):
            self._write(each)
        if done:
            lost = not (each.step >= len(names.STEPS) or failed)
            self._put(f"{each.prefix}/end", b"truncated" if lost else b"complete")
            with self._lock:
                each.ended = True
                if over:
                    self._open.pop((each.build, each.attempt), None)

    def _read_pod(self, each: _Collected, pod: Object) -> None:
        statuses = {
            status["name"]: status.get("state", {})
            for part in ("initContainerStatuses", "containerStatuses")
            for status in pod["status"].get(part) or ()
        }
        while each.step < len(names.STEPS):
            name = names.STEPS[each.step]
            if not _has_step(pod, name):
                each.step += 1
                continue
            state = statuses.get(name, {})
            if "running" not in state and "terminated" not in state:
                return
            try:
                lines = self._cluster.log_lines(self._namespace, pod["metadata"]["name"], name, since=each.since)
                for stamp, text in lines:
                    self._take(each, stamp, name, text)
                    each.since = stamp
                    if each.size > _CHUNK:
                        self._write(each)
            except NotThere:
                return
            except ClusterError as error:
                if error.answered != 400:  # its container is being started, or is gone with its node
                    raise
                return
            if "terminated" not in state:
                return
            each.step, each.since = each.step + 1, ""

    def _take(self, each: _Collected, stamp: str, step: str, text: str) -> None:
        text = text[:_LONGEST_LINE]
        line = f"{stamp} {step} {text}\n"
        each.pending.append(line)
        each.size += len(line)
        if text.startswith('{"stage"'):
            try:
                said = json.loads(text)
            except ValueError:
                return
            if isinstance(said, dict) and isinstance(said.get("stage"), str):
                with self._lock:
                    each.stages.append(said)
                self._wake()

    def _write(self, each: _Collected) -> None:
        self._put(f"{each.prefix}/{each.chunks:06d}", "".join(each.pending).encode())
        each.chunks += 1
        each.pending, each.size, each.written = [], 0, time.monotonic()

    def _resume(self, each: _Collected) -> None:
        """Where the replica that collected before stopped."""
        keys = [info.key for info in self._store.list(f"{each.prefix}/")]
        chunks = sorted(key for key in keys if key.rpartition("/")[2].isdigit())
        if f"{each.prefix}/end" in keys:
            each.step = len(names.STEPS)
        elif chunks:
            with self._store.open(chunks[-1]) as stream:
                stamp, step, _ = (*stream.read().decode(errors="replace").splitlines()[-1].split(" ", 2), "", "")[:3]
            each.step, each.since = names.STEPS.index(step), stamp
        each.chunks = len(chunks)

    def _put(self, key: str, data: bytes) -> None:
        writer = self._store.writer(key)
        try:
            writer.write(data)
            writer.commit()
        finally:
            writer.abort()


def _has_step(pod: Object, name: str) -> bool:
    """A build that has nothing to import is made without the step that would."""
    return any(each["name"] == name for part in ("initContainers", "containers") for each in pod["spec"].get(part, ()))


def _is_another(pod: Object, each: _Collected) -> bool:
    """Not the pod whose lines are there. A replica that goes on with another's work knows that by the time only."""
    if each.pod:
        return bool(each.pod != pod["metadata"]["uid"])
    return each.since[:19] < str(pod["metadata"]["creationTimestamp"])[:19] if each.since else False


def _failed(pod: Object) -> bool:
    """The pod ended before its last step, and says so itself."""
    return bool(pod["status"].get("phase") == "Failed")
