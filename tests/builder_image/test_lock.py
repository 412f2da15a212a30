from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from builder_image import lock
from builder_image.installer import Tools
from registry.errors import InfrastructureError, UserError

HASH = "sha256:" + "a" * 64


def resolve(lines: list[str], tmp_path: Path, tools: Tools, **more: Path) -> lock.Lock:
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    return lock.resolve(lines, python="3.11", work=work, tools=tools, **more)


def test_requirements_resolve_to_pins_with_hashes_and_nothing_else(
    tmp_path: Path, index: Path, make_wheel: Callable[..., Path], tools: Tools
) -> None:
    first = make_wheel(index, "alpha", "1.0", requires=["beta>=2"])
    second = make_wheel(index, "beta", "2.1")
    found = resolve(["alpha"], tmp_path, tools)
    digests = [hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in (first, second)]
    assert found.text == f"alpha==1.0 --hash=sha256:{digests[0]}\nbeta==2.1 --hash=sha256:{digests[1]}\n"
    assert found.version("beta") == "2.1"


def test_the_same_requirements_give_the_same_lock_tomorrow(
    tmp_path: Path, index: Path, make_wheel: Callable[..., Path], tools: Tools
) -> None:
    make_wheel(index, "alpha", "1.0")
    first = resolve(["alpha"], tmp_path, tools, known=tmp_path / "locks")
    make_wheel(index, "alpha", "2.0")
    assert resolve(["alpha"], tmp_path, tools, known=tmp_path / "locks") == first
    assert resolve(["alpha"], tmp_path, tools).version("alpha") == "2.0"


def test_a_conflict_is_explained_in_uvs_own_words(
    tmp_path: Path, index: Path, make_wheel: Callable[..., Path], tools: Tools
) -> None:
    make_wheel(index, "alpha", "1.0", requires=["beta<2"])
    make_wheel(index, "beta", "2.1")
    with pytest.raises(UserError, match=r"alpha.*beta") as caught:
        resolve(["alpha"], tmp_path, tools)
    assert caught.value.code == "unresolvable_requirements"
    assert caught.value.field == "requirements"


def test_a_package_without_a_wheel_is_named_with_the_python_and_the_way_out(
    tmp_path: Path, index: Path, tools: Tools
) -> None:
    with tarfile.open(index / "alpha-1.0.tar.gz", "w:gz"):
        pass
    with pytest.raises(UserError) as caught:
        resolve(["alpha"], tmp_path, tools)
    assert caught.value.code == "no_wheel"
    assert "alpha" in caught.value.detail
    assert "3.11" in caught.value.detail
    assert "wheels/" in str(caught.value.hint)


def test_an_unreachable_index_is_not_the_users_fault_and_its_password_stays_secret(
    tmp_path: Path, tools: Tools
) -> None:
    env = {key: value for key, value in tools.env.items() if key not in ("UV_NO_INDEX", "UV_FIND_LINKS")}
    env |= {"UV_DEFAULT_INDEX": "http://me:secret@127.0.0.1:9/simple", "UV_HTTP_RETRIES": "0", "UV_NO_PROXY": "*"}
    with pytest.raises(InfrastructureError) as caught:
        resolve(["alpha"], tmp_path, Tools(tools.uv, tools.processes, env))
    assert caught.value.code == "index_unreachable"
    assert "secret" not in caught.value.detail


def test_an_own_wheel_wins_over_a_newer_package_of_the_same_name(
    tmp_path: Path, index: Path, make_wheel: Callable[..., Path], tools: Tools
) -> None:
    make_wheel(index, "private", "99.0", files={"private/__init__.py": "evil = True\n"})
    make_wheel(index, "private", "1.0", files={"private/__init__.py": "evil = True\n"})
    own = make_wheel(tmp_path / "wheels", "private", "1.0")
    found = resolve(["private"], tmp_path, tools, wheels=tmp_path / "wheels")
    assert found.text == f"private==1.0 --hash=sha256:{hashlib.sha256(own.read_bytes()).hexdigest()}\n"


def test_two_versions_of_an_own_wheel_are_refused(
    tmp_path: Path, make_wheel: Callable[..., Path], tools: Tools
) -> None:
    for version in ("1.0", "2.0"):
        make_wheel(tmp_path / "wheels", "private", version)
    with pytest.raises(UserError, match="two versions of private"):
        resolve(["private"], tmp_path, tools, wheels=tmp_path / "wheels")


def test_hashes_of_the_users_lock_are_the_only_ones_accepted(
    tmp_path: Path, index: Path, make_wheel: Callable[..., Path], tools: Tools
) -> None:
    wheel = make_wheel(index, "alpha", "1.0")
    good = "sha256:" + hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert resolve([f"alpha==1.0 --hash={good} --hash={HASH}"], tmp_path, tools).pins[0].hashes == (good,)
    with pytest.raises(UserError, match="none of the hashes given for alpha"):
        resolve([f"alpha==1.0 --hash={HASH}"], tmp_path, tools)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--index-url https://example.org/simple", "UV_DEFAULT_INDEX"),
        ("--extra-index-url=https://example.org/simple", "UV_DEFAULT_INDEX"),
        ("-e .", "wheels/"),
        ("-r other.txt", "one file"),
        ("six @ git+https://example.org/six", "wheels/"),
        ("six @ file:///etc/passwd", "wheels/"),
        ("git+https://example.org/six", "wheels/"),
        ("./wheels/six-1.0-py3-none-any.whl", "wheels/"),
        ("--config-settings x=y", "keep to lines"),
    ],
)
def test_requirements_that_choose_where_packages_come_from_are_refused(tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "requirements.txt"
    file.write_text(f"# mine\npackaging>=20\n{line}\n")
    with pytest.raises(UserError) as caught:
        lock.requirements_of(file)
    assert caught.value.code == "bad_requirements"
    assert says in str(caught.value.hint)


def test_requirements_txt_is_read_with_comments_continuations_and_hashes(tmp_path: Path) -> None:
    file = tmp_path / "requirements.txt"
    file.write_text(f"# top\n\nsix>=1 ; python_version > '3' # why\npackaging==26.3 \\\n    --hash={HASH}\n")
    assert lock.requirements_of(file) == ('six>=1; python_version > "3"', f"packaging==26.3 --hash={HASH}")


def test_pylock_is_read_with_versions_markers_and_wheel_hashes(tmp_path: Path) -> None:
    file = tmp_path / "pylock.toml"
    file.write_text(
        'lock-version = "1.0"\n[[packages]]\nname = "six"\nversion = "1.17.0"\nmarker = "sys_platform == \'linux\'"\n'
        f'wheels = [{{ url = "https://example.org/six.whl", hashes = {{ sha256 = "{"a" * 64}" }} }}]\n'
    )
    assert lock.requirements_of(file) == (f'six==1.17.0; sys_platform == "linux" --hash={HASH}',)


def test_a_pylock_that_takes_a_package_from_a_repository_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "pylock.toml"
    file.write_text('[[packages]]\nname = "six"\n[packages.vcs]\ntype = "git"\nurl = "https://example.org/six"\n')
    with pytest.raises(UserError, match="six from somewhere else"):
        lock.requirements_of(file)


def test_uv_lock_gives_what_the_project_needs_without_development_groups(tmp_path: Path, tools: Tools) -> None:
    file = tmp_path / "uv.lock"
    registry = 'source = { registry = "https://index.example.org/simple" }'
    wheel = f'wheels = [{{ url = "https://example.org/x-1.0-py3-none-any.whl", hash = "{HASH}" }}]'
    file.write_text(
        'version = 1\nrevision = 1\nrequires-python = ">=3.11"\n'
        + f'[[package]]\nname = "six"\nversion = "1.0"\n{registry}\n{wheel.replace("x-1.0", "six-1.0")}\n'
        + f'[[package]]\nname = "idna"\nversion = "1.0"\n{registry}\n{wheel.replace("x-1.0", "idna-1.0")}\n'
        + '[[package]]\nname = "mine"\nversion = "0.1"\nsource = { virtual = "." }\n'
        + 'dependencies = [{ name = "six", marker = "sys_platform == \'linux\'" }]\n'
        + '[package.dev-dependencies]\ndev = [{ name = "idna" }]\n'
    )
    found = lock.export_uv_lock(file, work=tmp_path, tools=tools)
    assert found == (f'six==1.0; sys_platform == "linux" --hash={HASH}',)


def test_a_lock_line_without_a_hash_is_refused() -> None:
    with pytest.raises(UserError, match="not pinned with a hash"):
        lock.parse("six==1.0\n")


names = st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True)
hashes = st.lists(st.from_regex(r"sha256:[0-9a-f]{64}", fullmatch=True), min_size=1, max_size=3, unique=True)


@given(st.dictionaries(names, hashes, min_size=1, max_size=6), st.randoms())
def test_order_comments_and_line_breaks_do_not_change_a_lock(pins: dict[str, list[str]], random: object) -> None:
    plain = [f"{name}==1.0 {' '.join(f'--hash={h}' for h in values)}" for name, values in pins.items()]
    spread = [line.replace(" --hash", " \\\n    --hash") + "\n    # via something" for line in plain]
    random.shuffle(spread)  # type: ignore[attr-defined]
    first, second = lock.parse("\n".join(plain)), lock.parse("# header\n" + "\n".join(spread))
    assert first.digest == second.digest
    assert lock.parse(first.text) == first


@pytest.mark.parametrize("kind", ["forecast", "lightgbm", "onnx", "ranker", "sklearn", "xgboost"])
def test_pins_that_are_read_the_short_way_are_what_the_standard_makes_of_them(kind: str) -> None:
    file = Path(__file__).parents[2] / "bentos" / kind / "requirements.txt"
    pins = lock.parse(file.read_text()).pins
    assert [str(Requirement(pin.requirement)) for pin in pins] == [pin.requirement for pin in pins]
    assert [canonicalize_name(Requirement(pin.requirement).name) for pin in pins] == [pin.name for pin in pins]
