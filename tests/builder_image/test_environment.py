from __future__ import annotations

import multiprocessing
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from builder_image import environment, lock
from builder_image.installer import Tools
from registry.errors import UserError

MakeWheel = Callable[..., Path]


def resolve(lines: list[str], tmp_path: Path, tools: Tools) -> lock.Lock:
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    return lock.resolve(lines, python="3.11", work=work, tools=tools)


def test_an_environment_runs_what_the_lock_names_and_is_made_once(
    tmp_path: Path, index: Path, make_wheel: MakeWheel, tools: Tools
) -> None:
    make_wheel(index, "alpha", "1.0", scripts={"alpha-say": "alpha:main"})
    pins, cache = resolve(["alpha"], tmp_path, tools), tmp_path / "environments"
    made = environment.ensure(pins, python=environment.minor(None), cache=cache, tools=tools)
    assert not made.reused
    assert made.lock_digest == pins.digest
    out = subprocess.check_output([made.interpreter, "-c", "import alpha; print(alpha.VERSION)"], text=True)
    assert out == "1.0\n"
    before = made.interpreter.lstat().st_mtime_ns
    assert environment.ensure(pins, python=environment.minor(None), cache=cache, tools=tools).reused
    assert made.interpreter.lstat().st_mtime_ns == before
    assert "tmp" not in (made.dir / "bin" / "alpha-say").read_text()


def test_another_file_under_a_pinned_name_is_not_installed(
    tmp_path: Path, index: Path, make_wheel: MakeWheel, tools: Tools
) -> None:
    make_wheel(index, "alpha", "1.0")
    pins = resolve(["alpha"], tmp_path, tools)
    make_wheel(index, "alpha", "1.0", files={"alpha/__init__.py": "evil = True\n"})
    fresh = Tools(tools.uv, tools.processes, {**tools.env, "UV_CACHE_DIR": str(tmp_path / "other-cache")})
    with pytest.raises(Exception, match="alpha"):
        environment.ensure(pins, python="3.11", cache=tmp_path / "environments", tools=fresh)
    assert not [path for path in (tmp_path / "environments").iterdir() if path.is_dir()]


def test_a_wheel_for_another_machine_is_no_wheel(
    tmp_path: Path, index: Path, make_wheel: MakeWheel, tools: Tools
) -> None:
    make_wheel(index, "alpha", "1.0", tag="cp311-cp311-win32")
    pins = resolve(["alpha"], tmp_path, tools)
    with pytest.raises(UserError) as caught:
        environment.ensure(pins, python="3.11", cache=tmp_path / "environments", tools=tools)
    assert caught.value.code == "no_wheel"
    assert "alpha" in caught.value.detail


def test_what_a_killed_builder_left_is_removed_by_the_next(
    tmp_path: Path, index: Path, make_wheel: MakeWheel, tools: Tools
) -> None:
    make_wheel(index, "alpha", "1.0")
    pins, cache = resolve(["alpha"], tmp_path, tools), tmp_path / "environments"
    half = cache / f".{environment.key(pins, '3.11')}.99999.tmp"
    half.mkdir(parents=True)
    (half / "pyvenv.cfg").write_text("home = /nowhere\n")
    made = environment.ensure(pins, python="3.11", cache=cache, tools=tools)
    assert [path for path in cache.iterdir() if path.is_dir()] == [made.dir]


def test_an_environment_whose_interpreter_is_gone_is_made_again(
    tmp_path: Path, index: Path, make_wheel: MakeWheel, tools: Tools
) -> None:
    make_wheel(index, "alpha", "1.0")
    pins, cache = resolve(["alpha"], tmp_path, tools), tmp_path / "environments"
    made = environment.ensure(pins, python="3.11", cache=cache, tools=tools)
    made.interpreter.unlink()
    made.interpreter.symlink_to("/nowhere/python")
    assert not environment.ensure(pins, python="3.11", cache=cache, tools=tools).reused
    assert os.path.exists(made.interpreter)


def _ensure(pins: lock.Lock, cache: Path, tools: Tools, answers: multiprocessing.Queue[bool]) -> None:
    answers.put(environment.ensure(pins, python="3.11", cache=cache, tools=tools).reused)


def test_two_builders_that_want_the_same_environment_make_it_once(
    tmp_path: Path, index: Path, make_wheel: MakeWheel, tools: Tools
) -> None:
    make_wheel(index, "alpha", "1.0")
    pins, cache = resolve(["alpha"], tmp_path, tools), tmp_path / "environments"
    fork = multiprocessing.get_context("fork")
    answers: multiprocessing.Queue[bool] = fork.Queue()
    racers = [fork.Process(target=_ensure, args=(pins, cache, tools, answers)) for _ in range(2)]
    for racer in racers:
        racer.start()
    found = sorted(answers.get(timeout=60) for _ in racers)
    for racer in racers:
        racer.join(timeout=60)
    assert found == [False, True]


@pytest.mark.parametrize("python", ["2.7", "3.10", "4.0", "3", "3.11; rm"])
def test_a_python_that_cannot_be_served_is_refused(python: str) -> None:
    with pytest.raises(UserError) as caught:
        environment.minor(python)
    assert caught.value.code == "bad_python"
