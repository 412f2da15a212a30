"""What a model learns of its callers, and what of it they can reach past the router: a real project, really served."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from typing import Any

import psutil
import pytest

Home = Any  # tests/build_service/conftest.py, which tests cannot import

SERVICE = b"""
import bentoml

@bentoml.service
class Listener:
    @bentoml.api
    def predict(self, ctx: bentoml.Context, inputs: list[float]) -> dict:
        ctx.response.headers["X-Hop"] = "1"
        ctx.response.headers["Connection"] = "x-hop"
        return {"outputs": inputs, "headers": dict(ctx.request.headers), "client": ctx.request.client.host}
"""
SECRET = "secret-of-the-caller"
HEADERS = {
    "Authorization": f"Bearer {SECRET}", "Cookie": f"session={SECRET}", "Proxy-Authorization": f"Basic {SECRET}",
    "X-Forwarded-For": "203.0.113.1", "X-Foo": "1", "X-Bar": "2", "Connection": "X-Foo",
}  # fmt: skip


def project() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in (("p/bentofile.yaml", b"service: service:Listener\n"), ("p/service.py", SERVICE),
                              ("p/requirements.txt", b"bentoml==1.4.40\n")):  # fmt: skip
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def listening(home: Home) -> list[Any]:
    """Addresses on which the processes of the state folder's models take connections of the network."""
    found: list[Any] = []
    for process in home.processes():
        found += [each.laddr for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN]
    return found


@pytest.mark.slow
def test_a_model_learns_no_credential_of_its_caller_and_has_no_port_of_its_own(
    home: Home, until: Callable[..., Any]
) -> None:
    home.start()
    made = home.upload(project(), "p.tar", name="listener", sample={"inputs": [1.0]})
    assert made["state"] == "live", made

    def call() -> Any:
        with home.http() as client:
            return client.post("/inference/listener/predict", json={"inputs": [1.0]}, headers=HEADERS)

    answer = call()
    assert answer.status_code == 200, answer.text
    heard = answer.json()["headers"]
    assert SECRET not in answer.text
    assert heard["x-forwarded-for"] == "127.0.0.1"
    assert heard["x-bar"] == "2"
    assert "x-foo" not in heard
    assert answer.json()["client"] == "127.0.0.1"
    assert "x-hop" not in answer.headers
    assert home.processes()
    assert listening(home) == []
    assert SECRET not in home.log()
    assert SECRET not in "".join(path.read_text() for path in (home.path / "deployments").rglob("*.log"))

    home.stop()
    home.start(pass_headers="cookie", trusted_proxies="127.0.0.0/8")
    home.settled("listener")
    heard = until(lambda: answer if (answer := call()).status_code == 200 else None).json()["headers"]
    assert heard["cookie"] == HEADERS["Cookie"]
    assert "authorization" not in heard
    assert heard["x-forwarded-for"] == "203.0.113.1, 127.0.0.1"
