"""What every Bento offers beside its predictions: GET /predict/test, /health, /metadata, /label, /docs, /docs.json."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from bentos.serving import golden
from bentos.serving.about import SCOPE_KEY, About, Served
from bentos.serving.problems import Problem, Problems, Receive, Scope, Send, StartError

if TYPE_CHECKING:
    from starlette.requests import Request

_OUTER_KEY = "ekiben.application"

_PREDICTIONS = "Predictions"
_ABOUT = "About the model"
_OPERATION = "predict"
_OTHERS = {"Infrastructure", "Tasks"}

_DOCS_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<link rel="stylesheet" href="./static_content/swagger-ui.css"></head>
<body><div id="swagger-ui"></div>
<script src="./static_content/swagger-ui-bundle.js"></script>
<script>
const ui = SwaggerUIBundle({{
  url: "./docs.json", dom_id: "#swagger-ui", defaultModelsExpandDepth: -1, tryItOutEnabled: true,
  onComplete: () => ui.layoutActions.show(["operations", "{tag}", "{operation}"], true)
}})
</script>
</body></html>"""


class _Offered(Starlette):
    """Keeps the application it is mounted in, so that /predict/test can send its request through all of it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault(_OUTER_KEY, scope.get("app"))
        await super().__call__(scope, receive, send)


def offer(service: Any) -> Any:
    """Add the routes and the problem+json errors to a kind's BentoML service; its instance carries `about`.

    Use it as the outermost decorator. The routes of a user's service of the same path go first. A service whose
    predict route takes an Upload is sent forms with files and pictures too; any other is sent JSON alone.
    """
    for api in service.apis.values():
        _refuse_unknown_fields(api.input_spec)
    mount(service)
    service.add_asgi_middleware(Problems, json_only=True, uploads=takes_uploads(service))
    return service


def takes_uploads(service: Any) -> bool:
    """Whether the argument of an API is an Upload (bentos/serving/uploads.py)."""
    loaded = sys.modules.get("bentos.serving.uploads")  # imported by such a service
    return loaded is not None and any(issubclass(api.input_spec, loaded.Upload) for api in service.apis.values())


def _refuse_unknown_fields(body: Any) -> None:
    """A misspelt field must not be ignored in silence; a body that says itself what it takes is left alone."""
    if body.model_config.get("extra") is None and not getattr(body, "__pydantic_root_model__", False):
        body.model_config = {**body.model_config, "extra": "forbid"}
        body.model_rebuild(force=True)


def mount(service: Any) -> None:
    """Add the routes alone, to any BentoML service."""
    service.mount_asgi_app(application(service))


def offers(service: Any) -> bool:
    """Whether the routes are mounted already."""
    return any(isinstance(app, _Offered) for app, *_ in service.mount_apps)


def predict_route(service: Any) -> str | None:
    """`/predict` where there is such a route, else the only one; None when it cannot be told."""
    from bentoml._internal.utils.uri import join_paths

    routes = [join_paths(service.path_prefix, api.route) for api in service.apis.values()]
    own = next((r for r in routes if r.endswith("/predict")), None)
    return own or (routes[0] if len(routes) == 1 else None)


def application(service: Any) -> Starlette:
    """The mounted application. The service's instance is looked up when a request comes."""
    documents: dict[str, bytes] = {}

    def served(request: Request) -> tuple[Served, About]:
        from _bentoml_sdk.service import get_current_service

        who: Served = request.scope.get(SCOPE_KEY) or Served()
        about = who.about or getattr(get_current_service(), "about", None)
        return who, about if isinstance(about, About) else About(kind="project")

    async def health(request: Request) -> Response:
        who, _ = served(request)
        return _json({"status": "ok", "model": who.name, "version": who.version})

    async def metadata(request: Request) -> Response:
        who, about = served(request)
        checked = who.checked
        return _json(
            {
                "name": who.name,
                "version": who.version,
                "digest": about.folder.digest if about.folder else who.digest,
                "kind": about.kind,
                "format": about.format,
                "predict": predict_route(service),
                "input": about.input or _body_schema(service, "requestBody"),
                "output": about.output or _body_schema(service, "200"),
                "classes": list(about.classes) if about.classes is not None else None,
                "details": about.details,
                "metrics": who.metrics,
                "labels": who.labels,
                "verified": checked.verified if checked else None,
                "checked": checked.document() if checked else None,
            }
        )

    async def label(request: Request) -> Response:
        _, about = served(request)
        if about.classes is None:
            hint = "only classifiers have labels"
            return _problem(Problem("no_labels", "this model is not a classifier", hint=hint, status=404))
        return _json({"labels": list(about.classes)})

    async def test(request: Request) -> Response:
        who, about = served(request)
        try:
            checked, answer = await golden.check(request.scope[_OUTER_KEY], predict_route(service), about, who)
        except StartError as error:
            return _problem(Problem(error.code, error.message, hint=error.hint, status=500))
        if checked.verified == "none":
            hint = "upload the model with a sample: a body for its predict route"
            return _problem(Problem("no_sample", "this version came without a sample", hint=hint, status=404))
        sample = about.folder.sample() if about.folder else None
        return _json({**checked.document(), "input": sample if sample is not None else about.example, "output": answer})

    async def docs(request: Request) -> Response:
        who, _ = served(request)
        title = f"{_escaped(who.name)} {_escaped(who.version)}"
        return HTMLResponse(_DOCS_PAGE.format(title=title, tag=_PREDICTIONS, operation=_OPERATION))

    async def docs_json(request: Request) -> Response:
        who, about = served(request)
        if who.prefix not in documents:
            documents[who.prefix] = json.dumps(openapi(service, who, about)).encode()
        return Response(documents[who.prefix], media_type="application/json")

    return _Offered(
        routes=[
            Route("/predict/test", test, methods=["GET"]),
            Route("/health", health, methods=["GET"]),
            Route("/metadata", metadata, methods=["GET"]),
            Route("/label", label, methods=["GET"]),
            Route("/docs", docs, methods=["GET"]),
            Route("/docs.json", docs_json, methods=["GET"]),
        ]
    )


def openapi(service: Any, who: Served, about: About) -> dict[str, Any]:
    """BentoML's OpenAPI with the model's real row schema and example, our routes, and servers under the prefix."""
    spec: dict[str, Any] = json.loads(json.dumps(service.openapi_spec.asdict()))
    spec["openapi"] = "3.1.0"  # prefixItems and type lists are of JSON Schema 2020-12
    spec["info"] = {"title": who.name, "version": who.version, "description": f"A {about.kind} model, served by Ekiben"}
    spec["servers"] = [{"url": who.prefix or "/"}]
    paths = spec.setdefault("paths", {})
    problem = {
        "type": "object",
        "properties": {
            "type": {"type": "string"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "code": {"type": "string"},
            "detail": {"type": "string"},
            "field": {"type": "string"},
            "hint": {"type": "string"},
        },
        "required": ["type", "title", "status", "code", "detail"],
    }
    spec.setdefault("components", {}).setdefault("schemas", {})["Problem"] = problem
    refused = {
        "description": "What is wrong, in which field, and what to do",
        "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    route = predict_route(service)
    operation = paths.get(route, {}).get("post") if route else None
    if who.prefix:
        paths.pop("/metrics", None)  # for the platform alone: not routed under a prefix
    spec["tags"] = [
        {"name": _PREDICTIONS},
        {"name": _ABOUT},
        *(t for t in spec.get("tags", []) if t["name"] in _OTHERS),
    ]
    for path in paths.values():
        for each in path.values():
            if isinstance(each, dict) and "Service APIs" in each.get("tags", ()):
                each["tags"] = [_PREDICTIONS]
    if operation is not None:
        operation["operationId"] = _OPERATION  # the page opens it
        content = operation.setdefault("requestBody", {}).setdefault("content", {}).setdefault("application/json", {})
        if about.input is not None:
            content["schema"] = about.input
        example = about.folder.sample() if about.folder else None
        if example is None:
            example = about.example
        if example is not None:
            content["example"] = example
        if takes_uploads(service):
            _describe_uploads(operation, about.input or {})
        responses = operation.setdefault("responses", {})
        for status in [s for s in responses if s != "200"]:
            del responses[status]
        responses["4XX"] = refused
        if about.output is not None:
            answered = responses.setdefault("200", {"description": "Predictions"})
            answered["content"] = {"application/json": {"schema": about.output}}
    for path, summary in {
        "/predict/test": "The golden sample through the real model",
        "/health": "Whether the model answers",
        "/metadata": "Name, version, digest, schemas and metrics",
        **({"/label": "Class labels, in the order of the probabilities"} if about.classes is not None else {}),
    }.items():
        paths.setdefault(path, {})["get"] = {
            "summary": summary,
            "tags": [_ABOUT],
            "responses": {
                "200": {"description": "OK", "content": {"application/json": {"schema": {"type": "object"}}}},
                "4XX": refused,
            },
        }
    return spec


def _describe_uploads(operation: dict[str, Any], schema: dict[str, Any]) -> None:
    """The other two ways to send a picture: as a file of a form, and as the body itself with the rest in the query."""
    from bentos.serving.uploads import PICTURE

    file = {"type": "string", "format": "binary"}
    others = {name: each for name, each in schema.get("properties", {}).items() if name not in (PICTURE, "pictures")}
    form = {"type": "object", "properties": {PICTURE: file, **others}}
    operation["requestBody"]["content"]["multipart/form-data"] = {"schema": form}
    for media_type in ("image/jpeg", "image/png", "image/webp", "application/octet-stream"):
        operation["requestBody"]["content"][media_type] = {"schema": file}
    if others:
        operation["parameters"] = [
            {"name": name, "in": "query", "schema": each, "description": "where the body is the picture itself"}
            for name, each in others.items()
        ]


def _body_schema(service: Any, part: str) -> dict[str, Any] | None:
    """The schema of the predict route's body as BentoML derives it."""
    route = predict_route(service)
    spec = json.loads(json.dumps(service.openapi_spec.asdict()))
    operation = spec.get("paths", {}).get(route, {}).get("post", {})
    place = operation.get("requestBody", {}) if part == "requestBody" else operation.get("responses", {}).get(part, {})
    schema = next((c.get("schema") for c in place.get("content", {}).values()), None)
    if isinstance(schema, dict) and "$ref" in schema:
        name = str(schema["$ref"]).rsplit("/", 1)[-1]
        schema = spec.get("components", {}).get("schemas", {}).get(name, schema)
    return schema


def _json(body: Any) -> Response:
    return Response(json.dumps(body, ensure_ascii=False).encode(), media_type="application/json")


def _problem(problem: Problem) -> Response:
    response: Response = problem.response()
    return response


def _escaped(text: str) -> str:
    from html import escape

    return escape(text)
