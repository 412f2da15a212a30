"""Trains a ranker of animal pictures on simulated searches and clicks: `python -m bentos.ranker.train`.

Both variants see only what a service would have: features and biased clicks. The bias of the place is taken out by
inverse propensity weights (bentos.ranker.clicks says how the propensities are estimated).

*lambdamart* (Burges, MSR-TR-2010-82) follows Joachims et al. (WSDM 2017) and Agarwal et al. (SIGIR 2019): each click
becomes a list of its own, in which the clicked picture is the only relevant one and which weighs 1 / examination of the
clicked place. The NDCG of a list with one relevant picture is its discounted gain, so the sum over the lists is an
unbiased estimate (up to the floor of the weights) of the gain that the order would earn were every place looked at.

*regression* estimates the attractiveness itself: the label of a picture is click / examination, whose mean is its
attractiveness. The weight is the examination, as the variance of a label grows with its inverse. The loss is Poisson's,
as labels are rare and never negative.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
from numpy.typing import NDArray

from bentos.ranker import clicks, data
from bentos.ranker.features import Columns, Search, matrix
from bentos.ranker.ndcg import mean_ndcg
from bentos.ranker.ranking import Ranker
from bentos.serving.model import ModelFolder
from bentos.training import command, plots
from bentos.training.command import positive
from bentos.training.gate import Gate
from bentos.training.outcome import Outcome, Progress, table

Floats = NDArray[np.float64]
VARIANTS = ("lambdamart", "regression")
_WORDS = {"lambdamart": "LambdaMART, debiased clicks", "regression": "regression, debiased clicks"}
FLOOR = 0.05
"""Least examination: no click weighs more than 20."""
GATE = ("ndcg_10", "higher")
TOLERANCE = 0.005
"""NDCG that a new model may lose beside the live one before it is held back."""


@dataclass(frozen=True)
class Settings:
    """Of one training. `queries`: searches with training clicks; the history has ten times as many."""

    queries: int = 20_000
    seed: int = 7
    variant: str = "lambdamart"
    rounds: int = 300
    learning_rate: float = 0.05
    leaves: int = 7
    min_leaf: int = 500
    threads: int = 1
    """More are faster on a machine with nothing else to do, and many times slower on a busy one."""

    @classmethod
    def small(cls, seed: int = 7, variant: str = "lambdamart") -> Settings:
        """Seconds instead of a minute: for a demonstration and for tests."""
        return cls(queries=3000, seed=seed, variant=variant, rounds=120, learning_rate=0.08, min_leaf=150)


@dataclass(frozen=True)
class Rows:
    """What a booster is trained on; `group` is the length of each list, or None for rows of their own."""

    features: Floats
    label: Floats
    weight: Floats
    group: NDArray[np.int64] | None


@dataclass(frozen=True)
class Prepared:
    """A world as a service sees it: features by search, and how much each place is looked at."""

    world: data.World
    columns: Columns
    looked: Floats  # (PLACES,)
    rate: Floats  # by picture: debiased click-through rate
    impressions: NDArray[np.int64]
    held_out: Floats  # (n, PLACES, features)
    held_out_searches: Sequence[Search]

    def training(self) -> Floats:
        """Features of the searches to train on, (n, PLACES, features)."""
        searches = data.as_searches(self.world, self.world.train, self.rate, self.impressions)
        return _stack(self.columns, searches)


def prepare(world: data.World, columns: Columns) -> Prepared:
    """Estimates the examination and the debiased rates from the history, then works out the held-out features."""
    looked = clicks.examination(world.history_log, FLOOR)
    rate, impressions = clicks.debiased_rate(
        world.history_log, world.history.pictures, looked, len(world.pictures.animal)
    )
    held_out = data.as_searches(world, world.held_out, rate, impressions)
    return Prepared(world, columns, looked, rate, impressions, _stack(columns, held_out), held_out)


def click_lists(features: Floats, log: clicks.Log, looked: Floats) -> Rows:
    """One list a click: the clicked candidate is relevant, the list weighs 1 / `looked` of its place."""
    search, place = np.nonzero(log.clicked)
    places = features.shape[1]
    label = np.zeros((len(search), places))
    label[np.arange(len(search)), log.shown[search, place]] = 1.0
    return Rows(
        features=features[search].reshape(-1, features.shape[2]),
        label=label.ravel(),
        weight=np.repeat(1.0 / looked[place], places),
        group=np.full(len(search), places, dtype=np.int64),
    )


def debiased_labels(features: Floats, log: clicks.Log, looked: Floats) -> Rows:
    """One row an impression: label click / `looked`, weight `looked`."""
    place = np.argsort(log.shown, axis=1)  # by candidate: where it stood
    weight = looked[place]
    label = np.take_along_axis(log.clicked, place, axis=1) / weight
    return Rows(features.reshape(-1, features.shape[2]), label.ravel(), weight.ravel(), None)


def fit(rows: Rows, names: Sequence[str], settings: Settings, progress: Progress, what: str) -> lgb.Booster:
    """Trains a booster. The same rows and settings give the same bytes."""
    parameters: dict[str, Any] = {
        "learning_rate": settings.learning_rate,
        "num_leaves": settings.leaves,
        "min_data_in_leaf": settings.min_leaf,
        "lambda_l2": 1.0,
        "feature_fraction": 0.8,
        "seed": settings.seed,
        "num_threads": settings.threads,
        "deterministic": True,
        "force_row_wise": True,
        "verbosity": -1,
    }
    if rows.group is None:
        parameters |= {"objective": "poisson"}
    else:
        # The norm would undo the weights of the lists, as it scales each list to the same size.
        parameters |= {
            "objective": "lambdarank",
            "lambdarank_norm": False,
            "lambdarank_truncation_level": data.PLACES,
        }
    dataset = lgb.Dataset(
        rows.features, rows.label, weight=rows.weight, group=rows.group, feature_name=list(names), free_raw_data=True
    )
    with progress.rounds(what, settings.rounds) as report:
        return lgb.train(parameters, dataset, settings.rounds, callbacks=[report])


def train(settings: Settings, progress: Progress) -> tuple[Outcome, str]:
    """The whole way from a seed to a model, and the table that says how good it is."""
    progress(f"simulating {settings.queries * 11} searches and their clicks")
    prepared = prepare(data.make(settings.queries, settings.seed), Columns(data.FEATURES))
    world, names, features = prepared.world, prepared.columns.names, prepared.training()
    progress(f"{world.train_log.clicked.sum()} training clicks; examination {_few(prepared.looked)}")
    blind = np.ones(data.PLACES)
    boosters: dict[str, lgb.Booster] = {}
    for variant, make in (("lambdamart", click_lists), ("regression", debiased_labels)):
        own = replace(settings, variant=variant)
        boosters[variant] = fit(make(features, world.train_log, prepared.looked), names, own, progress, variant)
        if variant == settings.variant:  # what the same learner makes of clicks as they are
            raw = make(features, world.train_log, blind)
            boosters["biased"] = fit(raw, names, own, progress, f"{variant}, raw clicks")
    flat = features.reshape(-1, len(names))
    lists = np.full(len(features), data.PLACES, dtype=np.int64)
    truth = Rows(flat, world.train.grades.ravel().astype(np.float64), np.ones(len(flat)), lists)
    boosters["told"] = fit(truth, names, settings, progress, "told the true grades")

    metrics = compare(prepared, boosters, settings)
    ranker = Ranker(lgb.Booster(model_str=boosters[settings.variant].model_to_string()))
    sample = ranker.body(prepared.held_out_searches[0])
    expected = ranker.answer(sample)
    outcome = Outcome(
        kind="ranker",
        format="lightgbm-text",
        files={"ranker.txt": boosters[settings.variant].model_to_string().encode()},
        sample=sample,
        expected=expected,
        parameters={
            "variant": settings.variant,
            "queries": settings.queries,
            "seed": settings.seed,
            "rounds": settings.rounds,
            "learning_rate": settings.learning_rate,
            "num_leaves": settings.leaves,
            "min_data_in_leaf": settings.min_leaf,
            "examination_floor": FLOOR,
            "debiasing": "swap interventions, inverse propensity weights",
        },
        metrics=metrics,
        dataset="simulated picture searches",
        dataset_digest=world.digest,
    )
    return outcome, report(metrics, settings, len(world.held_out.user))


def compare(prepared: Prepared, boosters: dict[str, lgb.Booster], settings: Settings) -> dict[str, float]:
    """What `measure` says of the model that is kept, and the NDCG@10 of the others beside it."""
    grades = prepared.world.held_out.grades
    own = boosters[settings.variant]
    others = {
        "ndcg_10_biased_clicks": "biased",
        "ndcg_10_lambdamart": "lambdamart",
        "ndcg_10_regression": "regression",
        "ndcg_10_told_the_grades": "told",
    }
    return measure(prepared, own, settings) | {
        metric: mean_ndcg(grades, _scores(prepared, boosters[name], settings)) for metric, name in others.items()
    }


def measure(prepared: Prepared, booster: lgb.Booster, settings: Settings) -> dict[str, float]:
    """NDCG@10 on the held-out searches, by the true grades; and how far the scores agree with the true utility."""
    searches = prepared.world.held_out
    grades = searches.grades
    scores = _scores(prepared, booster, settings)
    rng = np.random.default_rng(settings.seed)
    shuffles = [mean_ndcg(grades, rng.random(grades.shape)) for _ in range(20)]
    return {
        "ndcg_10": mean_ndcg(grades, scores),
        "ndcg_10_random": float(np.mean(shuffles)),
        "ndcg_10_popularity": mean_ndcg(grades, data.popularity(prepared.world, searches)),
        "ndcg_10_similarity": mean_ndcg(grades, searches.similarity),
        "ndcg_10_oracle": mean_ndcg(grades, searches.utility),
        "spearman_utility": _spearman(scores, searches.utility),
        "examination_error": float(np.abs(np.log(prepared.looked / np.maximum(data.EXAMINATION, FLOOR))).mean()),
    }


def evaluate(folder: ModelFolder, settings: Settings) -> dict[str, float]:
    """The metrics of a saved model on the held-out searches of these settings, as its training logged them."""
    ranker = Ranker.load(folder.path())
    prepared = prepare(data.make(settings.queries, settings.seed), ranker.columns)
    return measure(prepared, ranker.booster, settings)


def orders(metrics: Mapping[str, float], settings: Settings) -> dict[str, float]:
    """NDCG@10 by what made the order, in words."""
    return {
        "random order": metrics["ndcg_10_random"],
        "by popularity (likes)": metrics["ndcg_10_popularity"],
        "by similarity alone": metrics["ndcg_10_similarity"],
        f"{settings.variant} on raw clicks (biased)": metrics["ndcg_10_biased_clicks"],
        _WORDS["lambdamart"]: metrics["ndcg_10_lambdamart"],
        _WORDS["regression"]: metrics["ndcg_10_regression"],
        "LambdaMART told the true grades": metrics["ndcg_10_told_the_grades"],
        "the true relevance function": metrics["ndcg_10_oracle"],
    }


def report(metrics: dict[str, float], settings: Settings, searches: int) -> str:
    """The table of a training."""
    rows: list[list[str | float]] = [[name, value] for name, value in orders(metrics, settings).items()]
    return (
        table([f"order ({searches} held-out searches, unseen phrases)", "NDCG@10"], rows)
        + f"\n\nrank correlation of the {settings.variant} scores with the true utility, mean over searches: "
        + f"{metrics['spearman_utility']:.3f}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bentos.ranker.train",
        description="Train a ranker of animal pictures on simulated searches and clicks, and compare it on held-out "
        "searches with popularity, random order and the true relevance. The result is a model folder, ready to upload.",
        epilog="Example: python -m bentos.ranker.train --small --register http://localhost:8000",
    )
    parser.add_argument("--queries", type=positive, help="training searches (default 20000; 3000 with --small)")
    parser.add_argument("--seed", type=int, default=7, help="same seed, same data, same model file (default 7)")
    parser.add_argument(
        "--variant", choices=VARIANTS, default="lambdamart", help="which model to keep (default lambdamart)"
    )
    parser.add_argument("--rounds", type=positive, help="trees (default 300; 120 with --small)")
    parser.add_argument("--threads", type=positive, default=1, help="for LightGBM, on an idle machine (default 1)")
    parser.add_argument("--small", action="store_true", help="a few seconds, for a first look")
    command.add_options(parser, Path(__file__).parent / "model")
    options = parser.parse_args(arguments)
    settings = Settings(seed=options.seed, variant=options.variant)
    if options.small:
        settings = Settings.small(options.seed, options.variant)
    settings = replace(
        settings,
        queries=options.queries or settings.queries,
        rounds=options.rounds or settings.rounds,
        threads=options.threads,
    )
    progress = Progress.start(options.quiet)
    outcome, shown = train(settings, progress)
    print(shown)
    if not options.no_mlflow:
        picture = plots.bars(orders(outcome.metrics, settings), "NDCG@10, held-out searches", _WORDS[settings.variant])
        outcome = replace(outcome, plots={"ndcg_10.png": picture})
    gate = Gate(*GATE, TOLERANCE, lambda folder: evaluate(folder, settings))
    return command.finish(outcome, options, progress, gate)


def _stack(columns: Columns, searches: Sequence[Search]) -> Floats:
    return np.stack([matrix(columns, search) for search in searches])


def _scores(prepared: Prepared, booster: lgb.Booster, settings: Settings) -> Floats:
    """By held-out search and candidate."""
    flat = prepared.held_out.reshape(-1, prepared.held_out.shape[2])
    found = np.asarray(booster.predict(flat, num_threads=settings.threads), dtype=np.float64)
    return found.reshape(prepared.held_out.shape[:2])


def _spearman(scores: Floats, utility: Floats) -> float:
    """Mean over searches of the rank correlation (no ties in the utility; those in the scores by order)."""
    a, b = (np.argsort(np.argsort(x, axis=1, kind="stable"), axis=1).astype(np.float64) for x in (scores, utility))
    n = a.shape[1]
    return float(np.mean(1.0 - 6.0 * ((a - b) ** 2).sum(axis=1) / (n * (n * n - 1))))


def _few(values: Floats) -> str:
    return ", ".join(f"{value:.2f}" for value in values[:5]) + " …"


if __name__ == "__main__":
    raise SystemExit(main())
