"""image, images, containerize, base: container images"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ekiben._commands import Commands, Json, Url, named, session
from ekiben._errors import EkibenError, StillWorking, UsageError
from ekiben._output import size

_PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True}


def add(app: typer.Typer) -> None:
    app.command()(image)
    app.command()(images)
    app.command(context_settings=_PASSED_ON)(containerize)
    base = typer.Typer(
        cls=Commands,
        help="Base images on the server's machine: import, list.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    base.command("import", context_settings=_PASSED_ON)(base_import)
    base.command("list")(base_list)
    app.add_typer(base, name="base")


def image(
    ctx: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="NAME[:VERSION]", help="A model; the newest version, if none is named.")
    ],
    push: Annotated[
        str | None, typer.Option(metavar="REF", help="Push it, like registry.example.org/ekiben:churn-3.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it on the server's machine: .tar, or a layout folder/.")
    ] = None,
    base: Annotated[str | None, typer.Option(metavar="NAME", help="Base image, see ekiben base list.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Plain http to a registry beyond loopback.")] = False,
    wait: Annotated[float, typer.Option(help="Seconds to wait for it.", min=0)] = 1800.0,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Make a container image of a model.

    \b
    ekiben image churn --push registry.example.org/ekiben:churn-3
    ekiben image churn:3 --output churn.tar        # then: podman load -i churn.tar

    The image runs anywhere, as any user, with a read-only root: podman run -p 3000:3000 REF
    """
    if (push is None) == (output is None):
        raise UsageError("an image goes to one place", code="usage", hint="give --push REF or --output FILE")
    model, number = named(name)
    wanted: dict[str, Any] = {} if base is None else {"base": base}
    if push is not None:
        wanted["push"] = {"ref": push, "insecure": True} if insecure else {"ref": push}
    else:
        # Relative to where the user stands; a trailing slash (a layout folder) must survive.
        text = os.path.abspath(str(output))
        wanted["output"] = text if Path(text).suffix else text + "/"
    with session(ctx, url, as_json) as (client, out):
        if output is not None and not client.connection.loopback:
            raise UsageError(
                "--output writes on the server's machine, and this server is another one",
                code="usage",
                hint="--push REF, then skopeo copy or podman pull here",
            )
        if number is None:
            number = int(client.version(model)["version"])
        build = client.submit_build(model, number, wanted)
        started = time.monotonic()
        pause = 0.1
        try:
            with out.stages() as show:
                while build["state"] in ("queued", "running"):
                    show(f"{build['state']}: {build.get('stage') or 'image'}")
                    if time.monotonic() - started > wait:
                        raise StillWorking(
                            f"the build {build['id']} goes on", known=build, hint=f"ekiben builds {build['id']}"
                        )
                    time.sleep(pause)
                    pause = min(pause * 1.3, 1.0)
                    build = client.build(str(build["id"]))
        except KeyboardInterrupt:
            out.note(f"interrupted: the build {build['id']} goes on; follow it: ekiben builds {build['id']}")
            raise typer.Exit(130) from None
        if out.as_json:
            out.value(build)
        if build["state"] != "succeeded":
            raise EkibenError(
                f"the image of {model} version {number} failed: {build.get('reason')}",
                code=build.get("code") or "build_failed",
                hint=build.get("hint") or f"ekiben builds {build['id']}",
            )
        if not out.as_json:
            made = build.get("image") or {}
            out.ticks(f"{model} version {number}", f"image in {time.monotonic() - started:.1f} s")
            out.line(
                " ".join(
                    str(part) for part in (made.get("ref") or push or wanted["output"], made.get("digest")) if part
                )
            )


def images(
    ctx: typer.Context,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Show the images that were made, with the size of each layer.

    \b
    ekiben images

    Sizes are as stored, compressed. Models of one kind share the layers deps and code, all of them the base: `new` is
    what an image added to what was there.
    """
    with session(ctx, url, as_json) as (client, out):
        found = made(client.builds())
        if out.as_json:
            out.value({"items": found})
            return
        out.table(by_layer(found), IMAGE_COLUMNS, "there are no images yet: ekiben image NAME --push REF")


IMAGE_COLUMNS = ("model", "version", "image", "base", "deps", "code", "model layer", "total", "new")


def made(builds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The newest build of each image, newest first as the builds are: model, version, and the image with its layers."""
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for build in builds:
        image = build.get("image")
        if build["state"] == "succeeded" and image and image.get("layers"):
            key = (build["model"], build["version"], image.get("digest"))
            newest.setdefault(key, {"model": build["model"], "version": build["version"], "image": image})
    return list(newest.values())


def by_layer(found: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A row for each image: the bytes of its layers by name, of all, and of those that were not there before."""
    rows = []
    for each in found:
        sizes: dict[str, int] = {}
        new = 0
        for layer in each["image"]["layers"]:
            sizes[layer["name"]] = sizes.get(layer["name"], 0) + layer["size"]
            new += 0 if layer.get("reused") else layer["size"]
        row = {"model layer" if name == "model" else name: size(count) for name, count in sizes.items()}
        named = each["image"].get("ref") or str(each["image"].get("digest", ""))[:19]
        row |= {"model": str(each["model"]), "version": str(each["version"]), "image": str(named)}
        rows.append(row | {"total": size(sum(sizes.values())), "new": size(new)})
    return rows


def containerize(
    ctx: typer.Context,
    bento: Annotated[str, typer.Argument(metavar="BENTO_TAG", help="A Bento of the local Bento store.")],
) -> None:
    """Make an image of any Bento, without docker.

    \b
    ekiben containerize summarizer:latest --push registry.example.org/summarizer:1
    ekiben containerize summarizer:latest --output image.tar --platform linux/arm64

    A drop-in for `bentoml containerize`, on this machine. Further options are those of
    `python -m builder_image containerize`.
    """
    _builder("containerize", bento, *ctx.args)


def base_import(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(metavar="REF|LAYOUT", help="An image in a registry, or an OCI layout.")],
) -> None:
    """Copy a base image once and describe it, for the images made on this machine.

    \b
    ekiben base import docker.io/library/python:3.11-slim
    """
    _builder("base", "import", source, *ctx.args)


def base_list(ctx: typer.Context, as_json: Json = False) -> None:
    """Show the base images of this machine.

    \b
    ekiben base list
    """
    import tomllib

    from ekiben import _config
    from ekiben._commands import printing

    out = printing(ctx, as_json)
    found = []
    for file in sorted((_config.home() / "bases").glob("*.toml")):
        try:
            described = tomllib.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise EkibenError(
                f"{file} cannot be read: {error}", code="bad_base", hint="import it again: ekiben base import REF"
            ) from None
        found.append({**described, "name": file.stem})
    if out.as_json:
        out.value({"items": found})
        return
    rows = [
        {"name": one["name"], "platform": platform, "python": described.get("version")}
        for one in found
        for platform, described in sorted((one.get("platforms") or {}).items())
    ]
    out.table(rows, ("name", "platform", "python"), "no base image is here yet: ekiben base import REF")


def _builder(*arguments: str) -> None:
    """Become the builder, which lives in the server's environment; its exit code is ours."""
    from ekiben import _server

    python = str(_server.server_python(os.environ))
    os.execv(python, [python, "-m", "builder_image", *arguments])
