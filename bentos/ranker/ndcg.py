"""Normalised discounted cumulative gain, the usual measure of a ranking (Järvelin and Kekäläinen, TOIS 2002)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def ndcg(grades: Ints, scores: Floats, k: int = 10) -> Floats:
    """NDCG@k of each search; `grades` and `scores` are (n, candidates). Gain 2^grade − 1, discount log2(rank + 1).

    Equal scores keep the order of the candidates. A search without any relevant candidate has no NDCG: NaN.
    """
    best = _dcg(np.sort(grades, axis=1)[:, ::-1], k)
    order = np.argsort(-scores, axis=1, kind="stable")
    gained = _dcg(np.take_along_axis(grades, order, axis=1), k)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(best > 0, gained / best, np.nan))


def mean_ndcg(grades: Ints, scores: Floats, k: int = 10) -> float:
    """Mean NDCG@k over the searches that have one."""
    return float(np.nanmean(ndcg(grades, scores, k)))


def _dcg(grades: Ints, k: int) -> Floats:
    top = grades[:, :k]
    return np.asarray(((np.exp2(top) - 1.0) / np.log2(np.arange(2, top.shape[1] + 2))).sum(axis=1))
