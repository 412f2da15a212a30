"""The overlay `byo`: store, registry and database are a company's own, beside the cluster, with passwords and TLS."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import ssl
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster import cluster as clusters
from tests.cluster.cluster import Cluster
from tests.cluster.conftest import brought_up
from tests.cluster.pki import Authority
from tests.cluster.training import trained
from tests.k8s import installation
from tests.k8s.installation import ROOT, Installation, Trained
from tests.object_stores import ACCESS, SECRET, Server
from tests.servers import BCRYPT_OF_HUNTER2, DockerRegistry, PostgreSQL

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

HOST = "models.company.test"
USERS = {"push": "pusher", "read": "reader", "pull": "node"}
OVERLAY = ROOT / "k8s" / "overlays" / "byo"


@dataclass
class Company:
    """What a company has already, on one address that its cluster reaches; `authority` signed both certificates."""

    address: str
    authority: Path
    registry: DockerRegistry
    s3: Server
    database: PostgreSQL

    def settings(self) -> dict[str, str]:
        return {
            "EKIBEN_INGRESS_HOST": HOST,
            "EKIBEN_PUBLIC_URL": f"https://{HOST}",
            "EKIBEN_S3_ENDPOINT": self.s3.endpoint,
            "EKIBEN_S3_CA": "/etc/ekiben/ca/ca.crt",
            "EKIBEN_REGISTRY_PUSH": self.registry.host,
            "EKIBEN_REGISTRY_PULL": self.registry.host,
            "EKIBEN_BUILD_EGRESS": f"{self.address}/32",
            "EKIBEN_MODEL_CALLERS": "ingress",  # where the cluster's controller runs
        }

    def login(self, user: str, password: str = "hunter2") -> dict[str, Any]:
        """What `docker login` writes."""
        return {"auths": {self.registry.host: {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}}}

    def secret(self, purpose: str, namespace: str, password: str = "hunter2") -> dict[str, Any]:
        return {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": f"ekiben-registry-{purpose}", "namespace": namespace},
            "type": "kubernetes.io/dockerconfigjson",
            "stringData": {".dockerconfigjson": json.dumps(self.login(USERS[purpose], password))},
        }


@pytest.fixture(scope="module")
def company_cluster() -> Iterator[Cluster]:
    """A second cluster beside the one of the other tests: the namespaces of an installation are there once."""
    if os.environ.get("EKIBEN_E2E_KUBECONFIG"):
        pytest.skip("needs a cluster of its own (the one named has an installation already)")
    with brought_up(clusters.ROOT.with_name(f"{clusters.ROOT.name}-own")) as made:
        yield made


@pytest.fixture(scope="module")
def company(company_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Company]:
    folder, address = tmp_path_factory.mktemp("company"), company_cluster.node.network.host
    authority = Authority(folder / "authority")
    pair = authority.sign("server", "company", hosts=[address])
    (folder / "passwords").write_text("".join(f"{user}:{BCRYPT_OF_HUNTER2}\n" for user in USERS.values()))
    shutil.copy(pair.certificate, folder / "public.crt")
    shutil.copy(pair.key, folder / "private.key")
    registry = DockerRegistry(
        folder / "registry",
        address=address,
        auth=f"auth: {{htpasswd: {{realm: company, path: {folder / 'passwords'}}}}}\n",
        http=f"  tls: {{certificate: {pair.certificate}, key: {pair.key}}}\n",
        scheme="https",
        verify=ssl.create_default_context(cafile=authority.own.certificate),
    )
    s3 = Server("versitygw", folder / "s3", tls=folder, host=address).start()
    database = PostgreSQL(address)
    clusters.speak_to(company_cluster.root, registry.host, authority.own.certificate)
    yield Company(address, authority.own.certificate, registry, s3, database)
    database.close()
    s3.kill()
    registry.close()


@pytest.fixture(scope="module")
def own(company_cluster: Cluster, company: Company) -> Installation:
    """docs/kubernetes.md, “Your own S3, PostgreSQL and registry”."""
    cluster = company_cluster
    site = installation.site_of(cluster)
    mine = site.with_name("mine")
    overlay_of(company, cluster, mine)
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "config.json").write_text(json.dumps(company.login(USERS["push"])))
        where = ["--push", company.registry.host, "--ca", str(company.authority)]
        installation.make_images(["service", "builder", *where], site, mine, {"DOCKER_CONFIG": home})
    cluster.kubectl("apply", "-f", str(ROOT / "k8s" / "base" / "namespaces.yaml"))
    url = company.database.create_for("ekiben_owner", "a-password-of-the-tests")
    secret = ["create", "secret", "generic"]
    cluster.kubectl("-n", "ekiben", *secret, "ekiben-database", f"--from-literal=url={url}")
    keys = [f"--from-literal=access-key={ACCESS}", f"--from-literal=secret-key={SECRET}"]
    cluster.kubectl("-n", "ekiben", *secret, "ekiben-s3", *keys)
    cluster.apply(company.secret("push", "ekiben-builds"), company.secret("read", "ekiben-builds"))
    cluster.apply(*(company.secret("pull", namespace) for namespace in ("ekiben", "ekiben-builds", "ekiben-models")))
    cluster.apply(installation.authorities(cluster, company.authority.read_text()))
    installation.bring_up(cluster, site)
    return Installation.of(cluster, host=HOST)


def overlay_of(company: Company, cluster: Cluster, folder: Path) -> None:
    """The overlay, copied, with the company's values in its literals and the component custom-ca."""
    overlay = yaml.safe_load((OVERLAY / "kustomization.yaml").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    (settings,) = overlay["configMapGenerator"]
    values = dict(literal.split("=", 1) for literal in settings["literals"])
    values |= company.settings() | installation.surroundings(cluster)
    settings["literals"] = [f"{name}={value}" for name, value in values.items()]
    overlay["components"].insert(0, "../../components/custom-ca")
    stores = yaml.safe_load((OVERLAY / "network.yaml").read_text())
    ports = [
        int(each.rpartition(":")[2].partition("/")[0]) for each in (company.s3.endpoint, str(company.database.port))
    ]
    where = [{"ipBlock": {"cidr": f"{company.address}/32"}}]
    stores["spec"]["egress"] = [{"to": where, "ports": [{"port": port} for port in ports]}]
    (folder / "network.yaml").write_text(yaml.safe_dump(stores))
    overlay["resources"].remove("network.yaml")
    for kind in ("resources", "components"):
        overlay[kind] = [os.path.relpath((OVERLAY / each).resolve(), folder.resolve()) for each in overlay[kind]]
    overlay["resources"].append("network.yaml")
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(overlay))


def test_a_model_is_built_and_served_by_what_the_company_has(
    own: Installation, company: Company, churn: list[Trained]
) -> None:
    model = churn[0]
    own.push(model.file, "churn", sample=model.sample)
    own.live("churn", 1)
    assert own.predict("churn", model.rows).json()["outputs"] == pytest.approx(model.outputs)

    apart = own.cluster.get("deployments,statefulsets", "-n", "ekiben")["items"]
    assert [each["metadata"]["name"] for each in apart] == ["ekiben"]
    kept = [path.name for path in (company.s3.folder / "data" / "ekiben").rglob("*.txt")]
    assert model.file.name in kept
    (pod,) = own.cluster.get("pods", "-n", "ekiben-models")["items"]
    assert pod["spec"]["containers"][0]["image"].startswith(f"{company.registry.host}/ekiben/models")


def test_a_refused_password_for_pushing_is_told_and_what_is_live_goes_on(
    own: Installation, company: Company, churn: list[Trained]
) -> None:
    with refused(own, company, "push", "ekiben-builds"):
        own.push(churn[1].file, "churn", sample=churn[1].sample, wait=300)
        version = own.version("churn", 2)
    assert (version["state"], version["code"]) == ("failed", "registry_unauthorized")
    assert company.registry.host in version["reason"]
    assert "EKIBEN_REGISTRY_PUSH_SECRET" in version["hint"]
    assert own.predict("churn", churn[0].rows).json()["outputs"] == pytest.approx(churn[0].outputs)


def test_a_refused_password_for_pulling_is_told_and_what_is_live_goes_on(
    own: Installation, company: Company, churn: list[Trained], tmp_path: Path
) -> None:
    other = trained(tmp_path / "churn-v3.txt", 3)
    with refused(own, company, "pull", "ekiben-models"):
        own.push(other.file, "churn", sample=other.sample, wait=300)
        version = own.version("churn", 3)
    assert version["state"] == "rolled_back", own.story("churn", version)
    assert "EKIBEN_PULL_SECRETS" in version["hint"], own.story("churn", version)
    assert own.predict("churn", churn[0].rows).json()["outputs"] == pytest.approx(churn[0].outputs)


@contextlib.contextmanager
def refused(own: Installation, company: Company, purpose: str, namespace: str) -> Iterator[None]:
    own.cluster.apply(company.secret(purpose, namespace, "a wrong one"))
    try:
        yield
    finally:
        own.cluster.apply(company.secret(purpose, namespace))
