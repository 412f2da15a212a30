"""Whether a request can fit at all, before anything is built for it.

This service may read nothing cluster-wide, so no nodes. It knows the quotas of the models' namespace, and what the
settings say that the largest node can give to one pod (EKIBEN_CLUSTER_CAPACITY); what neither knows, the scheduler says
later, in the deployment's reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from build_service.quantities import parse_amount
from build_service.settings import Settings
from registry.errors import UserError

_STATUS = 409  # what is asked for contradicts what there is


class Room:
    def __init__(
        self, settings: Settings, quotas: Iterable[Mapping[str, Any]], limits: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        """`quotas` and `limits`: the ResourceQuotas and LimitRanges of the models' namespace."""
        self._settings, self._quotas, self._limits = settings, list(quotas), list(limits)

    def check(
        self, current: Mapping[str, Any] | None, resources: Mapping[str, str], replicas: int, strategy: str
    ) -> None:
        """UserError if `replicas` pods with these resources cannot come up, whatever else happens. `current`: the
        Deployment as it is, whose pods give their room back (with `replace` before, else after the new ones are up)."""
        for field, resource in (("gpu", self._settings.gpu_resource), ("memory", "memory"), ("cpu", "cpu")):
            if (text := resources.get(field)) is None or (one := parse_amount(str(text))) == 0:
                continue
            self._against_capacity(field, resource, str(text), one)
            self._against_limits(field, resource, str(text), one)
            now = _uses(current, resource)
            peak = replicas * one
            if current is not None and strategy != "replace":
                peak = max(peak, now + one)
            for quota in self._quotas:
                self._against_quota(quota, field, resource, peak, now)

    def _against_capacity(self, field: str, resource: str, text: str, one: Decimal) -> None:
        capacity = self._settings.cluster_capacity.get(resource)
        if capacity is not None and one > parse_amount(capacity):
            raise _refusal(field, resource, capacity, text, "no node of this cluster can give more to one pod")

    def _against_limits(self, field: str, resource: str, text: str, one: Decimal) -> None:
        for limits in self._limits:
            for each in limits["spec"].get("limits") or ():
                most = (each.get("max") or {}).get(resource) if each["type"] in ("Container", "Pod") else None
                if most is not None and one > parse_amount(str(most)):
                    raise UserError(
                        "limit_exceeded",
                        f"resources.{field} is {text}. The LimitRange {limits['metadata']['name']!r} of the models' "
                        f"namespace allows at most {most}.",
                        field=f"resources.{field}",
                        hint="Ask for less, or have the limit raised.",
                        status=_STATUS,
                    )

    def _against_quota(self, quota: Mapping[str, Any], field: str, resource: str, peak: Decimal, now: Decimal) -> None:
        status = quota.get("status", {})
        for key in (f"requests.{resource}", resource, f"limits.{resource}"):
            if key not in status.get("hard", {}):
                continue
            free = parse_amount(status["hard"][key]) - parse_amount(status.get("used", {}).get(key, "0")) + now
            if peak > free:
                name = quota["metadata"]["name"]
                raise _refusal(
                    field, resource, _shown(free), _shown(peak),
                    f"the quota {name!r} of the models' namespace allows {status['hard'][key]} in all",
                )  # fmt: skip


def _refusal(field: str, resource: str, free: str, asked: str, why: str) -> UserError:
    title = resource if field == "gpu" else field
    return UserError(
        f"insufficient_{field}",
        f"{free} free of {asked} ({title}): {why}.",
        field=f"resources.{field}",
        hint="Ask for less, delete a deployment that nobody needs, or have the room enlarged. A rolling update needs "
        "room for one more pod; strategy=replace does not.",
        status=_STATUS,
    )


def _uses(deployment: Mapping[str, Any] | None, resource: str) -> Decimal:
    if deployment is None:
        return Decimal(0)
    spec = deployment["spec"]
    requests = spec["template"]["spec"]["containers"][0].get("resources", {}).get("requests", {})
    return parse_amount(str(requests.get(resource, "0"))) * int(spec.get("replicas", 1))


def _shown(amount: Decimal) -> str:
    """Binary units where they fit; amounts are those of memory, CPUs or GPUs."""
    for unit, factor in (("Gi", 2**30), ("Mi", 2**20)):
        if amount >= factor and amount % factor == 0:
            return f"{int(amount / factor)}{unit}"
    return f"{amount.normalize():f}"
