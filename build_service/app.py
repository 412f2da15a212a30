"""The composition root: settings in, a running service out. Nothing else makes parts and wires them."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, MutableMapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import structlog
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sqlalchemy import select
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from build_service import (
    VERSION,
    api,
    cleanup,
    guard,
    local_token,
    migrate,
    problems,
    processes,
    state,
    storage,
    tokens,
    views,
)  # fmt: skip
from build_service.bodies import SmallBodies
from build_service.environment import for_catalogue
from build_service.headers import Rules
from build_service.local import LocalPlatform
from build_service.own_log import OwnLog
from build_service.platform import InUse, Platform
from build_service.projection import Projection
from build_service.recognition import Bounds, Examine, Forkserver
from build_service.reconciler import Reconciler
from build_service.remembered import Remembered
from build_service.router import PREFIX, Router
from build_service.routes import RouteTable
from build_service.settings import Settings
from registry.database import Database
from registry.errors import EkibenError, InfrastructureError
from registry.kinds import Kinds
from registry.store import ObjectStore

log = structlog.get_logger(__name__)

_LOCK_TRIES, _LOCK_PAUSE = 5, 0.1  # seconds between two tries
_LOOP_PATIENCE = 5.0  # seconds that the control loop waits for a store that is away
STATE_FORMAT = 1  # of the state folder; a service refuses a folder of a newer one


@dataclass
class Application:
    """The ASGI application, and what must be ended when it ends."""

    asgi: guard.ASGI
    fastapi: FastAPI
    closers: list[Callable[[], None]] = field(default_factory=list)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        await self.asgi(scope, receive, send)


def create_app(
    settings: Settings,
    *,
    port: int,
    environment: Mapping[str, str],
    leaving: threading.Event | None = None,
    examine: Examine | None = None,
) -> Application:
    """Make the service with its parts; they start with the application's lifespan. `port` is where it listens,
    `environment` what it was started in, of which its programs get what they need, `examine` what uploads are
    recognised by (default: bounded children)."""
    root = settings.root
    lock = _claim(root)
    (root / "url").unlink(missing_ok=True)
    local_token.withdraw(root)
    own_token = local_token.ensure(root) if settings.needs_own_token else None
    database = Database(settings.database_url)
    try:
        migrate.migrate(database)
        store, place = _store(settings, environment)
    except EkibenError:
        database.close()
        os.close(lock)
        raise
    kinds = Kinds.load(settings.kinds)
    links = views.Links(settings.public_url or _own_url(settings, port))
    owner = uuid.uuid4().hex
    processes.sweep(root / "processes")
    _recover(settings, database, store, owner)

    routes = RouteTable()
    waker: list[Callable[[], None]] = []
    platform = place(kinds, routes, lambda: waker[0]() if waker else None, lambda: _digests(settings, database))
    reconciler = Reconciler(settings, database, platform, owner)
    waker.append(reconciler.wake)
    catalogue = for_catalogue(environment)
    projection = Projection(database, root, store, settings.tracking_uri, catalogue) if settings.mlflow else None
    in_use = platform.in_use if isinstance(platform, LocalPlatform) else InUse
    sweeper = cleanup.Sweeper(settings, database, store, in_use)
    own_log = OwnLog(root / "server.log", settings.log_bytes)
    default = Remembered(lambda: _default(database))
    valid = Remembered(lambda: _digests(settings, database, own_token))
    inference = Router(
        routes,
        default=default,
        exists=lambda name: _exists(database, name),
        pending=lambda name: _pending(database, name),
        body_limit=settings.inference_body,
        seconds=settings.inference_seconds,
        rules=Rules(frozenset(name.encode() for name in settings.pass_headers), settings.trusted_networks),
    )

    def forget() -> None:
        default.forget()
        valid.forget()

    forkserver = Forkserver(
        Bounds(settings.recognition_memory, settings.recognition_seconds, settings.recognitions_at_once)
    )
    begin = examine or forkserver.begin
    service = api.Service(
        settings, database, store, kinds, platform, reconciler, lambda: links, forget, begin, catalogue
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        if examine is None:
            forkserver.start()
        reconciler.start()
        sweeper.start()
        own_log.start()
        if projection is not None:
            projection.start()
        # Where a client on this machine finds the service, whatever port it took.
        address = root / "url"
        if own_token is not None:
            local_token.announce(root, settings.host, port)
        # In one step: whoever finds the file finds the whole address in it.
        fresh = root / "url.new"
        fresh.write_text(links.base + "\n")
        fresh.replace(address)
        log.info("service is up", url=links.base, home=str(root))
        try:
            yield
        finally:
            address.unlink(missing_ok=True)
            local_token.withdraw(root)
            reconciler.close()
            sweeper.close()
            own_log.close()
            if projection is not None:
                projection.close()
            platform.close()
            forkserver.close()
            await inference.close()
            database.close()
            os.close(lock)

    app = FastAPIOffline(
        title="Ekiben",
        version=VERSION,
        description="Hand it a trained model; it hands you back a running, versioned endpoint.",
        lifespan=lifespan,
        openapi_tags=[
            {"name": name} for name in ("models", "uploads", "builds", "deployments", "kinds", "tokens", "system")
        ],
    )
    problems.install(app)
    app.include_router(api.router(service))
    bounds = platform.launcher.bounds() if isinstance(platform, LocalPlatform) else {}
    _system_routes(app, database, root, leaving or threading.Event(), bounds)

    small = SmallBodies(app, settings.upload_idle_seconds)

    async def dispatch(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        if scope["type"] == "http" and (path == PREFIX or path.startswith(PREFIX + "/")):
            await inference(scope, receive, send)
        else:
            await small(scope, receive, send)

    hosts = set(settings.allowed_hosts)
    hosts.add(urlsplit(links.base).hostname or "")
    if settings.platform == "kubernetes":  # as pods of the cluster call it
        hosts |= {settings.service_name + end for end in ("", f".{settings.namespace}", f".{settings.namespace}.svc")}
    policy = guard.Policy(
        hosts=frozenset(host.lower() for host in hosts),
        cors=frozenset(settings.cors_origins),
        tokens=valid,
        inference_open=settings.platform == "kubernetes" and settings.inference_open,
        token_file=None if own_token is None else root / local_token.FILE,
    )
    return Application(guard.Guard(dispatch, policy), app)


Place = Callable[[Kinds, RouteTable, Callable[[], None], Callable[[], frozenset[str]]], Platform]


def _store(settings: Settings, environment: Mapping[str, str]) -> tuple[ObjectStore, Place]:
    """Where versions are kept, and what makes the platform that works with that store."""
    if settings.platform == "local":
        kept = storage.make(settings)
        return kept, lambda kinds, routes, wake, _tokens: LocalPlatform(
            settings, kept, kinds, routes, wake, environment
        )
    from build_service.kubernetes.platform import KubernetesPlatform  # half a second, for those who use it

    # The loop asks again by itself, and has more to do meanwhile.
    kept, asked = storage.bucket(settings), storage.bucket(settings, patience=_LOOP_PATIENCE)
    return kept, lambda kinds, routes, wake, tokens: KubernetesPlatform(settings, asked, kinds, routes, wake, tokens)


def _own_url(settings: Settings, port: int) -> str:
    if settings.platform == "kubernetes" and settings.ingress_host and "*" not in settings.ingress_host:
        return f"http://{settings.ingress_host}"
    return f"http://localhost:{port}"


def _system_routes(
    app: FastAPI, database: Database, root: Path, leaving: threading.Event, bounds: Mapping[str, str]
) -> None:
    @app.get("/livez", tags=["system"], operation_id="livez", response_class=PlainTextResponse)
    def livez() -> str:
        return "ok\n"

    @app.get("/readyz", tags=["system"], operation_id="readyz", response_class=PlainTextResponse)
    def readyz() -> str:
        if leaving.is_set():
            raise InfrastructureError("leaving", "This service is about to end.", status=503)
        with database.read() as connection:
            connection.execute(select(1))
        return "ok\n"

    @app.get("/metrics", tags=["system"], operation_id="metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version", tags=["system"], operation_id="version")
    def version() -> dict[str, str]:
        return {"version": VERSION, "home": str(root), **bounds}

    @app.get("/", include_in_schema=False)
    def index() -> Response:
        return RedirectResponse("/docs")


def _claim(root: Path) -> int:
    """This service's hold on the state folder: one service a folder, and none of an older Ekiben on a newer one."""
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if not _locked(lock):
        os.close(lock)
        raise EkibenError(
            "home_in_use",
            f"Another Ekiben service works with the state folder {root}.",
            hint="Stop it (ekiben down), or give this one a folder of its own: EKIBEN_HOME=…",
        )
    marker = root / "format"
    if marker.exists():
        text = marker.read_text().strip()
        if not text.isdigit() or int(text) > STATE_FORMAT:
            os.close(lock)
            raise EkibenError(
                "state_too_new",
                f"The state folder {root} has format {text[:20]!r}; this Ekiben knows formats up to {STATE_FORMAT}.",
                hint="Use the newer Ekiben that wrote it, or another folder: EKIBEN_HOME=…",
            )
    else:
        marker.write_text(f"{STATE_FORMAT}\n")
    return lock


def _locked(lock: int) -> bool:
    """Take the lock. Clients hold it for an instant to see whether a service runs, so it is tried more than once."""
    for _ in range(_LOCK_TRIES):
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(_LOCK_PAUSE)
    return False


def _recover(settings: Settings, database: Database, store: ObjectStore, owner: str) -> None:
    """What an earlier service left unfinished: uploads without a version go, work under its lease is free again."""
    if database.embedded:  # a shared one may have other services: their leases run out by themselves
        with database.write() as connection:
            state.release_builds(connection, owner)
            state.release_deployments(connection, settings.ready_seconds)
    known = storage.sweep(settings, database, store, starting=True)
    for copy in (settings.root / "checkouts" / "models").glob("*"):
        if f"models/{copy.name}" not in known:
            shutil.rmtree(copy, ignore_errors=True)
    for work in (settings.root / "builds").glob("*/work"):
        shutil.rmtree(work, ignore_errors=True)


def _default(database: Database) -> str | None:
    with database.read() as connection:
        found = state.default_deployment(connection)
    return None if found is None else found.name


def _exists(database: Database, name: str) -> bool:
    with database.read() as connection:
        return state.deployment(connection, name) is not None


def _pending(database: Database, name: str) -> EkibenError:
    """Why an endpoint does not answer yet."""
    with database.read() as connection:
        row = state.deployment(connection, name)
        build = state.build(connection, state.revision(connection, name, row.desired).build_id) if row else None
    if row is not None and row.live is not None:
        return EkibenError(
            "deployment_unavailable",
            f"No process of {name!r} answers at the moment; they are being started.",
            hint=f"Try again in a moment; GET /deployments/{name} tells more.",
            status=503,
        )
    if row is not None and row.state == "failed":
        return EkibenError("deployment_failed", f"{name!r} is not live: {row.reason}", hint=row.hint, status=503)
    where = f"its build is {build.state}" + (f" ({build.stage})" if build and build.stage else "") if build else "new"
    return EkibenError(
        "deployment_pending",
        f"{name!r} is not live yet: {where}.",
        hint=f"Try again in a moment; GET /deployments/{name} tells how far it is.",
        status=503,
    )


def _digests(settings: Settings, database: Database, own: str | None = None) -> frozenset[str]:
    """Digests of the tokens that open the API: the operator's first one or this machine's own, and those made since."""
    given = frozenset(tokens.digest(token) for token in (settings.token, own) if token is not None)
    with database.read() as connection:
        return given | tokens.valid_digests(connection)
