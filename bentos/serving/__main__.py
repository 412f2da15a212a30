"""`python -m bentos.serving`: load a Bento, prove it on its golden sample, and serve it in one process."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bentos
from bentos.serving import declared, golden, lifeline, loaded, own_files
from bentos.serving.about import About, Served
from bentos.serving.model import ModelFolder
from bentos.serving.problems import StartError
from bentos.serving.settings import Settings, termination_log
from bentos.serving.wrapper import Wrapper

_DRAIN_SECONDS = 30
_KEEP_ALIVE_SECONDS = 75
"""Longer than the router keeps idle connections, so that it is the router that closes them: no request is lost."""

_GARBAGE_THRESHOLD = 50_000
"""New container objects between two searches for garbage in cycles (Python's default: 700)."""

_logger = logging.getLogger("ekiben.serving")


class _Lines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for key in ("request", "model", "version", "seconds"):
            if hasattr(record, key):
                line[key] = getattr(record, key)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def main() -> int:
    """Serve until SIGTERM. Gives the exit code of docs/design.md §6."""
    _log_to_stderr()
    with _home_for_bentoml():
        try:
            settings = Settings.from_environment(os.environ)
            if settings.lifeline_fd is not None:
                lifeline.hold(settings.lifeline_fd)
            serve(settings)
            return 0
        except StartError as error:
            _logger.error("cannot start: %s: %s%s", error.code, error.message, f" ({error.hint})" if error.hint else "")
            _record(termination_log(os.environ), error)
            return error.exit_code
        except Exception as error:
            _logger.exception("cannot start")
            _record(termination_log(os.environ), StartError("start_failed", f"{type(error).__name__}: {error}"))
            return 1


def serve(settings: Settings) -> None:
    """Load, prove and serve. Raises StartError for everything that is the model's or the Bento's fault."""
    folder = None
    if settings.model_dir is not None:
        folder = ModelFolder.read(settings.model_dir)
        folder.verify(settings.digest)
    listener = _listen(settings)
    _declare(declared.read(settings.bento))
    service = _load(settings.bento)
    if not (settings.bento / "bento.yaml").is_file():  # a Bento has those of its services in its bento.yaml
        _declare(declared.runtime({"name": e.name, "value": e.value, "stage": e.stage} for e in service.envs))
    app, settings = _application(service, settings)
    import uvicorn

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_DRAIN_SECONDS,
        ws="none",
    )
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_run(service, app, folder, settings, config, listener))


async def _run(
    service: Any, app: Any, folder: ModelFolder | None, settings: Settings, config: Any, listener: socket.socket
) -> None:
    from uvicorn import Server

    from bentos.serving.routes import predict_route

    async with contextlib.AsyncExitStack() as stack:
        try:
            # entered here and not by uvicorn, so that a model that cannot be loaded is told apart from a crash
            await stack.enter_async_context(app.router.lifespan_context(app))
        except StartError:
            raise
        except Exception as error:
            _logger.exception("the model cannot be loaded")
            message = f"the model cannot be loaded: {type(error).__name__}: {error}"
            raise StartError("model_load_failed", message, "the log of the deployment has the whole story") from error
        about = _about(folder)
        served = Served(
            name=settings.name,
            version=settings.version,
            digest=folder.digest if folder else None,
            prefix=settings.prefix,
            labels=settings.metadata.get("labels") or {},
            metrics=settings.metadata.get("metrics") or {},
            about=None if about is _instance_about() else about,
            rtol=settings.rtol,
            atol=settings.atol,
        )
        checked, _ = await golden.check(app, predict_route(service), about, served)
        served = replace(served, checked=checked)
        _logger.info("golden sample: %s, %d of %d", checked.verified, checked.matched, checked.rows)
        wrapper = config.app = Wrapper(app, settings, served)
        config.load()
        # what was imported and loaded lives as long as the process: never look at it again when collecting
        gc.collect()
        gc.freeze()
        # a batch of 5,000 rows is 5,000 objects that live together and die together: looking among them for cycles at
        # every 700 takes longer than half of their parsing
        gc.set_threshold(_GARBAGE_THRESHOLD, 10, 10)
        server = Server(config)
        # uvicorn would raise the signal again after it drained, and skip the service's own clean-up
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, _leave, server, wrapper)
        _logger.info("%s version %s is ready on %s", served.name, served.version, listener.getsockname())
        if settings.modules_file is not None:
            loaded.record(settings.modules_file)
        await server.serve(sockets=[listener])


def _leave(server: Any, wrapper: Any) -> None:
    """Not ready from now on; calls are taken until whoever sends them has noticed, or the signal comes again."""
    if wrapper.leaving:
        _stop(server)
    else:
        wrapper.leaving = True
        asyncio.get_running_loop().call_later(wrapper.settings.leave_seconds, _stop, server)


def _stop(server: Any) -> None:
    server.should_exit = True


def _declare(variables: dict[str, str]) -> None:
    for name in declared.apply(variables, os.environ):
        _logger.warning("the Bento's environment variable %s is not set: it belongs to the platform", name)


def _load(bento: Path) -> Any:
    """The Bento's service. Raises StartError `service_import_failed`."""
    try:
        from _bentoml_impl.loader import load
        from _bentoml_sdk import Service

        # This wrapper may run from a copy of its own, while the Bento carries its kind in another portion of the
        # package.
        carried = str(bento.resolve() / "src" / "bentos")
        if carried not in bentos.__path__:
            bentos.__path__.append(carried)
        own_files.allow()
        service = load(str(bento.resolve()), standalone_load=True)
        if not isinstance(service, Service):
            raise TypeError("the service is of the API before BentoML 1.2")
        return service
    except StartError:
        raise
    except Exception as error:
        _logger.exception("the service cannot be imported")
        message = f"the service in {bento} cannot be imported: {type(error).__name__}: {error}"
        hint = "check that everything it imports is in its requirements and in the upload"
        raise StartError("service_import_failed", message, hint) from error


def _application(service: Any, settings: Settings) -> tuple[Any, Settings]:
    """BentoML's application, as its own worker makes it, with our routes where the service has none.

    Gives the settings back with the service's own time bound, where it asks for a shorter one.
    """
    from _bentoml_impl.server.app import ServiceAppFactory
    from bentoml._internal.configuration.containers import BentoMLContainer
    from bentoml._internal.context import server_context
    from bentoml._internal.server.metrics.prometheus import PrometheusClient
    from bentoml._internal.utils.uri import join_paths

    from bentos.serving.routes import mount, offers

    if not offers(service):
        mount(service)
    service.config.setdefault("logging", {"access": {"enabled": False}})
    server_context.service_type = "entry_service"
    server_context.service_name = service.name
    server_context.service_routes = [join_paths(service.path_prefix, api.route) for api in service.apis.values()]
    if service.bento is None:
        server_context.bento_name, server_context.bento_version = service.name, "not available"
    else:
        server_context.bento_name = service.bento.tag.name
        server_context.bento_version = service.bento.tag.version or "not available"
    # one process: metrics stay in memory, without the files that several workers would share
    BentoMLContainer.metrics_client.set(PrometheusClient(multiproc=False))
    service.inject_config()
    factory = ServiceAppFactory(service, is_main=True)
    if "timeout" in service.config.get("traffic", {}):
        settings = replace(settings, request_seconds=min(settings.request_seconds, factory.timeout))
    # The wrapper keeps the time. BentoML's own layer would start a task and a timer for each request, and when an
    # application raises before it answers (1.4.40) it waits for its whole bound.
    factory.timeout = None
    return factory(), settings


def _instance_about() -> Any:
    from _bentoml_sdk.service import get_current_service

    return getattr(get_current_service(), "about", None)


def _about(folder: ModelFolder | None) -> About:
    own = _instance_about()
    if isinstance(own, About):
        return own
    return About(kind=folder.kind if folder else "project", format=folder.format if folder else None, folder=folder)


def _listen(settings: Settings) -> socket.socket:
    """Bind before loading, so that a taken port is known at once; uvicorn listens only when the model is ready."""
    if settings.socket_fd is not None:
        return socket.socket(fileno=settings.socket_fd)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        message = f"cannot listen on {settings.host} port {settings.port}: {error.strerror}"
        raise StartError("port_unavailable", message, "set EKIBEN_PORT to a free port") from error
    return listener


@contextlib.contextmanager
def _home_for_bentoml() -> Iterator[None]:
    """BentoML makes folders in its home at import; in an image the home is read-only and in a pod shared by nobody."""
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
    if "BENTOML_HOME" in os.environ:
        yield
        return
    home = tempfile.mkdtemp(prefix="ekiben-bentoml-")
    os.environ["BENTOML_HOME"] = home
    try:
        yield
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    _logger.setLevel(logging.INFO)


def _record(log: Path | None, error: StartError) -> None:
    if log is None:
        return
    try:
        log.write_text(json.dumps(error.record(), ensure_ascii=False), encoding="utf-8")
    except OSError as problem:
        _logger.warning("the termination log %s cannot be written: %s", log, problem)


if __name__ == "__main__":
    sys.exit(main())
