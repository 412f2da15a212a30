"""The machine that the cluster believes to have: Linux namespaces with an init, made and ended as one thing.

Everything of the cluster runs in one network, mount and process namespace of its own. Its ports, firewall rules, mounts
and processes are therefore invisible to the host and vanish, all of them, with the init, whatever was going on. On the
host stand only a virtual cable, one route, three firewall rules and a cgroup; all bear the cluster's name.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Kernel settings that Kubernetes changes for the whole machine; the host gets its own back.
_KERNEL = ("vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "net/ipv4/ip_forward")
_CGROUPS = Path("/sys/fs/cgroup")
# The kubelet, containerd and CNI write to these, whatever they are told; the node sees folders of its root there.
_SEEN_AS = {"var-log": "/var/log", "kubelet": "/var/lib/kubelet", "cni": "/var/lib/cni"}
_SHARED = Path("/run/ekiben-clusters")
_INIT = """import signal  # the init of an Ekiben test cluster
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print(flush=True)
while True:
    signal.pause()
"""


@dataclass(frozen=True)
class Network:
    """A /16 that nothing of the host uses: .0.1 is the host's end of the cable, .0.2 the node."""

    second: int
    mtu: int

    @property
    def whole(self) -> str:
        return f"10.{self.second}.0.0/16"

    @property
    def host(self) -> str:
        return f"10.{self.second}.0.1"

    @property
    def node(self) -> str:
        return f"10.{self.second}.0.2"

    @property
    def pods(self) -> str:
        return f"10.{self.second}.128.0/18"

    @property
    def services(self) -> str:
        return f"10.{self.second}.192.0/18"

    @property
    def behind_the_node(self) -> str:
        return f"10.{self.second}.128.0/17"

    def service(self, number: int) -> str:
        return f"10.{self.second}.192.{number}"


@dataclass(frozen=True)
class Node:
    """A running node. `pid` is its init, as the host sees it; `born` tells it from a later process of that number."""

    root: Path
    name: str
    network: Network
    pid: int
    born: str

    @property
    def alive(self) -> bool:
        return _born(self.pid) == self.born != ""

    @property
    def cable(self) -> str:
        return self.name

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command, to be run inside of the node."""
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--pid", "--", *argv]

    def run(self, *argv: str, text: str | None = None) -> str:
        return _run(self.command(argv), text)

    def start(self, name: str, argv: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Start a part unless it runs; what it prints goes to `logs/NAME.log`."""
        if self.runs(name):
            return
        environment = dict(environment or {})
        with (self.root / "logs" / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                self.command(argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**_without_proxies(os.environ), **environment},
                cwd=self.root,
                start_new_session=True,
            )
        kept = {"pid": process.pid, "born": _born(process.pid), "argv": list(argv), "environment": environment}
        _write(self.root / "pids" / f"{name}.json", kept)

    def stop(self, name: str) -> None:
        """End a part by SIGKILL, as a crash would."""
        if self.runs(name):
            outside = self._part(name)["pid"]
            for inside in Path(f"/proc/{outside}/task/{outside}/children").read_text().split():
                os.kill(int(inside), signal.SIGKILL)
            _until(lambda: not self.runs(name), f"{name} does not end")

    def start_again(self, name: str) -> None:
        """Start a part that was stopped, as it was started before."""
        kept = self._part(name)
        self.start(name, kept["argv"], kept["environment"])

    def processes(self, *words: str) -> list[int]:
        """Processes of the node's pods with these words in their command line, by their numbers on the host."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                line = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if all(word in line for word in words) and f"{self.name}/" in (folder / "cgroup").read_text():
                    found.append(int(folder.name))
        return found

    def runs(self, name: str) -> bool:
        """Whether the part lives; `nsenter` outside lives as long as what it started inside."""
        with contextlib.suppress(FileNotFoundError):
            kept = self._part(name)
            return bool(kept["born"]) and _born(kept["pid"]) == kept["born"]
        return False

    def _part(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.root / "pids" / f"{name}.json").read_text()))

    def parts(self) -> list[str]:
        return sorted(file.stem for file in (self.root / "pids").glob("*.json"))


def find(root: Path) -> Node | None:
    """The node under `root`, alive or dead, or None where there is none."""
    with contextlib.suppress(FileNotFoundError):
        kept = json.loads((root / "node.json").read_text())
        return Node(**{**kept, "root": root, "network": Network(**kept["network"])})
    return None


def make(root: Path) -> Node:
    """A new node under `root`: namespaces, cable, cgroup. `root` keeps what `remove` needs from the first step on."""
    for folder in ("logs", "pids", *_SEEN_AS):
        (root / folder).mkdir(parents=True, exist_ok=True)
    with _host():
        network = _free_network()
        node = Node(root, f"ekiben{network.second}", network, 0, "")
        _keep(node)
        _change_host()
        node = replace(node, pid=(pid := _start_init(root)), born=_born(pid))
        _keep(node)
        _mount(node)
        _cable(node)
        _cgroup(node)
    return node


def remove(root: Path) -> None:
    """End the node and take away everything of it that the host can see. Fit for a node that was made by half."""
    node = find(root)
    if node is None:
        return
    with _host():
        for pid in _inits(root):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _until(lambda: not _inits(root), "the node's init does not end")
        _until(lambda: not any(node.runs(part) for part in node.parts()), "parts of the node do not end")
        for rule in _rules(node):
            while _succeeds(["iptables", "-w", *rule[:2], "-D", *rule[2:]]):
                pass
        _succeeds(["ip", "link", "delete", node.cable])
        for folder in _hierarchies(node):
            _until(functools.partial(_remove_cgroup, folder), f"processes stay in {folder}")
        if not _inits(None):
            _restore_host()
        (root / "node.json").unlink()


def cgroup(node: Node) -> str:
    """The cgroup that holds every pod, below the root of each hierarchy."""
    return f"/{node.name}"


def _start_init(root: Path) -> int:
    with (root / "logs" / "node.log").open("ab") as log:
        outer = subprocess.Popen(
            [
                *("unshare", "--net", "--mount", "--propagation=private", "--pid", "--fork"),
                *("--kill-child", sys.executable, "-c", _INIT, str(root)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    assert outer.stdout is not None
    outer.stdout.readline()  # the init is there and reaps
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
    if not children:
        raise SystemExit(f"the node's init did not start; see {root}/logs/node.log")
    return int(children[0])


@contextlib.contextmanager
def _host() -> Iterator[None]:
    """One cluster at a time changes the host."""
    _SHARED.mkdir(exist_ok=True)
    with (_SHARED / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _change_host() -> None:
    """What the clusters of a host share: its kernel's settings, and the folders that they mount over."""
    file = _SHARED / "before.json"
    if not file.exists():
        kernel = {key: Path("/proc/sys", key).read_text().strip() for key in _KERNEL}
        _write(file, {"kernel": kernel, "absent": [each for each in _SEEN_AS.values() if not Path(each).exists()]})
    for place in _SEEN_AS.values():
        Path(place).mkdir(parents=True, exist_ok=True)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def _restore_host() -> None:
    """Not before the last cluster went: removing a folder takes away what any of them has mounted there."""
    file = _SHARED / "before.json"
    if not file.exists():
        return
    before = json.loads(file.read_text())
    for key, value in before["kernel"].items():
        Path("/proc/sys", key).write_text(value)
    for place in before["absent"]:
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(place)
    file.unlink()


def _mount(node: Node) -> None:
    node.run("mount", "--make-rshared", "/")
    node.run("mount", "-t", "proc", "proc", "/proc")
    node.run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    for folder, place in _SEEN_AS.items():
        node.run("mount", "--bind", str(node.root / folder), place)


def _cable(node: Node) -> None:
    net = node.network
    mtu = str(net.mtu)
    far_end = ["peer", "name", "eth0", "mtu", mtu, "netns", str(node.pid)]
    _run(["ip", "link", "add", node.cable, "mtu", mtu, "type", "veth", *far_end])
    _run(["ip", "address", "add", f"{net.host}/30", "dev", node.cable])
    _run(["ip", "link", "set", node.cable, "up"])
    node.run("ip", "link", "set", "lo", "up")
    node.run("ip", "address", "add", f"{net.node}/30", "dev", "eth0")
    node.run("ip", "link", "set", "eth0", "up")
    node.run("ip", "route", "add", "default", "via", net.host)
    node.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
    # what leaves the cluster leaves under the node's address; what stays in it, under its own
    leaving = ["-s", net.pods, "!", "-d", net.whole]
    node.run("iptables", "-w", "-t", "nat", "-A", "POSTROUTING", *leaving, "-j", "MASQUERADE")
    _run(["ip", "route", "replace", net.behind_the_node, "via", net.node])
    for rule in _rules(node):
        if not _succeeds(["iptables", "-w", *rule[:2], "-C", *rule[2:]]):
            _run(["iptables", "-w", *rule[:2], "-I", *rule[2:]])


def _rules(node: Node) -> list[list[str]]:
    mark = ["-m", "comment", "--comment", node.name]
    return [
        ["-t", "nat", "POSTROUTING", "-s", node.network.whole, "!", "-o", node.cable, *mark, "-j", "MASQUERADE"],
        ["-t", "filter", "FORWARD", "-i", node.cable, *mark, "-j", "ACCEPT"],
        ["-t", "filter", "FORWARD", "-o", node.cable, *mark, "-j", "ACCEPT"],
    ]


def _cgroup(node: Node) -> None:
    for folder in _hierarchies(node):
        folder.mkdir(exist_ok=True)
        for file in ("cpuset.cpus", "cpuset.mems"):  # a new cpuset of cgroup v1 is empty, and takes no process
            if (folder / file).exists() and not (folder / file).read_text().strip():
                (folder / file).write_text((folder.parent / file).read_text())


def _hierarchies(node: Node) -> list[Path]:
    if (_CGROUPS / "cgroup.controllers").exists():
        return [_CGROUPS / node.name]
    return [folder / node.name for folder in sorted(_CGROUPS.iterdir()) if folder.is_dir() and not folder.is_symlink()]


def _remove_cgroup(folder: Path) -> bool:
    if not folder.exists():
        return True
    try:
        for each, _, _ in os.walk(folder, topdown=False):
            os.rmdir(each)
    except OSError:
        return False
    return True


def _free_network() -> Network:
    taken = []
    for route in json.loads(_run(["ip", "-j", "-4", "route", "show", "table", "all"])):
        with contextlib.suppress(ValueError):
            taken.append(ipaddress.ip_network(route["dst"], strict=False))
    for line in Path("/etc/resolv.conf").read_text().splitlines():
        with contextlib.suppress(ValueError, IndexError):
            taken.append(ipaddress.ip_network(line.split()[1]))
    default = json.loads(_run(["ip", "-j", "-4", "route", "show", "default"]))
    device = default[0]["dev"] if default else "lo"
    mtu = min(1500, json.loads(_run(["ip", "-j", "link", "show", device]))[0]["mtu"])
    for second in range(201, 250):
        network = Network(second, mtu)
        if not any(ipaddress.ip_network(network.whole).overlaps(each) for each in taken if each.prefixlen):
            return network
    raise SystemExit("no free network between 10.201.0.0/16 and 10.249.0.0/16: take a cluster down")


def _keep(node: Node) -> None:
    _write(node.root / "node.json", {**asdict(node), "root": str(node.root)})


def _inits(root: Path | None) -> list[int]:
    """The init of the node under `root`, or of any, and the `unshare` that waits for it; recorded or not."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes().split(b"\0")[-3:-1]
                of_node = words[:1] == [_INIT.encode()] and (root is None or words[1:] == [str(root).encode()])
                if of_node and _born(int(process.name)):
                    found.append(int(process.name))
    return found


def _write(file: Path, value: object) -> None:
    draft = file.with_suffix(".draft")
    draft.write_text(json.dumps(value))
    draft.replace(file)


def _born(pid: int) -> str:
    """When the process started, by the kernel's clock; empty where it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    return ""


def _without_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """Parts talk to each other only."""
    return {key: value for key, value in environment.items() if not key.lower().endswith("_proxy")}


def _run(argv: Iterable[str], text: str | None = None) -> str:
    command = [*argv]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def _succeeds(argv: Sequence[str]) -> bool:
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


def _until(done: Callable[[], bool], trouble: str, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise SystemExit(f"{trouble} (after {seconds:g} s)")
        time.sleep(0.05)


def wipe(root: Path) -> None:
    shutil.rmtree(root)
