"""What `make up PLATFORM=kubernetes` says while it waits, of statuses that a real cluster wrote."""

from __future__ import annotations

import ipaddress
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts import kubernetes
from tests.k8s.conftest import Server

ROOT = Path(__file__).resolve().parents[2]
STATUSES = ROOT / "tests" / "build_service" / "statuses"


def recorded(name: str) -> dict[str, Any]:
    return dict(json.loads((STATUSES / f"{name}.json").read_text()))


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("image_not_found", "cannot be pulled"),
        ("insufficient_memory", "Insufficient memory"),
        ("serving_crashed", "ended"),
    ],
)
def test_what_keeps_a_pod_is_told(name: str, word: str) -> None:
    told = [line for pod in recorded(name)["pods"] for line in kubernetes._troubles(pod)]
    assert told
    assert word in told[0]


def test_a_deployment_whose_pods_are_missing_is_waited_for() -> None:
    assert not kubernetes._rolled(recorded("image_not_found")["deployment"])


def test_an_api_server_that_the_policy_does_not_admit_is_noticed() -> None:
    policies = yaml.safe_load_all((ROOT / "k8s" / "base" / "network.yaml").read_text())
    (policy,) = (each for each in policies if each["metadata"]["name"] == "ekiben-to-api-server")
    anywhere, blocks = policy["spec"]["egress"]
    assert anywhere == {"ports": [{"port": 6443}]}
    for each in blocks["to"]:
        address = str(ipaddress.ip_network(each["ipBlock"]["cidr"])[1])
        assert kubernetes.admitted(address, 443)
        assert not kubernetes.admitted(address, 16443)
    assert kubernetes.admitted("203.0.113.7", 6443)
    assert not kubernetes.admitted("203.0.113.7", 443)


def test_what_cannot_work_is_refused_before_anything_is_applied(api_server: Server, tmp_path: Path) -> None:
    """A cluster without an answer, and a kubectl that is not there."""
    command = [sys.executable, "-m", "scripts.kubernetes", "up"]
    nowhere = tmp_path / "kubeconfig"
    nowhere.write_text(json.dumps({"apiVersion": "v1", "kind": "Config"}))
    path = f"{Path(api_server.program).parent}:/usr/bin:/bin"
    done = subprocess.run(
        command, cwd=ROOT, env={"PATH": path, "KUBECONFIG": str(nowhere)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "kubectl version" in done.stderr
    done = subprocess.run(command, cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "kubectl is not installed" in done.stderr
