"""What the tests of this folder stand on: pods run, are found, are reached through both kinds of routes, and pull."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx

from builder_image import remote
from tests.cluster.cluster import Cluster

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


def test_the_node_is_ready_and_runs_the_version_that_is_pinned(cluster: Cluster) -> None:
    (node,) = cluster.get("nodes")["items"]
    ready = {each["type"]: each["status"] for each in node["status"]["conditions"]}["Ready"]
    assert (ready, node["status"]["nodeInfo"]["kubeletVersion"]) == ("True", "v1.34.4")


def test_a_job_runs_to_its_end_finds_services_by_name_and_its_logs_are_readable(
    cluster: Cluster, namespace: str, python_image: str
) -> None:
    code = "import socket; print('found', socket.gethostbyname('kubernetes.default.svc.cluster.local'))"
    run(cluster, namespace, "job", python_image, code)
    address = cluster.get("service", "kubernetes", "-n", "default")["spec"]["clusterIP"]
    assert cluster.kubectl("logs", "-n", namespace, "job/job") == f"found {address}\n"


def test_an_ingress_of_class_nginx_passes_the_path_on(cluster: Cluster, namespace: str, python_image: str) -> None:
    serve(cluster, namespace, "one", python_image)
    backend = {"service": {"name": "one", "port": {"number": 80}}}
    path = {"path": f"/inference/{namespace}", "pathType": "Prefix", "backend": backend}
    cluster.apply(
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "Ingress",
            "metadata": {"name": "one", "namespace": namespace},
            "spec": {"ingressClassName": "nginx", "rules": [{"http": {"paths": [path]}}]},
        }
    )
    url = f"{cluster.ingress_url}/inference/{namespace}/predict"
    assert eventually(lambda: get(url)) == f"one /inference/{namespace}/predict"


def test_an_http_route_chooses_by_a_header(cluster: Cluster, namespace: str, python_image: str) -> None:
    for name in ("one", "two"):
        serve(cluster, namespace, name, python_image)
    listener = {"name": "web", "port": 80, "protocol": "HTTP", "allowedRoutes": {"namespaces": {"from": "Same"}}}
    prefix = {"type": "PathPrefix", "value": f"/{namespace}"}
    header = {"name": "Variant", "value": "two"}
    cluster.apply(
        {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "Gateway",
            "metadata": {"name": "models", "namespace": namespace},
            "spec": {"gatewayClassName": "traefik", "listeners": [listener]},
        },
        {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "HTTPRoute",
            "metadata": {"name": "models", "namespace": namespace},
            "spec": {
                "parentRefs": [{"name": "models"}],
                "rules": [
                    {
                        "matches": [{"path": prefix, "headers": [header]}],
                        "backendRefs": [{"name": "two", "port": 80}],
                    },
                    {"matches": [{"path": prefix}], "backendRefs": [{"name": "one", "port": 80}]},
                ],
            },
        },
    )
    url = f"{cluster.ingress_url}/{namespace}/x"
    assert eventually(lambda: get(url)) == f"one /{namespace}/x"
    assert get(url, {"Variant": "two"}) == f"two /{namespace}/x"


def test_an_image_is_pulled_by_digest(cluster: Cluster, namespace: str, python_image: str) -> None:
    run(cluster, namespace, "job", python_image, "pass")
    (pod,) = cluster.get("pods", "-n", namespace)["items"]
    reference = remote.Reference.parse(python_image)
    assert reference.digest is not None
    assert pod["status"]["containerStatuses"][0]["imageID"].endswith(reference.digest)


def test_a_claim_gets_a_volume(cluster: Cluster, namespace: str, python_image: str) -> None:
    wanted = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "disk", "namespace": namespace}}
    cluster.apply({**claim, "spec": wanted})
    volume = {"name": "disk", "persistentVolumeClaim": {"claimName": "disk"}}
    mount = {"name": "disk", "mountPath": "/disk"}
    code = "open('/disk/written', 'w').write('kept'); print(open('/disk/written').read())"
    run(cluster, namespace, "job", python_image, code, {"volumes": [volume]}, {"volumeMounts": [mount]})
    assert cluster.kubectl("logs", "-n", namespace, "job/job") == "kept\n"


def test_a_pod_fetches_packages_the_way_the_host_does(cluster: Cluster, namespace: str, python_image: str) -> None:
    code = (
        "import subprocess as s, sys, os; s.run([sys.executable, '-m', 'venv', '/tmp/v'], check=True);"
        "s.run(['/tmp/v/bin/pip', 'download', '--quiet', '--no-deps', '--dest', '/tmp/d', 'idna==3.10'], check=True);"
        "print(os.listdir('/tmp/d'))"
    )
    job = job_of("job", python_image, code)
    job["spec"]["template"]["spec"] = cluster.with_way_out(namespace, job["spec"]["template"]["spec"])
    run_job(cluster, namespace, job)
    assert "['idna-3.10-py3-none-any.whl']" in cluster.kubectl("logs", "-n", namespace, "job/job")


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


def eventually(ask: Callable[[], str], seconds: float = 30) -> str:
    """The first answer that is not empty."""
    end = time.monotonic() + seconds
    while not (answer := ask()):
        assert time.monotonic() < end, f"no answer in {seconds:g} s"
        time.sleep(0.1)
    return answer


def _end_of(cluster: Cluster, namespace: str, name: str) -> str:
    conditions = cluster.get("job", name, "-n", namespace)["status"].get("conditions") or []
    return next((each["type"] for each in conditions if each["type"] in ("Complete", "Failed")), "")
