"""The comparison of selections as a table and as a plot."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bentos.cargo.rounds import METHODS, NAMES, Comparison, Result
from bentos.training.outcome import table

Floats = NDArray[np.float64]


def tables(found: Comparison) -> str:
    """Accuracy on tuesday and on monday, by method and budget: mean and standard deviation over the rounds."""
    head = ["chosen by", *(str(budget) for budget in found.budgets)]
    blank = [""] * (len(found.budgets) - 1)
    parts = []
    for day in ("tuesday", "monday"):
        rows: list[list[str | float]] = [
            ["before retraining", _percent([_of(found.before, day)]), *blank],
            ["monday alone", _percent([_of(result, day) for result in found.none]), *blank],
        ]
        for method in METHODS:
            values = getattr(found, day)
            rows.append([NAMES[method], *(_percent(values(method, budget)) for budget in found.budgets)])
        rows.append(["the whole pool", _percent([_of(result, day) for result in found.all]), *blank])
        parts.append(f"accuracy on held-out {day}, %, by pictures of tuesday that were labelled\n{table(head, rows)}")
    rows = []
    for method in METHODS[1:]:
        gains = [found.tuesday(method, budget) - found.tuesday("random", budget) for budget in found.budgets]
        rows.append([NAMES[method], *(_gain(each) for each in gains)])
    parts.append(f"gain over random on tuesday, points, ± standard error of the mean\n{table(head, rows)}")
    return "\n\n".join(parts)


def metrics(found: Comparison) -> dict[str, float]:
    """The means, by name."""
    result = {
        "accuracy_tuesday_before": found.before.tuesday,
        "accuracy_monday_before": found.before.monday,
        "accuracy_tuesday_monday_alone": float(np.mean([each.tuesday for each in found.none])),
        "accuracy_tuesday_whole_pool": float(np.mean([each.tuesday for each in found.all])),
    }
    for method in METHODS:
        for budget in found.budgets:
            result[f"accuracy_tuesday_{method}_{budget}"] = float(found.tuesday(method, budget).mean())
    for method in METHODS:
        for budget in reversed(found.budgets):
            result[f"accuracy_monday_{method}_{budget}"] = float(found.monday(method, budget).mean())
    return result


def plot(found: Comparison) -> bytes:
    """Both days beside each other, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, day in ((left, "tuesday"), (right, "monday")):
        axes.axhline(_of(found.before, day), color="0.4", linestyle=":", label="before retraining")
        for results, style, name in ((found.none, "--", "monday alone"), (found.all, "-.", "the whole pool")):
            axes.axhline(float(np.mean([_of(each, day) for each in results])), color="0.4", linestyle=style, label=name)
        for at, method in enumerate(METHODS):
            values = [getattr(found, day)(method, budget) for budget in found.budgets]
            places = [budget * 1.03 ** (at - 1.5) for budget in found.budgets]  # beside each other, not over
            axes.errorbar(
                places,
                [each.mean() for each in values],
                [each.std() for each in values],
                marker="o",
                markersize=4,
                capsize=2,
                label=NAMES[method],
            )
        axes.set_xscale("log")
        axes.set_xticks(found.budgets, [str(budget) for budget in found.budgets])
        axes.minorticks_off()
        axes.set_xlabel("pictures of tuesday that were labelled")
        axes.set_ylabel("accuracy")
        axes.set_title(f"held-out {day}")
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110, metadata={"Software": None})
    return stream.getvalue()


def _of(result: Result, day: str) -> float:
    return result.tuesday if day == "tuesday" else result.monday


def _percent(values: Sequence[float] | Floats) -> str:
    spread = f" ± {100 * np.std(values):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{spread}"


def _gain(differences: Floats) -> str:
    if len(differences) < 2:
        return f"{100 * differences.mean():+.1f}"
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    return f"{100 * differences.mean():+.1f} ± {100 * error:.1f}"
