"""`python -m bentos.lightgbm.example DIR`: a small churn model with its sample and expected values, in seconds."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from bentos.serving import ModelFolder, write_model

PLANS = ["basic", "pro", "team"]


def write(root: Path, seed: int = 0) -> ModelFolder:
    """Train on made-up customers: young ones on the basic plan who called support leave. Writes a model folder."""
    import lightgbm
    import numpy as np
    import pandas as pd

    rng = np.random.default_rng(seed)
    rows = 2000
    customers = pd.DataFrame(
        {
            "age": rng.integers(18, 80, rows),
            "plan": pd.Categorical(rng.choice(PLANS, rows), categories=PLANS),
            "calls": rng.poisson(2, rows).astype(float),
            "spend": rng.gamma(2.0, 20.0, rows).round(2),
        }
    )
    customers.loc[rng.random(rows) < 0.05, "spend"] = np.nan
    score = 0.8 * customers["calls"] - 0.05 * customers["age"] + 1.5 * (customers["plan"] == "basic") - 1
    left = (rng.random(rows) < 1 / (1 + np.exp(-score))).astype(int)
    booster = lightgbm.train(
        {"objective": "binary", "num_leaves": 15, "verbose": -1, "num_threads": 1, "deterministic": True, "seed": seed},
        lightgbm.Dataset(customers, left),
        num_boost_round=40,
    )
    head = customers.head(5)
    sample = {"inputs": head.astype(object).where(head.notna(), None).to_dict("records")}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "churn.txt"
        booster.save_model(str(path))
        expected = {"outputs": booster.predict(head, num_threads=1).tolist()}
        return write_model(
            root, kind="lightgbm", format="lightgbm-text", files={"churn.txt": path}, sample=sample, expected=expected
        )


if __name__ == "__main__":
    print(write(Path(sys.argv[1] if len(sys.argv) > 1 else "model")).root)
