"""Which variables of this service's environment reach what, each by a list of what may.

The service reads its settings once and then forgets every variable that could be a secret: in Python, in libc and in
the block of memory that /proc shows.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path

_BASICS = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "HOSTNAME", "LANG", "LC_.*", "TZ", "TMPDIR", "XDG_.*_HOME",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NO_PROXY", "no_proxy", "PYTHON.*",
)  # fmt: skip
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
_SERVING = ("PATH", "LANG", "LC_ALL", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE")
_BUILDS = (
    *_BASICS, *_PROXIES, "NETRC", "SSL_CLIENT_CERT", "UV_.*", "DOCKER_CONFIG", "EKIBEN_REGISTRY_AUTH",
    "EKIBEN_INSPECT_NETWORK", "EKIBEN_ISOLATION", "EKIBEN_BENTOS", "EKIBEN_BASES", "EKIBEN_HOME",
)  # fmt: skip
_CATALOGUE = (*_BASICS, *_PROXIES, "EKIBEN_HOME", "MLFLOW_.*", "AWS_.*", "AZURE_.*", "GOOGLE_.*", "DATABRICKS_.*")
# What libraries of the service look up while it runs. Settings of Ekiben are read by then.
_SERVICE = (
    *_BASICS, "KUBERNETES_.*", "KUBECONFIG", "MALLOC_.*", "OMP_.*", "OPENBLAS_.*", "PG(?!PASSWORD$).*",
    "AWS_(DEFAULT_)?REGION", "AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_ROLE_ARN",
    "AWS_ROLE_SESSION_NAME", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_.*",
)  # fmt: skip


def for_serving(outer: Mapping[str, str]) -> dict[str, str]:
    """What a model's process sees: nothing that could be a secret."""
    return _chosen(outer, _SERVING)


def for_builds(outer: Mapping[str, str], further: Iterable[str] = ()) -> dict[str, str]:
    """What a build sees: where packages, bases and images are, with their credentials, and what the operator names."""
    return _chosen(outer, (*_BUILDS, *map(re.escape, further)))


def for_catalogue(outer: Mapping[str, str]) -> dict[str, str]:
    """What the command that writes into MLflow sees, with the credentials for MLflow and its stores."""
    return _chosen(outer, _CATALOGUE)


def forget(environ: MutableMapping[str, str] = os.environ) -> None:
    """Take away all but what libraries need while the service runs, and overwrite it where the process got it."""
    kept = _chosen(environ, _SERVICE)
    for name, value in list(environ.items()):
        if "@" in value and name in _PROXIES:
            kept.pop(name, None)
        if name not in kept:
            del environ[name]
    _overwrite(set(kept))


def _chosen(environ: Mapping[str, str], patterns: Iterable[str]) -> dict[str, str]:
    allowed = re.compile("|".join(patterns))
    return {name: value for name, value in environ.items() if allowed.fullmatch(name)}


def _overwrite(kept: set[str]) -> None:
    """Overwrite the values in the block that the kernel filled at the start, which /proc/PID/environ shows for good.

    No pointer of libc leads to these any more, as they were unset before.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):  # no Linux
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[47]), int(fields[48])  # env_start and env_end, fields 50 and 51 of proc(5)
        at = start
        for entry in ctypes.string_at(start, end - start).split(b"\0") if 0 < start < end else ():
            name, _, value = entry.partition(b"=")
            if os.fsdecode(name) not in kept and value:
                ctypes.memset(at + len(name) + 1, 0, len(value))
            at += len(entry) + 1
