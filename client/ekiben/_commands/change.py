"""deploy, rollback, rm: changing what runs"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ekiben._commands import Json, Url, named, session
from ekiben._commands.look import Name
from ekiben._errors import NotFound, RolloutFailed, StillWorking, UsageError

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
    max_replicas: Annotated[
        int | None,
        typer.Option(help="On Kubernetes: more, up to these, while they are busy; 0: no more.", min=0),
    ] = None,
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
        wanted = _as_it_is(client, name)
        if version is None and (not wanted or not any((replicas, max_replicas is not None, cpu, memory, strategy))):
            version = int(client.version(model or name)["version"])
        given = {"model": model, "version": version, "replicas": replicas, "strategy": strategy}
        wanted.update({key: value for key, value in given.items() if value is not None})
        resources = {key: value for key, value in (("cpu", cpu), ("memory", memory)) if value is not None}
        wanted["resources"] = {**wanted.get("resources", {}), **resources}
        if max_replicas is not None:
            before = wanted.get("autoscale") or {}
            wanted["autoscale"] = {**before, "max": max_replicas} if max_replicas else None
        _until_live(client, out, client.deploy(name, wanted), 0.0 if no_wait else wait)


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


def _as_it_is(client: Client, name: str) -> dict[str, Any]:
    """What the deployment is to be now, so that a change of one thing leaves the others; empty for a new one."""
    try:
        state = client.deployment_state(name)
    except NotFound:
        return {}
    wanted = dict(state.get("wanted") or state["target"])
    kept = ("replicas", "resources", "strategy", "autoscale")
    return {**wanted, **{key: state[key] for key in kept if key in state}}


def _until_live(client: Client, out: Output, state: dict[str, Any], wait: float) -> None:
    name = str(state["name"])
    started = time.monotonic()
    try:
        if wait:
            with out.stages() as show:
                state = client.wait_for_deployment(state, wait, lambda now: show(_stage(now)))
    except KeyboardInterrupt:
        out.note(f"interrupted: {name} goes on without you; follow it: ekiben status {name}")
        raise typer.Exit(130) from None
    except (RolloutFailed, StillWorking) as error:
        if out.as_json:
            out.value(error.deployment if isinstance(error, RolloutFailed) else error.known)
        raise
    if out.as_json:
        out.value(state)
        return
    wanted = state.get("wanted") or state["target"]
    live = f"live in {time.monotonic() - started:.1f} s" if wait else str(state["state"])
    out.ticks(f"{wanted['model']} version {wanted['version']}", f"revision {state['revision']}", live)
    out.line(str(state["url"]))


def _stage(state: dict[str, Any]) -> str:
    wanted = state.get("wanted") or state["target"]
    return (
        f"{state['state']}: {wanted['model']} version {wanted['version']}, {state['ready']}/{state['replicas']} ready"
    )
