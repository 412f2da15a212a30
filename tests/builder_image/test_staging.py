from __future__ import annotations

import io
import os
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from builder_image import environment, lock, staging
from builder_image.base import BasePlatform
from builder_image.installer import Tools
from builder_image.layers import Layer
from registry.errors import UserError

MakeWheel = Callable[..., Path]


def base(
    version: str = "3.11.2", python: str = "/usr/local/bin/python3.11", libc: str = "manylinux_2_36"
) -> BasePlatform:
    soabi = f"cpython-3{version.split('.')[1]}-x86_64-linux-gnu"
    return BasePlatform("linux/amd64", "sha256:" + "b" * 64, python, version, soabi, libc, {}, ())


def resolve(lines: list[str], tmp_path: Path, tools: Tools) -> lock.Lock:
    work = tmp_path / "resolve"
    work.mkdir(exist_ok=True)
    return lock.resolve(lines, python="3.11", work=work, tools=tools)


def make(
    pins: lock.Lock, on: BasePlatform, folder: Path, tools: Tools, recall: staging.Recall = lambda key: None
) -> tuple[Layer, bool]:
    (folder / "work").mkdir(parents=True, exist_ok=True)
    kept = staging.Kept(folder / "kept", recall)
    return staging.dependencies(pins, on, kept=kept, work=folder / "work", tools=tools, compression="none")


def members(layer: Layer) -> dict[str, tuple[tarfile.TarInfo, bytes]]:
    found = {}
    with tarfile.open(fileobj=io.BytesIO(b"".join(layer.open()))) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            found[member.name] = (member, content.read() if content is not None else b"")
    return found


@pytest.fixture
def pins(tmp_path: Path, index: Path, make_wheel: MakeWheel, tools: Tools) -> lock.Lock:
    source = "NAMES = {'a', 'b', 'c'}\ndef main():\n    return NAMES\n"
    make_wheel(
        index, "alpha", "1.0", requires=["beta"], files={"alpha/__init__.py": source}, scripts={"say": "alpha:main"}
    )
    make_wheel(
        index,
        "beta",
        "2.0",
        files={"beta/__init__.py": "", "beta-nspkg.pth": "import sys\n", "beta/old.py": "print 1\n"},
    )
    return resolve(["alpha"], tmp_path, tools)


def test_two_folders_umasks_and_time_zones_give_the_same_layer(tmp_path: Path, pins: lock.Lock, tools: Tools) -> None:
    first, _ = make(pins, base(), tmp_path / "one", tools)
    env = {**tools.env, "TZ": "Asia/Tokyo", "UV_CACHE_DIR": str(tmp_path / "other-cache"), "USER": "somebody"}
    old = os.umask(0o077)
    try:
        second, _ = make(pins, base(), tmp_path / "a" / "longer" / "two", Tools(tools.uv, tools.processes, env))
    finally:
        os.umask(old)
    assert first.digest == second.digest


def test_the_environment_belongs_to_the_base_and_names_nothing_of_the_builder(
    tmp_path: Path, pins: lock.Lock, tools: Tools
) -> None:
    layer, _ = make(pins, base(), tmp_path / "one", tools)
    found = members(layer)
    link = found["app/.venv/bin/python"][0]
    assert (link.issym(), os.path.normpath(f"/app/.venv/bin/{link.linkname}")) == (True, "/usr/local/bin/python3.11")
    assert b"home = /usr/local/bin\n" in found["app/.venv/pyvenv.cfg"][1]
    assert found["app/.venv/bin/say"][1].startswith(b"#!/app/.venv/bin/python\n")
    assert found["app/.venv/bin/say"][0].mode == 0o755
    assert "app/.venv/lib/python3.11/site-packages/beta-nspkg.pth" in found
    for name, (_, content) in found.items():
        assert str(tmp_path).encode() not in content, name
        assert environment.interpreter("3.11").encode() not in content, name


def test_bytecode_stays_valid_under_fixed_times_and_names_its_place_in_the_image(
    tmp_path: Path, pins: lock.Lock, tools: Tools
) -> None:
    layer, _ = make(pins, base(), tmp_path / "one", tools)
    found = members(layer)
    pyc = found["app/.venv/lib/python3.11/site-packages/alpha/__pycache__/__init__.cpython-311.pyc"][1]
    (flags,) = struct.unpack("<I", pyc[4:8])
    assert flags == 0b01  # hash-based, and the source is not looked at
    assert b"/app/.venv/lib/python3.11/site-packages/alpha/__init__.py" in pyc
    assert "app/.venv/lib/python3.11/site-packages/beta/old.py" in found  # does not compile, and harms nothing


def test_another_minor_version_gets_its_folder_and_no_bytecode(tmp_path: Path, pins: lock.Lock, tools: Tools) -> None:
    layer, _ = make(pins, base("3.12.4", "/usr/bin/python3.12"), tmp_path / "one", tools)
    names = members(layer)
    assert "app/.venv/lib/python3.12/site-packages/alpha/__init__.py" in names
    assert not [name for name in names if name.endswith(".pyc") or "python3.11" in name]


def test_a_patch_of_the_base_reinstalls_nothing_and_another_libc_does(
    tmp_path: Path, pins: lock.Lock, tools: Tools
) -> None:
    first, had = make(pins, base("3.11.2"), tmp_path / "one", tools)
    again, still = make(pins, base("3.11.9"), tmp_path / "one", tools)
    assert (had, still, first.digest) == (False, True, again.digest)
    keys = {staging.dependencies_key(pins, base(libc=libc), "zstd") for libc in ("manylinux_2_28", "manylinux_2_36")}
    assert len(keys) == 2


def test_a_fresh_machine_takes_the_layer_that_the_registry_remembers(
    tmp_path: Path, pins: lock.Lock, tools: Tools
) -> None:
    first, _ = make(pins, base(), tmp_path / "one", tools)
    key = staging.dependencies_key(pins, base(), "none")
    offline = Tools(tools.uv, tools.processes, {**tools.env, "UV_FIND_LINKS": str(tmp_path / "nothing")})
    found, had = make(pins, base(), tmp_path / "fresh", offline, lambda asked: first if asked == key else None)
    assert (had, found.digest) == (True, first.digest)


def test_a_package_without_a_wheel_for_the_base_is_named(
    tmp_path: Path, index: Path, make_wheel: MakeWheel, tools: Tools
) -> None:
    make_wheel(index, "alpha", "1.0", tag="cp311-cp311-manylinux_2_38_x86_64")
    pins = resolve(["alpha"], tmp_path, tools)
    with pytest.raises(UserError, match="alpha") as caught:
        make(pins, base(libc="manylinux_2_28"), tmp_path / "one", tools)
    assert caught.value.code == "no_wheel"
