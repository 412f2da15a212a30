"""`python -m build_service.kubernetes.secrets_job`: the Secrets that the parts of an installation share, made once.

Its ServiceAccount may create Secrets and read none. Every password is derived from one random seed, the first Secret
that is made; a later run gets it as a mounted file. So a run that was killed is finished by the next with the same
passwords, and one that is deleted comes back as it was. What exists is left alone.
"""

from __future__ import annotations

import argparse
import base64
import hmac
import http.client
import json
import os
import secrets
import ssl
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import bcrypt

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_SEED = "ekiben-seed"
_SECONDS = 30


@dataclass(frozen=True)
class Places:
    """Where the parts are reached. The registry's HOST:PORT are those where builds push, where they read, and where
    nodes pull."""

    namespace: str = "ekiben"
    builds: str = "ekiben-builds"
    models: str = "ekiben-models"
    database: str = "postgres.ekiben.svc:5432"
    push: str = "registry.ekiben.svc:5000"
    read: str = "registry.ekiben.svc:5001"
    pull: str = "localhost:30500"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seed", type=Path, required=True, help="where the Secret ekiben-seed is mounted, if it exists"
    )
    for name, default in vars(Places()).items():
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument(
        "--account", type=Path, default=_ACCOUNT, help="folder of the ServiceAccount's token and ca.crt"
    )
    given = vars(parser.parse_args())
    file, account = given.pop("seed"), given.pop("account")
    places = Places(**given)
    seed = file.read_bytes() if file.is_file() else None
    if seed is None:
        seed = secrets.token_hex(32).encode()
        if not _create(account, places.namespace, _secret(_SEED, {"seed": seed.decode()})):
            print("the Secret ekiben-seed was made by another run: the next one gets it", file=sys.stderr)
            return 1
    for namespace, secret in wanted(seed, places):
        made = _create(account, namespace, secret)
        print(f"{namespace}/{secret['metadata']['name']}: {'made' if made else 'is there'}")  # type: ignore[index]
    return 0


def wanted(seed: bytes, places: Places) -> Iterator[tuple[str, dict[str, object]]]:
    """(namespace, Secret) of everything, with passwords that follow from the seed."""

    def password(name: str) -> str:
        return hmac.digest(seed, name.encode(), "sha256").hex()[:40]

    def users(*names: str) -> str:
        lines = (f"{name}:{bcrypt.hashpw(password(name).encode(), bcrypt.gensalt(10)).decode()}" for name in names)
        return "\n".join(lines) + "\n"

    def login(name: str, host: str) -> dict[str, str]:
        basic = base64.b64encode(f"{name}:{password(name)}".encode()).decode()
        return {".dockerconfigjson": json.dumps({"auths": {host: {"auth": basic}}})}

    docker = "kubernetes.io/dockerconfigjson"
    database = f"ekiben:{password('postgres')}@{places.database}"
    yield places.namespace, _secret("ekiben-postgres", {"password": password("postgres")})
    yield places.namespace, _secret("ekiben-database", {"url": f"postgresql+psycopg://{database}/ekiben"})
    yield places.namespace, _secret("ekiben-mlflow", {"database-url": f"postgresql+psycopg2://{database}/mlflow"})
    yield places.namespace, _secret("ekiben-s3", {"access-key": "ekiben", "secret-key": password("s3")})
    registry = {"push": users("push"), "pull": users("read", "pull"), "http-secret": password("http")}
    yield places.namespace, _secret("ekiben-registry", registry)
    yield places.builds, _secret("ekiben-registry-push", login("push", places.push), docker)
    yield places.builds, _secret("ekiben-registry-read", login("read", places.read), docker)
    for namespace in (places.builds, places.models):
        yield namespace, _secret("ekiben-registry-pull", login("pull", places.pull), docker)


def _secret(name: str, values: Mapping[str, str], kind: str = "Opaque") -> dict[str, object]:
    marks = {"app.kubernetes.io/part-of": "ekiben"}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "labels": marks},
        "type": kind,
        "stringData": dict(values),
    }


def _create(account: Path, namespace: str, secret: dict[str, object]) -> bool:
    """Whether it was made; False: there is one already.

    By the API itself: importing the client takes longer than all of this takes to run.
    """
    trust = ssl.create_default_context(cafile=str(account / "ca.crt"))
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], int(os.environ["KUBERNETES_SERVICE_PORT"])
    connection = http.client.HTTPSConnection(host, port, timeout=_SECONDS, context=trust)
    try:
        headers = {"Authorization": f"Bearer {(account / 'token').read_text()}", "Content-Type": "application/json"}
        connection.request("POST", f"/api/v1/namespaces/{namespace}/secrets", json.dumps(secret), headers)
        answer = connection.getresponse()
        text = answer.read(2000).decode(errors="replace")
    finally:
        connection.close()
    if answer.status == 201:
        return True
    if answer.status == 409 and '"AlreadyExists"' in text:
        return False
    raise SystemExit(f"{namespace}/{secret['metadata']['name']} was refused: {answer.status} {text}")  # type: ignore[index]


if __name__ == "__main__":
    sys.exit(main())
