"""From a search to the numbers a tree sees. Training and serving call the same functions, so they cannot drift apart.

The model file names its features and their order. A name tells where its value comes from:

    phrase_*, match_*, affinity   worked out here, from the phrase, the tags of a picture and the taste of a user
    user_NAME                     `user.NAME` of the request
    anything else                 the field of that name in each candidate

so a model trained on other columns is served without a change here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_WORD = re.compile(r"\w+")
_STOP = frozenset(("a", "an", "and", "at", "by", "in", "of", "on", "the", "with"))
_TASTE, _STYLE = "taste_", "style_"


@dataclass(frozen=True)
class Candidate:
    """One picture that might be shown. A value of None is a missing one."""

    id: str
    values: Mapping[str, float | None]
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Search:
    """One phrase, the user who typed it (nothing known: an empty mapping), and the pictures to order."""

    phrase: str
    candidates: Sequence[Candidate]
    user: Mapping[str, float | None] = field(default_factory=dict)


def words(text: str) -> tuple[str, ...]:
    """The words of a phrase that carry meaning: lower case, each once, in order.

    >>> words("Cute CAT in the snow")
    ('cute', 'cat', 'snow')
    """
    found = dict.fromkeys(_WORD.findall(text.casefold()))
    return tuple(word for word in found if word not in _STOP)


def _phrase_words(search: Search, asked: tuple[str, ...]) -> list[float]:
    return [float(len(asked))] * len(search.candidates)


def _match_words(search: Search, asked: tuple[str, ...]) -> list[float]:
    return [float(sum(word in candidate.tags for word in asked)) for candidate in search.candidates]


def _match_share(search: Search, asked: tuple[str, ...]) -> list[float]:
    return [count / max(1, len(asked)) for count in _match_words(search, asked)]


def _affinity(search: Search, asked: tuple[str, ...]) -> list[float]:
    taste = {
        name.removeprefix(_TASTE): value
        for name, value in search.user.items()
        if name.startswith(_TASTE) and value is not None
    }
    return [_weighted_taste(taste, candidate.values) for candidate in search.candidates]


def _weighted_taste(taste: Mapping[str, float], values: Mapping[str, float | None]) -> float:
    """Mean taste of the user, weighted by how much of each style the picture has; NaN if either is unknown."""
    total = weight = 0.0
    for name, liking in taste.items():
        style = values.get(_STYLE + name)
        if style is not None and style > 0:
            total += liking * style
            weight += style
    return total / weight if weight > 0 else float("nan")


COMPUTED: Mapping[str, Callable[[Search, tuple[str, ...]], list[float]]] = {
    "phrase_words": _phrase_words,
    "match_words": _match_words,
    "match_share": _match_share,
    "affinity": _affinity,
}
_USER = "user_"
_NEEDS_TAGS = frozenset(("match_words", "match_share"))


@dataclass(frozen=True)
class Columns:
    """Where each feature of a model comes from."""

    names: tuple[str, ...]

    @property
    def user(self) -> tuple[str, ...]:
        """Names of the fields of `user`, without prefix."""
        return tuple(name.removeprefix(_USER) for name in self.names if name.startswith(_USER))

    @property
    def candidate(self) -> tuple[str, ...]:
        """Names of the fields that every candidate has."""
        return tuple(name for name in self.names if name not in COMPUTED and not name.startswith(_USER))

    @property
    def tags(self) -> bool:
        """Whether the model looks at the tags of a picture."""
        return not _NEEDS_TAGS.isdisjoint(self.names)


def matrix(columns: Columns, search: Search) -> Floats:
    """Features of every candidate, shape (candidates, features), in the order of the model file; missing is NaN."""
    asked = words(search.phrase)
    rows = np.empty((len(search.candidates), len(columns.names)), dtype=np.float64)
    for index, name in enumerate(columns.names):
        if name in COMPUTED:
            rows[:, index] = COMPUTED[name](search, asked)
        elif name.startswith(_USER):
            rows[:, index] = _number(search.user.get(name.removeprefix(_USER)))
        else:
            rows[:, index] = [_number(candidate.values.get(name)) for candidate in search.candidates]
    return rows


def order(scores: Sequence[float] | Floats) -> list[int]:
    """Positions from best to worst; equal scores keep the order they came in.

    >>> order([0.5, 2.0, 0.5])
    [1, 0, 2]
    """
    return [int(index) for index in np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")]


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
