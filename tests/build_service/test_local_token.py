"""The token that a service on loopback makes: what needs it, what does not, and who gets it."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from build_service import local_token

Home = Any  # tests/build_service/conftest.py, which tests cannot import
Model = Callable[..., bytes]
Rows = list[dict[str, float]]


def project() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in (("p/bentofile.yaml", b"service: service:Own\n"), ("p/service.py", b"import bentoml\n")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


NEEDS = [
    ("DELETE", "/models/churn"), ("DELETE", "/models/churn/versions/1"), ("PATCH", "/models/churn/versions/1"),
    ("POST", "/models/churn/versions/1/builds"), ("POST", "/builds/b-1/cancel"), ("PUT", "/deployments/churn"),
    ("POST", "/deployments/churn/rollback"), ("DELETE", "/deployments/churn"), ("POST", "/tokens"),
    ("DELETE", "/tokens/1"), ("POST", "/nothing"), ("PURGE", "/models"), ("POST", "/models/"), ("PUT", "/models"),
]  # fmt: skip


def test_data_and_predictions_need_no_token_and_the_rest_does(
    home: Home, model: Model, rows: Rows, outputs: Callable[[int], list[float]]
) -> None:
    home.start()
    file = home.path / "token"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with home.http(known=False) as client:  # the README's curl lines
        made = client.post("/models?wait=240", files={"file": ("churn.txt", model(1))})
        assert (made.status_code, made.json()["state"]) == (201, "live"), made.text
        again = client.post("/models?wait=240", files={"file": ("churn.txt", model(2))})
        assert again.json()["state"] == "live", again.text
        called = client.post("/inference/churn/predict", json={"inputs": rows})
        assert called.json()["outputs"] == pytest.approx(outputs(2))
        for path in ("/models", "/models/churn/versions/1", "/deployments/churn", "/builds", "/kinds", "/tokens",
                     "/deployments/churn/logs", "/docs", "/metrics"):  # fmt: skip
            assert client.get(path).status_code == 200, path
        begun = client.post("/uploads", json={"filename": "churn.txt"}).json()["id"]
        digest = {"Content-Digest": f"sha-256=:{base64.b64encode(hashlib.sha256(b'x').digest()).decode()}:"}
        assert client.put(f"/uploads/{begun}/parts/1", content=b"x", headers=digest).status_code == 200
        assert client.get(f"/uploads/{begun}").status_code == 200
        assert client.delete(f"/uploads/{begun}").status_code == 204

        for token in (None, "", "Bearer", "Bearer wrong", f"Basic {file.read_text().strip()}"):
            headers = {} if token is None else {"Authorization": token}
            for method, path in NEEDS if token is None else NEEDS[:1]:
                refused = client.request(method, path, headers=headers)
                problem = refused.json()
                assert (refused.status_code, problem["code"]) == (401, "unauthorized"), (method, path)
                assert method in problem["detail"]
                assert f"$(cat {file})" in problem["hint"]
                assert refused.headers["www-authenticate"].startswith("Bearer")
            refused = client.post("/models", files={"file": ("p.tar", project())}, headers=headers)
            assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized"), refused.text
            assert "code" in refused.json()["detail"]
        assert client.get("/deployments/churn").json()["target"]["version"] == 2
        assert len(home.objects()) == 2

        known = {"Authorization": f"Bearer {file.read_text().strip()}"}
        other = client.post("/tokens", json={"name": "script"}, headers=known).json()["token"]
        rolled = client.post("/deployments/churn/rollback", headers={"Authorization": f"Bearer {other}"})
        assert rolled.status_code == 200, rolled.text
        accepted = client.post("/models?deploy=false", files={"file": ("p.tar", project())}, headers=known)
        assert accepted.status_code == 201, accepted.text
    assert file.read_text().strip() not in home.log()
    assert "token" not in str(home.rows("SELECT sha256 FROM tokens"))


def test_a_token_of_the_operators_is_needed_for_everything_as_before(home: Home) -> None:
    home.start(token="of-the-operator", host="127.0.0.1")
    assert not (home.path / "token").exists()
    assert not (home.path / "listening").exists()
    with home.http(known=False) as client:
        for method, path in (("GET", "/models"), ("POST", "/models"), ("POST", "/inference/a/predict")):
            assert client.request(method, path).json()["code"] == "unauthorized"
        assert client.get("/models", headers={"Authorization": "Bearer of-the-operator"}).status_code == 200


def test_a_token_is_kept_over_restarts_and_replaced_if_others_could_have_read_it(tmp_path: Path) -> None:
    file = tmp_path / "token"
    first = local_token.ensure(tmp_path)
    assert local_token.ensure(tmp_path) == first
    file.chmod(0o640)
    second = local_token.ensure(tmp_path)
    assert second != first
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for damaged in ("", "ekb_short", second + "x" * 200, "\xff"):
        file.write_text(damaged, encoding="latin-1")
        replaced = local_token.ensure(tmp_path)
        assert replaced not in (first, second, damaged)
        assert file.read_text() == replaced + "\n"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(second)
    elsewhere.chmod(0o600)
    file.unlink()
    file.symlink_to(elsewhere)
    assert local_token.ensure(tmp_path) != second
    assert not file.is_symlink()
    assert elsewhere.read_text() == second
    file.unlink()
    os.mkfifo(file)
    assert local_token.ensure(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"token", "elsewhere"}
