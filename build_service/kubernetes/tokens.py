"""Tokens of inference: digests in a ConfigMap that every model has mounted, so that a new one restarts no model."""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from build_service.kubernetes import applying, manifests
from build_service.kubernetes.cluster import Cluster
from build_service.settings import Settings
from registry.errors import EkibenError

log = structlog.get_logger(__name__)

_SECONDS = 2.0  # between two looks at the tokens; kubelets then take up to a minute to hand the file on
_AGAIN_SECONDS = 300.0  # it is written anew so often, should somebody have changed it


class TokenFile:
    """`valid` gives the digests as the database has them."""

    def __init__(self, cluster: Cluster, settings: Settings, valid: Callable[[], frozenset[str]]) -> None:
        self._cluster, self._settings, self._valid = cluster, settings, valid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="token-file", daemon=True)

    def start(self) -> None:
        if not self._settings.inference_open:
            self._thread.start()

    def close(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        written: frozenset[str] | None = None
        age = 0.0
        while not self._stop.is_set():
            try:
                valid = self._valid()
                if valid != written or age > _AGAIN_SECONDS:
                    applying.put(self._cluster, manifests.sealed(manifests.token_digests(valid, self._settings)))
                    written, age = valid, 0.0
            except EkibenError as error:
                log.warning("the tokens of inference were not written", error=error.detail[:300])
            except Exception:
                log.exception("the tokens of inference were not written")
            self._stop.wait(_SECONDS)
            age += _SECONDS
