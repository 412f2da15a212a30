"""`python -m bentos.mlflow.example DIR`: a small model as MLflow saves it, with its sample and expected values."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from bentos.serving import ModelFolder, write_model

PLANS = ["basic", "pro", "team"]


def write(root: Path, seed: int = 0) -> ModelFolder:
    """Train on made-up customers and save with `mlflow.lightgbm.save_model` and a signature. Writes a model folder."""
    import lightgbm
    import mlflow.lightgbm
    import numpy as np
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, Schema, TensorSpec

    rng = np.random.default_rng(seed)
    rows = 2000
    customers = pd.DataFrame(
        {
            "age": rng.integers(18, 80, rows),
            "plan": pd.Categorical(rng.choice(PLANS, rows), categories=PLANS),
            "spend": rng.gamma(2.0, 20.0, rows).round(2),
        }
    )
    customers.loc[rng.random(rows) < 0.1, "spend"] = np.nan
    score = 0.05 * (40 - customers["age"]) + 1.5 * (customers["plan"] == "basic") - 0.02 * customers["spend"].fillna(40)
    left = (rng.random(rows) < 1 / (1 + np.exp(-score))).astype(int)
    booster = lightgbm.train(
        {"objective": "binary", "num_leaves": 15, "verbose": -1, "num_threads": 1, "deterministic": True, "seed": seed},
        lightgbm.Dataset(customers, left),
        num_boost_round=30,
    )
    head = customers.head(5)
    sample = {"inputs": head.astype(object).where(head.notna(), None).to_dict("records")}
    columns: list[ColSpec | TensorSpec] = [
        ColSpec("long", "age"),
        ColSpec("string", "plan"),
        ColSpec("double", "spend", required=False),
    ]
    with TemporaryDirectory() as scratch:
        folder = Path(scratch, "model")
        signature = ModelSignature(Schema(columns), Schema([ColSpec("double")]))
        # named, as MLflow would otherwise start a process to find them
        mlflow.lightgbm.save_model(booster, folder, signature=signature, pip_requirements=["lightgbm"])
        return write_model(
            root,
            kind="mlflow",
            format="mlflow",
            files={p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()},
            model="MLmodel",
            sample=sample,
            expected={"outputs": booster.predict(head, num_threads=1).tolist()},
        )


if __name__ == "__main__":
    print(write(Path(sys.argv[1] if len(sys.argv) > 1 else "model")).root)
