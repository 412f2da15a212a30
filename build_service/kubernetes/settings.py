"""Settings of the Kubernetes platform, a part of the service's own (`build_service.settings.Settings`)."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode

from build_service.quantities import parse_amount, parse_memory

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?")
_LABEL_KEY = re.compile(r"(?:[a-z0-9.-]{1,253}/)?[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
_HOST_LABEL = "[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_HOST = re.compile(rf"(?=.{{1,253}}$)(?:\*\.)?{_HOST_LABEL}(?:\.{_HOST_LABEL})*")
_ADDRESS = re.compile(r"[0-9.]+")
_REPOSITORY = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*(?:/[a-z0-9]+(?:[._-][a-z0-9]+)*)*")
_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")

Words = Annotated[tuple[str, ...], NoDecode]
Pairs = Annotated[dict[str, str], NoDecode]


class ClusterSettings(BaseSettings):
    """Fields that `Settings` inherits; all of them are read only when EKIBEN_PLATFORM=kubernetes."""

    kubeconfig: Path | None = Field(
        None, description="Kubeconfig file; default: the pod's own service account, else kubectl's usual file."
    )
    namespace: str = Field("ekiben", description="Namespace of this service; its pods may call models.")
    service_name: str = Field("ekiben", description="Name of this service's Service in its namespace.")
    builds_namespace: str = Field("ekiben-builds", description="Namespace of build Jobs.")
    models_namespace: str = Field("ekiben-models", description="Namespace of models.")
    resync_seconds: float = Field(
        600,
        gt=0,
        description="Time between two complete lists of what the cluster holds, in seconds; watches do between.",
    )

    builder_image: str | None = Field(None, description="Image of the pods that build; needed on Kubernetes.")
    registry_push: str | None = Field(
        None, description="HOST[:PORT] of the image registry as builds reach it; needed on Kubernetes."
    )
    registry_pull: str | None = Field(
        None,
        description="The same registry as nodes reach it, which often resolve no cluster name; default: as builds.",
    )
    registry_read: str | None = Field(
        None,
        description="The same registry at an address where nobody can push, if it has one, for the step of builds that "
        "asks which layers are there; default: as builds push.",
    )
    registry_repository: str = Field("ekiben", description="Repository of all images of this installation.")
    registry_insecure: bool = Field(False, description="Builds reach the registry by plain HTTP.")
    registry_push_secret: str = Field(
        "ekiben-registry-push",
        description="Secret (kubernetes.io/dockerconfigjson) in the builds' namespace, mounted only where images are "
        "pushed; empty: the registry asks for no credential.",
    )
    registry_read_secret: str | None = Field(
        None,
        description="Secret of the same type with read access, for the step that asks which layers are there; default: "
        "the registry is read without a credential.",
    )
    pull_secrets: Words = Field(
        (), description="Secrets that nodes pull images with, in both namespaces; comma separated."
    )
    image_base: str = Field("default", description="Base of images: a name in the builder image's folder of bases.")
    image_platform: Literal["linux/amd64", "linux/arm64"] = Field(
        "linux/amd64", description="Platform of the nodes that serve models."
    )

    ca_configmap: str | None = Field(
        None,
        description="ConfigMap in the builds' namespace whose key ca.crt is the bundle of all authorities that builds "
        "trust (a company's own, and the public ones if those are met too).",
    )
    index_url: str | None = Field(None, description="Package index of builds in place of PyPI.")
    extra_index_urls: Words = Field((), description="Further package indexes of builds; comma separated.")
    index_secret: str | None = Field(
        None,
        description="Secret in the builds' namespace whose entries become variables of the step that installs packages "
        "(credentials of a private index, such as UV_INDEX_COMPANY_PASSWORD); no other step sees it.",
    )
    http_proxy: str | None = Field(None, description="Proxy of builds for http, without a password.")
    https_proxy: str | None = Field(None, description="Proxy of builds for https, without a password.")
    no_proxy: Words = Field((), description="Hosts that builds reach without the proxy; comma separated.")

    build_cpu: str = Field("500m", description="CPU that a build's pod asks for; it may use more.")
    build_memory_request: str = Field(
        "512Mi", description="Memory that a build's pod asks for; EKIBEN_BUILD_MEMORY bounds it."
    )
    build_disk: str = Field(
        "4Gi",
        description="Disk of a build's pod for packages and environments, on one machine of its working folder; what "
        "the model's own files need is added.",
    )
    build_ttl_seconds: int = Field(
        3600, ge=60, description="Time a finished Job stays for kubectl to look at, in seconds."
    )
    build_priority_class: str = Field(
        "ekiben-builds", description="PriorityClass of builds; empty: the cluster's default."
    )
    build_node_selector: Pairs = Field({}, description="Labels of nodes that builds run on: KEY=VALUE,…")
    build_tolerations: Words = Field((), description="Taints that builds tolerate: KEY[=VALUE]:EFFECT,…")
    build_egress: Words = Field(
        (),
        description="Private address ranges that builds may reach besides public ones, such as 10.1.2.3/32: a store, "
        "registry, index or proxy of the company; comma separated.",
    )

    model_cpu: str = Field("100m", description="CPU that a model's pod asks for when its deployment says nothing.")
    model_memory: str = Field(
        "1Gi", description="Memory limit of a project when its deployment says nothing; kinds have their own."
    )
    model_disk: str = Field(
        "1Gi",
        description="Disk that a model may write to its temporary folder, a pod's /tmp; one that writes more is ended.",
    )
    model_disk_request: str = Field("128Mi", description="Disk that a model's pod asks for, at most EKIBEN_MODEL_DISK.")
    model_priority_class: str = Field(
        "ekiben-models", description="PriorityClass of models, above that of builds; empty: the cluster's default."
    )
    model_node_selector: Pairs = Field({}, description="Labels of nodes that models run on: KEY=VALUE,…")
    model_tolerations: Words = Field((), description="Taints that models tolerate: KEY[=VALUE]:EFFECT,…")
    model_callers: Words = Field(
        ("ingress-nginx", "nginx-ingress", "traefik"),
        description="Namespaces whose pods may call models, besides this service's: the ingress controller's, "
        "monitoring; comma separated.",
    )
    model_caller_blocks: Words = Field(
        (),
        description="Address ranges that may call models: nodes, where the ingress controller has no network of its "
        "own; comma separated.",
    )
    model_egress: Literal["none", "open"] = Field("none", description="What models may reach: nothing, or everything.")
    gpu_resource: str = Field("nvidia.com/gpu", description="Name of the cluster's GPU resource.")
    cluster_capacity: Pairs = Field(
        {},
        description="What the largest node can give to one pod, such as nvidia.com/gpu=0,memory=16Gi; looked at before "
        "a build, as this service may not read nodes. Quotas of the models' namespace are known without it.",
    )

    inference_open: bool = Field(False, description="Models answer without a token.")
    routing: Literal["ingress", "gateway"] = Field("ingress", description="How models are reached from outside.")
    ingress_class: str = Field("nginx", description="Class of Ingress objects.")
    ingress_host: str = Field("localhost", description="Host of the API and of all models; empty: any.")
    ingress_style: Literal["merge", "nginx-inc"] = Field(
        "merge", description="merge: the controller merges Ingresses of one host (ingress-nginx, Traefik); nginx-inc: "
        "F5's, where they are minions of one master.",
    )  # fmt: skip
    gateway: str | None = Field(None, description="NAMESPACE/NAME of the Gateway that HTTPRoutes hang on.")

    @field_validator(
        "pull_secrets", "extra_index_urls", "no_proxy", "build_tolerations", "build_egress", "model_tolerations",
        "model_callers", "model_caller_blocks", mode="before",
    )  # fmt: skip
    @classmethod
    def _words(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("build_node_selector", "model_node_selector", "cluster_capacity", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        pairs = [part.strip().partition("=") for part in value.split(",") if part.strip()]
        for key, _, text in pairs:
            if _LABEL_KEY.fullmatch(key) is None or _LABEL_VALUE.fullmatch(text) is None:
                raise ValueError(f"{key}={text} is no pair KEY=VALUE")
        return {key: text for key, _, text in pairs}

    @field_validator("cluster_capacity")
    @classmethod
    def _amounts(cls, value: dict[str, str]) -> dict[str, str]:
        for text in value.values():
            parse_amount(text)
        return value

    @field_validator("build_tolerations", "model_tolerations")
    @classmethod
    def _tolerations(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            toleration(text)
        return value

    @field_validator("build_egress", "model_caller_blocks")
    @classmethod
    def _blocks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(ipaddress.ip_network(block)) for block in value)

    @field_validator("build_cpu", "model_cpu", "build_memory_request", "model_memory")
    @classmethod
    def _amount(cls, value: str) -> str:
        parse_amount(value)
        return value

    @field_validator("build_disk", "model_disk", "model_disk_request")
    @classmethod
    def _disk(cls, value: str) -> str:
        parse_memory(value)
        return value

    @field_validator("namespace", "builds_namespace", "models_namespace", "ingress_class")
    @classmethod
    def _named(cls, value: str) -> str:
        if _NAME.fullmatch(value) is None:
            raise ValueError(f"{value!r} is no name of Kubernetes")
        return value

    @field_validator("ingress_host")
    @classmethod
    def _host(cls, value: str) -> str:
        """What neither an Ingress nor an HTTPRoute can say would be refused by the cluster, for each model anew."""
        if value and _HOST.fullmatch(value) is None:
            raise ValueError(f"{value!r} is no host name; write it in lower case, without a scheme and a port")
        if value and _ADDRESS.fullmatch(value):
            raise ValueError(f"{value!r} is an address, which no route can name: leave it empty, for any host")
        return value

    @field_validator("registry_repository")
    @classmethod
    def _repository(cls, value: str) -> str:
        if _REPOSITORY.fullmatch(value) is None:
            raise ValueError(f"{value!r} is no repository: use lower-case letters and digits, for instance team/ekiben")
        return value

    @field_validator("registry_push", "registry_pull", "registry_read")
    @classmethod
    def _registry(cls, value: str | None) -> str | None:
        if value is not None and (not value or "/" in value or "@" in value):
            raise ValueError(
                f"{value!r} is no registry: use HOST or HOST:PORT; EKIBEN_REGISTRY_REPOSITORY names the rest"
            )
        return value

    @field_validator("http_proxy", "https_proxy")
    @classmethod
    def _proxy(cls, value: str | None) -> str | None:
        # It would stand in a pod's specification, which many may read.
        if value is not None and "@" in value:
            raise ValueError("a proxy with a password cannot be given here: use one that knows pods by their address")
        return value

    @field_validator("gateway")
    @classmethod
    def _gateway(cls, value: str | None) -> str | None:
        if value is not None and [bool(_NAME.fullmatch(part)) for part in value.split("/")] != [True, True]:
            raise ValueError(f"{value!r} is no gateway: use NAMESPACE/NAME")
        return value

    def cluster_faults(self) -> list[str]:
        """What is missing or contradictory for Kubernetes."""
        faults = []
        for value, name, what in (
            (
                self.registry_push,
                "EKIBEN_REGISTRY_PUSH",
                "builds push images to a registry, for instance registry:5000",
            ),
            (self.builder_image, "EKIBEN_BUILDER_IMAGE", "builds run in pods of this image"),
        ):
            if not value:
                faults.append(f"EKIBEN_PLATFORM=kubernetes needs {name}: {what}")
        if len({self.namespace, self.builds_namespace, self.models_namespace}) < 3:
            faults.append(
                "EKIBEN_NAMESPACE, EKIBEN_BUILDS_NAMESPACE and EKIBEN_MODELS_NAMESPACE must differ: "
                "quotas and rights are kept apart by them"
            )
        if parse_memory(self.model_disk_request) > parse_memory(self.model_disk):
            faults.append(
                f"EKIBEN_MODEL_DISK_REQUEST={self.model_disk_request} is more than "
                f"EKIBEN_MODEL_DISK={self.model_disk}: lower the first or raise the second"
            )
        if self.routing == "gateway" and self.gateway is None:
            faults.append("EKIBEN_ROUTING=gateway needs EKIBEN_GATEWAY=NAMESPACE/NAME")
        if self.routing == "ingress" and self.gateway is not None:
            faults.append("EKIBEN_GATEWAY is set although EKIBEN_ROUTING=ingress: take one of them away")
        if self.routing == "gateway" and self.ingress_style != "merge":
            faults.append("EKIBEN_INGRESS_STYLE means nothing with EKIBEN_ROUTING=gateway: take one of them away")
        if self.routing == "ingress" and self.ingress_style == "nginx-inc" and not self.ingress_host:
            faults.append(
                "EKIBEN_INGRESS_STYLE=nginx-inc needs EKIBEN_INGRESS_HOST: that controller refuses rules without"
            )
        return faults

    @property
    def pull_address(self) -> str:
        return self.registry_pull or self.registry_push or ""


def toleration(text: str) -> dict[str, str]:
    """`gpu=yes:NoSchedule` or `gpu:NoSchedule` as Kubernetes writes it; ValueError for what is none."""
    taint, _, effect = text.rpartition(":")
    key, given, value = taint.partition("=")
    if effect not in _EFFECTS or _LABEL_KEY.fullmatch(key) is None or _LABEL_VALUE.fullmatch(value) is None:
        raise ValueError(
            f"{text!r} is no toleration: use KEY=VALUE:EFFECT or KEY:EFFECT, EFFECT one of {', '.join(_EFFECTS)}"
        )
    found = {"key": key, "operator": "Equal" if given else "Exists", "effect": effect}
    return {**found, "value": value} if given else found
