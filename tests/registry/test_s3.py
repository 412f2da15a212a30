"""The bucket when things go wrong: services that go away, answers that are lost, rights that are missing."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from minio import MinioAdmin
from minio.credentials import StaticProvider

from benchmarks.another_time import preloaded as another_time
from registry import s3 as s3_module
from registry import s3_store
from registry.errors import EkibenError, InfrastructureError
from registry.manifest import File, Manifest
from registry.s3 import Bucket, MultipartMissing, S3Config
from registry.s3_store import S3Store, part_size
from registry.store import ObjectExists, ObjectMissing
from tests.cluster.pki import Authority
from tests.object_stores import ACCESS, SECRET, Server, leftovers

MIB = 1024 * 1024
DEADLINE = 240  # seconds that anything may take on a busy machine
NOBODY = "AKIDNOBODY"


@pytest.fixture
def away(caplog: pytest.LogCaptureFixture) -> Iterator[threading.Event]:
    """Set once the bucket has told the log that the service is away."""
    told = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "trying again" in record.getMessage():
                told.set()

    listener = Listener()
    s3_module.log.addHandler(listener)
    yield told
    s3_module.log.removeHandler(listener)


@dataclass
class Proxy:
    """A TCP proxy that cuts the connection in the middle of answers: of requests that match, as often as it is told."""

    target: Server
    pattern: bytes
    after: int  # bytes of the answer that still get through
    cuts: int
    made: int = 0
    listening: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))

    def start(self) -> Proxy:
        threading.Thread(target=self._run, daemon=True).start()
        return self

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.listening.getsockname()[1]}"

    def close(self) -> None:
        self.listening.close()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.listening.accept()
                upstream = socket.create_connection(("127.0.0.1", self.target.port))
                matched = threading.Event()
                threading.Thread(target=self._ask, args=(client, upstream, matched), daemon=True).start()
                threading.Thread(target=self._answer, args=(upstream, client, matched), daemon=True).start()

    def _ask(self, client: socket.socket, upstream: socket.socket, matched: threading.Event) -> None:
        with suppress(OSError):
            while data := client.recv(1 << 16):
                if self.pattern in data:
                    matched.set()
                upstream.sendall(data)
            upstream.shutdown(socket.SHUT_WR)

    def _answer(self, upstream: socket.socket, client: socket.socket, matched: threading.Event) -> None:
        passed = 0
        with suppress(OSError):
            while data := upstream.recv(1 << 16):
                if matched.is_set() and self.made < self.cuts:
                    allowed = data[: max(0, self.after - passed)]
                    passed += len(data)
                    client.sendall(allowed)
                    if len(allowed) < len(data):
                        self.made += 1
                        break
                else:
                    client.sendall(data)
        for each in (upstream, client):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                each.close()


@pytest.fixture
def through() -> Iterator[Callable[..., tuple[S3Store, Proxy]]]:
    """`through(server, bucket, pattern, …)`: a store that reaches its service by a proxy."""
    proxies = []

    def make(server: Server, bucket: str, pattern: bytes, *, after: int = 0, cuts: int = 1) -> tuple[S3Store, Proxy]:
        server.store(bucket)
        proxies.append(Proxy(server, pattern, after, cuts).start())
        config = S3Config(proxies[-1].endpoint, bucket, ACCESS, SECRET, "us-east-1")
        return S3Store(Bucket(config), first_part=5 * MIB), proxies[-1]

    yield make
    for proxy in proxies:
        proxy.close()


def refused(code: str, action: Callable[[], object]) -> EkibenError:
    with pytest.raises(EkibenError) as caught:
        action()
    assert caught.value.code == code, caught.value
    assert caught.value.hint
    return caught.value


def put(store: S3Store, key: str, data: bytes = b"", *, if_absent: bool = False) -> None:
    writer = store.writer(key)
    writer.write(data)
    writer.commit(if_absent=if_absent)


def read(store: S3Store, key: str) -> bytes:
    with store.open(key) as stream:
        return stream.read()


# --- services that go away -------------------------------------------------------------------------------------------


@pytest.mark.needs_minio
def test_an_upload_goes_on_after_the_service_was_killed_and_started_again(
    own_minio: Server, away: threading.Event
) -> None:
    data = random.Random(1).randbytes(40 * MIB)
    store = own_minio.store("models")
    writer = store.writer("models/1/files/large")
    writer.write(data[: 12 * MIB])
    own_minio.kill()
    sent = threading.Event()

    def rest() -> None:
        for start in range(12 * MIB, len(data), MIB):
            writer.write(data[start : start + MIB])
        writer.commit(if_absent=True)
        sent.set()

    thread = threading.Thread(target=rest)
    thread.start()
    assert away.wait(DEADLINE)
    assert not sent.is_set()
    own_minio.start()
    thread.join(DEADLINE)
    assert sent.is_set()
    assert read(store, "models/1/files/large") == data
    assert leftovers(store) == []


@pytest.mark.needs_minio
def test_a_read_goes_on_after_the_service_was_killed_and_started_again(
    own_minio: Server, away: threading.Event
) -> None:
    data = random.Random(2).randbytes(20 * MIB)
    store = own_minio.store("models")
    put(store, "a", data)
    with store.open("a") as stream:
        first = stream.read(100_000)
        own_minio.kill()
        rest: list[bytes] = []
        thread = threading.Thread(target=lambda: rest.append(stream.read()))
        thread.start()
        assert away.wait(DEADLINE)
        own_minio.start()
        thread.join(DEADLINE)
        assert first + rest[0] == data


@pytest.mark.needs_minio
def test_parts_that_were_acknowledged_outlive_both_sides(own_minio: Server) -> None:
    """An upload in parts that is cut at 90 %: at most one part is sent again."""
    pieces = [random.Random(number).randbytes(5 * MIB) for number in range(10)]
    store = own_minio.store("models")
    upload = store.begin_parts("models/1/files/large")
    for number, piece in enumerate(pieces[:9], 1):
        store.put_part(upload, number, piece, hashlib.sha256(piece).hexdigest())
    own_minio.kill()
    own_minio.start()
    again = own_minio.store("models")
    assert [part.sha256 for part in again.parts(upload)] == [hashlib.sha256(piece).hexdigest() for piece in pieces[:9]]
    again.put_part(upload, 10, pieces[9], hashlib.sha256(pieces[9]).hexdigest())
    again.complete_parts(upload)
    assert read(again, "models/1/files/large") == b"".join(pieces)


def test_answers_that_break_off_are_fetched_again(s3: Server, bucket: str, through: Callable[..., object]) -> None:
    data = random.Random(3).randbytes(3 * MIB)
    store, proxy = through(s3, bucket, b"GET /", after=100_000, cuts=4)
    put(store, "a", data)
    assert read(store, "a") == data
    assert proxy.made == 4


def test_a_writer_knows_its_own_object_when_the_answer_was_lost(
    s3: Server, bucket: str, through: Callable[..., object]
) -> None:
    store, proxy = through(s3, bucket, b"If-None-Match")
    put(store, "models/1/manifest.json", b"mine", if_absent=True)
    assert proxy.made == 1
    with pytest.raises(ObjectExists):
        put(store, "models/1/manifest.json", b"mine", if_absent=True)
    assert read(store, "models/1/manifest.json") == b"mine"


def test_a_lost_answer_to_the_last_step_of_a_large_upload_is_no_loss(
    s3: Server, bucket: str, through: Callable[..., object]
) -> None:
    data = random.Random(4).randbytes(12 * MIB)
    store, proxy = through(s3, bucket, b"<CompleteMultipartUpload")
    put(store, "models/1/files/large", data)
    assert proxy.made == 1
    assert read(store, "models/1/files/large") == data
    assert leftovers(store) == []


def test_parts_whose_answers_are_lost_are_sent_again(s3: Server, bucket: str, through: Callable[..., object]) -> None:
    data = random.Random(5).randbytes(22 * MIB)
    store, proxy = through(s3, bucket, b"partNumber=", cuts=3)
    put(store, "models/1/files/large", data)
    assert proxy.made == 3
    assert read(store, "models/1/files/large") == data


@pytest.mark.needs_minio
def test_a_service_that_stays_away_is_told_in_words(own_minio: Server) -> None:
    own_minio.store("models")
    store = own_minio.store("models", patience=0.5)
    writer = store.writer("models/1/files/large")
    writer.write(bytes(6 * MIB))
    own_minio.kill()
    writer.write(bytes(6 * MIB))
    error = refused("store_unavailable", writer.commit)
    assert error.status == 503
    assert SECRET not in f"{error} {error.hint} {error.__cause__!r}"
    refused("store_unavailable", lambda: store.open("a"))


# --- multipart uploads -----------------------------------------------------------------------------------------------


def test_ten_thousand_parts_hold_the_largest_upload() -> None:
    sizes = [part_size(number, 16 * MIB) for number in range(1, 10_001)]
    assert sum(sizes) > 8 * 64 * 1024 * MIB
    assert sizes == sorted(sizes)
    assert max(part_size(number, 5 * MIB) for number in range(1, 10_001)) < 64 * MIB
    total, number = 0, 0
    while total < 64 * 1024 * MIB:
        number += 1
        total += sizes[number - 1]
    assert sizes[number] <= 64 * MIB  # of which three are held


def test_an_upload_that_is_given_up_leaves_no_parts(s3: Server, bucket: str) -> None:
    store = s3.store(bucket)
    writer = store.writer("models/1/files/large")
    for _ in range(12):
        writer.write(bytes(MIB))
    note = writer._note
    assert note is not None
    assert store._bucket.parts(note.key, note.multipart) is not None
    writer.abort()
    with pytest.raises(MultipartMissing):
        store._bucket.parts(note.key, note.multipart)


def test_an_upload_whose_service_died_is_swept_from_the_bucket(s3: Server, bucket: str) -> None:
    store = s3.store(bucket)
    script = (
        "import os, sys; from pathlib import Path\n"
        "from registry.s3 import Bucket, S3Config; from registry.s3_store import S3Store\n"
        f"store = S3Store(Bucket(S3Config({s3.endpoint!r}, {bucket!r}, {ACCESS!r}, {SECRET!r})), first_part=5 << 20)\n"
        "writer = store.writer('models/1/files/large')\n"
        "writer.write(bytes(12 << 20)); writer._wait(0); os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=DEADLINE).returncode == -9
    (name,) = leftovers(store)
    note = store._read_note(name)
    assert note is not None
    assert len(store._bucket.parts(note.key, note.multipart)) == 2
    store.sweep((), stale=3600, alone=False)
    assert len(store._bucket.parts(note.key, note.multipart)) == 2  # it may go on
    store.sweep((), stale=-5, alone=False)
    assert leftovers(store) == []
    with pytest.raises(MultipartMissing):
        store._bucket.parts(note.key, note.multipart)


def test_a_bucket_is_never_emptied_for_a_database_that_does_not_know_it(s3: Server, bucket: str) -> None:
    store = s3.store(bucket)
    put(store, "models/WHOLE/files/a")
    put(store, "models/WHOLE/manifest.json")
    put(store, "builds/1/log")
    store.sweep((), stale=-5, alone=True)
    assert [info.key for info in store.list("")] == [
        "builds/1/log",
        "models/WHOLE/files/a",
        "models/WHOLE/manifest.json",
    ]


def test_lists_and_deletions_of_many_pages(s3: Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_module, "_PAGE", 3)
    monkeypatch.setattr(s3_store, "_BATCH", 5)
    store = s3.store(bucket)
    keys = [f"models/{number // 4}/files/a b+{number:02}ü" for number in range(17)]
    for key in reversed(keys):
        put(store, key)
    assert [info.key for info in store.list("")] == keys
    assert list(store._bucket.folders("models")) == ["0", "1", "2", "3", "4"]
    store.delete("models")
    assert list(store.list("")) == []
    upload = store.begin_parts("models/1/files/large")
    for number in range(1, 6):
        piece = random.Random(number).randbytes(5 * MIB)
        store.put_part(upload, number, piece, hashlib.sha256(piece).hexdigest())
    assert [part.number for part in store.parts(upload)] == [1, 2, 3, 4, 5]
    store.end_parts(upload)


@pytest.mark.slow
@pytest.mark.needs_minio
def test_memory_does_not_grow_with_the_object(minio: Server, bucket: str) -> None:
    minio.store(bucket)
    script = (
        "import re; from registry.s3 import Bucket, S3Config; from registry.s3_store import S3Store\n"
        f"store = S3Store(Bucket(S3Config({minio.endpoint!r}, {bucket!r}, {ACCESS!r}, {SECRET!r})))\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024\n"
        "chunk = memoryview(bytes(range(256)) * 4096)\n"
        "before = peak(); writer = store.writer('large')\n"
        "for _ in range(1024): writer.write(chunk)\n"
        "writer.commit(); after_write = peak()\n"
        "with store.open('large') as stream:\n"
        "    while stream.read(1 << 20): pass\n"
        "print(before, after_write, peak())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=DEADLINE)
    before, written, whole = map(int, done.stdout.split())
    print(f"MiB resident: {before} at first, {written} after writing 1 GiB, {whole} after reading it")
    assert written - before < 112  # three parts of 16 MiB, and what allocators and connections add
    assert whole - before < 144


# --- rights and names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("access", "secret"), [(ACCESS, "a-wrong-secret"), (NOBODY, "a-wrong-secret")])
def test_wrong_keys_are_told_at_once_and_not_shown(s3: Server, bucket: str, access: str, secret: str) -> None:
    error = refused("store_refused", lambda: s3.store(bucket, access_key=access, secret_key=secret))
    assert secret not in f"{error} {error.hint} {error.__cause__!r}"
    assert secret not in repr(s3.config(bucket, access_key=access, secret_key=secret))


def _limited(server: Server, actions: list[str]) -> dict[str, str]:
    """Keys of a user of MinIO who may do these things only."""
    admin = MinioAdmin(
        endpoint=f"127.0.0.1:{server.port}", credentials=StaticProvider(ACCESS, SECRET), secure=False
    )  # fmt: skip
    name = "limited-" + hashlib.sha256(repr(actions).encode()).hexdigest()[:8]
    statement = {"Effect": "Allow", "Action": actions, "Resource": ["arn:aws:s3:::*"]}
    admin.policy_add(name, policy={"Version": "2012-10-17", "Statement": [statement]})
    admin.user_add(name, "limited-secret")
    admin.policy_set(name, user=name)
    return {"access_key": name, "secret_key": "limited-secret"}


@pytest.mark.needs_minio
def test_a_missing_bucket_that_may_not_be_made_is_told(minio: Server, bucket: str) -> None:
    keys = _limited(minio, ["s3:ListBucket", "s3:GetObject"])
    error = refused("bucket_missing", lambda: minio.store(bucket, **keys))
    assert bucket in error.detail
    assert "EKIBEN_S3_BUCKET" in (error.hint or "")


@pytest.mark.needs_minio
def test_rights_that_are_missing_are_told(minio: Server, bucket: str) -> None:
    full = minio.store(bucket)
    put(full, "models/1/files/a", b"x")
    store = minio.store(bucket, **_limited(minio, ["s3:ListBucket", "s3:GetObject"]))
    assert read(store, "models/1/files/a") == b"x"
    refused("store_refused", lambda: put(store, "b", b"x"))
    refused("store_refused", lambda: store.delete("models"))
    assert read(full, "models/1/files/a") == b"x"


@pytest.mark.needs_minio
def test_a_full_bucket_is_an_error_of_its_own(minio: Server, bucket: str) -> None:
    store = minio.store(bucket)
    admin = MinioAdmin(
        endpoint=f"127.0.0.1:{minio.port}", credentials=StaticProvider(ACCESS, SECRET), secure=False
    )  # fmt: skip
    admin.bucket_quota_set(bucket, MIB)
    error = refused("disk_full", lambda: put(store, "a", bytes(2 * MIB)))
    assert error.status == 507


def test_a_bucket_is_made_once_and_used_again(s3: Server, bucket: str) -> None:
    put(s3.store(bucket), "a", b"kept")
    assert read(s3.store(bucket), "a") == b"kept"


@pytest.mark.needs_minio
def test_keys_come_from_the_environment_where_none_are_set(
    minio: Server, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_ACCESS_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "MINIO_ACCESS_KEY",
        "MINIO_SECRET_KEY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1:9/none")  # a role that nobody gives
    refused("store_credentials", lambda: minio.store(bucket, access_key=None, secret_key=None))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    put(minio.store(bucket, access_key=None, secret_key=None), "a")


# --- what is stored --------------------------------------------------------------------------------------------------


def test_a_bit_that_turned_on_the_services_disk_is_found(s3: Server, bucket: str, tmp_path: Path) -> None:
    mark = random.Random(bucket).randbytes(64)
    data = random.Random(6).randbytes(2 * MIB) + mark + bytes(2 * MIB)
    store = s3.store(bucket, patience=1.0)
    put(store, "models/1/files/a", data)
    file = File("a", len(data), hashlib.sha256(data).hexdigest())
    put(store, "models/1/manifest.json", Manifest(kind="lightgbm", format="lightgbm-text", files=(file,)).to_bytes())
    turned = 0
    for path in (s3.folder / "data").rglob("*"):
        if path.is_file() and mark in (content := path.read_bytes()):
            with path.open("r+b") as stream:
                stream.seek(content.index(mark))
                stream.write(bytes([mark[0] ^ 1]))
            turned += 1
    assert turned == 1
    with pytest.raises(InfrastructureError) as caught:  # the Versity gateway gives it out, MinIO does not
        store.checkout("models/1", tmp_path / "checkouts" / "1")
    assert caught.value.code == ("object_damaged" if s3.program == "versitygw" else "store_unavailable"), caught.value
    assert list((tmp_path / "checkouts").iterdir()) == []


def test_an_object_that_changes_while_it_is_read_is_not_mixed(s3: Server, bucket: str) -> None:
    store = s3.store(bucket)
    put(store, "a", b"1" * 300_000)
    with store.open("a") as stream:
        assert stream.read(10) == b"1" * 10
        put(store, "a", b"2" * 300_000)
        with pytest.raises(ObjectMissing):
            stream.read()


# --- URLs ------------------------------------------------------------------------------------------------------------


def test_presigned_urls_work_without_keys_and_for_one_object(s3: Server, bucket: str) -> None:
    store = s3.store(bucket)
    key = "models/1/files/a b+ü.txt"
    with httpx.Client(trust_env=False, timeout=DEADLINE) as client:
        assert client.put(store.presign_put(key, 600), content=b"result").status_code == 200
        assert read(store, key) == b"result"
        url = store.presign_get(key, 600)
        assert SECRET not in url
        assert client.get(url).content == b"result"
        put(store, "models/1/files/other")
        other = re.sub(r"/files/[^?]*", "/files/other", url)
        assert client.get(other).status_code == 403
        assert client.get(store.presign_get("missing", 600)).status_code == 404
        assert client.put(url, content=b"x").status_code == 403
    assert "X-Amz-Expires=600" in url
    for seconds in (0, 8 * 86400):
        with pytest.raises(ValueError, match="1 second to 7 days"):
            store.presign_get(key, seconds)


def test_presigned_urls_have_the_name_that_builds_know(s3: Server, bucket: str) -> None:
    elsewhere = f"http://localhost:{s3.port}"
    store = s3.store(bucket, presign_endpoint=elsewhere, region=None)
    put(store, "a", b"x")
    url = store.presign_get("a", 60)
    assert url.startswith(f"{elsewhere}/{bucket}/a?")
    with httpx.Client(trust_env=False, timeout=DEADLINE) as client:
        assert client.get(url).content == b"x"
        swapped = urlsplit(url)._replace(netloc=f"127.0.0.1:{s3.port}").geturl()
        assert client.get(swapped).status_code == 403  # the host is signed
    far = s3.store(bucket, presign_endpoint="https://store.example:8443")
    assert far.presign_put("a", 60).startswith(f"https://store.example:8443/{bucket}/a?")


# --- the way there ---------------------------------------------------------------------------------------------------


@pytest.mark.needs_minio
def test_https_with_an_authority_of_ones_own(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    pair = authority.sign("server", "minio", hosts=("127.0.0.1", "localhost"))
    folder = tmp_path / "certificates"
    folder.mkdir()
    (folder / "public.crt").write_bytes(pair.certificate.read_bytes())
    (folder / "private.key").write_bytes(pair.key.read_bytes())
    server = Server("minio", tmp_path / "minio", tls=folder)
    server.start()
    try:
        data = random.Random(7).randbytes(11 * MIB)
        store = server.store("models", ca=authority.own.certificate)
        put(store, "models/1/files/a", data, if_absent=True)
        put(store, "models/1/manifest.json", b"{}", if_absent=True)
        with pytest.raises(ObjectExists):
            put(store, "models/1/manifest.json", b"{}", if_absent=True)
        assert read(store, "models/1/files/a") == data
        assert read(server.store("models", ca=authority.own.certificate, region=None), "models/1/files/a") == data
        other = Authority(tmp_path / "other")
        for ca in (None, other.own.certificate):
            error = refused("store_certificate", lambda ca=ca: server.store("models", ca=ca))
            assert "EKIBEN_S3_CA" in (error.hint or "")
    finally:
        server.kill()


@pytest.mark.needs_minio
def test_proxies_of_the_environment_are_used_but_not_for_this_machine(
    minio: Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MinIO takes a proxy's requests, so it can stand for one."""
    for name in ("HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    put(minio.store(bucket), "a", b"x")  # nobody listens there: it went straight
    monkeypatch.setenv("http_proxy", f"http://user:word@127.0.0.1:{minio.port}")
    far = S3Store(Bucket(S3Config("http://objects.example", bucket, ACCESS, SECRET)))
    far.prepare()
    assert read(far, "a") == b"x"
    monkeypatch.setenv("no_proxy", "objects.example")
    unreachable = S3Store(Bucket(S3Config("http://objects.example", bucket, ACCESS, SECRET, patience=0.1)))
    refused("store_unavailable", unreachable.prepare)


def test_a_store_is_described_without_its_secret() -> None:
    config = S3Config("http://127.0.0.1:9", "models", ACCESS, SECRET)
    for text in (repr(config), repr(Bucket(config)), repr(S3Store(Bucket(config)))):
        assert SECRET not in text


OF_AN_HOUR = """
import sys, time
from registry.s3 import Bucket, S3Config
from registry.s3_store import S3Store
endpoint, bucket, access, secret = sys.argv[1:]
store = S3Store(Bucket(S3Config(endpoint, bucket, access, secret, "us-east-1")))
store.prepare()
writer = store.writer("builds/b/1/spec.json")
writer.write(b"of another hour")
writer.commit()
with store.open("builds/b/1/spec.json") as stream:
    assert stream.read() == b"of another hour"
print(time.time())
print(store.presign_get("builds/b/1/spec.json", 600))
"""


def test_a_clock_that_is_an_hour_off_is_no_hindrance(s3: Server, bucket: str, tmp_path: Path) -> None:
    preloaded = another_time(tmp_path, 3600)
    if preloaded is None:
        pytest.skip("cc is not installed (apt-get install gcc)")
    done = subprocess.run(
        [sys.executable, "-c", OF_AN_HOUR, s3.endpoint, bucket, ACCESS, SECRET],
        env={**os.environ, "LD_PRELOAD": str(preloaded)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    at, url = done.stdout.split()
    assert float(at) - time.time() > 3000
    assert httpx.get(url, trust_env=False).content == b"of another hour"
