"""A large upload to the running service: its memory, and its speed beside a copy and SHA-256 of the same bytes."""

from __future__ import annotations

import contextlib
import json
import os
import time
import urllib.error
from collections.abc import Callable
from pathlib import Path

from benchmarks import models, parts
from benchmarks.figures import Figure, Measured, Sample, middle
from benchmarks.layers import hash_and_copy
from benchmarks.load import Version


def _uploads(bench: parts.Bench) -> tuple[list[Sample], int]:
    """Measured once for both figures: (samples, MiB of one upload)."""

    def make() -> tuple[list[Sample], int]:
        parts.needs("curl")
        size = (128 if bench.quick else 2048) * parts.MIB
        bench.room(4 * size)
        folder = bench.folder("upload")
        folder.mkdir()
        graph, weights = folder / models.GRAPH, folder / models.WEIGHTS
        graph.write_bytes(models.graph(size))
        samples: list[Sample] = []
        with parts.service(bench.folder("home")) as service:
            _settle(service, bench.models(1)[0])
            for number in range(bench.rounds(3)):
                # other content each time: what is there already would be answered without a build
                models.write_weights(weights, size, b"%d" % number)
                samples += _round(service, number, graph, weights, folder)
        parts.remove(folder)
        return samples, size // parts.MIB

    found: tuple[list[Sample], int] = bench.part("uploads", make)
    return found


def _settle(service: parts.Service, model: Path) -> None:
    """One small upload first: what the service imports and caches at the first upload is not this upload's memory."""
    body, kind = Version(1, model).form("small")
    body = body.replace(b'name="name"\r\n\r\nsmall', b'name="deploy"\r\n\r\nfalse', 1)
    parts.post(f"{service.url}/models?name=small", body, **{"Content-Type": kind})
    parts.cancel_builds(service)
    time.sleep(1)


def _round(service: parts.Service, number: int, graph: Path, weights: Path, folder: Path) -> list[Sample]:
    os.sync()
    before = parts.resident(service.pid)
    with parts.Peak(service.pid, tree=False) as peak:
        told, seconds = parts.run(
            ["curl", "--silent", "--show-error", "--noproxy", "*", "-F", f"file=@{graph}", "-F", f"file=@{weights}",
             "-F", "name=big", "-F", "deploy=false", f"{service.url}/models"]
        )  # fmt: skip
        time.sleep(0.1)
    answer = json.loads(told)
    if "version" not in answer:
        raise parts.Failed(f"the upload was refused: {answer.get('code')}: {answer.get('detail')}")
    parts.cancel_builds(service)
    with contextlib.suppress(urllib.error.HTTPError):
        parts.post(f"{service.url}/models/big/versions/{answer['version']}", method="DELETE", **service.proof)
    os.sync()
    hashing, copying = hash_and_copy(weights, folder / "copy")
    (folder / "copy").unlink()
    growth = max(0, peak.bytes - before)
    parts.say(
        f"round {number + 1}: {seconds:.2f} s, memory +{growth / parts.MIB:.0f} MiB; "
        f"SHA-256 {hashing:.2f} s + cp {copying:.2f} s"
    )
    return [
        Sample(number, "ours", "upload", seconds, "s"),
        Sample(number, "ours", "memory before", before, "bytes"),
        Sample(number, "ours", "memory growth", growth, "bytes"),
        Sample(number, "copy", "sha256", hashing, "s"),
        Sample(number, "copy", "cp", copying, "s"),
        Sample(number, "copy", "total", hashing + copying, "s"),
    ]


def memory(bench: parts.Bench) -> Measured:
    """Growth of the server process over its size before the upload: the largest of the rounds."""
    samples, size = _uploads(bench)
    growth = max(one.value for one in samples if one.what == "memory growth")
    return Measured(growth / parts.MIB, {"upload_mib": size}, samples)


def speed(bench: parts.Bench) -> Measured:
    """Time of SHA-256 and `cp` over the time of the upload by curl, recognition and answer included."""
    samples, size = _uploads(bench)
    ours, other = middle(samples, "ours", "upload"), middle(samples, "copy", "total")
    return Measured(other / ours, {"upload_s": ours, "sha256_and_cp_s": other, "upload_mib": size}, samples)


FIGURES: dict[Figure, Callable[[parts.Bench], Measured]] = {
    Figure("upload.memory_2gb", "growth of the server's memory during an upload of 2 GB", "MiB", 64, "lower"): memory,
    Figure("upload.speed_vs_copy", "speed of that upload beside SHA-256 and `cp`", "x", 0.5, "higher"): speed,
}
