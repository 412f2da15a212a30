"""Build and push beside BentoML's, four times: caches warm, no local cache, nothing anywhere, and the image's size."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import bentoml, builder, parts
from benchmarks.figures import Figure, Measured, Sample, middle

_CONFIG = "the same service code, pinned packages, base image, registry and weights on both sides"
_LONG = 200.0  # seconds of two rounds after which there is no third, so that a slow machine ends within half an hour


@dataclass
class Contest:
    """Both sides with warm caches and one registry that has an image of each."""

    bench: parts.Bench
    registry: parts.Registry
    reference: str
    cache: Path
    pod: bentoml.Pod
    models: list[Path]
    sizes: dict[str, int] = field(default_factory=dict)


def contest(bench: parts.Bench) -> Contest:
    """Made once: a registry with the base image, and one whole build of each side, which warms all caches."""

    def make() -> Contest:
        parts.needs("docker-registry", "buildah")
        store = bench.enter(parts.registry(bench.folder("registry")))
        reference = put_base(bench, store)
        pod = bentoml.Pod(bench.folder("pod"), store.host, reference, bench.kinds)
        made = Contest(bench, store, reference, bench.folder("cache"), pod, bench.models(4))
        parts.say("warming both sides' caches with one whole build each")
        ours(made, made.models[0], "ours/warm", made.cache)
        pod.build(made.models[0], f"{store.host}/theirs/warm:0")
        made.sizes = {"ours": store.size("ours/warm", "0"), "bentoml": store.size("theirs/warm", "0")}
        return made

    found = bench.part("contest", make)
    assert isinstance(found, Contest)
    return found


def put_base(bench: parts.Bench, registry: parts.Registry) -> str:
    """The base image in the registry, from where BentoML's build takes it."""
    reference = f"{registry.host}/base:1"
    storage = bench.folder("storage")
    env = parts.buildah_environment(storage, registry.host)
    try:
        image, _ = parts.run(["buildah", "pull", "--quiet", f"oci:{bench.layout}"], env=env)
        parts.run(["buildah", "push", "--quiet", image.strip(), f"docker://{reference}"], env=env)
    finally:
        parts.remove(storage)
    return reference


def ours(
    made: Contest,
    model: Path,
    repository: str,
    cache: Path,
    tag: int = 0,
    registry: parts.Registry | None = None,
    env: Mapping[str, str] | None = None,
) -> builder.Built:
    host = (registry or made.registry).host
    folder = made.bench.folder("build")
    return builder.build(
        folder, model, cache, made.bench.base, made.bench.kinds, push=f"{host}/{repository}:{tag}", env=env
    )


def _samples(number: int, built: builder.Built, theirs: tuple[float, Mapping[str, float]]) -> list[Sample]:
    parts.say(f"round {number + 1}: ours {built.seconds:.2f} s, BentoML {theirs[0]:.1f} s")
    return [
        Sample(number, "ours", "total", built.seconds, "s"),
        *(Sample(number, "ours", name, seconds, "s") for name, seconds in built.stages.items()),
        Sample(number, "bentoml", "total", theirs[0], "s"),
        *(Sample(number, "bentoml", name, seconds, "s") for name, seconds in theirs[1].items()),
    ]


def _ratio(samples: list[Sample]) -> Measured:
    mine, other = middle(samples, "ours", "total"), middle(samples, "bentoml", "total")
    return Measured(other / mine, {"ours_s": mine, "bentoml_s": other, "same": _CONFIG}, samples)


def warm(bench: parts.Bench) -> Measured:
    """Only the weights differ from what was built and pushed before; both sides have all their caches."""
    made = contest(bench)
    samples: list[Sample] = []
    for number in range(bench.rounds(3)):
        model = made.models[number + 1]
        built = ours(made, model, "ours/warm", made.cache, number + 1)
        theirs = made.pod.build(model, f"{made.registry.host}/theirs/warm:{number + 1}")
        samples += _samples(number, built, theirs)
    return _ratio(samples)


def fresh(bench: parts.Bench) -> Measured:
    """The same in a fresh build pod: no environments, layers, Bentos or packages on this machine.

    The registry still has what was pushed before, and each side finds there what it can. BentoML's build installs
    inside the image, without a package cache that would outlive it.
    """
    made = contest(bench)
    samples: list[Sample] = []
    started = time.monotonic()
    for number in range(bench.rounds(3)):
        if number == 2 and time.monotonic() - started > _LONG:
            break
        model = made.models[number + 1]
        place = bench.folder("fresh")
        built = ours(made, model, "ours/warm", place / "cache", 10 + number, env=_empty(place))
        pod = bentoml.Pod(place / "pod", made.registry.host, made.reference, bench.kinds)
        theirs = pod.build(model, f"{made.registry.host}/theirs/warm:{10 + number}")
        parts.remove(place)
        samples += _samples(number, built, theirs)
    return _ratio(samples)


def cold(bench: parts.Bench) -> Measured:
    """The first build of all: as `fresh`, and a registry that has nothing but the base image."""
    made = contest(bench)
    samples: list[Sample] = []
    started = time.monotonic()
    for number in range(bench.rounds(3)):
        if number == 2 and time.monotonic() - started > _LONG:
            break
        place = bench.folder("cold")
        with parts.registry(place / "registry") as empty:
            reference = put_base(bench, empty)
            built = ours(made, made.models[0], "ours/cold", place / "cache", 0, empty, _empty(place))
            theirs = bentoml.Pod(place / "pod", empty.host, reference, bench.kinds).build(
                made.models[0], f"{empty.host}/theirs/cold:0"
            )
        parts.remove(place)
        samples += _samples(number, built, theirs)
    return _ratio(samples)


def _empty(place: Path) -> dict[str, str]:
    """No package that was downloaded before."""
    return parts.environment(UV_CACHE_DIR=str(place / "packages"))


def size(bench: parts.Bench) -> Measured:
    """Bytes of the two images in the registry, compressed as each side does by default."""
    sizes = contest(bench).sizes
    samples = [Sample(0, side, "image", count, "bytes") for side, count in sizes.items()]
    detail = {"ours_mb": sizes["ours"] / 1e6, "bentoml_mb": sizes["bentoml"] / 1e6}
    return Measured(sizes["ours"] / sizes["bentoml"], detail, samples)


FIGURES: dict[Figure, Callable[[parts.Bench], Measured]] = {
    Figure(
        "build.weights_only_vs_bentoml_warm",
        "weights-only rebuild and push beside BentoML's build, containerize (buildah) and push; caches warm",
        "x",
        15,
        "higher",
    ): warm,
    Figure("build.weights_only_vs_bentoml_fresh", "the same, neither with a local cache", "x", 50, "higher"): fresh,
    Figure("build.cold_vs_bentoml", "cold build and push beside BentoML's", "x", 3.5, "higher"): cold,
    Figure(
        "image.size_vs_bentoml", "compressed image of a LightGBM model beside BentoML's, same base", "x", 0.45, "lower"
    ): size,
}
