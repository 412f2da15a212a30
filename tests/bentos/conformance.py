"""What every kind offers, wherever it runs: the endpoints, their schemas, and how bad requests are refused.

The tests know nothing of a kind but its sample, the schemas that it shows, and its entry in tests/bentos/kinds.py. A
place (tests/bentos/test_conformance.py and its siblings) subclasses them and has a fixture `running`.
"""

from __future__ import annotations

import base64
import copy
import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import jsonschema_rs
import pytest
from schemathesis.specs.openapi import definitions

from bentos.serving import ModelFolder, finite
from bentos.serving.golden import compare
from registry.kinds import Kind
from tests.bentos.kinds import Entry

Path = tuple[str | int, ...]

WRONG: tuple[Any, ...] = (None, True, -1, 0.5, 1e30, 10**30, "", "nobody", "\ud800", "☃", [], {}, [[1]], [None])
"""Values that are put in the place of each value of the sample."""


@dataclass(frozen=True)
class Running:
    """A kind's example model, served. `client` asks it as its users do: the paths are those of the model."""

    kind: Kind
    entry: Entry
    place: str
    folder: ModelFolder
    client: httpx.Client
    identity: tuple[str, str] | None = None
    """Name and version that each answer must name; BentoML alone has neither."""
    limit: int | None = None
    """Bytes of a body."""
    metrics: int | None = 200
    """How /metrics is answered on this way; None: they are off."""

    @property
    def sample(self) -> Any:
        return self.folder.sample()

    @property
    def pictures(self) -> bool:
        """Whether requests may be forms with a file, as the documentation shows."""
        operation = self.get("/docs.json").json()["paths"][self.kind.predict]["post"]
        return "multipart/form-data" in operation["requestBody"]["content"]

    def post(self, body: Any, media_type: str = "application/json") -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.client.post(self.kind.predict, content=content, headers={"content-type": media_type})

    def get(self, path: str) -> httpx.Response:
        return self.client.get(path)


def problem(response: httpx.Response, status: int | None = None, code: str | None = None) -> dict[str, Any]:
    """The problem that a request was refused with: a 4xx that names code, field and what is wrong."""
    assert 400 <= response.status_code < 500, response.text
    assert response.headers["content-type"] == "application/problem+json"
    found: dict[str, Any] = response.json()
    assert {"type", "title", "status", "code", "detail"} <= set(found), found
    assert found["status"] == response.status_code
    assert status in (None, response.status_code), found
    assert code in (None, found["code"]), found
    assert "Traceback" not in response.text
    assert "File " not in response.text
    return found


def leaves(body: Any, path: Path = ()) -> Iterator[Path]:
    """Where the values of a JSON document are, those of a list's first item alone."""
    if isinstance(body, dict) and body:
        for key, value in body.items():
            yield from leaves(value, (*path, key))
    elif isinstance(body, list) and body:
        yield from leaves(body[0], (*path, 0))
    else:
        yield path


def objects(body: Any, path: Path = ()) -> Iterator[Path]:
    """Where the objects of a JSON document are."""
    if isinstance(body, dict):
        yield path
        for key, value in body.items():
            yield from objects(value, (*path, key))
    elif isinstance(body, list) and body:
        yield from objects(body[0], (*path, 0))


def at(body: Any, path: Path) -> Any:
    for step in path:
        body = body[step]
    return body


def changed(body: Any, path: Path, value: Any) -> Any:
    """The document with another value at `path`."""
    if not path:
        return value
    made = copy.deepcopy(body)
    at(made, path[:-1])[path[-1]] = value
    return made


class Conformance:
    def test_the_sample_gives_what_was_expected_of_it(self, running: Running) -> None:
        answer = running.post(running.sample)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/json"
        result = compare(running.folder.expected(), answer.json(), 1e-5, 1e-6)
        assert result.difference is None
        assert result.matched == result.rows

    def test_sample_and_answer_are_as_the_schemas_say(self, running: Running) -> None:
        shown = running.get("/metadata").json()
        for schema, body in (
            (shown["input"], running.sample),
            (shown["output"], running.post(running.sample).json()),
        ):
            jsonschema_rs.Draft202012Validator(schema).validate(body)
            assert not jsonschema_rs.Draft202012Validator(schema).is_valid([3]), "a schema that refuses nothing"

    def test_the_golden_sample_can_be_asked_for(self, running: Running) -> None:
        body = running.get("/predict/test").json()
        assert body["verified"] == "expected"
        assert body["matched"] == body["rows"] >= 1
        assert body["input"] == running.sample
        assert compare(running.folder.expected(), body["output"], 1e-5, 1e-6).difference is None

    def test_it_says_what_it_is(self, running: Running) -> None:
        body = running.get("/metadata").json()
        assert (body["kind"], body["predict"]) == (running.kind.name, running.kind.predict)
        assert body["format"] in running.kind.formats
        assert body["digest"] == running.folder.digest
        assert body["classes"] == running.entry.classes
        health = running.get("/health").json()
        assert health["status"] == "ok"
        if running.identity is not None:
            assert (body["name"], str(body["version"])) == running.identity
            assert (health["model"], str(health["version"])) == running.identity
            assert body["verified"] == "expected"
            assert body["checked"]["matched"] == body["checked"]["rows"] >= 1

    def test_classifiers_name_their_classes_and_others_have_none(self, running: Running) -> None:
        answer = running.get("/label")
        if running.entry.classes is None:
            problem(answer, 404, "no_labels")
        else:
            assert answer.json() == {"labels": running.entry.classes}

    def test_probes_and_metrics_answer(self, running: Running) -> None:
        assert running.get("/livez").status_code == 200
        assert running.get("/readyz").status_code == 200
        if running.metrics is not None:
            assert running.get("/metrics").status_code == running.metrics

    def test_the_documentation_is_valid_and_shows_the_real_request(self, running: Running) -> None:
        spec = running.get("/docs.json").json()
        definitions.OPENAPI_31_VALIDATOR.validate(spec)
        operation = spec["paths"][running.kind.predict]["post"]
        body = operation["requestBody"]["content"]["application/json"]
        shown = running.get("/metadata").json()
        assert body["example"] == running.sample
        assert body["schema"] == shown["input"]
        assert operation["responses"]["200"]["content"]["application/json"]["schema"] == shown["output"]
        assert {"/health", "/metadata", "/predict/test"} <= set(spec["paths"])
        assert ("/label" in spec["paths"]) == (running.entry.classes is not None)
        page = running.get("/docs")
        assert page.headers["content-type"].startswith("text/html")
        assert f'["operations", "{operation["tags"][0]}", "{operation["operationId"]}"]' in page.text  # opened at once
        assert running.get("/static_content/swagger-ui-bundle.js").status_code == 200

    def test_every_answer_names_the_version(self, running: Running) -> None:
        if running.identity is None:
            pytest.skip("BentoML alone knows of no version")
        for answer in (running.get("/health"), running.post(running.sample), running.post({}), running.get("/nowhere")):
            assert (answer.headers["ekiben-model"], answer.headers["ekiben-version"]) == running.identity

    @pytest.mark.parametrize(
        ("body", "status", "code"),
        [
            (b"{not json", 400, "invalid_json"),
            (b'{"a": [{"\\ud800": 1}]', 400, "invalid_json"),
            (b"[" * 100_000, 400, "invalid_json"),
            (b"\xff\xfe", 400, "invalid_json"),
            (b"", None, None),
            (b"[]", 422, None),
            (b"null", 422, None),
            (b"3", 422, None),
            (b'"text"', 422, None),
            (b"{}", 422, None),
        ],
        ids=["not json", "cut off", "deep", "not UTF-8", "nothing", "list", "null", "number", "word", "no fields"],
    )
    def test_bodies_that_are_no_request_are_refused(
        self, running: Running, body: bytes, status: int | None, code: str | None
    ) -> None:
        assert problem(running.post(body), status, code)["field"]

    def test_bodies_of_another_media_type_are_refused(self, running: Running) -> None:
        for media_type in ("text/plain", "application/x-www-form-urlencoded", "application/vnd.bentoml+pickle"):
            problem(running.post(running.sample, media_type), 415, "unsupported_media_type")
        if not running.pictures:
            for media_type in ("multipart/form-data", "application/octet-stream", "image/png"):
                problem(running.post(running.sample, media_type), 415, "unsupported_media_type")

    def test_a_picture_may_come_as_json_as_a_form_or_as_it_is(self, running: Running) -> None:
        if not running.pictures:
            pytest.skip("this kind takes no pictures")
        others = {key: str(value) for key, value in running.sample.items() if key != "picture"}
        data = base64.b64decode(running.sample["picture"])
        files = {"picture": ("picture.png", data)}
        form = running.client.post(running.kind.predict, files=files, data=others)
        body = running.client.post(
            running.kind.predict, params=others, content=data, headers={"content-type": "application/octet-stream"}
        )
        wanted = running.post(running.sample).json()
        for answer in (form, body):
            assert answer.status_code == 200, answer.text
            assert compare(wanted, answer.json(), 1e-5, 1e-6).difference is None
        cut = running.client.post(running.kind.predict, files={"picture": ("picture.png", data[: len(data) // 2])})
        assert problem(cut)["field"] == "picture"
        assert problem(running.client.post(running.kind.predict, files={"other": ("a.png", data)}))["field"]

    def test_each_required_field_is_missed_by_its_name(self, running: Running) -> None:
        required = running.get("/metadata").json()["input"].get("required", [])
        for name in required:
            body = {key: value for key, value in running.sample.items() if key != name}
            assert problem(running.post(body), 422)["field"] == name

    def test_a_field_that_nobody_knows_is_named(self, running: Running) -> None:
        for path in objects(running.sample):
            body = changed(running.sample, (*path, "nobody"), 1)
            found = problem(running.post(body), 422)
            assert found["field"].endswith("nobody"), (path, found)

    def test_whatever_stands_in_place_of_a_value_is_answered_or_refused(self, running: Running) -> None:
        """Never a 5xx, never an answer that is not as the schema says; a refusal names the field."""
        answer_schema = jsonschema_rs.Draft202012Validator(running.get("/metadata").json()["output"])
        for path in leaves(running.sample):
            for value in WRONG:
                answer = running.post(changed(running.sample, path, value))
                if answer.status_code == 200:
                    assert value != {}, f"an object in place of {path} was taken"
                    assert finite.place(answer.json()) is None
                    answer_schema.validate(answer.json())
                else:
                    named = problem(answer)["field"]
                    assert named == "body" or named.startswith(str(path[0])), (path, value, answer.text)

    @pytest.mark.parametrize(
        "text",
        ["Infinity", "-Infinity", "1e999", "1" + "0" * 400, "NaN"],
        ids=["infinity", "minus infinity", "1e999", "400 digits", "NaN"],
    )
    def test_numbers_without_an_end_are_refused(self, running: Running, text: str) -> None:
        numbers = [path for path in leaves(running.sample) if type(at(running.sample, path)) in (int, float)]
        if not numbers:
            pytest.skip("this kind takes no number")
        for path in numbers:
            body = json.dumps(changed(running.sample, path, "@")).replace('"@"', text).encode()
            answer = running.post(body)
            if text == "NaN" and answer.status_code == 200:  # a missing value, where the model knows such
                assert finite.place(answer.json()) is None
            else:
                assert problem(answer)["field"] == "body" or problem(answer)["field"].startswith(str(path[0]))

    def test_a_body_that_is_too_large_is_refused_before_it_is_sent(self, running: Running) -> None:
        if running.limit is None:
            pytest.skip("there is no bound of ours in this place")
        url = running.client.base_url
        connection = http.client.HTTPConnection(url.host, url.port or 80, timeout=60)
        connection.putrequest("POST", url.path.rstrip("/") + running.kind.predict, skip_host=True)
        sent = {"Content-Type": "application/json", "Content-Length": str(running.limit + 1)}
        own = {
            name: running.client.headers[name] for name in ("host", "authorization") if name in running.client.headers
        }
        for name, value in ({"Host": url.netloc.decode()} | own | sent).items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        found = json.loads(answer.read())
        connection.close()
        assert (answer.status, answer.headers["content-type"]) == (413, "application/problem+json")
        assert found["code"] == "body_too_large"

    def test_other_methods_and_paths_are_refused(self, running: Running) -> None:
        problem(running.get(running.kind.predict), 405, "method_not_allowed")
        problem(running.client.put(running.kind.predict, json={}), 405, "method_not_allowed")
        problem(running.client.post("/metadata"), 405, "method_not_allowed")
        problem(running.get("/nowhere"), 404, "not_found")

    def test_it_goes_on_answering_after_all_that(self, running: Running) -> None:
        self.test_the_sample_gives_what_was_expected_of_it(running)
