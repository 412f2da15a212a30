"""The model layer at the speed of the disk and of the registry, and a build's memory."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import builder, models, parts
from benchmarks.figures import Figure, Measured, Sample, middle
from builder_image import base, image, layers, layout, remote
from registry.digest import canonical_json


def _layer(bench: parts.Bench) -> tuple[layers.StreamedLayer, Path]:
    """The model layer of one big file, and that file: random bytes, so that nothing on the way can be clever."""

    def make() -> Path:
        size = (64 if bench.quick else 1024) * parts.MIB
        bench.room(5 * size)
        return models.big_onnx(bench.folder("layer-model"), size)

    folder = bench.part("layer-model", make)
    manifest = models.manifest_of(folder)
    layer = layers.model(folder, manifest, canonical_json(manifest))
    return layer, folder / "files" / models.WEIGHTS


def into_layout(bench: parts.Bench) -> Measured:
    """An image with this model layer into an OCI layout that has the base already, beside SHA-256 and a copy."""
    layer, weights = _layer(bench)
    described = base.load(bench.base)
    samples: list[Sample] = []
    for number in range(bench.rounds(5)):
        place = bench.folder("layout")
        shutil.copytree(bench.layout, place)
        os.sync()
        started = time.perf_counter()
        made = image.assemble(described.image(builder.PLATFORM), [layer], image.Run(entrypoint=("/usr/bin/python3",)))
        layout.write_layout(made, place, "localhost/big:1")
        ours = time.perf_counter() - started
        shutil.rmtree(place)
        copied = bench.folder("copy")
        os.sync()
        hashing, copying = hash_and_copy(weights, copied)
        copied.unlink()
        parts.say(f"round {number + 1}: ours {ours:.2f} s, SHA-256 {hashing:.2f} s + copy {copying:.2f} s")
        samples += [
            Sample(number, "ours", "total", ours, "s"),
            Sample(number, "copy", "sha256", hashing, "s"),
            Sample(number, "copy", "cp", copying, "s"),
            Sample(number, "copy", "total", hashing + copying, "s"),
        ]
    mine, other = middle(samples, "ours", "total"), middle(samples, "copy", "total")
    return Measured(mine / other, {"ours_s": mine, "sha256_and_cp_s": other, "mib": layer.size // parts.MIB}, samples)


def hash_and_copy(source: Path, target: Path) -> tuple[float, float]:
    """Seconds of SHA-256 (OpenSSL's, with what the processor has for it) and of `cp`."""
    started = time.perf_counter()
    with source.open("rb") as content:
        hashlib.file_digest(content, "sha256")
    hashed = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", str(source), str(target)], check=True)
    return hashed - started, time.perf_counter() - hashed


def into_registry(bench: parts.Bench) -> Measured:
    """The layer made and sent in one pass, beside `curl -T` of as many bytes whose digest is known beforehand."""
    parts.needs("docker-registry", "curl")
    layer, weights = _layer(bench)
    with weights.open("rb") as content:
        digest = "sha256:" + hashlib.file_digest(content, "sha256").hexdigest()
    samples: list[Sample] = []
    for number in range(bench.rounds(5)):
        with parts.registry(bench.folder("registry")) as store, remote.Registry(store.host) as client:
            os.sync()
            started = time.perf_counter()
            client.push_blob_stream("big", layer.open, layer.size)
            ours = time.perf_counter() - started
        with parts.registry(bench.folder("registry")) as store:
            os.sync()
            started = time.perf_counter()
            _curl(store, weights, digest)
            other = time.perf_counter() - started
        parts.say(f"round {number + 1}: ours {ours:.2f} s, curl -T {other:.2f} s")
        samples += [Sample(number, "ours", "total", ours, "s"), Sample(number, "curl", "total", other, "s")]
    mine, theirs = middle(samples, "ours", "total"), middle(samples, "curl", "total")
    return Measured(mine / theirs, {"ours_s": mine, "curl_s": theirs, "mib": layer.size // parts.MIB}, samples)


def _curl(store: parts.Registry, file: Path, digest: str) -> None:
    """One upload by PUT, as the distribution specification has it for a blob whose digest is known."""
    _, headers = parts.post(f"http://{store.host}/v2/big/blobs/uploads/")
    location = headers["Location"]
    where = f"{location}{'&' if '?' in location else '?'}digest={digest}"
    parts.run(
        ["curl", "--silent", "--show-error", "--fail", "--noproxy", "*", "-H", "Content-Type: application/octet-stream",
         "-T", file, where]
    )  # fmt: skip


def memory(bench: parts.Bench) -> Measured:
    """The builder with all it starts, its caches empty, so that installing the packages counts too."""
    size = (256 * parts.MIB) if bench.quick else (5 * parts.GIB)
    bench.room(2 * size + 2 * parts.GIB)
    parts.needs("docker-registry")
    folder = models.big_onnx(bench.folder("memory-model"), size)
    cache = bench.folder("memory-cache")
    try:
        with parts.registry(bench.folder("registry")) as store:
            built = builder.build(
                bench.folder("build"),
                folder,
                cache,
                bench.base,
                bench.kinds,
                kind="onnx",
                push=f"{store.host}/big:1",
                memory=True,
            )
    finally:
        parts.remove(folder)
        parts.remove(cache)
    parts.say(f"peak {built.memory // parts.MIB} MiB, {built.seconds:.0f} s")
    samples = [
        Sample(0, "ours", "peak memory", built.memory, "bytes"),
        *(Sample(0, "ours", name, seconds, "s") for name, seconds in built.stages.items()),
    ]
    return Measured(built.memory / parts.MIB, {"model_gib": size / parts.GIB, "build_s": built.seconds}, samples)


FIGURES: dict[Figure, Callable[[parts.Bench], Measured]] = {
    Figure("layer.layout_vs_copy", "model layer of 1 GB into a layout, beside SHA-256 and `cp`", "x", 1.5, "lower"): (
        into_layout
    ),
    Figure("layer.registry_vs_curl", "the same into a registry, beside `curl -T`", "x", 1.3, "lower"): into_registry,
    Figure("build.memory_5gb", "peak memory of a build of a 5 GB model", "MiB", 512, "lower"): memory,
}
