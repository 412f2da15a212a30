"""The object store on a directory: all or nothing, whatever happens in between."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.errors import InfrastructureError
from registry.store import DirectoryStore, ObjectExists, ObjectMissing

part = st.sampled_from(("a", "b", "A", "files", "x.txt", "ünï", "-", "a b"))
keys = st.lists(part, min_size=1, max_size=4).map("/".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(keys, st.lists(st.binary(max_size=200), max_size=5), st.booleans()), max_size=12))
def test_what_is_committed_is_readable_whole_and_nothing_else_is(
    writes: list[tuple[str, list[bytes], bool]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = DirectoryStore(Path(folder))
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
        assert {info.key: info.size for info in store.list("")} == {key: len(data) for key, data in model.items()}
        for key, data in model.items():
            with store.open(key) as stream:
                assert stream.read() == data
                stream.seek(len(data) // 2)
                assert stream.read() == data[len(data) // 2 :]
        assert list((Path(folder) / ".unfinished").iterdir()) == []


def test_one_of_many_conditional_writers_wins(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
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
    with store.open("models/1/manifest.json") as stream:
        assert stream.read() == str(won[0]).encode()
    assert list((tmp_path / ".unfinished").iterdir()) == []


def test_deleting_a_folder_leaves_its_neighbours_and_the_place_of_the_next(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    for key in ("models/1/files/a", "models/1/files/sub/b", "models/1/manifest.json", "models/12/manifest.json"):
        store.writer(key).commit()
    store.delete("models/1/files/sub/b")
    assert not (tmp_path / "models/1/files/sub").exists()
    store.delete("models/1")
    store.delete("models/1")  # fine
    assert [info.key for info in store.list("models/")] == ["models/12/manifest.json"]
    store.delete("models/12")
    assert (tmp_path / "models").is_dir()  # another upload may be about to make its folder there


def test_deletions_and_commits_side_by_side_do_not_disturb_each_other(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    faults: list[Exception] = []

    def churn(number: int) -> None:
        try:
            for turn in range(100):
                store.writer(f"models/{number}-{turn}/files/a").commit()
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
def test_keys_that_lead_elsewhere_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="not an object key"):
        DirectoryStore(tmp_path).writer(key)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.writer("a/b").commit()
    for key in ("c", "a"):
        with pytest.raises(ObjectMissing):
            store.open(key)


def test_streams_of_a_service_that_died_are_swept(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.writer("a").write(b"half")
    assert len(list((tmp_path / ".unfinished").iterdir())) == 1
    DirectoryStore(tmp_path).sweep((), stale=3600, alone=True)
    assert list((tmp_path / ".unfinished").iterdir()) == []
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
