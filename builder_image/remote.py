"""A client of the OCI distribution specification 1.1, made for one job: blobs that are made while they are sent.

A blob goes up in one streamed PATCH, hashed on the way, in constant memory; where a registry or a proxy before it wants
smaller requests, in chunks. A broken upload goes on where the registry says it stopped, or starts anew where the
registry has forgotten it (docs/decisions/0101-own-registry-client.md). Errors carry the specification's codes; no
message holds a credential or an upload's URL.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import ipaddress
import json
import os
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeGuard
from urllib.parse import urlencode, urljoin, urlsplit

from builder_image import image as _image
from builder_image import layers as _layers
from builder_image.hashing import Sha256
from builder_image.image import Image, Platform
from builder_image.layers import AnyLayer, Layer, StreamedLayer
from builder_image.transport import SECONDS, Client, ConnectTimeout, Request, Response, TransportError, Url
from registry import digest as _digest
from registry.digest import canonical_json
from registry.errors import EkibenError, InfrastructureError, UserError

_MANIFEST_TYPES = (_image.MANIFEST, _image.INDEX, _image.DOCKER_MANIFEST, _image.DOCKER_INDEX)
_OCTETS = "application/octet-stream"
_ATTEMPTS = 5
_SMALL = 1 << 20  # such a blob is read whole, and goes up in one PUT
# identity: digests are about the bytes as stored, so nothing on the way may compress them
_HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "ekiben"}
_PART = 8 << 20  # a chunk, where one streamed request is refused
_LONGEST_MANIFEST = 4 << 20
_LONGEST_ERROR = 64 << 10
_AT_ONCE = 2
_SLOW = 900.0  # seconds: a registry may hash the whole blob again before it answers the last PUT
_TOO_LARGE_OR_NOT_SUPPORTED = (400, 404, 405, 411, 413, 416, 501)
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)

_HOST = re.compile(r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?")
_PATH = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_NEXT = re.compile(r'<([^>]*)>[^,<]*;\s*rel="?next"?', re.IGNORECASE)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


class RegistryRefused(UserError):
    """The registry says no (4xx). `spec_codes` are the codes of the distribution specification, e.g. `DENIED`."""

    spec_codes: tuple[str, ...] = ()


class RegistryFailed(InfrastructureError):
    """The registry cannot be reached, failed, or gave something else than it should; worth trying again."""

    spec_codes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reference:
    """`host[:port]/repository[:tag][@digest]`; Docker's short names mean docker.io."""

    host: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Raises UserError `bad_reference`."""
        rest, at, digest = text.partition("@")
        host, slash, path = rest.partition("/")
        if not slash or not ("." in host or ":" in host or host == "localhost"):
            host, path = "docker.io", rest
        path, colon, tag = path.partition(":")
        if host in ("docker.io", "index.docker.io"):
            host, path = "registry-1.docker.io", path if "/" in path else f"library/{path}"
        good = _HOST.fullmatch(host) and _PATH.fullmatch(path) and len(path) <= 255
        if not good or (colon and not _TAG.fullmatch(tag)) or (at and not re.fullmatch("sha256:[0-9a-f]{64}", digest)):
            raise UserError(
                "bad_reference",
                f"{text[:200]!r} is not an image reference",
                field="ref",
                hint="write HOST:PORT/REPOSITORY:TAG in lower case, e.g. localhost:5000/ekiben:churn-3",
            )
        return cls(host, path, tag or None, digest or None)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.host}/{self.repository}{tag}" + (f"@{self.digest}" if self.digest else "")

    @property
    def name(self) -> str:
        """What the manifest is asked for by: the digest, or the tag."""
        return self.digest or self.tag or "latest"


@dataclass(frozen=True)
class Credentials:
    """A user name and password, or an identity token as `docker login` keeps it."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)

    @classmethod
    def of_docker_config(cls, config: Mapping[str, Any], host: str) -> Credentials | None:
        """The entry for a host in a parsed `~/.docker/config.json`; None where it has none, or keeps it in a helper."""
        names = [host, f"https://{host}", f"https://{host}/v2/", f"https://{host}/v1/"]
        if host == "registry-1.docker.io":
            names += ["docker.io", "index.docker.io", "https://index.docker.io/v1/"]
        for name in names:
            entry = (config.get("auths") or {}).get(name)
            if not entry:
                continue
            if entry.get("identitytoken"):
                return cls(identity_token=str(entry["identitytoken"]))
            with suppress(binascii.Error, UnicodeDecodeError):
                user, _, password = base64.b64decode(entry.get("auth", "")).decode().partition(":")
                if user:
                    return cls(user, password.rstrip("\0"))
            if entry.get("username"):
                return cls(str(entry["username"]), str(entry.get("password", "")))
        return None


@dataclass(frozen=True)
class LayerReport:
    """One layer of a pushed image; `sent` is how many of its bytes went over the wire, 0 when it was there already."""

    name: str
    digest: str
    size: int
    reused: bool
    sent: int


@dataclass(frozen=True)
class PushReport:
    """What `push_image` did, after the registry confirmed the manifest by its digest."""

    ref: str
    digest: str
    size: int
    layers: tuple[LayerReport, ...]
    image: Image


Progress = Callable[[AnyLayer, int], None]
"""Told (layer, bytes sent since the last call); called from several threads."""


class Registry:
    """One registry. Safe to use from several threads; close it, or use it in a `with`.

    Plain HTTP is spoken only to a loopback address without `ca`, or where `insecure` asks for it. `ca` is a PEM file
    that is trusted beside the system's. Proxies of the environment are honoured, except towards loopback.
    """

    def __init__(
        self,
        host: str,
        credentials: Credentials | None = None,
        ca: Path | None = None,
        insecure: bool = False,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        try:
            name = Url.parse(f"https://{host}").host if _HOST.fullmatch(host) else ""
        except ValueError:
            name = ""
        if not name:
            raise UserError("bad_reference", f"{host[:200]!r} is not a registry's host", field="ref", hint="HOST:PORT")
        self.host = host
        self._plain = insecure or (is_loopback(name) and ca is None)
        self._root = Url.parse(f"{'http' if self._plain else 'https'}://{host}/v2/")
        self._credentials = credentials
        self._pause = pause
        self._tokens: dict[str, tuple[str, float]] = {}
        self._challenge: tuple[str, dict[str, str]] | None = None
        self._lock = threading.Lock()
        # reading the system's certificates takes longer than a push to a registry that speaks plain http
        trusted = None if self._plain and ca is None else certificates(ca)
        self._client = Client(lambda: certificates(None) if trusted is None else trusted, direct=is_loopback)

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    # blobs

    def has_blob(self, repo: str, digest: str) -> bool:
        response = self._ask("HEAD", self._url(repo, "blobs", _image.checked_digest(digest)), _pull(repo))
        if response.status == 404:
            return False
        self._expect(response, (200,), f"asking for the blob {digest} in {repo}")
        return True

    def push_blob(self, repo: str, data: bytes) -> str:
        """Upload a blob that is in memory, unless it is there; gives its digest."""
        digest = _digest.of_bytes(data)
        if not self.has_blob(repo, digest):
            self.push_blob_stream(repo, lambda: iter([data]), len(data), digest=digest)
        return digest

    def push_blob_stream(
        self,
        repo: str,
        chunks: _layers.Opener,
        size: int,
        *,
        digest: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> str:
        """Upload a blob of exactly `size` bytes in one pass, and give its digest, which the registry has checked.

        `chunks` opens the bytes from the start; it is called again only when an upload broke. Without `digest` it is
        computed on the way. Raises InfrastructureError `digest_mismatch` when the bytes are not what `digest` or `size`
        says, RegistryRefused, RegistryFailed, and what reading the bytes raises; then nothing is left in the registry.
        """
        feed = _Feed(chunks, size, digest, progress)
        try:
            return self._push_feed(repo, feed)
        finally:
            feed.end()

    def _push_feed(self, repo: str, feed: _Feed) -> str:
        part: int | None = None
        for attempt in range(_ATTEMPTS):
            location, least = self._start_upload(repo)
            try:
                if part is not None:
                    part = max(part, least)
                return self._upload(repo, location, feed, part)
            except _InParts:
                part = _PART
            except _Lost as lost:
                if attempt == _ATTEMPTS - 1:
                    raise lost.reason from lost
                self._pause(backoff(attempt))
            except EkibenError:
                self._cancel(repo, location)
                raise
            finally:
                feed.close()
        raise RegistryFailed(
            "registry_upload_failed",
            f"{self.host} did not take a blob of {feed.size} bytes in {_ATTEMPTS} attempts",
            hint="look at the registry's log, and at limits of a proxy before it",
        )

    def pull_blob(self, repo: str, digest: str, size: int | None = None) -> Iterator[bytes]:
        """A blob's bytes; the digest is checked before the iterator ends, so take nothing for good until then.

        Raises InfrastructureError `digest_mismatch`.
        """
        url = self._url(repo, "blobs", _image.checked_digest(digest))
        response = self._ask("GET", url, _pull(repo), stream=True)
        try:
            self._expect(response, (200,), f"pulling the blob {digest} from {repo}")
            total, received = hashlib.sha256(), 0
            for piece in response.pieces():
                received += len(piece)
                if size is not None and received > size:
                    break
                total.update(piece)
                yield piece
        except TransportError as error:
            raise self._unreachable(error) from error
        finally:
            response.close()
        if f"sha256:{total.hexdigest()}" != digest or (size is not None and received != size):
            raise InfrastructureError(
                "digest_mismatch",
                f"{self.host} gave other bytes than {digest} for that blob of {repo}",
                hint="the registry's storage is damaged, or something between changes the bytes; nothing was kept",
            )

    # manifests

    def head_manifest(self, repo: str, name: str) -> str | None:
        """The digest of a manifest by tag or digest, as the registry says, or None when there is no such manifest."""
        response = self._ask(
            "HEAD", self._url(repo, "manifests", name), _pull(repo), {"Accept": ", ".join(_MANIFEST_TYPES)}
        )
        if response.status == 404:
            return None
        self._expect(response, (200,), f"asking for the manifest {name} in {repo}")
        return response.headers.get("Docker-Content-Digest") or _digest.of_bytes(self.get_manifest(repo, name)[0])

    def get_manifest(self, repo: str, name: str) -> tuple[bytes, str]:
        """(bytes, media type) of a manifest by tag or digest; asked for by digest, the bytes are checked against it."""
        response = self._ask(
            "GET",
            self._url(repo, "manifests", name),
            _pull(repo),
            {"Accept": ", ".join(_MANIFEST_TYPES)},
            stream=True,
        )
        try:
            self._expect(response, (200,), f"reading the manifest {name} of {repo}")
            data = response.at_most(_LONGEST_MANIFEST)
        except TransportError as error:
            raise self._unreachable(error) from error
        finally:
            response.close()
        if data is None:
            raise RegistryFailed(
                "registry_manifest_too_large", f"the manifest {name} of {repo} is longer than {_LONGEST_MANIFEST} bytes"
            )
        if name.startswith("sha256:") and _digest.of_bytes(data) != name:
            raise InfrastructureError(
                "digest_mismatch", f"{self.host} gave other bytes than {name} for that manifest of {repo}"
            )
        return data, response.headers.get("Content-Type", "").split(";")[0].strip()

    def push_manifest(self, repo: str, name: str, manifest: bytes, media_type: str) -> str:
        """Store a manifest under a tag or its digest; gives the digest."""
        url = self._url(repo, "manifests", name)
        response = self._ask("PUT", url, _push(repo), {"Content-Type": media_type}, content=manifest)
        self._expect(response, (200, 201), f"storing the manifest {name} in {repo}")
        digest = _digest.of_bytes(manifest)
        if response.headers.get("Docker-Content-Digest", digest) != digest:
            raise InfrastructureError(
                "digest_mismatch", f"{self.host} stored the manifest {name} of {repo} as something else than {digest}"
            )
        return digest

    def tags(self, repo: str) -> list[str]:
        """All tags of a repository, page by page; none where there is no such repository yet."""
        found: list[str] = []
        url: Url | None = self._url(repo, "tags", "list")
        while url is not None:
            response = self._ask("GET", url, _pull(repo))
            if response.status == 404:
                return []
            self._expect(response, (200,), f"listing the tags of {repo}")
            found += response.json().get("tags") or []
            following = _NEXT.search(response.headers.get("Link", ""))
            url = self._beside(url, following[1]) if following else None
        return found

    def delete_manifest(self, repo: str, digest: str) -> bool:
        """Remove a manifest by its digest; False where there was none."""
        response = self._ask(
            "DELETE", self._url(repo, "manifests", _image.checked_digest(digest)), _push(repo, "delete")
        )
        if response.status == 404:
            return False
        self._expect(response, (200, 202), f"deleting the manifest {digest} of {repo}")
        return True

    # uploads

    def _start_upload(self, repo: str) -> tuple[Url, int]:
        start = self._url(repo, "blobs", "uploads/")
        response = self._ask("POST", start, _push(repo), {"Content-Length": "0"})
        self._expect(response, (202,), f"starting an upload to {repo}")
        least = response.headers.get("OCI-Chunk-Min-Length", "0")
        return self._location(response, start), int(least) if least.isdecimal() else 0

    def _upload(self, repo: str, location: Url, feed: _Feed, part: int | None) -> str:
        scope = _push(repo)
        if feed.size <= _SMALL:
            data = b"".join(feed.take(0, feed.size))
            return self._finish(repo, location, feed, content=data)
        at, best, stalls = 0, 0, 0
        while at < feed.size:
            stalls = 0 if at > best else stalls + 1
            best = max(at, best)
            if stalls > _ATTEMPTS:
                raise self._stalled(repo, at)
            length = feed.size - at if part is None else min(part, feed.size - at)
            headers = {"Content-Type": _OCTETS, "Content-Length": str(length)}
            if part is not None or at:
                headers["Content-Range"] = f"{at}-{at + length - 1}"
            try:
                response = self._once("PATCH", location, scope, headers, content=feed.take(at, length), seconds=_SLOW)
            except TransportError as error:
                at, location = self._resume(repo, location, self._unreachable(error))
                continue
            if response.status in (201, 202, 204):
                location = self._location(response, location)
                at = _stored(response, at + length)
            elif response.status in (401, *TRANSIENT):
                reason = self._error(response, f"uploading a blob to {repo}")
                if response.status == 401 and not self._answer(response, scope):
                    raise reason
                at, location = self._resume(repo, location, reason)
            elif part is None and response.status in _TOO_LARGE_OR_NOT_SUPPORTED:
                self._cancel(repo, location)
                raise _InParts
            else:
                raise self._error(response, f"uploading a blob to {repo}")
        return self._finish(repo, location, feed)

    def _finish(self, repo: str, location: Url, feed: _Feed, content: bytes = b"") -> str:
        digest = feed.finished()
        headers = {"Content-Type": _OCTETS, "Content-Length": str(len(content))}
        url = location.with_query({"digest": digest})
        try:
            response = self._ask("PUT", url, _push(repo), headers, content=content, seconds=_SLOW, attempts=1)
        except RegistryFailed as failed:
            if self.has_blob(repo, digest):  # it had done it, and only its answer was lost
                return digest
            raise _Lost(failed) from failed
        if response.status in (404, 416, *TRANSIENT):
            if self.has_blob(repo, digest):
                return digest
            raise _Lost(self._error(response, f"finishing the upload of {digest} to {repo}"))
        self._expect(response, (201, 204), f"finishing the upload of {digest} to {repo}")
        return digest

    def _resume(self, repo: str, location: Url, reason: EkibenError) -> tuple[int, Url]:
        """Where to go on after a request broke; raises _Lost where the registry no longer knows the upload."""
        self._pause(backoff(0))
        try:
            response = self._ask("GET", location, _push(repo), attempts=3)
        except RegistryFailed as failed:
            raise _Lost(failed) from failed
        at = _stored(response, 0)
        if response.status != 204 or at == 0:
            raise _Lost(reason)
        return at, self._location(response, location)

    def _stalled(self, repo: str, at: int) -> RegistryFailed:
        return RegistryFailed(
            "registry_upload_failed",
            f"an upload to {repo} on {self.host} breaks again and again after {at} bytes",
            hint="look at the registry's log, its disk, and at limits of a proxy before it",
        )

    def _cancel(self, repo: str, location: Url) -> None:
        with suppress(EkibenError, TransportError):  # registries drop forgotten uploads by themselves
            self._ask("DELETE", location, _push(repo), attempts=1)

    # requests

    def _url(self, repo: str, *path: str) -> Url:
        if not _PATH.fullmatch(repo):
            raise UserError("bad_reference", f"{repo[:200]!r} is not a repository", field="ref", hint="use lower case")
        if not all(re.fullmatch(r"[A-Za-z0-9._:/-]+", part) for part in path):
            raise UserError("bad_reference", f"{path[-1][:200]!r} is not a tag or digest", field="ref")
        return Url(*self._root.origin, self._root.target + "/".join([repo, *path]))

    def _ask(
        self,
        method: str,
        url: Url,
        scope: str,
        headers: Mapping[str, str] | None = None,
        *,
        content: bytes | None = None,
        stream: bool = False,
        seconds: float = SECONDS,
        attempts: int = _ATTEMPTS,
    ) -> Response:
        """A request that may be repeated: with backoff while the registry is away, once after a challenge."""
        answered = False
        attempt = 0
        while True:
            try:
                response = self._follow(method, url, scope, headers or {}, content, stream, seconds)
            except TransportError as error:
                attempt += 1
                # an address where nobody answers is tried twice: each try takes the whole time limit
                most = min(attempts, 2) if isinstance(error, ConnectTimeout) else attempts
                if attempt >= most or _is_certificate(error) or _speaks_http(error):
                    raise self._unreachable(error) from error
                self._pause(backoff(attempt))
                continue
            if response.status == 401 and not answered:
                answered = True
                response.close()
                if self._answer(response, scope):
                    continue
                return response
            if response.status in TRANSIENT:
                attempt += 1
                if attempt < attempts:
                    response.close()
                    self._pause(backoff(attempt, response.headers.get("Retry-After")))
                    continue
            return response

    def _follow(
        self,
        method: str,
        url: Url,
        scope: str,
        headers: Mapping[str, str],
        content: bytes | None,
        stream: bool,
        seconds: float,
    ) -> Response:
        for _ in range(5):
            response = self._once(method, url, scope, headers, content=content, stream=stream, seconds=seconds)
            if method not in ("GET", "HEAD") or response.status not in (301, 302, 303, 307, 308):
                return response
            response.close()
            url = self._location(response, url)
        raise RegistryFailed("registry_redirects", f"{self.host} redirects in circles")

    def _once(
        self,
        method: str,
        url: Url,
        scope: str,
        headers: Mapping[str, str],
        *,
        content: bytes | Iterable[bytes] | None = None,
        stream: bool = False,
        seconds: float = SECONDS,
    ) -> Response:
        headers = {**_HEADERS, **headers}
        if url.origin == self._root.origin and (credential := self._authorization(scope)):
            headers["Authorization"] = credential
        return self._client.send(Request(method, url, headers), content, seconds=seconds, stream=stream)

    def _location(self, response: Response, url: Url) -> Url:
        where = response.headers.get("Location")
        if not where:
            if response.status in (201, 202, 204):
                return url
            raise RegistryFailed("registry_protocol", f"{self.host} gave no Location where the specification wants one")
        return self._beside(url, where)

    def _beside(self, url: Url, where: str) -> Url:
        there = urljoin(str(url), where)
        scheme = urlsplit(there).scheme
        if scheme not in ("http", "https") or (url.scheme == "https" and scheme != "https"):
            raise RegistryFailed(
                "registry_insecure_redirect",
                f"{self.host} sends us from {url.scheme} to {scheme}, which would not be encrypted",
                hint="behind a proxy, tell the registry its public https address",
            )
        try:
            return Url.parse(there)
        except ValueError as error:
            raise RegistryFailed("registry_protocol", f"{self.host} sends us to something that is no URL") from error

    # authentication

    def _authorization(self, scope: str) -> str | None:
        with self._lock:
            if self._challenge is None:
                return None
            kind = self._challenge[0]
            token, until = self._tokens.get(scope, ("", 0.0))
        if kind == "basic":
            return self._basic()
        if token and time.monotonic() < until:
            return f"Bearer {token}"
        return None

    def _basic(self) -> str | None:
        if self._credentials is None or not self._credentials.username:
            return None
        pair = f"{self._credentials.username}:{self._credentials.password}"
        return "Basic " + base64.b64encode(pair.encode()).decode()

    def _answer(self, response: Response, scope: str) -> bool:
        """Get what a 401 asks for; whether it is worth asking again."""
        if response.request.url.origin != self._root.origin:
            return False
        challenges = _challenges(response.headers.get_all("WWW-Authenticate", []))
        if "bearer" in challenges:
            asked = challenges["bearer"]
            token, seconds = self._fetch_token(asked, scope)
            with self._lock:
                self._challenge = ("bearer", asked)
                self._tokens[scope] = (token, time.monotonic() + max(seconds - 10, seconds / 2))
            return True
        if "basic" in challenges and self._basic() is not None:
            with self._lock:
                first = self._challenge is None
                self._challenge = ("basic", {})
            return first or "Authorization" not in response.request.headers
        return False

    def _fetch_token(self, asked: Mapping[str, str], scope: str) -> tuple[str, float]:
        try:
            realm = Url.parse(asked.get("realm", ""))
        except ValueError as error:
            raise RegistryFailed("registry_token_realm", f"{self.host} names no token service to ask") from error
        if realm.scheme != "https" and not (self._plain or is_loopback(realm.host)):
            raise RegistryFailed(
                "registry_token_realm",
                f"{self.host} wants credentials sent to {realm.scheme}://{realm.host}, which is not encrypted",
                hint="give the registry's token service an https address",
            )
        form = {"scope": asked.get("scope") or scope}
        if asked.get("service"):
            form["service"] = asked["service"]
        try:
            if self._credentials is not None and self._credentials.identity_token:
                form |= {
                    "grant_type": "refresh_token",
                    "client_id": "ekiben",
                    "refresh_token": self._credentials.identity_token,
                }
                headers = {**_HEADERS, "Content-Type": "application/x-www-form-urlencoded"}
                response = self._client.send(Request("POST", realm, headers), urlencode(form).encode())
            else:
                basic = self._basic()
                headers = {**_HEADERS, "Authorization": basic} if basic else _HEADERS
                response = self._client.send(Request("GET", realm.with_query(form), headers))
        except TransportError as error:
            raise self._unreachable(error) from error
        self._expect(response, (200,), f"asking {realm.host} for a token")
        try:
            body = response.json()
            token = body.get("token") or body["access_token"]
            return str(token), float(body.get("expires_in") or 60)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RegistryFailed("registry_protocol", f"{realm.host} answered without a token") from error

    # errors

    def _expect(self, response: Response, codes: tuple[int, ...], doing: str) -> None:
        if response.status not in codes:
            raise self._error(response, doing)

    def _error(self, response: Response, doing: str) -> EkibenError:
        spec_codes, said = _said(response)
        detail = f"{self.host} answered {response.status} while {doing}" + (f": {said}" if said else "")
        name = f"registry_{spec_codes[0].lower()}" if spec_codes else f"registry_http_{response.status}"
        hint = None
        if response.status == 401:
            name, hint = "registry_unauthorized", f"log in first: docker login {self.host}"
        elif response.status == 403:
            name, hint = "registry_denied", "the account may not do this: ask the registry's owner for push rights"
        elif response.status == 413:
            name, hint = "registry_too_large", "raise the body limit of the registry or of the proxy before it"
        elif response.status >= 500:
            hint = "look at the registry's log; the build is tried again"
        kind = RegistryFailed if response.status in TRANSIENT or response.status >= 500 else RegistryRefused
        error = kind(name, self._redacted(detail), hint=hint)
        error.spec_codes = spec_codes
        return error

    def _unreachable(self, error: TransportError) -> EkibenError:
        if _is_certificate(error):
            return RegistryRefused(
                "registry_certificate",
                self._redacted(f"the certificate of {self.host} is not trusted: {error}"),
                field="ca",
                hint="give the CA of the registry (ca), or insecure for plain http",
            )
        if _speaks_http(error):
            return RegistryRefused(
                "registry_speaks_http",
                f"{self.host} speaks plain http, and https was asked of it",
                field="insecure",
                hint="give the registry a certificate, or allow plain http: --insecure",
            )
        what = str(error) or type(error).__name__
        return RegistryFailed(
            "registry_unreachable",
            self._redacted(f"{self._root.scheme}://{self.host} cannot be reached: {what}"),
            hint="is the address right, is the registry running, does it speak "
            + ("plain http" if self._plain else "https")
            + "?",
        )

    def _redacted(self, text: str) -> str:
        secrets = [token for token, _ in self._tokens.values()]
        if self._credentials is not None:
            secrets += [self._credentials.password, self._credentials.identity_token, (self._basic() or "")[6:]]
        for secret in secrets:
            if secret:
                text = text.replace(secret, "…")
        return re.sub(r"(https?://[^\s?\"']*)\?[^\s\"']*", r"\1?…", text)


def push_image(
    registry: Registry,
    image: Image,
    ref: Reference,
    progress: Progress | None = None,
    notes: Mapping[str, Layer] | None = None,
) -> PushReport:
    """Push what the registry lacks of an image, then the manifest, and see that it is there by its digest.

    Layers whose digest is known are asked for first; a streamed layer is uploaded in one pass, and a small one is read
    before that, so that the config goes up beside it. Two go up at a time. `notes` are remembered (`remember_layer`)
    once all layers are there. Raises what the registry or the reading of a layer raises, and until the manifest is
    pushed the tag names what it named before.
    """
    repo = ref.repository
    made = {id(layer): _layers.held(layer) for layer in image.layers if _is_small(layer)}
    layers: list[AnyLayer] = [made.get(id(layer), layer) for layer in image.layers]
    not_there = {layer.digest for layer in made.values()}
    is_new = not image.is_sealed

    def push_config(image: Image) -> None:
        data = image.config_bytes
        if is_new:  # it names a layer that was made just now: nobody can have pushed it
            registry.push_blob_stream(repo, lambda: iter([data]), len(data), digest=_digest.of_bytes(data))
        else:
            registry.push_blob(repo, data)

    def push(layer: AnyLayer) -> tuple[Layer, LayerReport]:
        if isinstance(layer, Layer) and layer.digest not in not_there and registry.has_blob(repo, layer.digest):
            return layer, LayerReport(layer.name, layer.digest, layer.size, True, 0)
        sent = 0

        def count(length: int) -> None:
            nonlocal sent
            sent += length
            if progress is not None:
                progress(layer, length)

        known = layer.digest if isinstance(layer, Layer) else None
        digest = registry.push_blob_stream(repo, layer.open, layer.size, digest=known, progress=count)
        done = layer.sealed(digest) if isinstance(layer, StreamedLayer) else layer
        return done, LayerReport(layer.name, digest, layer.size, False, sent)

    distinct = {layer.digest if isinstance(layer, Layer) else id(layer): layer for layer in layers}
    with ThreadPoolExecutor(_AT_ONCE, "push") as pool:
        try:
            tasks = {key: pool.submit(push, layer) for key, layer in distinct.items()}
            known = [layer for layer in layers if isinstance(layer, Layer)]
            config = pool.submit(push_config, image.sealed(known)) if len(known) == len(layers) else None
            results = {key: task.result() for key, task in tasks.items()}
            image = image.sealed(
                results[layer.digest if isinstance(layer, Layer) else id(layer)][0] for layer in layers
            )
            if config is None:
                config = pool.submit(push_config, image)
            config.result()
            remembered = [pool.submit(remember_layer, registry, repo, *note) for note in (notes or {}).items()]
            manifest = image.manifest_bytes
            digest = registry.push_manifest(repo, ref.tag or image.digest, manifest, image.media_type)
            by_digest = pool.submit(registry.get_manifest, repo, digest)
            by_tag = pool.submit(registry.head_manifest, repo, ref.tag or digest)
            confirmed = by_digest.result()[0] == manifest and by_tag.result() == digest
            for note in remembered:
                note.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if not confirmed:
        raise InfrastructureError(
            "image_not_stored",
            f"{ref} was pushed, but the registry does not give {digest} back",
            hint="somebody else may be pushing to the same tag, or the registry's storage fails; build again",
        )
    reports = tuple(report for _, report in results.values())
    return PushReport(str(ref), digest, image.size, reports, image)


def _is_small(layer: AnyLayer) -> TypeGuard[StreamedLayer]:
    return isinstance(layer, StreamedLayer) and layer.size <= _SMALL


def pull_image(registry: Registry, ref: Reference, platform: Platform | None = None) -> Image:
    """The image a reference names, for one platform; its layers are pulled, and checked, when they are opened."""
    index, document = _described(registry, ref)

    def opener(digest: str) -> _layers.Opener:
        return lambda: registry.pull_blob(ref.repository, digest)

    return _image.choose(index, document, opener, platform, None, str(ref))


def platforms_of(registry: Registry, ref: Reference) -> list[Platform]:
    """The platforms that a reference has images for."""
    try:
        return _image.platforms(*_described(registry, ref))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError("bad_image", f"{ref} is not a usable image: {error}", field="ref") from error


def _described(registry: Registry, ref: Reference) -> tuple[Any, _image.Document]:
    """(an index that holds just what the reference names, how to get the documents below it)."""
    repo = ref.repository
    manifest, media_type = registry.get_manifest(repo, ref.name)
    documents = {_digest.of_bytes(manifest): manifest}

    def document(digest: str, kind: Literal["manifest", "config"]) -> bytes:
        if digest not in documents:
            if kind == "manifest":
                documents[digest] = registry.get_manifest(repo, digest)[0]
            else:
                documents[digest] = _all_of(registry.pull_blob(repo, digest), _LONGEST_MANIFEST)
        return documents[digest]

    return {"manifests": [{"mediaType": media_type, "digest": _digest.of_bytes(manifest)}]}, document


def remember_layer(registry: Registry, repo: str, key: str, layer: Layer) -> None:
    """Note in the registry that `key` (what a layer is made from) gave this layer, for builders without a local cache.

    The note is a manifest of its own under a tag, so that no garbage collection takes the layer; its config holds the
    layer's facts (image-format §4.5). The layer must be there. A note that says the same is left alone.
    """
    note: dict[str, Any] = {"schema": _NOTE_SCHEMA, "key": key, "name": layer.name, "diff_id": layer.diff_id}
    if layer.facts is not None:
        note["facts"] = dict(layer.facts)
    config = canonical_json(note)
    if len(config) > _LONGEST_MANIFEST:
        return  # a schema of megabytes is learnt anew by whoever needs it
    manifest = canonical_json(
        {
            "schemaVersion": 2,
            "mediaType": _image.MANIFEST,
            "config": {"mediaType": _LAYER_NOTE, "digest": _digest.of_bytes(config), "size": len(config)},
            "layers": [{"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size}],
        }
    )
    if registry.head_manifest(repo, _layer_tag(key)) != _digest.of_bytes(manifest):
        registry.push_blob(repo, config)
        registry.push_manifest(repo, _layer_tag(key), manifest, _image.MANIFEST)


def find_layer(registry: Registry, repo: str, key: str) -> Layer | None:
    """The layer that `remember_layer` noted for `key`, when its bytes are still there; they can be pulled by `open`.

    Anything but a whole note for just this key counts as none.
    """
    stored = registry.head_manifest(repo, _layer_tag(key))
    if stored is None:
        return None
    try:
        # by its digest, so that what arrives is what was named
        manifest = json.loads(registry.get_manifest(repo, _image.checked_digest(stored))[0])
        note = json.loads(_all_of(registry.pull_blob(repo, manifest["config"]["digest"]), _LONGEST_MANIFEST))
        (item,) = manifest["layers"]
        facts = note.get("facts")
        if manifest["config"]["mediaType"] != _LAYER_NOTE or not isinstance(facts, dict | None):
            return None
        if note["schema"] != _NOTE_SCHEMA or note["key"] != key or note["name"] not in ("deps", "code"):
            return None
        digest, size = _image.checked_digest(item["digest"]), int(item["size"])
        diff_id, media_type = _image.checked_digest(note["diff_id"]), str(item["mediaType"])
    except (KeyError, ValueError, TypeError, AttributeError):
        return None
    if not registry.has_blob(repo, digest):
        return None
    return Layer(note["name"], media_type, diff_id, digest, size, lambda: registry.pull_blob(repo, digest, size), facts)


_LAYER_NOTE = "application/vnd.ekiben.layer.v1+json"
_NOTE_SCHEMA = "ekiben.layer.v1"


def _layer_tag(key: str) -> str:
    return "layer-" + hashlib.sha256(key.encode()).hexdigest()[:40]


class _InParts(Exception):
    """The registry or its proxy does not take the blob in one request."""


class _Lost(Exception):
    """The registry no longer knows the upload; `reason` is what broke it."""

    def __init__(self, reason: EkibenError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class _Feed:
    """The bytes of a blob from any place on, hashed once whatever is sent how often.

    Going on where the last piece ended is free; going back opens the source again and skips.
    """

    def __init__(
        self, open_: _layers.Opener, size: int, digest: str | None, progress: Callable[[int], None] | None
    ) -> None:
        self.size = size
        self.digest = digest
        self._open = open_
        self._progress = progress
        self._pieces: Iterator[bytes] = iter(())
        self._at = -1  # place of the next byte of _rest; -1: not open
        self._rest = b""
        self._hash = Sha256(size)
        self._hashed = 0

    def take(self, start: int, length: int) -> Iterator[bytes]:
        if self._at < 0 or start < self._at:
            self.close()
            self._pieces, self._at, self._rest = self._open(), 0, b""
        while length:
            if not self._rest:
                piece = next(self._pieces, b"")
                if not piece:
                    raise self._wrong(f"ended after {self._at}")
                self._rest = piece
                self._see(piece)
            if self._at < start:
                skipped = min(start - self._at, len(self._rest))
                self._at += skipped
                self._rest = self._rest[skipped:]
                continue
            piece = self._rest[:length]
            self._rest = self._rest[len(piece) :]
            self._at += len(piece)
            length -= len(piece)
            if self._at == self.size:
                self._end()
            if self._progress is not None:
                self._progress(len(piece))
            yield piece

    def finished(self) -> str:
        """The digest of everything."""
        if self.size == 0:
            self._end()
        return f"sha256:{self._hash.hexdigest()}"

    def close(self) -> None:
        close = getattr(self._pieces, "close", None)
        if close is not None:
            close()
        self._at, self._rest = -1, b""

    def end(self) -> None:
        self.close()
        self._hash.close()

    def _see(self, piece: bytes) -> None:
        new = self._at + len(piece) - self._hashed
        if new > 0:
            self._hash.update(piece if new == len(piece) else piece[-new:])
            self._hashed += new

    def _end(self) -> None:
        """Before the last bytes leave: is it all, and right? A source says only at its end what was wrong in it."""
        for more in self._pieces if self.size else self._open():
            if more:
                raise self._wrong("go on")
        found = f"sha256:{self._hash.hexdigest()}"
        if self._rest or (self.digest is not None and found != self.digest):
            raise self._wrong(f"have the digest {found}")

    def _wrong(self, how: str) -> InfrastructureError:
        return InfrastructureError(
            "digest_mismatch",
            f"a blob should be {self.digest or 'a stream'} of {self.size} bytes, but its bytes {how}",
            hint="where the layer is stored is damaged: remove it there and build again",
        )


def _said(response: Response) -> tuple[tuple[str, ...], str]:
    """(codes, text) of an error body, which may be anything."""
    try:
        body = response.at_most(_LONGEST_ERROR) or b""
    except TransportError:
        return (), ""
    try:
        errors = json.loads(body)["errors"]
        codes = tuple(str(error["code"]) for error in errors if re.fullmatch("[A-Z_]{1,40}", str(error["code"])))
        return codes, "; ".join(f"{error['code']}: {error.get('message', '')}" for error in errors)[:500]
    except (ValueError, KeyError, TypeError, AttributeError):
        return (), " ".join(body[:300].decode("utf-8", "replace").split())


def _all_of(pieces: Iterator[bytes], limit: int) -> bytes:
    data = bytearray()
    for piece in pieces:
        data += piece
        if len(data) > limit:
            raise RegistryFailed("registry_protocol", f"the registry's blob is longer than {limit} bytes")
    return bytes(data)


def _stored(response: Response, otherwise: int) -> int:
    """How many bytes of an upload the registry has, by its Range header; `0-0` means none to some registries."""
    match = re.fullmatch(r"(?:bytes=)?0-([0-9]+)", response.headers.get("Range", ""))
    if match is None:
        return otherwise
    last = int(match.group(1))
    return last + 1 if last else (1 if otherwise == 1 else 0)


def _challenges(headers: Iterable[str]) -> dict[str, dict[str, str]]:
    """Scheme (lower case) → parameters of WWW-Authenticate headers (RFC 9110 §11.6.1), as registries write them."""
    found: dict[str, dict[str, str]] = {}
    for header in headers:
        scheme, _, rest = header.strip().partition(" ")
        pairs = re.findall(r'([A-Za-z_]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))', rest)
        found.setdefault(scheme.lower(), {key.lower(): quoted or bare for key, quoted, bare in pairs})
    return found


def backoff(attempt: int, asked: str | None = None) -> float:
    """Seconds to wait before the next attempt."""
    if asked is not None and asked.isdecimal():
        return min(float(asked), 30.0)
    return float(min(0.25 * 2**attempt, 8.0))


def certificates(ca: Path | None) -> ssl.SSLContext:
    """The system's authorities, and the ones in a PEM file."""
    import certifi  # for https only

    own = (os.environ.get("SSL_CERT_FILE") or None, os.environ.get("SSL_CERT_DIR") or None)
    if own[0] is not None:
        trust = ssl.create_default_context(cafile=own[0])
    elif own[1] is not None:
        trust = ssl.create_default_context(capath=own[1])
    else:
        trust = ssl.create_default_context(cafile=certifi.where())
    if ca is not None:
        try:
            trust.load_verify_locations(cafile=ca)
        except (OSError, ssl.SSLError) as error:
            raise UserError(
                "bad_ca", f"{ca} is not a readable PEM file of certificates", field="ca", hint="give the CA's PEM"
            ) from error
    return trust


def _pull(repo: str) -> str:
    return f"repository:{repo}:pull"


def _push(repo: str, action: str = "") -> str:
    return f"repository:{repo}:pull,push" + (f",{action}" if action else "")


def is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _speaks_http(error: BaseException) -> bool:
    """Whether a server answered the TLS greeting in plain text; OpenSSL's two words for it."""
    return "WRONG_VERSION_NUMBER" in str(error) or "RECORD_LAYER_FAILURE" in str(error)


def _is_certificate(error: BaseException) -> bool:
    return "CERTIFICATE_VERIFY_FAILED" in str(error)
