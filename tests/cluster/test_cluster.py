"""What the tests of this folder stand on: pods run, are found, are reached through both kinds of routes, and pull."""

from __future__ import annotations

from builder_image import remote
from tests.cluster.cluster import Cluster
from tests.cluster.workloads import eventually, get, job_of, run, run_job, serve


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
    code = """
import os, subprocess, sys
def run(*command):
    subprocess.run(command, check=True)
run(sys.executable, "-m", "venv", "/tmp/v")
run("/tmp/v/bin/pip", "install", "--quiet", "uv")
run("/tmp/v/bin/pip", "download", "--quiet", "--no-deps", "--dest", "/tmp/d", "idna==3.10")
run("/tmp/v/bin/uv", "pip", "install", "--quiet", "--target", "/tmp/t", "sniffio==1.3.1")
print(os.listdir("/tmp/d"), os.path.exists("/tmp/t/sniffio"))
"""
    job = job_of("job", python_image, code)
    job["spec"]["template"]["spec"] = cluster.with_way_out(namespace, job["spec"]["template"]["spec"])
    run_job(cluster, namespace, job)
    assert "['idna-3.10-py3-none-any.whl'] True" in cluster.kubectl("logs", "-n", namespace, "job/job")
