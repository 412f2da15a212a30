"""Everything that the serving process is told, read from the environment in this one place."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bentos.serving.model import ModelFolder
from bentos.serving.problems import StartError

_TERMINATION_LOG = Path("/dev/termination-log")


@dataclass(frozen=True)
class Settings:
    """The variables of docs/design.md §6."""

    bento: Path
    model_dir: Path | None
    digest: str | None = None
    name: str = "model"
    version: str = "0"
    metadata: dict[str, Any] = field(default_factory=dict)
    prefix: str = ""
    """Without a slash at its end; empty for none. The longest of `prefixes`."""
    prefixes: tuple[str, ...] = ()
    """All that are stripped, the longest first."""
    host: str = "0.0.0.0"
    port: int = 3000
    socket_fd: int | None = None
    lifeline_fd: int | None = None
    termination_log: Path | None = None
    modules_file: Path | None = None
    """Where the modules are listed that had to be compiled."""
    max_body_bytes: int = 64 << 20
    request_seconds: float = 60.0
    leave_seconds: float = 0.0
    """From the signal to end until no new call is taken."""
    token_digests: tuple[bytes, ...] = ()
    tokens_file: Path | None = None
    """A line for each digest; read again when it changes. While it is not there, no token is valid."""
    pass_headers: frozenset[bytes] = frozenset()
    """Credentials of the caller that the model gets, of `authorization` and `cookie`."""
    rtol: float = 1e-5
    atol: float = 1e-6

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Settings:
        """Raises StartError `bad_setting` naming the variable."""
        model_dir = environ.get("EKIBEN_MODEL_DIR")
        given = [each.strip().strip("/") for each in environ.get("EKIBEN_URL_PREFIX", "").split(",")]
        prefixes = tuple(sorted({f"/{each}" for each in given if each}, key=lambda each: (-len(each), each)))
        digests = [d.strip().lower() for d in environ.get("EKIBEN_INFERENCE_TOKEN_SHA256", "").split(",") if d.strip()]
        for digest in digests:
            if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
                raise _bad("EKIBEN_INFERENCE_TOKEN_SHA256", "hex SHA-256 digests, comma separated")
        passed = {name.strip().lower() for name in environ.get("EKIBEN_PASS_HEADERS", "").split(",") if name.strip()}
        if passed - {"authorization", "cookie"}:
            raise _bad("EKIBEN_PASS_HEADERS", "of authorization and cookie, comma separated")
        try:
            metadata = json.loads(environ.get("EKIBEN_MODEL_METADATA") or "{}")
        except ValueError:
            metadata = None
        if not isinstance(metadata, dict):
            raise _bad("EKIBEN_MODEL_METADATA", "a JSON object")
        return cls(
            bento=Path(environ.get("EKIBEN_BENTO") or "."),
            model_dir=Path(model_dir) if model_dir else None,
            digest=environ.get("EKIBEN_MODEL_DIGEST") or None,
            name=environ.get("EKIBEN_MODEL_NAME") or "model",
            version=environ.get("EKIBEN_MODEL_VERSION") or "0",
            metadata=metadata,
            prefix=prefixes[0] if prefixes else "",
            prefixes=prefixes,
            host=environ.get("EKIBEN_HOST") or "0.0.0.0",
            port=int(_number(environ, "EKIBEN_PORT", 3000, 0, 65535)),
            socket_fd=_descriptor(environ, "EKIBEN_SOCKET_FD"),
            lifeline_fd=_descriptor(environ, "EKIBEN_LIFELINE_FD"),
            termination_log=termination_log(environ),
            modules_file=Path(listed) if (listed := environ.get("EKIBEN_MODULES_FILE")) else None,
            max_body_bytes=int(_number(environ, "EKIBEN_MAX_BODY_BYTES", 64 << 20, 1, 1 << 50)),
            request_seconds=_number(environ, "EKIBEN_REQUEST_SECONDS", 60.0, 0.001, 86400),
            leave_seconds=_number(environ, "EKIBEN_LEAVE_SECONDS", 0.0, 0, 3600),
            token_digests=tuple(bytes.fromhex(d) for d in digests),
            tokens_file=Path(named) if (named := environ.get("EKIBEN_INFERENCE_TOKENS_FILE")) else None,
            pass_headers=frozenset(name.encode() for name in passed),
            rtol=_number(environ, "EKIBEN_GOLDEN_RTOL", 1e-5, 0, 1e300),
            atol=_number(environ, "EKIBEN_GOLDEN_ATOL", 1e-6, 0, 1e300),
        )


def termination_log(environ: Mapping[str, str]) -> Path | None:
    """Where a failed start writes its reason; None where there is no such place."""
    if named := environ.get("EKIBEN_TERMINATION_LOG"):
        return Path(named)
    return _TERMINATION_LOG if os.access(_TERMINATION_LOG, os.W_OK) else None


def folder(service_file: str) -> ModelFolder:
    """The model that a kind serves: EKIBEN_MODEL_DIR, or `model/` beside its service.py."""
    named = os.environ.get("EKIBEN_MODEL_DIR")
    root = Path(named) if named else Path(service_file).resolve().parent / "model"
    if not named and not root.exists():
        kind = root.parent.name
        raise StartError(
            "model_load_failed",
            f"there is no model in {root}",
            f"set EKIBEN_MODEL_DIR, or write an example with `python -m bentos.{kind}.example {root}`",
        )
    return ModelFolder.read(root)


def _number(environ: Mapping[str, str], name: str, default: float, low: float, high: float) -> float:
    text = environ.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        raise _bad(name, "a number") from None
    if not low <= value <= high:
        raise _bad(name, f"a number from {low:g} to {high:g}")
    return value


def _descriptor(environ: Mapping[str, str], name: str) -> int | None:
    return int(_number(environ, name, -1, 0, 1 << 20)) if environ.get(name) else None


def _bad(name: str, wanted: str) -> StartError:
    return StartError("bad_setting", f"{name} is not {wanted}", f"correct or unset {name}")
