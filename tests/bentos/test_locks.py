"""What the locks of kinds may hold: nothing of CUDA for a CPU, one lock for TensorFlow, no more than was planned."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from registry.kinds import Kind, Kinds

BENTOS = Path(__file__).resolve().parents[2] / "bentos"
KINDS = Kinds.load(BENTOS).all
SHARED = ("tensorflow", "cargo", "image_search", "violation")

# bindings that ask a driver for its figures: BentoML needs them, 50 kB of Python
_HARMLESS = frozenset({"nvidia-ml-py"})
_CUDA = re.compile(r"nvidia[-_].*|triton|pytorch-triton.*|.*[-_]cu\d\d+.*|.*[-_]gpu|cupy.*")

IMAGES = {
    "implementation_name": "cpython", "os_name": "posix", "platform_machine": "x86_64", "platform_system": "Linux",
    "platform_python_implementation": "CPython", "python_full_version": "3.11.9", "python_version": "3.11",
    "sys_platform": "linux",
}  # fmt: skip
"""The platform of the images, wherever this test runs."""


def locked(text: str) -> list[Requirement]:
    """Every package of a lock, with its marker."""
    lines = (line.rstrip(" \\") for line in text.splitlines() if line and line[0] not in " #")
    return [Requirement(line) for line in lines]


def cuda(text: str) -> list[str]:
    names = (requirement.name.lower() for requirement in locked(text))
    return [name for name in names if _CUDA.fullmatch(name) and name not in _HARMLESS]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_nothing_of_cuda_is_locked_for_a_cpu(kind: Kind) -> None:
    if kind.device == "cpu":
        assert cuda((kind.dir / "requirements.txt").read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "nvidia-cublas-cu12==12.8.4.1 ; sys_platform == 'linux' \\",
        "nvidia-nccl-cu12==2.27 \\",
        "triton==3.4.0 \\",
        "onnxruntime-gpu==1.31.1 \\",
        "torch-cu126==2.9.0 ; python_version > '3' \\",
    ],
)
def test_such_a_wheel_would_be_found(line: str) -> None:
    assert cuda(f"numpy==2.4.6 \\\n    --hash=sha256:00\n{line}\n    --hash=sha256:00\n")
    assert not cuda("nvidia-ml-py==13.615.71 \\\n    --hash=sha256:00\ntensorflow-cpu==2.21.0\n")


@pytest.mark.parametrize("file", ["requirements.in", "requirements.txt"])
def test_the_tensorflow_kinds_share_one_lock_and_so_one_layer(file: str) -> None:
    first = (BENTOS / SHARED[0] / file).read_bytes()
    for name in SHARED[1:]:
        assert (BENTOS / name / file).read_bytes() == first, f"copy bentos/{SHARED[0]}/{file} to bentos/{name}"


@pytest.mark.skipif(sys.platform != "linux", reason="other wheels are installed here than in the images")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_packages_of_a_kind_keep_within_its_budget(kind: Kind) -> None:
    """What the locked packages take where they are installed, here, by what each says of its own files.

    The environment of the tests holds the packages of every kind, so nothing is built or fetched. Another patch version
    of a package weighs about the same; one that is not there at all must not count as nothing.
    """
    assert kind.image is not None, f'{kind.name}/kind.toml names no budget: image = "…Mi"'
    size = 0
    for requirement in locked((kind.dir / "requirements.txt").read_text()):
        if requirement.marker is None or requirement.marker.evaluate(IMAGES):
            size += sum(file.size or 0 for file in importlib.metadata.distribution(requirement.name).files or ())
    number, unit = int(kind.image[:-2]), kind.image[-2:]
    budget = number * 2 ** {"Mi": 20, "Gi": 30}[unit]
    assert size <= budget, f"{size / 2**20:.0f} MiB of packages are more than {kind.image}: lock less, or plan for more"
    assert size >= budget * 0.75, f"{size / 2**20:.0f} MiB of packages: a budget of {kind.image} would hide growth"
