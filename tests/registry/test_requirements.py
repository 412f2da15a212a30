"""What requirements ask for beyond the lock of a kind, in each form that they come in."""

from __future__ import annotations

import tomllib
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import UserError
from registry.requirements import beyond, check_permitted, declared, pins_of

HASH = "sha256:" + "ab" * 32
OTHER = "sha256:" + "cd" * 32
LOCK = f"""\
# made by uv
numpy==2.3.1 \\
    --hash={HASH} \\
    --hash=sha256:{"00" * 32}
pandas==2.2.0 ; python_full_version < '3.12' \\
    --hash={HASH}
pandas==2.3.0 ; python_full_version >= '3.12' \\
    --hash={HASH}
scikit-learn==1.7.0 --hash={HASH}
"""


@pytest.mark.parametrize(
    "line",
    [
        "numpy",
        "NumPy>=2",
        "numpy==2.3.1",
        f"numpy==2.3.1 --hash={HASH}",
        "pandas>=2.2,<3 ; sys_platform == 'linux'",
        "scikit_learn~=1.7",
    ],
)
def test_what_the_lock_satisfies_as_it_is_asks_for_nothing_more(line: str) -> None:
    assert beyond(declared("requirements.txt", line.encode()), LOCK) == {}


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("evil", "evil"),
        ("num.py", "num-py"),
        ("numpy==1.26.4", "numpy"),
        ("pandas==2.3.0", "pandas"),
        ("numpy[dev]", "numpy"),
        (f"numpy==2.3.1 --hash={OTHER}", "numpy"),
        ("evil ; sys_platform == 'win32'", "evil"),
        ("numpy # a comment\x0cevil", "evil"),
    ],
)
def test_what_the_lock_has_not_or_has_otherwise_is_more(line: str, name: str) -> None:
    more = beyond(declared("requirements.txt", line.encode()), LOCK)
    assert set(more) == {name}
    with pytest.raises(UserError) as refused:
        check_permitted(more, "tiny", allow_code=False, allowed=())
    assert (refused.value.code, refused.value.status, refused.value.field) == (
        "run_code_not_allowed",
        403,
        "requirements",
    )
    assert f"EKIBEN_ALLOWED_PACKAGES={name}" in (refused.value.hint or "")
    check_permitted(more, "tiny", allow_code=True, allowed=())
    check_permitted(more, "tiny", allow_code=False, allowed=(name.upper().replace("-", "_"),))


PYLOCK = f"""
[[packages]]
name = "numpy"
version = "2.3.1"
[[packages.wheels]]
url = "https://elsewhere.example/numpy.whl"
hashes = {{sha256 = "{"ab" * 32}"}}
[[packages]]
name = "evil"
version = "1"
index = "https://elsewhere.example/simple"
wheels = [{{name = "evil.whl"}}]
"""
UV_LOCK = """
version = 1
[[package]]
name = "mine"
version = "0"
source = { virtual = "." }
[[package]]
name = "numpy"
version = "2.3.1"
source = { registry = "https://elsewhere.example/simple" }
[[package]]
name = "evil"
version = "1"
source = { git = "https://elsewhere.example/evil" }
"""


@pytest.mark.parametrize(("name", "text"), [("pylock.toml", PYLOCK), ("uv.lock", UV_LOCK)])
def test_locks_of_users_are_read_in_full(name: str, text: str) -> None:
    assert set(beyond(declared(name, text.encode()), LOCK)) == {"evil"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(
            ("requirements.txt", line)
            for line in (
                "--index-url https://x.example", "--extra-index-url=https://x.example", "-i https://x.example",
                "--find-links .", "-e .", "-r other.txt", "-c other.txt", "--no-binary :all:", "--pre",
                "evil @ https://x.example/evil.whl", "git+https://x.example/evil", "./evil.whl", "file:///evil.whl",
                "numpy\\\n -e .", "${EVIL}", "numpy; " + "(" * 5000,
            )
        ),
        ("requirements.txt", "\udcff"),
        ("pylock.toml", "packages = 3"),
        ("pylock.toml", "packages = [3]"),
        ("pylock.toml", "[[packages]]\nname = 'evil'\nversion = '1'\nsdist = {name = 'evil.tar.gz'}"),
        ("pylock.toml", "[[packages]]\nname = 'evil'\nversion = '1'\nwheels = 3"),
        ("pylock.toml", "[[packages]]\nname = 'numpy\\n-e'\nversion = '1'\nwheels = [{}]"),
        ("pylock.toml", "a = " + "[" * 5000),
        ("uv.lock", "package = 3"),
        ("uv.lock", "[[package]]\nname = 'evil'\n"),
    ],
)  # fmt: skip
def test_where_packages_come_from_is_not_for_users_to_say(name: str, text: str) -> None:
    with pytest.raises(UserError) as refused:
        declared(name, text.encode(errors="surrogateescape"))
    assert refused.value.code == "bad_requirements"


@given(st.sampled_from(["requirements.txt", "pylock.toml", "uv.lock"]), st.text(max_size=80))
def test_any_text_is_lines_or_a_users_error(name: str, text: str) -> None:
    with suppress(UserError):
        declared(name, text.encode())


def test_the_lock_of_each_kind_is_read_with_all_its_hashes() -> None:
    for file in sorted((Path(__file__).parents[2] / "bentos").glob("*/requirements.txt")):
        pins = pins_of(file.read_text())
        assert len(pins) > 20
        assert all(hashes for each in pins.values() for _, hashes in each), file
        assert (
            beyond([f"{name}=={each[0][0]}" for name, each in pins.items() if len(each) == 1], file.read_text()) == {}
        )
    assert tomllib.loads(PYLOCK)
