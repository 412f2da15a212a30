"""Tests that need a program from outside: skipped with a clear word where it is absent, never where CI runs them.

`EKIBEN_NEVER_SKIP=1` (set by `.ci/run`) turns such a skip into a failure.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from xdist.scheduler import LoadFileScheduling

from tests.cluster.images import base_layout
from tests.servers import PostgreSQL, program

pytest.register_assert_rewrite("tests.bentos.conformance")

# Tests start hundreds of Python processes: none of them should compile again what an earlier one has compiled.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
hypothesis.settings.register_profile("ekiben", deadline=None)  # no test depends on how fast the machine is
hypothesis.settings.load_profile("ekiben")

pytest_plugins = ("tests.object_stores",)

_PROGRAMS = {
    "needs_registry": ("docker-registry",),
    "needs_podman": ("podman", "runc"),
    "needs_buildah": ("buildah",),
    "needs_postgres": ("postgres", "initdb"),
}
_PACKAGES = {"postgres": "postgresql", "initdb": "postgresql"}  # where they are called otherwise
_FOR_ROOT = ("needs_podman", "needs_buildah")
_WANTING = ("is not installed", "needs root")
# Files whose tests share nothing and are long: each test goes to whichever worker is free.
_APART = ("test_killed.py", "test_image_end_to_end.py")


class _ByFile(LoadFileScheduling):
    """With several workers a file stays on one of them, in its order, unless its tests share nothing."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return nodeid if file.endswith(_APART) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    return _ByFile(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker, programs in _PROGRAMS.items():
            if item.get_closest_marker(marker) is None:
                continue
            for name in programs:
                if program(name) is None:
                    package = _PACKAGES.get(name, name)
                    item.add_marker(pytest.mark.skip(reason=f"{name} is not installed (apt-get install {package})"))
            if marker in _FOR_ROOT and os.geteuid() != 0:
                item.add_marker(pytest.mark.skip(reason=f"{programs[0]} needs root here"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and os.environ.get("EKIBEN_NEVER_SKIP") and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if any(word in reason for word in _WANTING):
            report.outcome = "failed"
            report.longrepr = f"skipped where nothing may be skipped: {reason}"
    return report


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def debian_base() -> Path:
    """A Debian base with Python 3.11 as an OCI layout, made once by debootstrap; the cluster's tests use the same."""
    if shutil.which("debootstrap") is None or os.geteuid() != 0:
        pytest.skip("making a base needs root and debootstrap (apt-get install debootstrap)")
    return base_layout()


@pytest.fixture(scope="session")
def postgresql() -> Generator[PostgreSQL, None, None]:
    server = PostgreSQL()
    yield server
    server.close()


_BOTH = [pytest.param("sqlite"), pytest.param("postgresql", marks=pytest.mark.needs_postgres)]
_count = itertools.count()


@pytest.fixture(params=_BOTH)
def fresh_database(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """URLs of new empty databases, on either of the two that Ekiben works with."""
    if request.param == "sqlite":
        return lambda: f"sqlite:///{tmp_path / f'database-{next(_count)}.db'}"
    server: PostgreSQL = request.getfixturevalue("postgresql")
    return lambda: server.create(f"ekiben_{os.getpid()}_{next(_count)}")
