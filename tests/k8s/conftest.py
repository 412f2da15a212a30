"""An API server of its own, with etcd and nothing else: what it accepts, a cluster accepts."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.cluster import programs

_TOKEN = base64.urlsafe_b64encode(os.urandom(24)).decode()


@dataclass(frozen=True)
class Server:
    """`authority` signed its certificate, made for the address it listens on."""

    port: int
    authority: Path
    program: str

    def kubectl(self, *args: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        where = [f"--server=https://127.0.0.1:{self.port}", f"--token={_TOKEN}", "--insecure-skip-tls-verify"]
        return subprocess.run([self.program, *where, *args], input=text, capture_output=True, text=True, check=False)

    def kubeconfig(self, file: Path) -> Path:
        """Write what a client needs to be the administrator here."""
        parts = {
            "clusters": {
                "cluster": {"server": f"https://127.0.0.1:{self.port}", "certificate-authority": str(self.authority)}
            },
            "users": {"user": {"token": _TOKEN}},
            "contexts": {"context": {"cluster": "here", "user": "here"}},
        }
        lists = {part: [{"name": "here", **what}] for part, what in parts.items()}
        file.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", "current-context": "here", **lists}))
        return file

    def ok(self, *args: str, text: str | None = None) -> str:
        done = self.kubectl(*args, text=text)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="session")
def kubectl_program() -> str:
    built = programs.find("kubectl")
    found = str(built) if built.exists() else shutil.which("kubectl")
    if found is None:
        pytest.skip("kubectl is not installed (python -m tests.cluster build)")
    return found


@pytest.fixture(scope="session")
def api_server(kubectl_program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    etcd, program = shutil.which("etcd"), programs.find("kube-apiserver")
    if etcd is None or not program.exists():
        pytest.skip("kube-apiserver or etcd is not installed (python -m tests.cluster build)")
    folder = tmp_path_factory.mktemp("api-server")
    store, peers, port = _free(3)
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    (folder / "accounts.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
    )
    (folder / "tokens.csv").write_text(f'{_TOKEN},admin,admin,"system:masters"\n')
    commands = [
        [
            etcd, f"--data-dir={folder / 'etcd'}", "--unsafe-no-fsync", "--log-level=error",
            f"--listen-client-urls=http://127.0.0.1:{store}", f"--advertise-client-urls=http://127.0.0.1:{store}",
            f"--listen-peer-urls=http://127.0.0.1:{peers}",
        ],
        [
            str(program), f"--etcd-servers=http://127.0.0.1:{store}", "--bind-address=127.0.0.1",
            f"--secure-port={port}", f"--cert-dir={folder / 'certificates'}", "--authorization-mode=RBAC",
            f"--token-auth-file={folder / 'tokens.csv'}", "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={folder / 'accounts.pem'}",
            f"--service-account-signing-key-file={folder / 'accounts.pem'}", "--service-cluster-ip-range=10.96.0.0/16",
        ],
    ]  # fmt: skip
    running: list[subprocess.Popen[bytes]] = []
    try:
        with (folder / "log").open("wb") as log:
            running += [subprocess.Popen(command, stdout=log, stderr=log, cwd=folder) for command in commands]
        server = Server(port, folder / "certificates" / "apiserver.crt", kubectl_program)
        for _ in range(600):
            assert all(process.poll() is None for process in running), (folder / "log").read_text()[-3000:]
            ready = server.kubectl("get", "--raw", "/readyz").returncode == 0
            if ready and server.kubectl("get", "namespace", "default").returncode == 0:
                break
            time.sleep(0.2)
        yield server
    finally:
        for process in reversed(running):
            process.kill()  # nothing is kept; asked to end, an API server waits a minute for its watches
            process.wait(30)


def _free(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports
