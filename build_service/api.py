"""The API of docs/design.md §10: models, builds, deployments, kinds, tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Body, Depends, Query, Request, Response
from fastapi.security import HTTPBearer
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, StreamingResponse

from build_service import (
    guard,
    identity,
    imports,
    intake,
    local_token,
    metrics,
    recognition,
    shapes,
    state,
    tokens,
    uploads,
    views,
)  # fmt: skip
from build_service.admission import Admission, caller_of
from build_service.platform import Platform
from build_service.reconciler import Reconciler
from build_service.settings import Settings
from build_service.threads import Threads
from registry import versions
from registry.database import Database
from registry.errors import EkibenError, UserError
from registry.kinds import Kinds
from registry.manifest import check_name
from registry.signature import Signature
from registry.store import ObjectStore

_WAIT_POLL = 0.05  # seconds between two looks while one request waits
_LONGEST_WAIT_POLL = 1.0  # however many wait
_LOG_POLL = 0.2
_LONGEST_WAIT = 3600.0
_NEEDS_CODE = frozenset(("run_code_not_allowed",))  # codes of uploads that are refused where code may not run
_TOKEN = "A token of this service. On loopback reading, uploads of data and inference need none."
_UPLOADING = 4  # uploads that are hashed and stored at the same moment


def _problem(status: int, description: str) -> dict[int | str, dict[str, Any]]:
    schema = {
        "type": "object",
        "properties": {
            name: {"type": "integer" if name == "status" else "string"}
            for name in ("type", "title", "status", "code", "detail", "field", "hint")
        },
        "required": ["type", "title", "status", "code", "detail"],
    }
    return {status: {"description": description, "content": {"application/problem+json": {"schema": schema}}}}


_ERRORS: dict[int | str, dict[str, Any]] = {
    **_problem(400, "Malformed"),
    **_problem(401, "No valid token"),
    **_problem(403, "Not allowed"),
    **_problem(404, "Not found"),
    **_problem(409, "Conflict"),
    **_problem(413, "Too large"),
    **_problem(415, "Not a form"),
    **_problem(421, "Foreign host"),
    **_problem(422, "Invalid"),
    **_problem(503, "MLflow or the database does not answer"),
    **_problem(507, "Disk full"),
}


Answer = TypeVar("Answer")


async def _while_waited_for(request: Request, work: Awaitable[Answer], cancel: Callable[[], None]) -> Answer:
    """What the work gives. It is cancelled when the client goes away or the request is cancelled, and waited for in
    any case: nothing may be discarded under a thread that writes. The request's body must have been read."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            cancel()
        await asyncio.wait({working})
        return working.result()
    except recognition.Cancelled:
        raise ClientDisconnect from None
    except asyncio.CancelledError:
        cancel()
        await asyncio.wait({working})
        working.exception()  # seen: it was cancelled
        raise
    finally:
        leaving.cancel()


async def _gone(request: Request) -> None:
    """Returns when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Service:
    """What the endpoints work with; made once by `create_app`."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        store: ObjectStore,
        kinds: Kinds,
        platform: Platform,
        reconciler: Reconciler,
        links: Callable[[], views.Links],
        forget: Callable[[], None],
        examine: recognition.Examine,
        catalogue_environment: Mapping[str, str],
    ) -> None:
        self.settings, self.database, self.store, self.kinds = settings, database, store, kinds
        self.platform, self.reconciler, self._links = platform, reconciler, links
        self._forget, self._examine = forget, examine
        self._importer = imports.Importer(settings, catalogue_environment)
        self._limits = intake.Limits(
            settings.max_upload, settings.max_files, settings.max_field, settings.min_free_disk, settings.root,
            settings.max_form_parts,
        )  # fmt: skip
        self.pace = intake.Pace(settings.upload_idle_seconds, settings.min_upload_rate)
        at_once = settings.recognitions_at_once
        self.uploading, self.examining = Threads(_UPLOADING), Threads(at_once)
        self.uploads_of = Admission(settings.max_uploads, settings.max_caller_uploads)
        self.examinations_of = Admission(at_once, max(1, at_once // 2))
        self.waiting = 0  # requests that are held until a version is settled
        self.uploads = uploads.Uploads(store, database, self._limits, local=settings.s3_endpoint is None)

    @property
    def links(self) -> views.Links:
        return self._links()

    def changed(self) -> None:
        """Something was written: what is remembered of it is forgotten, and the loop looks at once."""
        self._forget()
        self.reconciler.wake()

    def new_intake(self) -> intake.Intake:
        return intake.Intake(self.store, self.kinds, self._limits, self._examine)

    @property
    def limits(self) -> intake.Limits:
        return self._limits

    async def registered(self, taken: intake.Intake, request: Request, caller: str) -> tuple[shapes.VersionView, bool]:
        """The version that a received upload became, and whether it is new."""
        authorized = bool(request.scope.get(guard.AUTHORIZED))
        if (in_parts := taken.upload_id()) is not None:
            async with self.examinations_of.admitted(caller):
                return await self.examining.run(self.register_parts, taken, in_parts, authorized)
        async with self.fetched(taken, request):
            complete = await _while_waited_for(request, self._examined(taken, caller, authorized), taken.cancel)
        return await self.examining.run(self.register, complete, taken.keep)

    async def _examined(self, taken: intake.Intake, caller: str, authorized: bool) -> intake.Upload:
        async with self.examinations_of.admitted(caller):
            return await self.examining.run(self.finish, taken, authorized)

    @asynccontextmanager
    async def fetched(self, taken: intake.Intake, request: Request) -> AsyncIterator[None]:
        """An intake with its files, which it may have to get from MLflow first."""
        source = taken.source()
        if source is None:
            yield
            return
        async with self._importer.fetched(source, request.is_disconnected) as imported:
            await self.uploading.run(taken.take, imported)
            yield

    def live_signature(self, name: str) -> Signature | None:
        """Signature of the version that a deployment of this name serves."""
        with self.database.read() as connection:
            deployed = state.deployment(connection, name)
            if deployed is None or deployed.live is None:
                return None
            version = versions.by_id(connection, state.revision(connection, name, deployed.live).version_id)
        return Signature.from_json(version.signature) if version.signature else None

    def register(self, upload: intake.Upload, keep: Callable[[bool], None]) -> tuple[shapes.VersionView, bool]:
        """The version's row, its build and, if asked for, the deployment's new target: one transaction. `keep` is
        called once it is done, with whether its objects are needed; a request that is cancelled later must not take
        them away."""
        manifest = upload.manifest
        with self.database.write() as connection:
            row, new = versions.create(
                connection,
                name=upload.name,
                digest=manifest.digest,
                kind=manifest.kind,
                format=manifest.format,
                size=manifest.size,
                location=upload.location,
                manifest=manifest.to_json(),
                signature=upload.signature.to_json() if upload.signature else None,
                labels=upload.labels,
                upload_seconds=upload.seconds,
            )
            if new:
                state.enqueue(connection, "version", {"version_id": row.id})
                state.record(
                    connection, f"model/{row.name}", "Uploaded",
                    f"Version {row.number} ({row.kind}, {row.size} bytes) was uploaded.",
                )  # fmt: skip
            damaged = not new and state.is_damaged(connection, row.id)
            if damaged:  # the same content came again, and whole
                versions.change(connection, row.id, location=upload.location)
            build = self.submit_build(connection, row, None)
            if upload.deploy:
                self._target(connection, row.name, row, build)
            view = views.version(connection, row, self.links)
        keep(new or damaged)
        if damaged:
            self.store.delete(row.location)
        metrics.UPLOADS.labels("created" if new else "existing").inc()
        self.changed()
        return view, new

    def finish(self, taken: intake.Intake, authorized: bool) -> intake.Upload:
        """The upload, whole. On loopback a caller without a token may send data, and nothing that runs as code."""
        try:
            may_run = self.settings.allow_code and authorized
            return taken.finish(self.live_signature, may_run, self.settings.allowed_packages)
        except UserError as error:
            if error.code not in _NEEDS_CODE or not self.settings.allow_code:
                raise
            file = self.settings.root / local_token.FILE
            raise guard.needs_token("This upload brings code that runs on this machine", file) from error

    def register_parts(self, taken: intake.Intake, upload: str, authorized: bool) -> tuple[shapes.VersionView, bool]:
        """As `register`, for the file of an upload in parts. May be repeated until it was answered."""
        with self.uploads.claimed(upload):
            earlier = self.uploads.registered(upload)
            if earlier is not None:
                if taken.given_name not in (None, earlier.name):
                    raise UserError(
                        "upload_used", f"The upload became {earlier.title} already.", field="upload_id", status=409,
                        hint="Begin a new upload; for the same file under another name too.",
                    )  # fmt: skip
                self.uploads.finished(upload, earlier.name, earlier.number)
                taken.discard()
                return self.version_view(earlier.name, earlier.number), False
            try:
                taken.adopt(self.uploads.complete(upload))
                complete = self.finish(taken, authorized)
                view, new = self.register(complete, taken.keep)
            except BaseException:
                taken.discard()  # while nobody else has the upload
                raise
            self.uploads.finished(upload, view.model, view.version)
            return view, new

    def submit_build(self, connection: Connection, row: versions.Version, image: dict[str, Any] | None) -> state.Build:
        image = image or identity.image_of(self.settings, row)
        whole = identity.of_build(row, self._kind_digest(row.kind), image, self.settings)
        return state.submit_build(connection, identity.build_id(whole), whole, row.id, image)

    def _kind_digest(self, name: str) -> str | None:
        """Asked for each time: a kind that is being worked on gives new builds without a restart. A project's code is
        in its version."""
        return None if name == intake.PROJECT else self.kinds.named(name).digest()

    def _target(self, connection: Connection, name: str, row: versions.Version, build: state.Build) -> None:
        """A new upload takes over a deployment of its name as it is set up; else it makes one."""
        current = state.deployment(connection, name)
        values: dict[str, Any] = {}
        if current is None:
            values = {"replicas": 1, "resources": {}, "strategy": "rolling", "autoscale": None}
        state.target(connection, name, row.id, build.id, **values)

    def version_view(self, name: str, number: int) -> shapes.VersionView:
        with self.database.read() as connection:
            return views.version(connection, versions.find(connection, name, number), self.links)

    def deployment_view(self, connection: Connection, row: state.Deployment) -> shapes.DeploymentView:
        return self.deployment_views(connection, [row])[0]

    def deployment_views(self, connection: Connection, rows: Sequence[state.Deployment]) -> list[shapes.DeploymentView]:
        return views.deployments(connection, rows, self.platform.ready, self.links)


def router(service: Service) -> APIRouter:
    """All endpoints. They are `def` where they only ask the database: FastAPI runs those in threads."""
    # The guard checks the token. This says in the document, and so in /docs, that one can be given.
    api = APIRouter(responses=_ERRORS, dependencies=[Depends(HTTPBearer(auto_error=False, description=_TOKEN))])
    database = service.database

    api.include_router(uploads.router(service.uploads, service.uploading, service.pace))

    # --- models -----------------------------------------------------------------------------------------------------

    upload_body = {
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "description": "A model: `file`, or the `upload_id` of an upload in parts, or `run_id` (and "
                        "`artifact_path`) or `model_uri` of MLflow.",
                        "properties": {
                            "file": {
                                "type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1,
                                "description": "The model's files, or one archive.",
                            },
                            "upload_id": {"type": "string", "description": "An upload in parts, in place of a file."},
                            "run_id": {"type": "string", "description": "A run of MLflow, in place of a file."},
                            "artifact_path": {"type": "string", "description": "Default: the run's one model."},
                            "model_uri": {"type": "string", "description": "models:/NAME/VERSION, models:/NAME@ALIAS"},
                            "name": {"type": "string", "maxLength": 40, "description": "Default: the file's stem."},
                            "kind": {"type": "string", "description": "Default: found from the content."},
                            "sample": {"type": "string", "description": "JSON: rows, or a request body."},
                            "expected": {"type": "string", "description": "JSON: the outputs of the sample."},
                            "requirements": {"type": "string", "description": "requirements.txt, pylock.toml, uv.lock"},
                            "python": {"type": "string"},
                            "labels": {"type": "string", "description": "JSON object, or key=value,…"},
                            "deploy": {"type": "string", "enum": ["true", "false"], "default": "true"},
                            "force": {"type": "string", "enum": ["true", "false"], "default": "false"},
                        },
                    }
                },
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            },
        }
    }  # fmt: skip

    @api.post(
        "/models", status_code=201, tags=["models"], openapi_extra=upload_body, operation_id="upload_model",
        responses={200: {"model": shapes.VersionView, "description": "The same content was already there"}},
    )  # fmt: skip
    async def upload(
        request: Request,
        response: Response,
        wait: Annotated[float, Query(ge=0, le=_LONGEST_WAIT, description="Seconds to hold the answer.")] = 0,
    ) -> shapes.VersionView:
        """Upload a model: multipart form, or a raw body with ?name=&filename=; or name one of MLflow's in place of a
        file. Answers before it is built, unless ?wait= is given."""
        caller = caller_of(request.scope)
        async with service.uploads_of.admitted(caller, service.settings.upload_idle_seconds):
            taken = service.new_intake()
            try:
                declared = request.headers.get("content-length", "")
                await intake.receive(
                    taken,
                    request.stream(),
                    request.headers.get("content-type", ""),
                    dict(request.query_params),
                    int(declared) if declared.isdigit() else None,
                    service.limits,
                    service.pace,
                    service.uploading,
                )
                view, new = await service.registered(taken, request, caller)
            except BaseException as error:
                # A cancelled request or a client that went away too: nothing of it stays.
                await asyncio.shield(service.uploading.run(taken.discard))
                metrics.UPLOADS.labels("refused" if isinstance(error, EkibenError) else "cut").inc()
                raise
        response.status_code = 201 if new else 200
        if wait:
            view = await _settled(service, request, view, wait, deployed=taken.deploys)
        return view

    @api.get("/models", tags=["models"], operation_id="list_models")
    def models() -> shapes.Page[shapes.ModelView]:
        with database.read() as connection:
            return shapes.Page(items=views.models(connection, service.links))

    @api.get("/models/{name}", tags=["models"], operation_id="list_versions")
    def model_versions(name: str) -> shapes.Page[shapes.VersionView]:
        with database.read() as connection:
            rows = versions.of_model(connection, name)
            if not rows:
                versions.find(connection, name, 0)
            return shapes.Page(items=[views.version(connection, row, service.links) for row in rows])

    @api.get("/models/{name}/versions/{number}", tags=["models"], operation_id="get_version")
    def model_version(name: str, number: int) -> shapes.VersionView:
        return service.version_view(name, _positive(number))

    @api.patch("/models/{name}/versions/{number}", tags=["models"], operation_id="label_version")
    def label_version(name: str, number: int, wanted: shapes.LabelsRequest) -> shapes.VersionView:
        """Set labels of a version, or take some away: an evaluation, a decision. Its digest does not change."""
        with database.write() as connection:
            row = versions.find(connection, name, _positive(number))
            kept = {key: value for key, value in row.labels.items() if key not in wanted.labels}
            given = {key: value for key, value in wanted.labels.items() if value is not None}
            versions.change(connection, row.id, labels=intake.check_labels({**kept, **given}))
            gone = sorted(row.labels.keys() - kept.keys() - given.keys())
            state.enqueue(connection, "labels", {"version_id": row.id, "gone": gone})
            view = views.version(connection, versions.find(connection, name, number), service.links)
        service.changed()
        return view

    @api.get(
        "/models/{name}/versions/{number}/files/{path:path}",
        tags=["models"],
        response_class=FileResponse,
        operation_id="get_file",
    )
    def model_file(name: str, number: int, path: str) -> Response:
        with database.read() as connection:
            row = versions.find(connection, name, _positive(number))
        known = {file["path"]: file for file in row.manifest["files"]}
        if path not in known:
            raise UserError(
                "file_not_found", f"{row.title} has no file {path[:200]!r}.", field="path",
                hint=f"GET /models/{name}/versions/{number} lists its files.", status=404,
            )  # fmt: skip
        stream = service.store.open(f"{row.location}/files/{path}")

        def chunks() -> Iterator[bytes]:
            with closing(stream):
                while chunk := stream.read(1 << 20):
                    yield chunk

        headers = {
            "Content-Length": str(known[path]["size"]),
            "ETag": f'"sha256:{known[path]["sha256"]}"',
            "X-Content-Type-Options": "nosniff",
            "Content-Disposition": "attachment",
        }
        return StreamingResponse(chunks(), media_type="application/octet-stream", headers=headers)

    @api.delete("/models/{name}/versions/{number}", status_code=204, tags=["models"], operation_id="delete_version")
    def delete_version(name: str, number: int) -> None:
        with database.write() as connection:
            row = versions.find(connection, name, _positive(number))
            _refuse_if_used(connection, row)
            _delete(connection, row)
        service.changed()
        service.store.delete(row.location)

    @api.delete("/models/{name}", status_code=204, tags=["models"], operation_id="delete_model")
    def delete_model(name: str) -> None:
        with database.write() as connection:
            rows = versions.of_model(connection, name)
            if not rows:
                versions.find(connection, name, 0)
            for row in rows:
                _refuse_if_used(connection, row)
            for row in rows:
                _delete(connection, row)
        service.changed()
        for row in rows:
            service.store.delete(row.location)

    @api.post("/models/{name}/versions/{number}/builds", status_code=202, tags=["builds"], operation_id="submit_build")
    def submit_build(
        name: str, number: int, wanted: Annotated[shapes.BuildRequest | None, Body()] = None
    ) -> shapes.BuildView:
        """Build a version, or make its image. An equal build is joined."""
        image = identity.image_order(service.settings, wanted.image) if wanted and wanted.image else None
        with database.write() as connection:
            row = versions.find(connection, name, _positive(number))
            made = service.submit_build(connection, row, image)
            view = views.build(connection, made, service.links)
        service.changed()
        return view

    # --- builds -----------------------------------------------------------------------------------------------------

    @api.get("/builds", tags=["builds"], operation_id="list_builds")
    def builds(
        after: Annotated[float | None, Query(description="`next` of the page before.")] = None,
        limit: Annotated[int, Query(ge=1, le=500)] = 100,
    ) -> shapes.Page[shapes.BuildView]:
        with database.read() as connection:
            rows = state.builds_page(connection, after, limit)
            items = views.builds(connection, rows, service.links)
        return shapes.Page(items=items, next=repr(rows[-1].created) if len(rows) == limit else None)

    @api.get("/builds/{build_id}", tags=["builds"], operation_id="get_build")
    def build(build_id: str) -> shapes.BuildView:
        with database.read() as connection:
            return views.build(connection, state.build(connection, build_id), service.links)

    @api.get(
        "/builds/{build_id}/logs", tags=["builds"], response_class=StreamingResponse, operation_id="get_build_logs"
    )
    def build_logs(build_id: str, follow: bool = False) -> Response:
        def waits() -> bool:
            with database.read() as connection:
                found = state.build(connection, build_id)
            # Claimed, but without a stage: its process is only about to start, and to write.
            return found.state == "queued" or (found.state == "running" and found.stage is None)

        queued = waits()
        return _lines(lambda: service.platform.build_log(build_id, follow=follow), waits if follow and queued else None)

    @api.post("/builds/{build_id}/cancel", tags=["builds"], operation_id="cancel_build")
    def cancel_build(build_id: str) -> shapes.BuildView:
        with database.write() as connection:
            view = views.build(connection, state.cancel_build(connection, build_id), service.links)
        service.changed()
        return view

    # --- deployments ------------------------------------------------------------------------------------------------

    @api.get("/deployments", tags=["deployments"], operation_id="list_deployments")
    def deployments() -> shapes.Page[shapes.DeploymentView]:
        with database.read() as connection:
            rows = state.all_deployments(connection)
            return shapes.Page(items=service.deployment_views(connection, rows))

    @api.put("/deployments/{name}", tags=["deployments"], operation_id="put_deployment")
    def put_deployment(name: str, wanted: shapes.DeploymentRequest) -> shapes.DeploymentView:
        """Serve a version under a name. Traffic moves once its golden sample passes."""
        check_name(name)
        resources = wanted.resources.amounts()
        _check_autoscale(wanted, service.platform)
        service.platform.check(name, resources, wanted.replicas, wanted.strategy)
        with database.write() as connection:
            row = versions.find(connection, wanted.model or name, wanted.version)
            made = service.submit_build(connection, row, None)
            state.target(
                connection,
                name,
                row.id,
                made.id,
                replicas=wanted.replicas,
                resources=resources,
                strategy=wanted.strategy,
                autoscale=None if wanted.autoscale is None else wanted.autoscale.model_dump(),
            )
            if wanted.default:
                state.make_default(connection, name)
            view = service.deployment_view(connection, state.need_deployment(connection, name))
        service.changed()
        return view

    @api.get("/deployments/{name}", tags=["deployments"], operation_id="get_deployment")
    def deployment(name: str) -> shapes.DeploymentView:
        with database.read() as connection:
            return service.deployment_view(connection, state.need_deployment(connection, name))

    @api.get("/deployments/{name}/revisions", tags=["deployments"], operation_id="list_revisions")
    def revisions(name: str) -> shapes.Page[shapes.RevisionView]:
        with database.read() as connection:
            state.need_deployment(connection, name)
            items = [views.revision(connection, row) for row in state.revisions_of(connection, name)]
        return shapes.Page(items=items)

    @api.get("/deployments/{name}/events", tags=["deployments"], operation_id="list_events")
    def events(name: str) -> shapes.Page[shapes.EventView]:
        with database.read() as connection:
            state.need_deployment(connection, name)
            items = [views.event(row) for row in state.events_of(connection, f"deployment/{name}")]
        return shapes.Page(items=items)

    @api.get(
        "/deployments/{name}/logs",
        tags=["deployments"],
        response_class=StreamingResponse,
        operation_id="get_deployment_logs",
    )
    def deployment_logs(name: str, follow: bool = False) -> Response:
        with database.read() as connection:
            made = state.need_deployment(connection, name).created

        def deleted() -> bool:
            with database.read() as connection:
                found = state.deployment(connection, name)
            return found is None or found.created != made

        return _lines(lambda: service.platform.serving_log(name, follow=follow, ended=deleted))

    @api.post("/deployments/{name}/rollback", tags=["deployments"], operation_id="roll_back")
    def rollback(name: str, wanted: Annotated[shapes.RollbackRequest | None, Body()] = None) -> shapes.DeploymentView:
        """A new revision that points at an older build: nothing is rebuilt."""
        with database.write() as connection:
            row = state.need_deployment(connection, name)
            old = _rollback_target(connection, row, wanted.revision if wanted else None)
            version = versions.by_id(connection, old.version_id)
            if version.deleted is not None:
                raise UserError(
                    "version_deleted", f"Revision {old.number} served {version.title}, which was deleted.",
                    field="revision", status=409,
                )  # fmt: skip
            if old.state == state.DROPPED:
                raise UserError(
                    "revision_dropped",
                    f"Revision {old.number} of {name!r} is too old to return to: what it needs is kept no more.",
                    field="revision",
                    hint="Deploy its version anew: "
                    f"ekiben deploy {name} --model {version.name} --version {version.number}",
                    status=409,
                )
            made = state.target(connection, name, old.version_id, old.build_id, rollback_of=row.live or row.desired)
            state.record(
                connection, f"deployment/{name}", "RollbackAsked",
                f"Revision {made.number} returns to {version.title} of revision {old.number}.",
            )  # fmt: skip
            view = service.deployment_view(connection, state.need_deployment(connection, name))
        service.changed()
        return view

    @api.delete("/deployments/{name}", status_code=204, tags=["deployments"], operation_id="delete_deployment")
    def delete_deployment(name: str) -> None:
        with database.write() as connection:
            state.delete_deployment(connection, name)
        service.platform.delete(name)  # no call is answered after this one; the loop does it again, should it be late
        service.changed()

    # --- the rest ---------------------------------------------------------------------------------------------------

    @api.get("/kinds", tags=["kinds"], operation_id="list_kinds")
    def kinds() -> shapes.Page[shapes.KindView]:
        items = [
            shapes.KindView(
                name=kind.name,
                title=kind.title,
                description=kind.description,
                generic=kind.generic,
                formats=list(kind.formats),
                device=kind.device,
            )
            for kind in service.kinds.all
        ]
        return shapes.Page(items=items)

    @api.post("/tokens", status_code=201, tags=["tokens"], operation_id="make_token")
    def make_token(wanted: shapes.TokenRequest) -> shapes.TokenView:
        with database.write() as connection:
            row, token = tokens.make(connection, wanted.name)
        service.changed()
        return shapes.TokenView(
            id=row.id, name=row.name, created=views.stamp(row.created) or "", revoked=False, token=token
        )

    @api.get("/tokens", tags=["tokens"], operation_id="list_tokens")
    def list_tokens() -> shapes.Page[shapes.TokenView]:
        with database.read() as connection:
            rows = tokens.all_of(connection)
        items = [
            shapes.TokenView(
                id=row.id, name=row.name, created=views.stamp(row.created) or "", revoked=row.revoked is not None
            )
            for row in rows
        ]
        return shapes.Page(items=items)

    @api.delete("/tokens/{token_id}", status_code=204, tags=["tokens"], operation_id="revoke_token")
    def revoke_token(token_id: str) -> None:
        with database.write() as connection:
            if not tokens.revoke(connection, token_id):
                raise UserError("token_not_found", f"There is no token {token_id[:40]!r}.", field="id", status=404)
        service.changed()

    return api


async def _settled(
    service: Service, request: Request, view: shapes.VersionView, wait: float, *, deployed: bool
) -> shapes.VersionView:
    """The version once nothing more happens to it, or as it is when the time is up."""
    final = views.FINAL if deployed else views.FINAL | {"built"}
    until = time.monotonic() + wait
    service.waiting += 1
    try:
        while view.state not in final and time.monotonic() < until and not await request.is_disconnected():
            await asyncio.sleep(min(_WAIT_POLL * service.waiting, _LONGEST_WAIT_POLL))
            view = await run_in_threadpool(service.version_view, view.model, view.version)
    finally:
        service.waiting -= 1
    return view


def _some(source: Iterator[str]) -> tuple[bytes, bool]:
    """The lines that are there, up to a bound, and whether more may come."""
    found: list[str] = []
    size = 0
    for line in source:
        if not line:
            return "".join(found).encode(), True
        found.append(line + "\n")
        size += len(line)
        if size > 1 << 16:
            return "".join(found).encode(), True
    return "".join(found).encode(), False


def _positive(number: int) -> int:
    if not 1 <= number <= 2**31 - 1:
        raise UserError("bad_version", f"{number} is no version: versions count from 1.", field="version")
    return number


def _delete(connection: Connection, row: versions.Version) -> None:
    versions.mark_deleted(connection, row.id)
    state.leave_builds(connection, row.id)
    state.enqueue(connection, "delete", {"version_id": row.id})


def _refuse_if_used(connection: Connection, row: versions.Version) -> None:
    """What a live or wanted revision needs is never deleted."""
    for deployed in state.all_deployments(connection):
        for number in {deployed.live, deployed.desired} - {None}:
            if state.revision(connection, deployed.name, int(number or 0)).version_id == row.id:
                raise UserError(
                    "version_in_use",
                    f"{row.title} is what the deployment {deployed.name!r} serves.",
                    field="version",
                    hint=f"Deploy another version first, or: ekiben rm --deployment {deployed.name}",
                    status=409,
                )


def _rollback_target(connection: Connection, row: state.Deployment, number: int | None) -> state.Revision:
    if number is not None:
        wanted = state.revision(connection, row.name, number)
        if wanted.live_since is None:
            raise UserError(
                "revision_never_live", f"Revision {number} of {row.name!r} was never live.", field="revision",
                hint=f"GET /deployments/{row.name}/revisions tells which were.", status=409,
            )  # fmt: skip
        return wanted
    if row.live is not None and row.desired != row.live:
        return state.revision(connection, row.name, row.live)  # stop what is on its way: what is live stays
    current = state.revision(connection, row.name, row.desired)
    before = state.previous_good(connection, row.name, current.number, current.version_id)
    if before is None:
        raise UserError(
            "nothing_to_roll_back_to", f"No other version of {row.name!r} was ever live.", field="name",
            hint=f"GET /deployments/{row.name}/revisions lists what there is.", status=409,
        )  # fmt: skip
    return before


def _lines(open_log: Callable[[], Iterator[str]], waits: Callable[[], bool] | None = None) -> StreamingResponse:
    """A log as it grows. Threads are shared with all other requests, so none is held while there is nothing to read:
    the waiting is done here. `waits` tells whether the log's beginning is still to come."""

    async def chunks() -> AsyncIterator[bytes]:
        while waits is not None and await run_in_threadpool(waits):
            await asyncio.sleep(_LOG_POLL)
        source = await run_in_threadpool(open_log)
        try:
            while True:
                text, more = await run_in_threadpool(_some, source)
                if text:
                    yield text
                if not more:
                    return
                if not text:
                    await asyncio.sleep(_LOG_POLL)
        finally:
            if isinstance(source, Generator):
                source.close()

    return StreamingResponse(
        chunks(), media_type="text/plain; charset=utf-8", headers={"X-Content-Type-Options": "nosniff"}
    )


def _check_autoscale(wanted: shapes.DeploymentRequest, platform: Platform) -> None:
    if wanted.autoscale is None:
        return
    if wanted.autoscale.max <= wanted.replicas:
        raise UserError(
            "bad_autoscale", f"At most {wanted.autoscale.max} replicas are not more than the least, {wanted.replicas}.",
            field="autoscale.max", hint="Raise autoscale.max, or leave autoscale out.",
        )  # fmt: skip
    if not platform.autoscales:
        raise UserError(
            "autoscale_unsupported", "Processes on one machine share it: more of them would not be faster.",
            field="autoscale", hint="Set replicas; autoscaling is for Kubernetes.", status=409,
        )  # fmt: skip
