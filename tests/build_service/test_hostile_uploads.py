"""Requests that would cost much more than their sender's part of it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

Home = Any  # tests/build_service/conftest.py, which tests cannot import
Model = Callable[..., bytes]


def form(count: int, field: str = "file") -> tuple[bytes, dict[str, str]]:
    body = b"".join(
        f'--mark\r\nContent-Disposition: form-data; name="{field}"; filename="f{number}"\r\n\r\nx\r\n'.encode()
        for number in range(count)
    )
    return body + b"--mark--\r\n", {"Content-Type": "multipart/form-data; boundary=mark"}


def test_a_form_of_very_many_small_parts_is_refused_before_any_is_stored(server: Home) -> None:
    before = server.objects()
    body, headers = form(10_500)
    told = server.post("/models", 413, content=body, headers=headers)
    assert told["code"] == "too_many_form_parts"
    assert "tar -cf" in told["hint"]
    assert server.objects() == before


def test_a_form_of_a_hundred_parts_is_read(server: Home) -> None:
    body, headers = form(100)
    assert server.post("/models", 422, content=body, headers=headers)["code"] == "unknown_format"


@pytest.mark.parametrize(
    ("method", "path"),
    [("PUT", "/deployments/x"), ("PATCH", "/models/x/versions/1"), ("POST", "/uploads"), ("GET", "/models")],
)
def test_bodies_that_are_small_by_their_nature_are_bounded(server: Home, method: str, path: str) -> None:
    with server.http() as client:
        answer = client.request(method, path, content=b" " * 300_000, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"labels":' * 20_000 + b"1" + b"}" * 20_000])
def test_bodies_that_are_nested_deeply_are_malformed(server: Home, body: bytes) -> None:
    with server.http() as client:
        answer = client.patch("/models/x/versions/1", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.json()["code"] != "internal_error"


def test_one_caller_has_so_many_uploads_under_way_and_others_go_on(home: Home, model: Model) -> None:
    home.start(max_caller_uploads="1", upload_idle_seconds="0.5", token="first")
    second = home.post("/tokens", 201, json={"name": "second"}, headers=bearer("first"))["token"]
    held = held_upload(home, "first")
    try:
        with home.http() as client:
            query = {"name": "m", "filename": "m.txt", "deploy": "false"}
            late = client.post("/models", params=query, content=model(3), headers=bearer("first"))
            other = client.post("/models", params=query, content=model(3), headers=bearer(second))
    finally:
        held.close()
    assert (late.status_code, late.json()["code"], late.headers["retry-after"]) == (429, "too_many_uploads", "5")
    assert other.status_code == 201


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def held_upload(home: Home, token: str) -> Any:
    """An upload that has begun and goes on for as long as a thread sends a byte now and then."""
    host, port = home.url.removeprefix("http://").rsplit(":", 1)
    connection = socket.create_connection((host, int(port)))
    connection.sendall(
        f"POST /models?name=held&filename=held.txt HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
        f"Authorization: Bearer {token}\r\nContent-Type: application/octet-stream\r\n\r\n".encode()
    )

    def drip() -> None:
        try:
            while True:
                connection.sendall(b"x" * 100)
                threading.Event().wait(0.05)
        except OSError:
            pass

    threading.Thread(target=drip, daemon=True).start()
    return connection


def test_labels_of_a_megabyte_are_refused_quickly(server: Home, model: Model) -> None:
    told = server.upload(
        model(4), labels=json.dumps({f"k{number}": "v" for number in range(50_000)}), status=422, wait=0
    )
    assert told["code"] == "bad_labels"
