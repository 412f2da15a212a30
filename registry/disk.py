"""A full disk said in words: the one error of the file system that a user can do something about."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

from registry.errors import InfrastructureError

T = TypeVar("T")


def translated(key: str, action: Callable[[], T]) -> T:
    """What the action gives; InfrastructureError `disk_full` where it found no room for the object `key`."""
    try:
        return action()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InfrastructureError(
                "disk_full",
                f"The object store has no room left for {key!r}.",
                hint="Free some space or point EKIBEN_HOME at a larger disk, then send the upload again.",
                status=507,
            ) from error
        raise
