"""Deletes what nobody needs any more, by reachability: what a live or kept revision needs is never deleted.

SQL says what is needed: by the revisions that a roll-back can return to, by builds that have not ended, and (for logs)
by versions that exist. The rest goes after a time: caches that only make builds fast after long, everything else soon.
A folder is renamed while nobody can begin to need it, and deleted afterwards; so whatever ends this process in between,
nothing half deleted has a name that anybody looks for, and the next sweep goes on with it.

Every step is idempotent, so several services on one database may sweep at once.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from build_service import metrics, state, storage
from build_service.platform import InUse
from build_service.settings import Settings
from registry import shelf
from registry.database import Database
from registry.store import ObjectStore

log = structlog.get_logger(__name__)

_NO_RESULTS = ("locks", "layers")  # in the folder of environments: resolutions, which stay, and image layers
_LAYERS_LOCK = "layers"  # as builder_image/staging.py takes it


@dataclass(frozen=True)
class _Shelf:
    """A folder of folders by name, and which of them stay."""

    place: Path
    stay: frozenset[str]
    before: float  # what was last wanted earlier may go
    made_by_builds: bool = False  # made and found under locks of their own
    record: str = ""  # how the name of a folder's file beside it goes on

    def names(self) -> Iterator[str]:
        with suppress(FileNotFoundError):
            for path in sorted(self.place.iterdir()):
                beginning = not self.made_by_builds and "." in path.name  # a version that is being fetched
                if not path.name.startswith(".") and path.name not in _NO_RESULTS and not beginning:
                    yield path.name.removesuffix(self.record)

    def old(self) -> list[str]:
        """Names that may go. What stays is marked, so that its time begins when it is needed no more."""
        found = []
        for name in dict.fromkeys(self.names()):
            if name in self.stay:
                shelf.mark(self.place / name)
            elif self._is_old(name):
                found.append(name)
        return found

    def rest(self) -> list[Path]:
        """What a sweep or a build that was killed left behind."""
        return [*shelf.rest(self.place), *(shelf.unfinished(self.place) if self.made_by_builds else ())]

    def take(self, name: str) -> Path | None:
        if not self.made_by_builds:
            return shelf.rename(self.place, name, before=self.before)
        beside = name + self.record if self.record else None
        return shelf.remove(self.place, name, before=self.before, beside=beside)

    def _is_old(self, name: str) -> bool:
        for path in (self.place / name, self.place / (name + self.record)):
            with suppress(FileNotFoundError):
                return path.stat().st_mtime < self.before
        return False


class Sweeper:
    """Sweeps at start and then every `sweep_seconds`, until it is closed."""

    def __init__(self, settings: Settings, database: Database, store: ObjectStore, in_use: Callable[[], InUse]) -> None:
        self._settings, self._database, self._store, self._in_use = settings, database, store, in_use
        self._root = settings.root
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.sweep()
                metrics.SWEEPS.labels("done").inc()
            except Exception:
                metrics.SWEEPS.labels("failed").inc()
                log.exception("the sweep of what nobody needs stumbled; it tries again")
            self._stop.wait(self._settings.sweep_seconds)

    def sweep(self) -> int:
        """Look once; the bytes that were freed."""
        now = self._now()
        with self._database.write() as connection:
            dropped = state.drop_revisions(connection, self._settings.keep_revisions)
        shelves = self._shelves(now)
        freed = self._delete([path for each in shelves for path in each.rest()])
        old = [(at, name) for at, each in enumerate(shelves) for name in each.old()]
        taken = self._take(old, now)
        freed += self._delete(taken)
        freed += self._layers(now)
        freed += self._objects()
        metrics.FREED_BYTES.inc(freed)
        if dropped or freed or taken:
            log.info("swept", revisions=dropped, folders=len(taken), freed_bytes=freed)
        return freed

    def _now(self) -> float:
        """By the clock that stamps the files, which may be another machine's."""
        stamp = self._root / "swept"
        stamp.touch()
        return stamp.stat().st_mtime

    def _shelves(self, now: float) -> tuple[_Shelf, ...]:
        """With what is needed as of this moment."""
        with self._database.read() as connection:
            needed = state.needed(connection)
        used = self._in_use()
        built = frozenset(
            Path(result[what]["dir"]).name
            for result in needed.results
            for what in ("environment", "bento")
            if result.get(what)
        )
        soon, late = self._limits(now, used)
        locations = {location.rpartition("/")[2] for location in needed.locations | used.locations}
        return (
            _Shelf(self._root / "environments", built | used.folders, late, made_by_builds=True),
            _Shelf(self._root / "bentos", built | used.folders, late, made_by_builds=True, record=".json"),
            _Shelf(self._root / "checkouts" / "models", frozenset(locations), soon),
            _Shelf(self._root / "builds", needed.logs | used.builds, soon),
        )

    def _limits(self, now: float, used: InUse) -> tuple[float, float]:
        """(the last use before which a thing goes, the one before which a cache goes).

        A build that runs has marked what it found; whatever was wanted since it began stays until it has ended.
        """
        for build in used.builds:
            with suppress(FileNotFoundError):
                now = min(now, (self._root / "builds" / build / "spec.json").stat().st_mtime)
        soon = now - self._settings.sweep_grace_seconds
        return soon, min(soon, now - self._settings.keep_cache_seconds)

    def _take(self, old: list[tuple[int, str]], now: float) -> list[Path]:
        """Rename what is still not needed. No revision and no build can be made meanwhile, and one that is made next
        finds it gone, and has it made again."""
        if not old:
            return []
        with self._database.write():
            shelves = self._shelves(now)
            taken = [shelves[at].take(name) for at, name in old if name not in shelves[at].stay]
        return [path for path in taken if path is not None]

    def _delete(self, paths: list[Path]) -> int:
        freed = 0
        for path in paths:
            if self._stop.is_set():  # the next service goes on
                break
            freed += shelf.delete(path)
        return freed

    def _layers(self, now: float) -> int:
        """Layers of images: no deployment on this machine needs them, builds find them by their records."""
        folder = self._root / "environments" / "layers"
        if not folder.is_dir():
            return 0
        freed, kept = 0, set()
        with shelf.locked(folder, _LAYERS_LOCK, wait=False) as alone:
            if not alone:
                return 0
            _, before = self._limits(now, self._in_use())
            for record in folder.glob("*.json"):
                if record.stat().st_mtime < before:
                    freed += _unlink(record)
                else:
                    kept.add(_digest(record))
            for file in (*folder.glob("*.tmp"), *(folder / "blobs").glob("*")):
                if file.name not in kept and file.stat().st_mtime < before:
                    freed += _unlink(file)
        return freed

    def _objects(self) -> int:
        """Uploads that stand still; and what builds in a cluster left in the bucket, as their folders here."""
        storage.sweep(self._settings, self._database, self._store, starting=False)
        if self._settings.platform == "local":
            return 0
        with self._database.read() as connection:
            unneeded = state.needed(connection).unneeded_logs
        sizes: dict[str, int] = {}
        newest: dict[str, float] = {}
        for info in self._store.list("builds/"):
            build = info.key.split("/")[1]
            if build in unneeded:
                sizes[build] = sizes.get(build, 0) + info.size
                newest[build] = max(newest.get(build, 0.0), info.modified)
        old = [build for build, time_of in newest.items() if time_of < time.time() - self._settings.sweep_grace_seconds]
        for build in old:
            self._store.delete(f"builds/{build}")
        return sum(sizes[build] for build in old)


def _digest(record: Path) -> str | None:
    """Which blob a layer's record names."""
    try:
        return str(json.loads(record.read_bytes())["digest"]).removeprefix("sha256:")
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _unlink(path: Path) -> int:
    size = path.stat().st_size
    path.unlink()
    return size
