"""Real S3 services for tests: MinIO and the Versity gateway, as processes of this machine that can be ended in between.

The programs come from EKIBEN_MINIO and EKIBEN_VERSITYGW, the cache that the test cluster builds into, or PATH.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from registry.s3 import Bucket, S3Config
from registry.s3_store import S3Store
from registry.store import UNFINISHED, DirectoryStore, ObjectStore
from tests.cluster import programs
from tests.servers import free_port

ACCESS, SECRET = "ekiben-tests", "a-secret-of-the-tests"
_DEADLINE = 60.0  # seconds that a start may take on a busy machine


def find(name: str) -> str:
    """The program's path; the test is skipped where there is none."""
    given = os.environ.get(f"EKIBEN_{name.upper()}")
    if given:
        return given
    if programs.go_is_there() and programs.find(name).exists():
        return str(programs.find(name))
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (python -m tests.cluster builds it)")
    return found


@dataclass
class Server:
    """An S3 service on a port of its own, with its data in a folder."""

    program: str
    folder: Path
    tls: Path | None = None  # folder of public.crt and private.key
    host: str = "127.0.0.1"
    environment: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        self._program = find(self.program)

    @property
    def endpoint(self) -> str:
        return f"{'http' if self.tls is None else 'https'}://{self.host}:{self.port}"

    @property
    def settings(self) -> dict[str, str]:
        """What tells a service to keep its objects here."""
        return {
            "EKIBEN_S3_ENDPOINT": self.endpoint, "EKIBEN_S3_ACCESS_KEY": ACCESS, "EKIBEN_S3_SECRET_KEY": SECRET,
        }  # fmt: skip

    def start(self) -> Server:
        log = (self.folder / "log").open("ab")
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(self.folder), "ROOT_ACCESS_KEY": ACCESS, "ROOT_SECRET_KEY": SECRET,
            "MINIO_ROOT_USER": ACCESS, "MINIO_ROOT_PASSWORD": SECRET, "MINIO_UPDATE": "off", **self.environment,
        }  # fmt: skip
        with log:
            self.process = subprocess.Popen(self._command(), env=environment, stdout=log, stderr=log)
        end = time.monotonic() + _DEADLINE
        while not self._answers():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < end, self.log()
            time.sleep(0.05)
        return self

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-4000:]

    def config(self, bucket: str, **others: object) -> S3Config:
        values: dict[str, object] = {"access_key": ACCESS, "secret_key": SECRET, "region": "us-east-1", **others}
        return S3Config(self.endpoint, bucket, **values)  # type: ignore[arg-type]

    def store(self, bucket: str, *, first_part: int = 5 * 1024 * 1024, **others: object) -> S3Store:
        store = S3Store(Bucket(self.config(bucket, **others)), first_part=first_part)
        store.prepare()
        return store

    def _command(self) -> list[str]:
        data, address = str(self.folder / "data"), f"{self.host}:{self.port}"
        if self.program == "minio":
            certificates = ["--certs-dir", str(self.tls)] if self.tls is not None else []
            return [self._program, "server", "--quiet", "--address", address, *certificates, data]
        pair = ["--cert", str(self.tls / "public.crt"), "--key", str(self.tls / "private.key")] if self.tls else []
        return [self._program, "--port", address, *pair, "posix", data]

    def _answers(self) -> bool:
        with httpx.Client(trust_env=False, verify=False, timeout=2.0) as client:
            try:
                if self.program == "minio":
                    return client.get(f"{self.endpoint}/minio/health/ready").status_code == 200
                return client.get(self.endpoint).status_code < 500
            except httpx.HTTPError:
                return False


def leftovers(store: ObjectStore) -> list[str]:
    """What the store holds besides objects: streams and uploads that are not ended."""
    if isinstance(store, DirectoryStore):
        return [path.name for path in (store.root / UNFINISHED).iterdir()]
    assert isinstance(store, S3Store)
    return [info.key for info in store._bucket.objects(f"{UNFINISHED}/")]


@pytest.fixture
def own_minio(tmp_path: Path) -> Iterator[Server]:
    """A MinIO of this test's own, to be killed and started again."""
    server = Server("minio", tmp_path / "own-minio").start()
    yield server
    server.kill()
