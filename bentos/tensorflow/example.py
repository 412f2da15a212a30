"""`python -m bentos.tensorflow.example DIR`: a small Keras model with its sample and expected values, in seconds."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from bentos.serving import ModelFolder, write_model
from bentos.serving.networks import tensorflow

PLANS = ["basic", "pro", "team"]


def write(root: Path, seed: int = 0) -> ModelFolder:
    """Train on made-up customers, numbers beside a plan as text, for two answers. Writes a model folder."""
    tensorflow()
    import keras
    import numpy as np

    rng = np.random.default_rng(seed)
    keras.utils.set_random_seed(seed)
    rows = 512
    numbers = rng.normal(0, 1, (rows, 3)).round(2)
    plans = rng.choice(PLANS, rows)
    score = 2 * numbers[:, 0] - numbers[:, 1] + 1.5 * (plans == "basic")
    leaves = (rng.random(rows) < 1 / (1 + np.exp(-score))).astype(np.float32)
    spends = (10 + 3 * numbers[:, 2] + 5 * (plans == "team")).astype(np.float32)

    usage = keras.Input((3,), name="usage")
    plan = keras.Input((1,), name="plan", dtype="string")
    coded = keras.layers.StringLookup(vocabulary=PLANS, output_mode="one_hot", name="coded")(plan)
    hidden = keras.layers.Dense(16, activation="relu")(keras.layers.Concatenate()([usage, coded]))
    model = keras.Model(
        [usage, plan],
        {
            "leaves": keras.layers.Dense(1, activation="sigmoid", name="leaves")(hidden),
            "spends": keras.layers.Dense(1, name="spends")(hidden),
        },
    )
    losses = {"leaves": "binary_crossentropy", "spends": "mse"}
    model.compile(keras.optimizers.Adam(0.01), losses, jit_compile=False)  # to compile takes longer than to train
    texts = keras.ops.convert_to_tensor(plans.reshape(-1, 1).tolist(), dtype="string")
    model.fit([numbers, texts], {"leaves": leaves, "spends": spends}, epochs=5, batch_size=64, verbose=0)

    answers = model([keras.ops.convert_to_tensor(numbers[:5], dtype="float32"), texts[:5]], training=False)
    sample = {"inputs": [{"usage": numbers[i].tolist(), "plan": str(plans[i])} for i in range(5)]}
    expected = {"outputs": [{name: answers[name][i].numpy().tolist() for name in sorted(answers)} for i in range(5)]}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "customers.keras"
        model.save(path)
        return write_model(
            root,
            kind="tensorflow",
            format="keras-v3",
            files={"customers.keras": path},
            sample=sample,
            expected=expected,
        )


if __name__ == "__main__":
    print(write(Path(sys.argv[1] if len(sys.argv) > 1 else "model")).root)
