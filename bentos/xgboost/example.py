"""`python -m bentos.xgboost.example DIR`: a small price model with its sample and expected values, in seconds."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from bentos.serving import ModelFolder, write_model

CITIES = ["Busan", "Seoul", "Ulsan"]


def write(root: Path, seed: int = 0, file: str = "price.json") -> ModelFolder:
    """Train on made-up flats: the price follows area, city and floor. Writes a model folder; `file` may end in .ubj."""
    import numpy as np
    import pandas as pd
    import xgboost

    rng = np.random.default_rng(seed)
    rows = 2000
    flats = pd.DataFrame(
        {
            "area": rng.uniform(20, 150, rows).round(1),
            "city": pd.Categorical(rng.choice(CITIES, rows), categories=CITIES),
            "floor": rng.integers(1, 30, rows).astype(float),
        }
    )
    flats.loc[rng.random(rows) < 0.05, "floor"] = np.nan
    price = flats["area"] * np.where(flats["city"] == "Seoul", 14.0, 6.0) + 5 * flats["floor"].fillna(10)
    price += rng.normal(0, 20, rows)
    booster = xgboost.train(
        {"objective": "reg:squarederror", "max_depth": 4, "nthread": 1, "seed": seed},
        xgboost.DMatrix(flats, price, enable_categorical=True),
        num_boost_round=40,
    )
    head = flats.head(5)
    sample = {"inputs": head.astype(object).where(head.notna(), None).to_dict("records")}
    expected = {"outputs": booster.predict(xgboost.DMatrix(head, enable_categorical=True)).tolist()}
    form = "xgboost-ubj" if file.endswith(".ubj") else "xgboost-json"
    with TemporaryDirectory() as folder:
        path = Path(folder) / file
        booster.save_model(str(path))
        return write_model(root, kind="xgboost", format=form, files={file: path}, sample=sample, expected=expected)


if __name__ == "__main__":
    print(write(Path(sys.argv[1] if len(sys.argv) > 1 else "model")).root)
