"""The Job that makes the Secrets which the parts share, against a real API server as the account it runs as."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import bcrypt
import pytest
import yaml

from build_service.kubernetes import secrets_job
from tests.k8s.conftest import Server

ROOT = Path(__file__).resolve().parents[2]


def run(server: Server, account: Path, seed: Path) -> subprocess.CompletedProcess[str]:
    where = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(server.port)}
    argv = [sys.executable, "-m", "build_service.kubernetes.secrets_job", f"--seed={seed}", f"--account={account}"]
    return subprocess.run(argv, env={**os.environ, **where}, capture_output=True, text=True, check=False)


def value(server: Server, namespace: str, name: str, key: str) -> str:
    data = json.loads(server.ok("get", "secret", name, "-n", namespace, "-o", "json"))["data"]
    return base64.b64decode(data[key]).decode()


@pytest.fixture
def account(api_server: Server, tmp_path: Path) -> Path:
    """A ServiceAccount with the Roles of k8s/, and its token as a pod finds it."""
    api_server.ok("apply", "-f", str(ROOT / "k8s" / "base" / "namespaces.yaml"))
    objects = yaml.safe_load_all((ROOT / "k8s" / "components" / "generated-secrets" / "secrets.yaml").read_text())
    kinds = ("ServiceAccount", "Role", "RoleBinding")
    api_server.ok("apply", "-f", "-", text=yaml.safe_dump_all(each for each in objects if each["kind"] in kinds))
    (tmp_path / "token").write_text(api_server.ok("create", "token", "ekiben-secrets", "-n", "ekiben").strip())
    (tmp_path / "ca.crt").write_bytes(api_server.authority.read_bytes())
    return tmp_path


def test_a_run_that_was_killed_is_finished_with_the_same_passwords(
    api_server: Server, account: Path, tmp_path: Path
) -> None:
    first = run(api_server, account, tmp_path / "absent")
    assert first.returncode == 0, first.stderr
    password = value(api_server, "ekiben", "ekiben-postgres", "password")
    assert f"ekiben:{password}@" in value(api_server, "ekiben", "ekiben-database", "url")
    # a run between whose writes it was killed leaves only some of them
    api_server.ok("delete", "secret", "ekiben-postgres", "-n", "ekiben")
    unknowing = run(api_server, account, tmp_path / "absent")
    assert unknowing.returncode == 1  # another made the seed; whoever gets it mounted goes on
    seed = tmp_path / "seed"
    seed.write_text(value(api_server, "ekiben", "ekiben-seed", "seed"))
    second = run(api_server, account, seed)
    assert second.returncode == 0, second.stderr
    assert value(api_server, "ekiben", "ekiben-postgres", "password") == password
    assert second.stdout.count(": made") == 1


def test_the_account_reads_no_secret(api_server: Server, account: Path) -> None:
    who = "--as=system:serviceaccount:ekiben:ekiben-secrets"
    for verb in ("get", "list", "watch", "update", "patch", "delete"):
        assert api_server.kubectl("auth", "can-i", verb, "secrets", "-n", "ekiben", who).stdout.strip() == "no"
    assert api_server.ok("auth", "can-i", "create", "secrets", "-n", "ekiben", who).strip() == "yes"


def test_nodes_and_the_first_step_of_builds_may_read_and_cannot_push() -> None:
    made = {}
    for namespace, secret in secrets_job.wanted(b"seed", secrets_job.Places()):
        made[namespace, secret["metadata"]["name"]] = secret["stringData"]  # type: ignore[index]
    users = {
        part: dict(line.split(":", 1) for line in made["ekiben", "ekiben-registry"][part].splitlines())  # type: ignore[index]
        for part in ("push", "pull")
    }

    def admits(part: str, namespace: str, name: str) -> bool:
        config = json.loads(made[namespace, name][".dockerconfigjson"])  # type: ignore[index]
        ((_, entry),) = config["auths"].items()
        user, _, password = base64.b64decode(entry["auth"]).decode().partition(":")
        kept = users[part].get(user)
        return kept is not None and bcrypt.checkpw(password.encode(), kept.encode())

    assert admits("push", "ekiben-builds", "ekiben-registry-push")
    assert admits("pull", "ekiben-models", "ekiben-registry-pull")
    assert not admits("push", "ekiben-models", "ekiben-registry-pull")
    assert admits("pull", "ekiben-builds", "ekiben-registry-read")
    assert not admits("push", "ekiben-builds", "ekiben-registry-read")


def test_other_seeds_give_other_passwords() -> None:
    one, two = (
        {json.dumps(secret) for _, secret in secrets_job.wanted(seed, secrets_job.Places())} for seed in (b"1", b"2")
    )
    assert not one & two
