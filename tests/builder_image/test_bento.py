from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from builder_image import bento, lock
from builder_image.environment import Environment
from builder_image.installer import Tools
from registry.confinement import landlock
from registry.errors import UserError

LOCK = lock.parse("bentoml==1.4.40 --hash=sha256:" + "a" * 64 + "\n")
SERVICE = """
import bentoml

@bentoml.service(envs=[{"name": "COLOUR", "value": "blue"}])
class Twice:
    @bentoml.api(route="/predict")
    def predict(self, inputs: list[float]) -> dict[str, list[float]]:
        return {"outputs": [2 * value for value in inputs]}
"""


@pytest.fixture
def environment() -> Environment:
    """The environment in which the tests run: it has BentoML."""
    return Environment(Path(sys.prefix), "3.11", LOCK.digest, reused=True)


def recipe(folder: Path, trusted: bool = True, **files: str) -> bento.Recipe:
    folder.mkdir(parents=True, exist_ok=True)
    written = {"service.py": SERVICE, **{name.replace("_", "."): text for name, text in files.items()}}
    for name, text in written.items():
        (folder / name).write_text(text)
    sources = {name: folder / name for name in written}
    return bento.Recipe(
        name="twice", files=sources, lock=LOCK, python="3.11", content=bento.content_digest(sources),
        service="service:Twice", trusted=trusted, project=not trusted,
    )  # fmt: skip


def ensure(
    wanted: bento.Recipe, environment: Environment, tmp_path: Path, tools: Tools, name: str = "a"
) -> bento.Bento:
    work = tmp_path / name / "work"
    work.mkdir(parents=True, exist_ok=True)
    return bento.ensure(wanted, environment=environment, cache=tmp_path / name / "bentos", work=work, tools=tools)


def test_the_folder_is_a_true_bento(tmp_path: Path, environment: Environment, tools: Tools) -> None:
    from bentoml import Bento

    made = ensure(recipe(tmp_path / "kind", readme_md="# Hi\n"), environment, tmp_path, tools)
    loaded = Bento.from_path(str(made.dir))
    assert str(loaded.tag) == made.tag
    assert loaded.entry_service == "Twice"
    assert (made.dir / "env" / "python" / "requirements.txt").read_text() == LOCK.text
    openapi = yaml.safe_load((made.dir / "apis" / "openapi.yaml").read_text())
    assert "/predict" in openapi["paths"]
    assert made.envs == (("COLOUR", "blue"),)
    code = "import bentoml, sys; print(bentoml.load(sys.argv[1]).name)"
    home = {**os.environ, "BENTOML_HOME": str(tmp_path / "home"), "BENTOML_DO_NOT_TRACK": "True"}
    out = subprocess.check_output([sys.executable, "-c", code, str(made.dir)], text=True, env=home, cwd=tmp_path)
    assert out.strip().endswith("Twice")


def test_a_service_reads_its_own_files_below_a_hidden_folder(
    tmp_path: Path, environment: Environment, tools: Tools
) -> None:
    """BentoML refuses them there, and the state folder's usual name is ~/.ekiben."""
    service = SERVICE.replace(
        "@bentoml.service(",
        'image = bentoml.images.Image().requirements_file("requirements.txt")\n\n@bentoml.service(image=image, ',
    )
    wanted = recipe(tmp_path / "kind", trusted=False, service_py=service, requirements_txt="bentoml==1.4.40\n")
    own_files = Path(__file__).parents[2] / "bentos" / "serving" / "own_files.py"
    made = ensure(replace(wanted, own_files=own_files), environment, tmp_path / ".hidden", tools)
    assert made.predict == "/predict"


def test_folder_umask_and_time_zone_do_not_change_a_bento(
    tmp_path: Path, environment: Environment, tools: Tools
) -> None:
    first = ensure(recipe(tmp_path / "one"), environment, tmp_path, tools, "a")
    other = Tools(tools.uv, tools.processes, {**tools.env, "TZ": "Asia/Tokyo", "LC_ALL": "C", "USER": "somebody"})
    old = os.umask(0o077)
    try:
        second = ensure(recipe(tmp_path / "elsewhere" / "two"), environment, tmp_path, other, "b")
    finally:
        os.umask(old)
    assert (first.tag, first.digest) == (second.tag, second.digest)
    for path, place in bento.tree(first.dir).items():
        assert place.read_bytes() == (second.dir / path).read_bytes()
        assert place.stat().st_mode == (second.dir / path).stat().st_mode
        assert str(tmp_path).encode() not in place.read_bytes()


def test_a_bento_is_made_once_and_its_service_not_imported_again(
    tmp_path: Path, environment: Environment, tools: Tools
) -> None:
    wanted = recipe(tmp_path / "kind")
    ensure(wanted, environment, tmp_path, tools)
    nothing = Environment(tmp_path / "no-such-environment", "3.11", LOCK.digest, reused=True)
    assert ensure(wanted, nothing, tmp_path, tools).reused


@pytest.mark.skipif(landlock.version() == 0, reason="the kernel has no Landlock")
def test_a_services_code_reads_and_writes_its_own_folder_alone(
    tmp_path: Path, environment: Environment, tools: Tools
) -> None:
    """What a kind that is trusted may, as it compiles its environment, is refused to a project."""
    (tmp_path / "secret").write_text("secret")
    tries = (
        "import json, os\nfound = []\n"
        f"for place, mode in [({str(tmp_path / 'secret')!r}, 'r'), ({str(tmp_path / 'new')!r}, 'w'),"
        f" ({str(Path(bento.__file__).with_name('written'))!r}, 'w'), ('/tmp/ekiben-written', 'w'), ('own', 'w')]:\n"
        "    try:\n        open(place, mode).close()\n        found.append('opened')\n"
        "    except PermissionError:\n        found.append('refused')\n"
        "open(os.path.join(os.environ['TMPDIR'], 'found'), 'w').write(json.dumps(found))\n"
    )
    ensure(recipe(tmp_path / "kind", trusted=False, service_py=tries + SERVICE), environment, tmp_path, tools)
    (found,) = (tmp_path / "a" / "work").rglob("found")
    assert json.loads(found.read_text()) == ["refused"] * 4 + ["opened"]


def test_code_of_a_user_sees_no_secret_and_leaves_no_process(
    tmp_path: Path, environment: Environment, tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "swordfish")
    seen = tmp_path / "a" / "work" / "seen"
    spy = (
        "import os, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(seen)!r}, 'w').write(str(child.pid) + ' ' + repr(dict(os.environ)))\n"
    )
    wanted = recipe(tmp_path / "kind", trusted=False, service_py=spy + SERVICE)
    ensure(wanted, environment, tmp_path, Tools.of(os.environ, tools.processes))
    pid, _, environ = seen.read_text().partition(" ")
    assert "swordfish" not in environ
    for _ in range(100):
        status = Path(f"/proc/{pid}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail("a process of the service's outlived its inspection")


@pytest.mark.parametrize(
    ("source", "code", "says"),
    [
        ("import no_such_module\n" + SERVICE, "service_import_failed", "no_such_module"),
        ("1 / 0\n", "service_import_failed", "ZeroDivisionError"),
        ("import bentoml\n", "service_not_found", "Twice"),
        ("import os\nos._exit(3)\n", "service_import_failed", "exit 3"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n", "service_import_failed", "ended its process"),
    ],
)
def test_a_service_that_cannot_be_imported_says_why(
    tmp_path: Path, environment: Environment, tools: Tools, source: str, code: str, says: str
) -> None:
    with pytest.raises(UserError) as caught:
        ensure(recipe(tmp_path / "kind", trusted=False, service_py=source), environment, tmp_path, tools)
    assert caught.value.code == code
    assert says in caught.value.detail
    assert not [path for path in (tmp_path / "a" / "bentos").iterdir() if path.is_dir()]


def test_a_service_that_hangs_on_import_is_ended(
    tmp_path: Path, environment: Environment, tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bento, "INSPECT_SECONDS", 3.0)
    hangs = recipe(tmp_path / "kind", trusted=False, service_py="import time\ntime.sleep(600)\n")
    with pytest.raises(UserError) as caught:
        ensure(hangs, environment, tmp_path, tools)
    assert caught.value.code == "inspect_timeout"


def test_requirements_that_only_the_import_reveals_are_refused(
    tmp_path: Path, environment: Environment, tools: Tools
) -> None:
    hidden = SERVICE.replace(
        "@bentoml.service(",
        "names = ['si' + 'x']\n@bentoml.service(image=bentoml.images.Image().python_packages(*names), ",
    )
    with pytest.raises(UserError, match="six") as caught:
        ensure(recipe(tmp_path / "kind", trusted=False, service_py=hidden), environment, tmp_path, tools)
    assert caught.value.code == "bad_requirements"


def test_what_the_inspector_hands_over_is_not_trusted(tmp_path: Path, make_wheel: Callable[..., Path]) -> None:
    answer = tmp_path / "answer.json"
    for text in ("[]", "not json", '{"service": 1}', '{"service": "x", "schema": []}'):
        answer.write_text(text)
        with pytest.raises(UserError) as caught:
            bento._answer(answer, "", 0, "/context")
        assert caught.value.code == "service_import_failed"
