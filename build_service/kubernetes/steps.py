"""Which steps a build's pod has: fetch, inspect, assemble; or without inspect, which would find nothing to import.

What a kind says of itself is kept with its code layer in the registry, so a kind is imported once for all versions with
the same requirements. To start a container only to see that takes a second of every build. This is a memory, and no
more: where it is wrong, because the registry has lost the layer, the build fails and its next attempt has all steps.
"""

from __future__ import annotations

import json
import threading

from build_service.kubernetes import names
from build_service.platform import BuildOrder
from registry.formats.project import KIND as PROJECT

_WITHOUT_INSPECT = tuple(step for step in names.STEPS if step != "inspect")


class Steps:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._code: dict[tuple[str, int], str] = {}  # of attempts that run: what they would import
        self._imported: set[str] = set()

    def of(self, order: BuildOrder) -> tuple[str, ...]:
        version, image = order.version, order.image or {}
        if version.kind == PROJECT:
            return names.STEPS
        given = [version.manifest.get("requirements"), version.manifest.get("python")]
        code = json.dumps([version.kind, *given, image.get("base"), image.get("platform")], sort_keys=True)
        with self._lock:
            self._code[order.id, order.attempt] = code
            return _WITHOUT_INSPECT if code in self._imported else names.STEPS

    def ended(self, build: str, attempt: int, *, well: bool) -> None:
        with self._lock:
            code = self._code.pop((build, attempt), None)
            if code is not None:
                (self._imported.add if well else self._imported.discard)(code)

    def forget(self, build: str, attempt: int) -> None:
        with self._lock:
            self._code.pop((build, attempt), None)
