"""A running endpoint in the hands of a program."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

from ekiben import _sample
from ekiben._errors import EkibenError

if TYPE_CHECKING:
    from ekiben._client import Client

_ROWS_A_CALL = 5_000


class Deployment:
    """A named endpoint: `predict` calls it, `rollback` undoes its last change.

    The attributes are those of the last answer; `refresh` asks again.
    """

    def __init__(self, client: Client, state: Mapping[str, Any], pushed: Mapping[str, Any] | None = None) -> None:
        self._client = client
        self._state = dict(state)
        self._pushed = dict(pushed) if pushed is not None else None
        self._names: tuple[list[str] | None, bool] | None = None

    def __repr__(self) -> str:
        return f"Deployment({self.name!r}, model={self.model!r}, version={self.version}, state={self.state!r})"

    @property
    def name(self) -> str:
        return str(self._state["name"])

    @property
    def model(self) -> str:
        return str(self._state["target"]["model"])

    @property
    def version(self) -> int:
        return int(self._state["target"]["version"])

    @property
    def state(self) -> str:
        """pending | rolling | live | rolled_back | failed."""
        return str(self._state["state"])

    @property
    def url(self) -> str:
        """Where to POST `{"inputs": […]}`."""
        return str(self._state["url"])

    @property
    def docs(self) -> str:
        return str(self._state["docs"])

    @property
    def pushed(self) -> dict[str, Any] | None:
        """The version as `ekiben.push` left it: digest, kind, signature, checked, seconds; None otherwise."""
        return self._pushed

    def predict(self, data: Any, *, method: str | None = None, seconds: float = 60.0) -> Any:
        """Predictions for rows, in the form of the rows.

        A pandas DataFrame gives a Series on its index (or a DataFrame where the model answers several numbers a row),
        a NumPy array or a sparse matrix an array, a list a list. A dict is sent as it is and its answer returned
        whole: task kinds have bodies of their own. `method` asks a scikit-learn model for another method,
        `predict_proba`. Many rows go in several calls of at most 5,000 rows; `seconds` bounds each.
        """
        extra = {} if method is None else {"method": method}
        count = _sample.count(data)
        if count is None:
            return self._client.predict(self.name, {**_sample.body(data), **extra}, seconds=seconds)
        fitted = _sample.fit(data, *self._columns()) if _sample.is_frame(data) else data
        outputs: list[Any] = []
        for start in range(0, max(count, 1), _ROWS_A_CALL):
            rows = fitted if count <= _ROWS_A_CALL else _sample.part(fitted, start, start + _ROWS_A_CALL)
            if _sample.is_sparse(rows):
                rows = _sample.dense(rows, xgboost=self._is_xgboost())
            answer = self._client.predict(self.name, {**_sample.body(rows), **extra}, seconds=seconds)
            if not isinstance(answer, dict) or not isinstance(answer.get("outputs"), list):
                if count <= _ROWS_A_CALL:
                    return answer
                raise EkibenError(
                    f"{self.name} does not answer rows with outputs",
                    code="bad_answer",
                    hint="send its own body as a dict",
                )
            outputs.extend(answer["outputs"])
        return _sample.like(data, outputs)

    def predict_proba(self, data: Any, *, seconds: float = 60.0) -> Any:
        """Probabilities of the classes of a scikit-learn classifier, in the order of `metadata()["classes"]`."""
        return self.predict(data, method="predict_proba", seconds=seconds)

    def _columns(self) -> tuple[list[str] | None, bool]:
        """The model's columns as it says itself, and whether it knows them by name. (None, True): it does not say."""
        if self._names is None:
            self._names = _columns(self.metadata())
        return self._names

    def _is_xgboost(self) -> bool:
        return str(self.metadata().get("format")).startswith("xgboost")

    def rollback(self, revision: int | None = None, *, wait: float = 120) -> Self:
        """Return to the previous good revision, or to the given one, and wait until it serves. Nothing is built."""
        self._state = self._client.wait_for_deployment(self._client.rollback(self.name, revision), wait)
        self._names = None
        return self

    def refresh(self) -> Self:
        self._state = self._client.deployment_state(self.name)
        self._names = None
        return self

    def logs(self, follow: bool = False) -> Iterator[str]:
        """Lines of the model's processes; with `follow`, until the caller stops."""
        return self._client.deployment_logs(self.name, follow)

    def metadata(self) -> Any:
        """What the served model says of itself: digest, input and output schema, metrics."""
        return self._client.inference(self.name, "metadata")


def _columns(metadata: Any) -> tuple[list[str] | None, bool]:
    """From the JSON schema of a row: an object by name, an array by position, or either."""
    try:
        row = metadata["input"]["properties"]["inputs"]["items"]
    except (KeyError, TypeError):
        return None, True
    forms = row.get("anyOf", [row]) if isinstance(row, dict) else []
    for form in forms:
        if isinstance(form, dict) and form.get("type") == "object" and isinstance(form.get("properties"), dict):
            return list(form["properties"]), True
    return None, not any(isinstance(form, dict) and form.get("type") == "array" for form in forms)
