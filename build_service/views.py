"""Rows of the database as answers of the API."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, select

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
        current = revision.state
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
    of = versions.by_id(connection, row.version_id)
    return shapes.BuildView(
        id=row.id,
        model=of.name,
        version=of.number,
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
    wanted = state.revision(connection, row.name, row.desired)
    live = state.revision(connection, row.name, row.live) if row.live is not None else wanted
    target = versions.by_id(connection, live.version_id)
    wants = versions.by_id(connection, wanted.version_id)
    default = state.default_deployment(connection)
    return shapes.DeploymentView(
        name=row.name,
        state=row.state,
        default=default is not None and default.name == row.name,
        target=shapes.Target(model=target.name, version=target.number),
        wanted=shapes.Target(model=wants.name, version=wants.number),
        revision=live.number,
        replicas=row.replicas,
        ready=ready,
        resources=row.resources,
        strategy=row.strategy,
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


def model(connection: Connection, name: str, links: Links) -> shapes.ModelView:
    rows = versions.of_model(connection, name)
    if not rows:
        versions.find(connection, name, 0)  # raises model_not_found
    deployed = state.deployment(connection, name)
    live = None
    if deployed is not None and deployed.live is not None:
        live = versions.by_id(connection, state.revision(connection, name, deployed.live).version_id).number
    return shapes.ModelView(
        name=name, latest=rows[0].number, live=live, kind=rows[0].kind, versions=len(rows), url=links.predict(name)
    )


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
