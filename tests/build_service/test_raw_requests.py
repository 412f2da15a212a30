"""Requests as bytes on a socket: what two readers could read in two ways is refused, with a code."""

from __future__ import annotations

import json
import re
import socket
import threading
from typing import Any
from urllib.parse import urlsplit

import pytest
import uvicorn

from build_service.http_protocol import Protocol

Home = Any  # tests/build_service/conftest.py, which tests cannot import

GET = "GET /kinds HTTP/1.1\r\n"
POST = "POST /inference/nobody/predict HTTP/1.1\r\nHost: localhost\r\n"
HOST = "Host: localhost\r\n"
CHUNKED = "Transfer-Encoding: chunked\r\n\r\n"
CHUNKS = "2\r\n{}\r\n0\r\n\r\n"

REFUSED = {
    # which host
    "two hosts, ours last": (GET + "Host: evil.example\r\n" + HOST + "\r\n", 400, "malformed_request"),
    "two hosts, ours first": (GET + HOST + "Host: evil.example\r\n\r\n", 400, "malformed_request"),
    "the same host twice": (GET + HOST + HOST + "\r\n", 400, "malformed_request"),
    "a host behind an @": (GET + "Host: localhost:80@evil.example\r\n\r\n", 400, "bad_host"),
    "a host behind an address": (GET + "Host: [::1]evil.example\r\n\r\n", 400, "bad_host"),
    "half an address": (GET + "Host: [::1\r\n\r\n", 400, "bad_host"),
    "an empty host": (GET + "Host:\r\n\r\n", 400, "bad_host"),
    "a list of hosts": (GET + "Host: localhost, evil.example\r\n\r\n", 400, "bad_host"),
    "two hosts in one": (GET + "Host: localhost evil.example\r\n\r\n", 400, "bad_host"),
    "a path in the host": (GET + "Host: localhost/evil\r\n\r\n", 400, "bad_host"),
    "a word for a port": (GET + "Host: localhost:http\r\n\r\n", 400, "bad_host"),
    "a port that cannot be": (GET + "Host: localhost:65536\r\n\r\n", 400, "bad_host"),
    "a host beyond ASCII": (GET + "Host: l\xf6calhost\r\n\r\n", 400, "bad_host"),
    "no host": (GET + "\r\n", 400, "bad_host"),
    "no host, as before HTTP/1.1": ("GET /kinds HTTP/1.0\r\n\r\n", 400, "bad_host"),
    "a foreign host": (GET + "Host: evil.example\r\n\r\n", 421, "foreign_host"),
    # which target
    "a foreign target": ("GET http://evil.example/kinds HTTP/1.1\r\n" + HOST + "\r\n", 400, "bad_target"),
    "another port's target": ("GET http://localhost:1/kinds HTTP/1.1\r\n" + HOST + "\r\n", 400, "bad_target"),
    "a target behind an @": ("GET http://localhost@evil.example/ HTTP/1.1\r\n" + HOST + "\r\n", 400, "bad_target"),
    "another scheme": ("GET ftp://localhost/kinds HTTP/1.1\r\n" + HOST + "\r\n", 400, "bad_target"),
    "a target without a path": ("GET http://evil.example HTTP/1.1\r\n" + HOST + "\r\n", 400, "malformed_request"),
    "a tunnel": ("CONNECT evil.example:443 HTTP/1.1\r\n" + HOST + "\r\n", 400, "malformed_request"),
    "a fragment": ("GET /kinds#x HTTP/1.1\r\n" + HOST + "\r\n", 400, "bad_target"),
    "a target for a probe": ("GET http://evil.example/livez HTTP/1.1\r\n" + HOST + "\r\n", 400, "bad_target"),
    # which headers
    "a folded header": (GET + HOST + "X-A: 1\r\n  2\r\n\r\n", 400, "malformed_request"),
    "a space before the colon": (GET + "Host : evil.example\r\n" + HOST + "\r\n", 400, "malformed_request"),
    "a bare CR": (GET + HOST + "X-A: 1\rX-B: 2\r\n\r\n", 400, "malformed_request"),
    "a NUL": (GET + HOST + "X-A: 1\x002\r\n\r\n", 400, "malformed_request"),
    "two tokens": (GET + HOST + "Authorization: Bearer a\r\nAuthorization: Bearer b\r\n\r\n", 400, "malformed_request"),
    "two origins": (POST + "Origin: http://evil.example\r\nOrigin: http://localhost\r\n\r\n", 400, "malformed_request"),
    # where the body ends
    "two lengths": (POST + "Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} ", 400, "malformed_request"),
    "two spellings of a length": (POST + "Content-Length: 2\r\nContent_Length: 3\r\n\r\n{}", 400, "malformed_request"),
    "a list of lengths": (POST + "Content-Length: 2, 2\r\n\r\n{}", 400, "malformed_request"),
    "a length with a sign": (POST + "Content-Length: +2\r\n\r\n{}", 400, "malformed_request"),
    "chunks and a length": (
        POST + "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n" + CHUNKS, 400, "malformed_request",
    ),
    "a length and chunks": (
        POST + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKS, 400, "malformed_request",
    ),
    "two codings": (
        POST + "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n" + CHUNKS, 400, "malformed_request",
    ),
    "an unknown coding": (POST + "Transfer-Encoding: xchunked\r\n\r\n" + CHUNKS, 400, "malformed_request"),
    "chunks in a coding": (POST + "Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKS, 400, "malformed_request"),
    "a size that is none": (POST + "Transfer-Encoding: chunked\r\n\r\n0x" + CHUNKS, 400, "malformed_request"),
    "chunks before HTTP/1.1": (
        POST.replace("1.1", "1.0") + CHUNKED + CHUNKS, 400, "malformed_request",
    ),
    # trailers are no headers
    "a host in the trailers": (
        POST.replace(HOST, "Host: evil.example\r\n") + CHUNKED + CHUNKS[:-2] + HOST + "\r\n", 421, "foreign_host",
    ),
}  # fmt: skip

ANSWERED = {
    "our name": (GET + HOST + "\r\n", 200),
    "our name in capitals, with a port": (GET + "Host: LOCALHOST:65535\r\n\r\n", 200),
    "our address": (GET + "Host: 127.0.0.1\r\n\r\n", 200),
    "our address of IPv6": (GET + "Host: [::1]:80\r\n\r\n", 200),
    "a target of ours": ("GET http://localhost/kinds HTTP/1.1\r\n" + HOST + "\r\n", 200),
    "the same with its port": ("GET HTTP://LOCALHOST:80/kinds HTTP/1.1\r\n" + HOST + "\r\n", 200),
    "a probe without a host": ("GET /livez HTTP/1.0\r\n\r\n", 200),
    "chunks": (POST + CHUNKED + CHUNKS, 404),
    "a host in the trailers of a good request": (
        POST + "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nHost: evil.example\r\n\r\n", 404,
    ),
}  # fmt: skip


def answer(home: Home, request: str) -> tuple[int, dict[str, str], bytes]:
    with socket.create_connection(("127.0.0.1", urlsplit(home.url).port), timeout=60) as connection:
        connection.sendall(request.encode("latin-1"))
        stream = connection.makefile("rb")
        status = int(stream.readline().split()[1])
        headers = {}
        while line := stream.readline().strip():
            name, _, value = line.decode().partition(": ")
            headers[name] = value
        return status, headers, stream.read(int(headers["content-length"]))


@pytest.mark.parametrize("case", REFUSED)
def test_a_request_that_can_be_read_in_two_ways_is_refused(server: Home, case: str) -> None:
    request, status, code = REFUSED[case]
    found, headers, body = answer(server, request)
    problem = json.loads(body)
    assert (found, problem["code"]) == (status, code), problem
    assert headers["content-type"] == "application/problem+json"
    assert problem["hint"]
    assert re.search("evil|@", problem["detail"]) is None or code == "foreign_host"


@pytest.mark.parametrize("case", ANSWERED)
def test_a_plain_request_is_answered(server: Home, case: str) -> None:
    request, status = ANSWERED[case]
    assert answer(server, request)[0] == status


@pytest.mark.parametrize("begun", ["", GET, GET + HOST + "X-A: 1"])
def test_a_client_that_does_not_send_the_head_of_a_request_is_let_go(
    begun: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("it was asked")

    monkeypatch.setattr(Protocol, "head_seconds", 0.01)
    running = uvicorn.Server(uvicorn.Config(application, http=Protocol, lifespan="off", log_config=None))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=running.run, args=([listening],))
        thread.start()
        with socket.create_connection(listening.getsockname(), timeout=60) as connection:
            connection.sendall(begun.encode())
            assert connection.recv(100) == b""
        running.should_exit = True
        thread.join()


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_page_of_another_site_may_not_write_where_the_browser_names_no_origin(server: Home, site: str) -> None:
    with server.http(known=False, headers={"sec-fetch-site": site}) as client:
        for path in ("/models", "/uploads", "/tokens", "/inference/nobody/predict"):
            refused = client.post(path, content=b"")
            assert (refused.status_code, refused.json()["code"]) == (403, "foreign_origin")
        assert client.get("/models").status_code == 200
    with server.http(known=False, headers={"sec-fetch-site": "same-origin"}) as client:
        assert client.post("/uploads", json={"filename": "a.txt"}).status_code == 201
