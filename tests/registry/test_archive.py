from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import stat
import struct
import tarfile
import zipfile
from pathlib import PurePosixPath
from typing import BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry import archive
from registry.archive import Limits, is_archive, members, scan
from registry.errors import UserError


class Pipe(io.RawIOBase):
    """A stream as it comes from a network: no seeking, few bytes at a time."""

    def __init__(self, data: bytes, step: int = 700) -> None:
        self._inner = io.BytesIO(data)
        self._step = step

    def readable(self) -> bool:
        return True

    def readinto(self, target):  # type: ignore[no-untyped-def]
        part = self._inner.read(min(len(target), self._step))
        target[: len(part)] = part
        return len(part)


def tar_of(*entries: tuple[str, bytes] | tarfile.TarInfo, form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry, io.BytesIO(bytes(entry.size)))
            else:
                info = tarfile.TarInfo(entry[0])
                info.size = len(entry[1])
                tar.addfile(info, io.BytesIO(entry[1]))
    return out.getvalue()


def special(name: str, sort: bytes, **more: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = sort
    for key, value in more.items():
        setattr(info, key, value)
    return info


def zip_of(*entries: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as target:
        for name, content in entries:
            target.writestr(name, content)
    return out.getvalue()


def unpack(data: bytes | BinaryIO, limits: Limits | None = None, **more: bool) -> dict[str, bytes]:
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    return {member.path: member.reader.read() for member in members(stream, limits, **more)}


class Kept:
    """A sink that keeps what it is given, and how often that began again."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.begun = 1
        self._path = ""

    def begin_again(self) -> None:
        self.files, self.begun = {}, self.begun + 1

    def begin_file(self, path: str) -> None:
        self._path = path
        self.files[path] = b""

    def write(self, data: bytes | memoryview) -> None:
        self.files[self._path] += bytes(data)

    def end_file(self) -> None:
        self._path = ""


def stripped(data: bytes) -> tuple[dict[str, bytes], int]:
    """What `archive.unpack` gives, and how often the archive was read."""
    kept = Kept()
    archive.unpack(io.BytesIO(data), Limits(), kept)
    return kept.files, kept.begun


def refused(data: bytes | BinaryIO, limits: Limits | None = None, **more: bool) -> UserError:
    with pytest.raises(UserError) as error:
        unpack(data, limits, **more)
    assert error.value.hint
    assert error.value.field == "file"
    return error.value


FILES = {"a.txt": b"hello", "b/c.bin": bytes(range(256)) * 30, "b/leer": b"", "d" * 120 + "/" + "e" * 90: b"long name"}


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_tars_stream_from_a_pipe_in_every_usual_form(form, pack):
    data = pack(tar_of(*FILES.items(), form=form))
    assert unpack(io.BufferedReader(Pipe(data))) == FILES
    assert unpack(Pipe(data, 1)) == FILES
    assert unpack(data) == FILES


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zips_are_read(method):
    assert unpack(zip_of(*FILES.items(), method=method)) == FILES


def test_a_zip_written_to_a_pipe_has_data_descriptors_and_is_read():
    class Sink(io.BytesIO):
        def seekable(self) -> bool:
            return False

    out = Sink()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in FILES.items():
            with target.open(name, "w", force_zip64=True) as member:
                member.write(content)
    assert unpack(out.getvalue()) == FILES


def test_folders_and_a_leading_dot_are_no_members():
    data = tar_of(special("./", tarfile.DIRTYPE), special("./m", tarfile.DIRTYPE), ("./m/x", b"1"), ("./y", b"2"))
    assert unpack(data) == {"m/x": b"1", "y": b"2"}
    assert unpack(zip_of(("m/", b""), ("m/x", b"1"))) == {"m/x": b"1"}


def test_a_top_folder_that_all_share_is_stripped_in_one_reading():
    entries = (special("m", tarfile.DIRTYPE), ("m/x", b"1"), ("m/n/y", b"2"))
    assert stripped(gzip.compress(tar_of(*entries))) == ({"x": b"1", "n/y": b"2"}, 1)
    assert stripped(tar_of(("x", b"1"), ("m/y", b"2"))) == ({"x": b"1", "m/y": b"2"}, 1)


@pytest.mark.parametrize("pack", [zip_of, tar_of])
def test_a_folder_that_only_the_first_files_share_stays(pack):
    data = pack(("m/x", b"1"), ("m/z", b"3"), ("n/y", b"2"))
    assert stripped(data) == ({"m/x": b"1", "m/z": b"3", "n/y": b"2"}, 2)


def test_every_header_of_a_tar_counts():
    """Global and extended headers and long names cost time as members do, whatever they say."""
    few = Limits(files=10)
    notes = {"comment": "x" * 400}
    global_headers = tarfile.TarInfo.create_pax_global_header(notes) * (few.entries + 1)
    long_names = tarfile.TarInfo._create_gnu_long_header("x" * 200, tarfile.GNUTYPE_LONGNAME, "utf-8", "strict")  # type: ignore[attr-defined]
    data = global_headers + tar_of(("x", b"1"))
    assert refused(gzip.compress(data), few).code == "archive_too_many_files"
    assert (
        refused(tarfile.TarInfo.create_pax_global_header({"comment": "x" * 900_000}) * 40 + data).code == "archive_bomb"
    )
    tiny = tarfile.TarInfo.create_pax_global_header({f"k{number}": "" for number in range(1001)})
    assert refused(tiny + tar_of(("x", b"1"))).code == "archive_bomb"
    assert unpack(tarfile.TarInfo.create_pax_global_header(notes) * 100 + tar_of(("x", b"1")), few) == {"x": b"1"}
    assert refused(long_names * 2 + tar_of(("x", b"1"))).code == "archive_unsupported"


def test_clutter_of_computers_and_projects_is_passed_over_even_where_it_is_links():
    clutter = [
        ("__MACOSX/._x", b"?"),
        (".DS_Store", b"?"),
        ("p/.git/HEAD", b"?"),
        ("p/__pycache__/s.pyc", b"?"),
        ("._x", b"?"),
    ]
    data = tar_of(*clutter, special("p/.venv/bin/python", tarfile.SYMTYPE, linkname="/usr/bin/python"), ("p/x", b"1"))
    assert unpack(data) == {"p/x": b"1"}
    assert unpack(zip_of(*clutter, ("p/x", b"1"))) == {"p/x": b"1"}
    assert len(unpack(zip_of(*clutter, ("p/x", b"1")), clutter=True)) == 6


def test_a_member_that_is_not_read_is_passed_over():
    assert [member.path for member in members(Pipe(tar_of(*FILES.items())))] == list(FILES)


def test_a_member_left_behind_gives_no_bytes_of_another():
    some = list(members(io.BytesIO(tar_of(("a", b"x" * 5000), ("b", b"y" * 5000)))))
    with pytest.raises(ValueError, match="left behind"):
        some[0].reader.read()


UNSAFE = ["../x", "a/../../x", "/etc/passwd", "C:/x", "a\\..\\x", "a\x01b", "x\u202ey", "a//b", "a/./b", "n" * 256]


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_paths_are_refused(name):
    assert refused(tar_of((name, b"x"))).code == "archive_unsafe_path"
    assert refused(zip_of((name, b"x"))).code == "archive_unsafe_path"


def test_a_name_that_is_not_utf8_is_refused():
    data = bytearray(tar_of(("abc", b"x"), form=tarfile.USTAR_FORMAT))
    data[0:3] = b"\xff\xfe\xfd"
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:512]))
    assert refused(bytes(data)).code == "archive_unsafe_path"


@pytest.mark.parametrize("sort", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_are_refused(sort):
    assert refused(tar_of(special("x", sort, linkname="a"))).code == "archive_link"


def test_a_link_in_a_zip_is_refused():
    info = zipfile.ZipInfo("x")
    info.create_system = 3
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    assert refused(zip_of((info, b"/etc/passwd"))).code == "archive_link"


@pytest.mark.parametrize("sort", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_devices_are_refused(sort):
    assert refused(tar_of(special("x", sort))).code == "archive_device"
    info = zipfile.ZipInfo("x")
    info.create_system = 3
    info.external_attr = stat.S_IFIFO << 16
    assert refused(zip_of((info, b""))).code == "archive_device"


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("names", "code"),
    [
        (("a", "a"), "archive_duplicate"),
        (("a", "a/b"), "archive_duplicate"),
        (("a/b", "a"), "archive_duplicate"),
        (("./a", "a"), "archive_duplicate"),
        (("Model", "model"), "archive_case_collision"),
        (("A/x", "a/y"), "archive_case_collision"),
        (("e\u0301", "\u00e9"), "archive_case_collision"),
        (("stra\u00dfe", "STRASSE"), "archive_case_collision"),
    ],
)
def test_names_that_clash_are_refused(names, code):
    assert refused(tar_of(*((name, b"x") for name in names))).code == code
    assert refused(zip_of(*((name, b"x") for name in names))).code == code


def test_too_many_files_too_many_bytes_too_deep():
    few = Limits(files=3, total=1000, depth=2)
    many = [(f"f{index}", b"") for index in range(4)]
    for pack in (tar_of, zip_of):
        assert refused(pack(*many), few).code == "archive_too_many_files"
        error = refused(pack(("a", bytes(600)), ("b", bytes(401))), few)
        assert (error.code, error.status) == ("archive_too_large", 413)
        assert refused(pack(("a/b/c/d", b"")), few).code == "archive_unsafe_path"
        assert len(unpack(pack(*many[:3]), few)) == 3


def test_endless_folders_are_refused():
    data = tar_of(*(special(f"d{index}", tarfile.DIRTYPE) for index in range(1100)), ("x", b""))
    assert refused(data, Limits(files=2)).code == "archive_too_many_files"


def test_bombs_are_refused():
    zeros = bytes(100 << 20)
    assert refused(gzip.compress(tar_of(("x", zeros)), 1)).code == "archive_bomb"
    assert refused(zip_of(("x", zeros))).code == "archive_bomb"
    # zeros that never end, without a tar around them
    assert refused(gzip.compress(zeros, 1)).code == "archive_unsupported"


def test_a_zip_that_lies_about_its_size_is_refused():
    data = zip_of(("x", bytes(50_000)))
    for at in (data.find(b"PK\x03\x04") + 22, data.find(b"PK\x01\x02") + 24):
        data = data[:at] + struct.pack("<L", 10) + data[at + 4 :]
    assert refused(data).code == "archive_bomb"
    data = zip_of(("x", b"abc"))
    at = data.find(b"PK\x01\x02") + 24
    assert refused(data[:at] + struct.pack("<L", 10) + data[at + 4 :]).code == "archive_unsupported"


def test_a_zip_whose_members_overlap_is_refused():
    data = zip_of(("a", bytes(9999)), ("b", bytes(9999)))
    second = data.find(b"PK\x01\x02", data.find(b"PK\x01\x02") + 4)
    # both members are the first one's bytes
    forged = bytearray(data)
    forged[second + 42 : second + 46] = struct.pack("<L", 0)
    assert refused(bytes(forged)).code == "archive_unsupported"


def test_an_encrypted_zip_is_refused():
    data = bytearray(zip_of(("x", b"secret" * 9), method=zipfile.ZIP_STORED))
    data[6] |= 1
    data[data.find(b"PK\x01\x02") + 8] |= 1
    assert refused(bytes(data)).code == "archive_encrypted"


def test_a_damaged_zip_member_is_refused():
    data = bytearray(zip_of(("x", b"precious" * 9), method=zipfile.ZIP_STORED))
    data[40] ^= 1
    assert refused(bytes(data)).code == "archive_truncated"


def test_odd_zip_methods_are_refused():
    assert refused(zip_of(("x", b"abc" * 99), method=zipfile.ZIP_LZMA)).code == "archive_unsupported"


def test_sparse_members_and_other_types_are_refused():
    for sort in (b"S", b"M", b"D", b"V", b"A"):
        assert refused(tar_of(special("x", sort))).code == "archive_unsupported"
    info = tarfile.TarInfo("x")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "../y"}
    assert refused(tar_of(info)).code == "archive_unsupported"


def test_a_name_from_a_global_header_is_refused():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"path": "x"}) as tar:
        tar.addfile(tarfile.TarInfo("y"))
    assert refused(out.getvalue()).code == "archive_unsupported"


def test_git_archive_comment_headers_are_fine():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "abc"}) as tar:
        tar.addfile(tarfile.TarInfo("y"))
    assert unpack(out.getvalue()) == {"y": b""}


def test_bytes_after_the_end_are_refused():
    assert refused(tar_of(("x", b"1")) + tar_of(("y", b"2"))).code == "archive_unsupported"


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress, bz2.compress])
def test_a_tar_cut_anywhere_is_refused(pack):
    whole = pack(tar_of(("a", os.urandom(3000)), ("b", b"y" * 100)))
    # the last 1024 bytes of a plain tar are its end; what follows is padding that may be missing
    end = len(whole) if pack is not bytes else 512 + 3072 + 512 + 512 + 511
    for size in range(0, end, 97):
        error = refused(whole[:size])
        assert error.code in ("archive_truncated", "archive_unsupported"), size


def test_a_zip_cut_anywhere_is_refused():
    whole = zip_of(("a", os.urandom(300)), ("b", b"y" * 100))
    for size in range(4, len(whole)):
        assert refused(whole[:size]).code == "archive_truncated"


def test_what_is_no_archive_is_refused_and_named():
    assert "7z" in refused(b"7z\xbc\xaf\x27\x1c" + bytes(600)).detail
    assert refused(b"").code == "archive_unsupported"
    assert refused(tar_of()).code in ("archive_empty", "archive_unsupported")
    assert refused(zip_of()).code == "archive_empty"
    assert refused(gzip.compress(b"just text" * 100)).code == "archive_unsupported"


def test_archives_are_told_from_models_that_are_zips():
    assert is_archive(io.BytesIO(zip_of(("bentofile.yaml", b""))))
    assert is_archive(io.BytesIO(gzip.compress(tar_of(("x", b"")))))
    assert is_archive(io.BytesIO(tar_of(("x", b""))))
    assert not is_archive(io.BytesIO(zip_of(("schema.json", b"{}"), ("1.npy", b""))))
    assert not is_archive(io.BytesIO(zip_of(("archive/data.pkl", b""))))
    assert not is_archive(io.BytesIO(gzip.compress(b"tree\nversion=v4\n" * 100)))
    assert not is_archive(io.BytesIO(b"tree\nversion=v4\n" * 100))


names = st.one_of(
    st.text(st.sampled_from("abAB./\\é\u0301\x00 "), max_size=12),
    st.sampled_from([*UNSAFE, "a", "a/b", "../../x", "~/x", "-rf", "con"]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(names, st.binary(max_size=40)), max_size=6), st.sampled_from([tar_of, zip_of]))
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_no_path_that_is_given_leaves_the_folder_or_is_given_twice(entries, pack):
    try:
        data = pack(*entries)
    except (ValueError, IndexError):
        return
    try:
        found = [member.path for member in members(io.BytesIO(data))]
    except UserError:
        return
    for path in found:
        pure = PurePosixPath(path)
        assert not pure.is_absolute()
        assert not {"..", ".", ""} & set(path.split("/"))
        assert "\\" not in path
        assert path.isprintable()
    assert len({path.casefold() for path in found}) == len(found)


base = [
    tar_of(*FILES.items()),
    gzip.compress(tar_of(*FILES.items())),
    zip_of(*FILES.items()),
    lzma.compress(tar_of(("a", b"b"))),
]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(base),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=8),
    st.floats(0, 1),
)
def test_a_mutated_archive_raises_nothing_but_a_user_error(data, changes, keep):
    forged = bytearray(data[: int(len(data) * keep) + 1])
    for at, value in changes:
        forged[at % len(forged)] = value
    for call in (lambda: scan(io.BytesIO(bytes(forged))), lambda: is_archive(io.BytesIO(bytes(forged)))):
        try:
            call()
        except UserError as error:
            assert error.hint  # noqa: PT017


def test_memory_stays_bounded_while_a_large_archive_streams():
    import tracemalloc

    def large():
        info = tarfile.TarInfo("x")
        info.size = 200 << 20
        yield info.tobuf(tarfile.GNU_FORMAT)
        block = os.urandom(1 << 20)
        for _ in range(200):
            yield block
        yield bytes(1024)

    class Source(io.RawIOBase):
        def __init__(self) -> None:
            self._parts = large()
            self._rest = b""

        def readable(self) -> bool:
            return True

        def readinto(self, target):  # type: ignore[no-untyped-def]
            self._rest = self._rest or next(self._parts, b"")
            part, self._rest = self._rest[: len(target)], self._rest[len(target) :]
            target[: len(part)] = part
            return len(part)

    tracemalloc.start()
    for member in members(Source()):
        assert member.size == 200 << 20
        while member.reader.read(1 << 20):
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
