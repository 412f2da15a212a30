"""push"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ekiben._commands import Json, Url, session
from ekiben._errors import StillWorking, UsageError, VersionFailed

if TYPE_CHECKING:
    from ekiben._client import Client
    from ekiben._output import Output

_WAIT_SECONDS = 600.0


def add(app: typer.Typer) -> None:
    app.command()(push)


def push(
    ctx: typer.Context,
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="[PATH]...", help="Model file(s), an archive, or a folder.")
    ] = None,
    run: Annotated[
        str | None, typer.Option("--run", metavar="RUN_ID", help="A run of the server's MLflow, in place of a file.")
    ] = None,
    artifact_path: Annotated[
        str | None, typer.Option(metavar="PATH", help="Which artifact of the run; else its one model.")
    ] = None,
    model_uri: Annotated[
        str | None, typer.Option(metavar="URI", help="models:/NAME/VERSION or models:/NAME@ALIAS of MLflow.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model; else the file's stem.")] = None,
    kind: Annotated[
        str | None, typer.Option(help="How to serve it; else found from the content. See ekiben kinds.")
    ] = None,
    sample: Annotated[
        Path | None,
        typer.Option(help='A request to check the model with: {"inputs": [row, ...]}, a list of rows, .jsonl or .csv.'),
    ] = None,
    expected: Annotated[
        Path | None, typer.Option(help='What the sample must give: {"outputs": [value, ...]} or a list of values.')
    ] = None,
    requirements: Annotated[
        Path | None, typer.Option("--requirements", "-r", help="requirements.txt, pylock.toml or uv.lock.")
    ] = None,
    python: Annotated[str | None, typer.Option(help="Python to serve it with, like 3.12.")] = None,
    label: Annotated[list[str] | None, typer.Option("--label", "-l", metavar="KEY=VALUE", help="Repeatable.")] = None,
    no_deploy: Annotated[
        bool, typer.Option("--no-deploy", help="Build it, but leave the running version alone.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Accept inputs that do not fit the running version's.")
    ] = False,
    wait: Annotated[float, typer.Option(help="Seconds to wait until it is live.", min=0)] = _WAIT_SECONDS,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return once the files are stored.")] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Serve a model: upload, build, check its sample, go live.

    \b
    ekiben push churn.txt --sample rows.json
    ekiben push churn-v2.txt --name churn          # 0 failed requests while it rolls
    ekiben push model.onnx model.onnx.data         # files that belong together
    ekiben push my-project/                        # a folder with bentofile.yaml: your own code
    ekiben push --run RUN_ID --name churn          # the model of a training run in MLflow

    The model goes live only if it answers the sample, and where expected values are given, with those. A sample file
    may hold them itself: {"inputs": [...], "outputs": [...]}.
    """
    from ekiben import _documents

    paths = paths or []
    if paths and (run or artifact_path or model_uri):
        raise UsageError(
            "there are both a file and a run or model of MLflow", code="file_and_run", field="file", hint="give one"
        )
    labels = _labels(label or [])
    body, answers = (None, None) if sample is None else _documents.sample(sample)
    if expected is not None:
        answers = _documents.expected(expected)
    with session(ctx, url, as_json) as (client, out):
        title = paths[0].name if len(paths) == 1 else f"{len(paths)} files" if paths else str(run or model_uri)
        try:
            with out.uploading(title) as (total, sent):
                version = client.upload(
                    paths,
                    run_id=run,
                    artifact_path=artifact_path,
                    model_uri=model_uri,
                    name=name,
                    kind=kind,
                    sample=body,
                    expected=answers,
                    requirements=requirements,
                    python=python,
                    labels=labels,
                    deploy=not no_deploy,
                    force=force,
                    progress=sent,
                    prepared=total,
                    told=out.note,
                )
        except KeyboardInterrupt:
            out.note("interrupted: the upload was not finished; the same command goes on with it if it was in parts")
            raise typer.Exit(130) from None
        follow(client, out, version, 0.0 if no_wait else wait, deploy=not no_deploy, started=not no_wait)


def follow(client: Client, out: Output, version: dict[str, Any], wait: float, *, deploy: bool, started: bool) -> None:
    """Show the stages of a version until it is live (or built), then its summary. Exits 1 when it fails."""
    model, number = version["model"], version["version"]
    try:
        if started:
            with out.stages() as show:
                version = client.wait(version, wait, lambda now: show(_stage(now)), deploy=deploy)
    except KeyboardInterrupt:
        out.note(f"interrupted: {model} version {number} goes on without you")
        out.note(f"  follow it: ekiben status {model}   stop it: ekiben rm {model}:{number}")
        raise typer.Exit(130) from None
    except (VersionFailed, StillWorking) as error:
        if out.as_json:
            out.value(error.version if isinstance(error, VersionFailed) else error.known)
        raise
    if out.as_json:
        out.value(version)
        return
    out.ticks(*summary(version))
    if version["state"] == "live" or not started:
        out.line(f"{version.get('url')}   (docs: {_short_docs(version)})")


def summary(version: dict[str, Any]) -> list[str]:
    """What was done, in the words of the first screen of the README."""
    done = [" · ".join(filter(None, (version["kind"], _features(version.get("signature")))))]
    checked = version.get("checked") or {}
    rows = checked.get("rows")
    verified = version.get("verified")
    if verified == "expected" and rows:
        done.append(f"{checked.get('matched')}/{rows} predictions match")
    elif verified == "sample" and rows:
        done.append(f"{rows} rows of the sample predicted")
    elif verified == "synthetic":
        done.append("1 synthetic row predicted")
    state = version["state"]
    if state == "live":
        seconds = sum(value for value in (version.get("seconds") or {}).values() if isinstance(value, (int, float)))
        done.append(f"live in {seconds:.1f} s" if seconds else "live")
    else:
        done.append({"queued": "stored", "building": "stored, building"}.get(state, state))
    return done


def _features(signature: Any) -> str | None:
    count = signature.get("n_features") if isinstance(signature, dict) else None
    return None if count is None else f"{count} feature" + ("" if count == 1 else "s")


def _short_docs(version: dict[str, Any]) -> str:
    """`…/docs` where it stands beside the predict route, as it always should."""
    url, docs = str(version.get("url")), str(version.get("docs"))
    return "…/docs" if docs == url.rsplit("/", 1)[0] + "/docs" else docs


def _stage(version: dict[str, Any]) -> str:
    state = str(version["state"])
    if state == "building" and version.get("stage"):
        return f"building: {version['stage']}"
    return {"queued": "waiting for a builder", "rolling": "starting, checking the sample"}.get(state, state)


def _labels(given: list[str]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(
                f"the label {text!r} has no value", code="bad_label", field="labels", hint="--label team=growth"
            )
        labels[key] = value
    return labels
