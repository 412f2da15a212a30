"""What the host knows about the way out, for pods that fetch packages: proxies, certificates, indexes.

A pod sees neither the host's environment nor its files. This reads what concerns package registries from both, so that
a test can give it to the pods that need it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
_PLACE = "etc/ssl/certs/ca-certificates.crt"
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
_INDEXES = re.compile(r"(?:PIP|UV)_(?:(?:DEFAULT_|EXTRA_)?INDEX(?:_URL|_STRATEGY)?|TRUSTED_HOST|DEFAULT_TIMEOUT)")
_NAME = "way-out"
_BUNDLE = "ca-certificates.crt"
_PLACES = {"pip.conf": "pip.conf", "uv.toml": "uv/uv.toml"}
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


def config_map(namespace: str, environment: Mapping[str, Any]) -> dict[str, Any]:
    """The files of `environment` as an object of the cluster."""
    files = dict(environment["files"])
    if environment["ca_bundle"]:
        files[_BUNDLE] = Path(environment["ca_bundle"]).read_text()
    metadata = {"name": _NAME, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": files}


def with_way_out(pod: Mapping[str, Any], environment: Mapping[str, Any]) -> dict[str, Any]:
    """A pod's spec, each of its containers given the variables and files of `environment`."""
    mounts = [{"name": _NAME, "mountPath": f"/etc/{_PLACES[name]}", "subPath": name} for name in environment["files"]]
    if environment["ca_bundle"]:
        mounts.append({"name": _NAME, "mountPath": environment["ca_place"], "subPath": _BUNDLE})
    variables = [{"name": name, "value": value} for name, value in environment["variables"].items()]
    changed = {
        kind: [
            {
                **each,
                "env": [*variables, *each.get("env", [])],
                "volumeMounts": [*each.get("volumeMounts", []), *mounts],
            }
            for each in pod[kind]
        ]
        for kind in ("containers", "initContainers")
        if kind in pod
    }
    return {**pod, **changed, "volumes": [*pod.get("volumes", []), {"name": _NAME, "configMap": {"name": _NAME}}]}


def resolv_conf() -> str:
    """The file that names real servers, where the usual one names a stub that only the host can reach."""
    usual, real = Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf")
    stub = re.search(r"^nameserver\s+127\.", usual.read_text(), re.MULTILINE)
    return str(real if stub and real.exists() else usual)
