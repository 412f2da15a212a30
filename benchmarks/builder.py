"""Our half of the comparisons: `python -m builder_image SPEC.json`, as the service starts it."""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import ROOT
from benchmarks.parts import Failed, Peak, environment

PLATFORM = {"x86_64": "linux/amd64", "aarch64": "linux/arm64"}.get(platform.machine(), "linux/amd64")


@dataclass(frozen=True)
class Built:
    """`result` is the builder's own (docs/design.md §7), `memory` the peak of its process tree in bytes."""

    seconds: float
    result: Mapping[str, Any]
    memory: int

    @property
    def stages(self) -> dict[str, float]:
        return {one["stage"]: one["seconds"] for one in self.result["stages"]}


def build(
    folder: Path,
    model: Path,
    cache: Path,
    base: Path,
    kinds: Path,
    *,
    kind: str = "lightgbm",
    push: str | None = None,
    output: Path | None = None,
    before: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    memory: bool = False,
    **options: Any,
) -> Built:
    """Run one build to its end; `before` are words in front of the command, `options` go to Popen. Raises Failed.

    Its memory is looked at with `memory` only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spec = {
        "schema": "ekiben.build.v1",
        "work": str(folder / "work"),
        "result": str(folder / "result.json"),
        "model": {"dir": str(model)},
        "kind": {"name": kind, "dir": str(kinds / kind)},
        "serving": str(kinds / "serving"),
        "cache": {"environments": str(cache / "environments"), "bentos": str(cache / "bentos")},
        "image": {
            "base": str(base),
            "platform": PLATFORM,
            "push": None if push is None else {"ref": push},
            "output": None if output is None else str(output),
        },
    }
    file = folder / "spec.json"
    file.write_text(json.dumps(spec))
    with (folder / "log").open("wb") as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            [*before, sys.executable, "-m", "builder_image", str(file)],
            cwd=ROOT,
            env=dict(env) if env is not None else environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            **options,
        )
        # A wait with a bound polls, and a look at the memory of all processes takes a processor: neither belongs into
        # a time of tenths of a second.
        bound = threading.Timer(900, process.kill)
        bound.start()
        try:
            with Peak(process.pid, tree=True) if memory else contextlib.nullcontext() as peak:
                code = process.wait()
        finally:
            bound.cancel()
            if process.poll() is None:
                process.kill()
                process.wait()
        seconds = time.perf_counter() - started
    if code != 0:
        raise Failed(f"the build ended with exit code {code}: {(folder / 'log').read_text(errors='replace')[-1200:]}")
    return Built(seconds, json.loads((folder / "result.json").read_bytes()), peak.bytes if peak else 0)
