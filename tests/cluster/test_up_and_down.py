"""A cluster that was killed while it came up comes up again, and leaves nothing when it goes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import cluster as clusters
from tests.cluster import programs
from tests.cluster.cluster import Cluster
from tests.cluster.workloads import eventually, run

_COMMAND = [sys.executable, "-m", "tests.cluster"]


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=clusters.ROOT.parent, prefix="ekiben-") as folder:
        root = Path(folder) / "c"
        yield root
        clusters.down(root)


def test_a_cluster_killed_half_way_comes_up_again_and_leaves_nothing(
    cluster: Cluster, namespace: str, python_image: str, root: Path
) -> None:
    """A second cluster beside the session's own, which must not notice."""
    assert cluster.root is not None
    before = mounts_of(cluster.root)
    with subprocess.Popen(
        [*_COMMAND, "up", "--root", str(root)], cwd=programs.PROJECT, stdout=subprocess.PIPE, text=True
    ) as coming:
        assert coming.stdout is not None
        next(line for line in coming.stdout if "API server" in line)
        coming.kill()
    assert clusters.find(root) is None

    again = clusters.up(root, print)
    kept = json.loads((root / "node.json").read_text())
    assert len(again.get("nodes")["items"]) == 1

    os.kill(kept["pid"], signal.SIGKILL)
    eventually(lambda: "down" if clusters.status(root) == ["down"] else "")
    assert clusters.up(root, print).get("nodes")["items"][0]["metadata"]["name"] == clusters.NAME

    names = {kept["name"], json.loads((root / "node.json").read_text())["name"]}
    clusters.down(root)
    assert not root.exists()
    for name in names:
        assert what_bears(name) == []
    assert str(root) not in Path("/proc/mounts").read_text()
    assert str(root) not in everything_that_runs()
    assert before <= mounts_of(cluster.root)
    run(cluster, namespace, "beside", python_image, "pass")


def mounts_of(root: Path) -> set[str]:
    """What is mounted in the node that is not of a pod."""
    pid = json.loads((root / "node.json").read_text())["pid"]
    places = [line.split()[1] for line in Path(f"/proc/{pid}/mounts").read_text().splitlines()]
    return {place for place in places if "/pods/" not in place and not place.startswith("/run/")}


def what_bears(name: str) -> list[str]:
    """Cables, routes, rules and cgroups of the host with this name."""
    commands = (["ip", "link"], ["ip", "route"], ["iptables-save"])
    texts = [subprocess.run(each, capture_output=True, text=True, check=True).stdout for each in commands]
    lines = [line for text in texts for line in text.splitlines() if name in line]
    return lines + [str(each) for each in Path("/sys/fs/cgroup").glob(f"**/{name}")]


def everything_that_runs() -> str:
    return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
