"""Objects of the Kubernetes platform, made of orders and settings."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from build_service.kubernetes import drift, manifests, names, routes
from build_service.kubernetes.room import Room
from build_service.quantities import parse_amount, parse_memory
from build_service.settings import Settings
from registry.errors import UserError
from tests.kubernetes_orders import MANIFEST, build_order, container, everything, order, settings, version


def test_a_deployment_runs_the_image_by_digest_from_where_nodes_pull() -> None:
    made = manifests.deployment(order(), settings(), "512Mi")
    assert container(made)["image"] == f"localhost:5000/ekiben@sha256:{'ab' * 32}"
    assert "replicas" not in made["spec"]  # they belong to the scale subresource
    assert made["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert manifests.deployment(order(strategy="replace"), settings(), "1Gi")["spec"]["strategy"] == {
        "type": "Recreate"
    }


def test_the_selector_never_moves_with_the_revision() -> None:
    one, two = (manifests.deployment(order(revision=n, version=version(number=n)), settings(), "1Gi") for n in (1, 2))
    assert one["spec"]["selector"] == two["spec"]["selector"]
    assert one["spec"]["template"] != two["spec"]["template"]


def test_becoming_the_default_does_not_restart_a_model() -> None:
    one, two = (manifests.deployment(order(default=flag), settings(), "1Gi") for flag in (False, True))
    assert one == two
    environment = {each["name"]: each["value"] for each in container(one)["env"]}
    assert environment["EKIBEN_URL_PREFIX"] == "/inference/churn,/inference"


def test_chosen_credentials_reach_the_wrapper_and_by_default_none_does() -> None:
    def environment(**changes: Any) -> dict[str, str]:
        made = manifests.deployment(order(), settings(**changes), "1Gi")
        return {each["name"]: each["value"] for each in container(made)["env"]}

    assert "EKIBEN_PASS_HEADERS" not in environment()
    assert environment(pass_headers="Cookie, authorization")["EKIBEN_PASS_HEADERS"] == "authorization,cookie"
    assert environment()["EKIBEN_INFERENCE_TOKENS_FILE"]


def test_the_clusters_proxies_are_believed_and_on_one_machine_nobody_is() -> None:
    assert [str(network) for network in settings().trusted_networks] == ["0.0.0.0/0", "::/0"]
    assert [str(network) for network in settings(trusted_proxies="10.0.0.1").trusted_networks] == ["10.0.0.1/32"]
    assert settings(trusted_proxies="").trusted_networks == ()
    assert Settings(platform="local").trusted_networks == ()


def test_a_label_of_a_users_is_no_variable_of_the_kubelet() -> None:
    environment = {
        each["name"]: each["value"] for each in container(manifests.deployment(order(), settings(), "1Gi"))["env"]
    }
    assert "$$(HOME)" in environment["EKIBEN_MODEL_METADATA"]


def test_no_pod_has_a_token_a_privilege_or_a_writable_root() -> None:
    job = manifests.build_job(build_order(), settings(), spec_url="s", result_url="r", project=True)
    deployment = manifests.deployment(order(), settings(), "512Mi")
    for template in (job["spec"]["template"], deployment["spec"]["template"]):
        pod = template["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for each in (*pod.get("initContainers", ()), *pod["containers"]):
            security = each["securityContext"]
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
        assert all("hostPath" not in volume for volume in pod["volumes"])


def test_pods_get_only_variables_of_a_fixed_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EKIBEN_TOKEN_OF_ANOTHER", "secret")
    using = settings(index_url="https://index.example/simple", https_proxy="http://proxy:3128", ca_configmap="ca")
    job = manifests.build_job(build_order(), using, spec_url="s", result_url="r", project=True)
    deployment = manifests.deployment(order(), using, "512Mi")
    pods = [each["spec"]["template"]["spec"] for each in (job, deployment)]
    found = {
        variable["name"]
        for pod in pods
        for each in (*pod.get("initContainers", ()), *pod["containers"])
        for variable in each["env"]
    }
    assert found == {
        "EKIBEN_WORK", "EKIBEN_SPEC_URL", "EKIBEN_RESULT_URL", "EKIBEN_REGISTRY_AUTH", "SSL_CERT_FILE", "HTTPS_PROXY",
        "REQUESTS_CA_BUNDLE", "UV_DEFAULT_INDEX", "EKIBEN_MODEL_NAME", "EKIBEN_MODEL_VERSION", "EKIBEN_MODEL_DIGEST",
        "EKIBEN_MODEL_METADATA", "EKIBEN_URL_PREFIX", "EKIBEN_MAX_BODY_BYTES", "EKIBEN_REQUEST_SECONDS",
        "EKIBEN_LEAVE_SECONDS", "EKIBEN_INFERENCE_TOKENS_FILE",
    }  # fmt: skip


def test_a_kinds_folder_is_a_claim_that_is_only_read_and_no_other_kind_gets_it() -> None:
    using = settings(kind_folders={"lightgbm": "pictures", "cargo": "others"})
    pod = manifests.deployment(order(), using, "512Mi")["spec"]["template"]["spec"]
    (volume,) = [each for each in pod["volumes"] if "persistentVolumeClaim" in each]
    assert volume["persistentVolumeClaim"] == {"claimName": "pictures", "readOnly": True}
    (serving,) = pod["containers"]
    (mount,) = [each for each in serving["volumeMounts"] if each["name"] == volume["name"]]
    assert mount["readOnly"]
    assert {"name": "EKIBEN_FOLDER", "value": mount["mountPath"]} in serving["env"]
    assert "EKIBEN_FOLDER" not in json.dumps(manifests.deployment(order(), settings(), "512Mi"))
    with pytest.raises(ValidationError, match="EKIBEN_KIND_FOLDERS"):
        settings(kind_folders={"cargo": "/srv/pictures"})


def test_only_the_last_step_holds_the_push_credential_and_the_middle_one_holds_nothing() -> None:
    using = settings(
        registry_read_secret="reads", registry_read="reads:5001", index_secret="index",
        https_proxy="http://proxy:3128", ca_configmap="ca", index_url="https://index.example/simple",
    )  # fmt: skip
    job = manifests.build_job(build_order(), using, spec_url="SPEC", result_url="RESULT", project=True)
    pod = job["spec"]["template"]["spec"]
    fetch, inspect = pod["initContainers"]
    (assemble,) = pod["containers"]
    mounted = {each["name"]: {m["name"] for m in each["volumeMounts"]} for each in (fetch, inspect, assemble)}
    assert "push" in mounted["assemble"]
    assert "push" not in mounted["fetch"] | mounted["inspect"]
    assert mounted["inspect"] == {"fetch", "inspect"}
    assert inspect["env"] == [{"name": "EKIBEN_WORK", "value": "/build"}]
    assert "envFrom" not in inspect
    assert "envFrom" not in assemble
    assert "SPEC" in json.dumps(fetch["env"])
    assert "SPEC" not in json.dumps(assemble["env"])
    assert "reads:5001" in json.dumps(fetch["env"])
    assert "reads:5001" not in json.dumps([inspect, assemble])
    assert "RESULT" in json.dumps(assemble["env"])
    read_only = {m["name"]: m.get("readOnly") for m in assemble["volumeMounts"]}
    assert read_only["fetch"]
    assert read_only["inspect"]
    assert not read_only["assemble"]


def test_a_job_bounds_the_pod_and_tells_a_users_error_from_a_disruption() -> None:
    job = manifests.build_job(build_order(), settings(build_seconds=90), spec_url="s", result_url="r", project=False)
    assert job["metadata"]["name"] == "b-0123-2"
    assert job["spec"]["backoffLimit"] == 0
    assert "activeDeadlineSeconds" not in job["spec"]  # that would count the time in the queue
    assert job["spec"]["template"]["spec"]["activeDeadlineSeconds"] == 90
    first, second = job["spec"]["podFailurePolicy"]["rules"]
    assert (first["action"], first["onExitCodes"]["values"]) == ("FailJob", [2, 4])
    assert (second["action"], second["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")


def test_the_spec_names_every_file_of_the_version_and_no_path_of_the_service() -> None:
    paths = manifests.version_files(MANIFEST)
    assert paths == ["manifest.json", "files/churn.txt", "sample.json", "requirements/requirements.txt"]
    spec = manifests.build_spec(build_order(), {path: f"https://store/{path}" for path in paths})
    assert {file["path"] for file in spec["model"]["files"]} == set(paths)
    assert set(spec) == {"schema", "model", "kind", "allow_code", "allowed_packages", "lock", "image"}
    assert "output" not in spec["image"]


def test_models_call_nobody_and_are_called_by_the_named() -> None:
    spec = manifests.model_policy("churn", settings(model_callers="edge", model_caller_blocks="10.0.0.7/32"))["spec"]
    assert spec["egress"] == []
    assert spec["podSelector"]["matchLabels"][names.DEPLOYMENT] == "churn"
    sources = json.dumps(spec["ingress"])
    assert '"edge"' in sources
    assert '"ekiben"' in sources
    assert "10.0.0.7/32" in sources


def test_builds_reach_no_private_address_unless_it_is_named() -> None:
    text = json.dumps(manifests.builds_policy(settings(build_egress="10.1.2.3/32")))
    for block in ("10.0.0.0/8", "169.254.0.0/16", "192.168.0.0/16", "172.16.0.0/12", "100.64.0.0/10"):
        assert block in text
    assert "10.1.2.3/32" in text


@pytest.mark.parametrize("project", [True, False])
def test_every_container_has_a_bound_of_disk_that_its_volumes_fit_into(project: bool) -> None:
    using = settings(model_disk="3Gi", model_disk_request="1Gi", build_disk="6Gi")
    made = build_order(version=version(size=7 << 30))
    job = manifests.build_job(made, using, spec_url="s", result_url="r", project=project)
    deployment = manifests.deployment(order(), using, "512Mi")
    for template in (job["spec"]["template"], deployment["spec"]["template"]):
        pod = template["spec"]
        scratch = [volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if "emptyDir" in volume]
        for each in (*pod.get("initContainers", ()), *pod["containers"]):
            disk = {kind: parse_memory(each["resources"][kind]["ephemeral-storage"]) for kind in ("requests", "limits")}
            assert 0 < disk["requests"] <= disk["limits"]
            assert disk["limits"] > sum(map(parse_memory, scratch))  # logs count too
    (fetch,) = [each for each in job["spec"]["template"]["spec"]["volumes"] if each["name"] == "fetch"]
    assert parse_memory(fetch["emptyDir"]["sizeLimit"]) == (6 + 7) << 30
    assert container(deployment)["resources"]["requests"]["ephemeral-storage"] == "1Gi"
    with pytest.raises(ValidationError, match="EKIBEN_MODEL_DISK_REQUEST"):
        settings(model_disk="100Mi")


@given(st.integers(0, 1 << 40))
def test_memory_for_a_model_is_never_less_than_its_kind_wants(size: int) -> None:
    assert parse_memory(manifests.memory_limit("512Mi", size)) >= parse_memory("512Mi") + (
        2 * size if size > 1 << 25 else 0
    )


def test_an_ingress_has_no_rewriting_and_only_constant_annotations() -> None:
    made = routes.route("churn", settings(ingress_host="models.example", inference_body=3 << 20))
    (rule,) = made["spec"]["rules"]
    assert rule["host"] == "models.example"
    assert [(path["path"], path["pathType"]) for path in rule["http"]["paths"]] == [("/inference/churn", "Prefix")]
    assert "churn" not in json.dumps(made["metadata"]["annotations"])
    assert made["metadata"]["annotations"]["nginx.ingress.kubernetes.io/proxy-body-size"] == "3m"
    minion = routes.route("churn", settings(ingress_style="nginx-inc"))["metadata"]["annotations"]
    assert minion["nginx.org/mergeable-ingress-type"] == "minion"
    assert minion["nginx.org/client-max-body-size"] == "64m"


def test_a_gateway_gets_the_same_paths() -> None:
    made = routes.default_route("churn", settings(routing="gateway", gateway="edge/public"))
    assert made["spec"]["parentRefs"] == [{"kind": "Gateway", "name": "public", "namespace": "edge"}]
    found = [match["path"]["value"] for rule in made["spec"]["rules"] for match in rule["matches"]]
    assert "/inference/predict" in found
    assert found == [f"/inference/{path}" for path in routes.DEFAULT_PATHS]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"registry_push": None}, "EKIBEN_REGISTRY_PUSH"),
        ({"builder_image": None}, "EKIBEN_BUILDER_IMAGE"),
        ({"s3_endpoint": None}, "EKIBEN_S3_ENDPOINT"),
        ({"routing": "gateway"}, "EKIBEN_GATEWAY"),
        ({"gateway": "a/b"}, "EKIBEN_ROUTING"),
        ({"routing": "gateway", "gateway": "a/b", "ingress_style": "nginx-inc"}, "EKIBEN_INGRESS_STYLE"),
        ({"ingress_host": "10.0.0.7"}, "leave it empty"),
        ({"ingress_host": "https://models.example"}, "without a scheme"),
        ({"ingress_host": "models..example"}, "no host name"),
        ({"ingress_style": "nginx-inc", "ingress_host": ""}, "refuses rules without"),
        ({"models_namespace": "ekiben-builds"}, "must differ"),
        ({"https_proxy": "http://me:secret@proxy"}, "password"),
        ({"registry_push": "https://registry/ekiben"}, "HOST:PORT"),
        ({"build_tolerations": "gpu"}, "no toleration"),
        ({"cluster_capacity": "memory=lots"}, "no amount"),
    ],
)
def test_settings_that_contradict_themselves_are_refused_with_a_way_out(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        settings(**changes)


def test_nodes_and_taints_reach_the_pods() -> None:
    using = settings(model_node_selector="pool=gpu", model_tolerations="gpu=yes:NoSchedule,spot:NoExecute")
    pod = manifests.deployment(order(), using, "1Gi")["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"pool": "gpu"}
    assert pod["tolerations"] == [
        {"key": "gpu", "operator": "Equal", "effect": "NoSchedule", "value": "yes"},
        {"key": "spot", "operator": "Exists", "effect": "NoExecute"},
    ]


# --- drift ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", [{}, {"routing": "gateway", "gateway": "edge/public"}])
def test_what_was_applied_holds_whatever_others_add(routing: dict[str, str]) -> None:
    for obj in everything(order(replicas=2), settings(**routing)):
        wanted = manifests.sealed(obj, 5)
        live = filled_in(wanted)
        assert drift.holds(live, wanted)
        assert drift.holds({key: value for key, value in live.items() if key not in ("kind", "apiVersion")}, wanted)
        assert drift.holds(live, manifests.sealed(obj, 6))  # under another lease it is the same
        assert drift.fence(live) == 5


def filled_in(value: Any) -> Any:
    """As a server answers: defaults and other managers' fields beside ours."""
    if isinstance(value, dict):
        return {**{key: filled_in(each) for key, each in value.items()}, "addedByTheServer": True}
    if isinstance(value, list):
        return [filled_in(each) for each in value]
    return value


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [found for key, each in value.items() for found in paths(each, (*prefix, key))]
    if isinstance(value, list):
        return [found for at, each in enumerate(value) for found in paths(each, (*prefix, at))]
    return [prefix]


@given(st.data())
def test_any_field_of_ours_that_another_edits_is_noticed(data: st.DataObject) -> None:
    using = data.draw(st.sampled_from([settings(), settings(routing="gateway", gateway="edge/public")]))
    obj = data.draw(st.sampled_from(everything(order(replicas=2, resources={"memory": "2Gi"}), using)))
    wanted = manifests.sealed(obj, 5)
    ours = [path for path in paths(wanted) if path[0] not in ("kind", "apiVersion") and path[-1] != names.FENCE]
    path = data.draw(st.sampled_from(ours))
    live = json.loads(json.dumps(filled_in(wanted)))
    part = live
    for step in path[:-1]:
        part = part[step]
    if data.draw(st.booleans()):
        part[path[-1]] = "2424242" if not isinstance(part[path[-1]], bool) else not part[path[-1]]
    elif isinstance(part, dict):
        if part[path[-1]] == "":
            return  # what is empty may be left out
        del part[path[-1]]
    else:
        part.pop(path[-1])
    assert not drift.holds(live, wanted)


def test_a_field_that_is_no_longer_wanted_is_drift() -> None:
    before = manifests.sealed(manifests.deployment(order(resources={"gpu": "1"}), settings(), "1Gi"))
    after = manifests.sealed(manifests.deployment(order(), settings(), "1Gi"))
    assert not drift.holds(before, after)


def test_amounts_are_compared_as_amounts() -> None:
    wanted = manifests.sealed(
        manifests.deployment(order(resources={"cpu": "0.5", "memory": "1024Mi"}), settings(), "1Gi")
    )
    live = json.loads(json.dumps(wanted))
    for kind, amounts in {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"memory": "1Gi"}}.items():
        container(live)["resources"][kind] |= amounts
    assert drift.holds(live, wanted)


# --- room -------------------------------------------------------------------------------------------------------------


def refusal(room: Room, *arguments: Any) -> UserError | None:
    try:
        room.check(*arguments)
    except UserError as error:
        return error
    return None


def quota(hard: dict[str, str], used: dict[str, str]) -> dict[str, Any]:
    return {"metadata": {"name": "models"}, "status": {"hard": hard, "used": used}}


def test_a_gpu_that_the_cluster_does_not_have_is_refused_before_the_build() -> None:
    error = refusal(Room(settings(cluster_capacity="nvidia.com/gpu=0"), []), None, {"gpu": "1"}, 1, "rolling")
    assert error is not None
    assert error.code == "insufficient_gpu"
    assert error.detail.startswith("0 free of 1")
    assert 400 <= error.status < 500


def test_a_rolling_update_needs_room_for_one_more_pod_and_a_replacement_does_not() -> None:
    room = Room(settings(), [quota({"requests.nvidia.com/gpu": "1"}, {"requests.nvidia.com/gpu": "1"})])
    current = manifests.deployment(order(resources={"gpu": "1"}), settings(), "1Gi")
    current["spec"]["replicas"] = 1
    error = refusal(room, current, {"gpu": "1"}, 1, "rolling")
    assert error is not None
    assert error.code == "insufficient_gpu"
    assert refusal(room, current, {"gpu": "1"}, 1, "replace") is None
    assert refusal(room, None, {"gpu": "1"}, 1, "rolling") is not None  # another deployment has it


def test_more_than_the_namespace_allows_one_container_is_refused_before_the_build() -> None:
    limits = {
        "metadata": {"name": "ekiben"},
        "spec": {"limits": [{"type": "Container", "max": {"memory": "8Gi"}}, {"type": "PersistentVolumeClaim"}]},
    }
    room = Room(settings(), [], [limits])
    error = refusal(room, None, {"memory": "9Gi"}, 1, "rolling")
    assert error is not None
    assert (error.code, error.field, error.status) == ("limit_exceeded", "resources.memory", 409)
    assert "8Gi" in error.detail
    assert refusal(room, None, {"memory": "8192Mi", "cpu": "64"}, 1, "rolling") is None


def test_what_fits_passes_and_what_nobody_asked_for_is_not_looked_at() -> None:
    room = Room(settings(), [quota({"limits.memory": "4Gi"}, {"limits.memory": "3Gi"})])
    assert refusal(room, None, {"memory": "1Gi"}, 1, "rolling") is None
    error = refusal(room, None, {"memory": "1Gi"}, 2, "rolling")
    assert error is not None
    assert "1Gi free of 2Gi" in error.detail
    assert refusal(room, None, {}, 64, "rolling") is None


@given(st.integers(0, 10**15), st.sampled_from(["", "k", "Mi", "Gi", "m"]))
def test_amounts_are_read_as_kubernetes_writes_them(number: int, unit: str) -> None:
    factor = {"": 1, "k": 1000, "Mi": 2**20, "Gi": 2**30}.get(unit)
    assert parse_amount(f"{number}{unit}") * (1000 if factor is None else 1) == number * (factor or 1)
