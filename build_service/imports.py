"""Models that come from MLflow: downloaded by a command into a folder of their own, under the bounds of an upload.

The command is watched, not trusted: what it has written counts, and one that stands still is ended.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from ulid import ULID

from build_service.catalogue_command import CatalogueCommand
from build_service.settings import Settings
from registry.errors import EkibenError, InfrastructureError
from registry.origin import Source, too_large

_AT_ONCE = 2  # commands; each takes some 400 MB while it runs
_LOOK = 0.25  # seconds between two looks at what has come
_BESIDE = 16 * 2**20  # bytes of what MLflow keeps beside a model
_SLOWEST_START = 60.0  # seconds that MLflow may take to be imported and to answer for the first time


@dataclass(frozen=True)
class Imported:
    """A folder with `files/` and perhaps sample.json, expected.json, example.json; and what MLflow knows of it."""

    folder: Path
    name: str | None
    kind: str | None
    flavour: str | None
    labels: dict[str, str]


class Importer:
    def __init__(self, settings: Settings, outer: Mapping[str, str]) -> None:
        """`outer`: what of the service's environment the command that reads from MLflow sees."""
        self._settings, self._outer = settings, outer
        self._folder = settings.root / "imports"
        self._room = asyncio.Semaphore(_AT_ONCE)
        shutil.rmtree(self._folder, ignore_errors=True)  # what an earlier service was fetching

    @asynccontextmanager
    async def fetched(self, source: Source, gone: Callable[[], Awaitable[bool]]) -> AsyncIterator[Imported]:
        """The model, for the time of the block; `gone` tells whether anybody still waits for it."""
        if not self._settings.mlflow:
            raise InfrastructureError(
                "mlflow_off", "This service works without MLflow.", field="run_id",
                hint="Send the file itself, or let the operator set EKIBEN_MLFLOW=true and EKIBEN_MLFLOW_URI.",
            )  # fmt: skip
        folder = self._folder / str(ULID())
        try:
            async with self._room:
                await run_in_threadpool(folder.mkdir, parents=True)
                known = await self._run(source, folder, gone)
            yield Imported(folder, known["name"], known["kind"], known["flavour"], known["labels"])
        finally:
            await asyncio.shield(run_in_threadpool(shutil.rmtree, folder, ignore_errors=True))

    async def _run(self, source: Source, folder: Path, gone: Callable[[], Awaitable[bool]]) -> dict[str, Any]:
        settings = self._settings
        order = {
            "id": 1, "action": "fetch", **source.to_json(), "into": str(folder),
            "max_bytes": settings.max_upload, "max_files": settings.max_files,
        }  # fmt: skip
        with CatalogueCommand(settings.root, settings.tracking_uri, self._outer) as command:
            assert command.process.stdin is not None
            assert command.process.stdout is not None
            with suppress(BrokenPipeError):  # it has ended already: that is told below
                command.process.stdin.write(json.dumps(order).encode() + b"\n")
                command.process.stdin.close()
            size, moved = 0, time.monotonic()
            while command.process.poll() is None:
                await asyncio.sleep(_LOOK)
                if await gone():
                    raise ClientDisconnect
                now = await run_in_threadpool(_size, folder)
                if now > settings.max_upload + _BESIDE:
                    raise too_large(settings.max_upload)
                self._check_disk()
                if now != size:
                    size, moved = now, time.monotonic()
                elif time.monotonic() - moved > max(settings.upload_idle_seconds, _SLOWEST_START):
                    raise InfrastructureError(
                        "mlflow_stalled", "MLflow did not go on with the download.", field="run_id",
                        hint="Try again; on a slow line raise EKIBEN_UPLOAD_IDLE_SECONDS.", status=504,
                    )  # fmt: skip
            answer = _answer(command.process.stdout.read())
        if "problem" in answer:
            told = answer["problem"]
            raise EkibenError(
                told["code"], told["detail"], field=told.get("field"), hint=told.get("hint"), status=told["status"]
            )
        return dict(answer["fetched"])

    def _check_disk(self) -> None:
        free = shutil.disk_usage(self._settings.root).free
        if free < self._settings.min_free_disk:
            raise InfrastructureError(
                "disk_full", f"The disk of the state folder has {free // 2**20} MiB left.",
                hint="Free some space, or point EKIBEN_HOME at a larger disk; then try again.", status=507,
            )  # fmt: skip


def _answer(out: bytes) -> dict[str, Any]:
    """The command's one answer; MLflow may print lines of its own."""
    for line in out.splitlines():
        if line.startswith(b'{"id"') and line.endswith(b"}"):
            return dict(json.loads(line))
    raise InfrastructureError(
        "mlflow_unreachable", "The command that reads from MLflow ended without an answer.", field="run_id",
        hint="Try again; mlflow.log in the state folder tells more.",
    )  # fmt: skip


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size
        except FileNotFoundError:
            continue  # moved in the meantime
    return total
