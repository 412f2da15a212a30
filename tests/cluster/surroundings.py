"""What the host knows about the way out, for pods that fetch packages: proxies, certificates, indexes.

A pod sees neither the host's environment nor its files. This reads what concerns package registries from both, so that
a test can give it to the pods that need it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
_PLACE = "etc/ssl/certs/ca-certificates.crt"
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
_INDEXES = re.compile(r"(?:PIP|UV)_(?:(?:DEFAULT_|EXTRA_)?INDEX(?:_URL|_STRATEGY)?|TRUSTED_HOST|DEFAULT_TIMEOUT)")
_FILES = {
    "pip.conf": ("/etc/pip.conf", "~/.config/pip/pip.conf", "~/.pip/pip.conf"),
    "uv.toml": ("/etc/uv/uv.toml", "~/.config/uv/uv.toml"),
}


def bundle() -> Path | None:
    """The host's certificate authorities, those of a company's proxy among them."""
    named = [os.environ.get("SSL_CERT_FILE", ""), *_BUNDLES]
    return next((Path(each) for each in named if each and Path(each).is_file()), None)


def certificates() -> dict[str, Path]:
    """The host's authorities as a file of an image."""
    found = bundle()
    return {_PLACE: found} if found else {}


def environment(cluster_network: str, domain: str) -> dict[str, Any]:
    """`variables` for a pod, `ca_bundle` (a file of the host, to mount under `ca_place`), `files` of the installers."""
    variables = {key: value for key, value in sorted(os.environ.items()) if _INDEXES.fullmatch(key)}
    proxies = {name: value for name in _PROXIES if (value := os.environ.get(name) or os.environ.get(name.lower()))}
    if proxies:
        direct = os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""
        names = [*filter(None, direct.split(",")), "localhost", "127.0.0.1", cluster_network, ".svc", f".{domain}"]
        proxies["NO_PROXY"] = ",".join(dict.fromkeys(names))
        variables |= proxies | {name.lower(): value for name, value in proxies.items()}
    found = bundle()
    if found:
        for name in ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE"):
            variables[name] = f"/{_PLACE}"
    files = {}
    for name, places in _FILES.items():
        texts = [Path(place).expanduser().read_text() for place in places if Path(place).expanduser().is_file()]
        if texts:
            files[name] = texts[-1]
    return {
        "variables": variables,
        "ca_bundle": str(found) if found else None,
        "ca_place": f"/{_PLACE}",
        "files": files,
    }


def resolv_conf() -> str:
    """The file that names real servers, where the usual one names a stub that only the host can reach."""
    usual, real = Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf")
    stub = re.search(r"^nameserver\s+127\.", usual.read_text(), re.MULTILINE)
    return str(real if stub and real.exists() else usual)
