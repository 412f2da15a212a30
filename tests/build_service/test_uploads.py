"""Uploads in parts: what was acknowledged survives both ends, and bad input is refused with words."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import socket
import tarfile
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from registry.digest import of_bytes as digest_of
from registry.manifest import Manifest
from tests.object_stores import Server, leftovers

Home = Any  # tests/build_service/conftest.py, which tests cannot import
Model = Callable[..., bytes]
Rows = list[dict[str, float]]

MIB = 1024 * 1024
SMALL = 5 * MIB
NOISE = random.Random(3).randbytes(11 * MIB)


def padded(model: bytes, size: int = 12 * MIB) -> bytes:
    """A booster of some size: blank lines may follow its trees."""
    return model + b"\n" * (size - len(model))


def archive(model: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in (("churn.txt", model), ("notes.bin", NOISE)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def digest(data: bytes) -> dict[str, str]:
    return {"Content-Digest": f"sha-256=:{base64.b64encode(hashlib.sha256(data).digest()).decode()}:"}


def begin(home: Home, filename: str = "churn.txt", **more: Any) -> str:
    return str(home.post("/uploads", 201, json={"filename": filename, **more})["id"])


def put(home: Home, upload: str, number: int, data: bytes, status: int = 200, **headers: str) -> Any:
    given = digest(data) | headers
    return home.call("PUT", f"/uploads/{upload}/parts/{number}", status, content=data, headers=given)


def cut(data: bytes, size: int = SMALL) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def send(home: Home, filename: str, data: bytes, **more: Any) -> str:
    upload = begin(home, filename, **more)
    for number, part in enumerate(cut(data), 1):
        put(home, upload, number, part)
    return upload


def register(home: Home, upload: str, status: int = 201, wait: int = 0, **fields: Any) -> Any:
    form = {key: value if isinstance(value, str) else json.dumps(value) for key, value in fields.items()}
    return home.post(f"/models?wait={wait}", status, data={"upload_id": upload, **form})


def stored(home: Home, version: Any, path: str) -> bytes:
    with home.http() as client:
        return client.get(f"/models/{version['model']}/versions/{version['version']}/files/{path}").content


def test_a_file_in_parts_goes_live(
    server: Home, model: Model, rows: Rows, outputs: Callable[[int], list[float]]
) -> None:
    data = padded(model(31))
    begun = server.post("/uploads", 201, json={"filename": "parts.txt", "size": len(data)})
    assert (begun["filename"], begun["received"], begun["parts"]) == ("parts.txt", 0, [])
    assert SMALL <= begun["part_size"] <= 64 * MIB
    upload = begun["id"]
    for number, part in enumerate(cut(data), 1):
        kept = put(server, upload, number, part)
        assert kept == {"number": number, "size": len(part), "sha256": hashlib.sha256(part).hexdigest()}
    now = server.get(f"/uploads/{upload}")
    assert (now["received"], [part["number"] for part in now["parts"]]) == (len(data), [1, 2, 3])
    version = register(server, upload, wait=200, sample={"inputs": rows, "outputs": outputs(31)})
    assert (version["model"], version["state"], version["verified"]) == ("parts", "live", "expected")
    assert version["files"] == [{"path": "parts.txt", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}]
    assert server.predict("parts", rows).json()["outputs"] == pytest.approx(outputs(31))
    assert upload in server.objects()  # where it was sent to: nothing of a large file is copied
    folder = server.path / "objects" / "models" / upload
    assert sorted(path.name for path in folder.iterdir()) == ["expected.json", "files", "manifest.json", "sample.json"]
    assert not any(upload in name for name in server.objects() - {upload})

    again = register(server, upload, 200)  # the answer was lost
    assert (again["model"], again["version"], again["digest"]) == ("parts", 1, version["digest"])
    assert stored(server, again, "parts.txt") == data
    assert register(server, upload, 409, name="other")["code"] == "upload_used"
    assert server.get(f"/uploads/{upload}", 404)["code"] == "upload_missing"
    assert server.call("DELETE", f"/uploads/{upload}", 404)["code"] == "upload_missing"
    assert stored(server, again, "parts.txt") == data


@pytest.mark.parametrize("packed", [False, True])
def test_the_same_content_in_parts_and_at_once_is_one_version(server: Home, model: Model, packed: bool) -> None:
    name = f"once-{packed}".lower()
    data = archive(model(32)) if packed else padded(model(32))
    filename = f"{name}.tar" if packed else f"{name}.txt"
    first = server.upload(data, filename, deploy="false", wait=0)
    before = server.objects()
    upload = send(server, filename, data)
    second = register(server, upload, 200, deploy="false")
    assert (second["version"], second["digest"]) == (1, first["digest"])
    assert server.objects() == before | {upload}
    kept = [path.name for path in (server.path / "objects" / "models" / upload).rglob("*")]
    assert kept == ["upload.json"]  # which version it is, for whoever asks again
    assert register(server, upload, 200, deploy="false")["version"] == 1


def test_an_archive_in_parts_is_unpacked(server: Home, model: Model) -> None:
    upload = send(server, "packed.tar", archive(model(33)))
    version = register(server, upload, deploy="false")
    assert (version["model"], [file["path"] for file in version["files"]]) == ("packed", ["churn.txt", "notes.bin"])
    assert stored(server, version, "notes.bin") == NOISE
    manifests = [path.read_bytes() for path in (server.path / "objects" / "models").rglob("manifest.json")]
    (manifest,) = [Manifest.parse(data) for data in manifests if digest_of(data) == version["digest"]]
    assert manifest.model == "churn.txt"
    assert not list((server.path / "objects" / "models").rglob("packed.tar"))
    assert register(server, upload, 200)["version"] == 1


def test_a_refused_version_keeps_its_upload(server: Home, model: Model, rows: Rows) -> None:
    """A wrong sample must not cost the way of a large file."""
    upload = send(server, "kept.txt", padded(model(34)))
    assert register(server, upload, 422, sample=[{"age": 1.0}])["status"] == 422
    assert register(server, upload, 422, labels="nonsense")["code"] == "bad_labels"
    assert server.get(f"/uploads/{upload}", 409)["code"] == "upload_complete"
    assert put(server, upload, 4, b"more", 409)["code"] == "upload_complete"
    version = register(server, upload, sample=rows, deploy="false")
    assert (version["version"], version["model"]) == (1, "kept")
    folder = server.path / "objects" / "models" / upload
    assert sorted(path.name for path in folder.iterdir()) == ["files", "manifest.json", "sample.json"]


def test_an_upload_can_be_given_up(server: Home, model: Model) -> None:
    before = server.objects()
    half, whole = begin(server), send(server, "churn.txt", padded(model(35)))
    put(server, half, 1, NOISE[:SMALL])
    register(server, whole, 422, sample=[{"wrong": 1}])
    for upload in (half, whole):
        server.call("DELETE", f"/uploads/{upload}", 204)
        assert register(server, upload, 404)["code"] == "upload_missing"
    assert server.objects() == before


def test_a_service_that_is_killed_keeps_what_it_acknowledged(home: Home, model: Model) -> None:
    home.start()
    data = padded(model(1), 30 * MIB)
    pieces = cut(data)
    upload = begin(home, size=len(data))
    for number in range(1, len(pieces)):
        put(home, upload, number, pieces[number - 1])
    host, _, port = home.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as line:  # in the middle of the last part
        head = f"PUT /uploads/{upload}/parts/{len(pieces)} HTTP/1.1\r\nHost: {host}:{port}\r\n"
        head += f"Content-Digest: {digest(pieces[-1])['Content-Digest']}\r\nContent-Length: {len(pieces[-1])}\r\n\r\n"
        line.sendall(head.encode() + pieces[-1][: MIB // 2])
        home.kill()
    home.start()
    assert home.get(f"/uploads/{upload}")["received"] == sum(map(len, pieces[:-1]))
    put(home, upload, len(pieces), pieces[-1])  # at most one part is sent again
    version = register(home, upload, deploy="false")
    assert stored(home, version, "churn.txt") == data
    assert home.objects() == {upload}


def test_an_upload_that_stood_still_is_gone(home: Home, model: Model) -> None:
    home.start()
    half, whole = begin(home), send(home, "churn.txt", padded(model(1)))
    put(home, half, 1, NOISE[:SMALL])
    register(home, whole, 422, sample=[{"wrong": 1}])
    home.stop()
    home.start(stale_upload_seconds="0.001")
    for upload in (half, whole):
        assert home.get(f"/uploads/{upload}", 404)["code"] == "upload_missing"
        assert register(home, upload, 404)["code"] == "upload_missing"
    assert home.objects() == set()


# --- bad input -------------------------------------------------------------------------------------------------------

Refusal = Callable[[Home], Any]
FIRST, SECOND = NOISE[:SMALL], NOISE[SMALL : 2 * SMALL]


def begun_with_first(home: Home, **more: Any) -> str:
    upload = begin(home, **more)
    put(home, upload, 1, FIRST)
    return upload


def without_digest(home: Home, **headers: str) -> Any:
    return home.call("PUT", f"/uploads/{begin(home)}/parts/1", 422, content=b"x", headers=headers)


def after_a_small_one(home: Home) -> Any:
    upload = begin(home)
    put(home, upload, 1, b"small")
    return put(home, upload, 2, b"more", 422)


def with_a_file(home: Home) -> Any:
    upload = begun_with_first(home)
    return home.post("/models", 422, files={"file": ("m.txt", b"x")}, data={"upload_id": upload})


def with_a_wrong_sum(home: Home) -> Any:
    upload = begun_with_first(home, sha256="ab" * 32)
    assert register(home, upload, 422)["code"] == "upload_digest_mismatch"
    return register(home, upload, 422)  # and for ever


NOWHERE = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
REFUSALS: dict[str, tuple[str, int, Refusal]] = {
    "unknown": ("upload_missing", 404, lambda home: home.get(f"/uploads/{NOWHERE}", 404)),
    "no id at all": ("upload_missing", 404, lambda home: put(home, "..%5C..%5Cetc", 1, FIRST, 404)),
    "part of an unknown": ("upload_missing", 404, lambda home: put(home, NOWHERE, 1, FIRST, 404)),
    "unknown registered": ("upload_missing", 404, lambda home: register(home, NOWHERE, 404)),
    "unknown given up": ("upload_missing", 404, lambda home: home.call("DELETE", f"/uploads/{NOWHERE}", 404)),
    "bad file name": (
        "bad_filename", 422, lambda home: home.post("/uploads", 422, json={"filename": "../../etc/passwd"})
    ),
    "negative size": (
        "invalid_request", 422, lambda home: home.post("/uploads", 422, json={"filename": "a", "size": -1})
    ),
    "bad sum": (
        "invalid_request", 422, lambda home: home.post("/uploads", 422, json={"filename": "a", "sha256": "0"})
    ),
    "out of order": ("part_out_of_order", 409, lambda home: put(home, begun_with_first(home), 3, SECOND, 409)),
    "number zero": ("bad_part_number", 422, lambda home: put(home, begin(home), 0, FIRST, 422)),
    "too large a number": ("bad_part_number", 422, lambda home: put(home, begin(home), 10**30, FIRST, 422)),
    "no number": ("invalid_request", 422, lambda home: put(home, begin(home), "first", FIRST, 422)),
    "wrong digest": (
        "part_digest_mismatch", 422, lambda home: put(home, begin(home), 1, FIRST, 422, **digest(SECOND))
    ),
    "no digest": ("part_digest_missing", 422, without_digest),
    "other digest": ("part_digest_missing", 422, lambda home: without_digest(home, **{"Content-Digest": "md5=:x=:"})),
    "empty": ("part_empty", 422, lambda home: put(home, begin(home), 1, b"", 422)),
    "too large": ("part_too_large", 413, lambda home: put(home, begin(home), 1, bytes(64 * MIB + 1), 413)),
    "too small": ("part_too_small", 422, lambda home: put(home, begin(home, size=MIB), 1, b"small", 422)),
    "after one too small": ("part_too_small", 422, after_a_small_one),
    "beyond its end": ("part_beyond_end", 422, lambda home: put(home, begin(home, size=MIB), 1, FIRST, 422)),
    "other content": ("part_conflict", 409, lambda home: put(home, begun_with_first(home), 1, SECOND, 409)),
    "nothing sent": ("upload_incomplete", 409, lambda home: register(home, begin(home), 409)),
    "bytes missing": ("upload_incomplete", 409, lambda home: register(home, begun_with_first(home, size=6 * MIB), 409)),
    "wrong sum": ("upload_digest_mismatch", 422, with_a_wrong_sum),
    "with a file": ("file_and_upload", 422, with_a_file),
    "with a run": ("file_and_upload", 422, lambda home: register(home, begun_with_first(home), 422, run_id="a" * 32)),
    "no model": ("unknown_format", 422, lambda home: register(home, begun_with_first(home), 422)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_refused_with_a_way_out(server: Home, case: str) -> None:
    code, status, act = REFUSALS[case]
    problem = act(server)
    assert (problem["code"], problem["status"]) == (code, status), problem
    assert problem.get("hint"), problem


def test_limits_hold_in_parts_too(home: Home, model: Model) -> None:
    home.start(max_upload=str(8 * MIB), max_files="1")
    assert home.post("/uploads", 413, json={"filename": "a", "size": 8 * MIB + 1})["code"] == "upload_too_large"
    upload = begun_with_first(home)
    assert put(home, upload, 2, SECOND, 413)["code"] == "upload_too_large"
    home.kill()
    home.start(max_upload=str(20 * MIB), max_files="1")  # what it knew of the upload is gone too
    put(home, upload, 2, SECOND)
    home.kill()
    home.start(max_upload=str(8 * MIB))
    assert register(home, upload, 413)["code"] == "upload_too_large"
    home.kill()
    home.start(max_files="1")
    assert register(home, send(home, "a.tar", archive(model(1))), 413)["code"] == "archive_too_many_files"
    home.kill()
    home.start(min_free_disk=str(2**60))
    assert home.post("/uploads", 507, json={"filename": "a", "size": 1})["code"] == "disk_full"
    assert put(home, begin(home), 1, FIRST, 507)["code"] == "disk_full"


def test_a_part_that_stands_still_is_given_up(home: Home, until: Callable[..., Any]) -> None:
    home.start(upload_idle_seconds="0.5")
    upload = begin(home)
    host, _, port = home.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as line:
        head = f"PUT /uploads/{upload}/parts/1 HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {SMALL}\r\n"
        line.sendall(f"{head}Content-Digest: {digest(FIRST)['Content-Digest']}\r\n\r\n".encode() + FIRST[:MIB])
        line.settimeout(60)
        answer = b""
        while b"upload_stalled" not in answer:
            more = line.recv(65536)
            assert more, answer
            answer += more
    put(home, upload, 1, FIRST)


def test_whoever_has_no_token_can_do_nothing(home: Home) -> None:
    home.start(token="first-token-of-the-tests", host="127.0.0.1")
    known = {"Authorization": "Bearer first-token-of-the-tests"}
    upload = home.post("/uploads", 201, json={"filename": "a"}, headers=known)["id"]
    for method, path in (
        ("POST", "/uploads"), ("GET", f"/uploads/{upload}"), ("PUT", f"/uploads/{upload}/parts/1"),
        ("DELETE", f"/uploads/{upload}"),
    ):  # fmt: skip
        assert home.call(method, path, 401)["code"] == "unauthorized"
    assert home.get(f"/uploads/{upload}", headers=known)["received"] == 0


# --- at once ---------------------------------------------------------------------------------------------------------


def at_once(*actions: Callable[[], Any]) -> list[Any]:
    results: list[Any] = [None] * len(actions)
    together = threading.Barrier(len(actions))

    def run(number: int, action: Callable[[], Any]) -> None:
        together.wait()
        results[number] = action()

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(actions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_clients_with_the_same_part_do_not_mix(server: Home) -> None:
    """One of them wins; what the others are told is true."""
    contents = [random.Random(seed).randbytes(SMALL) for seed in range(6)]
    upload = begin(server, "mixed.bin")

    def sender(data: bytes) -> Callable[[], httpx.Response]:
        def act() -> httpx.Response:
            with server.http() as client:
                return client.put(f"/uploads/{upload}/parts/1", content=data, headers=digest(data))

        return act

    answers = at_once(*(sender(data) for data in contents))
    won = [data for data, answer in zip(contents, answers, strict=True) if answer.status_code == 200]
    assert len(won) == 1, [answer.text for answer in answers]
    lost = {answer.json()["code"] for answer in answers if answer.status_code != 200}
    assert lost <= {"part_conflict", "upload_busy"}
    assert [part["sha256"] for part in server.get(f"/uploads/{upload}")["parts"]] == [
        hashlib.sha256(won[0]).hexdigest()
    ]


def test_registered_twice_at_once_is_one_version(server: Home, model: Model) -> None:
    data = padded(model(36))
    upload = send(server, "twice.txt", data)

    def act() -> httpx.Response:
        with server.http() as client:
            return client.post("/models", data={"upload_id": upload, "deploy": "false"})

    answers = at_once(act, act, act)
    assert {answer.status_code for answer in answers} <= {200, 201, 409}
    assert sum(answer.status_code == 201 for answer in answers) == 1
    assert {answer.json()["code"] for answer in answers if answer.status_code == 409} <= {"upload_busy"}
    version = register(server, upload, 200)
    assert len(server.get("/models/twice")["items"]) == 1
    assert stored(server, version, "twice.txt") == data


# --- in a bucket -----------------------------------------------------------------------------------------------------


@pytest.mark.needs_minio
@pytest.mark.parametrize("packed", [False, True])
def test_in_a_bucket_too(home: Home, own_minio: Server, model: Model, packed: bool) -> None:
    home.settings |= {
        **own_minio.settings,
    }  # fmt: skip
    home.start()
    data = archive(model(1)) if packed else padded(model(1))
    pieces = cut(data)
    upload = begin(home, "churn.tar" if packed else "churn.txt", size=len(data))
    put(home, upload, 1, pieces[0])
    put(home, upload, 2, pieces[1])
    home.kill()  # the service, in the middle
    home.start()
    kept = home.get(f"/uploads/{upload}")
    assert [(part["size"], part["sha256"]) for part in kept["parts"]] == [
        (SMALL, hashlib.sha256(piece).hexdigest()) for piece in pieces[:2]
    ]
    own_minio.kill()  # and its bucket
    own_minio.start()
    assert put(home, upload, 2, pieces[0], 409)["code"] == "part_conflict"
    assert register(home, upload, 409)["code"] == "upload_incomplete"
    put(home, upload, 3, pieces[2])
    assert register(home, upload, 422, sample=[{"wrong": 1}])["status"] == 422
    version = register(home, upload, deploy="false")
    store = own_minio.store("ekiben")
    names = {"churn.txt", "notes.bin"} if packed else {"churn.txt"}
    assert {file["path"] for file in version["files"]} == names
    expected = {"manifest.json", *(f"files/{name}" for name in names)} | ({"upload.json"} if packed else set())
    assert {info.key.split("/", 2)[2] for info in store.list("models/")} == expected
    assert leftovers(store) == []
    assert stored(home, version, "churn.txt") == (model(1) if packed else data)
    assert register(home, upload, 200)["version"] == 1
