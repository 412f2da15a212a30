"""Pictures of results, for the plots of a run."""

from __future__ import annotations

import io
from collections.abc import Mapping


def bars(values: Mapping[str, float], label: str, own: str) -> bytes:
    """A PNG with a bar for each value, in their order from above, and the bar `own` in a colour of its own."""
    from matplotlib.figure import Figure  # takes a second, and most runs of tests need none

    figure = Figure(figsize=(7, 0.6 + 0.35 * len(values)), layout="constrained")
    axes = figure.subplots()
    names = list(values)[::-1]
    drawn = axes.barh(names, [values[name] for name in names], color=["C0" if name == own else "0.7" for name in names])
    axes.bar_label(drawn, fmt="%.3f", padding=3)
    axes.set_xlabel(label)
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()
