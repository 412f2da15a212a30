"""Tests that need a program from outside: skipped with a clear word where it is absent, never where CI runs them.

`EKIBEN_NEVER_SKIP=1` (set by `.ci/run`) turns such a skip into a failure.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator

import pytest

_PROGRAMS = {
    "needs_registry": ("docker-registry",),
    "needs_podman": ("podman", "runc"),
    "needs_buildah": ("buildah",),
}
_FOR_ROOT = ("needs_podman", "needs_buildah")
_WANTING = ("is not installed", "needs root")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker, programs in _PROGRAMS.items():
            if item.get_closest_marker(marker) is None:
                continue
            for program in programs:
                if shutil.which(program) is None:
                    item.add_marker(pytest.mark.skip(reason=f"{program} is not installed (apt-get install {program})"))
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
