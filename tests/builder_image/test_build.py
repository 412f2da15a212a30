"""`python -m builder_image` as build_service starts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builder_image import bento
from builder_image.build import recipe_of
from builder_image.installer import Tools
from builder_image.lock import parse
from builder_image.model import read
from builder_image.spec import BuildSpec

REPOSITORY = Path(__file__).parents[2]
KIND_TOML = 'name = "tiny"\nservice = "service:Tiny"\npackages = ["bentos.serving"]\npredict = "/predict"\n'
PYLOCK = "[[packages]]\nname = 'six'\nversion = '1.17.0'\nwheels = [{name = 'six.whl'}]\n"
KIND_SERVICE = """
import bentoml

@bentoml.service(name="tiny")
class Tiny:
    @bentoml.api(route="/predict")
    def predict(self, inputs: list[float]) -> dict[str, list[float]]:
        return {"outputs": inputs}
"""


@pytest.fixture
def kind(tmp_path: Path) -> Path:
    """A kind that predicts what it is given, with the lock that the lightgbm kind has committed."""
    folder = tmp_path / "bentos" / "tiny"
    folder.mkdir(parents=True)
    (folder / "kind.toml").write_text(KIND_TOML)
    (folder / "service.py").write_text(KIND_SERVICE)
    (folder / "bentofile.yaml").write_text("service: 'service:Tiny'\n")
    (folder / "requirements.in").write_text("bentoml==1.4.40\n")
    (folder / "requirements.txt").write_text((REPOSITORY / "bentos" / "lightgbm" / "requirements.txt").read_text())
    return folder


def spec(tmp_path: Path, model: Path, kind: Path, **more: Any) -> Path:
    home = tmp_path / "home"
    body = {
        "schema": "ekiben.build.v1",
        "work": str(home / "builds" / "1" / "work"),
        "result": str(home / "builds" / "1" / "result.json"),
        "model": {"dir": str(model)},
        "kind": {"name": kind.name, "dir": str(kind)},
        "serving": str(REPOSITORY / "bentos" / "serving"),
        "cache": {"environments": str(home / "environments"), "bentos": str(home / "bentos")},
        "allow_code": False,
        "lock": None,
        "image": None,
        **more,
    }
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(body))
    return file


def run(file: Path, **env: str) -> tuple[int, list[dict[str, Any]], dict[str, Any]]:
    """(exit code, progress lines, result)"""
    done = subprocess.run(
        [sys.executable, "-m", "builder_image", file], cwd=REPOSITORY, env={**os.environ, **env}, stdout=subprocess.PIPE
    )
    result = json.loads(Path(json.loads(file.read_text())["result"]).read_text())
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], result


@pytest.mark.slow
def test_new_weights_install_nothing_and_import_nothing(
    tmp_path: Path, kind: Path, make_version: Callable[..., Path]
) -> None:
    first = make_version(tmp_path / "m1", {"w.txt": "1"}, kind="tiny", format="plain")
    code, lines, result = run(spec(tmp_path, first, kind))
    assert code == 0
    assert Path(result["environment"]["dir"], "bin", "python").exists()
    assert Path(result["bento"]["dir"], "src", "bentos", "serving", "__init__.py").is_file()
    assert result["predict"] == "/predict"
    assert [stage["stage"] for stage in result["stages"]] == ["fetch", "resolve", "environment", "bento"]
    assert {"stage": "environment", "message": "installed"} in lines
    second = make_version(tmp_path / "m2", {"w.txt": "2"}, kind="tiny", format="plain")
    code, lines, again = run(spec(tmp_path, second, kind), UV_OFFLINE="1", UV_CACHE_DIR=str(tmp_path / "empty"))
    assert code == 0
    assert [line["message"] for line in lines].count("already there") == 2
    assert (again["bento"], again["environment"]) == (result["bento"], result["environment"])
    assert again["identity"] != result["identity"]
    assert not (tmp_path / "home" / "builds" / "1" / "work").exists()
    code, _, same = run(spec(tmp_path, first, kind))
    assert (code, same["identity"]) == (0, result["identity"])


def test_a_damaged_file_stops_the_build(tmp_path: Path, kind: Path, make_version: Callable[..., Path]) -> None:
    model = make_version(tmp_path / "m", {"w.txt": "1"}, kind="tiny", format="plain")
    (model / "files" / "w.txt").write_text("2")
    code, _, result = run(spec(tmp_path, model, kind))
    assert code == 3
    assert result["error"]["code"] == "digest_mismatch"
    assert result["error"]["stage"] == "fetch"
    assert "files/w.txt" in result["error"]["message"]


def test_a_link_in_a_model_folder_is_not_followed(
    tmp_path: Path, kind: Path, make_version: Callable[..., Path]
) -> None:
    model = make_version(tmp_path / "m", {"w.txt": "1"}, kind="tiny", format="plain")
    (tmp_path / "elsewhere").write_text("1")
    (model / "files" / "w.txt").unlink()
    (model / "files" / "w.txt").symlink_to(tmp_path / "elsewhere")
    code, _, result = run(spec(tmp_path, model, kind))
    assert (code, result["error"]["code"]) == (3, "digest_mismatch")


def test_a_users_code_is_refused_without_the_permission(
    tmp_path: Path, kind: Path, make_version: Callable[..., Path]
) -> None:
    model = make_version(tmp_path / "m", {"service.py": KIND_SERVICE})
    code, _, result = run(spec(tmp_path, model, kind))
    assert (code, result["error"]["code"]) == (2, "run_code_not_allowed")
    assert result["error"]["hint"]


@pytest.mark.parametrize(
    "asked", [("requirements.txt", "six\n"), ("requirements.txt", "bentoml==1.4.1\n"), ("pylock.toml", PYLOCK)]
)
def test_packages_beyond_the_kinds_lock_are_code_of_the_users(
    tmp_path: Path, kind: Path, make_version: Callable[..., Path], asked: tuple[str, str]
) -> None:
    model = make_version(tmp_path / "m", {"w.txt": "1"}, kind="tiny", format="plain", requirements=asked)
    code, _, result = run(spec(tmp_path, model, kind))
    assert (code, result["error"]["code"]) == (2, "run_code_not_allowed")
    # also in a lock that an earlier build left
    lock = (kind / "requirements.txt").read_text() + f"six==1.17.0 --hash=sha256:{'ab' * 32}\n"
    code, _, result = run(spec(tmp_path, model, kind, lock=lock))
    assert (code, result["error"]["code"]) == (2, "run_code_not_allowed")
    assert "six" in result["error"]["message"]


def test_what_the_kinds_lock_satisfies_is_the_kind_itself(
    tmp_path: Path, kind: Path, make_version: Callable[..., Path], tools: Tools
) -> None:
    """Nothing is resolved, so nothing newer comes in, and its code is as trusted as the kind's."""
    committed = parse((kind / "requirements.txt").read_text())

    def made(number: int, requirements: str | None, **more: Any) -> bento.Recipe:
        asked = None if requirements is None else ("requirements.txt", requirements)
        model = make_version(tmp_path / f"m{number}", {"w.txt": "1"}, kind="tiny", format="plain", requirements=asked)
        order = BuildSpec.parse(spec(tmp_path, model, kind, **more).read_bytes())
        order.work.mkdir(parents=True, exist_ok=True)
        return recipe_of(order, read(model, files=True), tools)

    alone, within = made(1, None), made(2, "bentoml>=1.4\n")
    assert (within.lock, within.trusted, within.version) == (committed, True, alone.version)
    more = committed.text + f"six==1.17.0 --hash=sha256:{'ab' * 32}\n"
    allowed = made(3, "six\n", lock=more, allowed_packages=["Six"])
    assert (allowed.trusted, allowed.lock.version("six")) == (False, "1.17.0")
    assert made(4, None, lock=committed.text).trusted


def test_a_users_bad_requirement_is_the_users_error_with_a_hint(
    tmp_path: Path, kind: Path, make_version: Callable[..., Path]
) -> None:
    asked = ("requirements.txt", "--index-url https://example.org/simple\nsix\n")
    model = make_version(tmp_path / "m", {"w.txt": "1"}, kind="tiny", format="plain", requirements=asked)
    code, _, result = run(spec(tmp_path, model, kind))
    assert (code, result["error"]["code"], result["error"]["stage"]) == (2, "bad_requirements", "resolve")


def test_unknown_fields_of_a_spec_are_refused(tmp_path: Path, kind: Path, make_version: Callable[..., Path]) -> None:
    model = make_version(tmp_path / "m", {"w.txt": "1"}, kind="tiny", format="plain")
    with pytest.raises(ValueError, match="extra"):
        BuildSpec.parse(spec(tmp_path, model, kind, extra=1).read_text())


def push(base: Path, ref: str) -> dict[str, Any]:
    return {"base": str(base), "platform": "linux/amd64", "push": {"ref": ref}, "output": None, "compression": "none"}


@pytest.mark.slow
@pytest.mark.needs_registry
def test_a_fresh_machine_makes_an_image_of_new_weights_without_installing_or_importing(
    tmp_path: Path, kind: Path, make_version: Callable[..., Path], python_base: Path, registry_server: Any
) -> None:
    """The registry has the deps and code layers of an earlier build, and what is to be known of the Bento."""
    order = push(python_base, f"{registry_server.host}/ekiben:tiny-1")
    first = make_version(tmp_path / "m1", {"w.txt": "1"}, kind="tiny", format="plain")
    code, _, result = run(spec(tmp_path, first, kind, image=order))
    assert code == 0
    assert result["bento"] is not None
    second = make_version(tmp_path / "m2", {"w.txt": "2"}, kind="tiny", format="plain")
    empty = {"environments": str(tmp_path / "fresh" / "e"), "bentos": str(tmp_path / "fresh" / "b")}
    order = push(python_base, f"{registry_server.host}/ekiben:tiny-2")
    offline = {"UV_OFFLINE": "1", "UV_CACHE_DIR": str(tmp_path / "no-packages")}
    code, _, fresh = run(spec(tmp_path, second, kind, image=order, cache=empty), **offline)
    assert (code, fresh.get("error")) == (0, None)
    assert [stage["stage"] for stage in fresh["stages"]] == ["fetch", "resolve", "deps", "code", "push"]
    assert (fresh["bento"], fresh["environment"]) == (None, None)
    assert (fresh["predict"], fresh["schema"]) == (result["predict"], result["schema"])
    assert {layer["name"]: layer["reused"] for layer in fresh["image"]["layers"]} == {
        "base": True, "deps": True, "code": True, "model": False,
    }  # fmt: skip
    order = {**push(python_base, ""), "push": None, "output": str(tmp_path / "local.tar")}
    code, _, local = run(spec(tmp_path, second, kind, image=order))
    assert local["image"]["digest"] == fresh["image"]["digest"], "the same image, whoever made its layers"


@pytest.mark.slow
@pytest.mark.needs_registry
def test_a_version_whose_image_was_pushed_is_not_read_again(
    tmp_path: Path, kind: Path, make_version: Callable[..., Path], python_base: Path, registry_server: Any
) -> None:
    model = make_version(tmp_path / "m", {"w.txt": "1" * 3_000_000}, kind="tiny", format="plain")
    _, _, first = run(spec(tmp_path, model, kind, image=push(python_base, f"{registry_server.host}/ekiben:a")))
    uploads = len(registry_server.requests("PATCH"))
    code, _, again = run(spec(tmp_path, model, kind, image=push(python_base, f"{registry_server.host}/ekiben:b")))
    assert code == 0
    assert all(layer["reused"] for layer in again["image"]["layers"])
    assert len(registry_server.requests("PATCH")) == uploads
    assert again["image"]["digest"] == first["image"]["digest"]


@pytest.mark.slow
def test_weights_that_were_damaged_after_the_upload_never_become_an_image(
    tmp_path: Path, kind: Path, make_version: Callable[..., Path], python_base: Path
) -> None:
    model = make_version(tmp_path / "m", {"w.txt": "1"}, kind="tiny", format="plain")
    (model / "files" / "w.txt").write_text("2")
    order = {**push(python_base, ""), "push": None, "output": str(tmp_path / "image.tar")}
    code, _, result = run(spec(tmp_path, model, kind, image=order))
    assert (code, result["error"]["code"]) == (3, "digest_mismatch")
    assert "files/w.txt" in result["error"]["message"]
    assert not (tmp_path / "image.tar").exists()


HANGS = "import pathlib, time\npathlib.Path(__file__).with_name('started').write_text('x')\ntime.sleep(600)\n"


def _has_started(folder: Path) -> bool:
    """Whether the service that hangs runs: it may write beside itself alone."""
    return any("started" in files for _, _, files in os.walk(folder))


@pytest.mark.slow
def test_when_the_parent_dies_the_build_and_all_it_started_die_and_leave_nothing_half_made(
    tmp_path: Path, kind: Path, make_version: Callable[..., Path]
) -> None:
    model = make_version(tmp_path / "m", {"service.py": HANGS, "requirements.txt": "six\n"})
    file = spec(tmp_path, model, kind, allow_code=True)
    ours, theirs = os.pipe()
    builder = subprocess.Popen(
        [sys.executable, "-m", "builder_image", file, "--lifeline-fd", str(ours)],
        cwd=REPOSITORY, pass_fds=[ours], start_new_session=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(ours)
    for _ in range(1200):
        if _has_started(tmp_path) or builder.poll() is not None:
            break
        time.sleep(0.05)
    assert _has_started(tmp_path)
    inspector = [pid for pid in _processes() if b"inspector.py" in pid[1] and str(tmp_path).encode() in pid[1]]
    assert inspector
    os.close(theirs)
    assert builder.wait(timeout=30) == -signal.SIGKILL
    for _ in range(200):
        if not [pid for pid in _processes() if str(tmp_path).encode() in pid[1]]:
            break
        time.sleep(0.05)
    assert not [pid for pid in _processes() if str(tmp_path).encode() in pid[1]]
    bentos = tmp_path / "home" / "bentos"
    assert not [path for path in bentos.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _processes() -> list[tuple[int, bytes]]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append((int(path.parent.name), path.read_bytes()))
        except OSError:
            continue
    return found
