"""k8s/: what the overlays come to, and that an API server takes them under Pod Security `restricted`."""

from __future__ import annotations

import functools
import ipaddress
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.policies import Pod, ruleset
from tests.k8s.conftest import Server

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
NAMESPACES = ("ekiben", "ekiben-builds", "ekiben-models")
PERMISSIONS = Path(__file__).with_name("permissions.txt")
SERVICE = "system:serviceaccount:ekiben:ekiben"


@functools.cache
def text_of(program: str, overlay: str) -> str:
    folder = str(K8S / "overlays" / overlay)
    return subprocess.run([program, "kustomize", folder], check=True, capture_output=True, text=True).stdout


def objects_of(program: str, overlay: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(text_of(program, overlay)))


def pods_of(objects: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for each in objects:
        if each["kind"] in ("Deployment", "StatefulSet", "Job"):
            yield each["spec"]["template"]["spec"]


def containers_of(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", ()), *pod["containers"]]


@pytest.fixture(scope="session")
def namespaces(api_server: Server) -> Server:
    api_server.ok("apply", "-f", str(K8S / "base" / "namespaces.yaml"))
    return api_server


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_accepted_without_a_warning(overlay: str, namespaces: Server, kubectl_program: str) -> None:
    # objects whose kind is an extension of the cluster (Gateway API) are in no overlay
    done = namespaces.kubectl(
        "apply", "--dry-run=server", "--validate=strict", "--warnings-as-errors", "-f", "-",
        text=text_of(kubectl_program, overlay),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


def test_a_pod_that_is_not_restricted_is_refused(namespaces: Server) -> None:
    for namespace in NAMESPACES:
        done = namespaces.kubectl("run", "loose", "--image=x", "-n", namespace, "--dry-run=server")
        assert done.returncode != 0
        # without a ServiceAccount yet, the refusal may be about that; Pod Security must be named all the same
        assert "PodSecurity" in done.stderr or "serviceaccount" in done.stderr
        labels = namespaces.ok("get", "namespace", namespace, "-o", "jsonpath={.metadata.labels}")
        assert '"pod-security.kubernetes.io/enforce":"restricted"' in labels


def test_the_service_may_do_what_is_written_down_and_nothing_else(namespaces: Server, kubectl_program: str) -> None:
    namespaces.ok("apply", "-f", str(K8S / "base" / "roles.yaml"))
    groups = ["--as-group=system:serviceaccounts", "--as-group=system:authenticated"]
    found = []
    for namespace in (*NAMESPACES, "kube-system"):
        listed = namespaces.ok("auth", "can-i", "--list", f"--as={SERVICE}", *groups, "-n", namespace, "--no-headers")
        lines = sorted(re.sub(r"\s{2,}", "  ", line).strip() for line in listed.splitlines())
        found.append("\n".join([f"# {namespace}", *lines]))
    text = "\n\n".join(found) + "\n"
    assert text == PERMISSIONS.read_text(), f"if this is meant: write it to {PERMISSIONS.name}\n{text}"
    for verb in ("get", "list", "watch"):
        for namespace in NAMESPACES:
            asked = namespaces.kubectl("auth", "can-i", verb, "secrets", f"--as={SERVICE}", *groups, "-n", namespace)
            assert asked.stdout.strip() == "no"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_images_are_named_in_one_place(overlay: str, kubectl_program: str) -> None:
    named = {
        f"{each['newName']}:{each['newTag']}"
        for file in (K8S / "images").rglob("kustomization.yaml")
        for each in yaml.safe_load(file.read_text())["images"]
    }
    objects = objects_of(kubectl_program, overlay)
    used = {container["image"] for pod in pods_of(objects) for container in containers_of(pod)}
    assert used
    assert used <= named
    (settings,) = (each for each in objects if each["metadata"]["name"].startswith("ekiben-settings"))
    assert settings["data"]["EKIBEN_BUILDER_IMAGE"] in named
    for file in sorted(K8S.rglob("*.yaml")):
        if K8S / "images" not in file.parents:
            for name in re.findall(r"\bimage: *(\S+)", file.read_text()):
                assert re.fullmatch(r"[a-z-]+", name), f"{file.relative_to(ROOT)} names the image {name}"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_secret_is_written_down(overlay: str, kubectl_program: str) -> None:
    objects = objects_of(kubectl_program, overlay)
    assert not [each for each in objects if each["kind"] == "Secret"]
    for pod in pods_of(objects):
        for container in containers_of(pod):
            for variable in container.get("env", ()):
                if re.search(r"PASSWORD|SECRET|TOKEN|KEY", variable["name"]) and "value" in variable:
                    assert variable["name"].endswith("_FILE")
            assert not [word for word in container.get("args", ()) if "://" in word]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_have_no_token_unless_they_speak_to_kubernetes(overlay: str, kubectl_program: str) -> None:
    for pod in pods_of(objects_of(kubectl_program, overlay)):
        assert pod.get("automountServiceAccountToken") is False or pod["serviceAccountName"] in (
            "ekiben",
            "ekiben-secrets",
        )
        for container in containers_of(pod):
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert "limits" in container["resources"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_scratch_and_disk_are_bounded(overlay: str, kubectl_program: str) -> None:
    objects = objects_of(kubectl_program, overlay)
    for pod in pods_of(objects):
        for container in containers_of(pod):
            for kind in ("requests", "limits"):
                assert "ephemeral-storage" in container["resources"][kind], container["name"]
        for volume in pod.get("volumes", ()):
            assert "emptyDir" not in volume or "sizeLimit" in volume["emptyDir"], volume
    limits = {each["metadata"]["namespace"]: each["spec"]["limits"] for each in objects if each["kind"] == "LimitRange"}
    assert set(limits) == {"ekiben-builds", "ekiben-models"}
    for (container,) in limits.values():
        for kind in ("default", "defaultRequest"):
            assert "ephemeral-storage" in container[kind]
    assert set(limits["ekiben-models"][0]["max"]) == {"memory", "ephemeral-storage"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nobody_speaks_to_anybody_unless_a_policy_says_so(overlay: str, kubectl_program: str) -> None:
    policies = [each for each in objects_of(kubectl_program, overlay) if each["kind"] == "NetworkPolicy"]
    closed = {each["metadata"]["namespace"] for each in policies if each["spec"]["podSelector"] == {}}
    assert closed == set(NAMESPACES)


def reached(objects: list[dict[str, Any]], name: str, target: Pod, port: int, protocol: str = "tcp") -> bool:
    """Whether pods of this name in `ekiben` may call the target, by the rules that the tests' cluster makes of them."""
    caller = Pod("ekiben", "10.9.0.2", {"app.kubernetes.io/name": name}, {})
    spaces = {space: {"kubernetes.io/metadata.name": space} for space in (*NAMESPACES, "kube-system", target.namespace)}
    policies = [each for each in objects if each["kind"] == "NetworkPolicy"]
    text = ruleset([caller, target], spaces, policies)
    rules = text.partition("chain egress_10_9_0_2 {\n")[2].partition("  }")[0].splitlines()
    return any(_admits(rule.split(), target.address, port, protocol) for rule in rules[1:])


def _admits(words: list[str], address: str, port: int, protocol: str) -> bool:
    """A rule of nftables as `ruleset` writes it: ip daddr (BLOCK | != BLOCK | { ADDRESS, … }), PROTOCOL dport PORT."""
    if words[-1:] != ["return"]:
        return False
    text, target = " ".join(words), ipaddress.ip_address(address)
    for negated, block in re.findall(r"ip daddr (!= )?([0-9./]+)", text):
        if (target in ipaddress.ip_network(block)) is bool(negated):
            return False
    if (several := re.search(r"ip daddr \{ ([^}]*) \}", text)) and address not in several[1].split(", "):
        return False
    ports = re.search(r"(tcp|udp) dport (\d+)", text)
    return ports is None or (ports[1], int(ports[2])) == (protocol, port)


PUBLIC, PRIVATE, METADATA = "203.0.113.7", "10.77.0.7", "169.254.169.254"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_service_reaches_what_its_settings_name_and_nothing_else(overlay: str, kubectl_program: str) -> None:
    objects = objects_of(kubectl_program, overlay)
    (settings,) = (each["data"] for each in objects if each["metadata"]["name"].startswith("ekiben-settings"))
    inside = {
        host.split(".")[0]: int(port)
        for value in settings.values()
        for host, port in re.findall(r"https?://([a-z0-9-]+\.ekiben\.svc):(\d+)", value)
    }
    assert overlay == "byo" or set(inside) == {"minio", "mlflow"}
    if overlay != "byo":
        inside["postgres"] = 5432  # its address is in a Secret
    for name, port in inside.items():
        assert reached(objects, "ekiben", Pod("ekiben", PRIVATE, {"app.kubernetes.io/name": name}, {}), port), name
        assert not reached(objects, "ekiben", Pod("ekiben", PRIVATE, {"app.kubernetes.io/name": name}, {}), port + 1)
    dns, model = Pod("kube-system", PRIVATE, {}, {}), Pod("ekiben-models", PRIVATE, {}, {})
    assert reached(objects, "ekiben", dns, 53, "udp")
    assert reached(objects, "ekiben", model, 3000)
    assert not reached(objects, "ekiben", model, 22)
    assert not reached(objects, "ekiben", Pod("elsewhere", PRIVATE, {}, {}), 80)
    assert not reached(objects, "ekiben", Pod("elsewhere", PRIVATE, {}, {}), 3000)
    for address in (PUBLIC, PRIVATE, METADATA):
        outside = Pod("", address, {}, {})
        assert [port for port in (22, 53, 80, 5432, 8080) if reached(objects, "ekiben", outside, port)] == []
        assert reached(objects, "ekiben", outside, 6443)  # the API server, on any network
        expected = address == PRIVATE or (address == PUBLIC and overlay == "byo")
        assert reached(objects, "ekiben", outside, 443) is expected
    if overlay == "byo":
        assert reached(objects, "ekiben", Pod("", "10.1.2.2", {}, {}), 5432)
    else:
        assert not reached(objects, "mlflow", Pod("", PUBLIC, {}, {}), 443)
        assert reached(objects, "mlflow", Pod("ekiben", PRIVATE, {"app.kubernetes.io/name": "minio"}, {}), 9000)
        assert reached(objects, "ekiben-secrets", Pod("", PRIVATE, {}, {}), 443)
        assert not reached(objects, "ekiben-secrets", Pod("", PUBLIC, {}, {}), 443)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_host_and_class_of_the_ingress_follow_the_settings(overlay: str, kubectl_program: str) -> None:
    objects = objects_of(kubectl_program, overlay)
    (settings,) = (each["data"] for each in objects if each["metadata"]["name"].startswith("ekiben-settings"))
    ingresses = [each["spec"] for each in objects if each["kind"] == "Ingress"]
    assert ingresses
    for each in ingresses:
        assert [rule["host"] for rule in each["rules"]] == [settings["EKIBEN_INGRESS_HOST"]]
        assert each["ingressClassName"] == settings["EKIBEN_INGRESS_CLASS"]


def test_a_gateway_in_place_of_an_ingress_follows_the_settings_too(kubectl_program: str, tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    file = tmp_path / "k8s" / "overlays" / "byo" / "kustomization.yaml"
    overlay = yaml.safe_load(file.read_text())
    overlay["components"] = [each.replace("/ingress", "/gateway") for each in overlay["components"]]
    file.write_text(yaml.safe_dump(overlay))
    done = subprocess.run([kubectl_program, "kustomize", file.parent], check=True, capture_output=True, text=True)
    objects = list(yaml.safe_load_all(done.stdout))
    (settings,) = (each["data"] for each in objects if each["metadata"]["name"].startswith("ekiben-settings"))
    assert settings["EKIBEN_ROUTING"] == "gateway"
    assert [each["spec"]["hostnames"] for each in objects if each["kind"] == "HTTPRoute"] == [["ekiben.example.com"]]
    assert not [each for each in objects if each["kind"] == "Ingress"]


def test_authorities_of_a_company_are_trusted_by_the_service_and_by_builds(kubectl_program: str) -> None:
    objects = objects_of(kubectl_program, "test")
    (settings,) = (each["data"] for each in objects if each["metadata"]["name"].startswith("ekiben-settings"))
    folder = str(Path(settings["SSL_CERT_FILE"]).parent)
    (service,) = (each for each in objects if each["kind"] == "Deployment" and each["metadata"]["name"] == "ekiben")
    pod = service["spec"]["template"]["spec"]
    (volume,) = (each for each in pod["volumes"] if each.get("configMap"))
    assert volume["configMap"]["name"] == settings["EKIBEN_CA_CONFIGMAP"]
    for container in containers_of(pod):
        assert [each["mountPath"] for each in container["volumeMounts"] if each["name"] == volume["name"]] == [folder]
