"""What the service knows besides versions: builds, deployments, revisions, events, tokens.

Functions take a connection and do one thing; the caller decides the transaction. Work is claimed by a conditional
UPDATE … RETURNING with a lease by the database's clock and a fencing token, so several replicas may run the loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    ColumnElement,
    Connection,
    Float,
    Index,
    Integer,
    Row,
    ScalarSelect,
    String,
    Table,
    Text,
    case,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)

from registry.database import metadata, now
from registry.errors import UserError
from registry.versions import versions

BUILD_OPEN = ("queued", "running")
DAMAGED = frozenset({"digest_mismatch", "model_missing", "object_damaged"})  # codes: what the store holds is not whole
_SETTINGS = ("replicas", "resources", "strategy", "autoscale")  # of a deployment: with which a revision was asked for
DROPPED = "dropped"  # a revision that a roll-back cannot return to: what it needs may be deleted

builds = Table(
    "builds",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("version_id", String(26), nullable=False),
    Column("identity", String(71), nullable=False),
    Column("image", JSON),  # None: only what the local platform needs
    Column("state", String(16), nullable=False, default="queued"),
    Column("stage", String(32)),
    Column("stages", JSON, nullable=False, default=list),
    Column("attempts", Integer, nullable=False, default=0),
    Column("not_before", Float, nullable=False, default=0.0),
    Column("result", JSON),
    Column("reason", Text),
    Column("code", String(64)),
    Column("hint", Text),
    Column("created", Float, nullable=False, default=now()),
    Column("started", Float),
    Column("finished", Float),
    Column("lease_owner", String(64)),
    Column("lease_until", Float, nullable=False, default=0.0),
    Column("fence", Integer, nullable=False, default=0),
    Index("ix_builds_state", "state", "not_before"),
)

version_builds = Table(  # equal versions under two names share one build
    "version_builds",
    metadata,
    Column("version_id", String(26), primary_key=True),
    Column("build_id", String(64), primary_key=True),
)

deployments = Table(
    "deployments",
    metadata,
    Column("name", String(40), primary_key=True),
    Column("state", String(16), nullable=False, default="pending"),
    Column("is_default", Boolean, nullable=False, default=False),
    Column("desired", Integer, nullable=False),  # revision wanted
    Column("live", Integer),  # revision that has the traffic
    Column("replicas", Integer, nullable=False, default=1),
    Column("resources", JSON, nullable=False, default=dict),
    Column("strategy", String(16), nullable=False, default="rolling"),
    Column("autoscale", JSON(none_as_null=True)),  # {"max": replicas, "cpu": percent}; replicas is the least then
    Column("reason", Text),
    Column("code", String(64)),
    Column("hint", Text),
    Column("created", Float, nullable=False, default=now()),
    Column("updated", Float, nullable=False, default=now()),
    Column("deleted", Float),
    Column("lease_owner", String(64)),
    Column("lease_until", Float, nullable=False, default=0.0),
    Column("fence", Integer, nullable=False, default=0),
)

revisions = Table(
    "revisions",
    metadata,
    Column("deployment", String(40), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("version_id", String(26), nullable=False),
    Column("build_id", String(64), nullable=False),
    Column("state", String(16), nullable=False, default="pending"),
    Column("reason", Text),
    Column("rollback_of", Integer),
    Column("created", Float, nullable=False, default=now()),
    Column("rolling_since", Float),
    Column("deadline", Float),
    Column("live_since", Float),
    Column("settings", JSON),  # the deployment's with which it was asked for last; none of before 0003
)

told_crashes = Table(  # how many of a deployment's crashes its events tell, whichever replica of the service told them
    "told_crashes",
    metadata,
    Column("deployment", String(40), primary_key=True),
    Column("crashes", Integer, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("time", Float, nullable=False, default=now()),
    Column("subject", String(128), nullable=False),
    Column("type", String(16), nullable=False),
    Column("reason", String(64), nullable=False),
    Column("message", Text, nullable=False),
    Index("ix_events_subject", "subject", "id"),
)

tokens = Table(
    "tokens",
    metadata,
    Column("id", String(26), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("created", Float, nullable=False, default=now()),
    Column("revoked", Float),
)

outbox = Table(  # what the MLflow projection has still to do
    "outbox",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("action", String(16), nullable=False),
    Column("payload", JSON, nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("not_before", Float, nullable=False, default=0.0),
)


@dataclass(frozen=True)
class Build:
    id: str
    version_id: str
    identity: str
    image: dict[str, Any] | None
    state: str
    stage: str | None
    stages: list[dict[str, Any]]
    attempts: int
    not_before: float
    result: dict[str, Any] | None
    reason: str | None
    code: str | None
    hint: str | None
    created: float
    started: float | None
    finished: float | None
    lease_owner: str | None
    lease_until: float
    fence: int


@dataclass(frozen=True)
class Deployment:
    name: str
    state: str
    is_default: bool
    desired: int
    live: int | None
    replicas: int
    resources: dict[str, str]
    strategy: str
    autoscale: dict[str, int] | None
    reason: str | None
    code: str | None
    hint: str | None
    created: float
    updated: float
    deleted: float | None
    lease_owner: str | None
    lease_until: float
    fence: int


@dataclass(frozen=True)
class Revision:
    deployment: str
    number: int
    version_id: str
    build_id: str
    state: str
    reason: str | None
    rollback_of: int | None
    created: float
    rolling_since: float | None
    deadline: float | None
    live_since: float | None
    settings: dict[str, Any] | None


@dataclass(frozen=True)
class Needed:
    """What must stay, because a revision that is live, wanted or kept needs it, or a build that has not ended."""

    results: tuple[dict[str, Any], ...]  # of builds: they name environments and Bentos
    locations: frozenset[str]  # of versions
    logs: frozenset[str]  # builds: those of every version that exists, too
    unneeded_logs: frozenset[str]  # of all the others that there were


@dataclass(frozen=True)
class Standing:
    """What tells whether a deployment needs a step: what is wanted, and what was told of it."""

    name: str
    state: str
    desired: int
    live: int | None
    replicas: int
    resources: dict[str, str]
    strategy: str
    autoscale: dict[str, int] | None
    reason: str | None
    revision_state: str
    build_state: str
    told_crashes: int
    default: bool


# --- builds ---------------------------------------------------------------------------------------------------------


def submit_build(connection: Connection, build_id: str, identity: str, version_id: str, image: Any) -> Build:
    """The build of this identity: a new one, or the one that is there. A failed or cancelled one is tried anew."""
    row = connection.execute(select(builds).where(builds.c.id == build_id)).one_or_none()
    if row is None:
        row = connection.execute(
            insert(builds).values(id=build_id, identity=identity, version_id=version_id, image=image).returning(builds)
        ).one()
    elif row.state in ("failed", "cancelled"):
        row = connection.execute(
            update(builds)
            .where(builds.c.id == build_id)
            .values(
                state="queued", stage=None, stages=[], attempts=0, not_before=0.0, reason=None, code=None, hint=None,
                finished=None, version_id=version_id, image=image,
            )
            .returning(builds)
        ).one()  # fmt: skip
    link = select(version_builds).where(
        version_builds.c.version_id == version_id, version_builds.c.build_id == build_id
    )
    if connection.execute(link).one_or_none() is None:
        connection.execute(insert(version_builds).values(version_id=version_id, build_id=build_id))
    return Build(**row._mapping)


def build(connection: Connection, build_id: str) -> Build:
    row = connection.execute(select(builds).where(builds.c.id == build_id)).one_or_none()
    if row is None:
        raise UserError(
            "build_not_found",
            f"There is no build {build_id!r}.",
            field="id",
            hint="GET /builds lists them.",
            status=404,
        )
    return Build(**row._mapping)


def builds_page(connection: Connection, before: float | None, limit: int) -> list[Build]:
    query = select(builds).order_by(builds.c.created.desc()).limit(limit)
    if before is not None:
        query = query.where(builds.c.created < before)
    return [Build(**row._mapping) for row in connection.execute(query)]


def build_of_version(connection: Connection, version_id: str) -> Build | None:
    """The newest build of a version that serves it (not one asked for an image only)."""
    row = connection.execute(
        select(builds)
        .join(version_builds, version_builds.c.build_id == builds.c.id)
        .where(version_builds.c.version_id == version_id)
        .order_by(builds.c.image.is_(None).desc(), builds.c.created.desc())
        .limit(1)
    ).one_or_none()
    return None if row is None else Build(**row._mapping)


def is_damaged(connection: Connection, version_id: str) -> bool:
    """Whether a version's build found that the store does not hold what was uploaded."""
    found = build_of_version(connection, version_id)
    return found is not None and found.state == "failed" and found.code in DAMAGED


def _claimable() -> ColumnElement[bool]:
    """Builds that wait, or whose owner is gone."""
    return or_(
        (builds.c.state == "queued") & (builds.c.not_before <= now()),
        (builds.c.state == "running") & (builds.c.lease_until < now()),
    )


def build_waits(connection: Connection) -> bool:
    return connection.execute(select(builds.c.id).where(_claimable()).limit(1)).first() is not None


def claim_build(connection: Connection, owner: str, lease_seconds: float) -> Build | None:
    """The oldest build that waits, or whose owner is gone, now leased to `owner`. Who takes over goes on with the same
    attempt: what runs of it is joined, not started beside."""
    waiting = select(builds.c.id).where(_claimable()).order_by(builds.c.created).limit(1).scalar_subquery()
    row = connection.execute(
        update(builds)
        .where(builds.c.id == waiting)
        .where(or_(builds.c.state == "queued", builds.c.lease_until < now()))
        .values(
            state="running",
            lease_owner=owner,
            lease_until=now() + lease_seconds,
            fence=builds.c.fence + 1,
            attempts=case((builds.c.state == "queued", builds.c.attempts + 1), else_=builds.c.attempts),
            started=now(),
        )
        .returning(builds)
    ).one_or_none()
    return None if row is None else Build(**row._mapping)


def change_build(connection: Connection, held: Build, **values: Any) -> bool:
    """Change a build that is held under a lease. False: the lease went to another, and nothing was changed."""
    result = connection.execute(
        update(builds)
        .where(builds.c.id == held.id, builds.c.fence == held.fence, builds.c.state == "running")
        .values(**values)
    )
    return result.rowcount == 1


def release_builds(connection: Connection, owner_alive: str) -> None:
    """Give up leases of processes that are known to be gone (embedded: every owner but this one)."""
    connection.execute(
        update(builds).where(builds.c.state == "running", builds.c.lease_owner != owner_alive).values(lease_until=0.0)
    )


def leave_builds(connection: Connection, version_id: str) -> None:
    """The version's files go: open builds of it go on with an equal version, or end."""
    mine = select(builds).where(builds.c.version_id == version_id, builds.c.state.in_(BUILD_OPEN))
    for row in connection.execute(mine).all():
        other = connection.execute(
            select(version_builds.c.version_id)
            .join(versions, versions.c.id == version_builds.c.version_id)
            .where(version_builds.c.build_id == row.id, versions.c.id != version_id, versions.c.deleted.is_(None))
            .limit(1)
        ).scalar_one_or_none()
        values: dict[str, Any] = {"state": "queued", "version_id": other, "attempts": 0}
        if other is None:
            values = {
                "state": "cancelled", "reason": "its version was deleted", "code": "version_deleted", "finished": now()
            }  # fmt: skip
        connection.execute(update(builds).where(builds.c.id == row.id).values(fence=builds.c.fence + 1, **values))


def rebuild(connection: Connection, build_id: str) -> bool:
    """What a finished build had left was deleted: it runs again, with the lock that it had. False: it does already."""
    result = connection.execute(
        update(builds)
        .where(builds.c.id == build_id, builds.c.state == "succeeded")
        .values(state="queued", attempts=0, not_before=0.0, finished=None)
    )
    return result.rowcount == 1


def cancel_build(connection: Connection, build_id: str) -> Build:
    current = build(connection, build_id)
    if current.state not in BUILD_OPEN:
        raise UserError("build_finished", f"Build {build_id} has already {current.state}.", field="id", status=409)
    row = connection.execute(
        update(builds)
        .where(builds.c.id == build_id, builds.c.state.in_(BUILD_OPEN))
        .values(state="cancelled", reason="cancelled by a user", code="cancelled", finished=now(),
                fence=builds.c.fence + 1)
        .returning(builds)
    ).one()  # fmt: skip
    return Build(**row._mapping)


# --- deployments ----------------------------------------------------------------------------------------------------


def deployment(connection: Connection, name: str) -> Deployment | None:
    row = connection.execute(
        select(deployments).where(deployments.c.name == name, deployments.c.deleted.is_(None))
    ).one_or_none()
    return None if row is None else Deployment(**row._mapping)


def need_deployment(connection: Connection, name: str) -> Deployment:
    found = deployment(connection, name)
    if found is None:
        raise UserError(
            "deployment_not_found",
            f"There is no deployment {name!r}.",
            field="name",
            hint="GET /deployments lists them; PUT /deployments/NAME makes one of a model's version.",
            status=404,
        )
    return found


def all_deployments(connection: Connection) -> list[Deployment]:
    query = select(deployments).where(deployments.c.deleted.is_(None)).order_by(deployments.c.name)
    return [Deployment(**row._mapping) for row in connection.execute(query)]


def standings(connection: Connection) -> list[Standing]:
    """Of every deployment that is not deleted, in one query: a round at rest costs no more than this."""
    query = (
        select(
            *(deployments.c[name] for name in (
                "name", "state", "desired", "live", "replicas", "resources", "strategy", "autoscale", "reason"
            )),
            revisions.c.state.label("revision_state"),
            builds.c.state.label("build_state"),
            func.coalesce(told_crashes.c.crashes, 0).label("told_crashes"),
            is_default().label("default"),
        )
        .join(revisions, (revisions.c.deployment == deployments.c.name) & (revisions.c.number == deployments.c.desired))
        .join(builds, builds.c.id == revisions.c.build_id)
        .outerjoin(told_crashes, told_crashes.c.deployment == deployments.c.name)
        .where(deployments.c.deleted.is_(None))
        .order_by(deployments.c.name)
    )  # fmt: skip
    return [Standing(**row._mapping) for row in connection.execute(query)]


def tell_crashes(connection: Connection, name: str, crashes: int) -> int:
    """Write down how many crashes are told from now on; returns how many were told before."""
    mine = told_crashes.c.deployment == name
    before = connection.execute(select(told_crashes.c.crashes).where(mine)).scalar_one_or_none()
    if before is None:
        connection.execute(insert(told_crashes).values(deployment=name, crashes=crashes))
    elif before != crashes:
        connection.execute(update(told_crashes).where(mine).values(crashes=crashes))
    return before or 0


def _default_name() -> ScalarSelect[str]:
    """The one that was set so, else the first."""
    return (
        select(deployments.c.name)
        .where(deployments.c.deleted.is_(None))
        .order_by(deployments.c.is_default.desc(), deployments.c.created)
        .limit(1)
        .scalar_subquery()
    )


def is_default() -> ColumnElement[bool]:
    """Whether a row of `deployments` is the one that answers calls which name none."""
    return deployments.c.name == _default_name()


def default_deployment(connection: Connection) -> Deployment | None:
    row = connection.execute(select(deployments).where(is_default())).one_or_none()
    return None if row is None else Deployment(**row._mapping)


def make_default(connection: Connection, name: str) -> None:
    connection.execute(update(deployments).values(is_default=deployments.c.name == name))


def target(
    connection: Connection, name: str, version_id: str, build_id: str, *, rollback_of: int | None = None, **values: Any
) -> Revision:
    """Point a deployment at a version: a new revision, which the loop will roll to.

    Asking for what is already wanted, with nothing else changed, makes no revision.
    """
    row = connection.execute(select(deployments).where(deployments.c.name == name)).one_or_none()
    before = {} if row is None else {key: getattr(row, key) for key in _SETTINGS}
    settings = {**before, **values}
    if row is not None and row.deleted is None and rollback_of is None:
        wanted = revision(connection, name, row.desired)
        same = wanted.version_id == version_id and wanted.build_id == build_id
        if same and wanted.state in ("pending", "rolling", "live"):
            if any(getattr(row, key) != value for key, value in values.items()):
                connection.execute(
                    update(deployments).where(deployments.c.name == name).values(updated=now(), **values)
                )
                change_revision(connection, name, wanted.number, settings=settings)
            return wanted
    last = connection.execute(
        select(func.max(revisions.c.number)).where(revisions.c.deployment == name)
    ).scalar_one_or_none()
    number = (last or 0) + 1
    made = connection.execute(
        insert(revisions)
        .values(
            deployment=name,
            number=number,
            version_id=version_id,
            build_id=build_id,
            rollback_of=rollback_of,
            settings=settings,
        )
        .returning(revisions)
    ).one()
    if row is None:
        first = default_deployment(connection) is None
        connection.execute(insert(deployments).values(name=name, desired=number, is_default=first, **values))
    else:
        # A revision that was on its way and is no longer wanted ends here.
        connection.execute(
            update(revisions)
            .where(
                revisions.c.deployment == name,
                revisions.c.number == row.desired,
                revisions.c.state.in_(("pending", "rolling")),
            )
            .values(state="superseded", reason=f"revision {number} was asked for before it was live")
        )
        again = {"live": None, "created": now()} if row.deleted is not None else {}
        connection.execute(
            update(deployments)
            .where(deployments.c.name == name)
            .values(
                desired=number, state="pending", reason=None, code=None, hint=None, deleted=None, updated=now(),
                **again, **values,
            )
        )  # fmt: skip
    return Revision(**made._mapping)


def revision(connection: Connection, name: str, number: int) -> Revision:
    row = connection.execute(
        select(revisions).where(revisions.c.deployment == name, revisions.c.number == number)
    ).one_or_none()
    if row is None:
        raise UserError(
            "revision_not_found",
            f"Deployment {name!r} has no revision {number}.",
            field="revision",
            hint=f"GET /deployments/{name}/revisions lists them.",
            status=404,
        )
    return Revision(**row._mapping)


def revisions_of(connection: Connection, name: str) -> list[Revision]:
    """Newest first."""
    rows = connection.execute(
        select(revisions).where(revisions.c.deployment == name).order_by(revisions.c.number.desc())
    )
    return [Revision(**row._mapping) for row in rows]


def previous_good(connection: Connection, name: str, before: int, version_id: str) -> Revision | None:
    """The newest revision before this one that has been live with another version, which still exists."""
    row = connection.execute(
        select(revisions)
        .join(versions, versions.c.id == revisions.c.version_id)
        .where(
            revisions.c.deployment == name,
            revisions.c.number < before,
            revisions.c.version_id != version_id,
            revisions.c.live_since.is_not(None),
            revisions.c.state != DROPPED,
            versions.c.deleted.is_(None),
        )
        .order_by(revisions.c.number.desc())
        .limit(1)
    ).one_or_none()
    return None if row is None else Revision(**row._mapping)


def change_revision(connection: Connection, name: str, number: int, **values: Any) -> None:
    connection.execute(
        update(revisions).where(revisions.c.deployment == name, revisions.c.number == number).values(**values)
    )


def seconds_left(connection: Connection, name: str, number: int) -> float:
    """Of the time that a revision has to become ready."""
    left = select(revisions.c.deadline - now()).where(revisions.c.deployment == name, revisions.c.number == number)
    return float(connection.execute(left).scalar_one())


def claim_deployment(connection: Connection, name: str, owner: str, lease_seconds: float) -> Deployment | None:
    """The deployment, leased to `owner`; None while another holds it."""
    row = connection.execute(
        update(deployments)
        .where(
            deployments.c.name == name,
            or_(deployments.c.lease_owner == owner, deployments.c.lease_until < now()),
        )
        .values(lease_owner=owner, lease_until=now() + lease_seconds, fence=deployments.c.fence + 1)
        .returning(deployments)
    ).one_or_none()
    return None if row is None else Deployment(**row._mapping)


def change_deployment(connection: Connection, held: Deployment, **values: Any) -> bool:
    """Change a deployment that is held under a lease and still wants the same revision; False: it does not."""
    result = connection.execute(
        update(deployments)
        .where(
            deployments.c.name == held.name,
            deployments.c.fence == held.fence,
            deployments.c.desired == held.desired,
        )
        .values(updated=now(), **values)
    )
    return result.rowcount == 1


def release_deployments(connection: Connection, ready_seconds: float) -> None:
    """Embedded: no other process can hold a lease when this one starts, and what was rolling starts afresh."""
    connection.execute(update(deployments).values(lease_until=0.0))
    connection.execute(delete(told_crashes))  # this process counts its platform's crashes from nothing
    connection.execute(update(revisions).where(revisions.c.state == "rolling").values(deadline=now() + ready_seconds))


def delete_deployment(connection: Connection, name: str) -> None:
    need_deployment(connection, name)
    connection.execute(
        update(deployments)
        .where(deployments.c.name == name)
        .values(deleted=now(), is_default=False, fence=deployments.c.fence + 1)
    )
    connection.execute(
        update(revisions)
        .where(revisions.c.deployment == name, revisions.c.state.in_(("pending", "rolling", "live")))
        .values(state="superseded", reason="the deployment was deleted")
    )


# --- what nobody needs ----------------------------------------------------------------------------------------------


def drop_revisions(connection: Connection, keep: int) -> int:
    """Give up what a roll-back shall no longer return to; how many revisions that were.

    Kept are the newest `keep` of each deployment that were live, with the live one; those that serve the same count as
    one, so that going back and forth forgets nothing. A deployment that was deleted keeps none.
    """
    rows = connection.execute(
        select(revisions, deployments.c.desired, deployments.c.live, deployments.c.deleted)
        .join(deployments, deployments.c.name == revisions.c.deployment)
        .where(revisions.c.live_since.is_not(None), revisions.c.state != DROPPED)
        .order_by(revisions.c.deployment, revisions.c.number.desc())
    ).all()
    kept: dict[str, set[tuple[str, str]]] = {}
    dropped: dict[str, list[int]] = {}
    for row in rows:
        serves, mine = (row.version_id, row.build_id), kept.setdefault(row.deployment, set())
        if row.deleted is not None:
            dropped.setdefault(row.deployment, []).append(row.number)
        elif serves in mine or len(mine) < keep or row.number in (row.desired, row.live):
            mine.add(serves)
        else:
            dropped.setdefault(row.deployment, []).append(row.number)
    for name, numbers in dropped.items():
        connection.execute(
            update(revisions)
            .where(revisions.c.deployment == name, revisions.c.number.in_(numbers))
            .values(state=DROPPED, reason=f"a deployment keeps its newest {keep} revisions")
        )
    return sum(map(len, dropped.values()))


def needed(connection: Connection) -> Needed:
    """What must stay, as of this moment."""
    returnable = revisions.c.live_since.is_not(None) & (revisions.c.state != DROPPED) & versions.c.deleted.is_(None)
    held = connection.execute(
        select(revisions.c.build_id, versions.c.location)
        .join(deployments, deployments.c.name == revisions.c.deployment)
        .join(versions, versions.c.id == revisions.c.version_id)
        .where(deployments.c.deleted.is_(None))
        .where(or_(revisions.c.number.in_((deployments.c.desired, deployments.c.live)), returnable))
    ).all()
    opened = connection.execute(
        select(builds.c.id, versions.c.location)
        .join(versions, versions.c.id == builds.c.version_id)
        .where(builds.c.state.in_(BUILD_OPEN))
    ).all()
    owned = connection.execute(
        select(version_builds.c.build_id)
        .join(versions, versions.c.id == version_builds.c.version_id)
        .where(versions.c.deleted.is_(None))
    ).scalars()
    working = {row.build_id for row in held} | {row.id for row in opened}
    logs = working | set(owned)
    rows = connection.execute(select(builds.c.id, builds.c.result).where(builds.c.id.in_(working))).all()
    return Needed(
        results=tuple(row.result for row in rows if row.result is not None),
        locations=frozenset(row.location for row in (*held, *opened)),
        logs=frozenset(logs),
        unneeded_logs=frozenset(connection.execute(select(builds.c.id)).scalars()) - logs,
    )


# --- events, outbox -------------------------------------------------------------------------------------------------


def record(connection: Connection, subject: str, reason: str, message: str, *, type: str = "Normal") -> None:
    """An event that a user can read: subject such as `deployment/churn`, reason in CamelCase, a full sentence."""
    connection.execute(insert(events).values(subject=subject, type=type, reason=reason, message=message))


def events_of(connection: Connection, subject: str, limit: int = 200) -> list[Row[Any]]:
    rows = connection.execute(
        select(events).where(events.c.subject == subject).order_by(events.c.id.desc()).limit(limit)
    )
    return list(rows)


def enqueue(connection: Connection, action: str, payload: dict[str, Any]) -> None:
    connection.execute(insert(outbox).values(action=action, payload=payload))
