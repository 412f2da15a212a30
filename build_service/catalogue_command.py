"""Runs of `registry.catalogue`: MLflow's memory and its import are in a process of their own, and end with it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from build_service import processes

_LARGEST_LOG = 1 << 20  # bytes of mlflow.log; then it begins anew
# MLflow's own patience is many minutes; an operator's settings win.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}


class CatalogueCommand:
    """One run, with the pipes of `process`; it has ended when the block ends."""

    def __init__(self, root: Path, uri: str, outer: Mapping[str, str]) -> None:
        """`outer`: what of the service's environment the command sees."""
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
        environment = {**_PATIENCE, **outer, **quiet, "EKIBEN_MLFLOW_URI": uri}
        log_file = root / "mlflow.log"
        if log_file.exists() and log_file.stat().st_size > _LARGEST_LOG:
            log_file.unlink(missing_ok=True)
        with log_file.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "registry.catalogue"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        self._record = processes.record(root / "processes", self.process.pid)

    def kill(self) -> None:
        """End it and whatever it started."""
        if self.process.returncode is None:
            processes.kill_group(self.process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        with self.process:  # closes the pipes and waits
            pass
        self._record.unlink(missing_ok=True)
