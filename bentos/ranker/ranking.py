"""A model file as a ranker: a checked request in, candidates in order out. Nothing of HTTP or BentoML here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
from numpy.typing import NDArray

from bentos.ranker.features import Candidate, Columns, Search, matrix, order
from bentos.serving.problems import Problem, StartError

MAX_CANDIDATES = 10_000
MAX_PHRASE = 500
MAX_TAGS = 200
_FIELDS = ("phrase", "user", "candidates")


class Ranker:
    """A LightGBM model of rankings, LambdaMART or regression. Safe to call from several threads.

    `load` raises StartError `model_load_failed` for a file that LightGBM cannot read or that is no ranker.
    """

    def __init__(self, booster: lgb.Booster) -> None:
        if booster.num_model_per_iteration() != 1:
            raise StartError(
                "model_load_failed",
                f"the model gives {booster.num_model_per_iteration()} values a row; a ranker gives one score",
                "train with objective lambdarank or regression, or upload it without kind=ranker",
            )
        self.booster = booster
        self.columns = Columns(tuple(booster.feature_name()))

    @classmethod
    def load(cls, path: Path) -> Ranker:
        try:
            booster = lgb.Booster(model_file=str(path))
        except (lgb.basic.LightGBMError, ValueError, OSError) as error:
            hint = "save it with Booster.save_model and upload the file as it is"
            raise StartError("model_load_failed", f"{path.name} is no LightGBM model: {error}", hint) from error
        return cls(booster)

    def scores(self, search: Search) -> NDArray[np.float64]:
        """One score a candidate, in the order of the request; higher is better."""
        features = matrix(self.columns, search)
        # One thread: a request is too small to share out, and waiting threads would take the core from other requests.
        return np.asarray(self.booster.predict(features, num_threads=1), dtype=np.float64)

    def rank(self, search: Search) -> list[dict[str, Any]]:
        """`[{"id", "score"}, …]`, best first; equal scores stay in the order of the request."""
        scores = self.scores(search)
        if not np.isfinite(scores).all():
            place = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise Problem(
                "prediction_not_finite",
                f"the model gives no finite score for candidate {search.candidates[place].id!r}",
                field=f"candidates[{place}]",
            )
        return [{"id": search.candidates[i].id, "score": float(scores[i])} for i in order(scores)]

    def answer(self, body: Any) -> dict[str, Any]:
        """The response body to a request body. Raises Problem naming the field that is wrong."""
        if not isinstance(body, dict):
            raise _wrong("body", body, "an object with phrase and candidates")
        for name in body:
            if name not in _FIELDS:
                raise Problem(
                    "unknown_field",
                    f"{name} is no field of a request",
                    field=name,
                    hint="known are " + ", ".join(_FIELDS),
                )
        for name in ("phrase", "candidates"):
            if name not in body:
                raise Problem("missing_field", f"{name} is missing", field=name, hint="send phrase and candidates")
        return {"ranking": self.rank(self.parse(**body))}

    def example(self) -> dict[str, Any]:
        """A request of the right form for models that came without a sample; all values are missing or zero."""
        zeros = dict.fromkeys(self.columns.candidate, 0.0)
        candidates = [Candidate(name, zeros, ("cat",)) for name in ("a", "b")]
        return self.body(Search("cat", candidates))

    def body(self, search: Search) -> dict[str, Any]:
        """The request body that stands for a search: what `parse` reads."""
        user = {name: search.user[name] for name in self.columns.user if search.user.get(name) is not None}
        candidates: list[dict[str, Any]] = []
        for candidate in search.candidates:
            tags = {"tags": list(candidate.tags)} if self.columns.tags else {}
            values = {name: candidate.values.get(name) for name in self.columns.candidate}
            candidates.append({"id": candidate.id, **tags, **values})
        return {"phrase": search.phrase, "user": user, "candidates": candidates}

    def parse(self, phrase: Any, candidates: Any, user: Any = None) -> Search:
        """Checks the fields of a request. Raises Problem, which names the field that is wrong."""
        if not isinstance(phrase, str):
            raise _wrong("phrase", phrase, "text, such as “cat in snow”")
        if not phrase.strip():
            raise Problem("empty_phrase", "phrase is empty", field="phrase", hint="send what the user typed")
        if len(phrase) > MAX_PHRASE:
            raise Problem(
                "phrase_too_long",
                f"phrase has {len(phrase)} characters; at most {MAX_PHRASE} are read",
                field="phrase",
                hint="send what the user typed, not a document",
            )
        if not isinstance(candidates, list):
            raise _wrong("candidates", candidates, "a list of objects")
        if not candidates:
            raise Problem(
                "no_candidates", "candidates is empty", field="candidates", hint="send at least one picture to rank"
            )
        if len(candidates) > MAX_CANDIDATES:
            raise Problem(
                "too_many_candidates",
                f"candidates has {len(candidates)} entries; at most {MAX_CANDIDATES} are ranked at once",
                field="candidates",
                hint="retrieve fewer candidates before ranking",
            )
        parsed_user = self._user(user)
        allowed = frozenset(self.columns.candidate)
        seen: dict[str, int] = {}
        parsed = []
        for index, candidate in enumerate(candidates):
            parsed.append(self._candidate(candidate, f"candidates[{index}]", allowed))
            first = seen.setdefault(parsed[-1].id, index)
            if first != index:
                raise Problem(
                    "duplicate_id",
                    f"candidates[{first}] and candidates[{index}] have the same id {parsed[-1].id!r}",
                    field=f"candidates[{index}].id",
                    hint="send each picture once",
                )
        return Search(phrase, parsed, parsed_user)

    def _user(self, user: Any) -> dict[str, float | None]:
        if user is None:
            return {}
        if not isinstance(user, dict):
            raise _wrong("user", user, "an object, {} for an unknown user")
        allowed = frozenset(self.columns.user)
        for name in user:
            if name not in allowed:
                raise _unknown(f"user.{name}", name, self.columns.user)
        return {name: _number(value, f"user.{name}") for name, value in user.items()}

    def _candidate(self, candidate: Any, where: str, allowed: frozenset[str]) -> Candidate:
        if not isinstance(candidate, dict):
            raise _wrong(where, candidate, "an object with id and features")
        name = candidate.get("id")
        if not isinstance(name, str) or not name:
            if "id" not in candidate:
                raise Problem("missing_field", f"{where} has no id", field=f"{where}.id", hint="name the picture")
            raise _wrong(f"{where}.id", name, "text that is not empty")
        for key in candidate:
            if key not in allowed and key != "id" and not (key == "tags" and self.columns.tags):
                listed = ("id", *(("tags",) if self.columns.tags else ()), *self.columns.candidate)
                raise _unknown(f"{where}.{key}", key, listed)
        return Candidate(name, self._values(candidate, where), self._tags(candidate, where))

    def _values(self, candidate: Mapping[str, Any], where: str) -> dict[str, float | None]:
        values: dict[str, float | None] = {}
        for name in self.columns.candidate:
            if name not in candidate:
                raise Problem(
                    "missing_field",
                    f"{where} has no {name}",
                    field=f"{where}.{name}",
                    hint="send null where a value is not known",
                )
            values[name] = _number(candidate[name], f"{where}.{name}")
        return values

    def _tags(self, candidate: Mapping[str, Any], where: str) -> tuple[str, ...]:
        if not self.columns.tags:
            return ()
        tags = candidate.get("tags")
        if "tags" not in candidate:
            raise Problem(
                "missing_field", f"{where} has no tags", field=f"{where}.tags", hint="send [] for an untagged picture"
            )
        if not isinstance(tags, list) or len(tags) > MAX_TAGS or not all(isinstance(tag, str) for tag in tags):
            raise _wrong(f"{where}.tags", tags, f"a list of at most {MAX_TAGS} texts")
        return tuple(tag.casefold() for tag in tags)

    def input_schema(self) -> dict[str, Any]:
        """JSON Schema of the request body."""
        number = {"type": ["number", "null"]}
        properties: dict[str, Any] = {"id": {"type": "string", "minLength": 1}}
        if self.columns.tags:
            properties["tags"] = {"type": "array", "items": {"type": "string"}, "maxItems": MAX_TAGS}
        properties |= dict.fromkeys(self.columns.candidate, number)
        candidate = {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
        return {
            "type": "object",
            "properties": {
                "phrase": {"type": "string", "minLength": 1, "maxLength": MAX_PHRASE},
                "user": {
                    "type": ["object", "null"],
                    "description": "What is known of the user; leave out what is not",
                    "properties": dict.fromkeys(self.columns.user, number),
                    "additionalProperties": False,
                },
                "candidates": {"type": "array", "items": candidate, "minItems": 1, "maxItems": MAX_CANDIDATES},
            },
            "required": ["phrase", "candidates"],
            "additionalProperties": False,
        }

    def output_schema(self) -> dict[str, Any]:
        """JSON Schema of the response body."""
        entry = {
            "type": "object",
            "properties": {"id": {"type": "string"}, "score": {"type": "number"}},
            "required": ["id", "score"],
        }
        return {
            "type": "object",
            "properties": {"ranking": {"type": "array", "items": entry, "description": "best first"}},
            "required": ["ranking"],
        }


def _number(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool):
        return float(value)
    if not isinstance(value, int | float):
        raise _wrong(where, value, "a number, or null where it is not known")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _wrong(where, value, "a finite number, or null where it is not known")
    return number


def _wrong(where: str, value: Any, wanted: str) -> Problem:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "…"
    return Problem("invalid_field", f"{where} is {shown}", field=where, hint=f"send {wanted}")


def _unknown(where: str, name: str, known: tuple[str, ...]) -> Problem:
    return Problem(
        "unknown_field", f"{where} is not a feature of this model", field=where, hint="known are " + ", ".join(known)
    )
