"""Stores of every kind for the same tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from registry.store import DirectoryStore, ObjectStore
from tests.object_stores import Server

_buckets = itertools.count()


def _server(program: str, folder: Path) -> Iterator[Server]:
    server = Server(program, folder)
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def minio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from _server("minio", tmp_path_factory.mktemp("minio"))


@pytest.fixture(scope="session")
def versitygw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from _server("versitygw", tmp_path_factory.mktemp("versitygw"))


SERVERS = [
    pytest.param("minio", marks=pytest.mark.needs_minio),
    pytest.param("versitygw", marks=pytest.mark.needs_versitygw),
]


@pytest.fixture(params=SERVERS)
def s3(request: pytest.FixtureRequest) -> Server:
    """A running S3 service, shared by the session's tests."""
    server: Server = request.getfixturevalue(request.param)
    return server


@pytest.fixture
def bucket() -> str:
    """The name of a bucket that no other test uses."""
    return f"test-{next(_buckets)}"


@pytest.fixture(params=["directory", *SERVERS])
def new_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], ObjectStore]]:
    """Makes empty stores of one kind."""
    if request.param == "directory":
        yield lambda: DirectoryStore(tmp_path / f"objects-{next(_buckets)}")
        return
    server: Server = request.getfixturevalue(request.param)
    made = []

    def make() -> ObjectStore:
        made.append(server.store(f"test-{next(_buckets)}"))
        return made[-1]

    yield make
    for store in made:
        store.close()


@pytest.fixture
def store(new_store: Callable[[], ObjectStore]) -> ObjectStore:
    return new_store()
