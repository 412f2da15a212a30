"""Enforce the NetworkPolicies that the cluster holds: nftables on the node, `python -m tests.cluster.policies ROOT`.

What this is: a stand-in, for tests, for the part of a network plugin (Calico, Cilium, …) that enforces policies; the
plain CNI plugins enforce none, and no such plugin can be had from packages. It reads the very objects of the cluster
and follows the rules of networking.k8s.io/v1: `podSelector`, `namespaceSelector`, `ipBlock` with `except`, ports by
number, range and name, both directions, and deny by default for a pod that any policy selects. A pod's containers start
only when its rules are in place (go/cni-policies waits for that).

What it is not: what the node itself sends to its pods (probes, the API server's calls) always passes, as with most
plugins, and connections that exist are not cut by a later policy. IPv4 only.
"""

from __future__ import annotations

import ipaddress
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.cluster import nodes

Object = Mapping[str, Any]
Key = tuple[str, str]

TABLE = "ekiben_policies"
SOCKET = "/run/ekiben-policies.sock"

_PATHS = {
    "namespaces": "/api/v1/namespaces",
    "pods": "/api/v1/pods",
    "networkpolicies": "/apis/networking.k8s.io/v1/networkpolicies",
}
_PATIENCE = 15.0
_EVERYWHERE = ipaddress.IPv4Network("0.0.0.0/0")


@dataclass(frozen=True)
class Pod:
    namespace: str
    address: str
    labels: Mapping[str, str]
    ports: Mapping[str, tuple[str, int]]
    """Named ports: name → protocol in lower case, number."""


def ruleset(pods: Iterable[Pod], namespaces: Mapping[str, Mapping[str, str]], policies: Iterable[Object]) -> str:
    """What `nft -f` takes: the table, replaced as a whole. `namespaces` are their labels by name."""
    pods, policies = sorted(pods, key=lambda pod: pod.address), list(policies)
    chains: list[str] = []
    jumps: dict[str, list[str]] = {"ingress": [], "egress": []}
    for pod in pods:
        for direction, verdicts in jumps.items():
            of_pod = [each for each in policies if _selects(each, pod, direction)]
            if not of_pod:
                continue
            name = f"{direction}_{pod.address.replace('.', '_')}"
            rules = [f"ip saddr {pod.address} ip daddr {pod.address} return"]
            for policy in of_pod:
                rules += _rules(policy, pod, direction, pods, namespaces)
            chains.append(_chain(name, [*dict.fromkeys(rules), "drop"]))
            verdicts.append(f"{pod.address} : jump {name}")
    table = [
        *chains,
        _chain("egress", [f"ip saddr vmap {{ {', '.join(jumps['egress'])} }}"] if jumps["egress"] else []),
        _chain("ingress", [f"ip daddr vmap {{ {', '.join(jumps['ingress'])} }}"] if jumps["ingress"] else []),
        _chain(
            "forward",
            [
                "type filter hook forward priority 0; policy accept;",
                "ct state established,related accept",
                "jump egress",
                "jump ingress",
            ],
        ),
        _chain(
            "input",
            [
                "type filter hook input priority 0; policy accept;",
                "ct state established,related accept",
                "jump egress",
            ],
        ),
    ]
    body = "".join(table)
    return f"table ip {TABLE} {{}}\ndelete table ip {TABLE}\ntable ip {TABLE} {{\n{body}}}\n"


def _rules(
    policy: Object, pod: Pod, direction: str, pods: list[Pod], namespaces: Mapping[str, Mapping[str, str]]
) -> Iterator[str]:
    side, peers_of = ("saddr", "from") if direction == "ingress" else ("daddr", "to")
    home = policy["metadata"]["namespace"]
    for rule in policy["spec"].get(direction) or []:
        ports = rule.get("ports") or []
        peers = rule.get(peers_of) or []
        for peer in peers or [None]:
            if peer and ":" in peer.get("ipBlock", {}).get("cidr", ""):  # an address of IPv6 is nobody's here
                continue
            if peer is None or "ipBlock" in peer:
                where = "" if peer is None else _block(peer["ipBlock"], side)
                others = pods
            else:
                others = [each for each in pods if _is_peer(peer, each, home, namespaces)]
                if not others:
                    continue
                where = f"ip {side} {{ {', '.join(each.address for each in others)} }} "
            if not ports:
                yield f"{where}return"
            for port in ports:
                if isinstance(port.get("port"), str):
                    yield from _named(port, where, pod, direction, others)
                else:
                    yield f"{where}{_port(port)} return"


def _named(port: Object, where: str, pod: Pod, direction: str, others: list[Pod]) -> Iterator[str]:
    """A port by name is that of the pod which is called: the selected one inwards, each of the others outwards."""
    protocol = port.get("protocol", "TCP").lower()
    if direction == "ingress":
        named = pod.ports.get(port["port"])
        if named and named[0] == protocol:
            yield f"{where}{protocol} dport {named[1]} return"
        return
    for each in others:
        named = each.ports.get(port["port"])
        if named and named[0] == protocol:
            yield f"{where}ip daddr {each.address} {protocol} dport {named[1]} return"


def _port(port: Object) -> str:
    protocol = port.get("protocol", "TCP").lower()
    if port.get("port") is None:
        return f"meta l4proto {protocol}"
    last = f"-{port['endPort']}" if port.get("endPort") else ""
    return f"{protocol} dport {port['port']}{last}"


def _block(block: Object, side: str) -> str:
    where = "" if block["cidr"].endswith("/0") else f"ip {side} {block['cidr']} "
    return where + "".join(f"ip {side} != {each} " for each in block.get("except") or [])


def _selects(policy: Object, pod: Pod, direction: str) -> bool:
    spec = policy["spec"]
    types = spec.get("policyTypes") or ["Ingress", *(["Egress"] if "egress" in spec else [])]
    return (
        direction.capitalize() in types
        and policy["metadata"]["namespace"] == pod.namespace
        and matches(spec.get("podSelector") or {}, pod.labels)
    )


def _is_peer(peer: Object, pod: Pod, home: str, namespaces: Mapping[str, Mapping[str, str]]) -> bool:
    if "namespaceSelector" in peer:
        if not matches(peer["namespaceSelector"] or {}, namespaces.get(pod.namespace, {})):
            return False
    elif pod.namespace != home:
        return False
    return matches(peer.get("podSelector") or {}, pod.labels)


def matches(selector: Object, labels: Mapping[str, str]) -> bool:
    """Whether a label selector of Kubernetes selects these labels; an empty one selects all."""
    if any(labels.get(name) != value for name, value in (selector.get("matchLabels") or {}).items()):
        return False
    for each in selector.get("matchExpressions") or []:
        value, values = labels.get(each["key"]), each.get("values") or []
        answers = {
            "In": value in values,
            "NotIn": value not in values,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }
        if not answers[each["operator"]]:
            return False
    return True


def _chain(name: str, rules: Iterable[str]) -> str:
    return f"  chain {name} {{\n" + "".join(f"    {rule}\n" for rule in rules) + "  }\n"


@dataclass
class Enforcer:
    """What the cluster holds, as far as it was told, and the rules made of it."""

    objects: dict[str, dict[Key, Object]] = field(default_factory=lambda: {kind: {} for kind in _PATHS})
    listed: set[str] = field(default_factory=set)
    network: ipaddress.IPv4Network = _EVERYWHERE
    """Of the node's own pods; those of simulated nodes have other addresses, and no traffic."""
    addresses: dict[Key, str] = field(default_factory=dict)
    """Addresses that the CNI plugin told before the kubelet did."""
    wanted: int = 0
    applied: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def put(self, kind: str, event: str, value: Object) -> None:
        key = _key(value)
        with self.changed:
            if event == "DELETED":
                self.objects[kind].pop(key, None)
                if kind == "pods":
                    self.addresses.pop(key, None)
            else:
                self.objects[kind][key] = value
            self._want()

    def replace(self, kind: str, values: Iterable[Object]) -> None:
        with self.changed:
            self.objects[kind] = {_key(each): each for each in values}
            self.listed.add(kind)
            self._want()

    def admit(self, key: Key, address: str) -> None:
        """Return when the rules for the pod under its new address are in place. Raises TimeoutError."""
        with self.changed:
            self.addresses[key] = address
            if not self.changed.wait_for(lambda: key in self.objects["pods"], _PATIENCE):
                raise TimeoutError(f"the API server did not tell of pod {'/'.join(key)}")
            self._want()
            mine = self.wanted
            if not self.changed.wait_for(lambda: self.applied >= mine, _PATIENCE):
                raise TimeoutError("the rules could not be put in place")

    def run(self) -> None:
        """Put rules in place whenever something changed."""
        last = ""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.wanted > self.applied and len(self.listed) == len(_PATHS))
                mine, text = self.wanted, self._ruleset()
            if text != last:
                subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)
                print(time.strftime("%H:%M:%S"), text.count("jump ") - 3, "pods under policy", flush=True)
                last = text
            with self.changed:
                self.applied = mine
                self.changed.notify_all()

    def _want(self) -> None:
        self.wanted += 1
        self.changed.notify_all()

    def _ruleset(self) -> str:
        namespaces = {name: _labels(each) for (_, name), each in self.objects["namespaces"].items()}
        pods = [pod for key, each in self.objects["pods"].items() if (pod := self._pod(key, each))]
        return ruleset(pods, namespaces, self.objects["networkpolicies"].values())

    def _pod(self, key: Key, value: Object) -> Pod | None:
        status = value.get("status") or {}
        address = self.addresses.get(key) or status.get("podIP")
        ended = status.get("phase") in ("Succeeded", "Failed")
        if not address or ended or value["spec"].get("hostNetwork"):
            return None
        if ipaddress.IPv4Address(address) not in self.network:
            return None
        ports = {
            port["name"]: (port.get("protocol", "TCP").lower(), port["containerPort"])
            for container in value["spec"]["containers"]
            for port in container.get("ports") or []
            if port.get("name")
        }
        return Pod(key[0], address, _labels(value), ports)


def follow(enforcer: Enforcer, client: httpx.Client, kind: str) -> None:
    """Tell the enforcer of every object of a kind, for ever."""
    while True:
        try:
            found = client.get(_PATHS[kind]).raise_for_status().json()
            enforcer.replace(kind, found["items"])
            _watch(enforcer, client, kind, found["metadata"]["resourceVersion"])
        except (httpx.HTTPError, json.JSONDecodeError) as error:
            print(f"{kind}: {error!r}", flush=True)
            time.sleep(0.5)


def _watch(enforcer: Enforcer, client: httpx.Client, kind: str, version: str) -> None:
    asked = {"watch": "1", "resourceVersion": version, "timeoutSeconds": "600"}
    with client.stream("GET", _PATHS[kind], params=asked, timeout=httpx.Timeout(10, read=660)) as answer:
        for line in answer.raise_for_status().iter_lines():
            event = json.loads(line)
            if event["type"] == "ERROR":
                return
            enforcer.put(kind, event["type"], event["object"])


def listen(enforcer: Enforcer, server: socket.socket) -> None:
    while True:
        connection, _ = server.accept()
        threading.Thread(target=_answer, args=(enforcer, connection), daemon=True).start()


def _answer(enforcer: Enforcer, connection: socket.socket) -> None:
    with connection, connection.makefile("rw") as stream:
        message = json.loads(stream.readline())
        error = ""
        if message["command"] == "ADD":
            try:
                enforcer.admit((message["K8S_POD_NAMESPACE"], message["K8S_POD_NAME"]), message["address"])
            except TimeoutError as late:
                error = str(late)
        stream.write(json.dumps({"error": error}) + "\n")


def main(root: Path) -> None:
    trust = ssl.create_default_context(cafile=str(root / "pki/ca.crt"))
    trust.load_cert_chain(root / "pki/admin.crt", root / "pki/admin.key")
    address = json.loads((root / "kubeconfig").read_text())["clusters"][0]["cluster"]["server"]
    node = nodes.find(root)
    assert node is not None
    enforcer = Enforcer(network=ipaddress.IPv4Network(node.network.pods))
    for kind in _PATHS:
        client = httpx.Client(base_url=address, verify=trust, trust_env=False)
        threading.Thread(target=follow, args=(enforcer, client, kind), daemon=True).start()
    Path(SOCKET).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(SOCKET)
        server.listen(64)
        threading.Thread(target=listen, args=(enforcer, server), daemon=True).start()
        enforcer.run()


def _key(value: Object) -> Key:
    return value["metadata"].get("namespace", ""), value["metadata"]["name"]


def _labels(value: Object) -> Mapping[str, str]:
    return value["metadata"].get("labels") or {}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
