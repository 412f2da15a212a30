"""`ekiben-server`: the service with the embedded platform. Everything is set through EKIBEN_ variables."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import socket
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType

import structlog
from pydantic import ValidationError
from pydantic_settings import SettingsError
from sqlalchemy.exc import OperationalError

from build_service import VERSION, commands, environment
from build_service.settings import Settings
from registry.confinement import kernel
from registry.errors import EkibenError

_DRAIN_SECONDS = 10
_SWITCH_SECONDS = 0.001
"""How long a busy thread keeps the interpreter while another waits (Python's default: 0.005). An answer is handed
between threads some ten times, and the control loop is busy while many models are built."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="ekiben-server",
        description="Ekiben's service: uploads, builds, deployments and the inference router in one process.",
        epilog="Settings are environment variables with the prefix EKIBEN_ (see --settings), "
        "for instance EKIBEN_HOME=/srv/ekiben EKIBEN_PORT=8000 ekiben-server",
    )
    parser.add_argument("--settings", action="store_true", help="list every setting with its default, and end")
    parser.add_argument("--openapi", action="store_true", help="print the API's OpenAPI document, and end")
    parser.add_argument("--version", action="version", version=f"ekiben-server {VERSION}")
    commands.add(parser)
    arguments = parser.parse_args()
    if arguments.settings:
        _print_settings()
        return 0
    _configure_logs()
    try:
        settings = Settings()
    except ValidationError as error:
        for problem in error.errors():
            name = ".".join(str(part) for part in problem["loc"]).upper()
            print(f"ekiben-server: {'EKIBEN_' + name + ': ' if name else ''}{problem['msg']}", file=sys.stderr)
        print("hint: ekiben-server --settings lists what there is", file=sys.stderr)
        return 2
    except SettingsError as error:
        print(f"ekiben-server: {error}\nhint: ekiben-server --settings lists what there is", file=sys.stderr)
        return 2
    if arguments.openapi:
        return _print_openapi(settings)
    if "run" in arguments:
        return commands.run(arguments.run, arguments, settings)
    return _serve(settings)


def _serve(settings: Settings) -> int:
    import uvicorn  # the commands beside the service start without it

    from build_service.app import create_app
    from build_service.http_protocol import Protocol

    try:
        listening = _listen(settings.host, settings.port)
    except OSError as error:
        print(
            f"ekiben-server: cannot listen on {settings.host}:{settings.port}: {error.strerror} [port_taken]\n"
            f"hint: another program has the port; stop it (ekiben down), or choose another: EKIBEN_PORT=8001",
            file=sys.stderr,
        )
        return 1
    sys.setswitchinterval(_SWITCH_SECONDS)
    kernel.hide()
    leaving = threading.Event()
    try:
        application = create_app(
            settings, port=listening.getsockname()[1], environment=dict(os.environ), leaving=leaving
        )
    except (EkibenError, OperationalError) as error:
        commands.explain(error)
        return 1
    environment.forget()
    config = uvicorn.Config(
        application,
        http=Protocol,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # the router judges them: uvicorn would believe every process of this machine
        timeout_keep_alive=75,
        timeout_graceful_shutdown=_DRAIN_SECONDS,
        h11_max_incomplete_event_size=64 * 1024,
    )

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            at_once = settings.leave_seconds == 0 or leaving.is_set()
            leaving.set()
            if at_once:
                super().handle_exit(sig, frame)
                return
            later = threading.Timer(settings.leave_seconds, super().handle_exit, (sig, frame))
            later.daemon = True
            later.start()

    server = Server(config)
    with suppress(KeyboardInterrupt), asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(server.serve(sockets=[listening]))
    return 0 if server.started else 1


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)
    except BaseException:
        listening.close()
        raise
    return listening


def _configure_logs() -> None:
    """One JSON object a line on standard error, our own and the libraries'."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.processors.JSONRenderer()],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processor=structlog.processors.JSONRenderer())
    )
    logging.basicConfig(level=os.environ.get("EKIBEN_LOG_LEVEL", "WARNING").upper(), handlers=[handler])


def _print_settings() -> None:
    for name, field in Settings.model_fields.items():
        default = field.default if field.default_factory is None else "(found)"
        print(f"EKIBEN_{name.upper()}\n    {field.description}  [default: {default}]")


def _print_openapi(settings: Settings) -> int:
    """The document of an application that is made in a folder of its own and never started."""
    from build_service.app import create_app

    with tempfile.TemporaryDirectory() as folder:
        alone = settings.model_copy(
            update={"home": Path(folder), "platform": "local", "database": None, "s3_endpoint": None, "mlflow": False}
        )
        document = create_app(alone, port=Settings.model_fields["port"].default, environment={}).fastapi.openapi()
    print(json.dumps(document, indent=1, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
