"""Models whose answers depend on their neighbours: what their services answer, and the model's own to a row alone."""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import neighbour_models, parts
from benchmarks.figures import Figure, Measured, Sample
from benchmarks.neighbour_models import Case

_MODELS = 200
_QUICK_MODELS = 70
_RTOL = 1e-5
"""Of the largest number in an answer; what float32 adds up in another order."""
_TOGETHER = 3
"""How many times the rows are asked at one moment, each in a request of its own."""


@dataclass
class Outcome:
    """What a service did with a model. `refused` is the reason where it did not start."""

    case: Case
    answers: int = 0
    different: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    refused: str | None = None


def tried(case: Case, folder: Path) -> Outcome:
    """Serve the model in this process, ask for its rows alone and among others at one moment, and compare."""
    from bentos.serving import write_model

    write_model(folder, kind=case.kind, format=case.format, files=case.files)
    outcome = Outcome(case)
    requests = _requests(case.rows)
    with ExitStack() as stack:
        before = os.environ.get("EKIBEN_MODEL_DIR")
        os.environ["EKIBEN_MODEL_DIR"] = str(folder)
        stack.callback(_restore, before)
        module = importlib.import_module(f"bentos.{case.kind}.service")
        name = {"onnx": "Onnx", "sklearn": "Sklearn", "tensorflow": "TensorFlow"}[case.kind]
        service = getattr(module, name)
        service.config["metrics"] = {"enabled": False}
        try:
            answers = asyncio.run(_asked(service.to_asgi(), [[case.rows[at] for at in each] for each in requests]))
        except Exception as error:  # whatever stops a start
            outcome.refused = f"{type(error).__name__}: {error}"[:300]
            return outcome
    _compare(outcome, requests, answers)
    return outcome


def _restore(before: str | None) -> None:
    if before is None:
        del os.environ["EKIBEN_MODEL_DIR"]
    else:
        os.environ["EKIBEN_MODEL_DIR"] = before


def _requests(rows: Sequence[Any]) -> list[list[int]]:
    """Which rows go into each request, by number."""
    order = list(range(len(rows)))
    alone = [[at] for at in order] * _TOGETHER
    return [*alone, order, order[::-1], order[:2], order + order]


async def _asked(app: Any, bodies: list[list[Any]]) -> list[tuple[int, Any]]:
    from bentos.serving import golden

    async with app.router.lifespan_context(app):
        return list(await asyncio.gather(*(golden.call(app, "/predict", {"inputs": body}) for body in bodies)))


def _compare(outcome: Outcome, requests: list[list[int]], answers: list[tuple[int, Any]]) -> None:
    """Count the answers that are not the model's own. Its answer to a row is what is in its first axis, or all of it:
    one or the other for all rows of an output."""
    case = outcome.case
    own = []
    for row in case.rows:
        try:
            own.append([np.asarray(each) if not isinstance(each, list) else each for each in case.alone(row)])
        except Exception:  # the model does not take the row
            own.append([])
    forms: dict[int, set[str]] = {}
    for request, (status, body) in zip(requests, answers, strict=True):
        if status != 200:
            outcome.errors.append(f"{status} {body.get('detail', body) if isinstance(body, dict) else body}"[:200])
            continue
        if len(body["outputs"]) != len(request):
            outcome.different.append(f"{len(body['outputs'])} answers to {len(request)} rows")
            continue
        for at, value in zip(request, body["outputs"], strict=True):
            outcome.answers += 1
            values = list(value.values()) if isinstance(value, dict) and len(own[at]) > 1 else [value]
            if len(values) != len(own[at]):
                outcome.different.append(f"row {at}: {len(values)} outputs, its own are {len(own[at])}")
                continue
            for number, (given, truth) in enumerate(zip(values, own[at], strict=True)):
                fits = {form for form in ("entry", "whole") if _same(given, truth, form)}
                forms[number] = forms.get(number, {"entry", "whole"}) & fits
                if not fits:
                    outcome.different.append(f"row {at}: {given!r:.80}, its own is {truth!r:.80}")
    for number, left in forms.items():
        if not left and not outcome.different:
            outcome.different.append(f"output {number}: the nesting changes from row to row")


def _same(given: Any, truth: Any, form: str) -> bool:
    if form == "entry":
        if not np.ndim(truth) and not isinstance(truth, list):
            return False
        if len(truth) != 1:
            return False
        truth = truth[0]
    if isinstance(truth, list):
        alike = isinstance(given, list) and len(given) == len(truth)
        return alike and all(_same(a, b, "whole") for a, b in zip(given, truth, strict=True))
    wanted = np.asarray(truth)
    try:
        found = np.asarray(given, wanted.dtype if wanted.dtype.kind in "fiu" else None)
    except (ValueError, TypeError):
        return False
    if wanted.size == 0 or found.size == 0:
        return wanted.size == found.size and (wanted.ndim == found.ndim or wanted.ndim > 1)
    if found.shape != wanted.shape:
        return False
    if wanted.dtype.kind != "f":
        return bool((found == wanted).all())
    scale = float(np.abs(wanted).max(initial=0.0))
    return bool((np.abs(found - wanted) <= _RTOL * scale + 1e-12).all())


def _different(bench: parts.Bench) -> Measured:
    outcomes = []
    samples = []
    for number, case in enumerate(neighbour_models.cases(_QUICK_MODELS if bench.quick else _MODELS)):
        outcome = tried(case, bench.folder("neighbour"))
        outcomes.append(outcome)
        samples.append(Sample(number, "ours", f"{case.kind}: {case.name}", len(outcome.different), "answers"))
        for said in outcome.different[:1]:
            parts.say(f"{case.kind}: {case.name}: {said}")
    refused = sorted({f"{each.case.kind}: {each.case.name}" for each in outcomes if each.refused})
    failed = sorted({f"{each.case.kind}: {each.case.name}" for each in outcomes if each.errors})
    return Measured(
        float(sum(len(each.different) for each in outcomes)),
        {
            "models": len(outcomes),
            "answers": sum(each.answers for each in outcomes),
            "models refused at start": sum(1 for each in outcomes if each.refused),
            "refused": ", ".join(refused),
            "requests refused": sum(len(each.errors) for each in outcomes),
            "refused requests of": ", ".join(failed),
        },
        samples,
    )


FIGURES: dict[Figure, Callable[[parts.Bench], Measured]] = {
    Figure(
        "uploads.neighbours",
        "answers of 200 models that depend on neighbours, or have another first axis, unlike those to the row alone",
        "answers",
        0,
        "lower",
        4,
    ): _different
}
