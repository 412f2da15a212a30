"""What a served model says of itself, and who it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bentos.serving.model import ModelFolder


@dataclass(frozen=True)
class About:
    """A service instance carries one as its attribute `about`; /metadata, /label, /docs and the gate read it."""

    kind: str
    format: str | None = None
    folder: ModelFolder | None = None
    input: dict[str, Any] | None = None
    """JSON schema of the request body; None: as BentoML derives it from the service's annotations."""
    output: dict[str, Any] | None = None
    classes: Sequence[Any] | None = None
    """Class labels of a classifier, in the order of its probabilities."""
    example: Any | None = None
    """A synthetic request body, for models that came without a sample."""
    details: dict[str, Any] = field(default_factory=dict)
    """More for /metadata, such as the objective."""
    caveats: tuple[str, ...] = ()
    """What may make answers differ from expected values; sentences without a full stop, shown when they do."""


@dataclass(frozen=True)
class Checked:
    """What the golden sample showed: `expected` (values match), `sample` (finite), `synthetic` or `none`."""

    verified: str = "none"
    rows: int = 0
    matched: int = 0

    def document(self) -> dict[str, Any]:
        return {"verified": self.verified, "rows": self.rows, "matched": self.matched}


@dataclass(frozen=True)
class Served:
    """Identity of a served version. The wrapper puts it in the ASGI scope under SCOPE_KEY."""

    name: str = "model"
    version: str = "0"
    digest: str | None = None
    prefix: str = ""
    labels: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    about: About | None = None
    """Set for services that have no `about` of their own."""
    checked: Checked | None = None
    rtol: float = 1e-5
    atol: float = 1e-6


SCOPE_KEY = "ekiben.served"
