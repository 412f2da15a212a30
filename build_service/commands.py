"""What an administrator runs beside the service, with the same settings: migrations, and the first token."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy.exc import OperationalError

from build_service import migrate, tokens
from build_service.settings import Settings
from registry.database import Database
from registry.errors import EkibenError, UserError

Command = Callable[[argparse.Namespace, Settings], int]


def add(parser: argparse.ArgumentParser) -> None:
    """The subcommands of `ekiben-server`; each leaves its function in `run`."""
    verbs = parser.add_subparsers(title="commands (none: run the service)", metavar="COMMAND")
    migrating = verbs.add_parser(
        "migrate",
        help="bring the database's tables to this release's schema",
        description="Bring the tables of EKIBEN_DATABASE to this release's schema. Safe to run at any time and in "
        "several places at once; the release before goes on working with the tables while a new one rolls out.",
    )
    migrating.set_defaults(run=_migrate)
    token = verbs.add_parser("token", help="make, list and revoke tokens, in the database itself")
    actions = token.add_subparsers(title="actions", metavar="ACTION", required=True)
    create = actions.add_parser(
        "create",
        help="make a token and print it, once",
        description="Make a token and print it, once: only its digest is kept. In a cluster: "
        "kubectl -n ekiben exec deploy/ekiben -- ekiben-server token create NAME",
    )
    create.add_argument("name", help="whose it is, for the list: letters, digits, space and . _ @ -")
    create.set_defaults(run=_create_token)
    actions.add_parser("list", help="list tokens, without what they are").set_defaults(run=_list_tokens)
    revoke = actions.add_parser("revoke", help="end a token")
    revoke.add_argument("id")
    revoke.set_defaults(run=_revoke_token)


def run(command: Command, arguments: argparse.Namespace, settings: Settings) -> int:
    """The exit code; an error is told as everywhere: what happened, its code, a hint."""
    try:
        return command(arguments, settings)
    except (EkibenError, OperationalError) as error:
        explain(error)
        return 1


def explain(error: EkibenError | OperationalError) -> None:
    if isinstance(error, EkibenError):
        print(f"ekiben-server: {error.detail} [{error.code}]\nhint: {error.hint}", file=sys.stderr)
        return
    print(
        f"ekiben-server: the database does not answer: {str(error.orig).strip()} [database_unavailable]\n"
        "hint: see that EKIBEN_DATABASE names it and that it runs",
        file=sys.stderr,
    )


def _migrate(_arguments: argparse.Namespace, settings: Settings) -> int:
    with _database(settings) as database:
        before = migrate.migrate(database)
        after = migrate.current(database)
    print(f"schema {after}" + (" (nothing to do)" if before == after else f", was {before or 'empty'}"))
    return 0


def _create_token(arguments: argparse.Namespace, settings: Settings) -> int:
    if re.fullmatch(r"[\w .@-]{1,64}", arguments.name) is None:
        raise UserError(
            "bad_token_name", f"{arguments.name[:40]!r} is no name of a token.",
            field="name", hint="Use up to 64 letters, digits, spaces and . _ @ -",
        )  # fmt: skip
    with _database(settings) as database:
        migrate.require(database)
        with database.write() as connection:
            _, token = tokens.make(connection, arguments.name)
    print(token)
    return 0


def _list_tokens(_arguments: argparse.Namespace, settings: Settings) -> int:
    with _database(settings) as database:
        migrate.require(database)
        with database.read() as connection:
            for row in tokens.all_of(connection):
                print(f"{row.id}  {'revoked' if row.revoked is not None else 'valid  '}  {row.name}")
    return 0


def _revoke_token(arguments: argparse.Namespace, settings: Settings) -> int:
    with _database(settings) as database:
        migrate.require(database)
        with database.write() as connection:
            found = tokens.revoke(connection, arguments.id)
    if not found:
        raise UserError(
            "token_not_found", f"There is no token {arguments.id[:40]!r}.",
            field="id", hint="ekiben-server token list", status=404,
        )  # fmt: skip
    return 0


@contextmanager
def _database(settings: Settings) -> Iterator[Database]:
    settings.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    database = Database(settings.database_url)
    try:
        yield database
    finally:
        database.close()
