"""status, models, builds, logs, open, kinds: looking, changing nothing"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ekiben._commands import Json, Url, named, session
from ekiben._errors import NotFound, UsageError

if TYPE_CHECKING:
    from ekiben._output import Output

Name = Annotated[str, typer.Argument(metavar="NAME", help="The deployment.")]


def add(app: typer.Typer) -> None:
    for command in (status, models, builds, logs, kinds):
        app.command()(command)
    app.command("open")(open_)


def status(
    ctx: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One deployment, with its history.")] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Show what is running.

    \b
    ekiben status              # all deployments
    ekiben status churn        # one, with its revisions and last events
    """
    with session(ctx, url, as_json) as (client, out):
        if name is None:
            found = client.deployments()
            if out.as_json:
                out.value({"items": found})
                return
            rows = [{**one, "version": _target(one), "ready": _ready(one)} for one in found]
            columns = ("name", "state", "version", "revision", "ready", "url")
            out.table(rows, columns, "nothing is deployed yet: ekiben push MODEL_FILE")
            return
        one = client.deployment_state(name)
        revisions, events = client.revisions(name), client.events(name)
        if out.as_json:
            out.value({**one, "revisions": revisions, "events": events})
            return
        _facts(
            out,
            {
                "name": one["name"], "state": one["state"], "version": _target(one), "revision": one.get("revision"),
                "ready": _ready(one), "url": one.get("url"), "docs": one.get("docs"), "reason": one.get("reason"),
                "hint": one.get("hint"),
            },
        )  # fmt: skip
        out.line()
        out.table(_timed(revisions, "created"), ("revision", "model", "version", "state", "created", "reason"), "")
        if events:
            out.line()
            out.table(_timed(events[:10], "time"), ("time", "type", "reason", "message"), "")


def models(
    ctx: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="The versions of one model.")] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Show models and their versions.

    \b
    ekiben models
    ekiben models churn        # its versions
    ekiben models churn:3      # one version, whole
    """
    from ekiben._output import size

    with session(ctx, url, as_json) as (client, out):
        if name is None:
            found = client.models()
            if out.as_json:
                out.value({"items": found})
                return
            heads = ("name", "kind", "versions", "latest", "live", "url")
            out.table(found, heads, "there are no models yet: ekiben push MODEL_FILE")
            return
        model, number = named(name)
        if number is not None:
            out.value(client.version(model, number))
            return
        versions = client.versions(model)
        if out.as_json:
            out.value({"items": versions})
            return
        rows = [{**one, "size": size(one.get("size") or 0), "labels": one.get("labels") or None} for one in versions]
        columns = ("version", "kind", "state", "verified", "size", "created", "labels", "reason")
        out.table(_timed(rows, "created"), columns, f"{model} has no versions")


def builds(
    ctx: typer.Context,
    build: Annotated[str | None, typer.Argument(metavar="[ID]", help="One build, with its stages.")] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Show builds.

    \b
    ekiben builds
    ekiben builds b-1f3a...    # one, with the seconds of its stages
    """
    with session(ctx, url, as_json) as (client, out):
        if build is None:
            found = client.builds()
            if out.as_json:
                out.value({"items": found})
                return
            columns = ("id", "model", "version", "state", "stage", "attempts", "created", "reason")
            out.table(_timed(found, "created"), columns, "there were no builds yet: ekiben push MODEL_FILE")
            return
        one = client.build(build)
        if out.as_json:
            out.value(one)
            return
        keys = ("id", "model", "version", "state", "stage", "attempts", "created", "finished", "reason", "hint")
        _facts(out, {key: one.get(key) for key in keys})
        stages = one.get("stages") or []
        if stages:
            out.line()
            out.table(stages, ("stage", "seconds"), "")


def logs(
    ctx: typer.Context,
    name: Name,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until interrupted.")] = False,
    build: Annotated[bool, typer.Option("--build", help="The log of the newest version's build.")] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Show the log of a model, or of its build.

    \b
    ekiben logs churn -f
    ekiben logs churn --build
    ekiben logs churn:3 --build
    """
    with session(ctx, url, as_json) as (client, out):
        model, number = named(name)
        lines: Iterator[str]
        if build:
            identity = client.version(model, number).get("build")
            if not identity:
                raise NotFound(f"{name} has no build", code="build_not_found", hint=f"ekiben models {model}")
            lines = client.build_logs(str(identity), follow)
        elif number is not None:
            raise UsageError("a log is that of a deployment", code="usage", hint=f"ekiben logs {model}")
        else:
            lines = client.deployment_logs(model, follow)
        for line in lines:
            if out.as_json:
                import json

                out.line(json.dumps({"line": line}, ensure_ascii=False))
            else:
                out.line(line)


def open_(ctx: typer.Context, name: Name, url: Url = None, as_json: Json = False) -> None:
    """Open a model's documentation in the browser.

    \b
    ekiben open churn
    """
    with session(ctx, url, as_json) as (client, out):
        docs = str(client.deployment_state(name)["docs"])
        if out.as_json:
            out.value({"docs": docs})
            return
        out.line(docs)
        if out.colour or out.live:  # a script gets the address only
            import webbrowser

            if docs.startswith(("http://", "https://")) and not webbrowser.open(docs):
                out.note("there is no browser here: open the address above in one")


def kinds(ctx: typer.Context, url: Url = None, as_json: Json = False) -> None:
    """Show what sorts of model the server can serve.

    \b
    ekiben kinds
    """
    with session(ctx, url, as_json) as (client, out):
        found = client.kinds()
        if out.as_json:
            out.value({"items": found})
            return
        rows = [{**one, "formats": ", ".join(one.get("formats") or []) or "by --kind"} for one in found]
        out.table(rows, ("name", "formats", "title", "description"), "the server has no kinds")


def _target(deployment: dict[str, Any]) -> str:
    target = deployment.get("target") or {}
    return f"{target.get('model')}:{target.get('version')}"


def _ready(deployment: dict[str, Any]) -> str:
    return f"{deployment.get('ready', 0)}/{deployment.get('replicas', 0)}"


def _timed(rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    from ekiben._output import when

    return [{**row, key: when(row[key])} if row.get(key) is not None else row for row in rows]


def _facts(out: Output, facts: dict[str, Any]) -> None:
    from ekiben._output import cell, when

    known = {key: value for key, value in facts.items() if value is not None}
    width = max(map(len, known))
    for key, value in known.items():
        out.line(f"{key.ljust(width)}  {when(value) if key in ('created', 'finished') else cell(value)}")
