"""The object store, in a folder and in buckets: all or nothing, whatever happens in between."""

from __future__ import annotations

import hashlib
import io
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from registry.errors import InfrastructureError
from registry.manifest import Attachment, File, Manifest
from registry.store import DirectoryStore, ObjectExists, ObjectMissing, ObjectStore
from tests.object_stores import leftovers

MIB = 1024 * 1024

part = st.sampled_from(("a", "b", "A", "files", "x.txt", "a+b", "ünï", "-", "a b", "%2F", "a&b=<c>"))
keys = st.lists(part, min_size=1, max_size=4).map("/".join)


def put(store: ObjectStore, key: str, data: bytes = b"") -> None:
    writer = store.writer(key)
    writer.write(data)
    writer.commit()


def read(store: ObjectStore, key: str) -> bytes:
    with store.open(key) as stream:
        return stream.read()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(keys, st.lists(st.binary(max_size=200), max_size=5), st.booleans()), max_size=12))
def test_what_is_committed_is_readable_whole_and_nothing_else_is(
    new_store: Callable[[], ObjectStore], writes: list[tuple[str, list[bytes], bool]]
) -> None:
    store = new_store()
    model: dict[str, bytes] = {}
    for key, pieces, commits in writes:
        if any(key.startswith(known + "/") or known.startswith(key + "/") for known in model):
            continue  # a file and a folder of one name: keys of uploads are checked for that
        writer = store.writer(key)
        for piece in pieces:
            writer.write(piece)
        assert {info.key for info in store.list("")} == set(model)  # not visible before commit
        if commits:
            info = writer.commit()
            model[key] = b"".join(pieces)
            assert (info.key, info.size) == (key, len(model[key]))
        else:
            writer.abort()
        writer.abort()  # harmless
    assert [(info.key, info.size) for info in store.list("")] == [(key, len(model[key])) for key in sorted(model)]
    for key, data in model.items():
        with store.open(key) as stream:
            assert stream.read() == data
            stream.seek(len(data) // 2)
            assert stream.read() == data[len(data) // 2 :]
    assert leftovers(store) == []


def test_objects_of_many_parts_are_read_as_they_were_written(store: ObjectStore) -> None:
    data = random.Random(1).randbytes(23 * MIB + 7)
    writer = store.writer("models/1/files/large")
    for start in range(0, len(data), 700_001):
        writer.write(memoryview(data)[start : start + 700_001])
    assert list(store.list("")) == []
    assert writer.commit(if_absent=True).size == len(data)
    assert hashlib.sha256(read(store, "models/1/files/large")).digest() == hashlib.sha256(data).digest()
    assert leftovers(store) == []
    again = store.writer("models/1/files/large")
    again.write(bytes(len(data)))
    with pytest.raises(ObjectExists):
        again.commit(if_absent=True)
    assert read(store, "models/1/files/large") == data
    assert leftovers(store) == []


@pytest.mark.parametrize("size", [5 * MIB - 1, 5 * MIB, 5 * MIB + 1, 10 * MIB, 0])
def test_sizes_around_those_of_parts(store: ObjectStore, size: int) -> None:
    data = random.Random(size).randbytes(size)
    writer = store.writer("a")
    for start in range(0, size, 5 * MIB):
        writer.write(data[start : start + 5 * MIB])
    assert writer.commit().size == size
    assert read(store, "a") == data


def test_a_stream_that_is_given_up_leaves_nothing_behind(store: ObjectStore) -> None:
    writer = store.writer("models/1/files/large")
    for _ in range(12):
        writer.write(bytes(MIB))
    assert leftovers(store) != []
    writer.abort()
    assert leftovers(store) == []
    assert list(store.list("")) == []


def test_any_range_can_be_read_in_any_order(store: ObjectStore) -> None:
    data = random.Random(2).randbytes(700_000)
    put(store, "a", data)
    chance = random.Random(3)
    with store.open("a") as stream, io.BytesIO(data) as truth:
        for _ in range(60):
            place = chance.randrange(len(data) + 10)
            whence = chance.choice((io.SEEK_SET, io.SEEK_END))
            offset = place if whence == io.SEEK_SET else place - len(data) - 10
            if whence == io.SEEK_END and len(data) + offset < 0:
                continue
            assert stream.seek(offset, whence) == truth.seek(offset, whence)
            size = chance.choice((0, 1, 100, 200_000, -1))
            assert stream.read(size) == truth.read(size)
            assert stream.tell() == truth.tell()


def test_lists_are_in_order_and_by_prefix(store: ObjectStore) -> None:
    names = ["a-b", "a.txt", "a/b", "a/b-c", "a/c/d", "ab", "b", "Z", "ü"]
    for name in names:
        put(store, name)
    assert [info.key for info in store.list("")] == sorted(names)
    assert [info.key for info in store.list("a/")] == ["a/b", "a/b-c", "a/c/d"]
    assert [info.key for info in store.list("a/b")] == ["a/b", "a/b-c"]
    assert [info.key for info in store.list("c/")] == []


def test_one_of_many_conditional_writers_wins(store: ObjectStore) -> None:
    won, lost = [], []
    together = threading.Barrier(8)

    def write(number: int) -> None:
        writer = store.writer("models/1/manifest.json")
        writer.write(str(number).encode())
        together.wait()
        try:
            writer.commit(if_absent=True)
            won.append(number)
        except ObjectExists:
            lost.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert len(lost) == 7
    assert read(store, "models/1/manifest.json") == str(won[0]).encode()
    assert leftovers(store) == []


def test_deleting_a_folder_leaves_its_neighbours(store: ObjectStore) -> None:
    for key in ("models/1/files/a", "models/1/files/sub/b", "models/1/manifest.json", "models/12/manifest.json"):
        put(store, key)
    store.delete("models/1/files/sub/b")
    assert [info.key for info in store.list("models/1/")] == ["models/1/files/a", "models/1/manifest.json"]
    store.delete("models/1")
    store.delete("models/1")  # fine
    assert [info.key for info in store.list("models/")] == ["models/12/manifest.json"]


def test_no_empty_folders_stay_but_the_place_of_the_next(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    put(store, "models/1/files/sub/b")
    put(store, "models/1/files/a")
    store.delete("models/1/files/sub/b")
    assert not (tmp_path / "models/1/files/sub").exists()
    store.delete("models/1")
    assert (tmp_path / "models").is_dir()  # another upload may be about to make its folder there


def test_deletions_and_commits_side_by_side_do_not_disturb_each_other(store: ObjectStore) -> None:
    faults: list[Exception] = []

    def churn(number: int) -> None:
        try:
            for turn in range(30):
                put(store, f"models/{number}-{turn}/files/a")
                store.delete(f"models/{number}-{turn}")
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=churn, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert list(store.list("")) == []


@pytest.mark.parametrize("key", ["", "/a", "a//b", "../a", "a/../b", "./a", "a/.", ".unfinished/x", "a\0b"])
def test_keys_that_lead_elsewhere_are_refused(store: ObjectStore, key: str) -> None:
    for use in (store.writer, store.open, store.delete, store.begin_parts, store.uri):
        with pytest.raises(ValueError, match="not an object key"):
            use(key)


def test_what_is_missing_is_said(store: ObjectStore) -> None:
    put(store, "a/b")
    for key in ("c", "a"):
        with pytest.raises(ObjectMissing):
            store.open(key)


# --- checkouts -------------------------------------------------------------------------------------------------------


def _version(store: ObjectStore, location: str) -> dict[str, bytes]:
    """A stored version; its files by path."""
    files = {"files/model.txt": b"tree" * 1000, "files/sub/ünï x.bin": bytes(range(256)) * 300}
    beside = {"sample.json": b'{"inputs": []}', "requirements/requirements.txt": b"numpy\n"}

    def sizes(data: bytes) -> tuple[int, str]:
        return len(data), hashlib.sha256(data).hexdigest()

    manifest = Manifest(
        kind="lightgbm",
        format="lightgbm-text",
        files=tuple(File(path.removeprefix("files/"), *sizes(data)) for path, data in files.items()),
        sample=Attachment(*sizes(beside["sample.json"])),
        requirements=Attachment(*sizes(beside["requirements/requirements.txt"]), "requirements.txt"),
    ).to_bytes()
    whole = {**files, **beside, "manifest.json": manifest}
    for path, data in whole.items():
        put(store, f"{location}/{path}", data)
    return whole


def test_a_version_is_checked_out_whole(store: ObjectStore, tmp_path: Path) -> None:
    files = _version(store, "models/1")
    folder = store.checkout("models/1", tmp_path / "checkouts" / "models" / "1")
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == files
    assert store.checkout("models/1", tmp_path / "checkouts" / "models" / "1") == folder
    assert [path.name for path in folder.parent.iterdir()] == ["1"]


def test_checkouts_at_once_give_one_folder(store: ObjectStore, tmp_path: Path) -> None:
    files = _version(store, "models/1")
    found: list[Path] = []
    into = tmp_path / "checkouts" / "1"
    threads = [threading.Thread(target=lambda: found.append(store.checkout("models/1", into))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert {(folder / "files/model.txt").read_bytes() for folder in found} == {files["files/model.txt"]}
    assert len(list(found[0].parent.iterdir())) == 1


# --- what is left unfinished -----------------------------------------------------------------------------------------


def test_what_is_under_way_is_not_swept(store: ObjectStore) -> None:
    put(store, "models/KNOWN/manifest.json")
    writer = store.writer("models/NEW/files/large")
    for _ in range(12):
        writer.write(bytes(MIB))
    upload = store.begin_parts("models/PARTS/files/a")
    store.sweep({"models/KNOWN"}, stale=3600, alone=False)
    assert len(leftovers(store)) == 2
    writer.commit()
    store.put_part(upload, 1, b"x", hashlib.sha256(b"x").hexdigest())
    store.complete_parts(upload)
    store.sweep({"models/KNOWN"}, stale=3600, alone=False)
    assert [info.key for info in store.list("")] == [
        "models/KNOWN/manifest.json", "models/NEW/files/large", "models/PARTS/files/a",
    ]  # fmt: skip


def test_what_stood_still_is_swept(store: ObjectStore) -> None:
    put(store, "models/KNOWN/files/a")
    put(store, "models/KNOWN/manifest.json")
    put(store, "models/LEFT/files/a")
    writer = store.writer("models/LEFT/files/large")
    for _ in range(12):
        writer.write(bytes(MIB))
    writer = None  # its service died
    upload = store.begin_parts("models/PARTS/files/a")
    store.put_part(upload, 1, b"x", hashlib.sha256(b"x").hexdigest())
    store.sweep({"models/KNOWN"}, stale=-5, alone=True)
    assert [info.key for info in store.list("")] == ["models/KNOWN/files/a", "models/KNOWN/manifest.json"]
    assert leftovers(store) == []


def test_a_file_in_parts_that_no_version_took_is_swept_while_the_service_runs(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    for location in ("models/TAKEN", "models/KNOWN", "models/NEW"):
        upload = store.begin_parts(f"{location}/files/a")
        store.put_part(upload, 1, b"x", hashlib.sha256(b"x").hexdigest())
        store.complete_parts(upload)
    put(store, "models/NEW/manifest.json")  # its version's row came after the sweep asked for all
    store.sweep({"models/KNOWN"}, stale=-5, alone=False)
    assert [info.key for info in store.list("")] == [
        "models/KNOWN/files/a", "models/NEW/files/a", "models/NEW/manifest.json",
    ]  # fmt: skip
    assert leftovers(store) == []


def test_streams_of_a_service_that_died_are_swept(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.writer("a").write(b"half")
    assert len(leftovers(store)) == 1
    DirectoryStore(tmp_path).sweep((), stale=3600, alone=True)
    assert leftovers(store) == []
    assert list(store.list("")) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
def test_a_full_disk_is_an_error_of_its_own(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    writer = store.writer("a")
    writer._file.close()
    writer._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115 - the writer closes it
    with pytest.raises(InfrastructureError) as caught:
        writer.write(b"x")
    assert (caught.value.code, caught.value.status) == ("disk_full", 507)
    writer.abort()
