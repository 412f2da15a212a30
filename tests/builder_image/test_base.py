"""Bases: what is learnt of an interpreter by reading layers, without running anything."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builder_image import base, image, layers, layout, remote, tarball
from builder_image.image import Image, Platform
from builder_image.validate import validate
from registry.digest import of_bytes
from registry.errors import InfrastructureError, UserError
from tests.podman import Podman

Members = dict[str, bytes | str | None]
"""path → a file's content, a link's target ("-> …", "=> …" for a hard link), or None for a folder"""


def _layer(members: Members) -> layers.Layer:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for path, value in members.items():
            info = tarfile.TarInfo(path)
            if value is None:
                info.type = tarfile.DIRTYPE
                archive.addfile(info)
            elif isinstance(value, str):
                info.type = tarfile.SYMTYPE if value.startswith("-> ") else tarfile.LNKTYPE
                info.linkname = value[3:]
                archive.addfile(info)
            else:
                info.size = len(value)
                archive.addfile(info, io.BytesIO(value))
    packed = b"".join(layers.compress([out.getvalue()], "gzip"))
    diff_id, digest = of_bytes(out.getvalue()), of_bytes(packed)
    return layers.Layer("base", layers.TAR_GZIP, diff_id, digest, len(packed), lambda: iter([packed]))


_PATH = ("PATH=/usr/local/bin:/usr/bin",)


def _image(*stack: Members, env: tuple[str, ...] = _PATH, architecture: str = "amd64") -> Image:
    config = {"os": "linux", "architecture": architecture, "config": {"Env": list(env)}}
    return Image(tuple(_layer(members) for members in stack), config)


_DEBIAN: Members = {
    "bin": "-> usr/bin",
    "lib": "-> usr/lib",
    "usr": None,
    "usr/bin": None,
    "usr/lib/x86_64-linux-gnu/libc.so.6": b"\0GNU C Library (Debian GLIBC 2.36-9) stable release version 2.36.\n\0",
}
_PYTHON: Members = {
    "usr/local/bin/python3.11": b"\x7fELF\0" + b"3.11.9\0",
    "usr/local/bin/python3": "-> python3.11",
    "usr/local/bin/python": "-> python3",
    "usr/local/lib/python3.11/lib-dynload/_ssl.cpython-311-x86_64-linux-gnu.so": b"",
}


def test_a_docker_python_image_is_described() -> None:
    found = base.describe(_image(_DEBIAN, _PYTHON))
    assert (found.python, found.version, found.minor) == ("/usr/local/bin/python3.11", "3.11.9", "3.11")
    assert found.soabi == "cpython-311-x86_64-linux-gnu"
    assert found.libc == "manylinux_2_36"
    assert found.platform_tag == "manylinux_2_36_x86_64"
    assert found.env == {"PATH": "/usr/local/bin:/usr/bin"}
    assert [layer.name for layer in found.layers] == ["base", "base"]


def test_a_musl_image_is_described() -> None:
    alpine: Members = {
        "lib/ld-musl-x86_64.so.1": b"\0 musl libc\0" + b"1.2.5\0",
        "usr/bin/python3.12": b"\0" + b"3.12.3\0",
        "usr/bin/python3": "-> python3.12",
        "usr/lib/python3.12/lib-dynload/_ssl.cpython-312-x86_64-linux-musl.so": b"",
    }
    found = base.describe(_image(alpine))
    assert (found.libc, found.soabi, found.version) == ("musllinux_1_2", "cpython-312-x86_64-linux-musl", "3.12.3")


def test_a_shared_python_is_read_from_its_library() -> None:
    shared = {
        **_PYTHON,
        "usr/local/bin/python3.11": b"\x7fELF",
        "usr/local/lib/libpython3.11.so.1.0": b"\0" + b"3.11.7\0",
    }
    assert base.describe(_image(_DEBIAN, shared)).version == "3.11.7"


def test_the_first_python_on_the_path_is_taken() -> None:
    both: Members = {
        **_PYTHON,
        "usr/bin/python3.12": b"\0" + b"3.12.1\0",
        "usr/bin/python3": "-> python3.12",
        "usr/lib/python3.12/lib-dynload/_ssl.cpython-312-x86_64-linux-gnu.so": b"",
    }
    assert base.describe(_image(_DEBIAN, both)).version == "3.11.9"
    other = base.describe(_image(_DEBIAN, both, env=("PATH=/usr/bin:/usr/local/bin",)))
    assert (other.python, other.soabi) == ("/usr/bin/python3.12", "cpython-312-x86_64-linux-gnu")


@pytest.mark.parametrize(
    "hiding",
    [
        {"usr/local/bin/.wh.python3.11": b"", "usr/local/bin/.wh.python3": b"", "usr/local/bin/.wh.python": b""},
        {"usr/local/bin/.wh..wh..opq": b""},
        {"usr/local/.wh.bin": b""},
        {"usr/.wh.local": b""},
        {"usr/local/bin": b"now a file"},
    ],
)
def test_what_an_upper_layer_removed_is_not_there(hiding: Members) -> None:
    with pytest.raises(UserError) as refused:
        base.describe(_image(_DEBIAN, _PYTHON, hiding))
    assert refused.value.code == "base_without_python"


def test_an_upper_layer_replaces_an_interpreter() -> None:
    upper: Members = {"usr/local/bin/.wh..wh..opq": b"", "usr/local/bin/python3.11": b"\0" + b"3.11.10\0"}
    assert base.describe(_image(_DEBIAN, _PYTHON, upper)).version == "3.11.10"


def test_hard_links_and_folders_behind_links_are_followed() -> None:
    linked: Members = {
        "opt/py/bin/python3.11": b"\0" + b"3.11.4\0",
        "opt/py/bin/python3": "=> opt/py/bin/python3.11",
        "opt/py/lib/python3.11/lib-dynload/_ssl.cpython-311-x86_64-linux-gnu.so": b"",
        "opt/current": "-> /opt/py",
    }
    found = base.describe(_image(_DEBIAN, linked, env=("PATH=/opt/current/bin:/usr/bin",)))
    assert (found.python, found.version) == ("/opt/current/bin/python3.11", "3.11.4")


def test_links_in_circles_end() -> None:
    circle: Members = {"usr/local/bin/python3": "-> python", "usr/local/bin/python": "-> python3"}
    with pytest.raises(UserError):
        base.describe(_image(_DEBIAN, circle))


def test_an_image_without_python_is_refused() -> None:
    with pytest.raises(UserError) as refused:
        base.describe(_image(_DEBIAN))
    assert refused.value.code == "base_without_python"
    assert refused.value.hint


def test_a_patch_of_the_base_keeps_its_abi_and_a_new_minor_does_not() -> None:
    first = base.describe(_image(_DEBIAN, _PYTHON))
    patched = base.describe(
        _image(_DEBIAN, {**_PYTHON, "usr/local/bin/python3.11": b"\0" + b"3.11.12\0", "etc/x": b"1"})
    )
    assert patched.digest != first.digest
    assert patched.version != first.version
    assert patched.abi == first.abi
    changes = [
        replace(first, version="3.12.0"),
        replace(first, soabi="cpython-311d-x86_64-linux-gnu"),
        replace(first, libc="manylinux_2_31"),
        replace(first, python="/usr/bin/python3.11"),
        replace(first, platform="linux/arm64"),
    ]
    assert len({first.abi, *(change.abi for change in changes)}) == 6


def test_a_base_is_imported_from_folder_and_archive_alike(tmp_path: Path) -> None:
    layout.write_layout(_image(_DEBIAN, _PYTHON), tmp_path / "source")
    layout.write_archive(_image(_DEBIAN, _PYTHON), tmp_path / "python-3.11.tar", "localhost/python:3.11")
    store = tmp_path / "bases"
    folder = base.import_base(str(tmp_path / "source"), "linux/amd64", store, name="a")
    archive = base.import_base(str(tmp_path / "python-3.11.tar"), None, store)
    assert archive.name == "python-3.11"
    assert base.load(store / "python-3.11.toml") == archive
    assert folder.on("linux/amd64").digest == archive.on("linux/amd64").digest
    assert folder.on("linux/x86_64").abi == archive.on("linux/amd64").abi
    stands_on = archive.image("linux/amd64")
    built = layout.write_layout(image.assemble(stands_on, [], image.Run()), tmp_path / "out")
    validate(built)
    (tmp_path / "source" / "index.json").unlink()
    assert base.load(store / "a.toml").image("linux/amd64").digest == stands_on.digest, "a copy, not a pointer"


def test_a_second_platform_joins_the_first(tmp_path: Path) -> None:
    arm = {path.replace("x86_64", "aarch64"): value for path, value in {**_DEBIAN, **_PYTHON}.items()}
    layout.write_layout(_image(_DEBIAN, _PYTHON), tmp_path / "source")
    layout.write_layout(_image(arm, architecture="arm64"), tmp_path / "source")
    store = tmp_path / "bases"
    base.import_base(str(tmp_path / "source"), "linux/amd64", store, name="py")
    with pytest.raises(UserError, match="linux/arm64") as missing:
        base.load(store / "py.toml").on("linux/arm64")
    assert missing.value.code == "base_platform_missing"
    both = base.import_base(str(tmp_path / "source"), "linux/arm64", store, name="py")
    assert both.on("linux/arm64").platform_tag == "manylinux_2_36_aarch64"
    everything = base.import_base(str(tmp_path / "source"), None, store, name="all")
    assert sorted(everything.platforms) == ["linux/amd64", "linux/arm64"]
    assert both.image("linux/arm64").platform == Platform.parse("linux/arm64")


def test_a_damaged_source_is_not_imported(tmp_path: Path) -> None:
    layout.write_layout(_image(_DEBIAN, _PYTHON), tmp_path / "source")
    blob = max((tmp_path / "source" / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    blob.write_bytes(bytes(blob.stat().st_size))
    with pytest.raises(InfrastructureError) as noticed:
        base.import_base(str(tmp_path / "source"), None, tmp_path / "bases", name="x")
    assert noticed.value.code == "digest_mismatch"
    assert not (tmp_path / "bases" / "x.toml").exists()


def test_bad_names_and_descriptions_are_refused(tmp_path: Path) -> None:
    layout.write_layout(_image(_DEBIAN, _PYTHON), tmp_path / "source")
    with pytest.raises(UserError) as refused:
        base.import_base(str(tmp_path / "source"), None, tmp_path / "bases", name="../x")
    assert refused.value.code == "bad_base_name"
    for text in ("", "nonsense", 'schema = "other"', 'schema = "ekiben.base.v1"'):
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(UserError) as refused:
            base.load(tmp_path / "bad.toml")
        assert refused.value.code == "bad_base"


def test_a_base_made_of_one_of_our_images_has_base_layers_only(make_image: Any, tmp_path: Path) -> None:
    layout.write_layout(_image(_DEBIAN, _PYTHON), tmp_path / "source")
    first = base.import_base(str(tmp_path / "source"), None, tmp_path / "bases", name="a").image("linux/amd64")
    code = layers.make("code", [tarball.file("x", b"1")], tmp_path / "blobs", "zstd")
    layout.write_layout(image.assemble(first, [code], image.Run()), tmp_path / "ours")
    again = base.import_base(str(tmp_path / "ours"), None, tmp_path / "bases", name="b").image("linux/amd64")
    assert {layer.name for layer in again.layers} == {"base"}


@pytest.mark.needs_registry
def test_a_base_is_imported_from_a_registry(registry_server: Any, tmp_path: Path) -> None:
    with remote.Registry(registry_server.host) as registry:
        pushed = remote.push_image(
            registry, _image(_DEBIAN, _PYTHON), remote.Reference.parse(f"{registry_server.host}/python:3.11")
        )
    found = base.import_base(f"{registry_server.host}/python:3.11", None, tmp_path / "bases")
    assert found.on("linux/amd64").digest == pushed.digest
    assert found.on("linux/amd64").version == "3.11.9"
    with pytest.raises(UserError):
        base.import_base(f"{registry_server.host}/python:3.11", "linux/arm64", tmp_path / "bases")


@pytest.mark.needs_podman
@pytest.mark.slow
def test_a_real_base_runs_our_layers_as_a_random_user_on_a_read_only_root(tmp_path: Path, debian_base: Path) -> None:
    """debootstrap → import → assemble → archive → podman: what was learnt by reading is what runs."""
    imported = base.import_base(str(debian_base), None, tmp_path / "bases", name="debian")
    platform = next(iter(imported.platforms))
    found = imported.on(platform)
    script = (
        b"import sys, sysconfig; weights = open('/home/bentoml/model/w').read();"
        b"print(sys.version.split()[0], sysconfig.get_config_var('SOABI'), weights)"
    )
    code = layers.make(
        "code", [*tarball.folders_above("app/main.py"), tarball.file("app/main.py", script)], tmp_path / "blobs"
    )
    weights = [*tarball.folders_above("home/bentoml/model/w"), tarball.file("home/bentoml/model/w", b"weights")]
    model = layers.StreamedLayer("model", layers.TAR, tarball.size_of(weights), lambda: tarball.stream(weights))
    run = image.Run(entrypoint=[found.python, "/app/main.py"], workdir="/")
    draft = image.assemble(imported.image(platform), [code, model], run)
    validate(layout.write_archive(draft, tmp_path / "image.tar", "localhost/ekiben-test:1"))
    podman = Podman(tmp_path / "podman")
    try:
        assert "localhost/ekiben-test:1" in podman("load", "-i", tmp_path / "image.tar")
        for user in ([], ["--user", "12345:12345"]):
            limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]
            said = podman("run", "--rm", "--network=host", "--read-only", *limits, *user, "localhost/ekiben-test:1")
            assert said.split() == [found.version, found.soabi, "weights"]
    finally:
        podman.close()
