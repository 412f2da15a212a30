"""An HTTP server of files that work by link, as an object store's presigned URLs do, which can be told to misbehave."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Links:
    """`objects` by path. `faults` of a path are taken one a request, first to last: a status, a number of bytes after
    which the connection breaks, or bytes that are given in place of the object's."""

    objects: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[int | str | bytes]] = field(default_factory=dict)
    ranges: bool = True
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    """(method, path, Range) of each request."""
    gate: threading.Barrier | None = None
    port: int = 0
    on_request: Callable[[str, str], None] = lambda method, path: None
    """Called with method and path before a request is answered."""

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}?X-Amz-Signature=secret-{hashlib.sha256(path.encode()).hexdigest()}"

    def ranges_of(self, path: str) -> list[str]:
        return [found for method, asked, found in self.asked if (method, asked) == ("GET", path)]

    def start(self) -> Links:
        links = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def _path(self) -> str | None:
                path, _, query = self.path[1:].partition("?")
                links.asked.append((self.command, path, self.headers.get("Range", "")))
                if f"http://127.0.0.1:{links.port}/{path}?{query}" != links.url(path):
                    self._say(403)
                    return None
                return path

            def _say(self, status: int) -> None:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_PUT(self) -> None:
                path = self._path()
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if path is None:
                    return
                links.on_request("PUT", path)
                if links.faults.get(path):
                    self._say(int(links.faults[path].pop(0)))
                    return
                links.objects[path] = body
                self._say(200)

            def do_GET(self) -> None:
                path = self._path()
                if path is None:
                    return
                links.on_request("GET", path)
                if links.gate is not None:
                    links.gate.wait(30)
                fault = links.faults[path].pop(0) if links.faults.get(path) else None
                data = links.objects.get(path)
                if isinstance(fault, int) or data is None:
                    self._say(fault if isinstance(fault, int) else 404)
                    return
                data = fault if isinstance(fault, bytes) else data
                tag = f'"{hashlib.md5(data).hexdigest()}"'
                if self.headers.get("If-Match", tag) != tag:
                    self._say(412)
                    return
                asked = self.headers.get("Range") if links.ranges else None
                start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
                if asked and start >= len(data):
                    self._say(416)
                    return
                self.send_response(206 if asked else 200)
                if asked:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                self.send_header("ETag", tag)
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                if isinstance(fault, str):  # so many bytes and no more
                    self.wfile.write(data[start : start + int(fault)])
                    self.wfile.flush()
                    self.close_connection = True
                    self.connection.shutdown(2)
                    return
                self.wfile.write(data[start:])

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
