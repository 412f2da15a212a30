"""Small workloads for tests: Python code as a Job or as a Deployment with a Service, and waiting for what they do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import httpx

from tests.cluster.cluster import Cluster

T = TypeVar("T")

_SERVER = """
import http.server, os
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = (os.environ["NAME"] + " " + self.path).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.ThreadingHTTPServer(("", 8080), Answer).serve_forever()
"""


def job_of(name: str, image: str, code: str) -> dict[str, Any]:
    container = {"name": "main", "image": image, "command": ["python3", "-c", code]}
    pod = {"restartPolicy": "Never", "containers": [container]}
    template = {"metadata": {"labels": {"app": name}}, "spec": pod}
    spec = {"backoffLimit": 0, "template": template}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}


def run(
    cluster: Cluster,
    namespace: str,
    name: str,
    image: str,
    code: str,
    of_pod: dict[str, Any] | None = None,
    of_container: dict[str, Any] | None = None,
) -> None:
    """Run Python code as a Job to its end, which must be a good one."""
    job = job_of(name, image, code)
    pod = job["spec"]["template"]["spec"]
    pod.update(of_pod or {})
    pod["containers"][0].update(of_container or {})
    run_job(cluster, namespace, job)


def run_job(cluster: Cluster, namespace: str, job: dict[str, Any]) -> None:
    name = job["metadata"]["name"]
    cluster.apply({**job, "metadata": {**job["metadata"], "namespace": namespace}})
    ended = eventually(lambda: _end_of(cluster, namespace, name), seconds=180)
    assert ended == "Complete", cluster.kubectl("logs", "-n", namespace, f"job/{name}")


def serve(cluster: Cluster, namespace: str, name: str, image: str) -> None:
    """A Deployment that answers with its name and the path, and its Service on port 80."""
    probe = {"tcpSocket": {"port": 8080}, "periodSeconds": 1}
    container = {
        "name": "main",
        "image": image,
        "command": ["python3", "-c", _SERVER],
        "env": [{"name": "NAME", "value": name}],
        "ports": [{"name": "http", "containerPort": 8080}],
        "readinessProbe": probe,
    }
    pod = {"containers": [container], "terminationGracePeriodSeconds": 0}
    labels = {"app": name}
    metadata = {"name": name, "namespace": namespace}
    template = {"metadata": {"labels": labels}, "spec": pod}
    spec = {"selector": {"matchLabels": labels}, "template": template}
    port = {"port": 80, "targetPort": "http"}
    cluster.apply(
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec},
        {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"selector": labels, "ports": [port]}},
    )
    cluster.kubectl("rollout", "status", "-n", namespace, f"deployment/{name}", "--timeout=120s")


def get(url: str, headers: dict[str, str] | None = None) -> str:
    answer = httpx.get(url, headers=headers, trust_env=False)
    return answer.text if answer.status_code == 200 else ""


def eventually(ask: Callable[[], T | None], seconds: float = 60) -> T:
    """The first answer that is not empty."""
    end = time.monotonic() + seconds
    while not (answer := ask()):
        if time.monotonic() > end:
            raise TimeoutError(f"no answer in {seconds:g} s")
        time.sleep(0.1)
    return answer


def _end_of(cluster: Cluster, namespace: str, name: str) -> str:
    conditions = cluster.get("job", name, "-n", namespace)["status"].get("conditions") or []
    return next((each["type"] for each in conditions if each["type"] in ("Complete", "Failed")), "")
