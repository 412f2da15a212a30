"""The registry client against Debian's docker-registry, and against small servers that do what it never does."""

from __future__ import annotations

import base64
import datetime
import hashlib
import ipaddress
import json
import re
import shutil
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID

from builder_image import layers, layout, remote
from builder_image.image import Platform
from builder_image.remote import Credentials, Reference, Registry
from builder_image.validate import validate
from registry.digest import canonical_json, of_bytes
from registry.errors import EkibenError, InfrastructureError, UserError
from tests.servers import BCRYPT_OF_HUNTER2

needs_registry = pytest.mark.needs_registry


def _ref(host: str, tag: str = "churn-1") -> Reference:
    return Reference.parse(f"{host}/ekiben:{tag}")


def _no_pause(_: float) -> None:
    return None


# references and credentials


@pytest.mark.parametrize(
    ("text", "host", "repository", "tag"),
    [
        ("localhost:5000/ekiben:churn-3", "localhost:5000", "ekiben", "churn-3"),
        ("localhost/a/b", "localhost", "a/b", None),
        ("python:3.11-slim", "registry-1.docker.io", "library/python", "3.11-slim"),
        ("someone/python", "registry-1.docker.io", "someone/python", None),
        ("docker.io/library/python:3", "registry-1.docker.io", "library/python", "3"),
        ("[::1]:5000/x", "[::1]:5000", "x", None),
    ],
)
def test_references_are_read_as_docker_reads_them(text: str, host: str, repository: str, tag: str | None) -> None:
    assert Reference.parse(text) == Reference(host, repository, tag)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "http://h/x",
        "h:5000/X",
        "h:5000/x:",
        "h:5000/x:-a",
        "h:5000/x@sha256:12",
        "h:5000/../x",
        "user:pw@h.de/x",
        "h.de/x?a=b",
    ],
)
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(UserError) as refused:
        Reference.parse(text)
    assert refused.value.code == "bad_reference"


def test_credentials_are_found_in_a_docker_config_and_never_shown() -> None:
    auth = base64.b64encode(b"me:pa:ss").decode()
    config = {"auths": {"h:5000": {"auth": auth}, "https://index.docker.io/v1/": {"identitytoken": "tok"}, "empty": {}}}
    found = Credentials.of_docker_config(config, "h:5000")
    assert found == Credentials("me", "pa:ss")
    assert "pa:ss" not in repr(found)
    assert Credentials.of_docker_config(config, "registry-1.docker.io") == Credentials(identity_token="tok")
    assert Credentials.of_docker_config(config, "empty") is None
    assert Credentials.of_docker_config({}, "h:5000") is None


# pushing to a real registry


@needs_registry
def test_the_second_push_uploads_only_what_changed(
    registry_server: Any, make_image: Any, make_model: Any, tmp_path: Path
) -> None:
    sent: list[tuple[str, int]] = []
    with Registry(registry_server.host) as registry:
        first = remote.push_image(registry, make_image(), _ref(registry_server.host))
        assert [layer.reused for layer in first.layers] == [False] * 4
        second = remote.push_image(
            registry,
            make_image(make_model({"churn.txt": b"w" * 100_000}, where="second")),
            _ref(registry_server.host, "churn-2"),
            progress=lambda layer, length: sent.append((layer.name, length)),
        )
        assert [(layer.name, layer.reused) for layer in second.layers] == [
            ("base", True),
            ("deps", True),
            ("code", True),
            ("model", False),
        ]
        assert {name for name, _ in sent} == {"model"}
        assert sum(length for _, length in sent) == second.layers[3].sent == second.image.layers[3].size
        assert sorted(registry.tags("ekiben")) == ["churn-1", "churn-2"]
        assert registry.head_manifest("ekiben", "churn-2") == second.digest
        pulled = remote.pull_image(registry, _ref(registry_server.host, "churn-2"), Platform.parse("linux/amd64"))
        assert pulled.digest == second.digest
        validate(pulled)
        assert layout.write_layout(pulled, tmp_path / "pulled").digest == second.digest
    # the registry's own log: uploads begun, in the first push 4 layers and a config, then a model and a config
    assert len(registry_server.requests("POST")) == 5 + 2
    assert len(registry_server.requests("PATCH")) == 0, "small blobs go up in one request"


@needs_registry
def test_layers_that_look_alike_are_pushed_each(registry_server: Any, make_image: Any) -> None:
    """Streamed layers know no digest yet: two of one name and size are still two."""
    image = make_image()
    alike = [
        layers.StreamedLayer("model", layers.TAR, 4, lambda data=data: iter([data])) for data in (b"one.", b"two.")
    ]
    with Registry(registry_server.host) as registry:
        pushed = remote.push_image(registry, replace(image, layers=(*image.layers, *alike)), _ref(registry_server.host))
        assert [layer.digest for layer in pushed.image.known_layers()[-2:]] == [of_bytes(b"one."), of_bytes(b"two.")]
        assert all(registry.has_blob("ekiben", layer.digest) for layer in pushed.layers)


@needs_registry
def test_a_push_remembers_what_its_layers_were_made_from(registry_server: Any, make_image: Any, tmp_path: Path) -> None:
    built = layout.write_layout(make_image(), tmp_path / "out")
    _, deps, code, _ = built.known_layers()
    with Registry(registry_server.host) as registry:
        remote.push_image(registry, built, _ref(registry_server.host), notes={"k1": deps, "k2": code})
        assert remote.find_layer(registry, "ekiben", "k1") == deps
        assert remote.find_layer(registry, "ekiben", "k2") == code


@needs_registry
def test_a_layer_that_is_there_is_never_read(registry_server: Any, make_image: Any, tmp_path: Path) -> None:
    built = layout.write_layout(make_image(), tmp_path / "out")
    with Registry(registry_server.host) as registry:
        remote.push_image(registry, built, _ref(registry_server.host))
        absent = [layers.recorded(a.name, a.media_type, a.diff_id, a.digest, a.size) for a in built.known_layers()]
        again = remote.push_image(registry, built.sealed(absent), _ref(registry_server.host, "again"))
    assert all(layer.reused for layer in again.layers)
    assert again.digest == built.digest


@needs_registry
@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, 5_000_000])
def test_blobs_of_any_size_go_up_and_come_back(registry_server: Any, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    with Registry(registry_server.host) as registry:
        for known in (None, of_bytes(data)):
            digest = registry.push_blob_stream("a/b", lambda: layers_pieces(data), size, digest=known)
            assert digest == of_bytes(data)
        assert b"".join(registry.pull_blob("a/b", digest, size)) == data
        assert registry.has_blob("a/b", digest)
        assert not registry.has_blob("a/b", of_bytes(b"another"))


def layers_pieces(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), 333_333):
        yield data[start : start + 333_333]


@needs_registry
def test_a_source_that_lies_leaves_nothing_in_the_registry(registry_server: Any) -> None:
    data = b"x" * 3_000_000
    with Registry(registry_server.host) as registry:
        for size, digest in [
            (len(data), of_bytes(b"other")),
            (len(data) - 1, None),
            (len(data) + 1, None),
        ]:
            with pytest.raises(InfrastructureError) as noticed:
                registry.push_blob_stream("x", lambda: layers_pieces(data), size, digest=digest)
            assert noticed.value.code == "digest_mismatch"
    stored = [path for path in (registry_server.folder / "data").rglob("data") if "_uploads" not in path.parts]
    assert stored == []


@needs_registry
def test_weights_damaged_on_disk_never_get_a_manifest(registry_server: Any, make_image: Any, make_model: Any) -> None:
    model = make_model({"churn.txt": b"w" * 5_000_000})
    draft = make_image(model)
    (model.folder / "files" / "churn.txt").write_bytes(b"w" * 4_999_999 + b"!")
    with Registry(registry_server.host) as registry:
        with pytest.raises(InfrastructureError) as noticed:
            remote.push_image(registry, draft, _ref(registry_server.host))
        assert noticed.value.code == "digest_mismatch"
        assert registry.tags("ekiben") == []


@needs_registry
def test_bytes_that_are_not_the_digest_are_refused_on_the_way_down(registry_server: Any) -> None:
    data = b"the right bytes"
    with Registry(registry_server.host) as registry:
        digest = registry.push_blob("x", data)
        (blob,) = [path for path in (registry_server.folder / "data").rglob("data") if "blobs" in path.parts]
        blob.write_bytes(b"the wrong bytes")
        with pytest.raises(InfrastructureError) as noticed:
            list(registry.pull_blob("x", digest))
        assert noticed.value.code == "digest_mismatch"
        with pytest.raises(InfrastructureError):
            list(registry.pull_blob("x", digest, size=3))


@needs_registry
def test_a_layer_is_found_again_by_what_it_was_made_from(registry_server: Any, make_image: Any, tmp_path: Path) -> None:
    built = layout.write_layout(make_image(), tmp_path / "out")
    deps = built.known_layers()[1]
    with Registry(registry_server.host) as registry:
        assert remote.find_layer(registry, "ekiben", "the key") is None
        remote.push_image(registry, built, _ref(registry_server.host))
        remote.remember_layer(registry, "ekiben", "the key", deps)
        found = remote.find_layer(registry, "ekiben", "the key")
        assert found == deps
        assert found is not None
        assert b"".join(found.open()) == b"".join(deps.open())
        assert remote.find_layer(registry, "ekiben", "another key") is None
        registry.delete_manifest("ekiben", registry.head_manifest("ekiben", "churn-1") or "")
        assert registry.head_manifest("ekiben", "churn-1") is None
        assert remote.find_layer(registry, "ekiben", "the key") == deps


@needs_registry
def test_a_note_carries_what_is_to_be_known_of_a_layer_and_only_a_whole_one_counts(
    registry_server: Any, make_image: Any, tmp_path: Path
) -> None:
    built = layout.write_layout(make_image(), tmp_path / "out")
    deps = built.known_layers()[1]
    facts = {"predict": "/predict", "schema": {"name": "é"}, "envs": [["A", "1"]]}
    with Registry(registry_server.host) as registry:
        remote.push_image(registry, built, _ref(registry_server.host))
        remote.remember_layer(registry, "ekiben", "key", deps)
        found = remote.find_layer(registry, "ekiben", "key")
        assert found is not None
        assert found.facts is None
        remote.remember_layer(registry, "ekiben", "key", layers.noted(deps, facts))
        found = remote.find_layer(registry, "ekiben", "key")
        assert found is not None
        assert found.facts == facts
        tag = remote._layer_tag("key")
        data, media_type = registry.get_manifest("ekiben", tag)
        other = canonical_json({**json.loads(data), "config": {**json.loads(data)["config"], "mediaType": "x/y"}})
        registry.push_manifest("ekiben", tag, other, media_type)
        assert remote.find_layer(registry, "ekiben", "key") is None, "an image under a note's tag is no note"
        registry.push_manifest("ekiben", remote._layer_tag("other key"), data, media_type)
        assert remote.find_layer(registry, "ekiben", "other key") is None, "a note counts for its own key alone"


@needs_registry
def test_a_registry_without_tls_is_told_apart_from_one_that_is_away(
    registry_server: Any, certificate: Certificate
) -> None:
    with (
        Registry(registry_server.host, ca=certificate.pem) as registry,  # a CA asks for https, on loopback too
        pytest.raises(UserError) as refused,
    ):
        registry.has_blob("x", of_bytes(b""))
    assert refused.value.code == "registry_speaks_http"
    assert "--insecure" in (refused.value.hint or "")


@needs_registry
def test_skopeo_inspects_what_was_pushed(registry_server: Any, make_image: Any) -> None:
    program = shutil.which("skopeo")
    if program is None:
        pytest.skip("skopeo is not installed")
    with Registry(registry_server.host) as registry:
        pushed = remote.push_image(registry, make_image(), _ref(registry_server.host))
    target = f"docker://{registry_server.host}/ekiben:churn-1"
    done = subprocess.run(
        [program, "inspect", "--tls-verify=false", target], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["Digest"] == pushed.digest


@needs_registry
def test_a_missing_manifest_is_an_error_with_the_specs_code(registry_server: Any) -> None:
    with Registry(registry_server.host) as registry:
        with pytest.raises(remote.RegistryRefused) as refused:
            registry.get_manifest("nothing/here", "latest")
        assert refused.value.spec_codes == ("MANIFEST_UNKNOWN",)
        assert refused.value.code == "registry_manifest_unknown"
        assert registry.tags("nothing/here") == []


def test_a_registry_that_is_not_there_is_worth_trying_again() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    waited: list[float] = []
    with Registry(f"127.0.0.1:{port}", pause=waited.append) as registry:
        with pytest.raises(InfrastructureError) as away:
            registry.has_blob("x", of_bytes(b""))
    assert away.value.code == "registry_unreachable"
    assert f"127.0.0.1:{port}" in away.value.detail
    assert waited == sorted(waited)
    assert len(waited) == 4


# connections that break


@dataclass
class Cutter:
    """A TCP proxy that cuts connections whose client has sent so many bytes, as often as it was told to."""

    target: str
    after: int
    cuts: int
    made: int = 0
    server: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server.getsockname()[1]}"

    def run(self) -> None:
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            host, port = self.target.split(":")
            upstream = socket.create_connection((host, int(port)))
            threading.Thread(target=self._copy, args=(client, upstream, True), daemon=True).start()
            threading.Thread(target=self._copy, args=(upstream, client, False), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket, from_client: bool) -> None:
        passed = 0
        try:
            while data := source.recv(1 << 16):
                passed += len(data)
                target.sendall(data)
                if from_client and passed > self.after and self.made < self.cuts:
                    self.made += 1
                    break
        except OSError:
            pass
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
                # a reset: the kernel goes on taking bytes for a socket that is only shut down
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                each.close()


@pytest.fixture
def cut() -> Iterator[Callable[..., Cutter]]:
    made: list[Cutter] = []

    def start(target: str, after: int, cuts: int) -> Cutter:
        cutter = Cutter(target, after, cuts)
        made.append(cutter)
        threading.Thread(target=cutter.run, daemon=True).start()
        return cutter

    yield start
    for cutter in made:
        cutter.server.close()


@needs_registry
def test_an_upload_that_breaks_is_done_all_the_same(registry_server: Any, cut: Callable[..., Cutter]) -> None:
    data = bytes(range(256)) * 40_000
    cutter = cut(registry_server.host, 4_000_000, 2)
    with Registry(cutter.host, pause=_no_pause) as registry:
        digest = registry.push_blob_stream("x", lambda: layers_pieces(data), len(data))
        assert digest == of_bytes(data)
        assert b"".join(registry.pull_blob("x", digest)) == data
    assert cutter.made == 2


@needs_registry
def test_an_upload_that_always_breaks_ends_with_an_error(registry_server: Any, cut: Callable[..., Cutter]) -> None:
    data = b"x" * 10_000_000
    cutter = cut(registry_server.host, 4_000_000, 1000)
    with Registry(cutter.host, pause=_no_pause) as registry:
        with pytest.raises(InfrastructureError):
            registry.push_blob_stream("x", lambda: layers_pieces(data), len(data))


class Uploads(ThreadingHTTPServer):
    """The specification's uploads, with the things docker-registry does not do: Range after a break, limits, tokens."""

    daemon_threads = True
    request_queue_size = 32

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), UploadsHandler)
        self.part = b""
        self.blobs: dict[str, bytes] = {}
        self.log: list[str] = []
        self.break_after: list[int] = []
        self.largest: int | None = None
        self.fail: list[int] = []
        self.location = ""
        self.lose_answer = False

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        pass


class UploadsHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Uploads

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _place(self) -> dict[str, str]:
        place = {"Location": self.server.location or "/v2/x/blobs/uploads/1?state=secret"}
        if self.server.part:
            place["Range"] = f"0-{len(self.server.part) - 1}"
        return place

    def do_HEAD(self) -> None:
        self.server.log.append("HEAD")
        self._answer(200 if self.path.rsplit("/", 1)[1] in self.server.blobs else 404)

    def do_POST(self) -> None:
        self.server.log.append("POST")
        self.server.part = b""
        if self.server.fail:
            self._answer(self.server.fail.pop(0))
        else:
            self._answer(202, **self._place())

    def do_GET(self) -> None:
        self.server.log.append("GET")
        self._answer(204, **self._place())

    def do_DELETE(self) -> None:
        self.server.log.append("DELETE")
        self._answer(204)

    def do_PATCH(self) -> None:
        length = int(self.headers["Content-Length"])
        span = self.headers.get("Content-Range")
        self.server.log.append(f"PATCH {span or 'all'}")
        if self.server.largest is not None and length > self.server.largest:
            self.close_connection = True
            self._answer(413)
            return
        if span and int(span.split("-")[0]) != len(self.server.part):
            self.rfile.read(length)
            self._answer(416, **self._place())
            return
        if self.server.break_after:
            self.server.part += self.rfile.read(self.server.break_after.pop(0))
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.server.part += self.rfile.read(length)
        self._answer(202, **self._place())

    def do_PUT(self) -> None:
        self.server.log.append("PUT")
        self.server.part += self.rfile.read(int(self.headers["Content-Length"]))
        digest = parse_qs(urlsplit(self.path).query)["digest"][0]
        assert of_bytes(self.server.part) == digest
        self.server.blobs[digest] = self.server.part
        if self.server.lose_answer:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self._answer(201, Location="/")


@pytest.fixture
def uploads() -> Iterator[Uploads]:
    server = Uploads()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_an_upload_goes_on_where_the_registry_says_it_stopped(uploads: Uploads) -> None:
    data = bytes(range(256)) * 20_000
    uploads.break_after = [1_000_001, 500_000]
    opened = []

    def chunks() -> Iterator[bytes]:
        opened.append(1)
        return layers_pieces(data)

    with Registry(uploads.host, pause=_no_pause) as registry:
        digest = registry.push_blob_stream("x", chunks, len(data))
    assert uploads.blobs == {of_bytes(data): data}
    assert digest == of_bytes(data)
    assert [line for line in uploads.log if line.startswith("PATCH")] == [
        "PATCH all",
        f"PATCH 1000001-{len(data) - 1}",
        f"PATCH 1500001-{len(data) - 1}",
    ]
    assert uploads.log.count("POST") == 1
    assert len(opened) == 3


def test_a_limit_on_the_body_means_smaller_pieces(uploads: Uploads) -> None:
    data = bytes(range(256)) * 80_000
    uploads.largest = 10 << 20
    opened = []

    def chunks() -> Iterator[bytes]:
        opened.append(1)
        return layers_pieces(data)

    with Registry(uploads.host, pause=_no_pause) as registry:
        registry.push_blob_stream("x", chunks, len(data))
    assert uploads.blobs == {of_bytes(data): data}
    assert len([line for line in uploads.log if line.startswith("PATCH 8388608-")]) == 1
    assert len(opened) == 2, "the pieces are one pass over the source"


def test_an_answer_that_was_lost_is_not_an_upload_that_was_lost(uploads: Uploads) -> None:
    data = b"x" * 2_000_000
    uploads.lose_answer = True
    with Registry(uploads.host, pause=_no_pause) as registry:
        assert registry.push_blob_stream("x", lambda: layers_pieces(data), len(data)) == of_bytes(data)
    assert uploads.log.count("POST") == 1


def test_a_registry_that_is_busy_is_asked_again(uploads: Uploads) -> None:
    uploads.fail = [503, 429, 500]
    with Registry(uploads.host, pause=_no_pause) as registry:
        registry.push_blob("x", b"data")
    assert uploads.log.count("POST") == 4


def test_an_upload_is_not_led_to_another_scheme(uploads: Uploads) -> None:
    uploads.location = "file:///etc/passwd"
    with Registry(uploads.host, pause=_no_pause) as registry:
        with pytest.raises(EkibenError) as refused:
            registry.push_blob("x", b"data")
    assert refused.value.code == "registry_insecure_redirect"


def test_an_error_shows_neither_the_uploads_state_nor_the_password(uploads: Uploads) -> None:
    uploads.fail = [403]
    with Registry(uploads.host, Credentials("me", "hunter2"), pause=_no_pause) as registry:
        with pytest.raises(EkibenError) as refused:
            registry.push_blob("x", b"data")
        text = registry._redacted("Bearer hunter2 at http://h/v2/x/blobs/uploads/1?_state=secret end")
    assert refused.value.code == "registry_denied"
    assert "hunter2" not in text
    assert "secret" not in text
    assert text.endswith(" end")


def test_credentials_stay_with_the_registry_they_are_for(uploads: Uploads) -> None:
    """An upload that is led to another host goes there without the credentials."""
    seen: list[str | None] = []

    class Elsewhere(UploadsHandler):
        def do_PUT(self) -> None:
            seen.append(self.headers.get("Authorization"))
            super().do_PUT()

    other = Uploads()
    other.RequestHandlerClass = Elsewhere
    threading.Thread(target=other.serve_forever, daemon=True).start()
    try:
        uploads.location = f"http://localhost:{other.server_port}/v2/x/blobs/uploads/1"
        with Registry(uploads.host, Credentials("me", "hunter2"), pause=_no_pause) as registry:
            registry._challenge = ("basic", {})
            registry.push_blob("x", b"data")
    finally:
        other.shutdown()
        other.server_close()
    assert seen == [None]


# authentication and encryption, by docker-registry itself


@needs_registry
def test_a_password_is_asked_for_and_given(start_registry: Any, make_image: Any, tmp_path: Path) -> None:
    passwords = tmp_path / "htpasswd"
    passwords.write_text(f"me:{BCRYPT_OF_HUNTER2}\n")
    server = start_registry(auth=f"auth: {{htpasswd: {{realm: test, path: {passwords}}}}}\n")
    with Registry(server.host, Credentials("me", "hunter2")) as registry:
        pushed = remote.push_image(registry, make_image(), _ref(server.host))
        assert registry.head_manifest("ekiben", "churn-1") == pushed.digest
    for credentials in (None, Credentials("me", "wrong")):
        with Registry(server.host, credentials, pause=_no_pause) as registry:
            with pytest.raises(remote.RegistryRefused) as refused:
                remote.push_image(registry, make_image(), _ref(server.host))
        assert refused.value.code == "registry_unauthorized"
        assert "docker login" in (refused.value.hint or "")


@dataclass(frozen=True)
class Certificate:
    key: rsa.RSAPrivateKey
    pem: Path
    key_pem: Path
    der: bytes


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """Self-signed, for 127.0.0.1 and localhost."""
    folder = tmp_path_factory.mktemp("tls")
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ekiben test")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, key_pem = folder / "cert.pem", folder / "key.pem"
    pem.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key_pem.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return Certificate(key, pem, key_pem, made.public_bytes(serialization.Encoding.DER))


@needs_registry
def test_a_registry_behind_its_own_ca_is_trusted_only_with_that_ca(
    start_registry: Any, certificate: Certificate, make_image: Any, tmp_path: Path
) -> None:
    server = start_registry(
        http=f"  tls: {{certificate: {certificate.pem}, key: {certificate.key_pem}}}\n",
        scheme="https",
        verify=ssl.create_default_context(cafile=certificate.pem),
    )
    with Registry(server.host, ca=certificate.pem) as registry:
        remote.push_image(registry, make_image(), _ref(server.host))
    with Registry(server.host, ca=_another_ca(tmp_path), pause=_no_pause) as registry:
        with pytest.raises(UserError) as refused:
            registry.has_blob("ekiben", of_bytes(b""))
    assert refused.value.code == "registry_certificate"


def _another_ca(folder: Path) -> Path:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "somebody else")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .sign(key, hashes.SHA256())
    )
    file = folder / "another.pem"
    file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return file


def test_a_ca_that_is_no_certificate_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nonsense")
    for file in (tmp_path / "ca.pem", tmp_path / "missing.pem"):
        with pytest.raises(UserError) as refused:
            Registry("127.0.0.1:5000", ca=file)
        assert refused.value.code == "bad_ca"


def test_plain_http_is_spoken_to_loopback_or_when_asked_only(certificate: Certificate) -> None:
    def scheme(*args: Any, **kwargs: Any) -> str:
        with Registry(*args, **kwargs) as registry:
            return registry._root.scheme

    assert scheme("127.0.0.1:5000") == scheme("localhost:5000") == scheme("[::1]:5000") == "http"
    assert scheme("registry.example") == scheme("127.0.0.1.example:5000") == scheme("10.0.0.1:5000") == "https"
    assert scheme("registry.example", insecure=True) == "http"
    assert scheme("127.0.0.1:5000", ca=certificate.pem) == "https"


def test_loopback_is_reached_without_the_proxy(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with Registry(uploads.host, pause=_no_pause) as registry:
        assert not registry.has_blob("x", of_bytes(b"data"))
    with Registry("registry.invalid", insecure=True, pause=_no_pause) as registry:
        with pytest.raises(InfrastructureError, match=r"refused|reached"):
            registry.has_blob("x", of_bytes(b"data"))


class TokenServer(ThreadingHTTPServer):
    """Docker's token authentication: JWTs signed with the key that docker-registry trusts."""

    daemon_threads = True

    def __init__(self, certificate: Certificate) -> None:
        super().__init__(("127.0.0.1", 0), TokenHandler)
        self.certificate = certificate
        self.asked: list[dict[str, str]] = []
        self.seconds = 300

    def token(self, scope: str) -> str:
        kind, name, actions = scope.split(":")
        now = int(datetime.datetime.now(datetime.UTC).timestamp())
        head = {"typ": "JWT", "alg": "RS256", "x5c": [base64.b64encode(self.certificate.der).decode()]}
        claims = {
            "iss": "issuer",
            "aud": "service",
            "sub": "me",
            "exp": now + self.seconds,
            "nbf": now - 5,
            "iat": now,
            "jti": str(len(self.asked)),
            "access": [{"type": kind, "name": name, "actions": actions.split(",")}],
        }

        def packed(data: bytes) -> str:
            return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

        text = f"{packed(json.dumps(head).encode())}.{packed(json.dumps(claims).encode())}"
        signature = self.certificate.key.sign(text.encode(), padding.PKCS1v15(), hashes.SHA256())
        return f"{text}.{packed(signature)}"


class TokenHandler(BaseHTTPRequestHandler):
    server: TokenServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        query = {key: value[0] for key, value in parse_qs(urlsplit(self.path).query).items()}
        self._give(query, self.headers.get("Authorization") == "Basic " + base64.b64encode(b"me:hunter2").decode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        form = {key: value[0] for key, value in parse_qs(body).items()}
        self._give(form, form.get("refresh_token") == "identity")

    def _give(self, asked: dict[str, str], known: bool) -> None:
        self.server.asked.append(asked)
        status, body = (200, {"token": self.server.token(asked["scope"]), "expires_in": self.server.seconds})
        if not known:
            status, body = 401, {"errors": [{"code": "UNAUTHORIZED", "message": "who are you?"}]}
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@needs_registry
@pytest.mark.parametrize("credentials", [Credentials("me", "hunter2"), Credentials(identity_token="identity")])
def test_tokens_are_fetched_for_their_scope_and_kept(
    start_registry: Any, certificate: Certificate, make_image: Any, credentials: Credentials
) -> None:
    tokens = TokenServer(certificate)
    threading.Thread(target=tokens.serve_forever, daemon=True).start()
    try:
        server = start_registry(
            auth="auth:\n  token:\n    service: service\n    issuer: issuer\n"
            f"    realm: http://127.0.0.1:{tokens.server_port}/token\n    rootcertbundle: {certificate.pem}\n"
        )
        with Registry(server.host, credentials) as registry:
            remote.push_image(registry, make_image(), _ref(server.host))
            assert registry.tags("ekiben") == ["churn-1"]
        assert {asked["service"] for asked in tokens.asked} == {"service"}
        scopes = {tuple(sorted(asked["scope"].split(":")[2].split(","))) for asked in tokens.asked}
        assert scopes == {("pull",), ("pull", "push")}
        assert len(tokens.asked) <= 4, "two threads may ask for the same token at once, but not for each request"
        with Registry(server.host, Credentials("me", "wrong")) as registry:
            with pytest.raises(remote.RegistryRefused) as refused:
                registry.tags("ekiben")
        assert refused.value.code == "registry_unauthorized"
        assert "wrong" not in str(refused.value.problem())
    finally:
        tokens.shutdown()
        tokens.server_close()


def test_challenges_are_read_as_registries_write_them() -> None:
    header = 'Bearer realm="https://auth.example/token",service="a, b",scope="repository:x:pull,push",error="x"'
    assert remote._challenges([header])["bearer"] == {
        "realm": "https://auth.example/token",
        "service": "a, b",
        "scope": "repository:x:pull,push",
        "error": "x",
    }
    assert remote._challenges(["Basic realm=test", "Bearer realm=x"]) == {
        "basic": {"realm": "test"},
        "bearer": {"realm": "x"},
    }


def test_the_hash_covers_each_byte_once_whatever_is_sent_again() -> None:
    data = bytes(range(256)) * 100
    feed = remote._Feed(lambda: iter([data[i : i + 700] for i in range(0, len(data), 700)]), len(data), None, None)
    for start, length in [(0, 1000), (500, 3000), (3500, 100), (0, 10), (3600, len(data) - 3600), (9, 20)]:
        assert b"".join(feed.take(start, length)) == data[start : start + length]
    assert feed.finished() == "sha256:" + hashlib.sha256(data).hexdigest()


def test_backoff_grows_and_ends() -> None:
    waits = [remote.backoff(attempt) for attempt in range(10)]
    assert waits == sorted(waits)
    assert max(waits) <= 8
    assert remote.backoff(0, "3") == 3
    assert remote.backoff(0, "100000") == 30
    assert re.fullmatch(r"[0-9.]+", str(remote.backoff(0, "Wed, 21 Oct 2026 07:28:00 GMT")))
