"""Bring the cluster up part by part, and take it down: each step may run again and goes on where the last stopped."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import tomli_w

from tests.cluster import images, nodes, policies, programs, surroundings
from tests.cluster.nodes import Node
from tests.cluster.pki import Authority, Pair
from tests.cluster.programs import Say

ROOT = Path(os.environ.get("EKIBEN_CLUSTER_ROOT") or "/var/lib/ekiben-cluster")
NAME = "node-1"
DOMAIN = "cluster.local"

_MANIFESTS = Path(__file__).parent / "manifests"
_VOLUMES = 24
_LONGEST_ROOT = 60  # a socket's path has 108 bytes at most
_NAMES = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", f"kubernetes.default.svc.{DOMAIN}")
_NEEDED = ("pause", "cni-policies", "kubernetes", "coredns", "traefik")


@dataclass(frozen=True)
class Registry:
    """The registry beside the cluster. Host, nodes and pods know it under one address; it speaks plain http."""

    push: str
    pull: str


@dataclass(frozen=True)
class Cluster:
    """A cluster that is up. `environment` is what a pod needs to reach the package registries (surroundings.py)."""

    kubeconfig: Path
    ingress_url: str
    registry: Registry
    environment: Mapping[str, Any]
    kubectl_program: Path
    root: Path | None = None

    def kubectl(self, *args: str, text: str | None = None, timeout: float = 180) -> str:
        """What kubectl prints; `text` is its input. Raises AssertionError with its message where it fails."""
        done = subprocess.run(
            [str(self.kubectl_program), f"--kubeconfig={self.kubeconfig}", *args],
            input=text,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode != 0:
            raise AssertionError(f"kubectl {' '.join(args)}: {done.stderr.strip()[-2000:]}")
        return done.stdout

    def get(self, *args: str) -> Any:
        return json.loads(self.kubectl("get", *args, "-o", "json"))

    def apply(self, *manifests: str | Mapping[str, Any]) -> None:
        """Apply objects, or YAML as text."""
        for each in manifests:
            text = each if isinstance(each, str) else json.dumps(each)
            self.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", text=text)

    @property
    def node(self) -> Node:
        """The node of a cluster that was made here."""
        found = nodes.find(self.root) if self.root is not None else None
        assert found is not None, "this cluster was not made by tests.cluster"
        return found

    @contextlib.contextmanager
    def without(self, part: str) -> Iterator[None]:
        """A part of the node is killed, and started again after the block; then all is ready."""
        self.node.stop(part)
        try:
            yield
        finally:
            self.node.start_again(part)
            _until(self.node, part, lambda: _is_ready(self))

    def with_way_out(self, namespace: str, pod: Mapping[str, Any]) -> dict[str, Any]:
        """The pod's spec with all that it needs to reach the package registries (surroundings.py) from `namespace`."""
        self.apply(surroundings.config_map(namespace, self.environment))
        return surroundings.with_way_out(pod, self.environment)


def build(say: Say, only: Sequence[str] = ()) -> None:
    """What is the same for each cluster: packages of Debian and the programs, all or those of some folders."""
    programs.install_packages(say)
    if not programs.go_is_there():
        raise SystemExit("building the cluster's programs needs Go 1.26 or newer (the program `go` on the PATH)")
    for module in programs.MODULES:
        if not only or module.folder in only:
            seconds = programs.build(module, say)
            where = programs.find(next(iter(module.programs))).parent
            say(f"  {module.folder:<32} {f'{seconds:6.1f} s' if seconds else '  cached'}  {where}")
    if not only or "base" in only:
        began = time.monotonic()
        where = images.base_layout()
        say(f"  {'base':<32} {time.monotonic() - began:6.1f} s  {where}")


def up(root: Path, say: Say) -> Cluster:
    """The cluster under `root`, running and ready."""
    root = root.resolve()
    if os.geteuid() != 0:
        raise SystemExit("a cluster needs root: it makes namespaces, mounts and firewall rules")
    if len(str(root)) > _LONGEST_ROOT:
        raise SystemExit(f"{root} is too long for the sockets beneath it: at most {_LONGEST_ROOT} characters")
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root):
        there = find(root)
        if there is not None:
            return there
        steps = _Steps(say)
        with steps("programs"):
            build(lambda line: None if line.startswith("  ") else say(line), _NEEDED)
        node = nodes.find(root)
        if node is not None and not node.alive:
            with steps("what a dead cluster left"):
                _take_away(root)
            node = None
        with steps("node"):
            node = node or nodes.make(root)
        return _up(node, steps)


def down(root: Path, keep: bool = False) -> None:
    """Nothing of the cluster stays; with `keep`, its folder does, for a look at the logs."""
    root = root.resolve()
    if root.exists():
        with _locked(root):
            _take_away(root, keep)


def find(root: Path) -> Cluster | None:
    """The cluster under `root` where one is up."""
    root = root.resolve()
    node, file = nodes.find(root), root / "cluster.json"
    if node is None or not file.exists() or not node.alive or not all(map(node.runs, node.parts())):
        return None
    return _cluster(node)


def status(root: Path) -> list[str]:
    """One line a part."""
    node = nodes.find(root.resolve())
    if node is None or not node.alive:
        return ["down"]
    return [f"{'runs' if node.runs(part) else 'ENDED':<6} {part}" for part in node.parts()]


def _take_away(root: Path, keep: bool = False) -> None:
    nodes.remove(root)
    if not keep:
        nodes.wipe(root)


def _up(node: Node, steps: _Steps) -> Cluster:
    root, net = node.root, node.network
    bin_ = programs.find
    with steps("certificates"):
        authority = Authority(root / "pki")
        own = authority.own
        accounts = authority.service_accounts()
        serving = authority.sign("apiserver", "kube-apiserver", hosts=[*_NAMES, net.node, net.service(1), "127.0.0.1"])
        to_kubelet = authority.sign("apiserver-kubelet", "kube-apiserver-kubelet", ["system:masters"])
        kubelet = authority.sign("kubelet", f"system:node:{NAME}", ["system:nodes"], [NAME, net.node])
        admin = authority.sign("admin", "admin", ["system:masters"])
        server = f"https://{net.node}:6443"
        kubeconfigs = {
            "admin": authority.kubeconfig(root / "kubeconfig", server, admin),
            "kubelet": authority.kubeconfig(root / "pki/kubelet.kubeconfig", server, kubelet),
        }
        for name in ("kube-controller-manager", "kube-scheduler", "kube-proxy"):
            client = authority.sign(name, f"system:{name}")
            kubeconfigs[name] = authority.kubeconfig(root / f"pki/{name}.kubeconfig", server, client)
    cluster = _cluster(node)

    with steps("registry"):
        configuration = {
            "version": 0.1,
            "storage": {"filesystem": {"rootdirectory": str(root / "registry")}, "delete": {"enabled": True}},
            "http": {"addr": f"{net.node}:5000"},
            "log": {"accesslog": {"disabled": True}, "level": "warn"},
        }
        (root / "registry.json").write_text(json.dumps(configuration))
        node.start("registry", ["docker-registry", "serve", str(root / "registry.json")])
        _wait(node, "registry", f"http://{net.node}:5000/v2/")
    with steps("etcd"):
        # in memory: a test cluster needs no history
        peers = ["--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380"]
        peers += ["--initial-cluster=default=http://127.0.0.1:2380"]
        clients = ["--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379"]
        node.start("etcd", ["etcd", "--data-dir=/run/etcd", "--log-level=warn", "--logger=zap", *peers, *clients])
    with steps("images"):
        blobs = root / "blobs"
        refs = {
            name: images.push(images.scratch(blobs, bin_(name), more), f"{cluster.registry.push}/cluster/{name}:1")
            for name, more in (("pause", {}), ("coredns", {}), ("traefik", surroundings.certificates()))
        }
    with steps("API server"):
        node.start(
            "kube-apiserver",
            [
                str(bin_("kube-apiserver")),
                "--etcd-servers=http://127.0.0.1:2379",
                f"--advertise-address={net.node}",
                f"--bind-address={net.node}",
                f"--service-cluster-ip-range={net.services}",
                f"--client-ca-file={own.certificate}",
                f"--tls-cert-file={serving.certificate}",
                f"--tls-private-key-file={serving.key}",
                f"--kubelet-certificate-authority={own.certificate}",
                f"--kubelet-client-certificate={to_kubelet.certificate}",
                f"--kubelet-client-key={to_kubelet.key}",
                "--kubelet-preferred-address-types=InternalIP",
                f"--service-account-issuer=https://kubernetes.default.svc.{DOMAIN}",
                f"--service-account-key-file={accounts.certificate}",
                f"--service-account-signing-key-file={accounts.key}",
                "--authorization-mode=Node,RBAC",
                "--enable-admission-plugins=NodeRestriction",
                "--allow-privileged=true",
                # Debian's etcd 3.4 cannot tell how far a watch is, which this needs: clients that ask for it would be
                # refused again and again, in place of falling back to list and watch.
                "--feature-gates=WatchList=false",
            ],
        )
        _until(node, "kube-apiserver", lambda: cluster.kubectl("get", "--raw=/readyz") == "ok")
    with steps("controllers, scheduler, proxy"):
        managed = [
            f"--kubeconfig={kubeconfigs['kube-controller-manager']}",
            f"--root-ca-file={own.certificate}",
            f"--service-account-private-key-file={accounts.key}",
            f"--cluster-signing-cert-file={own.certificate}",
            f"--cluster-signing-key-file={own.key}",
            "--use-service-account-credentials",
            "--allocate-node-cidrs=false",
            "--leader-elect=false",
        ]
        node.start("kube-controller-manager", [str(bin_("kube-controller-manager")), *managed])
        scheduled = [f"--kubeconfig={kubeconfigs['kube-scheduler']}", "--leader-elect=false"]
        node.start("kube-scheduler", [str(bin_("kube-scheduler")), *scheduled])
        proxied = [f"--kubeconfig={kubeconfigs['kube-proxy']}", f"--hostname-override={NAME}"]
        proxied += [
            f"--cluster-cidr={net.pods}",
            "--proxy-mode=iptables",
            "--conntrack-max-per-core=0",
            "--iptables-min-sync-period=100ms",
        ]
        proxied += ["--conntrack-tcp-timeout-established=0s", "--conntrack-tcp-timeout-close-wait=0s"]
        node.start("kube-proxy", [str(bin_("kube-proxy")), *proxied])
    with steps("network policies"):
        # before the kubelet: a pod starts only when the enforcer has its rules in place
        node.start(
            "policies",
            [sys.executable, "-m", "tests.cluster.policies", str(root)],
            {"PYTHONPATH": str(programs.PROJECT)},
        )
    with steps("containerd"):
        plugins = root / "cni-plugins"
        plugins.mkdir(exist_ok=True)
        for program in (*Path("/usr/lib/cni").iterdir(), bin_("cni-policies")):
            if not (plugins / program.name).exists():
                (plugins / program.name).symlink_to(program)
        (root / "containerd.toml").write_text(tomli_w.dumps(_containerd(node, refs["pause"])))
        speak_to(root, cluster.registry.pull)
        (root / "net.d").mkdir(exist_ok=True)
        (root / "net.d" / "pods.conflist").write_text(json.dumps(_pod_network(node)))
        node.start("containerd", ["containerd", f"--config={root}/containerd.toml"])
        _until(node, "containerd", (root / "containerd.sock").exists)
    with steps("kubelet, node Ready"):
        shutil.copy(surroundings.resolv_conf(), root / "resolv.conf")
        (root / "kubelet.json").write_text(json.dumps(_kubelet(node, own.certificate, kubelet)))
        kept = [f"--config={root}/kubelet.json", f"--kubeconfig={kubeconfigs['kubelet']}"]
        kept += [f"--hostname-override={NAME}", f"--node-ip={net.node}"]
        node.start("kubelet", [str(bin_("kubelet")), *kept])
        _until(node, "kubelet", lambda: _is_ready(cluster))
    with steps("name service, volumes, ingress"):
        crds = programs.module_folder("traefik", "sigs.k8s.io/gateway-api") / "config/crd/standard"
        cluster.kubectl("apply", "--server-side", "-f", str(crds))
        cluster.kubectl("wait", "--for=condition=Established", "crd/gatewayclasses.gateway.networking.k8s.io")
        cluster.apply(_manifest("dns", image=refs["coredns"], address=net.service(10)))
        cluster.apply(_manifest("ingress", image=refs["traefik"], node=net.node))
        cluster.apply(_manifest("storage"))
        cluster.apply({"apiVersion": "v1", "kind": "List", "items": [_volume(root, n) for n in range(1, _VOLUMES + 1)]})
        cluster.kubectl("rollout", "status", "-n", "kube-system", "deployment/coredns", "--timeout=90s")
        cluster.kubectl("rollout", "status", "-n", "ingress", "deployment/traefik", "--timeout=90s")
    (root / "environment.json").write_text(json.dumps(cluster.environment, indent=1))
    shown = {"kubeconfig": str(cluster.kubeconfig), "ingress_url": cluster.ingress_url}
    (root / "cluster.json").write_text(json.dumps({**shown, "registry": asdict(cluster.registry)}, indent=1))
    return cluster


def _cluster(node: Node) -> Cluster:
    address = f"{node.network.node}:5000"
    return Cluster(
        node.root / "kubeconfig",
        f"http://{node.network.node}",
        Registry(address, address),
        surroundings.environment(node.network.whole, DOMAIN),
        programs.find("kubectl"),
        node.root,
    )


def speak_to(root: Path, registry: str, authority: Path | None = None) -> None:
    """How the node's containerd reaches a registry (HOST:PORT), from its next pull on: by plain http, or by TLS with a
    certificate of that authority."""
    folder = root / "certs.d" / registry
    folder.mkdir(parents=True, exist_ok=True)
    server = f"http://{registry}" if authority is None else f"https://{registry}"
    how = {"capabilities": ["pull", "resolve"], **({"ca": str(authority)} if authority is not None else {})}
    (folder / "hosts.toml").write_text(tomli_w.dumps({"server": server, "host": {server: how}}))


def _containerd(node: Node, pause: str) -> dict[str, Any]:
    root = node.root
    return {
        "version": 2,
        "root": str(root / "containerd"),
        "state": "/run/containerd-state",
        "grpc": {"address": str(root / "containerd.sock")},
        "plugins": {
            "io.containerd.internal.v1.opt": {"path": str(root / "opt")},
            "io.containerd.grpc.v1.cri": {
                "sandbox_image": pause,
                "restrict_oom_score_adj": True,
                "enable_unprivileged_ports": True,
                "netns_mounts_under_state_dir": True,
                "cni": {"bin_dir": str(root / "cni-plugins"), "conf_dir": str(root / "net.d")},
                "containerd": {
                    "default_runtime_name": "runc",
                    "runtimes": {"runc": {"runtime_type": "io.containerd.runc.v2"}},
                },
                "registry": {"config_path": str(root / "certs.d")},
            },
        },
    }


def _pod_network(node: Node) -> dict[str, Any]:
    """Point to point: what a pod sends to another goes through the node's routing, where policies are enforced."""
    addresses = {
        "type": "host-local",
        "ranges": [[{"subnet": node.network.pods}]],
        "routes": [{"dst": "0.0.0.0/0"}],
        "dataDir": "/run/cni-addresses",
    }
    return {
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [
            {"type": "ptp", "ipMasq": False, "mtu": node.network.mtu, "ipam": addresses},
            {"type": "cni-policies", "socket": policies.SOCKET},
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ],
    }


def _kubelet(node: Node, authority: Path, own: Pair) -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": node.network.node,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(authority)},
        },
        "authorization": {"mode": "Webhook"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": nodes.cgroup(node),
        "clusterDNS": [node.network.service(10)],
        "clusterDomain": DOMAIN,
        "containerRuntimeEndpoint": f"unix://{node.root}/containerd.sock",
        "enforceNodeAllocatable": [],
        "eventRecordQPS": 0,
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "failCgroupV1": False,
        "failSwapOn": False,
        "fileCheckFrequency": "1m0s",
        "imageGCHighThresholdPercent": 100,
        "kubeAPIBurst": 200,
        "kubeAPIQPS": 100,
        "maxPods": 250,
        "oomScoreAdj": -1,
        "registryPullQPS": 0,
        "resolvConf": str(node.root / "resolv.conf"),
        "serializeImagePulls": False,
        "tlsCertFile": str(own.certificate),
        "tlsPrivateKeyFile": str(own.key),
        "volumePluginDir": str(node.root / "volume-plugins"),
    }


def _volume(root: Path, number: int) -> dict[str, Any]:
    name = f"disk-{number}"
    folder = root / "volumes" / name
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o777)  # such volumes know no fsGroup, and pods run as any user
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": "100Gi"},
            "accessModes": ["ReadWriteOnce", "ReadWriteMany"],
            "storageClassName": "standard",
            "hostPath": {"path": str(folder), "type": "Directory"},
        },
    }


def _manifest(name: str, **values: str) -> str:
    return string.Template((_MANIFESTS / f"{name}.yaml").read_text()).substitute(values)


def _is_ready(cluster: Cluster) -> bool:
    conditions = cluster.get("node", NAME)["status"]["conditions"]
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def _wait(node: Node, part: str, url: str) -> None:
    _until(node, part, lambda: httpx.get(url, trust_env=False).status_code == 200)


def _until(node: Node, part: str, ready: Callable[[], bool], seconds: float = 90) -> None:
    """Poll until the part is ready. Raises SystemExit with the end of its log where it ends or takes too long."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(AssertionError, httpx.TransportError):
            if ready():
                return
        if not node.runs(part) or time.monotonic() > end:
            log = node.root / "logs" / f"{part}.log"
            trouble = "is not ready" if node.runs(part) else "ended"
            raise SystemExit(f"{part} {trouble}; the end of {log}:\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.1)


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    file = root.parent / f".{root.name}.lock"
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        file.unlink(missing_ok=True)


class _Steps:
    """Says how long each step took."""

    def __init__(self, say: Say) -> None:
        self._say = say

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._say(f"  {name:<32} {time.monotonic() - began:6.1f} s")
