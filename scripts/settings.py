"""docs/settings.md: every setting of the service, read out of its source."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic.fields import FieldInfo

from build_service.kubernetes.settings import ClusterSettings
from build_service.settings import Settings


def document() -> str:
    """The page, in Markdown."""
    cluster = set(ClusterSettings.model_fields)
    everywhere = (pair for pair in Settings.model_fields.items() if pair[0] not in cluster)
    return (
        "# Settings\n\n"
        "Environment variables of the service; on Kubernetes they are the ConfigMap `ekiben-settings`, which overlays\n"
        "lay values over ([on Kubernetes](kubernetes.md)). Times are in seconds and sizes in bytes unless a row says\n"
        "otherwise. What contradicts itself is refused at the start. This page is made from the source by\n"
        "`make openapi`; `ekiben-server --settings` prints the same.\n\n"
        "## Everywhere\n\n" + _table(everywhere) + "\n## With `EKIBEN_PLATFORM=kubernetes`\n\n"
        + _table(ClusterSettings.model_fields.items())
    )  # fmt: skip


def _table(fields: Iterable[tuple[str, FieldInfo]]) -> str:
    rows = [f"| `EKIBEN_{name.upper()}` | {_words(field.description)} | {_default(field)} |" for name, field in fields]
    return "\n".join(["| setting | what it is | default |", "| --- | --- | --- |", *rows]) + "\n"


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "found"
    return _value(field.default)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return f"`{value}`".lower()
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    if value in (None, "", {}):
        return ""
    return f"`{int(value) if isinstance(value, float) and value.is_integer() else value}`"


def _words(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")
