"""Bad input: each has a code of its own, a 4xx, a hint where there is a way out, and leaves nothing behind."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import socket
import tarfile
import threading
import zipfile
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import onnx
import pytest
import safetensors.numpy

Home = Any  # tests/build_service/conftest.py, which tests cannot import
Model = Callable[..., bytes]
Rows = list[dict[str, float]]


def tar(*members: tuple[str, bytes | str | None], sort: bytes = tarfile.REGTYPE) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            if isinstance(content, str):
                entry.type, entry.linkname = sort, content
                archive.addfile(entry)
            elif content is None:
                entry.type = sort
                archive.addfile(entry)
            else:
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def zipped(*members: tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return out.getvalue()


def onnx_pointing_outside() -> bytes:
    helper = onnx.helper
    weight = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[1])
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../../secret")
    shape = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", shape[:1], shape[1:], [weight])
    return helper.make_model(graph).SerializeToString()


def nothing_left(server: Home) -> None:
    assert server.objects() == set()
    for table in ("versions", "builds", "deployments", "revisions", "outbox"):
        assert server.rows(f"SELECT * FROM {table}") == [], table


def hugging_face(weights: str, content: bytes) -> bytes:
    config = json.dumps({"model_type": "deberta-v2", "architectures": ["DebertaV2Model"]}).encode()
    tokenizer = json.dumps({"model": {"type": "WordLevel", "vocab": {}, "unk_token": "?"}}).encode()
    return zipped(("config.json", config), ("tokenizer.json", tokenizer), (weights, content))


TENSOR = safetensors.numpy.save({"weight": np.ones(3, np.float32)})
TEXT = b"any text, but no model\n" * 20
PICKLE = pickle.dumps({"a": [1, 2, 3]})
KERAS = zipped(("config.json", b"{}"), ("metadata.json", b'{"keras_version": "3.8.0"}'), ("model.weights.h5", b"HDF"))

CONTENTS: dict[str, tuple[bytes, str, dict[str, Any], str]] = {
    "no known kind": (TEXT, "m.txt", {}, "unknown_format"),
    "kind that is not there": (b"MODEL", "m.txt", {"kind": "catboost"}, "unknown_kind"),
    "kind that does not fit": (b"MODEL", "m.txt", {"kind": "xgboost"}, "kind_does_not_fit"),
    "bad name": (b"MODEL", "m.txt", {"name": "Not A Name"}, "bad_name"),
    "reserved name": (b"MODEL", "m.txt", {"name": "predict"}, "reserved_name"),
    "weights that need torch": (hugging_face("model.safetensors", TENSOR), "m.zip", {}, "transformers_needs_torch"),
    "weights that end early": (hugging_face("model.safetensors", TENSOR[:-1]), "m.zip", {}, "truncated_model"),
    "pickled weights": (hugging_face("pytorch_model.bin", PICKLE), "m.zip", {}, "pickle_refused"),
    "empty file": (b"", "m.txt", {}, "empty_file"),
    "pickle": (PICKLE, "model.txt", {}, "pickle_refused"),
    "zip of a pickle": (zipped(("model.pkl", PICKLE)), "m.zip", {}, "pickle_refused"),
    "truncated LightGBM": (b"HALF", "m.txt", {}, "truncated_model"),
    "ONNX data outside": (onnx_pointing_outside(), "m.onnx", {}, "onnx_external_data"),
    "parent path": (tar(("../m.txt", TEXT)), "m.tar", {}, "archive_unsafe_path"),
    "absolute path": (tar(("/etc/m.txt", TEXT)), "m.tar", {}, "archive_unsafe_path"),
    "parent path in a zip": (zipped(("../m.txt", TEXT)), "m.zip", {}, "archive_unsafe_path"),
    "symbolic link": (tar(("m.txt", "/etc/passwd"), sort=tarfile.SYMTYPE), "m.tar", {}, "archive_link"),
    "hard link": (tar(("m.txt", "/etc/passwd"), sort=tarfile.LNKTYPE), "m.tar", {}, "archive_link"),
    "device": (tar(("m.txt", None), sort=tarfile.CHRTYPE), "m.tar", {}, "archive_device"),
    "duplicate": (tar(("m.txt", TEXT), ("m.txt", TEXT)), "m.tar", {}, "archive_duplicate"),
    "file named like a model beside it": (
        tar(("a.bin", KERAS), ("evil.keras", b"junk" + KERAS)),
        "m.tar",
        {},
        "unrecognised_model",
    ),
    "case collision": (tar(("m.txt", TEXT), ("M.TXT", TEXT)), "m.tar", {}, "archive_case_collision"),
    "bomb": (gzip.compress(tar(("m.txt", b"\0" * (96 << 20))), 9), "m.tar.gz", {}, "archive_bomb"),
    "cut archive": (gzip.compress(tar(("m.txt", TEXT * 5000)))[:200], "m.tar.gz", {}, "archive_truncated"),
    "sample that does not fit": (b"MODEL", "m.txt", {"sample": [{"weight": 3}]}, "sample_does_not_fit"),
    "sample that is no JSON": (b"MODEL", "m.txt", {"sample": "[{"}, "not_json"),
    "sample with a NaN": (b"MODEL", "m.txt", {"sample": '[{"age": NaN}]'}, "not_json"),
    "sample with a number that is infinite": (b"MODEL", "m.txt", {"sample": '[{"age": 1e999}]'}, "not_json"),
    "sample with half a character": (b"MODEL", "m.txt", {"sample": '[{"age": "\\ud800"}]'}, "not_json"),
    "sample that is endlessly deep": (b"MODEL", "m.txt", {"sample": "[" * 90_000 + "]" * 90_000}, "not_json"),
    "labels with half a character": (b"MODEL", "m.txt", {"labels": '{"a": "\\udfff"}'}, "not_json"),
    "labels that are a list": (b"MODEL", "m.txt", {"labels": "a,b"}, "bad_labels"),
    "expected without sample": (b"MODEL", "m.txt", {"expected": [1.0]}, "expected_without_sample"),
    "unknown field": (b"MODEL", "m.txt", {"replicas": "2"}, "unknown_field"),
    "bad flag": (b"MODEL", "m.txt", {"deploy": "maybe"}, "bad_flag"),
    "bad python": (b"MODEL", "m.txt", {"python": "2.7"}, "bad_python"),
    "path in the file name": (b"MODEL", "../../m.txt", {}, "bad_filename"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_bad_uploads_are_refused_whole(server: Home, model: Model, case: str) -> None:
    content, filename, fields, code = CONTENTS[case]
    content = {b"MODEL": model(), b"HALF": model()[: len(model()) // 2]}.get(content, content)
    form = {key: value if isinstance(value, str) else json.dumps(value) for key, value in fields.items()}
    with server.http() as client:
        response = client.post("/models", files={"file": (filename, content)}, data=form)
    problem = response.json()
    assert problem["code"] == code, problem
    assert 400 <= response.status_code < 500
    assert response.headers["content-type"] == "application/problem+json"
    assert problem["status"] == response.status_code
    assert problem["detail"]
    assert problem.get("hint") or code in ("not_json", "bad_flag", "bad_labels"), problem
    nothing_left(server)


def test_a_form_without_its_file_or_that_is_no_form(server: Home, model: Model) -> None:
    with server.http() as client:
        assert client.post("/models", files={"name": (None, b"a")}).json()["code"] == "missing_file"
        assert client.post("/models", data={"name": "a"}).json()["code"] == "not_an_upload"
        assert client.post("/models", content=model()).json()["code"] == "missing_filename"
        assert client.post("/models?name=a", content=b"").json()["code"] == "empty_file"
        headers = {"content-type": "multipart/form-data"}
        assert client.post("/models", content=b"x", headers=headers).json()["code"] == "bad_form"
        headers = {"content-type": "multipart/form-data; boundary=b"}
        assert client.post("/models", content=b"nonsense", headers=headers).json()["code"] == "bad_form"
        twice = [("file", ("a.txt", model())), ("file", ("A.txt", model()))]
        assert client.post("/models", files=twice).json()["code"] == "duplicate_file"
        fields = [("file", ("a.txt", model())), ("name", (None, b"a")), ("name", (None, b"b"))]
        assert client.post("/models", files=fields).json()["code"] == "repeated_field"
        large = {"file": ("a.txt", model()), "sample": (None, b" " * (2 << 20))}
        assert client.post("/models", files=large).json()["code"] == "field_too_large"
    nothing_left(server)


def test_the_headers_of_a_part_are_bounded(server: Home) -> None:
    body = b'--b\r\nContent-Disposition: form-data; name="' + b"x" * (1 << 20) + b'"\r\n\r\n1\r\n--b--\r\n'
    with server.http() as client:
        answer = client.post("/models", content=body, headers={"content-type": "multipart/form-data; boundary=b"})
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_form")
    nothing_left(server)


def cuts(body: bytes, boundary: bytes) -> dict[str, int]:
    head = body.index(b"\r\n\r\n") + 4
    data = body.index(b"\r\n\r\n", head)
    return {
        "in the headers": head // 2,
        "after the headers": head,
        "in a part's headers": (head + data) // 2,
        "in a file": data + 500,
        "before the last boundary": body.rindex(b"\r\n--" + boundary),
        "in the last boundary": len(body) - 4,
    }


@pytest.mark.parametrize("where", ["in the headers", "after the headers", "in a part's headers", "in a file",
                                   "before the last boundary", "in the last boundary"])  # fmt: skip
def test_a_connection_that_is_cut_leaves_nothing(
    server: Home, model: Model, where: str, until: Callable[..., Any]
) -> None:
    request = httpx.Request("POST", server.url + "/models", files={"file": ("cut.txt", model())})
    head = f"POST /models HTTP/1.1\r\nHost: {urlsplit(server.url).netloc}\r\n".encode()
    for name in ("content-type", "content-length"):
        head += f"{name}: {request.headers[name]}\r\n".encode()
    whole = head + b"\r\n" + request.read()
    boundary = request.headers["content-type"].partition("boundary=")[2].encode()
    cut = cuts(whole, boundary)[where]
    with socket.create_connection(("127.0.0.1", urlsplit(server.url).port)) as connection:
        connection.sendall(whole[:cut])
        if where == "in a file":
            until(lambda: not server.get("/models")["items"])
    until(lambda: server.objects() == set(), lambda: str(server.objects()))
    nothing_left(server)


def test_an_upload_that_stands_still_is_given_up(home: Home, model: Model, until: Callable[..., Any]) -> None:
    home.start(upload_idle_seconds="0.5")
    head = f"POST /models?name=a HTTP/1.1\r\nHost: {urlsplit(home.url).netloc}\r\nContent-Length: 100000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", urlsplit(home.url).port)) as connection:
        connection.sendall(head.encode() + model()[:1000])
        answer = b""
        while b"upload_stalled" not in answer:
            more = connection.recv(65536)
            assert more, answer
            answer += more
    assert answer.startswith(b"HTTP/1.1 408 ")
    until(lambda: home.objects() == set())


def test_the_size_limits(home: Home, model: Model) -> None:
    home.start(max_upload="20000", max_files="2")
    with home.http() as client:
        for files in ({"file": ("a.txt", b"x" * 20001)}, {"file": ("a.txt", b"x" * (40 << 20))}):
            answer = client.post("/models", files=files)
            assert (answer.status_code, answer.json()["code"]) == (413, "upload_too_large")
        endless = client.post("/models?name=a", content=(b"x" * 5000 for _ in range(20)))
        assert (endless.status_code, endless.json()["code"]) == (413, "upload_too_large")
        many = [("file", (f"{number}.txt", b"x")) for number in range(3)]
        assert client.post("/models", files=many).json()["code"] == "too_many_files"
        inside = tar(("a.txt", b"\1" * 15000), ("b.txt", b"\2" * 15000))
        packed = client.post("/models", files={"file": ("a.tar.gz", gzip.compress(inside))})
        assert (packed.status_code, packed.json()["code"]) == (413, "archive_too_large")
    nothing_left(home)


def test_a_full_disk_is_said_before_it_is_full(home: Home, model: Model) -> None:
    home.start(min_free_disk=str(1 << 60))
    with home.http() as client:
        answer = client.post("/models", files={"file": ("a.txt", model())})
    assert (answer.status_code, answer.json()["code"]) == (507, "disk_full")
    assert answer.json()["hint"]
    nothing_left(home)


def test_two_identical_uploads_at_once_are_one_version(home: Home, model: Model, rows: Rows) -> None:
    home.start()
    answers: list[httpx.Response] = []
    together = threading.Barrier(6)

    def send() -> None:
        with home.http() as client:
            together.wait()
            answers.append(client.post("/models", files={"file": ("twin.txt", model())}))

    senders = [threading.Thread(target=send) for _ in range(6)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [201]
    assert {answer.json()["version"] for answer in answers} == {1}
    assert len(home.objects()) == 1
    assert len(home.rows("SELECT * FROM builds")) == 1
    assert home.settled("twin")["revision"] == 1
    assert home.predict("twin", rows).status_code == 200


def test_uploads_that_fail_do_not_disturb_each_other(server: Home, model: Model) -> None:
    """The last folder of a refused upload goes while the first one of another comes."""
    codes: list[str] = []

    def send() -> None:
        with server.http() as client:
            for _ in range(15):
                files = [("file", (f"{number}.txt", TEXT)) for number in range(3)]
                codes.append(client.post("/models", files=files).json()["code"])

    senders = [threading.Thread(target=send) for _ in range(6)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    assert set(codes) == {"unknown_format"}
    nothing_left(server)


def test_a_version_that_callers_could_not_use_is_refused_before_it_is_built(
    home: Home, model: Model, rows: Rows
) -> None:
    home.start()
    home.upload(model(1), sample=rows)
    other = model(2, ("age", "height"))
    before = home.rows("SELECT id FROM builds")
    problem = home.upload(other, status=422, sample=[{"age": 1.0, "height": 2.0}])
    assert problem["code"] == "schema_incompatible"
    assert "force" in problem["hint"]
    assert len(home.objects()) == 1
    assert home.rows("SELECT id FROM builds") == before
    forced = home.upload(other, sample=[{"age": 1.0, "height": 2.0}], force="true")
    assert (forced["version"], forced["state"]) == (2, "live")


def test_expected_values_that_are_wrong_keep_the_old_version(home: Home, model: Model, rows: Rows) -> None:
    home.start()
    home.upload(model(1), sample=rows)
    version = home.upload(model(2), sample=rows, expected=[0.1, 0.2, 0.3, 0.4, 0.5])
    assert version["state"] == "rolled_back"
    assert version["code"] == "golden_sample_failed"
    assert version["reason"]
    deployment = home.settled("churn", "rolled_back")
    assert deployment["target"]["version"] == 1
    assert deployment["reason"] == version["reason"]
    assert home.predict("churn", rows).headers["ekiben-version"] == "1"
    last = home.get("/deployments/churn/events")["items"][0]
    assert (last["type"], last["reason"]) == ("Warning", "RolledBack")


def test_requirements_that_cannot_be_resolved(home: Home, model: Model) -> None:
    home.start()
    version = home.upload(model(1), requirements="numpy==999.0\n")
    assert version["state"] == "failed"
    assert version["code"] not in (None, "build_failed")
    assert "numpy" in version["reason"]
    assert home.works() == []
    deployment = home.settled("churn", "failed")
    assert deployment["reason"] == version["reason"]
    answer = home.predict("churn", [[1, 2, 3]])
    assert (answer.status_code, answer.json()["code"]) == (503, "deployment_failed")


# --- projects ----------------------------------------------------------------------------------------------------

SERVICE = """
import bentoml, os, sys, time

@bentoml.service
class Project:
    @bentoml.api
    def predict(self, inputs: list[float]) -> dict:
        {body}
"""


def project(body: str) -> bytes:
    return tar(
        ("p/bentofile.yaml", b"service: service:Project\n"),
        ("p/requirements.txt", b"bentoml==1.4.40\n"),
        ("p/service.py", SERVICE.format(body=body).encode()),
    )


@pytest.mark.slow
def test_projects_that_crash_hang_or_answer_nonsense_never_take_the_traffic(home: Home) -> None:
    home.start(ready_seconds="20")
    sample = {"inputs": [1.0, 2.0]}
    good = home.upload(project("return {'outputs': [2 * x for x in inputs]}"), "p.tar", name="own", sample=sample)
    assert good["state"] == "live", good
    for body, codes in {
        "os._exit(7)": {"serving_crashed"},
        "return {'outputs': [float('nan')]}": {"golden_sample_failed"},
        "raise RuntimeError('broken')": {"golden_sample_failed"},
        "time.sleep(1000)": {"ready_timeout", "golden_sample_failed"},
    }.items():
        bad = home.upload(project(body), "p.tar", name="own", sample=sample)
        assert bad["state"] == "rolled_back", bad
        assert bad["code"] in codes
        assert bad["reason"]
        with home.http() as client:
            answer = client.post("/inference/own/predict", json=sample)
        assert answer.json() == {"outputs": [2.0, 4.0]}
        assert answer.headers["ekiben-version"] == "1"


def test_a_project_is_refused_where_code_may_not_run(home: Home) -> None:
    home.start(run_code="false")
    with home.http() as client:
        answer = client.post("/models", files={"file": ("p.tar", project("return {}"))})
    assert (answer.status_code, answer.json()["code"]) == (403, "run_code_not_allowed")
    nothing_left(home)


def test_packages_are_refused_where_code_may_not_run(home: Home, model: Model) -> None:
    home.start(run_code="false", allowed_packages="torch")
    for filename, text in (("requirements.txt", "evil\n"), ("requirements.txt", "lightgbm==3.3.5\n")):
        with home.http() as client:
            files = {"file": ("m.txt", model(1)), "requirements": (filename, text)}
            answer = client.post("/models", files=files)
        assert (answer.status_code, answer.json()["code"]) == (403, "run_code_not_allowed")
        assert answer.json()["field"] == "requirements"
    nothing_left(home)
    assert home.upload(model(1), requirements="lightgbm>=4\n", deploy="false", wait=0)["version"] == 1


# --- who may come in ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io:8000"])
def test_a_foreign_host_is_refused(server: Home, host: str) -> None:
    with server.http() as client:
        for path in ("/models", "/inference/first/predict", "/docs", "/metrics"):
            answer = client.get(path, headers={"host": host})
            assert (answer.status_code, answer.json()["code"]) == (421, "foreign_host")
        # a kubelet asks by the pod's address
        assert client.get("/livez", headers={"host": host}).text == "ok\n"


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "https://localhost"])
def test_a_foreign_page_may_not_write(server: Home, model: Model, origin: str) -> None:
    with server.http(headers={"origin": origin}) as client:
        for method, path in (("POST", "/models"), ("DELETE", "/models/a"), ("PUT", "/deployments/a"),
                             ("POST", "/inference/a/predict"), ("POST", "/tokens")):  # fmt: skip
            answer = client.request(method, path, content=b"")
            assert (answer.status_code, answer.json()["code"]) == (403, "foreign_origin")
        assert "access-control-allow-origin" not in client.get("/models").headers
    with server.http(headers={"origin": server.url}) as client:
        assert client.post("/tokens", json={"name": "mine"}).status_code == 201
    nothing_left(server)


def test_pages_that_are_named_may_call_inference_and_nothing_else(home: Home) -> None:
    home.start(host="0.0.0.0", token="first-token", cors_origins="https://shop.example,https://app.example")
    home.url = home.url.replace("0.0.0.0", "127.0.0.1")
    with home.http(headers={"origin": "https://shop.example"}) as client:
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        before = client.options("/inference/churn/predict", headers=asked)  # browsers send no token along
        assert before.status_code == 204
        assert before.headers["access-control-allow-origin"] == "https://shop.example"
        called = client.post("/inference/churn/predict", headers={"authorization": "Bearer first-token"})
        assert called.status_code == 404
        assert called.headers["access-control-allow-origin"] == "https://shop.example"
        assert client.post("/models", headers={"authorization": "Bearer first-token"}).status_code == 403


def test_tokens_elsewhere_than_on_loopback(home: Home) -> None:
    home.start(host="0.0.0.0", token="first-token")
    home.url = home.url.replace("0.0.0.0", "127.0.0.1")
    first = {"authorization": "Bearer first-token"}
    assert home.get("/models", 401)["code"] == "unauthorized"
    assert home.get("/inference/churn/predict", 401)["code"] == "unauthorized"
    for wrong in ("Bearer first", "Bearer", "Basic first-token", "first-token", "Bearer first-token2"):
        assert home.get("/models", 401, headers={"authorization": wrong})["code"] == "unauthorized"
    assert home.get("/models", headers=first) == {"items": [], "next": None}
    made = home.post("/tokens", 201, headers=first, json={"name": "laptop"})
    second = {"authorization": f"Bearer {made['token']}"}
    assert home.get("/models", headers=second) == {"items": [], "next": None}
    listed = home.get("/tokens", headers=second)["items"]
    assert [(token["name"], token["token"]) for token in listed] == [("laptop", None)]
    home.call("DELETE", f"/tokens/{made['id']}", 204, headers=first)
    assert home.get("/models", 401, headers=second)["code"] == "unauthorized"
    with home.http() as client:
        assert client.get("/livez").status_code == 200
        assert client.get("/models").headers["www-authenticate"].startswith("Bearer")
    assert made["token"] not in home.log()
    assert made["token"] not in str(home.rows("SELECT * FROM tokens"))


# --- starts that cannot be ---------------------------------------------------------------------------------------


def start_fails(home: Home, **settings: str) -> str:
    home.start(expect=False, **settings)
    assert home.process.wait(240) != 0
    home.process = None
    text = str(home.log())
    assert "Traceback" not in text, text
    assert "hint:" in text
    return text


def test_a_port_that_is_taken(home: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert "port_taken" in start_fails(home, port=str(other.getsockname()[1]))


def test_a_state_folder_in_use(home: Home) -> None:
    home.start()
    other = type(home)(home.path)
    (home.path / "url").rename(home.path / "url.kept")
    assert "home_in_use" in start_fails(other)
    assert home.get("/models")["items"] == []  # the first goes on


def test_a_state_folder_of_a_newer_format(home: Home) -> None:
    (home.path / "format").write_text("2\n")
    before = sorted(path.name for path in home.path.iterdir())
    assert "state_too_new" in start_fails(home)
    assert {path.name for path in home.path.iterdir()} - set(before) <= {"lock", "server.log"}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"host": "0.0.0.0"}, "EKIBEN_TOKEN"),
        ({"port": "eighty"}, "EKIBEN_PORT"),
        ({"max_upload": "-1"}, "EKIBEN_MAX_UPLOAD"),
        ({"max_upload": "1000", "max_field": "2000"}, "EKIBEN_MAX_FIELD"),
        ({"mlflow": "false", "mlflow_uri": "sqlite:///x.db"}, "EKIBEN_MLFLOW_URI"),
        ({"cors_origins": "shop.example"}, "EKIBEN_CORS_ORIGINS"),
        ({"public_url": "ekiben.example"}, "EKIBEN_PUBLIC_URL"),
        ({"pass_headers": "x-api-key"}, "EKIBEN_PASS_HEADERS"),
        ({"trusted_proxies": "proxy.example"}, "EKIBEN_TRUSTED_PROXIES"),
        ({"database": "nonsense"}, "EKIBEN_DATABASE"),
    ],
)
def test_settings_that_contradict(home: Home, settings: dict[str, str], named: str) -> None:
    assert named in start_fails(home, **settings)
