"""The tar stream: the same bytes anywhere, and readable by every tar."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder_image import tarball
from registry.errors import InfrastructureError, UserError

_LETTERS = st.characters(codec="utf-8", exclude_characters="/\0")
_NAMES = st.text(_LETTERS, min_size=1, max_size=130).filter(
    lambda name: name not in (".", "..") and not name.startswith(".wh.") and len(name.encode()) <= 255
)
_PATHS = st.lists(_NAMES, min_size=1, max_size=5).map("/".join)


def _bytes_of(entries: list[tarball.Entry]) -> bytes:
    pieces = list(tarball.stream(entries))
    assert all(len(piece) <= tarball.CHUNK for piece in pieces)
    return b"".join(pieces)


def _a_tree(root: Path, contents: dict[str, bytes]) -> None:
    for path, data in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(_PATHS, st.one_of(st.binary(max_size=1500), _PATHS), min_size=1, max_size=6))
def test_any_names_and_sizes_are_read_back_by_tarfile(contents: dict[str, bytes | str]) -> None:
    entries = [
        tarball.file(path, value) if isinstance(value, bytes) else tarball.symlink(path, value)
        for path, value in contents.items()
    ]
    entries = tarball.ordered(entries)
    data = _bytes_of(entries)
    assert len(data) == tarball.size_of(entries)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = archive.getmembers()
        found = {
            member.name: member.linkname if member.issym() else archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in members
        }
    assert found == contents
    assert [member.name for member in members] == [entry.path for entry in entries]
    for member in members:
        assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (tarball.MTIME, 0, 0, "", "")


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(_PATHS, st.binary(max_size=600), min_size=1, max_size=4))
def test_any_names_are_listed_by_the_tar_program(contents: dict[str, bytes]) -> None:
    program = shutil.which("tar")
    if program is None:
        pytest.skip("there is no tar program")
    entries = tarball.ordered([tarball.file(path, data) for path, data in contents.items()])
    listed = subprocess.run(
        [program, "--list", "--null", "--quoting-style=literal", "--file=-"],
        input=_bytes_of(entries),
        capture_output=True,
        env={"LC_ALL": "C.UTF-8"},
        check=True,
    )
    assert listed.stderr == b""
    assert listed.stdout.removesuffix(b"\n") == b"\n".join(entry.path.encode() for entry in entries)


@given(st.binary(max_size=5000), st.integers(0, 3))
def test_an_entry_takes_its_exact_size(data: bytes, folders: int) -> None:
    path = "/".join(["d" * 60] * folders + ["f"])
    entries = tarball.ordered([*tarball.folders_above(path), tarball.file(path, data)])
    assert len(_bytes_of(entries)) == tarball.size_of(entries)


def test_umask_folder_times_zone_and_locale_do_not_change_a_byte(tmp_path: Path) -> None:
    contents = {"a.txt": b"1", "b/c.txt": b"2", "b-c": b"3", "ä/ö": b"4"}
    results = set()
    script = (
        "import sys, hashlib; from pathlib import Path; from builder_image import tarball;"
        "entries = tarball.entries_of_folder(Path(sys.argv[1]), 'app/x');"
        "print(hashlib.sha256(b''.join(tarball.stream(entries))).hexdigest(), tarball.size_of(entries))"
    )
    house = Path(tarball.__file__).parents[1]
    for number, (umask, mtime, zone, locale) in enumerate(
        [
            (0o022, 1, "UTC", "C"),
            (0o077, 2_000_000_000, "Asia/Tokyo", "C.UTF-8"),
            (0o002, 86400, "America/Lima", "POSIX"),
        ]
    ):
        root = tmp_path / f"folder-{number}"
        earlier = os.umask(umask)
        try:
            _a_tree(root, dict(sorted(contents.items(), reverse=bool(number % 2))))
        finally:
            os.umask(earlier)
        for path in root.rglob("*"):
            os.utime(path, (mtime, mtime))
        environment = {"TZ": zone, "LC_ALL": locale, "PYTHONPATH": str(house), "PYTHONHASHSEED": str(number)}
        command = [sys.executable, "-c", script, str(root)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
        results.add(done.stdout)
    assert len(results) == 1


def test_the_execute_bit_is_all_that_is_kept_of_a_mode(tmp_path: Path) -> None:
    _a_tree(tmp_path, {"program": b"#!", "text": b"", "secret": b""})
    (tmp_path / "program").chmod(0o4700)
    (tmp_path / "text").chmod(0o666)
    (tmp_path / "secret").chmod(0o600)
    modes = {entry.path: entry.mode for entry in tarball.entries_of_folder(tmp_path, "x")}
    assert modes == {"x": 0o755, "x/program": 0o755, "x/secret": 0o644, "x/text": 0o644}


def test_a_folder_comes_with_the_folders_that_lead_to_it(tmp_path: Path) -> None:
    _a_tree(tmp_path, {"b/c": b"1"})
    paths = [entry.path for entry in tarball.entries_of_folder(tmp_path, "/home/bentoml/model/")]
    assert paths == ["home", "home/bentoml", "home/bentoml/model", "home/bentoml/model/b", "home/bentoml/model/b/c"]


@pytest.mark.parametrize("target", ["/etc/passwd", "../outside", "a/../../outside"])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(UserError) as refused:
        tarball.entries_of_folder(tmp_path, "x")
    assert refused.value.code == "unsafe_link"


def test_a_link_inside_the_folder_is_kept(tmp_path: Path) -> None:
    _a_tree(tmp_path, {"lib/real": b"1"})
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "link").symlink_to("../lib/real")
    (link,) = [entry for entry in tarball.entries_of_folder(tmp_path, "x") if entry.kind == "symlink"]
    assert (link.path, link.link) == ("x/bin/link", "../lib/real")


def test_an_absolute_link_into_the_image_is_written_relative() -> None:
    link = tarball.symlink("app/.venv/bin/python", "/usr/local/bin/python3.11")
    assert link.link == "../../../usr/local/bin/python3.11"


def test_pipes_and_names_that_are_not_text_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="neither a file"):
        tarball.entries_of_folder(tmp_path, "x")
    (tmp_path / "pipe").unlink()
    with open(os.fsencode(tmp_path) + b"/\xff", "wb"):
        pass
    with pytest.raises(UserError, match="UTF-8"):
        tarball.entries_of_folder(tmp_path, "x")


@pytest.mark.parametrize("path", ["", "/a", "a/", "a//b", "../a", "a/./b", "a/.wh.b", "a\0b"])
def test_paths_that_mean_something_else_in_an_image_are_refused(path: str) -> None:
    with pytest.raises(UserError):
        tarball.ordered([tarball.file(path, b"")])


def test_special_mode_bits_are_refused() -> None:
    with pytest.raises(UserError, match="setuid"):
        tarball.header(tarball.Entry("su", 0o4755, 0, b"", None, "file"))


def test_the_same_path_twice_is_refused_unless_it_is_a_folder() -> None:
    assert len(tarball.ordered([tarball.folder("a"), tarball.folder("a")])) == 1
    with pytest.raises(UserError) as refused:
        tarball.ordered([tarball.file("a", b"1"), tarball.file("a", b"1")])
    assert refused.value.code == "duplicate_path"


def test_more_than_8_gib_needs_and_gets_a_pax_size() -> None:
    def entry(size: int) -> tarball.Entry:
        return tarball.Entry("w.bin", 0o644, size, Path("/nowhere"), None, "file")

    assert len(tarball.header(entry(8**11 - 1))) == 512
    header = tarball.header(entry(8**11))
    assert len(header) == 1536
    assert tarball.size_of([entry(8**11)]) == 1536 + 8**11 + 1024
    with tempfile.TemporaryFile() as sparse:
        # the content is a hole: nothing is written, and both readers must still find the end
        sparse.write(header)
        sparse.truncate(1536 + 8**11 + 1024)
        sparse.seek(0)
        with tarfile.open(fileobj=sparse) as archive:
            (member,) = archive.getmembers()
        assert (member.name, member.size) == ("w.bin", 8**11)


def test_pax_is_used_only_where_a_field_overflows() -> None:
    def blocks(path: str) -> int:
        return len(tarball.header(tarball.file(path, b""))) // 512

    assert blocks("a" * 100) == 1
    assert blocks("a" * 101) == 3
    assert blocks("d" * 155 + "/" + "a" * 100) == 1
    assert blocks("d" * 156 + "/" + "a" * 100) == 3
    assert blocks("ä") == 3


def test_a_file_that_changes_during_the_build_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"12345")
    entries = [tarball.file("w", tmp_path / "w")]
    for content in (b"1234", b"123456"):
        (tmp_path / "w").write_bytes(content)
        with pytest.raises(InfrastructureError) as noticed:
            _bytes_of(entries)
        assert noticed.value.code == "source_changed"


@pytest.mark.parametrize("size", [5, 9 << 20])
def test_content_that_is_not_what_the_manifest_says_is_noticed(tmp_path: Path, size: int) -> None:
    (tmp_path / "w").write_bytes(b"1" * size)
    with pytest.raises(InfrastructureError) as noticed:
        _bytes_of([tarball.file("w", tmp_path / "w", sha256="0" * 64)])
    assert noticed.value.code == "digest_mismatch"


def test_disorder_is_a_fault_of_the_caller() -> None:
    with pytest.raises(ValueError, match="ordered"):
        _bytes_of([tarball.file("b", b""), tarball.file("a", b"")])


def test_files_can_be_zipped_in_any_time_zone() -> None:
    """ZIP knows no time before 1980 and writes local time: a fixed time of 0 makes `zipfile` fail inside the image."""
    script = (
        "import io, os, time, zipfile, sys; time.tzset();"
        "os.utime(sys.argv[1], (int(sys.argv[2]),) * 2);"
        "zipfile.ZipFile(io.BytesIO(), 'w').write(sys.argv[1])"
    )
    with tempfile.NamedTemporaryFile() as item:
        for zone in ("UTC+12", "UTC-14"):
            command = [sys.executable, "-c", script, item.name, str(tarball.MTIME)]
            subprocess.run(command, env={"TZ": zone}, check=True)
