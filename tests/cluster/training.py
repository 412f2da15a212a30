"""Small models for tests of a cluster."""

from __future__ import annotations

from pathlib import Path

from tests.k8s.installation import Trained

_COLUMNS = ["age", "income", "visits"]


def trained(file: Path, seed: int) -> Trained:
    """A LightGBM model, written to `file`. All have one schema and are asked for the same rows; the answers differ."""
    import lightgbm
    import numpy as np

    table = np.random.default_rng(seed).normal(size=(200, 3))
    data = lightgbm.Dataset(table, (table[:, seed % 3] > 0).astype(float), feature_name=_COLUMNS)
    settings = {"objective": "binary", "verbose": -1, "seed": seed, "num_leaves": 7, "num_threads": 1}
    booster = lightgbm.train(settings, data, 20)
    booster.save_model(file)
    rows = np.random.default_rng(7).normal(size=(5, 3))
    named = [dict(zip(_COLUMNS, row, strict=True)) for row in rows.tolist()]
    return Trained(file, named, np.asarray(booster.predict(rows)).tolist())
