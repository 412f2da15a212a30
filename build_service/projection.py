"""Keeps MLflow up to date from the outbox: retried with backoff, and never in the way of anything else."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import delete, func, select, update

from build_service import metrics, state
from build_service.catalogue_command import CatalogueCommand
from registry import versions
from registry.database import Database, now
from registry.store import ObjectStore

log = structlog.get_logger(__name__)

_TICK = 2.0  # seconds; changes wait a moment, so that a burst is one run of the command
_BATCH = 200
_TIMEOUT = 300.0  # seconds for one run of the command
_RETRY_LONGEST = 300.0


class Projection:
    def __init__(self, database: Database, root: Path, store: ObjectStore, uri: str, outer: Mapping[str, str]) -> None:
        """`outer`: what of the service's environment the command that writes into MLflow sees."""
        self._database, self._root, self._store, self._uri, self._outer = database, root, store, uri, outer
        self._stop = threading.Event()
        self._child: CatalogueCommand | None = None
        self._thread = threading.Thread(target=self._run, name="mlflow-projection", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        child = self._child
        if child is not None:  # whatever it did not answer for is done again by the next service
            child.kill()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_TICK):
            try:
                self.round()
            except Exception:
                log.exception("the MLflow projection stumbled; it tries again")

    def round(self) -> int:
        """Project what waits; how many changes are done."""
        with self._database.read() as connection:
            settling = connection.execute(
                select(func.count()).select_from(state.builds).where(state.builds.c.state.in_(state.BUILD_OPEN))
            ).scalar_one() + connection.execute(
                select(func.count()).select_from(state.revisions).where(state.revisions.c.state == "rolling")
            ).scalar_one()  # fmt: skip
            rows = connection.execute(
                select(state.outbox).where(state.outbox.c.not_before <= now()).order_by(state.outbox.c.id).limit(_BATCH)
            ).all()
            waiting = connection.execute(select(func.count()).select_from(state.outbox)).scalar_one()
            actions = [self._action(connection, row) for row in rows]
        metrics.PROJECTION_WAITING.set(waiting)
        if settling or not actions:  # a model on its way to its first answer has the processors for itself
            return 0
        answers = self._command(actions)
        done = [answer["id"] for answer in answers if "error" not in answer]
        with self._database.write() as connection:
            connection.execute(delete(state.outbox).where(state.outbox.c.id.in_(done)))
            for row in rows:
                if row.id not in done:
                    wait = min(2.0 ** min(row.attempts, 16), _RETRY_LONGEST)
                    connection.execute(
                        update(state.outbox)
                        .where(state.outbox.c.id == row.id)
                        .values(attempts=row.attempts + 1, not_before=now() + wait)
                    )
        for answer in answers:
            if "error" in answer:
                log.warning("MLflow refused a change; it is tried again", change=answer["id"], error=answer["error"])
        metrics.PROJECTION_WAITING.set(waiting - len(done))
        return len(done)

    def _action(self, connection: Any, row: Any) -> dict[str, Any]:
        version = versions.by_id(connection, row.payload["version_id"])
        return {
            "id": row.id,
            "action": row.action,
            "name": version.name,
            "version_id": version.id,
            "number": version.number,
            "source": self._store.uri(f"{version.location}/files"),
            "digest": version.digest,
            "kind": version.kind,
            "format": version.format,
            "labels": version.labels,
            "alias": row.payload.get("alias"),
            "gone": row.payload.get("gone"),
        }

    def _command(self, actions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        body = "".join(json.dumps(action) + "\n" for action in actions)
        with CatalogueCommand(self._root, self._uri, self._outer) as command:
            self._child = command
            try:
                out, _ = command.process.communicate(body.encode(), timeout=_TIMEOUT)
            except subprocess.TimeoutExpired:
                command.kill()
                out, _ = command.process.communicate()
            finally:
                self._child = None
        # The last line of a command that was ended may be half of one.
        return [json.loads(line) for line in out.splitlines() if line.startswith(b"{") and line.endswith(b"}")]
