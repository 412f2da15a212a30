"""login, token: who may call"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ekiben._commands import Commands, Json, Url, printing, session
from ekiben._errors import UsageError


def add(app: typer.Typer) -> None:
    app.command()(login)
    token = typer.Typer(
        cls=Commands, help="Tokens of the server: create, list, revoke.", no_args_is_help=True, rich_markup_mode=None
    )
    token.command("create")(create)
    token.command("list")(list_)
    token.command("revoke")(revoke)
    app.add_typer(token, name="token")


def login(
    ctx: typer.Context,
    url: Annotated[str, typer.Argument(metavar="URL", help="Address of the server.")],
    token: Annotated[str | None, typer.Option(help="Its token; - reads it from standard input.")] = None,
    ca: Annotated[Path | None, typer.Option(help="PEM file of your own certificate authority.")] = None,
    as_json: Json = False,
) -> None:
    """Remember a server and its token.

    \b
    ekiben login https://models.example.org --token -      # paste it: so it is in no shell history
    ekiben login http://localhost:8000

    The token is kept in ~/.config/ekiben/config.json, readable by you only, and sent to this server only.
    """
    import sys

    from ekiben import _config
    from ekiben._client import Client

    out = printing(ctx, as_json)
    address = _config.normal(url)
    if token == "-":
        token = (
            sys.stdin.readline().strip() if not sys.stdin.isatty() else typer.prompt("token", hide_input=True, err=True)
        )
    if token is not None and (not token or not token.isascii() or any(c.isspace() for c in token)):
        raise UsageError("the token is empty or holds spaces", code="bad_token", field="token", hint="paste it whole")
    if ca is not None and not ca.is_file():
        raise UsageError(f"there is no file {ca}", code="bad_ca", field="ca", hint="--ca FILE.pem")
    if token and address.startswith("http://") and not _config.is_loopback(address):
        out.note("warning: without https the token can be read on its way; put TLS in front of the server")
    with Client(address, token, str(ca) if ca else None) as client:
        client.models()  # proves the address and the token before they are stored
    file = _config.remember(address, token, str(ca) if ca else None)
    if out.as_json:
        out.value({"url": address, "config": str(file)})
    else:
        out.ticks(f"logged in to {address}")


def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose or what for, to know it again.")],
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Make a token. It is shown once.

    \b
    ekiben token create ci
    """
    with session(ctx, url, as_json) as (client, out):
        made = client.create_token(name)
        if out.as_json:
            out.value(made)
        else:
            out.line(str(made.get("token")))
            out.note("keep it now: it is shown this once, and the server stores its digest only")


def list_(ctx: typer.Context, url: Url = None, as_json: Json = False) -> None:
    """Show the tokens, without their secrets.

    \b
    ekiben token list
    """
    with session(ctx, url, as_json) as (client, out):
        found = client.tokens()
        if out.as_json:
            out.value({"items": found})
        else:
            from ekiben._commands.look import _timed

            out.table(
                _timed(found, "created"), ("id", "name", "created"), "there are no tokens: ekiben token create NAME"
            )


def revoke(
    ctx: typer.Context,
    token: Annotated[str, typer.Argument(metavar="ID", help="From ekiben token list.")],
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Make a token useless at once.

    \b
    ekiben token revoke 01JD...
    """
    with session(ctx, url, as_json) as (client, out):
        client.revoke_token(token)
        if out.as_json:
            out.value({"revoked": token})
        else:
            out.ticks(f"token {token} is revoked")
