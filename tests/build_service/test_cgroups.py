"""Where control groups can be made, by what Linux says of itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from build_service import cgroups

MOUNTS_V1 = """\
24 1 0:21 / / rw - ext4 /dev/root rw
33 32 0:30 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
36 32 0:33 {root} {folder} rw,relatime - cgroup cgroup rw,memory
"""
MOUNTS_V2 = "36 32 0:33 / {folder} rw,relatime - cgroup2 cgroup rw\n"


def test_a_group_of_version_1_is_made_below_the_services_own(tmp_path: Path) -> None:
    """With the hierarchy's root seen from inside of a container, where it is mounted from a group of the host's."""
    own = tmp_path / "job"
    own.mkdir()
    found = cgroups._own("3:memory:/docker/1/job\n1:cpu:/\n", MOUNTS_V1.format(root="/docker/1", folder=tmp_path))
    assert found == [(1, own)]


def test_a_group_that_has_other_processes_is_not_divided(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu memory\n")
    (tmp_path / "cgroup.subtree_control").write_text("\n")
    (tmp_path / "cgroup.procs").write_text("1\n")
    assert cgroups.find("0::/\n", MOUNTS_V2.format(folder=tmp_path)) is None
    assert not (tmp_path / "ekiben.service").exists()


def test_no_groups_where_memory_is_no_controller(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu\n")
    assert cgroups.find("0::/\n", MOUNTS_V2.format(folder=tmp_path)) is None
    assert cgroups.find("", "") is None


def test_what_the_kernel_ends_for_its_memory_is_known(tmp_path: Path) -> None:
    groups = cgroups.find()
    if groups is None:
        pytest.skip("this process may make no control groups")
    group = groups.make("test", 64 << 20)
    assert group is not None
    try:
        program = f"open({group.procs!r}, 'w').write('0'); kept = b'x' * (256 << 20)"
        assert not group.killed()
        done = subprocess.run([sys.executable, "-c", program], check=False)
        assert done.returncode == -9
        assert group.killed()
    finally:
        group.remove()
    assert not group.folder.exists()
