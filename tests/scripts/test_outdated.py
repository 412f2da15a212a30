"""What is out of date in the locks, and what holds it back."""

from __future__ import annotations

from scripts import outdated

LOCK = """\
numpy==2.3.1 ; python_full_version < '3.12' \\
    --hash=sha256:00
numpy==2.4.0 ; python_full_version >= '3.12' \\
    --hash=sha256:01
PyYAML==6.0.3 \\
    --hash=sha256:02
    # via bentoml==1.0
"""


def test_a_package_with_several_versions_is_read_as_one() -> None:
    assert outdated.pins(LOCK) == {"numpy": "2.3.1, 2.4.0", "pyyaml": "6.0.3"}


def test_changed_added_and_removed_packages_are_listed() -> None:
    new = LOCK.replace("PyYAML==6.0.3", "pyyaml==6.0.4").replace("numpy==2.3.1", "regex==1.0").replace("2.4.0", "2.4.1")
    assert outdated.changes(LOCK, new) == [
        outdated.Change("numpy", "2.3.1, 2.4.0", "2.4.1"),
        outdated.Change("pyyaml", "6.0.3", "6.0.4"),
        outdated.Change("regex", "absent", "1.0"),
    ]


def test_the_same_lock_has_no_changes() -> None:
    assert outdated.changes(LOCK, LOCK) == []


def test_the_requirement_that_excludes_the_newest_release_is_named() -> None:
    listed = [{"name": "h5py", "version": "3.14.0", "latest_version": "3.16.0"}]
    requirers = {
        "tensorflow_cpu 2.21.0": ["h5py<3.15.0,>=3.11.0", "numpy>=1.26"],
        "keras 3.15": ["h5py"],
        "other 1": ['h5py<1; extra == "old"'],
    }
    assert outdated.held_back(listed, requirers) == [
        outdated.HeldBack("h5py", "3.14.0", "3.16.0", ("tensorflow_cpu 2.21.0 (h5py<3.15.0,>=3.11.0)",))
    ]


def test_a_package_that_no_single_requirement_holds_back_has_no_reason() -> None:
    listed = [{"name": "mlflow", "version": "3.17.2", "latest_version": "3.18.0"}]
    assert outdated.held_back(listed, {"ekiben-server 0.1.0": ["mlflow<4,>=3.17"]})[0].by == ()
