"""Nodes that are not there: kwok says that their pods run, and a small server answers for all of them.

`python -m benchmarks.simulated PORT` is that server.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from benchmarks import parts
from benchmarks.figures import ROOT

if TYPE_CHECKING:
    from tests.cluster.cluster import Cluster
    from tests.cluster.nodes import Node

_PODS = 110  # of one node
_MARK = "kwok.x-k8s.io/node"
# A kubelet that could not renew its lease in time puts right afterwards what the node controller then wrote into its
# pods; kwok's own stages leave them unready for ever.
_READY = """\
{{ $now := Now }}
conditions:
{{ range .status.conditions }}
- type: {{ .type | Quote }}
  status: "True"
  lastTransitionTime: {{ $now | Quote }}
{{ end }}
"""
_RESTORED = {
    "apiVersion": "kwok.x-k8s.io/v1alpha1",
    "kind": "Stage",
    "metadata": {"name": "pod-ready-again"},
    "spec": {
        "resourceRef": {"apiGroup": "v1", "kind": "Pod"},
        "selector": {
            "matchExpressions": [
                {"key": ".metadata.deletionTimestamp", "operator": "DoesNotExist"},
                {"key": ".status.phase", "operator": "In", "values": ["Running"]},
                {"key": '.status.conditions.[] | select( .type == "Ready" ) | .status', "operator": "In",
                 "values": ["False"]},
            ]
        },
        "delay": {"durationMilliseconds": 1000},
        "next": {"statusTemplate": _READY},
    },
}  # fmt: skip
_CHECKED = {"verified": "expected", "rows": 5, "matched": 5}


@contextlib.contextmanager
def nodes(cluster: Cluster, pods: int) -> Iterator[None]:
    """Room for `pods` simulated pods and as many that replace them; new pods go nowhere else."""
    from tests.cluster import cluster as clusters
    from tests.cluster import nodes, programs

    assert cluster.root is not None
    node = nodes.find(cluster.root)
    assert node is not None
    program = programs.get("kwok", parts.say)
    stages = programs.module_folder("kwok", "sigs.k8s.io/kwok") / "kustomize" / "stage"
    files = [*sorted((stages / "node" / "fast").glob("*.yaml")), *sorted((stages / "pod" / "fast").glob("*.yaml"))]
    config = cluster.root / "kwok.yaml"
    told = [file.read_text() for file in files if file.stem != "kustomization"]
    config.write_text("\n---\n".join([*told, json.dumps(_RESTORED)]))
    addresses = f"10.{node.network.second}.64.0/18"  # behind the node, and of nobody else
    kwok = [
        str(program),
        f"--kubeconfig={cluster.kubeconfig}",
        f"--config={config}",
        f"--manage-nodes-with-annotation-selector={_MARK}=fake",
        f"--cidr={addresses}",
        f"--node-ip=10.{node.network.second}.64.1",
        "--node-lease-duration-seconds=40",
    ]
    names = [f"simulated-{number}" for number in range(-(-2 * pods // _PODS))]
    node.run("ip", "route", "replace", "local", addresses, "dev", "lo")
    server = [sys.executable, "-m", "benchmarks.simulated", "3000"]
    try:
        with _runs(node, "kwok", kwok), _runs(node, "simulated-pods", server):
            cluster.apply({"apiVersion": "v1", "kind": "List", "items": [_node(name) for name in names]})
            cluster.kubectl("wait", "--for=condition=Ready", "--timeout=120s", *(f"node/{name}" for name in names))
            cluster.kubectl("cordon", clusters.NAME)
            try:
                yield
            finally:
                cluster.kubectl("delete", "node", *names, "--ignore-not-found")
                cluster.kubectl("uncordon", clusters.NAME)
    finally:
        node.run("ip", "route", "delete", "local", addresses, "dev", "lo")


def _node(name: str) -> dict[str, Any]:
    room = {"cpu": "256", "memory": "1Ti", "pods": str(_PODS), "ephemeral-storage": "1Ti"}
    labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels, "annotations": {_MARK: "fake"}},
        "status": {"allocatable": room, "capacity": room},
    }


@contextlib.contextmanager
def _runs(node: Node, name: str, argv: Sequence[str]) -> Iterator[None]:
    """A program inside of the node that ends with the block."""
    with (node.root / "logs" / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            node.command(argv), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, start_new_session=True
        )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # `nsenter` and what it started
        process.wait()


class _Answer(BaseHTTPRequestHandler):
    """As a model's process answers when it is asked for its golden sample's outcome."""

    def do_GET(self) -> None:
        body = json.dumps({"checked": _CHECKED}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: there are thousands."""


if __name__ == "__main__":
    ThreadingHTTPServer(("", int(sys.argv[1])), _Answer).serve_forever()
