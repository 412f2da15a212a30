"""Trains an embedding network and builds the index of a catalogue: `python -m bentos.image_search.train`.

What is reported is measured with the saved files, through the index, with pictures that the network has never seen on
either side: the catalogue is held out from the training as well as the pictures it is searched with.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bentos.image_search import catalogue, learning
from bentos.image_search.data import World, of_cifar10, shapes
from bentos.image_search.learning import Recipe
from bentos.image_search.searching import Search, png
from bentos.serving.model import ModelFolder, write_model
from bentos.serving.networks import Network
from bentos.training import cifar10, command
from bentos.training.command import positive
from bentos.training.gate import Gate
from bentos.training.keras_files import keras_bytes
from bentos.training.outcome import Outcome, Progress, table

GATE = ("precision_10", "higher")
TOLERANCE = 0.01
"""Precision that a new model may lose, three times the standard error over 10,000 held-out pictures."""
K = 10
_FULL = Recipe(widths=(32, 64, 128, 192), dimension=64, epochs=10, batch=128, rate=0.2)
_SMALL = Recipe(widths=(8, 16, 32, 32), dimension=16, epochs=8, batch=64, rate=0.2)
_CANDIDATES = 50
"""Held-out pictures among which the golden sample is looked for."""


@dataclass(frozen=True)
class Settings:
    """Of one training. Numbers of pictures, which must be there."""

    source: str = "auto"
    """Where CIFAR-10 comes from (cifar10.SOURCES), or `drawn`."""
    train: int = 40_000
    catalogue: int = 10_000
    held_out: int = 10_000
    seed: int = 7
    recipe: Recipe = _FULL

    @classmethod
    def small(cls, seed: int = 7) -> Settings:
        """Drawn shapes, and seconds: for a demonstration and for tests. Needs no network."""
        return cls("drawn", train=1200, catalogue=600, held_out=300, seed=seed, recipe=_SMALL)

    def world(self, progress: Progress) -> World:
        """Raises cifar10.DataError."""
        if self.source == "drawn":
            return shapes(self.train, self.catalogue, self.held_out, self.seed)
        return of_cifar10(cifar10.load(self.source, say=progress), self.train, self.catalogue, self.held_out)


def train(settings: Settings, progress: Progress) -> tuple[Outcome, str]:
    """The whole way from pictures to a model, and the table that says how good it is. Raises cifar10.DataError."""
    world = settings.world(progress)
    recipe = settings.recipe
    steps = recipe.epochs * (len(world.train) // recipe.batch)
    with progress.bar("training", steps) as advance:
        model = learning.learn(world.train, len(world.classes), recipe, settings.seed, advance)
    network = keras_bytes(model)
    with tempfile.TemporaryDirectory() as scratch:
        search = _indexed(network, world, Path(scratch), progress)
    progress(f"searching with {len(world.held_out)} held-out pictures")
    metrics = measure(search, world)
    sample, expected = search.golden()
    outcome = Outcome(
        kind="image_search",
        format="keras-v3",
        files={catalogue.NETWORK: network, **search.catalogue.files()},
        model=catalogue.NETWORK,
        sample=sample,
        expected=expected,
        parameters={
            "seed": settings.seed,
            "train": len(world.train),
            "catalogue": len(world.catalogue),
            "held_out": len(world.held_out),
            "epochs": recipe.epochs,
            "batch": recipe.batch,
            "rate": recipe.rate,
            "temperature": recipe.temperature,
            "dimension": recipe.dimension,
            "parameters": search.network.parameters,
            "connectivity": catalogue.CONNECTIVITY,
            "expansion_add": catalogue.EXPANSION_ADD,
            "expansion_search": int(search.catalogue.index.expansion_search),
            "loss": "normalised softmax",
        },
        metrics=metrics,
        dataset=world.name,
        dataset_digest=world.digest,
        plots={"precision.png": _bars(metrics, world), "neighbours.png": _neighbours(search, world)},
    )
    return outcome, report(metrics, world)


def evaluate(folder: ModelFolder, settings: Settings) -> dict[str, float]:
    """The metrics of a saved model on the held-out pictures of these settings, as its training logged them."""
    return measure(Search.load(folder), settings.world(Progress.start(quiet=True)))


def measure(search: Search, world: World) -> dict[str, float]:
    """Precision@10 through the index, over all and by class, beside chance and raw pixels; recall of the index.

    Precision@10 is the share of the ten nearest that are of the class of the picture searched with. Pictures of the
    catalogue that are not of this world (added later) have no class here, and are left out of the count.
    """
    labels = world.held_out.labels
    queries = search.network.run(world.held_out.pixels)
    keys = catalogue.nearest(search.catalogue.index, queries, K)
    by_id = dict(zip(world.catalogue.ids, world.catalogue.labels.tolist(), strict=True))
    classes = np.array([by_id.get(name, -1) for name in search.catalogue.ids])
    found = np.where(keys >= 0, classes[keys], -1)
    raw = world.catalogue.labels[_nearest_pixels(world)]
    shares = np.bincount(world.catalogue.labels, minlength=len(world.classes)) / len(world.catalogue)
    metrics = {
        "precision_10": _precision(found, labels),
        "precision_10_random": float(shares[labels].mean()),
        "precision_10_raw_pixels": _precision(raw, labels),
        "recall_10": catalogue.recall(search.catalogue.index, search.catalogue.vectors(), queries),
    }
    for number, name in enumerate(world.classes):
        own = labels == number
        metrics[f"precision_10_{name}"] = _precision(found[own], labels[own])
        metrics[f"precision_10_raw_pixels_{name}"] = _precision(raw[own], labels[own])
        metrics[f"precision_10_random_{name}"] = float(shares[number])
    return metrics


def report(metrics: dict[str, float], world: World) -> str:
    """The table of a training."""
    ways = ("_random", "_raw_pixels", "")
    rows: list[list[str | float]] = [
        [name, *(metrics[f"precision_10{way}_{name}"] for way in ways)] for name in world.classes
    ]
    rows.append(["all", *(metrics[f"precision_10{way}"] for way in ways)])
    head = [f"precision@10, {len(world.held_out)} held-out pictures", "random", "raw pixels", "network"]
    return (
        table(head, rows, 3)
        + f"\n\nrecall of the index beside exact search, k = {K}: {metrics['recall_10']:.4f} "
        + f"({len(world.catalogue)} pictures)"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bentos.image_search.train",
        description="Train an embedding network of pictures, build the index of a catalogue with it, and compare what "
        "it finds on held-out pictures with chance and with raw pixels. The result is a model folder, ready to upload.",
        epilog="Example: python -m bentos.image_search.train --small --register http://localhost:8000",
    )
    cifar10.add_option(parser)
    parser.add_argument("--seed", type=int, default=7, help="same seed, same data, same model files (default 7)")
    parser.add_argument("--epochs", type=positive, help="times that each picture is seen (default 10; 8 with --small)")
    parser.add_argument("--small", action="store_true", help="drawn shapes and a few seconds, for a first look")
    command.add_options(parser, Path(__file__).parent / "model")
    options = parser.parse_args(arguments)
    settings = Settings.small(options.seed) if options.small else Settings(seed=options.seed)
    if options.data:
        settings = replace(settings, source=options.data)
    if options.epochs:
        settings = replace(settings, recipe=replace(settings.recipe, epochs=options.epochs))
    progress = Progress.start(options.quiet)
    try:
        outcome, shown = train(settings, progress)
    except cifar10.DataError as error:
        print(error, file=sys.stderr)
        return 2
    print(shown)
    gate = Gate(*GATE, TOLERANCE, lambda folder: evaluate(folder, settings))
    return command.finish(outcome, options, progress, gate)


def _indexed(network: bytes, world: World, scratch: Path, progress: Progress) -> Search:
    """The saved files, read as a service reads them. Their sample is a held-out picture with a clear answer."""
    (scratch / catalogue.NETWORK).write_bytes(network)
    loaded = Network.load(scratch / catalogue.NETWORK)
    vectors = dict(zip(world.catalogue.ids, loaded.run(world.catalogue.pixels), strict=True))
    few = world.held_out.pixels[:_CANDIDATES]
    made = catalogue.build(vectors, catalogue.digest(network), png(few[0]), progress)
    search = Search(loaded, made)
    clear = [search.clear(vector) for vector in loaded.run(few)]
    made = replace(made, sample=png(few[int(np.argmax(clear))]))
    files = {catalogue.NETWORK: network, **made.files()}
    return Search.load(write_model(scratch / "model", kind="image_search", format="keras-v3", files=files))


def _precision(found: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """Share of the found pictures of known class that are of the class searched for."""
    known = found >= 0
    return float(((found == labels[:, None]) & known).sum() / max(1, known.sum()))


def _nearest_pixels(world: World) -> NDArray[np.int64]:
    """Positions of the ten pictures of the catalogue whose pixels differ least (sum of squares), [held-out, 10]."""
    known = world.catalogue.pixels.reshape(len(world.catalogue), -1).astype(np.float32) / 255
    squares = (known * known).sum(axis=1)
    rows = []
    for start in range(0, len(world.held_out), 500):
        asked = world.held_out.pixels[start : start + 500].reshape(-1, known.shape[1]).astype(np.float32) / 255
        rows.append(np.argpartition(squares - 2 * asked @ known.T, K - 1, axis=1)[:, :K])
    return np.concatenate(rows)


def _bars(metrics: dict[str, float], world: World) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(world.classes))
    for shift, which, label in ((-0.2, "raw_pixels_", "raw pixels"), (0.2, "", "network")):
        values = [metrics[f"precision_10_{which}{name}"] for name in world.classes]
        axes.bar(places + shift, values, 0.4, label=label)
    axes.axhline(metrics["precision_10_random"], color="grey", linestyle="--", label="random")
    axes.set_xticks(places, world.classes, rotation=30)
    axes.set_ylabel("precision@10")
    axes.set_ylim(0, 1)
    axes.legend(loc="upper right")
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=100)
    return target.getvalue()


def _neighbours(search: Search, world: World) -> bytes:
    """Twelve held-out pictures, each in front of the ten that are found for it."""
    shown = world.held_out.pixels[:12]
    known = dict(zip(world.catalogue.ids, world.catalogue.pixels, strict=True))
    blank = np.full((shown.shape[1], shown.shape[1] // 4, 3), 255, np.uint8)
    rows = []
    for picture, vector in zip(shown, search.network.run(shown), strict=True):
        found = [known[match.id] for match in search.of_picture(vector, K)]
        rows.append(np.concatenate([picture, blank, *found], axis=1))
    return png(np.concatenate(rows).repeat(2, axis=0).repeat(2, axis=1))


if __name__ == "__main__":
    raise SystemExit(main())
