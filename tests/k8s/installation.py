"""The overlay `test` on a cluster of tests/cluster: images made and pushed, applied, everything Ready.

python -m tests.k8s.installation [--root FOLDER]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.cluster import cluster

ROOT = Path(__file__).resolve().parents[2]
NAMESPACES = ("ekiben", "ekiben-builds", "ekiben-models")


def install(target: cluster.Cluster, settings: Mapping[str, str] | None = None) -> None:
    """Bring the installation to this checkout; `settings` are laid over those of the overlay."""
    with tempfile.TemporaryDirectory(prefix="ekiben-site-") as work:
        site = Path(work)
        push_images(target, site)
        add_settings(site, {**surroundings(target), **(settings or {})})
        for name in NAMESPACES:
            target.apply(namespace(name))
        target.apply(authorities(target))
        target.kubectl("apply", "--server-side", "--kustomize", str(site))
    ready(target)


def push_images(target: cluster.Cluster, site: Path) -> None:
    """`make images`, pushed to where the nodes pull, and an overlay in `site` that pins them by digest."""
    argv = ["--push", target.registry.push, "--insecure", "--kustomization", str(site)]
    subprocess.run([sys.executable, "-m", "scripts.images", *argv], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def surroundings(target: cluster.Cluster) -> dict[str, str]:
    """What pods need of this machine to reach a package index: proxies, and the index where it is not the usual one."""
    found = target.environment["variables"]
    names = {
        "EKIBEN_HTTP_PROXY": "HTTP_PROXY",
        "EKIBEN_HTTPS_PROXY": "HTTPS_PROXY",
        "EKIBEN_NO_PROXY": "NO_PROXY",
        "EKIBEN_INDEX_URL": "UV_DEFAULT_INDEX",
    }
    return {setting: found[name] for setting, name in names.items() if name in found}


def add_settings(site: Path, settings: Mapping[str, str]) -> None:
    file = site / "kustomization.yaml"
    overlay = json.loads(file.read_text())
    overlay["configMapGenerator"] = [
        {
            "name": "ekiben-settings",
            "namespace": "ekiben",
            "behavior": "merge",
            "literals": [f"{name}={value}" for name, value in sorted(settings.items())],
        }
    ]
    file.write_text(json.dumps(overlay))


def namespace(name: str) -> dict[str, object]:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}


def authorities(target: cluster.Cluster) -> dict[str, object]:
    """The ConfigMap `ekiben-ca`: the authorities that this machine trusts, a company's proxy among them."""
    bundle = target.environment["ca_bundle"]
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "ekiben-ca", "namespace": "ekiben-builds"},
        "data": {"ca.crt": Path(bundle).read_text() if bundle else ""},
    }


def ready(target: cluster.Cluster, seconds: int = 240) -> None:
    for what in ("statefulset/postgres", "statefulset/minio", "statefulset/registry", "deploy/mlflow", "deploy/ekiben"):
        target.kubectl("-n", "ekiben", "rollout", "status", what, f"--timeout={seconds}s", timeout=seconds + 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=cluster.ROOT)
    asked = parser.parse_args()
    found = cluster.find(asked.root)
    if found is None:
        raise SystemExit("no cluster runs: python -m tests.cluster up")
    install(found)


if __name__ == "__main__":
    main()
