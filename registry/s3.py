"""One bucket of an S3 service: the few calls that the store is made of, on MinIO's client.

The only module that imports that client. Every call is tried again while the service is away or overloaded, and what
goes wrong is told as an EkibenError. The client hides the multipart calls and conditional headers behind `put_object`,
so its `_execute` (signed request in, response out) is used; the version is pinned for that.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import ipaddress
import logging
import random
import ssl
import threading
import time
import urllib.request
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import urllib3
from minio import Minio
from minio import time as amz
from minio.credentials.credentials import Credentials
from minio.credentials.providers import (
    AWSConfigProvider,
    ChainedProvider,
    EnvAWSProvider,
    EnvMinioProvider,
    IamAwsProvider,
    Provider,
    StaticProvider,
)
from minio.datatypes import parse_list_objects
from minio.deleteobjects import DeleteObject
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError
from urllib3.exceptions import HTTPError, SSLError

from registry.errors import EkibenError, InfrastructureError
from registry.store import ObjectExists, ObjectInfo, ObjectMissing

log = logging.getLogger(__name__)
T = TypeVar("T")

_CONNECT_SECONDS, _READ_SECONDS = 10.0, 120.0
_FIRST_DELAY, _LONGEST_DELAY = 0.1, 5.0  # seconds between tries
_TOLD_DELAY = 1.0  # from this pause on, the log says that the service is away
_START_PATIENCE = 30.0  # seconds that a service which is not up yet is waited for at start
_CONNECTIONS = 32
_PAGE = 1000  # keys of one request
_LONGEST_WORDS = 300  # characters of a server's own message
_CLOCKS_DIFFER = timedelta(minutes=5)  # from here on a refusal may be for the time
_WRITER = "x-amz-meta-ekiben-writer"  # says who wrote an object, for one who did not hear the answer

# Answers that say nothing about the request: the same one may go well in a moment. The Versity gateway finds a
# directory in the way of a new object while the folder above is being deleted with another one.
_PASSING = {
    "BadDigest", "ConditionalRequestConflict", "ExistingObjectIsDirectory", "InternalError", "OperationAborted",
    "RequestTimeout", "ServerNotInitialized", "ServiceUnavailable", "SlowDown", "SlowDownRead", "SlowDownWrite",
    "Throttling", "XAmzContentSHA256Mismatch", "XMinioServerNotInitialized",
}  # fmt: skip
_REFUSED = {
    "AccessDenied", "AccountProblem", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "RequestTimeTooSkewed",
    "SignatureDoesNotMatch", "XAdminUserNotFound",
}  # fmt: skip
_FULL = {"QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "EntityTooLargeForQuota"}
_MISSING = {"NoSuchKey", "NoSuchObject", "XMinioInvalidObjectName"}

_FAULTS = (MinioException, HTTPError, OSError, http.client.HTTPException, ET.ParseError)


@dataclass(frozen=True)
class S3Config:
    """Where the bucket is, and who asks. Endpoints are URLs without a path."""

    endpoint: str
    bucket: str
    access_key: str | None = None  # None: AWS_*, MINIO_*, ~/.aws/credentials or the machine's role
    secret_key: str | None = field(default=None, repr=False)
    region: str | None = None  # None: the service is asked
    ca: Path | None = None
    presign_endpoint: str | None = None
    patience: float = 120.0  # seconds that one call is tried for while the service is away


@dataclass(frozen=True)
class Stat:
    """What a bucket says of an object. `writer`: the token that its writer gave it."""

    info: ObjectInfo
    etag: str
    writer: str | None


@dataclass(frozen=True)
class StoredPart:
    """A part of a multipart upload; `sha256` in hex where the service keeps checksums."""

    number: int
    size: int
    etag: str
    sha256: str | None
    modified: float


class _Machine(ChainedProvider):
    """Credentials of the environment, the user's files or the machine's role, in this order."""

    def __init__(self) -> None:
        # Where there is no role, the address that would tell it does not answer.
        impatient = urllib3.PoolManager(timeout=2.0, retries=urllib3.Retry(1))
        super().__init__([*_given(), AWSConfigProvider(), IamAwsProvider(http_client=impatient)])

    def retrieve(self) -> Credentials:
        try:
            return super().retrieve()
        except (ValueError, HTTPError, OSError) as error:
            raise InfrastructureError(
                "store_credentials",
                f"There are no credentials for the object store ({type(error).__name__}).",
                hint="Set EKIBEN_S3_ACCESS_KEY and EKIBEN_S3_SECRET_KEY.",
            ) from error


def _given() -> list[Provider]:
    """Credentials of the environment, read once: a service forgets its variables after its start."""
    found: list[Provider] = []
    for provider in (EnvAWSProvider(), EnvMinioProvider()):
        with contextlib.suppress(ValueError):
            given = provider.retrieve()
            found.append(StaticProvider(given.access_key, given.secret_key, given.session_token))
    return found


class _Client(Minio):
    """MinIO's client on a machine whose clock may be wrong. A service refuses what is signed at another time than its
    own (15 minutes off at most), so the time that its refusal bears is signed with from then on."""

    behind = timedelta()  # what this machine's clock lacks of the service's

    def now(self) -> datetime:
        return datetime.now(UTC) + self.behind

    def _build_headers(self, *given: Any, **named: Any) -> tuple[dict[str, Any], datetime]:
        headers, _ = super()._build_headers(*given, **named)
        date = self.now()
        headers["x-amz-date"] = amz.to_amz_date(date)
        return headers, date

    def _url_open(self, *given: Any, **named: Any) -> Any:
        headers = dict(named.get("headers") or {})
        try:
            return super()._url_open(*given, **named)
        except S3Error as error:
            told = datetime.fromtimestamp(_date(error.response.headers), UTC)
            if error.response.status not in (400, 403) or abs(told - self.now()) < _CLOCKS_DIFFER:
                raise
            self.behind = told - datetime.now(UTC)
            log.warning("this machine's clock and the object store's differ by %s", self.behind)
        return super()._url_open(*given, **{**named, "headers": headers})


class MultipartMissing(Exception):
    """The multipart upload was completed or aborted."""


class Bucket:
    def __init__(self, config: S3Config) -> None:
        self._config, self.name = config, config.bucket
        self._http = _http_client(config.endpoint, config.ca)
        self._provider = (
            StaticProvider(config.access_key, config.secret_key)
            if config.access_key and config.secret_key
            else _Machine()
        )
        self._client = self._connect(config.endpoint, config.region)
        self._presigner: _Client | None = None

    def _connect(self, endpoint: str, region: str | None) -> _Client:
        parts = urlsplit(endpoint)
        return _Client(
            parts.netloc,
            secure=parts.scheme == "https",
            region=region,
            credentials=self._provider,
            http_client=self._http,
        )

    def close(self) -> None:
        self._http.clear()

    def prepare(self) -> None:
        """See that the bucket is there and may be used; make it if it is not there."""

        def look() -> bool:
            try:
                self._page("", None, None)
            except S3Error as error:
                if error.code == "NoSuchBucket":
                    return False
                raise
            return True

        def make() -> None:
            try:
                self._client.make_bucket(self.name)
            except S3Error as error:
                if error.code == "BucketAlreadyOwnedByYou":
                    return
                if error.code in ("AccessDenied", "BucketAlreadyExists"):
                    raise InfrastructureError(
                        "bucket_missing",
                        f"There is no bucket {self.name!r} at {self._config.endpoint}, and these keys may not make it "
                        f"({error.code}).",
                        hint="Make the bucket and give the keys access to it, or name another: EKIBEN_S3_BUCKET.",
                    ) from error
                raise

        if not self._try("look for the bucket", look, patience=_START_PATIENCE):
            self._try("make the bucket", make, patience=_START_PATIENCE)

    # --- objects ----------------------------------------------------------------------------------------------------

    def put(self, key: str, body: bytes | bytearray, *, writer: str, if_absent: bool = False) -> ObjectInfo:
        """Write an object in one request. `if_absent`: ObjectExists where another writer has the key.

        A service without conditional writes is asked first and then written to. That leaves a gap, which is no harm
        here: keys are under a folder whose random name only one upload knows.
        """

        def put() -> ObjectInfo:
            headers = {_WRITER: writer, **({"If-None-Match": "*"} if if_absent else {})}
            try:
                response = self._execute("PUT", key, body=body, headers=headers)
            except S3Error as error:
                if if_absent and error.response.status == 412:
                    return self._written_by(key, writer)
                if if_absent and error.response.status == 501:
                    self._refuse_if_there(key, writer)
                    response = self._execute("PUT", key, body=body, headers={_WRITER: writer})
                else:
                    raise
            return ObjectInfo(key, len(body), _date(response.headers))

        return self._try(f"write {key!r}", put)

    def stat(self, key: str) -> Stat:
        return self._try(f"look at {key!r}", lambda: self._stat(key))

    def get(self, key: str, start: int, size: int, *, etag: str) -> bytes:
        """A range of the object that has this etag, whole or not at all."""
        headers = {"Range": f"bytes={start}-{start + size - 1}", "If-Match": f'"{etag}"'}

        def get() -> bytes:
            try:
                data: bytes = self._execute("GET", key, headers=headers).data
            except S3Error as error:
                if error.code in _MISSING or error.response.status == 412:
                    raise ObjectMissing(key) from error
                raise
            if len(data) != size:
                raise http.client.IncompleteRead(data[:0], size - len(data))
            return data

        return self._try(f"read {key!r}", get)

    def objects(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects whose key starts with the prefix, in order of their keys."""
        return (found for found in self._listed(prefix, None) if isinstance(found, ObjectInfo))

    def folders(self, prefix: str) -> Iterator[str]:
        """Names of the folders directly below `prefix/`."""
        for found in self._listed(f"{prefix}/", "/"):
            if isinstance(found, str):
                yield found.removeprefix(f"{prefix}/").removesuffix("/")

    def delete(self, keys: Sequence[str]) -> None:
        """Delete up to a thousand objects in one request; those that are not there are fine."""

        def delete() -> None:
            # _delete_objects, as remove_objects swallows nothing but also checks nothing of what it is given.
            result = self._client._delete_objects(self.name, [DeleteObject(key) for key in keys], quiet=True)
            for error in result.error_list:
                if error.code not in ("NoSuchKey", "NoSuchVersion"):
                    raise InfrastructureError(
                        "store_refused" if error.code in _REFUSED else "store_failed",
                        f"The object store does not delete {error.name!r}: {error.code} {error.message or ''}",
                        hint="Do the keys of EKIBEN_S3_ACCESS_KEY have the right to delete?",
                    )

        self._try("delete objects", delete)

    # --- multipart uploads ------------------------------------------------------------------------------------------

    def begin(self, key: str, *, writer: str) -> str:
        """Begin a multipart upload; its id. Parts carry SHA-256 checksums."""
        headers = {_WRITER: writer, "x-amz-checksum-algorithm": "SHA256", "Content-Type": "application/octet-stream"}
        return self._try(
            f"begin {key!r}",
            lambda: _text(self._execute("POST", key, headers=headers, query={"uploads": ""}), "UploadId"),
        )

    def put_part(
        self, key: str, upload: str, number: int, body: bytes | bytearray, stop: threading.Event | None = None
    ) -> StoredPart:
        """Send a part; the service checks its SHA-256. `stop` ends the tries early."""
        sha256 = hashlib.sha256(body)
        headers = {"x-amz-checksum-sha256": base64.b64encode(sha256.digest()).decode()}
        query = {"partNumber": str(number), "uploadId": upload}

        def put() -> StoredPart:
            response = self._execute("PUT", key, body=body, headers=headers, query=query)
            etag = response.headers.get("etag", "").strip('"')
            return StoredPart(number, len(body), etag, sha256.hexdigest(), _date(response.headers))

        return self._try(f"write part {number} of {key!r}", _unless_gone(put), stop)

    def parts(self, key: str, upload: str, *, after: int = 0) -> Sequence[StoredPart]:
        """The parts from number `after` + 1 on, in order."""
        found: list[StoredPart] = []
        truncated = True
        while truncated:
            marker = str(found[-1].number if found else after)
            query = {"uploadId": upload, "max-parts": str(_PAGE), "part-number-marker": marker}
            page = self._try(
                f"list the parts of {key!r}",
                _unless_gone(lambda query=query: _xml(self._execute("GET", key, query=query))),  # type: ignore[misc]
            )
            fresh = [_stored_part(element) for element in page.findall("{*}Part")]
            found += fresh
            truncated = bool(fresh) and page.findtext("{*}IsTruncated", "false").lower() == "true"
        return found

    def complete(
        self, key: str, upload: str, parts: Sequence[StoredPart], *, writer: str, if_absent: bool = False
    ) -> ObjectInfo:
        """Make the parts one object; the object is looked at afterwards. Fine when the answer to an earlier try was
        lost."""
        root = ET.Element("CompleteMultipartUpload", xmlns="http://s3.amazonaws.com/doc/2006-03-01/")
        for part in parts:
            element = ET.SubElement(root, "Part")
            ET.SubElement(element, "PartNumber").text = str(part.number)
            ET.SubElement(element, "ETag").text = f'"{part.etag}"'
            if part.sha256 is not None:
                digest = base64.b64encode(bytes.fromhex(part.sha256)).decode()
                ET.SubElement(element, "ChecksumSHA256").text = digest
        body = ET.tostring(root)
        size = sum(part.size for part in parts)

        def complete() -> ObjectInfo:
            conditions = {"If-None-Match": "*"} if if_absent else {}
            headers = {"Content-Type": "application/xml", **conditions}
            try:
                answer = _xml(self._execute("POST", key, body=body, headers=headers, query={"uploadId": upload}))
            except S3Error as error:
                if error.code == "NoSuchUpload" or (if_absent and error.response.status == 412):
                    return self._written_by(key, writer)
                if if_absent and error.response.status == 501:
                    self._refuse_if_there(key, writer)
                    answer = _xml(self._execute("POST", key, body=body, query={"uploadId": upload}))
                else:
                    raise
            if answer.tag.endswith("Error"):  # S3 answers 200 before it knows
                raise ServerError(f"completing failed: {answer.findtext('{*}Code', 'InternalError')}", 500)
            return self._stat(key).info

        info = self._try(f"complete {key!r}", complete)
        if info.size != size:
            raise InfrastructureError(
                "object_damaged",
                f"{key!r} has {info.size} bytes in the object store after {size} were sent.",
                hint="Send the upload again.",
            )
        return info

    def abort(self, key: str, upload: str, *, patience: float = float("inf")) -> None:
        """Delete the parts of an upload; fine when there is none."""

        def abort() -> None:
            try:
                self._execute("DELETE", key, query={"uploadId": upload})
            except S3Error as error:
                if error.code != "NoSuchUpload":
                    raise

        self._try(f"abort {key!r}", abort, patience=patience)

    # --- URLs -------------------------------------------------------------------------------------------------------

    def presign(self, method: str, key: str, seconds: int) -> str:
        if not 1 <= seconds <= 7 * 86400:
            raise ValueError("a URL is good for 1 second to 7 days")

        def presign() -> str:
            if self._presigner is None:
                # The region goes into the signature. The other name of the service may not be reachable from here.
                region = self._client._get_region(self.name)
                self._presigner = self._connect(self._config.presign_endpoint or self._config.endpoint, region)
            life, date = timedelta(seconds=seconds), self._client.now()
            return str(self._presigner.get_presigned_url(method, self.name, key, life, request_date=date))

        return self._try("sign a URL", presign)

    # --- below ------------------------------------------------------------------------------------------------------

    def _execute(
        self,
        method: str,
        key: str | None,
        *,
        body: bytes | bytearray | None = None,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> Any:
        return self._client._execute(
            method,
            self.name,
            key,
            body=body,  # type: ignore[arg-type]  # any buffer will do
            headers=dict(headers or {}),
            query_params=dict(query or {}),
            no_body_trace=True,
        )

    def _stat(self, key: str) -> Stat:
        try:
            headers = self._execute("HEAD", key).headers
        except S3Error as error:
            if error.code in _MISSING:
                raise ObjectMissing(key) from error
            raise
        info = ObjectInfo(key, int(headers["content-length"]), _date(headers, "last-modified"))
        return Stat(info, headers.get("etag", "").strip('"'), headers.get(_WRITER))

    def _written_by(self, key: str, writer: str) -> ObjectInfo:
        """The object if this writer wrote it in a try whose answer was lost; ObjectExists otherwise."""
        stat = self._stat(key)
        if stat.writer != writer:
            raise ObjectExists(key)
        return stat.info

    def _refuse_if_there(self, key: str, writer: str) -> None:
        try:
            self._written_by(key, writer)
        except ObjectMissing:
            return

    def _page(self, prefix: str, delimiter: str | None, token: str | None) -> tuple[list[ObjectInfo | str], str | None]:
        query = {"list-type": "2", "max-keys": str(_PAGE), "prefix": prefix, "delimiter": delimiter or ""}
        query["encoding-type"] = "url"
        if token is not None:
            query["continuation-token"] = token
        objects, truncated, following, _ = parse_list_objects(self._execute("GET", None, query=query))
        found: list[ObjectInfo | str] = []
        for item in objects:
            if item.is_dir and delimiter:
                found.append(str(item.object_name))
            elif not str(item.object_name).endswith("/"):
                modified = item.last_modified.timestamp() if item.last_modified else 0.0
                found.append(ObjectInfo(str(item.object_name), int(item.size or 0), modified))
        return found, following if truncated else None

    def _listed(self, prefix: str, delimiter: str | None) -> Iterator[ObjectInfo | str]:
        token: str | None = None
        while True:
            found, token = self._try(
                "list objects",
                lambda token=token: self._page(prefix, delimiter, token),  # type: ignore[misc]
            )
            yield from found
            if token is None:
                return

    def _try(
        self,
        what: str,
        action: Callable[[], T],
        stop: threading.Event | None = None,
        *,
        patience: float = float("inf"),
    ) -> T:
        """The action's result, tried again with growing pauses while what goes wrong may pass."""
        end = time.monotonic() + min(self._config.patience, patience)
        delay = _FIRST_DELAY
        while True:
            try:
                return action()
            except _FAULTS as error:
                if not _may_pass(error) or time.monotonic() + delay > end or (stop is not None and stop.is_set()):
                    raise _translated(what, error, self._config) from error
                if delay >= _TOLD_DELAY:
                    log.warning("the object store does not %s; trying again (%s)", what, type(error).__name__)
            pause = delay * random.uniform(0.5, 1)
            if stop is None:
                time.sleep(pause)
            else:
                stop.wait(pause)
            delay = min(delay * 2, _LONGEST_DELAY)


def _may_pass(error: Exception) -> bool:
    if isinstance(error, S3Error):
        status = error.response.status
        return error.code not in _FULL and (
            error.code in _PASSING or status == 429 or (status >= 500 and status != 501)
        )
    if isinstance(error, ServerError):
        return error.status_code >= 500 or error.status_code == 429
    if isinstance(error, InvalidResponseError):
        return error._code >= 500 or error._code == 429
    if isinstance(error, SSLError) or _cause(error, ssl.SSLCertVerificationError) is not None:
        return _cause(error, ssl.SSLCertVerificationError) is None
    return isinstance(error, HTTPError | OSError | http.client.HTTPException | ET.ParseError)


def _translated(what: str, error: Exception, config: S3Config) -> EkibenError:
    where = f"The object store at {config.endpoint} (bucket {config.bucket!r})"
    if isinstance(error, S3Error):
        words = f"{error.code}: {error.message or 'no message'}"[:_LONGEST_WORDS]
        if error.code in _FULL or error.response.status == 507:
            return InfrastructureError(
                "disk_full", f"{where} has no room left to {what}: {words}", status=507,
                hint="Free some space there, or raise the bucket's quota; then send the upload again.",
            )  # fmt: skip
        if error.code in _REFUSED or error.response.status in (401, 403):
            return InfrastructureError(
                "store_refused",
                f"{where} does not let Ekiben {what}: {words}",
                hint="Look at EKIBEN_S3_ACCESS_KEY, EKIBEN_S3_SECRET_KEY, the rights that they have on the bucket, and "
                "this machine's clock.",
            )
        if error.code == "NoSuchBucket":
            return InfrastructureError(
                "bucket_missing", f"{where} is not there any more.", hint="Restore it, or restart to have it made."
            )
        return InfrastructureError("store_failed", f"{where} could not {what}: {words}", hint=_ASK)
    if _cause(error, ssl.SSLCertVerificationError) is not None:
        return InfrastructureError(
            "store_certificate",
            f"{where} shows a certificate that is not trusted: {_cause(error, ssl.SSLCertVerificationError)}"[:600],
            hint="Set EKIBEN_S3_CA to the PEM file of the authority that signed it.",
        )
    words = f"{type(error).__name__}: {error}"[:_LONGEST_WORDS]
    return InfrastructureError("store_unavailable", f"{where} could not be reached to {what} ({words}).", hint=_ASK)


_ASK = "Is it up, and does EKIBEN_S3_ENDPOINT name it as this machine reaches it?"


def _cause(error: BaseException | None, kind: type[T]) -> T | None:
    """The error of this kind that an error was caused by, however deep."""
    while error is not None:
        if isinstance(error, kind):
            return error
        inner = [each for each in (*error.args, getattr(error, "reason", None)) if isinstance(each, BaseException)]
        error = inner[0] if inner else error.__cause__ or error.__context__
    return None


def _unless_gone(action: Callable[[], T]) -> Callable[[], T]:
    def checked() -> T:
        try:
            return action()
        except S3Error as error:
            if error.code == "NoSuchUpload":
                raise MultipartMissing from error
            raise

    return checked


def _http_client(endpoint: str, ca: Path | None) -> urllib3.PoolManager:
    """Connections to the endpoint, through the environment's proxy unless it is this machine. Nothing is tried again
    here: `Bucket._try` does."""
    options: dict[str, Any] = {
        "timeout": urllib3.Timeout(connect=_CONNECT_SECONDS, read=_READ_SECONDS),
        "retries": False,
        "maxsize": _CONNECTIONS,
    }
    parts = urlsplit(endpoint)
    if parts.scheme == "https":
        options["ssl_context"] = ssl.create_default_context(cafile=None if ca is None else str(ca))
    proxy = urllib.request.getproxies().get(parts.scheme)
    host = parts.hostname or ""
    if proxy is None or _is_loopback(host) or urllib.request.proxy_bypass(host):
        return urllib3.PoolManager(**options)
    user = urlsplit(proxy)
    headers = None
    if user.username is not None:
        headers = urllib3.make_headers(proxy_basic_auth=f"{user.username}:{user.password or ''}")
        proxy = f"{user.scheme}://{user.netloc.rpartition('@')[2]}"
    return urllib3.ProxyManager(proxy, proxy_headers=headers, **options)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _xml(response: Any) -> ET.Element:
    return ET.fromstring(response.data)


def _text(response: Any, name: str) -> str:
    found = _xml(response).findtext(f"{{*}}{name}")
    if not found:
        raise ET.ParseError(f"the answer has no {name}")
    return found


def _stored_part(element: ET.Element) -> StoredPart:
    checksum = element.findtext("{*}ChecksumSHA256")
    modified = element.findtext("{*}LastModified")
    return StoredPart(
        number=int(element.findtext("{*}PartNumber", "0")),
        size=int(element.findtext("{*}Size", "0")),
        etag=element.findtext("{*}ETag", "").strip('"'),
        sha256=base64.b64decode(checksum).hex() if checksum else None,
        modified=_iso(modified) if modified else 0.0,
    )


def _iso(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def _date(headers: Mapping[str, str], name: str = "date") -> float:
    try:
        return parsedate_to_datetime(headers[name]).timestamp()
    except (KeyError, TypeError, ValueError):
        return time.time()
