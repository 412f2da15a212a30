"""Rows of the database as answers of the API."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, func, select, tuple_

from build_service import shapes, state
from registry import versions
from registry.versions import Version

FINAL = frozenset(("live", "failed", "rolled_back", "superseded"))


class Links:
    """URLs as clients reach them."""

    def __init__(self, base: str) -> None:
        self.base = base.rstrip("/")

    def predict(self, deployment: str, route: str = "/predict") -> str:
        return f"{self.base}/inference/{deployment}{route}"

    def docs(self, deployment: str) -> str:
        return f"{self.base}/inference/{deployment}/docs"


def stamp(seconds: float | None) -> str | None:
    """RFC 3339 in UTC, milliseconds."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def version(connection: Connection, row: Version, links: Links) -> shapes.VersionView:
    build = state.build_of_version(connection, row.id)
    revision = _newest_revision(connection, row)
    code, reason, hint = (build.code, build.reason, build.hint) if build and build.state == "failed" else (None,) * 3
    rollout = None
    if revision is None or revision.state == "pending":
        current = {"queued": "queued", "running": "building", "succeeded": "built"}.get(
            build.state if build else "succeeded", "failed"
        )
        if revision is not None and current == "built":
            current = "rolling"
    else:
        current = "superseded" if revision.state == state.DROPPED else revision.state
        if revision.state in ("failed", "rolled_back"):
            deployment = state.deployment(connection, revision.deployment)
            reason = revision.reason
            if deployment is not None and deployment.reason == revision.reason:
                code, hint = deployment.code, deployment.hint
        if revision.live_since and revision.rolling_since:
            rollout = revision.live_since - revision.rolling_since
    took = build.finished - build.started if build and build.finished and build.started else None
    route = (build.result or {}).get("predict", "/predict") if build else "/predict"
    deployed = revision.deployment if revision else row.name
    checked = shapes.Checked(**row.checked) if row.checked else None
    return shapes.VersionView(
        model=row.name,
        version=row.number,
        digest=row.digest,
        kind=row.kind,
        format=row.format,
        state=current,
        size=row.size,
        created=stamp(row.created) or "",
        labels=row.labels,
        files=[shapes.StoredFile(**file) for file in row.manifest["files"]],
        signature=row.signature,
        verified=checked.verified if checked else None,
        checked=checked,
        build=build.id if build else None,
        stage=build.stage if build and build.state == "running" else None,
        code=code,
        reason=reason,
        hint=hint,
        url=links.predict(deployed, route),
        docs=links.docs(deployed),
        logs=f"{links.base}/builds/{build.id}/logs" if build else f"{links.base}/deployments/{deployed}/logs",
        seconds=shapes.Seconds(upload=_round(row.upload_seconds), build=_round(took), rollout=_round(rollout)),
    )


def build(connection: Connection, row: state.Build, links: Links) -> shapes.BuildView:
    return builds(connection, [row], links)[0]


def builds(connection: Connection, rows: Sequence[state.Build], links: Links) -> list[shapes.BuildView]:
    of = _titles(connection, {row.version_id for row in rows})
    return [_build(row, of[row.version_id], links) for row in rows]


def _titles(connection: Connection, identities: Collection[str]) -> dict[str, shapes.Target]:
    """Name and number of versions by their identity."""
    table = versions.versions.c
    rows = connection.execute(select(table.id, table.name, table.number).where(table.id.in_(identities)))
    return {row.id: shapes.Target(model=row.name, version=row.number) for row in rows}


def _build(row: state.Build, of: shapes.Target, links: Links) -> shapes.BuildView:
    return shapes.BuildView(
        id=row.id,
        model=of.model,
        version=of.version,
        identity=row.identity,
        state=row.state,
        stage=row.stage,
        stages=row.stages,
        attempts=row.attempts,
        code=row.code,
        reason=row.reason,
        hint=row.hint,
        image=(row.result or {}).get("image"),
        created=stamp(row.created) or "",
        finished=stamp(row.finished),
        logs=f"{links.base}/builds/{row.id}/logs",
    )


def deployment(connection: Connection, row: state.Deployment, ready: int, links: Links) -> shapes.DeploymentView:
    return deployments(connection, [row], lambda _: ready, links)[0]


def deployments(
    connection: Connection, rows: Sequence[state.Deployment], ready: Callable[[str], int], links: Links
) -> list[shapes.DeploymentView]:
    """`ready` gives a deployment's processes that answer."""
    served, default = _served(connection, {(row.name, number) for row in rows for number in (row.desired, row.live)})
    return [_deployment(row, served, ready(row.name), row.name == default, links) for row in rows]


def _served(
    connection: Connection, wanted: Collection[tuple[str, int | None]]
) -> tuple[dict[tuple[str, int], shapes.Target], str | None]:
    """What revisions serve, by deployment and number; and which of the deployments is the default."""
    revisions, of = state.revisions.c, versions.versions.c
    rows = connection.execute(
        select(
            revisions.deployment, revisions.number, of.name, of.number.label("version"),
            state.is_default().label("is_default"),
        )
        .join(versions.versions, of.id == revisions.version_id)
        .join(state.deployments, state.deployments.c.name == revisions.deployment)
        .where(tuple_(revisions.deployment, revisions.number).in_(wanted))
    ).all()  # fmt: skip
    served = {(row.deployment, row.number): shapes.Target(model=row.name, version=row.version) for row in rows}
    return served, next((row.deployment for row in rows if row.is_default), None)


def _deployment(
    row: state.Deployment, served: Mapping[tuple[str, int], shapes.Target], ready: int, default: bool, links: Links
) -> shapes.DeploymentView:
    live = row.desired if row.live is None else row.live
    return shapes.DeploymentView(
        name=row.name,
        state=row.state,
        default=default,
        target=served[row.name, live],
        wanted=served[row.name, row.desired],
        revision=live,
        replicas=row.replicas,
        ready=ready,
        resources=row.resources,
        strategy=row.strategy,
        autoscale=None if row.autoscale is None else shapes.Autoscale(**row.autoscale),
        code=row.code,
        reason=row.reason,
        hint=row.hint,
        url=links.predict(row.name),
        docs=links.docs(row.name),
        logs=f"{links.base}/deployments/{row.name}/logs",
        updated=stamp(row.updated) or "",
    )


def revision(connection: Connection, row: state.Revision) -> shapes.RevisionView:
    of = versions.by_id(connection, row.version_id)
    return shapes.RevisionView(
        revision=row.number,
        model=of.name,
        version=of.number,
        state=row.state,
        reason=row.reason,
        created=stamp(row.created) or "",
        rollback_of=row.rollback_of,
    )


def event(row: Any) -> shapes.EventView:
    return shapes.EventView(time=stamp(row.time) or "", type=row.type, reason=row.reason, message=row.message)


def models(connection: Connection, links: Links) -> list[shapes.ModelView]:
    """Every model, and which version the deployment of its name serves."""
    of, deployed, revisions = versions.versions, state.deployments.c, state.revisions.c
    live = of.alias("live")
    known = (
        select(of.c.name, func.max(of.c.number).label("latest"), func.count().label("count"))
        .where(of.c.deleted.is_(None))
        .group_by(of.c.name)
        .subquery()
    )
    rows = connection.execute(
        select(known.c.name, known.c.latest, known.c["count"], of.c.kind, live.c.number.label("live"))
        .join(of, (of.c.name == known.c.name) & (of.c.number == known.c.latest))
        .outerjoin(state.deployments, (deployed.name == known.c.name) & deployed.deleted.is_(None))
        .outerjoin(state.revisions, (revisions.deployment == deployed.name) & (revisions.number == deployed.live))
        .outerjoin(live, live.c.id == revisions.version_id)
        .order_by(known.c.name)
    )
    return [
        shapes.ModelView(
            name=row.name, latest=row.latest, live=row.live, kind=row.kind, versions=row._mapping["count"],
            url=links.predict(row.name),
        )
        for row in rows
    ]  # fmt: skip


def _newest_revision(connection: Connection, row: Version) -> state.Revision | None:
    """The revision that tells most about a version: the live one, else the newest."""
    found = connection.execute(
        select(state.revisions)
        .where(state.revisions.c.version_id == row.id)
        .order_by(
            (state.revisions.c.state == "live").desc(),
            (state.revisions.c.deployment == row.name).desc(),
            state.revisions.c.created.desc(),
            state.revisions.c.number.desc(),
        )
        .limit(1)
    ).one_or_none()
    return None if found is None else state.Revision(**found._mapping)


def _round(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
