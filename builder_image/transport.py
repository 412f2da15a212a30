"""HTTP/1.1 for the registry client: requests over connections that are kept, streamed both ways.

Over the standard library's `http.client`, because a weights-only build takes a fifth of a second and the import of an
HTTP library would be a good part of it (docs/decisions/0104-little-to-import.md). What a request means, and
whether it is repeated, is decided in `remote`.
"""

from __future__ import annotations

import http.client
import json
import os
import select
import ssl
import threading
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import quote, unquote, urlencode, urlsplit

from registry.errors import UserError

CONNECT_SECONDS = 10.0
SECONDS = 60.0
_PIECE = 1 << 20
_ASCII = "".join(map(chr, range(33, 127)))


class TransportError(Exception):
    """No whole answer came: the server is away, the connection broke, or TLS failed. Says what the system said."""


class ConnectTimeout(TransportError):
    """Nobody answered at the address."""


@dataclass(frozen=True)
class Url:
    """An absolute http or https URL; `target` is its path and query."""

    scheme: str
    host: str
    port: int
    target: str

    @classmethod
    def parse(cls, text: str) -> Url:
        """User information and fragment are dropped. Raises ValueError for anything but http and https."""
        parts = urlsplit(text)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"no http URL: {text[:200]!r}")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        port = parts.port or _PORTS[parts.scheme]
        return cls(parts.scheme, parts.hostname, port, quote(target, safe=_ASCII))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}{'' if self.port == _PORTS[self.scheme] else f':{self.port}'}{self.target}"

    @property
    def origin(self) -> tuple[str, str, int]:
        return self.scheme, self.host, self.port

    def with_query(self, more: Mapping[str, str]) -> Url:
        """The same with these parameters in its query, whatever it said of them."""
        path, _, query = self.target.partition("?")
        kept = [pair for pair in query.split("&") if pair and pair.partition("=")[0] not in more]
        return Url(*self.origin, f"{path}?{'&'.join([*kept, urlencode(more)])}")


@dataclass(frozen=True)
class Request:
    method: str
    url: Url
    headers: Mapping[str, str]


class Response:
    """An answer. Its body comes whole from `read`, or from `pieces`; a streamed one must be closed."""

    def __init__(self, request: Request, raw: http.client.HTTPResponse, done: Callable[[bool], None]) -> None:
        self.request = request
        self.status = raw.status
        self.headers = raw.headers
        self._raw, self._done = raw, done
        self._content: bytes | None = None
        self._broken = self._ended = False

    def read(self) -> bytes:
        """The whole body; may be asked again."""
        if self._content is None:
            try:
                self._content = b"".join(self.pieces())
            finally:
                self.close()
        return self._content

    def pieces(self) -> Iterator[bytes]:
        """The body as it comes. Raises TransportError where it ends too early."""
        if self._content is not None:
            yield self._content
            return
        left = self._raw.length  # None: chunked, which knows its end, or everything until the connection closes
        while True:
            try:
                piece = self._raw.read(_PIECE)
            except (OSError, http.client.HTTPException) as error:
                self._broken = True
                raise TransportError(_words(error)) from error
            if not piece:
                break
            left = None if left is None else left - len(piece)
            yield piece
        if left:
            self._broken = True
            raise TransportError(f"the answer ended {left} bytes too early")

    def at_most(self, limit: int) -> bytes | None:
        """The body, or None when it is longer."""
        data = bytearray()
        for piece in self.pieces():
            data += piece
            if len(data) > limit:
                return None
        return bytes(data)

    def json(self) -> Any:
        return json.loads(self.read())

    def close(self) -> None:
        """Keep the connection where the whole body was read, else end it."""
        if not self._ended:
            self._ended = True
            whole = self._raw.isclosed() and not self._broken
            self._raw.close()
            self._done(whole)


class _Head:
    """What http.client reads an answer's head from; knows its last line."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.last = file, b""

    def readline(self, limit: int) -> bytes:
        self.last = self.file.readline(limit)
        return self.last

    def close(self) -> None:
        self.file.close()


class _WholeHead(http.client.HTTPResponse):
    """http.client takes a connection's end for the end of the head: a broken answer would pass as one without headers,
    and a broken `200 OK` to HEAD for a blob that is there."""

    fp: Any

    def begin(self) -> None:
        head = _Head(self.fp)
        self.fp = head
        try:
            super().begin()
        finally:
            if self.fp is head:
                self.fp = head.file
        if head.last not in (b"\r\n", b"\n"):
            self.close()
            raise http.client.RemoteDisconnected("the connection ended within the head of the answer")


class Client:
    """Sends requests; safe to use from several threads, each of which has a connection of its own meanwhile.

    `trust` gives what https trusts, and is asked when https is first spoken. Proxies of the environment are honoured;
    `direct` says which hosts are reached without one.
    """

    def __init__(self, trust: Callable[[], ssl.SSLContext], direct: Callable[[str], bool]) -> None:
        self._trust, self._direct = trust, direct
        self._context: ssl.SSLContext | None = None
        self._idle: dict[tuple[str, str, int], list[http.client.HTTPConnection]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for connection in [each for idle in self._idle.values() for each in idle]:
                connection.close()
            self._idle.clear()

    def send(
        self,
        request: Request,
        content: bytes | Iterable[bytes] | None = None,
        *,
        seconds: float = SECONDS,
        stream: bool = False,
    ) -> Response:
        """Send a request and read its answer, or with `stream` the head of it. `seconds` is how long the server may be
        silent. An iterable's bytes must be as many as the header Content-Length says.

        Raises TransportError, and what the iterable raises; UserError `bad_proxy`.
        """
        url = request.url
        proxy = self._proxy(url)
        connection = self._connection(url, proxy)
        try:
            sent = _send(connection, request, content, proxy if url.scheme == "http" else None)
            raw = _answer(connection, seconds)
        except BaseException:
            connection.close()
            raise
        response = Response(request, raw, lambda whole: self._end(connection, url.origin, whole and sent))
        if not stream:
            response.read()
        return response

    def _connection(self, url: Url, proxy: _Proxy | None) -> http.client.HTTPConnection:
        while True:
            with self._lock:
                idle = self._idle.get(url.origin)
                connection = idle.pop() if idle else None
            if connection is None:
                return self._connected(url, proxy)
            if _is_silent(connection):
                return connection
            connection.close()  # the server ended it, as servers do with those that are idle

    def _connected(self, url: Url, proxy: _Proxy | None) -> http.client.HTTPConnection:
        connection: http.client.HTTPConnection
        host, port = (url.host, url.port) if proxy is None else (proxy.host, proxy.port)
        if url.scheme == "https":
            connection = http.client.HTTPSConnection(host, port, timeout=CONNECT_SECONDS, context=self._trusted())
            if proxy is not None:
                connection.set_tunnel(url.host, url.port, dict(proxy.headers))
        else:
            connection = http.client.HTTPConnection(host, port, timeout=CONNECT_SECONDS)
        connection.response_class = _WholeHead
        try:
            connection.connect()
        except TimeoutError as error:
            connection.close()
            raise ConnectTimeout(_words(error)) from error
        except (OSError, UnicodeError, http.client.HTTPException) as error:
            connection.close()
            raise TransportError(_words(error)) from error
        return connection

    def _trusted(self) -> ssl.SSLContext:
        with self._lock:
            if self._context is None:
                self._context = self._trust()
                self._context.set_alpn_protocols(["http/1.1"])
            return self._context

    def _end(self, connection: http.client.HTTPConnection, origin: tuple[str, str, int], whole: bool) -> None:
        with self._lock:
            if whole and connection.sock is not None and not self._closed:
                self._idle.setdefault(origin, []).append(connection)
                return
        connection.close()

    def _proxy(self, url: Url) -> _Proxy | None:
        if not any(name[-6:].lower() == "_proxy" for name in os.environ) or self._direct(url.host):
            return None
        from urllib.request import getproxies, proxy_bypass  # for the few that have a proxy

        address = getproxies()
        place = address.get(url.scheme) or address.get("all")
        if not place or proxy_bypass(url.host):
            return None
        return _Proxy.parse(place)


@dataclass(frozen=True)
class _Proxy:
    host: str
    port: int
    headers: Mapping[str, str]

    @classmethod
    def parse(cls, place: str) -> _Proxy:
        parts = urlsplit(place if "://" in place else f"http://{place}")
        try:
            host, port = parts.hostname, parts.port or 80
        except ValueError:
            host = None
        if parts.scheme != "http" or not host:
            raise UserError(
                "bad_proxy",
                f"the proxy {parts.scheme}://{host or ''} cannot be used: it must be http://HOST:PORT",
                hint="give the proxy's http:// address in HTTPS_PROXY; what passes through it to https stays encrypted",
            )
        headers = {}
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            headers["Proxy-Authorization"] = "Basic " + b64encode(pair.encode()).decode()
        return cls(host, port, headers)


_PORTS = {"http": 80, "https": 443}


def _send(
    connection: http.client.HTTPConnection,
    request: Request,
    content: bytes | Iterable[bytes] | None,
    via: _Proxy | None,
) -> bool:
    """Send a request; False where the server ended the connection before it had the whole. It may have refused the body
    before, so its answer is read all the same. What an iterable raises goes through as it is."""
    headers = {**request.headers, **(via.headers if via is not None else {})}
    if isinstance(content, bytes):
        headers.setdefault("Content-Length", str(len(content)))
    _wait(connection, SECONDS)
    try:
        connection.putrequest(request.method, request.url.target if via is None else str(request.url), False, True)
        for name, value in headers.items():
            _header(connection, name, value)
        connection.endheaders()
        for piece in [content] if isinstance(content, bytes) else ():
            connection.send(piece)
    except http.client.HTTPException as error:
        raise TransportError(_words(error)) from error
    except OSError as error:
        return _refused(error)
    for piece in () if content is None or isinstance(content, bytes) else content:
        try:
            connection.send(piece)
        except OSError as error:
            return _refused(error)
    return True


def _header(connection: http.client.HTTPConnection, name: str, value: str) -> None:
    try:
        connection.putheader(name, value)
    except ValueError:  # its message would show the value
        raise TransportError(f"the header {name} holds what no header may") from None


def _refused(error: OSError) -> bool:
    if isinstance(error, TimeoutError):
        raise TransportError(_words(error)) from error
    return False


def _answer(connection: http.client.HTTPConnection, seconds: float) -> http.client.HTTPResponse:
    _wait(connection, seconds)
    try:
        return connection.getresponse()
    except (OSError, http.client.HTTPException) as error:
        raise TransportError(_words(error)) from error


def _wait(connection: http.client.HTTPConnection, seconds: float) -> None:
    if connection.sock is not None:
        connection.sock.settimeout(seconds)


def _is_silent(connection: http.client.HTTPConnection) -> bool:
    """Whether an idle connection is as it was left: bytes that nobody asked for are its end."""
    if connection.sock is None:
        return False
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return not poll.poll(0)


def _words(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "nothing came for too long"
    return str(error) or type(error).__name__
