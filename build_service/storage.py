"""Which object store the service keeps versions in, and the hourly look for what was left unfinished there."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import structlog

from build_service.settings import Settings
from registry import versions
from registry.database import Database
from registry.store import DirectoryStore, ObjectStore

if TYPE_CHECKING:
    from registry.s3_store import S3Store

log = structlog.get_logger(__name__)

_SWEEP_SECONDS = 3600.0


def make(settings: Settings) -> ObjectStore:
    """A bucket where an S3 service is set, a folder below the state folder otherwise."""
    return DirectoryStore(settings.root / "objects") if settings.s3_endpoint is None else bucket(settings)


def bucket(settings: Settings) -> S3Store:
    """The bucket that the settings name, seen to be usable. EkibenError where it is not."""
    from registry.s3 import Bucket, S3Config  # half a second, for those who use it
    from registry.s3_store import S3Store

    assert settings.s3_endpoint is not None
    access, secret = settings.s3_keys or (None, None)
    config = S3Config(
        endpoint=settings.s3_endpoint,
        bucket=settings.s3_bucket,
        access_key=access,
        secret_key=None if secret is None else secret.get_secret_value(),
        region=settings.s3_region,
        ca=settings.s3_ca,
        presign_endpoint=settings.s3_presign_endpoint,
    )
    store = S3Store(Bucket(config), first_part=settings.s3_part_size)
    try:
        store.prepare()
    except BaseException:
        store.close()
        raise
    return store


def sweep(settings: Settings, database: Database, store: ObjectStore, *, starting: bool) -> set[str]:
    """Delete what was left unfinished; the locations of all versions."""
    with database.read() as connection:
        known = versions.locations(connection)
    # The lock on the state folder says that nobody writes into its objects; of a bucket it says nothing.
    alone = starting and settings.s3_endpoint is None
    store.sweep(known, stale=settings.stale_upload_seconds, alone=alone)
    return known


class Sweeper:
    """Sweeps while the service runs: an upload that stood still for too long need not wait for a restart."""

    def __init__(self, settings: Settings, database: Database, store: ObjectStore) -> None:
        self._settings, self._database, self._store = settings, database, store
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_SWEEP_SECONDS):
            try:
                sweep(self._settings, self._database, self._store, starting=False)
            except Exception:
                log.exception("the sweep of unfinished uploads stumbled; it tries again")
