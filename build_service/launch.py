"""Starts the programs of the local platform: which variables, bounds, logs and folders each has."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from build_service import bytecode, cgroups, environment, isolation, processes
from build_service.logs import predecessor
from build_service.platform import BuildOrder, Failure, RevisionOrder
from build_service.quantities import memory_limit, parse_memory
from build_service.settings import MIB, Settings
from registry.confinement import system
from registry.confinement.orders import Bounds, Log
from registry.kinds import Kinds

_KEPT_LOGS = 20  # files of a deployment
_LONGEST_WORDS = 64 * 1024  # bytes of what a process says at its end
_PROGRESS_BYTES = MIB
_MEASURE_EVERY = 0.5  # seconds between two measurements of memory
DISK_EVERY = 5.0  # seconds between two measurements of folders
_MOST_FILES = 100_000  # in a folder: more of them count as no end of bytes
_TASKS = 4096  # processes and threads of a model
_START_DATA = 2048 * MIB  # of address space over the limit of memory, until the model is loaded
_SPARE_DATA = 512 * MIB  # over what is free of the limit: stacks of threads that are made later, mostly unused
_BLOCK = 512  # bytes of a block as stat counts them

_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE")


@dataclass(eq=False)
class Bounded:
    """A child with what bounds it, and what is removed when it has ended."""

    child: processes.Child
    scratch: Path
    """The folder that it fills."""
    group: cgroups.Group | None = None
    user: int | None = None
    give_back: Callable[[int], None] = field(default=lambda user: None)
    measured: float = 0.0
    disk: int = 0
    """Bytes that it had on the disk at the last look."""
    killed: Failure | None = None

    @property
    def out_of_memory(self) -> bool:
        return self.group is not None and self.group.killed()

    def due(self) -> bool:
        """Whether memory is to be measured now."""
        if time.monotonic() - self.measured < _MEASURE_EVERY:
            return False
        self.measured = time.monotonic()
        return True

    def measure_disk(self) -> None:
        """Look at the disk, which may take long where there are many files."""
        self.disk = size_of(self.scratch, self.child.pids())

    def release(self) -> None:
        """Remove what only a running child needs. To be called when it has ended."""
        remove_tree(self.scratch)
        if self.group is not None:
            self.group.remove()
        if self.user is not None:
            self.give_back(self.user)
            self.user = None


@dataclass(eq=False)
class Serving(Bounded):
    log: Path = Path()
    termination: Path = Path()
    limit: str = ""
    """The limit of memory, as its user would write it."""

    def words(self) -> Any:
        """What the process left as the reason of its end: its own words, so read as one reads an upload."""
        try:
            descriptor = os.open(self.termination, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None
        with open(descriptor, "rb") as file, contextlib.suppress(ValueError, RecursionError):
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return json.loads(file.read(_LONGEST_WORDS))
        return None


class Launcher:
    """What all programs of one service share."""

    def __init__(self, settings: Settings, kinds: Kinds, outer: Mapping[str, str], records: Path) -> None:
        self._settings, self._kinds, self._outer, self._records = settings, kinds, outer, records
        self._root = settings.root
        self.isolation = isolation.find(settings.isolation)
        self._groups = cgroups.find()
        self._compiler = bytecode.Compiler()

    def bounds(self) -> dict[str, str]:
        """What keeps models apart and bounds their memory on this machine, for its operator."""
        group = "" if self._groups is None else f"control group v{self._groups.version}, "
        return {"isolation": str(self.isolation), "memory": f"{group}RLIMIT_DATA, measurement"}

    # --- builds -----------------------------------------------------------------------------------------------------

    def build(self, order: BuildOrder, spec: Path, folder: Path) -> Bounded:
        """Start a build's command, whose progress and log are in `folder`."""
        group = self._group(f"build.{order.id}.{order.attempt}", self._settings.build_memory)
        child = processes.Child(
            [sys.executable, "-m", "builder_image", str(spec)],
            environment=environment.for_builds(self._outer, self._settings.build_environment),
            folder=folder,
            records=self._records,
            logs=[
                Log(str(folder / "progress.jsonl"), _PROGRESS_BYTES, rotated=False),
                Log(str(folder / "log.txt"), self._settings.log_bytes, rotated=True),
            ],
            groups=() if group is None else (group.procs,),
        )
        return Bounded(child, folder / "work", group)

    # --- serving ----------------------------------------------------------------------------------------------------

    def memory(self, order: RevisionOrder) -> str:
        """The limit that a deployment names, else the same default as in a cluster."""
        kind = next((kind for kind in self._kinds.all if kind.name == order.version.kind), None)
        default = self._settings.model_memory if kind is None else kind.memory
        return order.resources.get("memory") or memory_limit(default, order.version.size)

    def serve(
        self, order: RevisionOrder, variables: Mapping[str, str], read: Sequence[Path], pass_fds: Sequence[int]
    ) -> Serving:
        """Start a process of a model, which reads the folders `read`. Raises OSError."""
        folder = self._root / "deployments" / order.deployment
        folder.mkdir(parents=True, exist_ok=True)
        for old in sorted(folder.glob("*.log"))[: -_KEPT_LOGS + 1]:
            for each in (old, predecessor(old)):
                each.unlink(missing_ok=True)
        stem = f"{order.revision:06d}-{time.time_ns()}"
        scratch, log = folder / "scratch" / stem, folder / f"{stem}.log"
        scratch.mkdir(parents=True, mode=0o700)
        python = Path(order.build["environment"]["dir"], "bin", "python")
        limit = self.memory(order)
        users = self.isolation.users
        user = None if users is None else users.take()
        if user is not None:
            for path, sign in (
                (read[0], "ekiben-environment.json"),
                (read[1], "bento.yaml"),
                (read[2], "manifest.json"),
            ):
                isolation.open_to_all(path, sign)
            os.chown(scratch, user, user)
        group = self._group(f"{order.deployment}.{stem}", parse_memory(limit))
        variables = {
            **environment.for_serving(self._outer),
            **variables,
            **{name: str(scratch) for name in ("HOME", "TMPDIR")},
            "USER": "ekiben",
            "LOGNAME": "ekiben",
            "BENTOML_HOME": str(scratch / "bentoml"),
            "EKIBEN_TERMINATION_LOG": str(scratch / "termination.json"),
            "EKIBEN_MODULES_FILE": str(scratch / "modules.json"),
        }
        certificates = [variables[name] for name in _CERTIFICATES if name in variables]
        try:
            child = processes.Child(
                [str(python), "-m", "bentos.serving"],
                environment=variables,
                folder=scratch,
                records=self._records,
                logs=[Log(str(log), self._settings.log_bytes, rotated=True)],
                pass_fds=pass_fds,
                bounds=Bounds(parse_memory(self._settings.model_disk), parse_memory(limit) + _START_DATA, _TASKS),
                cage=self.isolation.cage(
                    read=[
                        *read, system.interpreter(str(python)), *certificates, *self._settings.readable_folders
                    ],
                    scratch=scratch,
                    state=self._root,
                    user=user,
                    shared_memory=parse_memory(limit),
                ),
                groups=() if group is None else (group.procs,),
            )  # fmt: skip
        except BaseException:
            if user is not None and users is not None:
                users.give_back(user)
            raise
        return Serving(
            child, scratch, group, user, users.give_back if users else lambda _: None,
            log=log, termination=scratch / "termination.json", limit=limit,
        )  # fmt: skip

    def loaded(self, serving: Serving, order: RevisionOrder) -> None:
        """To be called when a process is ready: from now on its requests bound its memory."""
        bound_data(serving.child.pid, parse_memory(self.memory(order)))
        self._compiler.compile(Path(order.build["environment"]["dir"]), serving.scratch / "modules.json")

    def close(self) -> None:
        self._compiler.close()

    def clear(self) -> None:
        """Remove the scratch folders that an earlier service left."""
        for scratch in (self._root / "deployments").glob("*/scratch"):
            remove_tree(scratch)

    def bound_serving(self, serving: Serving, order: RevisionOrder) -> None:
        """Keep a process to the limits that its deployment has now; one that is over them is ended."""
        limit = self.memory(order)
        if limit != serving.limit:
            serving.limit = limit
            if serving.group is not None:
                serving.group.bound(parse_memory(limit))
            bound_data(serving.child.pid, parse_memory(limit))
        if serving.due() and (used := serving.child.memory()) > parse_memory(limit):
            serving.killed = out_of_memory(limit, used)
        elif serving.disk > parse_memory(self._settings.model_disk):
            serving.killed = Failure(
                "out_of_disk",
                f"The model wrote more than {self._settings.model_disk} into its scratch folder.",
                hint="Write less below TMPDIR, or raise EKIBEN_MODEL_DISK.",
            )
        if serving.killed is not None:
            serving.child.kill()

    def _group(self, name: str, memory: int) -> cgroups.Group | None:
        return None if self._groups is None else self._groups.make(name, memory)


def out_of_memory(limit: str, used: int | None = None) -> Failure:
    needed = "more memory than" if used is None else f"{used // MIB} MiB of memory, more than"
    return Failure(
        "out_of_memory",
        f"The model needed {needed} its limit of {limit}.",
        hint="Raise resources.memory of the deployment.",
    )


def bound_data(supervisor: int, limit: int) -> None:
    """Bound what a loaded model may take at once to what is left of its limit, and to spare: a request that asks for
    more gets an error of its own, where the kernel or a measurement would end the process for all."""
    with contextlib.suppress(ImportError, psutil.Error, OSError, ValueError, KeyError):
        import resource

        for process in psutil.Process(supervisor).children():
            status = Path(f"/proc/{process.pid}/status").read_text()
            fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
            taken = int(fields["VmData"].split()[0]) * 1024
            free = max(0, limit - int(fields["VmRSS"].split()[0]) * 1024)
            _, hard = resource.prlimit(process.pid, resource.RLIMIT_DATA)
            resource.prlimit(process.pid, resource.RLIMIT_DATA, (taken + free + _SPARE_DATA, hard))


def size_of(folder: Path, pids: Iterable[int] = ()) -> int:
    """Bytes on the disk of the files below a folder, and of those that the processes have open and have deleted."""
    total = files = 0
    for here, names in _walk(folder):
        files += len(names) + 1
        if files > _MOST_FILES:
            return sys.maxsize
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(here, name)).st_blocks * _BLOCK
    for pid in pids:
        with contextlib.suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    known = descriptor.stat()
                    if stat.S_ISREG(known.st_mode) and known.st_nlink == 0:
                        total += known.st_blocks * _BLOCK
    return total


def remove_tree(folder: Path) -> None:
    """Delete a folder, even one whose folders its writer has closed."""
    for _ in _walk(folder):
        pass
    shutil.rmtree(folder, ignore_errors=True)


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Every folder below, opened first where its owner had closed it, and the names of its files."""
    _open(str(folder))
    for here, folders, names in os.walk(folder):
        for each in folders:
            _open(os.path.join(here, each))
        yield here, names


def _open(folder: str) -> None:
    with contextlib.suppress(OSError):
        known = os.lstat(folder)
        if stat.S_ISDIR(known.st_mode) and known.st_mode & 0o700 != 0o700:
            os.chmod(folder, 0o700)
