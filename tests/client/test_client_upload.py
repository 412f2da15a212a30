"""The form: fields before files, an exact length, and bytes that a strict parser reads back."""

from __future__ import annotations

import email.parser
import email.policy
import io
import os
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekiben import UsageError, _archive, _upload


def read(form: _upload.Form) -> list[tuple[str, str | None, bytes]]:
    """(field, file name, content) of each part, by the standard library's MIME parser."""
    body = b"".join(form.stream())
    assert len(body) == form.size
    head = f"Content-Type: {form.content_type}\r\n\r\n".encode()
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
    parts = []
    for part in message.iter_parts():  # type: ignore[attr-defined]
        name = part.get_param("name", header="content-disposition")
        parts.append((name, part.get_filename(), part.get_payload(decode=True)))
    return parts


def test_fields_stand_before_files_and_absent_ones_are_left_out(tmp_path: Path) -> None:
    first, second, lock = tmp_path / "model.onnx", tmp_path / "weights.bin", tmp_path / "uv.lock"
    first.write_bytes(b"\x00\r\n--x")
    second.write_bytes(b"two")
    lock.write_bytes(b"lock")
    form = _upload.form(
        [first, second],
        fields={"name": "churn", "kind": None},
        documents={"sample": {"inputs": [[1.5, None, "ü"]]}, "expected": None},
        requirements=lock,
    )
    assert read(form) == [
        ("name", None, b"churn"),
        ("sample", "sample.json", '{"inputs":[[1.5,null,"ü"]]}'.encode()),
        ("requirements", "uv.lock", b"lock"),
        ("file", "model.onnx", b"\x00\r\n--x"),
        ("file", "weights.bin", b"two"),
    ]


def test_the_same_form_can_be_sent_twice(tmp_path: Path) -> None:
    file = tmp_path / "m.txt"
    file.write_bytes(b"tree")
    form = _upload.form([file], fields={"name": "m"})
    assert b"".join(form.stream()) == b"".join(form.stream())


def test_progress_ends_at_the_whole_length(tmp_path: Path) -> None:
    file = tmp_path / "m.txt"
    file.write_bytes(b"x" * 3_000_000)
    form = _upload.form([file], fields={})
    seen: list[int] = []
    assert sum(len(chunk) for chunk in form.stream(seen.append)) == form.size
    assert seen == sorted(seen)
    assert seen[-1] == form.size


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "large.bin"
    with file.open("wb") as stream:
        stream.truncate(200 * 1024 * 1024)
    form = _upload.form([file], fields={})
    tracemalloc.start()
    try:
        for _ in form.stream():
            pass
        assert tracemalloc.get_traced_memory()[1] < 8 * 1024 * 1024
    finally:
        tracemalloc.stop()


def test_a_file_that_changes_while_it_is_sent_fails_instead_of_arriving_wrong(tmp_path: Path) -> None:
    file = tmp_path / "m.txt"
    file.write_bytes(b"long enough")
    form = _upload.form([file], fields={})
    file.write_bytes(b"short")
    with pytest.raises(UsageError) as caught:
        b"".join(form.stream())
    assert caught.value.code == "file_changed"
    file.write_bytes(b"longer than before")
    with pytest.raises(UsageError):
        b"".join(form.stream())


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda folder: [folder / "absent.txt"], "no_such_file"),
        (lambda folder: [touch(folder / "empty.txt", b"")], "empty_file"),
        (lambda folder: [touch(folder / "a" / "m.txt"), touch(folder / "b" / "m.txt")], "duplicate_file"),
        (lambda folder: [touch(folder / "a" / "m.txt").parent, touch(folder / "m.txt")], "folder_and_files"),
        (lambda folder: [touch(folder / "p" / ".git" / "x").parent.parent], "empty_folder"),
        (lambda folder: [Path("/dev/null")], "not_a_file"),
        (lambda folder: [], "no_file"),
    ],
)
def test_what_cannot_be_pushed_is_said_before_anything_is_sent(make: Any, code: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        _upload.form(make(tmp_path), fields={})
    assert caught.value.code == code


def touch(file: Path, content: bytes = b"x") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def unpacked(folder: Path) -> dict[str, bytes]:
    listed = _archive.folder(folder)
    data = b"".join(listed.stream())
    assert len(data) == listed.size
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert all(member.isreg() for member in archive)
        return {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]


def test_a_folder_is_sent_without_history_environments_and_caches(tmp_path: Path) -> None:
    for name in (
        "service.py",
        "src/prep.py",
        ".git/HEAD",
        "__pycache__/a.pyc",
        ".venv/bin/python",
        "src/x.pyc",
        ".env",
    ):
        touch(tmp_path / name)
    assert sorted(unpacked(tmp_path)) == ["service.py", "src/prep.py"]


def test_bentoignore_is_honoured(tmp_path: Path) -> None:
    for name in ("keep.csv", "drop.csv", "data/big.bin", "deep/data/x", "notes/a.md", "src/notes/a.md"):
        touch(tmp_path / name)
    touch(tmp_path / ".bentoignore", b"# comment\n*.csv\n!keep.csv\ndata/\n/notes\n")
    assert sorted(unpacked(tmp_path)) == [".bentoignore", "keep.csv", "src/notes/a.md"]


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    touch(tmp_path / "store" / "blob", b"weights")
    project = tmp_path / "project"
    project.mkdir()
    (project / "model.bin").symlink_to(tmp_path / "store" / "blob")
    (project / "again").symlink_to(project)
    assert unpacked(project) == {"model.bin": b"weights"}
    (project / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="link to nothing"):
        _archive.folder(project)


def test_a_touched_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    file = touch(tmp_path / "service.py")
    before = b"".join(_archive.folder(tmp_path).stream())
    os.utime(file, (1, 1))
    assert b"".join(_archive.folder(tmp_path).stream()) == before


@given(
    st.dictionaries(
        st.text(
            st.characters(codec="utf-8", exclude_characters="/\x00", exclude_categories=("Cs",)),
            min_size=1,
            max_size=60,
        )
        .filter(lambda name: name not in (".", "..") and len(name.encode()) < 200)
        .map(lambda name: f"d-{name}"),
        st.binary(max_size=2000),
        min_size=1,
        max_size=4,
    )
)
def test_any_names_and_contents_come_back_from_the_tar(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    kept = {name: content for name, content in files.items() if not name.endswith((".pyc", ".pyo", ".swp"))}
    if kept:
        assert unpacked(folder) == kept
