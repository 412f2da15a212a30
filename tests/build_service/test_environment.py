"""Which variables reach builds, models and the command for MLflow, and which the service keeps."""

from __future__ import annotations

import os
import subprocess
import sys

from build_service import environment

OUTER = {
    "PATH": "/usr/bin",
    "HOME": "/home/me",
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
    "SSL_CERT_FILE": "/etc/ca.pem",
    "HTTPS_PROXY": "http://user:password@proxy:3128",
    "UV_INDEX_COMPANY_PASSWORD": "of the index",
    "DOCKER_CONFIG": "/home/me/.docker",
    "EKIBEN_TOKEN": "token",
    "EKIBEN_DATABASE": "postgresql://me:password@db/ekiben",
    "EKIBEN_INSPECT_NETWORK": "allow",
    "AWS_SECRET_ACCESS_KEY": "key",
    "AWS_REGION": "eu-central-1",
    "MLFLOW_TRACKING_PASSWORD": "of MLflow",
    "PGPASSWORD": "of the database",
    "PGSSLMODE": "require",
    "GITHUB_TOKEN": "a secret that Ekiben does not know",
    "BUILD_NUMBER": "7",
}


def test_builds_get_what_they_need_and_what_the_operator_names() -> None:
    given = environment.for_builds(OUTER, ["BUILD_NUMBER", "MISSING"])
    assert sorted(given) == [
        "BUILD_NUMBER", "DOCKER_CONFIG", "EKIBEN_INSPECT_NETWORK", "HOME", "HTTPS_PROXY", "LANG", "LC_ALL", "PATH",
        "SSL_CERT_FILE", "UV_INDEX_COMPANY_PASSWORD",
    ]  # fmt: skip
    assert "BUILD_NUMBER" not in environment.for_builds(OUTER)


def test_models_get_nothing_that_could_be_a_secret() -> None:
    assert sorted(environment.for_serving(OUTER)) == ["LANG", "LC_ALL", "PATH", "SSL_CERT_FILE"]


def test_the_command_for_mlflow_gets_the_credentials_of_mlflow_and_its_stores() -> None:
    given = environment.for_catalogue(OUTER)
    assert {"MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY"} <= set(given)
    assert not {"EKIBEN_TOKEN", "EKIBEN_DATABASE", "GITHUB_TOKEN", "PGPASSWORD"} & set(given)


def test_the_service_forgets_every_secret_in_its_variables_and_in_what_the_system_shows() -> None:
    program = (
        "import os\nfrom build_service import environment\nenvironment.forget()\n"
        "print(sorted(os.environ))\nprint(open('/proc/self/environ').read().split('\\0'))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], env=OUTER | {"PATH": os.environ["PATH"]}, capture_output=True, text=True,
        check=True,
    ).stdout  # fmt: skip
    kept, block = shown.splitlines()
    names = {"AWS_REGION", "HOME", "LANG", "LC_ALL", "PATH", "PGSSLMODE", "SSL_CERT_FILE"}
    assert {name for name in OUTER if f"'{name}'" in kept} == names
    for name in set(OUTER) - names:
        assert OUTER[name] not in block, name
    assert "LANG=C.UTF-8" in block
