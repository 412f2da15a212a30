"""Back up and restore an installation whose PostgreSQL and MinIO are those of k8s/components.

    python -m scripts.backup save FOLDER       rows first, then objects: no row is without its object
    python -m scripts.backup restore FOLDER    objects first, then rows; the service is stopped meanwhile

FOLDER gets `ekiben.dump` and `mlflow.dump` (pg_dump's own format) and `objects/` (one file an object, by its key). What
serves goes on serving during both. Images are not kept: an image that the registry does not have is built again, by the
same bytes. With an S3 store and a database of your own, use their own tools in this order (docs/kubernetes.md).
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from registry.s3 import Bucket, S3Config
from registry.s3_store import S3Store
from registry.store import DirectoryStore, ObjectMissing, ObjectStore
from scripts.kubernetes import NAMESPACE, Trouble, kubectl, wait

DATABASES = ("ekiben", "mlflow")
WRITERS = ("ekiben", "mlflow")
"""Deployments that write rows and objects."""
_POSTGRES = ("-n", NAMESPACE, "exec", "statefulset/postgres", "--stdin", "--")
_CHUNK = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("save", "restore"))
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args()
    try:
        (save if asked.verb == "save" else restore)(asked.folder)
    except Trouble as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def save(folder: Path) -> None:
    """A complete copy; the folder must not hold an earlier one. Raises Trouble."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise Trouble(f"{folder} is not empty: a backup gets a folder of its own")
    for name in DATABASES:
        _database(["pg_dump", "--username=ekiben", "--format=custom", name], output=folder / f"{name}.dump")
    with _bucket() as bucket:
        count = _copy(bucket, DirectoryStore(folder / "objects"))
    print(f"saved {', '.join(DATABASES)} and {count} objects in {folder}")


def restore(folder: Path) -> None:
    """The installation as it was saved; what it has now is lost. Raises Trouble."""
    missing = [f"{name}.dump" for name in DATABASES if not (folder / f"{name}.dump").is_file()]
    if missing or not (folder / "objects").is_dir():
        raise Trouble(f"{folder} is no backup: it lacks {', '.join(missing) or 'objects/'}")
    with _stopped():
        with _bucket() as bucket:
            count = _copy(DirectoryStore(folder / "objects"), bucket)
        for name in DATABASES:
            _database(["dropdb", "--username=ekiben", "--if-exists", "--force", name])
            _database(["createdb", "--username=ekiben", name])
            command = ["pg_restore", "--username=ekiben", "--exit-on-error", "--single-transaction"]
            _database([*command, f"--dbname={name}"], source=folder / f"{name}.dump")
    print(f"restored {count} objects and {', '.join(DATABASES)}")


@contextmanager
def _stopped() -> Iterator[None]:
    """Nobody writes: a service that finds an empty database would delete the deployments that it does not know."""
    replicas = {}
    for name in WRITERS:
        found = json.loads(kubectl("-n", NAMESPACE, "get", "deployment", name, "-o", "json"))
        replicas[name] = found["spec"].get("replicas", 1) or 1
        kubectl("-n", NAMESPACE, "scale", "deployment", name, "--replicas=0")
    for name in WRITERS:
        chosen = f"app.kubernetes.io/name={name}"
        kubectl("-n", NAMESPACE, "wait", "--for=delete", "pod", "-l", chosen, "--timeout=180s")
    yield  # where restoring fails, they stay stopped: half of a backup is no state to work on
    for name, count in replicas.items():
        kubectl("-n", NAMESPACE, "scale", "deployment", name, f"--replicas={count}")
    wait(600)


def _copy(source: ObjectStore, target: ObjectStore) -> int:
    """All objects; uploads that are under way are none yet."""
    count = 0
    for info in source.list(""):
        try:
            stream = source.open(info.key)
        except ObjectMissing:  # deleted since it was listed
            continue
        with stream:
            writer = target.writer(info.key)
            try:
                while chunk := stream.read(_CHUNK):
                    writer.write(chunk)
                writer.commit()
            finally:
                writer.abort()
        count += 1
    return count


@contextmanager
def _bucket() -> Iterator[S3Store]:
    """The installation's bucket, through a tunnel: its store is not reachable from outside."""
    secret = json.loads(kubectl("-n", NAMESPACE, "get", "secret", "ekiben-s3", "-o", "json"))["data"]
    keys = {key: base64.b64decode(value).decode() for key, value in secret.items()}
    command = ["kubectl", "-n", NAMESPACE, "port-forward", "service/minio", ":9000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as tunnel:
        try:
            assert tunnel.stdout is not None
            found = re.search(r"127\.0\.0\.1:(\d+)", tunnel.stdout.readline())
            if found is None:
                raise Trouble("there is no way to the Service minio; kubectl's message is above")
            endpoint = f"http://127.0.0.1:{found[1]}"
            config = S3Config(
                endpoint=endpoint, bucket="ekiben", access_key=keys["access-key"], secret_key=keys["secret-key"]
            )
            store = S3Store(Bucket(config))
            store.prepare()
            yield store
            store.close()
        finally:
            tunnel.terminate()


def _database(command: list[str], *, output: Path | None = None, source: Path | None = None) -> None:
    """A program of PostgreSQL's in its own pod, in which its owner needs no password."""
    with (
        source.open("rb") if source else open(os.devnull, "rb") as stdin,
        output.open("wb") if output else open(os.devnull, "wb") as stdout,
    ):
        done = subprocess.run(
            ["kubectl", *_POSTGRES, *command], stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, check=False
        )
    if done.returncode != 0:
        raise Trouble(f"{' '.join(command)}\n{done.stderr.decode(errors='replace').strip()}")


if __name__ == "__main__":
    if shutil.which("kubectl") is None:
        sys.exit("kubectl is not installed")
    sys.exit(main())
