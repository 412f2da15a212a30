"""Which object store the service keeps versions in, and the look for what was left unfinished there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from build_service.settings import Settings
from registry import versions
from registry.database import Database
from registry.store import DirectoryStore, ObjectStore

if TYPE_CHECKING:
    from registry.s3_store import S3Store


def make(settings: Settings) -> ObjectStore:
    """A bucket where an S3 service is set, a folder below the state folder otherwise."""
    return DirectoryStore(settings.root / "objects") if settings.s3_endpoint is None else bucket(settings)


def bucket(settings: Settings, *, patience: float = 120.0) -> S3Store:
    """The bucket that the settings name, seen to be usable. EkibenError where it is not. `patience`: the seconds that a
    call is tried for while the store is away."""
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
        patience=patience,
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
