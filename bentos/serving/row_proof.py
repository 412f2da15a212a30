"""Finds out at start whether a model answers a row alike alone and among other rows, and so what may share a call.

A model whose answers depend on their neighbours is asked row by row: its answer to a row is what it gives for that row
alone. The trials here refute; they do not prove. Kinds that can look into a model (bentos/serving/row_flow.py) ask for
both.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

RTOL = 1e-5
"""Largest difference that counts as rounding, relative to the largest number in the answer. Kernels for other counts of
rows may add up in another order: 1e-5 is 84 steps of float32. ONNX Runtime's products of matrices were bit for bit the
same from 1 to 64 rows; those of other libraries need not be. A model that rounds more is asked row by row."""
_EPSILONS = 16
"""The same in steps of the output's own type, where that is coarser (float16: 1.6e-2)."""
MOST = 64
"""Rows in the largest trial."""
TRIAL_SECONDS = 2.0
"""Bound of the trials' time: slow models are tried with fewer rows."""

_logger = logging.getLogger("ekiben.serving")

Run = Callable[[list[Any]], Sequence[Any]]
Counts = Callable[[list[Any]], Sequence[int]]


class Miscounted(Exception):
    """An answer to some rows does not have one entry for each of them."""

    def __init__(self, count: int, rows: int) -> None:
        super().__init__(f"the model answered {max(count, 0)} values for {rows} row{'s' if rows > 1 else ''}")


class Sharing(StrEnum):
    """Which rows go into one call of a model."""

    REQUESTS = "requests"
    """Those of several requests."""
    REQUEST = "request"
    """Those of one request."""
    ROW = "row"
    """Each row alone."""


@dataclass(frozen=True)
class Verdict:
    """`refuted` says how a trial failed; None: each answer was the same alone, together and in another order."""

    refuted: str | None = None
    random: bool = False
    """The same row alone got two answers: the model draws at random, or remembers."""
    miscounts: bool = False
    """Not even a row alone got one answer."""

    @property
    def holds(self) -> bool:
        return self.refuted is None


def sharing(most: Sharing, verdict: Verdict, proven: bool = True) -> Sharing:
    """What may share a call: `most` where the trials held and the model's structure says the same."""
    return most if verdict.holds and proven else Sharing.ROW


def details(chosen: Sharing, verdict: Verdict, proven: bool = True, separable: bool = True) -> dict[str, Any]:
    """For /metadata and the log. `separable`: the model takes several rows in one call."""
    about: dict[str, Any] = {"rows_share_a_call": chosen.value}
    if chosen is Sharing.ROW:
        if not separable:
            why = "the model takes one row in a call"
        else:
            why = verdict.refuted or "the model's structure does not show that its answers to rows are independent"
        about["why_alone"] = why
        _logger.info("rows are predicted one by one: %s", why)
    if verdict.random:
        about["random"] = True
        _logger.warning("the model answers the same row differently from call to call")
    return about


def tried(run: Run, rows: Sequence[Any], extremes: Sequence[Any] = (), most: int = MOST) -> Verdict:
    """Compare the answers to `rows` alone with those among one another and beside `extremes`.

    `run` takes rows and gives one answer each, in one call of the model. Rows that the model refuses alone are left
    out; two that differ must remain. `extremes` are neighbours whose own answers do not count: very large values, or
    NaN, which no sum, mean or maximum over several rows can hide.
    """
    started = time.monotonic()
    alone: list[tuple[Any, Any]] = []
    for row in rows:
        answer = _attempt(run, [row])
        if isinstance(answer, Miscounted):
            return Verdict(str(answer), miscounts=True)
        if isinstance(answer, Exception):
            continue
        if len(answer) != 1:
            return Verdict(str(Miscounted(len(answer), 1)), miscounts=True)
        alone.append((row, answer[0]))
    if len(alone) < 2:
        return Verdict("fewer than two rows were found that it takes: send a sample with several rows")
    each = (time.monotonic() - started) / len(rows)
    scales = _scales([answer for _, answer in alone])
    again = _attempt(run, [alone[0][0]])
    if isinstance(again, Exception) or len(again) != 1 or differs(alone[0][1], again[0], scales):
        return Verdict("the same row got two different answers", random=True)
    strangers = [row for row in extremes if not isinstance(_attempt(run, [row]), Exception)]
    spent = 0.0
    for trial in _trials(len(alone), len(strangers), most):
        spent += each * len(trial)
        if spent > TRIAL_SECONDS and len(trial) > 3:
            continue
        together = [alone[at][0] if at < len(alone) else strangers[at - len(alone)] for at in trial]
        answers = _attempt(run, together)
        if isinstance(answers, Miscounted):
            return Verdict(str(answers))
        if isinstance(answers, Exception):
            return Verdict(f"{len(together)} rows that it answers alone were refused together: {str(answers)[:200]}")
        if len(answers) != len(together):
            return Verdict(str(Miscounted(len(answers), len(together))))
        for at, answer in zip(trial, answers, strict=True):
            if at < len(alone) and differs(alone[at][1], answer, scales):
                return Verdict(f"a row got another answer among {len(together)} rows than alone")
    return Verdict()


def split(said: Sequence[bool | None], counts: Counts, rows: Sequence[Any], together: bool) -> tuple[bool, ...]:
    """For each output whether its first axis, of one entry in a call of one row, is that of the rows.

    `said`: what the model says of it, None where it does not say. `counts` gives the entries of each output, -1 of one
    without axes. The trials decide once and for all, so that the nesting of an answer never changes; a count that
    differs later is an error.
    """
    seen: list[Sequence[bool]] = []
    for number in (1, 2) if together else (1,):
        for at in range(len(rows)):
            some = [rows[(at + more) % len(rows)] for more in range(number)]
            found = _attempt(counts, some)
            if not isinstance(found, Exception):
                seen.append([count == number for count in found])
    return tuple(known is not False and all(each[at] for each in seen) for at, known in enumerate(said))


def _attempt(run: Callable[[list[Any]], Sequence[Any]], rows: list[Any]) -> Sequence[Any] | Exception:
    try:
        return run(rows)
    except Exception as error:  # whatever the model's library raises, for a row that the model does not take
        return error


def _trials(rows: int, strangers: int, most: int) -> Iterator[list[int]]:
    """Which rows go together, by number; those of strangers come after those of rows. The shortest come first."""
    order = list(range(rows))
    for a, b in pairwise(order):
        yield [a, b]
        yield [b, a]
    others = list(range(rows, rows + strangers))
    for other in others:
        yield [0, other]
        yield [other, 1]
        yield [0, other, 1]
    for count in range(3, rows):
        yield order[:count]
    yield order
    yield order[::-1]
    yield [0, 0, 0, 1, 1]
    for other in others:
        yield [*order, other]
    if most > rows:
        yield [at % rows for at in range(most)]
        pool = order + others
        yield [pool[at % len(pool)] for at in range(min(most, 17))]


def differs(left: Any, right: Any, scales: Mapping[str, float]) -> bool:
    """Whether two answers to a row differ by more than rounding. `scales`: the largest number at each place."""
    first, second = dict(_parts(left)), dict(_parts(right))
    if first.keys() != second.keys():
        return True
    return any(_differ(value, second[path], scales.get(path, 0.0)) for path, value in first.items())


def _differ(left: Any, right: Any, scale: float) -> bool:
    import numpy as np

    if left.shape != right.shape:
        return True
    if left.dtype.kind not in "fc" and right.dtype.kind not in "fc":
        return not bool((left == right).all())
    given = [each.dtype for each in (left, right) if each.dtype.kind in "fc"]
    relative = max(RTOL, *(_EPSILONS * float(np.finfo(dtype).eps) for dtype in given))
    one, other = np.asarray(left, np.complex128), np.asarray(right, np.complex128)
    finite = np.isfinite(one)
    if not bool((finite == np.isfinite(other)).all()):
        return True
    scale = max(scale, float(np.abs(one[finite]).max(initial=0.0)))
    return bool((np.abs(one[finite] - other[finite]) > relative * scale).any())


def _scales(answers: Sequence[Any]) -> dict[str, float]:
    import numpy as np

    found: dict[str, float] = {}
    for answer in answers:
        for path, value in _parts(answer):
            if value.dtype.kind in "fc":
                size = np.abs(value[np.isfinite(value)].astype(np.complex128)).max(initial=0.0)
                found[path] = max(found.get(path, 0.0), float(size))
    return found


def _parts(answer: Any, path: str = "") -> Iterator[tuple[str, NDArray[Any]]]:
    """The arrays in an answer by their place: lists and objects are entered, arrays and even lists are not."""
    import numpy as np

    if isinstance(answer, Mapping):
        yield f"{path}{{{sorted(map(str, answer))}}}", np.zeros(0)
        for key, value in answer.items():
            yield from _parts(value, f"{path}.{key}")
        return
    if isinstance(answer, list | tuple) and not _even(answer):
        yield f"{path}[{len(answer)}]", np.zeros(0)
        for at, value in enumerate(answer):
            yield from _parts(value, f"{path}[{at}]")
        return
    if answer is None:
        yield f"{path}:null", np.zeros(0)
        return
    if not isinstance(answer, np.ndarray | np.generic):
        answer = _array(answer)
    yield path, np.asarray(answer)


def _even(values: Sequence[Any]) -> bool:
    import numpy as np

    try:
        return np.array(values).dtype.kind in "biufcUS"
    except (ValueError, OverflowError):
        return False


def _array(value: Any) -> NDArray[Any]:
    import numpy as np

    found = np.array(value)
    # Python's own numbers are of a library's: the coarser type is not known any more
    return found.astype(object) if found.dtype.kind in "US" else found
