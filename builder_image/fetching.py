"""The files of a version and the documents of a build, over links that need no credential (presigned URLs).

Each file is checked while it arrives, and goes on where it was when a connection breaks. Two copies in a row that are
other than the manifest says end the build with `digest_mismatch`: one may be the network's fault, two are damage in the
store. That is no fault of the user's, so it counts as infrastructure, and the build may be tried again.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from urllib.parse import unquote, urljoin, urlsplit

from builder_image.hashing import Sha256
from builder_image.remote import TRANSIENT, backoff, certificates, is_loopback
from builder_image.transport import Client, Request, Response, TransportError, Url
from registry.errors import InfrastructureError

ATTEMPTS = 6
"""Connections in a row that may bring nothing."""
_MOST_CONNECTIONS = 200
_MOST_REDIRECTS = 3
_PIECE = 1 << 20
_RANGE = re.compile(r"bytes (\d+)-\d+/(?:\d+|\*)")


@dataclass(frozen=True)
class Wanted:
    """A file to fetch: its path in the model folder, where it is, and what it must be."""

    path: str
    url: str
    size: int
    sha256: str


class _Stopped(Exception):
    """Another file could not be fetched."""


class Store:
    """Reads and writes by links. Close it, or use it in a `with`. `local` allows links to files of this machine."""

    def __init__(self, *, local: bool = False, pause: Callable[[float], None] = time.sleep) -> None:
        self._client = Client(lambda: certificates(None), direct=is_loopback)
        self._local, self._pause = local, pause
        self._stopped = threading.Event()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def read(self, url: str, limit: int) -> bytes:
        """A document. Raises InfrastructureError."""
        data = b"".join(self._bytes(url, limit))
        if len(data) > limit:
            raise InfrastructureError("bad_document", f"{shown(url)} is larger than {limit} bytes")
        return data

    def download(self, files: Sequence[Wanted], folder: Path, at_once: int) -> None:
        """Fetch files into a folder, `at_once` at the same time; largest first, so that none is left alone at the end.

        Raises InfrastructureError `digest_mismatch`, `model_missing`, `store_unreachable`, `store_refused`.
        """
        for place in {(folder / one.path).parent for one in files}:
            place.mkdir(parents=True, exist_ok=True)
        largest_first = sorted(files, key=lambda one: (-one.size, one.path))
        with ThreadPoolExecutor(max(1, min(at_once, len(files))), "fetch") as pool:
            tasks = [pool.submit(self._unless_stopped, one, folder / one.path) for one in largest_first]
            try:
                for task in as_completed(tasks):
                    task.result()
            except BaseException:
                self._stopped.set()
                raise

    def write(self, url: str, data: bytes) -> None:
        """Put a document where a link says. Raises InfrastructureError."""
        place = Url.parse(url)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), "User-Agent": "ekiben"}
        for attempt in range(ATTEMPTS):
            try:
                response = self._client.send(Request("PUT", place, headers), data)
            except TransportError as error:
                if attempt + 1 == ATTEMPTS:
                    raise _unreachable(url, error) from error
                self._pause(backoff(attempt))
                continue
            if response.status in (200, 201, 204):
                return
            if response.status not in TRANSIENT or attempt + 1 == ATTEMPTS:
                _refused(url, response)
            self._pause(backoff(attempt, response.headers.get("Retry-After")))

    def _unless_stopped(self, one: Wanted, place: Path) -> None:
        """The first failure is the one that is told; the others end without one of their own."""
        try:
            if not self._stopped.is_set():
                self._file(one, place)
        except _Stopped:
            return
        except BaseException:
            self._stopped.set()
            raise

    def _file(self, one: Wanted, place: Path) -> None:
        for _ in range(2):
            found, size = self._copy(one, place)
            if (found, size) == (one.sha256, one.size):
                return
        why = f"has {size} bytes, the manifest says {one.size}" if size != one.size else "has another SHA-256"
        raise InfrastructureError(
            "digest_mismatch",
            f"{one.path} {why}; it was fetched twice",
            hint="the stored copy is damaged: upload the model again as a new version",
        )

    def _copy(self, one: Wanted, place: Path) -> tuple[str, int]:
        """(the SHA-256, the size) of what came; reading ends where it is longer than it should be."""
        total, size = Sha256(one.size), 0
        try:
            with place.open("wb") as out:
                for piece in self._bytes(one.url, one.size):
                    total.update(piece)
                    out.write(piece)
                    size += len(piece)
            return total.hexdigest(), size
        finally:
            total.close()

    def _bytes(self, url: str, most: int) -> Iterator[bytes]:
        """A document's bytes, at most one piece more than `most`, over as many connections as it takes."""
        if (file := local_path(url)) is not None:
            yield from self._of_file(file, url, most)
            return
        place, tag, received, failures, connections = Url.parse(url), "", 0, 0, 0
        while True:
            connections += 1
            before = received
            try:
                response = self._get(place, url, received, tag)
                if response is None:
                    return
                try:
                    tag = response.headers.get("ETag", "")
                    known = received if response.status == 200 else 0  # a server without ranges begins anew
                    for piece in response.pieces():
                        if self._stopped.is_set():
                            raise _Stopped
                        new, known = piece[known:], max(0, known - len(piece))
                        received += len(new)
                        yield new
                        if received > most:
                            return
                finally:
                    response.close()
                return
            except TransportError as error:
                failures = 0 if received > before else failures + 1
                if failures == ATTEMPTS or connections == _MOST_CONNECTIONS:
                    raise _unreachable(url, error) from error
            self._pause(backoff(failures))

    def _get(self, place: Url, url: str, start: int, tag: str) -> Response | None:
        """The answer from byte `start` on, or a whole one; None where what is there is shorter, or another by now.
        Raises TransportError for what may pass: the caller asks again."""
        headers = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "ekiben"}
        if start:
            headers["Range"] = f"bytes={start}-"
            if tag and not tag.startswith("W/"):
                headers["If-Match"] = tag
        for _ in range(_MOST_REDIRECTS + 1):
            response = self._client.send(Request("GET", place, headers), stream=True)
            where = _elsewhere(response, place)
            if where is None:
                break
            response.close()
            place = where
        if response.status == 200 or (response.status == 206 and _begins(response) == start):
            return response
        response.close()
        if start and response.status in (206, 412, 416):
            return None
        if response.status in TRANSIENT:
            raise TransportError(f"the store answered {response.status}")
        _refused(url, response)

    def _of_file(self, file: Path, url: str, most: int) -> Iterator[bytes]:
        if not self._local:
            raise InfrastructureError("bad_spec", f"{shown(url)} is no http link")
        try:
            with file.open("rb") as source:
                received = 0
                while received <= most and (piece := source.read(_PIECE)):
                    received += len(piece)
                    yield piece
        except OSError as error:
            raise InfrastructureError("model_missing", f"{file.name} cannot be read: {error.strerror}") from error


def local_path(url: str) -> Path | None:
    """The file that a `file:` link or a plain path names; None for a link of the network."""
    parts = urlsplit(url)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return Path(url) if not parts.scheme else None


def shown(url: str) -> str:
    """A link for people: without its query, which is as good as a password while it is valid."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}{parts.path}" if parts.scheme else parts.path


def links(value: object) -> Mapping[str, str]:
    """`[{"path", "url"}, …]` of a spec as a mapping. Raises ValueError."""
    if not isinstance(value, list):
        raise ValueError("model.files is no list")
    found = {}
    for each in value:
        if not isinstance(each, dict) or set(each) != {"path", "url"}:
            raise ValueError("model.files must hold objects of path and url")
        if not isinstance(each["path"], str) or not isinstance(each["url"], str):
            raise ValueError("model.files: path and url must be texts")
        found[each["path"]] = each["url"]
    return found


def _elsewhere(response: Response, place: Url) -> Url | None:
    """Where an answer sends to, unless that is nowhere or less safe."""
    said = response.headers.get("Location")
    if response.status not in (301, 302, 303, 307, 308) or not said:
        return None
    try:
        where = Url.parse(urljoin(str(place), said))
    except ValueError:
        return None
    return None if place.scheme == "https" and where.scheme != "https" else where


def _begins(response: Response) -> int | None:
    said = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    return None if said is None else int(said[1])


def _unreachable(url: str, error: TransportError) -> InfrastructureError:
    return InfrastructureError(
        "store_unreachable",
        f"{shown(url)} could not be reached: {error}",
        hint="check the object store, the network, HTTPS_PROXY and SSL_CERT_FILE",
    )


def _refused(url: str, response: Response) -> NoReturn:
    if response.status in (404, 410):
        raise InfrastructureError("model_missing", f"{shown(url)} is not there", hint="upload the model again")
    if response.status in (401, 403):
        raise InfrastructureError(
            "store_refused",
            f"the store refused {shown(url)} ({response.status}): the link is most likely too old",
            hint="build again; if it stays so, compare the clocks of the service and the store",
        )
    raise InfrastructureError("store_failed", f"the store answered {response.status} for {shown(url)}")
