"""`make up PLATFORM=kubernetes`: an installation on the cluster of your kubeconfig, Ready, and how to reach it.

    python -m scripts.kubernetes up [--overlay k8s/overlays/dev] [--images HOST:PORT]
    python -m scripts.kubernetes down [--overlay k8s/overlays/dev] [--delete-state]

`up` is `kubectl apply -k OVERLAY`, then waits and says what it waits for. With `--images` it makes the images that
nobody publishes and pushes them there first. `down` takes the programs away; volumes, Secrets and namespaces stay, so
that the next `up` goes on with the same models, unless `--delete-state` is given.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OVERLAY = ROOT / "k8s" / "overlays" / "dev"
PINNED = ROOT / ".images" / "kubernetes"
OLDEST = (1, 31)
NAMESPACE, BUILDS, MODELS = "ekiben", "ekiben-builds", "ekiben-models"
UNPUBLISHED = ("service", "builder", "minio")
_OF_MODELS = "ingresses,horizontalpodautoscalers,poddisruptionbudgets,deployments,services,networkpolicies"
# The earlier name of `ekiben.default-deny`; one with our label is of a deployment, and the service's to delete.
_OLD_POLICIES = (
    "delete", "networkpolicies", "--field-selector=metadata.name=nothing", "--selector=!app.kubernetes.io/managed-by",
    "--ignore-not-found",
)  # fmt: skip
# Address blocks of the NetworkPolicy ekiben-to-api-server.
_API_BLOCKS = tuple(
    map(ipaddress.ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"))
)
_LOOK_SECONDS = 2.0

Object = Mapping[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("up", "down"))
    parser.add_argument("--overlay", type=Path, default=OVERLAY, metavar="FOLDER")
    parser.add_argument("--images", metavar="HOST:PORT", help="make images, push them there, and use them by digest")
    parser.add_argument("--insecure", action="store_true", help="with --images: push over plain http")
    parser.add_argument("--seconds", type=float, default=600, help="how long everything may take to be Ready")
    parser.add_argument("--delete-state", action="store_true", help="with down: all models, images and passwords too")
    asked = parser.parse_args()
    try:
        if asked.verb == "down":
            down(asked.overlay, delete_state=asked.delete_state)
        else:
            overlay = asked.overlay
            if asked.images is not None:
                overlay = with_images(overlay, asked.images, insecure=asked.insecure)
            up(overlay, asked.seconds)
    except Trouble as error:
        print(error, file=sys.stderr)
        return 1
    return 0


class Trouble(Exception):
    """What went wrong, and what to do, for the terminal."""


def with_images(overlay: Path, place: str, *, insecure: bool = False) -> Path:
    """An overlay of `overlay` with images of this checkout, pushed to `place`."""
    command = [sys.executable, "-m", "scripts.images", *UNPUBLISHED, "--push", place]
    command += ["--kustomization", str(PINNED), "--overlay", str(overlay)]
    command += ["--insecure"] if insecure else []
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        raise Trouble("the images were not made; the reason is above")
    return PINNED


def up(overlay: Path, seconds: float = 600) -> None:
    """Apply an overlay to the current cluster and wait until all of it is Ready. Raises Trouble."""
    _look_at_the_cluster()
    # It ended long ago, or is to start again with a new image: a Job's template cannot be changed.
    kubectl("-n", NAMESPACE, "delete", "job", "ekiben-secrets", "--ignore-not-found")
    kubectl("apply", "-k", str(overlay))
    for namespace in (NAMESPACE, BUILDS, MODELS):
        kubectl("-n", namespace, *_OLD_POLICIES)
    wait(seconds)
    url = _setting("EKIBEN_PUBLIC_URL")
    print(f"Ekiben is up: {url} (API at {url}/docs)")
    print(f"a token: kubectl -n {NAMESPACE} exec deploy/ekiben -- ekiben-server token create NAME")


def down(overlay: Path, *, delete_state: bool) -> None:
    """Delete what an overlay made, and what the service made. Raises Trouble."""
    objects = _rendered(overlay)
    # The service first: it would make again what is deleted here.
    kubectl("-n", NAMESPACE, "delete", "deployment", "ekiben", "--ignore-not-found", "--cascade=foreground")
    routes = kubectl("api-resources", "--api-group=gateway.networking.k8s.io", "-o", "name")
    of_models = _OF_MODELS + (",httproutes" if "httproutes" in routes else "")
    for namespace, kinds in ((BUILDS, "jobs,networkpolicies"), (MODELS, of_models)):
        kubectl("-n", namespace, "delete", kinds, "-l", "app.kubernetes.io/managed-by=ekiben", "--ignore-not-found")
    going = [each for each in objects if delete_state or each["kind"] != "Namespace"]
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": going})
    kubectl("delete", "--ignore-not-found", "-f", "-", text=text)
    print("down" if delete_state else "down; volumes, Secrets and namespaces stay for the next `up`")


def wait(seconds: float) -> None:
    """Until every Deployment and StatefulSet of the service's namespace is rolled out, and the pods of before are gone;
    says what is missing."""
    end, told = time.monotonic() + seconds, ""
    while True:
        found = _json("-n", NAMESPACE, "get", "deployments,statefulsets,pods", "-o", "json")["items"]
        missing = sorted(each["metadata"]["name"] for each in found if not _settled(each))
        if not missing:
            return
        troubles = sorted({words for each in found if each["kind"] == "Pod" for words in _troubles(each)})
        if (now := "\n".join([f"waiting for {', '.join(missing)} …", *troubles])) != told:
            print(now, flush=True)
            told = now
        if time.monotonic() > end:
            raise Trouble(
                f"not Ready after {seconds:g} s: {', '.join(missing)}\n"
                f"hint: kubectl -n {NAMESPACE} describe pods; docs/kubernetes.md, “When something is wrong”"
            )
        time.sleep(_LOOK_SECONDS)


def kubectl(*arguments: str, text: str | None = None) -> str:
    try:
        done = subprocess.run(["kubectl", *arguments], input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Trouble("kubectl is not installed: see kubernetes.io/docs/tasks/tools") from None
    if done.returncode != 0:
        raise Trouble(f"kubectl {' '.join(arguments)}\n{done.stderr.strip()}")
    return done.stdout


def _look_at_the_cluster() -> None:
    server = _json("version", "-o", "json")["serverVersion"]
    version = tuple(int("".join(filter(str.isdigit, server[part]))) for part in ("major", "minor"))
    if version < OLDEST:
        raise Trouble(f"this cluster is Kubernetes {server['gitVersion']}; Ekiben needs {'.'.join(map(str, OLDEST))}")
    context = kubectl("config", "current-context").strip()
    print(f"cluster {context}, Kubernetes {server['gitVersion']}")
    for address, port in _api_servers():
        if not admitted(address, port):
            print(
                f"warning: the API server is at {address}, port {port}, which the NetworkPolicy ekiben-to-api-server "
                "does not admit: patch it in your overlay (docs/kubernetes.md, “Addresses”)"
            )
    classes = _json("get", "storageclasses", "-o", "json")["items"]
    default = "storageclass.kubernetes.io/is-default-class"
    if not any(each["metadata"].get("annotations", {}).get(default) == "true" for each in classes):
        print("warning: there is no default StorageClass; volumes wait until there is one")


def _api_servers() -> Iterator[tuple[str, int]]:
    """Where pods reach the API server: what the Service `kubernetes` leads to."""
    found = _json("-n", "default", "get", "endpointslices", "-l", "kubernetes.io/service-name=kubernetes", "-o", "json")
    for each in found["items"]:
        for port in each.get("ports") or ():
            for endpoint in each.get("endpoints") or ():
                yield from ((address, port["port"]) for address in endpoint["addresses"])


def admitted(address: str, port: int) -> bool:
    """Whether k8s/base lets the service reach an API server there."""
    return port == 6443 or (port == 443 and any(ipaddress.ip_address(address) in block for block in _API_BLOCKS))


def _rendered(overlay: Path) -> list[dict[str, Any]]:
    """The objects of an overlay, as kubectl itself reads them; nothing is sent."""
    printed = kubectl("create", "-k", str(overlay), "--dry-run=client", "--validate=false", "-o", "json")
    return list(_documents(printed))


def _documents(printed: str) -> Iterator[dict[str, Any]]:
    """kubectl prints JSON documents one after the other, or a List."""
    decoder, at = json.JSONDecoder(), 0
    while rest := printed[at:].lstrip():
        found, length = decoder.raw_decode(rest)
        at = len(printed) - len(rest) + length
        yield from found["items"] if found["kind"] == "List" else [found]


def _setting(name: str) -> str:
    """As the running service has it."""
    deployment = _json("-n", NAMESPACE, "get", "deployment", "ekiben", "-o", "json")
    source = deployment["spec"]["template"]["spec"]["containers"][0]["envFrom"][0]["configMapRef"]["name"]
    return str(_json("-n", NAMESPACE, "get", "configmap", source, "-o", "json")["data"].get(name, ""))


def _json(*arguments: str) -> Any:
    return json.loads(kubectl(*arguments))


def _settled(each: Object) -> bool:
    """Rolled out; or a pod that stays, so that whoever calls now is answered by one that does."""
    return "deletionTimestamp" not in each["metadata"] if each["kind"] == "Pod" else _rolled(each)


def _rolled(workload: Object) -> bool:
    wanted, status = workload["spec"].get("replicas", 1), workload.get("status", {})
    if status.get("observedGeneration") != workload["metadata"]["generation"]:
        return False
    return wanted == 0 or all(status.get(key, 0) == wanted for key in ("replicas", "updatedReplicas", "readyReplicas"))


def _troubles(pod: Object) -> Iterator[str]:
    """Why a pod does not start, where that does not pass by itself within a moment."""
    status, name = pod.get("status", {}), pod["metadata"]["name"]
    for container in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
        waiting = container.get("state", {}).get("waiting") or {}
        if waiting.get("reason") in ("ErrImagePull", "ImagePullBackOff", "InvalidImageName"):
            yield f"  {name}: the image {container['image']} cannot be pulled; k8s/images/kustomization.yaml names it"
        elif waiting.get("reason") == "CrashLoopBackOff":
            ended = (container.get("lastState", {}).get("terminated") or {}).get("message") or "without a word"
            yield f"  {name}: {container['name']} ended: {' '.join(ended.split())[-300:]}"
    for condition in status.get("conditions", ()):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            yield f"  {name}: {condition.get('message', 'no node takes it')}"


if __name__ == "__main__":
    sys.exit(main())
