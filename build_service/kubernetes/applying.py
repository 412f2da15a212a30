"""Bring one object to what is wanted: created where the cluster has none, applied over what is ours and nothing else.

Server-side apply cannot be asked for "only if there is none", and with `force` it takes any field from any owner. So an
object is made by `create`, and applied only over one that was read and bears our label, at the version that was read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import structlog

from build_service.kubernetes import drift, names
from build_service.kubernetes.cluster import Cluster, Conflict, NameTaken, is_ours, subject_of

log = structlog.get_logger(__name__)

Object = dict[str, Any]

_ATTEMPTS = 3  # at an object that others write too
# Objects that move from one deployment to another.
_SHARED = frozenset({names.DEFAULT_ROUTE})


def put(cluster: Cluster, wanted: Object, fence: int = 0) -> None:
    """Write `wanted` (as `manifests.sealed` returns it) unless the cluster holds it, or a newer lease has written it.

    Raises NameTaken where an object of another owner has the name, Conflict where others write faster.
    """
    kind, meta = wanted["kind"], wanted["metadata"]
    live = cluster.known(kind, meta["namespace"], meta["name"])
    for attempt in range(_ATTEMPTS):
        try:
            if live is None:
                cluster.create(wanted)
                return
            if "deletionTimestamp" in live["metadata"] and is_ours(live):
                return
            _need_own(live, wanted)
            if drift.holds(live, wanted):
                return
            if drift.fence(live) > fence and subject_of(kind, live) == subject_of(kind, wanted):
                log.info("a newer lease has applied already", kind=kind, name=meta["name"])
                return
            cluster.apply(wanted, over=live)
        except Conflict:
            if attempt == _ATTEMPTS - 1:
                raise
            live = cluster.read(kind, meta["namespace"], meta["name"])
        else:
            return


def _need_own(live: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    kind, meta = wanted["kind"], wanted["metadata"]
    owner = subject_of(kind, live)
    if is_ours(live) and (owner == subject_of(kind, wanted) or meta["name"] in _SHARED):
        return
    whose = f"of the deployment {owner!r}" if is_ours(live) and owner else "that is not Ekiben's"
    raise NameTaken(
        "name_taken_in_cluster",
        f"The namespace {meta['namespace']!r} has a {kind} {meta['name']!r} {whose}. It is left as it is.",
        hint=f"Delete or rename it (`kubectl -n {meta['namespace']} delete {kind.lower()} {meta['name']}`), or give "
        "the deployment another name; the rollout continues by itself.",
    )
