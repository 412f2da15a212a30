"""Runs the real service, which ends itself with SIGKILL at a boundary: python killed_at.py BOUNDARY

A boundary is right before or right after a function of the real modules, on its first call for which a condition holds.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from build_service import __main__, api, intake, local, projection, reconciler, routes, state
from registry import shelf, store, versions

Condition = Callable[..., bool]


def always(*_arguments: Any, **_options: Any) -> bool:
    return True


def revision(number: int) -> Condition:
    """Of the control loop's steps: (self, held, wanted, …)."""
    return lambda _self, _held, wanted, *rest: wanted.number == number


BOUNDARIES: dict[str, tuple[Any, str, str, Condition]] = {
    # upload
    "before-a-file": (intake.Intake, "begin_file", "before", always),
    "in-a-file": (intake.Intake, "write", "after", always),
    "file-not-committed": (store.DirectoryWriter, "commit", "before", always),
    "file-committed": (intake.Intake, "end_file", "after", always),
    "manifest-not-stored": (store.DirectoryWriter, "commit", "before", lambda self, **o: bool(o.get("if_absent"))),
    "manifest-stored": (api.Service, "register", "before", always),
    "row-in-its-transaction": (state, "target", "after", always),
    "row-written": (api.Service, "register", "after", always),
    # build
    "build-claimed": (reconciler.Reconciler, "_submit", "before", always),
    "build-submitted": (local.LocalPlatform, "submit", "after", always),
    "build-done": (state, "change_build", "before", lambda *a, **o: o.get("state") == "succeeded"),
    "build-in-its-transaction": (state, "change_build", "after", lambda *a, **o: o.get("state") == "succeeded"),
    "build-recorded": (reconciler.Reconciler, "_give_up", "before", always),
    # rollout
    "rolling-recorded": (local.LocalPlatform, "apply", "before", always),
    "process-launched": (local.LocalPlatform, "_launch", "after", always),
    "traffic-moved": (reconciler.Reconciler, "_went_live", "before", always),
    "live-recorded": (reconciler.Reconciler, "_went_live", "after", always),
    # a second version beside the first
    "second-rolling": (local.LocalPlatform, "_launch", "after", lambda self, served, order: order.revision == 2),
    "second-has-traffic": (
        routes.RouteTable,
        "set",
        "after",
        lambda self, name, ups: any(u.revision == 2 for u in ups),
    ),
    "second-not-recorded": (reconciler.Reconciler, "_went_live", "before", revision(2)),
    "second-recorded": (reconciler.Reconciler, "_went_live", "after", revision(2)),
    "first-drains": (
        local.LocalPlatform,
        "_retire",
        "after",
        lambda self, served, replica: replica.order.revision == 1,
    ),
    # rolling back
    "rollback-in-its-transaction": (state, "target", "after", lambda *a, **o: o.get("rollback_of") is not None),
    "rollback-rolls": (local.LocalPlatform, "_launch", "after", lambda self, served, order: order.revision == 3),
    "rollback-not-recorded": (reconciler.Reconciler, "_went_live", "before", revision(3)),
    # deletion
    "deletion-in-its-transaction": (versions, "mark_deleted", "after", always),
    "objects-not-deleted": (store.DirectoryStore, "delete", "before", always),
    "manifest-deleted": (store.shutil, "rmtree", "before", lambda path, **o: "/objects/models/" in str(path)),
    "deployment-deleted": (local.LocalPlatform, "delete", "before", always),
    # MLflow
    "before-mlflow": (projection.Projection, "_command", "before", always),
    "mlflow-has-it": (projection.Projection, "_command", "after", always),
}
SWEEP: dict[str, tuple[Any, str, str, Condition]] = {  # once there is something that nobody needs
    "sweep-renamed": (shelf, "delete", "before", always),
    "sweep-half-deleted": (os, "unlink", "after", lambda *a, **o: o.get("dir_fd") is not None),
    "sweep-record-left": (shelf, "rename", "after", lambda place, *a, **o: place.name == "bentos"),
}
STAGES = ("fetch", "resolve", "environment", "bento")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def wrap(place: Any, name: str, when: str, condition: Condition) -> None:
    real = getattr(place, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        strikes = condition(*arguments, **options)
        if strikes and when == "before":
            die()
        result = real(*arguments, **options)
        if strikes:
            die()
        return result

    setattr(place, name, wrapped)


def die_in_stage(stage: str) -> None:
    """While the builder runs, once it has said that it is in the stage."""
    real = local.LocalPlatform.submit

    def submit(self: Any, order: Any) -> None:
        real(self, order)
        progress = self._root / "builds" / order.id / "progress.jsonl"

        def watch() -> None:
            while f'"{stage}"' not in progress.read_text():
                time.sleep(0.001)
            die()

        threading.Thread(target=watch, daemon=True).start()

    local.LocalPlatform.submit = submit  # type: ignore[method-assign]


if __name__ == "__main__":
    boundary = sys.argv[1]
    if boundary in BOUNDARIES | SWEEP:
        wrap(*(BOUNDARIES | SWEEP)[boundary])
    else:
        die_in_stage(boundary.removeprefix("build-in-"))
    sys.argv = ["ekiben-server"]
    sys.exit(__main__.main())
