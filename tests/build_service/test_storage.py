"""The service with its objects in a bucket, and the settings that say so."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from build_service.settings import Settings
from tests.object_stores import ACCESS, SECRET, Server, leftovers

Home = Any  # tests/build_service/conftest.py, which tests cannot import
ENDPOINT = "http://127.0.0.1:9000"


@pytest.mark.needs_minio
def test_a_model_goes_live_from_a_bucket_and_is_gone_with_its_deletion(
    home: Home,
    own_minio: Server,
    model: Callable[..., bytes],
    rows: list[dict[str, float]],
    outputs: Callable[[int], list[float]],
    until: Callable[..., Any],
    tmp_path: Path,
) -> None:
    (tmp_path / "secret").write_text(SECRET + "\n")
    home.settings |= {
        "EKIBEN_S3_ENDPOINT": own_minio.endpoint, "EKIBEN_S3_BUCKET": "models", "EKIBEN_S3_ACCESS_KEY": ACCESS,
        "EKIBEN_S3_SECRET_KEY_FILE": str(tmp_path / "secret"), "EKIBEN_MLFLOW": "true",
    }  # fmt: skip
    home.start()
    version = home.upload(model(1), "churn.txt", sample={"inputs": rows, "outputs": outputs(1)})
    assert (version["state"], version["verified"]) == ("live", "expected")
    assert home.predict("churn", rows).json()["outputs"] == pytest.approx(outputs(1))
    assert not (home.path / "objects").exists()
    store = own_minio.store("models")
    (location,) = {info.key.rpartition("/files/")[0] for info in store.list("models/") if "/files/" in info.key}
    assert [info.key.removeprefix(f"{location}/") for info in store.list("models/")] == [
        "expected.json", "files/churn.txt", "manifest.json", "sample.json",
    ]  # fmt: skip
    assert leftovers(store) == []
    with home.http() as client:
        assert client.get("/models/churn/versions/1/files/churn.txt").content == model(1)

    again = home.upload(model(1), "churn.txt", status=200, sample={"inputs": rows, "outputs": outputs(1)})
    assert again["version"] == 1
    refused = home.upload(b"no model at all", "other.txt", status=422)
    assert refused["code"]
    assert len(list(store.list("models/"))) == 4  # neither left anything

    def sources() -> list[str]:
        with contextlib.closing(sqlite3.connect(home.path / "mlflow.db", timeout=30)) as connection:
            with contextlib.suppress(sqlite3.OperationalError):  # not made yet
                return [source for (source,) in connection.execute("select source from model_versions")]
        return []

    assert until(sources) == [f"s3://models/{location}/files"]
    for process in home.processes():
        assert SECRET not in "".join(process.environ().values())
    home.kill()
    home.start()  # from what is in the bucket and the database
    home.settled("churn")
    home.call("DELETE", "/deployments/churn", 204)
    home.call("DELETE", "/models/churn/versions/1", 204)
    assert list(store.list("models/")) == []
    assert SECRET not in (home.path / "server.log").read_text()
    home.stop()
    home.start()
    assert list((home.path / "checkouts" / "models").iterdir()) == []


@pytest.mark.needs_minio
def test_a_model_that_was_damaged_in_the_bucket_is_never_built(
    home: Home, own_minio: Server, model: Callable[..., bytes], rows: list[dict[str, float]], until: Callable[..., Any]
) -> None:
    home.settings |= {**own_minio.settings, "EKIBEN_BUILD_ATTEMPTS": "1"}
    home.start()
    home.upload(model(1), "churn.txt", sample=rows, deploy="false", wait=0)
    until(lambda: home.get("/builds")["items"][0]["state"] == "succeeded", home.log)
    home.stop()
    store = own_minio.store("ekiben")
    (key,) = [info.key for info in store.list("models/") if "/files/" in info.key]
    with store.open(key) as stream:
        data = bytearray(stream.read())
    data[len(data) // 2] ^= 1
    writer = store.writer(key)
    writer.write(data)
    writer.commit()
    shutil.rmtree(home.path / "checkouts")
    with contextlib.closing(sqlite3.connect(home.path / "ekiben.db")) as connection, connection:
        connection.execute("update builds set state = 'queued', attempts = 0, result = null")
    home.start()
    (build,) = home.get("/builds")["items"]
    ended = until(
        lambda: found if (found := home.get(f"/builds/{build['id']}"))["state"] == "failed" else None, home.log
    )
    assert key in ended["reason"]
    assert "SHA-256" in ended["reason"]
    assert "upload the model again" in ended["hint"]


@pytest.mark.needs_minio
def test_a_service_that_may_not_use_its_bucket_says_so_and_ends(home: Home, own_minio: Server) -> None:
    wrong = "a-wrong-secret"
    home.start(expect=False, s3_endpoint=own_minio.endpoint, s3_access_key=ACCESS, s3_secret_key=wrong)
    assert home.process.wait(120) == 1
    assert "[store_refused]" in home.log()
    assert "EKIBEN_S3_SECRET_KEY" in home.log()
    assert wrong not in home.log()


GOOD: dict[str, Any] = {"s3_endpoint": ENDPOINT, "s3_access_key": "key", "s3_secret_key": SECRET}


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"s3_bucket": "models"}, "EKIBEN_S3_BUCKET"),
        ({"s3_secret_key": SECRET}, "EKIBEN_S3_SECRET_KEY"),
        ({**GOOD, "s3_access_key": None}, "go together"),
        ({**GOOD, "s3_secret_key": None}, "go together"),
        ({**GOOD, "s3_secret_key_file": "/etc/hostname"}, "both set"),
        ({**GOOD, "s3_secret_key": None, "s3_secret_key_file": "/nowhere/secret"}, "/nowhere/secret"),
        ({**GOOD, "s3_ca": "/etc/hostname"}, "no https URL"),
        ({**GOOD, "s3_endpoint": "https://minio.example", "s3_ca": "/nowhere/ca.pem"}, "/nowhere/ca.pem"),
        ({**GOOD, "s3_endpoint": "127.0.0.1:9000"}, "no URL"),
        ({**GOOD, "s3_endpoint": f"http://key:{SECRET}@127.0.0.1:9000"}, "no URL"),
        ({**GOOD, "s3_endpoint": f"{ENDPOINT}/models"}, "EKIBEN_S3_BUCKET"),
        ({**GOOD, "s3_presign_endpoint": "minio"}, "no URL"),
        ({**GOOD, "s3_bucket": "Models"}, "bucket's name"),
        ({**GOOD, "s3_part_size": 1024}, "5242880"),
    ],
)
def test_settings_that_contradict_each_other_fail_and_show_no_secret(values: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(**values)
    messages = " ".join(problem["msg"] for problem in caught.value.errors())
    assert word in messages
    assert SECRET not in f"{messages} {caught.value}"


def test_secrets_are_not_shown_and_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    settings = Settings(**GOOD)
    assert SECRET not in f"{settings!r} {settings} {settings.model_dump()}"
    assert settings.s3_keys is not None
    assert settings.s3_keys[1].get_secret_value() == SECRET
    from_file = Settings(**{**GOOD, "s3_secret_key": None, "s3_secret_key_file": tmp_path / "secret"})
    assert from_file.s3_keys == settings.s3_keys
    assert Settings(s3_endpoint=f"{ENDPOINT}/").s3_endpoint == ENDPOINT
    assert Settings(s3_endpoint=ENDPOINT).s3_keys is None


@pytest.mark.needs_minio
def test_lists_are_answered_while_many_uploads_wait_for_a_store_that_hangs(
    home: Home, own_minio: Server, model: Callable[..., bytes]
) -> None:
    home.settings |= own_minio.settings
    home.start()
    assert own_minio.process is not None
    uploads = 60  # more than there are worker threads
    with home.http() as client, ThreadPoolExecutor(uploads) as pool:
        own_minio.process.send_signal(signal.SIGSTOP)
        try:
            sent = [
                pool.submit(client.post, f"/models?name=m{n}&filename=churn.txt&deploy=false", content=model(1))
                for n in range(uploads)
            ]
            time.sleep(2)  # long enough for them to be on their way; shorter only makes the test weaker
            assert client.get("/models").json()["items"] == []
            assert not any(each.done() for each in sent)
        finally:
            own_minio.process.send_signal(signal.SIGCONT)
        assert [each.result().status_code for each in sent] == [201] * uploads
