"""HTTP of the registry client against servers that break, refuse and stand between."""

from __future__ import annotations

import base64
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from builder_image.transport import Client, Request, TransportError, Url
from registry.errors import UserError
from tests.builder_image.test_remote import Certificate, certificate

__all__ = ["certificate"]  # a fixture

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody"
Talk = Callable[[socket.socket, bytes], bool | None]


class Server:
    """Hands each request's head to `talk`, which answers on the socket and says whether the connection goes on."""

    def __init__(self, talk: Talk, trust: ssl.SSLContext | None = None) -> None:
        self.heads: list[bytes] = []
        self.connections = 0
        self._talk, self._trust = talk, trust
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._run, daemon=True).start()

    def url(self, target: str = "/", scheme: str = "http") -> Url:
        return Url(scheme, "127.0.0.1", self.port, target)

    def close(self) -> None:
        self._socket.close()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError):
            if self._trust is not None:
                connection = self._trust.wrap_socket(connection, server_side=True)
            with connection:
                going = True
                while going and (head := _head(connection)):
                    self.heads.append(head)
                    going = bool(self._talk(connection, head))


def _head(connection: socket.socket) -> bytes:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = connection.recv(1)
        if not byte:
            return b""
        head += byte
    return head


def answer(data: bytes, *, going: bool = True) -> Talk:
    def talk(connection: socket.socket, _: bytes) -> bool:
        connection.sendall(data)
        return going

    return talk


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def start(*args: Any) -> Server:
        made.append(Server(*args))
        return made[-1]

    yield start
    for server in made:
        server.close()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def client(trust: ssl.SSLContext | None = None, *, direct: bool = True) -> Client:
    return Client(lambda: trust or ssl.create_default_context(), direct=lambda host: direct)


def get(sender: Client, url: Url) -> bytes:
    return sender.send(Request("GET", url, {})).read()


def test_a_connection_is_used_again_and_replaced_when_the_server_ended_it(serve: Callable[..., Server]) -> None:
    ended = threading.Event()

    def talk(connection: socket.socket, head: bytes) -> bool:
        connection.sendall(OK)
        if b"/last" in head:
            connection.shutdown(socket.SHUT_RDWR)
            ended.set()
            return False
        return True

    server, sender = serve(talk), client()
    assert get(sender, server.url("/1")) == get(sender, server.url("/last")) == b"body"
    assert server.connections == 1
    assert ended.wait(10)
    assert get(sender, server.url("/2")) == b"body"
    assert server.connections == 2
    sender.close()


def test_an_answer_that_ends_too_early_is_no_answer(serve: Callable[..., Server]) -> None:
    for broken in (
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nbody",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n",
        b"HTTP/1.1 200 O",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"",
    ):
        server = serve(answer(broken, going=False))
        with pytest.raises(TransportError):
            get(client(), server.url())


def test_a_chunked_answer_and_one_without_a_length_come_whole(serve: Callable[..., Server]) -> None:
    chunked = serve(answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nbo\r\n2\r\ndy\r\n0\r\n\r\n"))
    until_the_end = serve(answer(b"HTTP/1.1 200 OK\r\n\r\nbody", going=False))
    assert get(client(), chunked.url()) == get(client(), until_the_end.url()) == b"body"


def test_a_refusal_before_the_whole_body_was_sent_is_read(serve: Callable[..., Server]) -> None:
    def talk(connection: socket.socket, _: bytes) -> bool:
        connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 16):
            pass
        return False

    server = serve(talk)
    pieces = [b"x" * 100_000] * 20
    response = client().send(Request("PATCH", server.url(), {"Content-Length": "2000000"}), pieces)
    assert (response.status, response.read()) == (413, b"big")


def test_what_reading_the_body_raises_is_told_from_a_broken_connection(serve: Callable[..., Server]) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"x"
        raise OSError(5, "the disk is broken")

    server = serve(answer(OK))
    with pytest.raises(OSError, match="disk"):
        client().send(Request("PATCH", server.url(), {"Content-Length": "2"}), pieces())


def test_a_value_that_no_header_may_hold_is_neither_sent_nor_shown(serve: Callable[..., Server]) -> None:
    server = serve(answer(OK))
    with pytest.raises(TransportError) as refused:
        client().send(Request("GET", server.url(), {"Authorization": "Bearer secret\r\nX: y"}))
    assert "secret" not in str(refused.value)
    assert server.heads == []


def test_plain_http_goes_through_the_proxy_of_the_environment(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = serve(answer(OK))
    monkeypatch.setenv("http_proxy", f"http://me:p%40ss@127.0.0.1:{proxy.port}")
    assert get(client(direct=False), Url.parse("http://registry.invalid:5000/v2/?a=b")) == b"body"
    lines = proxy.heads[0].decode().split("\r\n")
    assert lines[0] == "GET http://registry.invalid:5000/v2/?a=b HTTP/1.1"
    assert "Host: registry.invalid:5000" in lines
    assert f"Proxy-Authorization: Basic {base64.b64encode(b'me:p@ss').decode()}" in lines
    monkeypatch.setenv("no_proxy", "elsewhere.invalid, .invalid")
    with pytest.raises(TransportError):
        get(client(direct=False), Url.parse("http://registry.invalid:5000/v2/"))
    assert len(proxy.heads) == 1


def test_https_goes_through_a_tunnel_that_the_proxy_cannot_read(
    serve: Callable[..., Server], certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own.load_cert_chain(certificate.pem, certificate.key_pem)
    server = serve(answer(OK), own)

    def tunnel(connection: socket.socket, _: bytes) -> bool:
        connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with socket.create_connection(("127.0.0.1", server.port)) as upstream:
            back = threading.Thread(target=_copy, args=(upstream, connection), daemon=True)
            back.start()
            _copy(connection, upstream)
            back.join()
        return False

    proxy = serve(tunnel)
    monkeypatch.setenv("https_proxy", f"http://me:secret@127.0.0.1:{proxy.port}")
    sender = client(ssl.create_default_context(cafile=certificate.pem), direct=False)
    assert get(sender, server.url("/v2/", "https")) == b"body"
    sender.close()
    assert proxy.heads[0].startswith(f"CONNECT 127.0.0.1:{server.port} HTTP/1.".encode())
    assert b"Proxy-Authorization" in proxy.heads[0]
    assert b"Proxy-Authorization" not in server.heads[0], "the password is the proxy's alone"
    with pytest.raises(TransportError, match="CERTIFICATE_VERIFY_FAILED"):
        get(client(direct=False), server.url("/v2/", "https"))


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("place", ["socks5://127.0.0.1:9", "https://proxy.invalid", "http://:1"])
def test_a_proxy_that_cannot_be_used_is_named(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", place)
    with pytest.raises(UserError) as refused:
        get(client(direct=False), Url.parse("https://registry.invalid/v2/"))
    assert refused.value.code == "bad_proxy"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("http://h/a?b=c#d", "http://h/a?b=c"),
        ("https://user:password@h:443/a b", "https://h/a%20b"),
        ("http://[::1]:5000/v2/x%2Fy?_state=a%3D%3D", "http://[::1]:5000/v2/x%2Fy?_state=a%3D%3D"),
        ("http://h", "http://h/"),
    ],
)
def test_urls_keep_what_is_sent_and_drop_the_rest(text: str, found: str) -> None:
    assert str(Url.parse(text)) == found


@pytest.mark.parametrize("text", ["", "ftp://h/", "//h/", "http:///x", "http://h:99999/", "http://h:x/"])
def test_what_is_no_url_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Url.parse(text)


def test_parameters_are_added_and_take_the_place_of_their_like() -> None:
    url = Url.parse("http://h/a?_state=x%3D&digest=old").with_query({"digest": "sha256:1"})
    assert str(url) == "http://h/a?_state=x%3D&digest=sha256%3A1"
