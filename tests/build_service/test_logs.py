"""Logs that are read while they are written and begun again when they are full."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from build_service.logs import followed, lines
from build_service.own_log import OwnLog
from registry.confinement.orders import Log
from registry.confinement.supervisor import Sink


def until_quiet(stream: Iterator[str]) -> list[str]:
    """What there is until the first heartbeat."""
    found = []
    for line in stream:
        if not line:
            break
        found.append(line)
    return found


def test_a_follower_misses_no_line_over_rotations(tmp_path: Path) -> None:
    path = tmp_path / "000001-1.log"
    sink, ended = Sink(Log(str(path), 400, True)), False
    stream = followed(lambda: list(tmp_path.glob("*.log")), lambda: [path], lambda p: "title", ended=lambda: ended)
    seen, written = [], []
    for number in range(0, 60, 3):
        for each in range(number, number + 3):
            written.append(f"line {each:04} " + "x" * (each % 17))
            sink.write(f"{written[-1]}\n".encode())
        seen += until_quiet(stream)
    ended = True
    assert seen + [line for line in stream if line] == written
    assert path.with_name("000001-1.log.1").exists()


def test_a_log_is_shown_with_what_it_was_before_its_rotation(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    sink = Sink(Log(str(path), 100, True))
    for number in range(8):
        sink.write(f"line {number}\n".encode())
    assert list(lines(path, follow=False, finished=lambda: True)) == [f"line {number}" for number in range(8)]
    assert path.stat().st_size < 56


def test_a_log_that_is_followed_goes_on_in_the_next_file(tmp_path: Path) -> None:
    path, finished = tmp_path / "log.txt", False
    sink = Sink(Log(str(path), 100, True))
    sink.write(b"first\n")
    stream = lines(path, follow=True, finished=lambda: finished)
    assert until_quiet(stream) == ["first"]
    for number in range(9):
        sink.write(f"line {number}\n".encode())
        assert until_quiet(stream) == [f"line {number}"]
    finished = True
    assert list(stream) == []


def test_the_services_own_log_is_begun_again_without_loss(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    error = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    output = os.dup(error)
    own = OwnLog(path, 100)
    try:
        for number in range(12):
            os.write(error if number % 2 else output, f"line {number:04}\n".encode())
            own.look(error, output)
    finally:
        os.close(error)
        os.close(output)
    kept = (tmp_path / "server.log.1").read_text() + path.read_text()
    assert len(kept) <= 110
    assert kept.splitlines() == [f"line {number:04}" for number in range(12)][-len(kept.splitlines()) :]


def test_a_log_of_the_operators_is_left_alone(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.log"
    (tmp_path / "server.log").touch()
    error = os.open(elsewhere, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(error, b"x" * 1000)
        OwnLog(tmp_path / "server.log", 100).look(error, error)
    finally:
        os.close(error)
    assert elsewhere.stat().st_size == 1000
