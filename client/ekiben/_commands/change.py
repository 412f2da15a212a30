"""deploy, rollback, rm: changing what runs"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ekiben._commands import Json, Url, named, session
from ekiben._commands.look import Name
from ekiben._errors import EkibenError, UsageError

if TYPE_CHECKING:
    from ekiben._client import Client
    from ekiben._output import Output

_WAIT_SECONDS = 300.0

Wait = Annotated[float, typer.Option(help="Seconds to wait until it is live.", min=0)]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Return at once.")]


def add(app: typer.Typer) -> None:
    for command in (deploy, rollback, rm):
        app.command()(command)


def deploy(
    ctx: typer.Context,
    name: Name,
    version: Annotated[int | None, typer.Option(help="Version to serve; else the newest.", min=1)] = None,
    model: Annotated[str | None, typer.Option(help="Model to serve; else that of the deployment's name.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Processes to run.", min=1)] = None,
    cpu: Annotated[str | None, typer.Option(help="CPUs of each, like 1 or 500m.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory of each, like 2Gi.")] = None,
    strategy: Annotated[
        str | None, typer.Option(help="rolling (new one up before the old one goes) or replace (no room for two).")
    ] = None,
    wait: Wait = _WAIT_SECONDS,
    no_wait: NoWait = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Choose what a deployment serves, and with how much.

    \b
    ekiben deploy churn --version 3
    ekiben deploy churn --replicas 2 --memory 2Gi
    ekiben deploy churn-test --model churn --version 4      # a second endpoint
    """
    with session(ctx, url, as_json) as (client, out):
        wanted: dict[str, Any] = {"model": model, "replicas": replicas, "strategy": strategy}
        wanted["version"] = version
        if version is None:
            wanted["version"] = _version(client, name, model, keep=any((replicas, cpu, memory, strategy)))
        resources = {key: value for key, value in (("cpu", cpu), ("memory", memory)) if value is not None}
        if resources:
            wanted["resources"] = resources
        state = client.deploy(name, {key: value for key, value in wanted.items() if value is not None})
        _until_live(client, out, state, 0.0 if no_wait else wait)


def rollback(
    ctx: typer.Context,
    name: Name,
    to: Annotated[
        int | None, typer.Option(metavar="REVISION", help="Revision to return to; else the last good.")
    ] = None,
    wait: Wait = _WAIT_SECONDS,
    no_wait: NoWait = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Return to an earlier revision. Nothing is rebuilt.

    \b
    ekiben rollback churn            # the previous good one
    ekiben rollback churn --to 2     # revision 2, see ekiben status churn
    """
    with session(ctx, url, as_json) as (client, out):
        _until_live(client, out, client.rollback(name, to), 0.0 if no_wait else wait)


def rm(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME[:VERSION]", help="A model, one version, or a deployment.")],
    deployment: Annotated[bool, typer.Option("--deployment", help="The endpoint; the model stays.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Delete a version, a model, or an endpoint.

    \b
    ekiben rm churn:2              # one version; one that runs is refused
    ekiben rm churn --deployment   # the endpoint; the model stays
    ekiben rm churn                # the model with all its versions
    """
    model, number = named(name)
    if deployment and number is not None:
        raise UsageError("a deployment has no version to delete", code="usage", hint=f"ekiben rm {model} --deployment")
    if number is not None:
        what = f"version {number} of {model}"
    else:
        what = f"the deployment {model}" if deployment else f"the model {model} with all its versions"
    with session(ctx, url, as_json) as (client, out):
        if out.live and not yes and not typer.confirm(f"delete {what}?", err=True):
            raise typer.Exit(1)
        if deployment:
            client.delete_deployment(model)
        elif number is not None:
            client.delete_version(model, number)
        else:
            client.delete_model(model)
        if out.as_json:
            out.value({"deleted": {"model": model, "version": number, "deployment": deployment}})
        else:
            out.ticks(f"{what} is deleted")


def _version(client: Client, name: str, model: str | None, keep: bool) -> int:
    """The version when none is named: the running one while only its size changes, else the newest."""
    if keep and model is None:
        return int(client.deployment_state(name)["target"]["version"])
    return int(client.version(model or name)["version"])


def _until_live(client: Client, out: Output, state: dict[str, Any], wait: float) -> None:
    name = str(state["name"])
    started = time.monotonic()
    pause = 0.05
    try:
        with out.stages() as show:
            while state["state"] in ("pending", "rolling") and time.monotonic() - started < wait:
                show(f"{state['state']}: {(state.get('target') or {}).get('model')} revision {state.get('revision')}")
                time.sleep(pause)
                pause = min(pause * 1.3, 0.5)
                state = client.deployment_state(name)
    except KeyboardInterrupt:
        out.note(f"interrupted: {name} goes on without you; follow it: ekiben status {name}")
        raise typer.Exit(130) from None
    if out.as_json:
        out.value(state)
    target = state.get("target") or {}
    if state["state"] in ("failed", "rolled_back"):
        raise EkibenError(
            f"{name} {state['state'].replace('_', ' ')}: {state.get('reason')}",
            code=state.get("code") or str(state["state"]),
            hint=state.get("hint") or f"ekiben logs {name}",
        )
    if state["state"] != "live" and wait > 0:
        raise EkibenError(
            f"{name} is {state['state']} after {wait:g} s; the work goes on",
            code="still_working",
            hint=f"ekiben status {name}",
        )
    if not out.as_json:
        seconds = time.monotonic() - started
        version = f"{target.get('model')} version {target.get('version')}"
        live = f"live in {seconds:.1f} s" if state["state"] == "live" else str(state["state"])
        out.ticks(version, f"revision {state.get('revision')}", live)
        out.line(str(state.get("url")))
