"""The HTTP client: one method a thing the API offers, JSON in and out (shapes in docs/design.md §10)."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from ekiben import _config, _local, _parts, _upload
from ekiben._errors import (
    EkibenError,
    NotFound,
    RolloutFailed,
    StillWorking,
    Unreachable,
    UsageError,
    VersionFailed,
    from_answer,
)

if TYPE_CHECKING:
    import httpx

    from ekiben._deployment import Deployment

_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 60.0
_STORE_SECONDS = 600.0  # from the last uploaded byte to the answer: an archive is unpacked in between
_LONGEST_ERROR = 64 * 1024
_STORE_PATIENCE = 1800.0  # seconds for a file that is in parts: it is read once more, and a proxy may not wait so long
_SLICE = 256 * 1024  # bytes of a part between two looks at the progress
_SETTLED = frozenset({"live", "superseded", "rolled_back", "failed"})

Watch = Callable[[dict[str, Any]], None]
"""Called with the version or deployment each time it was asked for."""


class Client:
    """Calls one server.

    `url`, `token` and `ca` (a PEM file of a certificate authority of your own) default to EKIBEN_URL, EKIBEN_TOKEN and
    EKIBEN_CA, then to what `ekiben login` stored, then to the server of `ekiben up`. Proxies are taken from the usual
    variables, except for loopback addresses. Every failure is an `ekiben.EkibenError`.
    """

    def __init__(self, url: str | None = None, token: str | None = None, ca: str | None = None) -> None:
        self._connection = _config.connection(url, token, ca)
        self._open_http: httpx.Client | None = None

    @property
    def url(self) -> str:
        """Address of the server, without a slash at its end."""
        return self._connection.url

    @property
    def connection(self) -> _config.Connection:
        return self._connection

    def __repr__(self) -> str:
        return f"Client({self.url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._open_http is not None:
            self._open_http.close()
            self._open_http = None

    # --- models ---------------------------------------------------------------------------------------------------

    def upload(
        self,
        paths: Sequence[Path] = (),
        *,
        run_id: str | None = None,
        artifact_path: str | None = None,
        model_uri: str | None = None,
        name: str | None = None,
        kind: str | None = None,
        sample: Any = None,
        expected: Any = None,
        requirements: Path | None = None,
        python: str | None = None,
        labels: Mapping[str, str] | None = None,
        deploy: bool = True,
        force: bool = False,
        progress: _upload.Progress | None = None,
        prepared: Callable[[int], None] | None = None,
        told: Callable[[str], None] | None = None,
    ) -> dict[str, Any]:
        """Send files as a version and return it as soon as it is stored; building and rolling out go on.

        In place of files, `run_id` (with `artifact_path` where the run has several models) or `model_uri` names a model
        in the server's MLflow, which the server fetches itself.
        `prepared` is called once with the bytes of the whole body. The same content again gives the version that is
        there already, which is why a lost connection may be tried a second time. From EKIBEN_PART_UPLOAD_BYTES on files
        are sent in parts, and the next call goes on where one was cut; `told` is called with a word about that.
        """
        fields = {
            "run_id": run_id,
            "artifact_path": artifact_path,
            "model_uri": model_uri,
            "name": name,
            "kind": kind,
            "python": python,
            "labels": json.dumps(dict(labels), sort_keys=True) if labels else None,
            "deploy": None if deploy else "false",
            "force": "true" if force else None,
        }

        def form_of(some: Sequence[Path], **more: str) -> _upload.Form:
            documents = {"sample": sample, "expected": expected}
            return _upload.form(some, fields={**fields, **more}, documents=documents, requirements=requirements)

        form = form_of(paths)
        what = f"the upload of {paths[0] if paths else run_id or model_uri}"
        if paths and form.size >= _config.part_upload_bytes():
            payload = _parts.payload(paths)
            if prepared is not None:
                prepared(payload.size)
            with contextlib.suppress(_parts.Unsupported):
                return self._upload_in_parts(payload, form_of, what, progress, told)
        elif prepared is not None:
            prepared(form.size)
        for attempt in (1, 2):
            try:
                return self._store(form, what, progress)
            except Unreachable as error:
                # Only a connection that broke is tried again: identical content is never stored twice.
                if attempt == 2 or error.code != "connection_lost":
                    raise
        raise AssertionError("not reached")

    def _upload_in_parts(
        self,
        payload: _parts.Payload,
        form_of: Callable[..., _upload.Form],
        what: str,
        progress: _upload.Progress | None,
        told: Callable[[str], None] | None,
    ) -> dict[str, Any]:
        memory = _parts.Memory(self.url, payload.paths, os.environ)
        upload = _parts.send(self, payload, memory, progress, told)
        form = form_of((), upload_id=upload)
        # Any number of times: an upload becomes one version, whichever of the answers arrives.
        version = _parts.again(lambda: self._store(form, what, None), _STORE_PATIENCE)
        memory.forget()
        return version

    def _store(self, form: _upload.Form, what: str, progress: _upload.Progress | None) -> dict[str, Any]:
        headers = {"Content-Type": form.content_type, "Content-Length": str(form.size)}
        content = form.stream(progress)
        return _version(
            self._send("POST", "/models", what, headers=headers, content=content, read=_STORE_SECONDS), what
        )

    def begin_upload(self, filename: str, size: int) -> dict[str, Any]:
        """Begin an upload in parts of a file: {"id", "part_size", …}."""
        return dict(self._json("POST", "/uploads", {"filename": filename, "size": size}))

    def upload_in_parts(self, upload: str) -> dict[str, Any]:
        """The parts that are there. Conflict `upload_complete` when they are one file already."""
        return dict(self._json("GET", f"/uploads/{_segment(upload)}"))

    def put_part(
        self,
        upload: str,
        number: int,
        data: bytes | bytearray,
        sha256: bytes,
        progress: _upload.Progress | None = None,
    ) -> dict[str, Any]:
        """Send a part; when this returns it is on the server's disk. `sha256` is its digest, 32 bytes."""
        path = f"/uploads/{_segment(upload)}/parts/{int(number)}"
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(len(data)),
            "Content-Digest": f"sha-256=:{base64.b64encode(sha256).decode()}:",
        }
        what = f"part {number} of the upload"
        return dict(_parsed(self._send("PUT", path, what, headers=headers, content=_sliced(data, progress)), what))

    def end_upload(self, upload: str) -> None:
        """Give an upload in parts up."""
        self._json("DELETE", f"/uploads/{_segment(upload)}")

    def version(self, model: str, version: int | None = None) -> dict[str, Any]:
        """One version, the newest when no number is given."""
        if version is not None:
            found = self._json("GET", f"/models/{_segment(model)}/versions/{int(version)}")
            return dict(found)
        newest = max(self.versions(model), key=lambda one: int(one["version"]), default=None)
        if newest is None:
            raise NotFound(f"the model {model!r} has no versions", code="model_not_found", hint="ekiben models")
        return newest

    def versions(self, model: str) -> list[dict[str, Any]]:
        return list(self._items(f"/models/{_segment(model)}"))

    def models(self) -> list[dict[str, Any]]:
        return list(self._items("/models"))

    def delete_version(self, model: str, version: int) -> None:
        self._json("DELETE", f"/models/{_segment(model)}/versions/{int(version)}")

    def delete_model(self, model: str) -> None:
        self._json("DELETE", f"/models/{_segment(model)}")

    def wait(
        self, version: Mapping[str, Any], seconds: float, watch: Watch | None = None, *, deploy: bool = True
    ) -> dict[str, Any]:
        """Poll a version until it is live (without `deploy`: built). Raises VersionFailed, or StillWorking."""
        model, number = str(version["model"]), int(version["version"])

        def settled(now: dict[str, Any]) -> bool:
            return now["state"] in _SETTLED or (now["state"] == "built" and not deploy)

        current = _poll(dict(version), lambda: self.version(model, number), settled, seconds, watch)
        if not settled(current):
            raise StillWorking(
                f"{model} version {number} is {current['state']} after {seconds:g} s; the work goes on",
                known=current,
                hint=f"ekiben status {model}, ekiben logs {model} --build",
            )
        if current["state"] in ("failed", "rolled_back"):
            raise failure(current)
        return current

    # --- builds ---------------------------------------------------------------------------------------------------

    def builds(self) -> list[dict[str, Any]]:
        return list(self._items("/builds"))

    def build(self, build: str) -> dict[str, Any]:
        return dict(self._json("GET", f"/builds/{_segment(build)}"))

    def submit_build(self, model: str, version: int, image: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Build a version (again): `image` asks for an image, {"base", "push": {"ref"}, "output"}."""
        body = {"image": dict(image)} if image is not None else {}
        return dict(self._json("POST", f"/models/{_segment(model)}/versions/{int(version)}/builds", body))

    def build_logs(self, build: str, follow: bool = False) -> Iterator[str]:
        return self._lines(f"/builds/{_segment(build)}/logs", follow)

    def cancel_build(self, build: str) -> Any:
        return self._json("POST", f"/builds/{_segment(build)}/cancel")

    # --- deployments ----------------------------------------------------------------------------------------------

    def deployments(self) -> list[dict[str, Any]]:
        return list(self._items("/deployments"))

    def deployment_state(self, name: str) -> dict[str, Any]:
        return dict(self._json("GET", f"/deployments/{_segment(name)}"))

    def deployment(self, name: str) -> Deployment:
        """A deployment to call: `client.deployment("churn").predict(X)`."""
        from ekiben._deployment import Deployment

        return Deployment(self, self.deployment_state(name))

    def deploy(self, name: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Set what a deployment should be: model, version, replicas, resources, strategy, autoscale."""
        return dict(self._json("PUT", f"/deployments/{_segment(name)}", dict(wanted)))

    def rollback(self, name: str, revision: int | None = None) -> dict[str, Any]:
        body = {} if revision is None else {"revision": revision}
        return dict(self._json("POST", f"/deployments/{_segment(name)}/rollback", body))

    def wait_for_deployment(
        self, deployment: Mapping[str, Any], seconds: float, watch: Watch | None = None
    ) -> dict[str, Any]:
        """Poll a deployment until its newest revision is live in all replicas. RolloutFailed, or StillWorking."""
        name = str(deployment["name"])

        def settled(now: dict[str, Any]) -> bool:
            return now["state"] in ("failed", "rolled_back") or (
                now["state"] == "live" and now["ready"] >= now["replicas"]
            )

        current = _poll(dict(deployment), lambda: self.deployment_state(name), settled, seconds, watch)
        if not settled(current):
            raise StillWorking(
                f"{name} is {current['state']} after {seconds:g} s, with {current['ready']} of {current['replicas']} "
                "processes ready; the work goes on",
                known=current,
                hint=f"ekiben status {name}",
            )
        if current["state"] != "live":
            verb = "was rolled back" if current["state"] == "rolled_back" else "failed"
            raise RolloutFailed(
                f"{name} {verb}: {current.get('reason')}",
                deployment=current,
                code=current.get("code") or str(current["state"]),
                hint=current.get("hint") or f"ekiben logs {name}",
            )
        return current

    def delete_deployment(self, name: str) -> None:
        self._json("DELETE", f"/deployments/{_segment(name)}")

    def revisions(self, name: str) -> list[dict[str, Any]]:
        return list(self._items(f"/deployments/{_segment(name)}/revisions"))

    def events(self, name: str) -> list[dict[str, Any]]:
        return list(self._items(f"/deployments/{_segment(name)}/events"))

    def deployment_logs(self, name: str, follow: bool = False) -> Iterator[str]:
        return self._lines(f"/deployments/{_segment(name)}/logs", follow)

    def predict(self, name: str, body: Any, path: str = "predict", seconds: float = _ANSWER_SECONDS) -> Any:
        """POST a JSON body to a deployment's route and return the JSON answer."""
        content = body if isinstance(body, bytes) else json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
        answer = self._send(
            "POST",
            f"/inference/{_segment(name)}/{path.lstrip('/')}",
            f"the call of {name}",
            headers={"Content-Type": "application/json"},
            content=content,
            read=seconds,
        )
        return _parsed(answer, f"the call of {name}")

    def inference(self, name: str, path: str) -> Any:
        """GET a route of a deployment: metadata, health, label, predict/test."""
        return self._json("GET", f"/inference/{_segment(name)}/{path.lstrip('/')}")

    # --- the server ------------------------------------------------------------------------------------------------

    def kinds(self) -> list[dict[str, Any]]:
        return list(self._items("/kinds"))

    def tokens(self) -> list[dict[str, Any]]:
        return list(self._items("/tokens"))

    def create_token(self, name: str) -> dict[str, Any]:
        return dict(self._json("POST", "/tokens", {"name": name}))

    def revoke_token(self, token: str) -> None:
        self._json("DELETE", f"/tokens/{_segment(token)}")

    def ready(self, seconds: float = _CONNECT_SECONDS) -> bool:
        """Whether the server answers and takes work."""
        try:
            self._send("GET", "/readyz", "the readiness check", read=seconds)
        except EkibenError as error:
            if error.status is None or error.status == 503:
                return False
            raise
        return True

    def about(self) -> dict[str, Any]:
        """The server's own description: title and version, from its OpenAPI document."""
        found = self._json("GET", "/openapi.json")
        info = found.get("info", {}) if isinstance(found, dict) else {}
        return {"title": info.get("title"), "version": info.get("version")}

    def machine(self) -> dict[str, Any]:
        """What a server says of its own machine: its state folder, and what keeps models apart there."""
        found = self._json("GET", "/version")
        return found if isinstance(found, dict) else {}

    # --- transport -------------------------------------------------------------------------------------------------

    def _json(self, method: str, path: str, body: Any = None, params: Mapping[str, str] | None = None) -> Any:
        what = f"{method} {path}"
        content = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        return _parsed(self._send(method, path, what, headers=headers, content=content, params=params), what)

    def _items(self, path: str) -> Iterator[dict[str, Any]]:
        cursor: str | None = None
        while True:
            page = self._json("GET", path, params={"after": cursor} if cursor else None)
            if not isinstance(page, dict) or not isinstance(page.get("items"), list):
                raise UsageError(f"GET {path} was not answered with a list", code="bad_answer", hint="is this Ekiben?")
            yield from page["items"]
            following = page.get("next")
            if following is None or following == cursor:
                return
            cursor = str(following)

    def _send(
        self,
        method: str,
        path: str,
        what: str,
        *,
        headers: Mapping[str, str] | None = None,
        content: bytes | Iterator[bytes] | None = None,
        params: Mapping[str, str] | None = None,
        read: float = _ANSWER_SECONDS,
    ) -> bytes:
        import httpx

        timeout = httpx.Timeout(read, connect=_CONNECT_SECONDS, write=_ANSWER_SECONDS)
        address, proof = self._address()
        with self._reaching(what):
            answer = self._http().request(
                method,
                address + path,
                headers={**(headers or {}), **proof},
                content=content,
                params=dict(params) if params else None,
                timeout=timeout,
            )
        if answer.status_code >= 300:
            raise from_answer(answer.status_code, answer.content[:_LONGEST_ERROR], what)
        return answer.content

    def _lines(self, path: str, follow: bool) -> Iterator[str]:
        import httpx

        # A log may be silent for hours: no bound on reading while it is followed.
        timeout = httpx.Timeout(None if follow else _ANSWER_SECONDS, connect=_CONNECT_SECONDS)
        params = {"follow": "true"} if follow else {}
        address, proof = self._address()
        with self._reaching(path):
            with self._http().stream("GET", address + path, params=params, headers=proof, timeout=timeout) as answer:
                if answer.status_code >= 300:
                    raise from_answer(answer.status_code, answer.read()[:_LONGEST_ERROR], f"GET {path}")
                yield from answer.iter_lines()

    def _address(self) -> tuple[str, dict[str, str]]:
        """Where to send a request, and the header with the token of this machine's service if it goes there.

        Looked up for each request: the service may have started since the last one, or have ended.
        """
        connection = self._connection
        if connection.token is None and connection.loopback:
            own = _local.service(connection.url, _config.home())
            if own is not None:
                return own.address, {"Authorization": f"Bearer {own.token}"}
        return connection.url, {}

    def _http(self) -> httpx.Client:
        if self._open_http is None:
            import httpx

            connection = self._connection
            headers = {"User-Agent": "ekiben", "Accept": "application/json"}
            if connection.token:
                headers["Authorization"] = f"Bearer {connection.token}"
            # trust_env off means no proxy: one that cannot reach this machine's loopback must not see its requests.
            # Redirects are never followed, so that neither a token nor a model goes to another host.
            self._open_http = httpx.Client(
                headers=headers,
                verify=_trust(connection),
                trust_env=not connection.loopback,
                follow_redirects=False,
            )
        return self._open_http

    @contextlib.contextmanager
    def _reaching(self, what: str) -> Iterator[None]:
        """Translate httpx's errors; `what` names the call in the message."""
        import httpx

        try:
            yield
        except httpx.ConnectError as error:
            raise self._unreachable(error) from error
        except httpx.ProxyError as error:
            raise Unreachable(
                f"the proxy refused {what} to {self.url}: {_short(error)}",
                code="proxy",
                hint="check HTTPS_PROXY, or name the host in NO_PROXY",
            ) from error
        except httpx.ConnectTimeout as error:
            raise Unreachable(
                f"{self.url} did not take the connection within {_CONNECT_SECONDS:g} s",
                code="unreachable",
                hint="is the address right, is there a proxy or a firewall between? ekiben doctor",
            ) from error
        except httpx.TimeoutException as error:
            raise Unreachable(
                f"{what} at {self.url} was not answered in time",
                code="timeout",
                hint="ekiben status shows what goes on",
            ) from error
        except httpx.TransportError as error:
            raise Unreachable(
                f"the connection to {self.url} broke during {what}: {_short(error)}",
                code="connection_lost",
                hint="try again; identical content is recognised, nothing is stored twice",
            ) from error

    def _unreachable(self, error: Exception) -> Unreachable:
        text = _short(error)
        if "CERTIFICATE_VERIFY_FAILED" in text or "certificate verify failed" in text:
            return Unreachable(
                f"the certificate of {self.url} is not trusted: {text}",
                code="untrusted_certificate",
                hint="EKIBEN_CA=/path/of/your-ca.pem, or ekiben login URL --ca FILE",
            )
        hint = "ekiben up" if self._connection.loopback else "is the address right? ekiben doctor"
        return Unreachable(f"no server at {self.url}", code="unreachable", hint=hint)


def _poll(
    current: dict[str, Any],
    ask: Callable[[], dict[str, Any]],
    settled: Callable[[dict[str, Any]], bool],
    seconds: float,
    watch: Watch | None,
) -> dict[str, Any]:
    """Ask until it is settled or `seconds` are over; the pause grows from 50 ms to half a second."""
    deadline = time.monotonic() + seconds
    pause = 0.05
    while True:
        if watch is not None:
            watch(current)
        left = deadline - time.monotonic()
        if settled(current) or left <= 0:
            return current
        time.sleep(min(pause, left))
        pause = min(pause * 1.3, 0.5)
        current = ask()


def failure(version: Mapping[str, Any]) -> VersionFailed:
    """The exception for a version whose state says that it failed."""
    name = f"{version['model']} version {version['version']}"
    verb = "was rolled back" if version["state"] == "rolled_back" else "failed"
    reason = version.get("reason")
    return VersionFailed(
        f"{name} {verb}: {reason}" if reason else f"{name} {verb}",
        version=dict(version),
        code=version.get("code") or ("rolled_back" if version["state"] == "rolled_back" else "version_failed"),
        hint=version.get("hint") or f"ekiben logs {version['model']} --build",
    )


def _trust(connection: _config.Connection) -> Any:
    """What certificates to trust: the system's, SSL_CERT_FILE's, and those of the given authority besides."""
    if connection.loopback and not connection.url.startswith("https:"):
        return False  # plain http without a proxy: there is nothing to verify, and a context costs 20 ms
    import ssl

    context = ssl.create_default_context()
    if connection.ca:
        try:
            context.load_verify_locations(cafile=connection.ca)
        except (OSError, ssl.SSLError) as error:
            raise UsageError(
                f"{connection.ca} is not a readable PEM file: {error}", code="bad_ca", hint="EKIBEN_CA names a PEM file"
            ) from None
    return context


def _segment(text: str) -> str:
    if not text or text in (".", ".."):
        raise UsageError(f"{text!r} is not a name", code="bad_name", hint="ekiben status lists deployments")
    return quote(str(text), safe="")


def _sliced(data: bytes | bytearray, progress: _upload.Progress | None) -> Iterator[bytes]:
    view = memoryview(data)
    for start in range(0, len(view), _SLICE):
        yield bytes(view[start : start + _SLICE])
        if progress is not None:
            progress(min(start + _SLICE, len(view)))


def _parsed(content: bytes, what: str) -> Any:
    if not content.strip():
        return None
    try:
        return json.loads(content)
    except ValueError:
        raise UsageError(
            f"{what} was not answered with JSON", code="bad_answer", hint="is the address that of Ekiben?"
        ) from None


def _version(content: bytes, what: str) -> dict[str, Any]:
    answer = _parsed(content, what)
    if not isinstance(answer, dict) or not {"model", "version", "state"} <= set(answer):
        raise UsageError(
            f"{what} was not answered with a version", code="bad_answer", hint="is the address that of Ekiben?"
        )
    return answer


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__
