"""Uploads in parts, in a folder and in buckets: what was acknowledged stays, and nothing else gets in."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from registry import parts
from registry.errors import EkibenError
from registry.parts import UploadComplete, UploadMissing
from registry.store import DirectoryStore, ObjectStore
from tests.object_stores import leftovers

KEY = "models/01J/files/large.bin"
SIZE = parts.SMALLEST_PART
DATA = random.Random(5).randbytes(2 * SIZE + 1000)
PIECES = [DATA[start : start + SIZE] for start in range(0, len(DATA), SIZE)]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def send(store: ObjectStore, upload: str, number: int, data: bytes | None = None) -> None:
    body = PIECES[number - 1] if data is None else data
    part = store.put_part(upload, number, body, sha256(body))
    assert (part.number, part.size, part.sha256) == (number, len(body), sha256(body))


def refused(code: str, action: Callable[[], object]) -> None:
    with pytest.raises(EkibenError) as caught:
        action()
    assert caught.value.code == code


def test_parts_become_one_object(store: ObjectStore) -> None:
    upload = store.begin_parts(KEY)
    assert list(store.parts(upload)) == []
    for number in (1, 2, 3):
        send(store, upload, number)
    assert [(part.number, part.size, part.sha256) for part in store.parts(upload)] == [
        (number, len(piece), sha256(piece)) for number, piece in enumerate(PIECES, 1)
    ]
    assert list(store.list("")) == []  # not visible before it is complete
    info = store.complete_parts(upload)
    assert (info.key, info.size) == (KEY, len(DATA))
    assert store.complete_parts(upload).size == len(DATA)  # the answer may have been lost
    with pytest.raises(UploadComplete):
        store.parts(upload)
    with pytest.raises(UploadComplete):
        send(store, upload, 3)
    store.end_parts(upload)
    store.end_parts(upload)
    with pytest.raises(UploadMissing):
        store.complete_parts(upload)
    with store.open(KEY) as stream:
        assert stream.read() == DATA
    assert leftovers(store) == []


def test_a_part_can_be_sent_again_but_not_changed(store: ObjectStore) -> None:
    upload = store.begin_parts(KEY)
    send(store, upload, 1)
    send(store, upload, 1)
    send(store, upload, 2)
    send(store, upload, 1)
    refused("part_conflict", lambda: send(store, upload, 2, PIECES[0]))
    refused("part_out_of_order", lambda: send(store, upload, 4, b"x"))
    refused("part_out_of_order", lambda: send(store, upload, 0, b"x"))
    refused("part_digest_mismatch", lambda: store.put_part(upload, 3, PIECES[2], sha256(b"other")))
    refused("part_empty", lambda: send(store, upload, 3, b""))
    send(store, upload, 3)
    assert store.complete_parts(upload).size == len(DATA)


def test_only_the_last_part_may_be_small(store: ObjectStore) -> None:
    upload = store.begin_parts(KEY)
    send(store, upload, 1, b"small")
    refused("part_too_small", lambda: send(store, upload, 2))
    assert store.complete_parts(upload).size == 5


def test_parts_larger_than_memory_allows_are_refused(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "LARGEST_PART", 10)
    upload = store.begin_parts(KEY)
    refused("part_too_large", lambda: send(store, upload, 1, bytes(11)))


def test_nothing_comes_of_no_parts(store: ObjectStore) -> None:
    upload = store.begin_parts(KEY)
    refused("upload_incomplete", lambda: store.complete_parts(upload))
    store.end_parts(upload)
    assert leftovers(store) == []
    assert list(store.list("")) == []


@pytest.mark.parametrize(
    "upload", ["", "x", "../../../etc", "01J00000000000000000000000", "01j00000000000000000000000"]
)
def test_ids_that_name_nothing(store: ObjectStore, upload: str) -> None:
    for use in (store.parts, store.complete_parts):
        with pytest.raises(UploadMissing):
            use(upload)
    with pytest.raises(UploadMissing):
        send(store, upload, 1)
    if upload:
        store.end_parts(upload)


def test_a_part_that_was_cut_short_is_sent_again(tmp_path: Path) -> None:
    """What a service that was killed between two writes leaves: bytes that no line tells of, and half a line."""
    upload = DirectoryStore(tmp_path).begin_parts(KEY)
    store = DirectoryStore(tmp_path)
    send(store, upload, 1)
    folder = tmp_path / ".unfinished" / f"{upload}.parts"
    with (folder / "content").open("ab") as content, (folder / "parts").open("ab") as journal:
        content.write(PIECES[1][:1000])
        journal.write(b'{"number": 2, "si')
    assert [part.number for part in store.parts(upload)] == [1]
    for number in (2, 3):
        send(store, upload, number)
    store.complete_parts(upload)
    with store.open(KEY) as stream:
        assert stream.read() == DATA


def test_a_start_keeps_uploads_that_go_on_and_what_they_are_part_of(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    upload = store.begin_parts(KEY)
    send(store, upload, 1)
    store.complete_parts(upload)  # and then the service died, before it knew of a version
    store.sweep((), stale=3600, alone=True)
    assert store.complete_parts(upload).size == SIZE
    store.end_parts(upload)
    store.sweep((), stale=3600, alone=True)
    assert list(store.list("")) == []
