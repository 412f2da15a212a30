"""`python -m bentos.sklearn.example DIR`: a small pipeline with its sample and expected values, in seconds."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from bentos.serving import ModelFolder, write_model


def write(root: Path, seed: int = 0) -> ModelFolder:
    """Tell made-up penguins apart: scaled and imputed numbers beside an encoded island. Writes a model folder."""
    import numpy as np
    import pandas as pd
    import skops.io
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    rng = np.random.default_rng(seed)
    rows = 1000
    species = rng.choice(["adelie", "chinstrap", "gentoo"], rows)
    bill = pd.Series(species).map({"adelie": 38.8, "chinstrap": 48.8, "gentoo": 47.5}) + rng.normal(0, 2.5, rows)
    mass = pd.Series(species).map({"adelie": 3.7, "chinstrap": 3.7, "gentoo": 5.1}) + rng.normal(0, 0.4, rows)
    islands = {"adelie": ["biscoe", "dream", "torgersen"], "chinstrap": ["dream"], "gentoo": ["biscoe"]}
    penguins = pd.DataFrame(
        {
            "bill": bill.round(1),
            "mass": mass.round(2),
            "island": pd.Series([rng.choice(islands[s]) for s in species], dtype=object),
        }
    )
    penguins.loc[rng.random(rows) < 0.05, "mass"] = np.nan
    pipeline = make_pipeline(
        ColumnTransformer(
            [
                ("numbers", make_pipeline(SimpleImputer(), StandardScaler()), ["bill", "mass"]),
                ("island", OneHotEncoder(), ["island"]),
            ]
        ),
        LogisticRegression(),
    ).fit(penguins, species)
    head = penguins.head(5)
    sample = {"inputs": head.astype(object).where(head.notna(), None).to_dict("records")}
    expected = {"outputs": pipeline.predict(head).tolist()}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "penguins.skops"
        skops.io.dump(pipeline, path)
        return write_model(
            root, kind="sklearn", format="skops", files={"penguins.skops": path}, sample=sample, expected=expected
        )


if __name__ == "__main__":
    print(write(Path(sys.argv[1] if len(sys.argv) > 1 else "model")).root)
