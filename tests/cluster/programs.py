"""The programs of the cluster: Go modules pinned in `go/`, built once into a cache, and packages of Debian.

Each folder of `go/` is a module that names its programs as tools. What is built is kept under a key of the module's two
files, the compiler and the flags, so a second machine or a second run with the same pins builds nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
GO = HERE / "go"
PROJECT = HERE.parents[1]
KUBERNETES = "1.34.4"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Module:
    """One folder of `go/` and the programs that come out of it: file name → package."""

    folder: str
    programs: Mapping[str, str]
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def flags(self) -> list[str]:
        variables = [f"-X {name}={value}" for name, value in sorted(self.variables.items())]
        return ["-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags", " ".join(["-s", "-w", *variables])]


MODULES = (
    Module("pause", {"pause": "ekiben.test/pause"}),
    Module("cni-policies", {"cni-policies": "ekiben.test/cni-policies"}),
    Module("minio", {"minio": "github.com/minio/minio"}),
    Module(
        "kubernetes",
        {
            name: f"k8s.io/kubernetes/cmd/{name}"
            for name in (
                "kube-apiserver",
                "kube-controller-manager",
                "kube-scheduler",
                "kubelet",
                "kube-proxy",
                "kubectl",
            )
        },
        {
            f"k8s.io/component-base/version.{name}": value
            for name, value in {
                "gitVersion": f"v{KUBERNETES}",
                "gitMajor": KUBERNETES.split(".")[0],
                "gitMinor": KUBERNETES.split(".")[1],
                "gitTreeState": "clean",
            }.items()
        },
    ),
    Module("coredns", {"coredns": "github.com/coredns/coredns"}),
    Module("traefik", {"traefik": "github.com/traefik/traefik/v3/cmd/traefik"}),
    Module("versitygw", {"versitygw": "github.com/versity/versitygw/cmd/versitygw"}),
    Module("toxiproxy", {"toxiproxy-server": "github.com/Shopify/toxiproxy/v2/cmd/server"}),
    Module("kwok", {"kwok": "sigs.k8s.io/kwok/cmd/kwok"}),
)

# Debian's package for each program that is not built here.
DEBIAN = {
    "/usr/bin/etcd": "etcd-server",
    "/usr/bin/containerd": "containerd",
    "/usr/sbin/runc": "runc",
    "/usr/bin/docker-registry": "docker-registry",
    "/usr/lib/cni/ptp": "containernetworking-plugins",
    "/usr/sbin/iptables": "iptables",
    "/usr/sbin/conntrack": "conntrack",
    "/usr/bin/socat": "socat",
    "/usr/sbin/ip": "iproute2",
    "/usr/sbin/nft": "nftables",
    "/usr/sbin/debootstrap": "debootstrap",
    "/usr/bin/mount": "mount",
}


def cache() -> Path:
    return Path(os.environ.get("EKIBEN_CLUSTER_CACHE") or Path.home() / ".cache" / "ekiben-cluster")


def find(name: str) -> Path:
    """Where the program is, built or not."""
    module = next(each for each in MODULES if name in each.programs)
    return cache() / "bin" / key(module) / name


def get(name: str, say: Say = print) -> Path:
    """The program, built unless it is in the cache."""
    build(next(each for each in MODULES if name in each.programs), say)
    return find(name)


def key(module: Module) -> str:
    folder = GO / module.folder
    found = hashlib.sha256()
    sources = sorted([*folder.glob("go.*"), *folder.glob("*.go")])
    for part in (
        *(file.read_bytes() for file in sources),
        _go(["env", "GOVERSION"], folder).encode(),
        "\0".join([*module.flags, *module.programs.values()]).encode(),
    ):
        found.update(hashlib.sha256(part).digest())
    return found.hexdigest()[:16]


def build(module: Module, say: Say) -> float:
    """Build what is not in the cache; the seconds that it took. Two builders at once wait for each other."""
    began = time.monotonic()
    folder = cache() / "bin" / key(module)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = {name: package for name, package in module.programs.items() if not (folder / name).exists()}
        if not missing:
            return 0.0
        say(f"building {', '.join(missing)} (minutes, the first time)")
        with tempfile.TemporaryDirectory(dir=folder) as work:
            _go(["build", *module.flags, "-o", work + "/", *missing.values()], GO / module.folder, {"CGO_ENABLED": "0"})
            for name, package in missing.items():
                (Path(work) / package.rsplit("/", 1)[-1]).rename(folder / name)
    return time.monotonic() - began


def missing_packages() -> list[str]:
    return sorted({package for program, package in DEBIAN.items() if not Path(program).exists()})


def install_packages(say: Say) -> None:
    """What is missing of Debian, told before it is installed. Daemons that packages would start are left alone."""
    missing = missing_packages()
    if not missing:
        return
    say(f"installing from Debian: {' '.join(missing)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for command in (["update", "-q"], ["install", "-q", "-y", "--no-install-recommends", *missing]):
        done = subprocess.run(["apt-get", *command], env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"apt-get install {' '.join(missing)} failed:\n{done.stderr[-2000:]}")


def go_is_there() -> bool:
    return shutil.which("go") is not None


def module_folder(folder: str, module: str) -> Path:
    """Where the Go module cache holds a module that `go/<folder>` requires, for the files that it carries."""
    _go(["mod", "download", module], GO / folder)
    return Path(_go(["list", "-mod=readonly", "-m", "-f", "{{.Dir}}", module], GO / folder))


def _go(command: list[str], folder: Path, environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        ["nice", "-n", "10", "go", *command],
        cwd=folder,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"go {' '.join(command)} failed in {folder}:\n{done.stderr[-4000:]}")
    return done.stdout.strip()
