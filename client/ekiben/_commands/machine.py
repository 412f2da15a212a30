"""up, down, doctor, version: the server on this machine"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

import ekiben
from ekiben._commands import Json, Url, printing, session

_DEFAULT_PORT = 8000


def add(app: typer.Typer) -> None:
    for command in (up, down, doctor, version):
        app.command()(command)


def up(
    ctx: typer.Context,
    port: Annotated[int | None, typer.Option(help="Port; else EKIBEN_PORT, else 8000.", min=1, max=65535)] = None,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay in this terminal; Ctrl-C ends it.")] = False,
    wait: Annotated[float, typer.Option(help="Seconds to wait until it is ready.", min=1)] = 90.0,
    as_json: Json = False,
) -> None:
    """Start the server on this machine.

    \b
    ekiben up
    ekiben up --port 9000
    ekiben up --foreground        # for a service manager

    Nothing happens if it runs already. Its state is in EKIBEN_HOME (~/.ekiben), its log in server.log
    there; it listens on loopback only.
    """
    from ekiben import _config, _server
    from ekiben._client import Client
    from ekiben._errors import UsageError

    out = printing(ctx, as_json)
    environment = dict(os.environ)
    host = environment.get("EKIBEN_HOST") or "127.0.0.1"
    text = environment.get("EKIBEN_PORT") or str(_DEFAULT_PORT)
    if port is None and not (text.isdecimal() and 0 < int(text) < 65536):
        raise UsageError(f"EKIBEN_PORT={text} is not a port", code="bad_port", hint="EKIBEN_PORT=8000")
    port = port or int(text)
    server = _server.running(environment)
    if server is None and not foreground:
        with out.stages() as show:
            show(f"starting the server on port {port}")

            def ready(url: str) -> bool:
                with Client(url) as client:
                    return client.ready(2.0)

            server = _server.start(environment, host, port, wait, ready)
        started = True
    elif server is None:
        command = str(_server.program(environment))
        _server.check_port(host, port)
        out.note(f"{_server.address(host, port)}   (Ctrl-C ends it)")
        home = str(_config.home(environment).absolute())
        settings = {"EKIBEN_HOME": home, "EKIBEN_HOST": host, "EKIBEN_PORT": str(port)}
        os.execve(command, [command], {**environment, **settings})
    else:
        started = False
    if out.as_json:
        out.value({"url": server.url, "pid": server.pid, "log": str(server.log), "started": started})
        return
    out.ticks("started" if started else "runs already")
    out.line(f"{server.url}   (API: {server.url}/docs, log: {server.log})")
    remembered = _config.connection()
    if remembered.url != server.url:
        out.note(
            f"note: commands go to {remembered.url} ({remembered.source}); to use this one: ekiben login {server.url}"
        )


def down(
    ctx: typer.Context,
    wait: Annotated[float, typer.Option(help="Seconds for requests to finish, before it is killed.", min=0)] = 60.0,
    as_json: Json = False,
) -> None:
    """Stop the server that `ekiben up` started. Models and deployments stay and come back with it.

    \b
    ekiben down
    """
    from ekiben import _server

    out = printing(ctx, as_json)
    environment = dict(os.environ)
    server = _server.running(environment)
    if server is None:
        _server.forget(environment)
        if out.as_json:
            out.value({"stopped": False})
        else:
            out.line("no server of `ekiben up` is running")
        return
    with out.stages() as show:
        show("stopping the server")
        gentle = _server.stop(server, environment, wait)
    if out.as_json:
        out.value({"stopped": True, "killed": not gentle})
    elif gentle:
        out.ticks("stopped")
    else:
        out.note(f"the server did not end within {wait:g} s and was killed; its state is safe")


def doctor(
    ctx: typer.Context,
    registry: Annotated[str | None, typer.Option(metavar="HOST", help="Check a container registry too.")] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Check this machine and the way to the server.

    \b
    ekiben doctor
    ekiben doctor --registry registry.example.org

    Says how to mend what is wrong; exits 1 when something is.
    """
    from ekiben import _doctor
    from ekiben._commands import chosen

    out = printing(ctx, as_json)
    findings = _doctor.findings(url or chosen(ctx).url, registry, dict(os.environ))
    if out.as_json:
        out.value({"findings": [finding.shape() for finding in findings]})
    else:
        for finding in findings:
            out.line(f"{finding.mark} {finding.topic}: {finding.message}")
            if finding.remedy:
                out.line(f"    → {finding.remedy}")
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)


def version(ctx: typer.Context, url: Url = None, as_json: Json = False) -> None:
    """Print the version; with --url the server's too.

    \b
    ekiben version
    ekiben version --url http://localhost:8000
    """
    known: dict[str, str | None] = {"ekiben": ekiben.__version__, "python": sys.version.split()[0]}
    if url is not None:
        with session(ctx, url, as_json) as (client, out):
            known["server"] = client.about()["version"]
    else:
        out = printing(ctx, as_json)
    if out.as_json:
        out.value(known)
    else:
        for name, text in known.items():
            out.line(f"{name} {text}")
