"""What nobody needs any more is deleted, and nothing else is, whoever is killed while it happens."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from build_service import state
from build_service.cleanup import Sweeper
from build_service.platform import InUse
from build_service.settings import Settings
from builder_image import layers, staging, tarball
from registry import shelf, versions
from registry.database import Database, now
from registry.store import DirectoryStore

Home = Any  # tests/build_service/conftest.py, which tests cannot import
Until = Callable[..., Any]

KILLED_AT = Path(__file__).with_name("killed_at.py")
AT_ONCE = {"sweep_seconds": "0.1", "sweep_grace_seconds": "0", "keep_cache_seconds": "0"}
SAMPLE = {"inputs": [1.0, 2.0]}
OLD = 1_000_000_000.0


def project(factor: int, before: str = "") -> bytes:
    """A project whose Bento differs by its factor; all of them have one environment."""
    service = f"""
import os, time
import bentoml
{before}
@bentoml.service
class Project:
    @bentoml.api
    def predict(self, inputs: list[float]) -> dict:
        return {{"outputs": [{factor} * x for x in inputs]}}
"""
    files = {
        "p/bentofile.yaml": "service: service:Project\n",
        "p/requirements.txt": "bentoml==1.4.40\n",
        "p/service.py": service,
    }
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    return out.getvalue()


@pytest.fixture
def own(home: Home) -> Home:
    """A state folder that shares no caches: they are what is looked at."""
    for name in ("environments", "bentos"):
        (home.path / name).unlink()
        (home.path / name).mkdir()
    return home


def push(home: Home, factor: int, **fields: Any) -> Any:
    version = home.upload(project(factor), "p.tar", name="own", sample=SAMPLE, **fields)
    assert version["state"] in ("live", "built"), version
    return version


def outputs(home: Home) -> list[float]:
    answer = home.predict("own", [1.0, 2.0])
    assert answer.status_code == 200, answer.text
    return answer.json()["outputs"]


def metric(home: Home, name: str) -> float:
    with home.http() as client:
        found = re.search(rf"^{re.escape(name)} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def swept(home: Home, until: Until) -> None:
    """A whole sweep has begun and ended since now."""
    enough = metric(home, 'ekiben_sweeps_total{outcome="done"}') + 2
    until(lambda: metric(home, 'ekiben_sweeps_total{outcome="done"}') >= enough, home.log)
    assert metric(home, 'ekiben_sweeps_total{outcome="failed"}') == 0, home.log()


def folders(place: Path) -> set[str]:
    """What is there besides locks, resolutions and image layers."""
    return {path.name for path in place.iterdir() if not path.name.endswith(".lock")} - {"locks", "layers"}


def bento_of(home: Home, version: Any) -> str:
    ((folder,),) = home.rows(f"SELECT json_extract(result, '$.bento.dir') FROM builds WHERE id = '{version['build']}'")
    return Path(folder).name


@pytest.mark.slow
def test_a_rollback_finds_what_is_kept_and_the_rest_is_gone(own: Home, until: Until) -> None:
    own.start(keep_revisions="2", **AT_ONCE)
    pushed = [push(own, factor) for factor in (1, 2, 3, 4)]
    bentos = [bento_of(own, version) for version in pushed]
    assert len(set(bentos)) == 4
    until(lambda: folders(own.path / "bentos") == {name + end for name in bentos[2:] for end in ("", ".json")}, own.log)
    history = own.get("/deployments/own/revisions")["items"]
    assert [(each["version"], each["state"]) for each in history] == [
        (4, "live"), (3, "superseded"), (2, "dropped"), (1, "dropped"),
    ]  # fmt: skip
    assert own.get("/models/own/versions/1")["state"] == "superseded"
    assert metric(own, "ekiben_freed_bytes_total") > 0

    built = own.rows("SELECT id, started, attempts FROM builds ORDER BY id")
    own.post("/deployments/own/rollback")
    until(lambda: own.get("/deployments/own")["target"]["version"] == 3, own.log)
    assert outputs(own) == [3.0, 6.0]
    assert own.rows("SELECT id, started, attempts FROM builds ORDER BY id") == built
    own.post("/deployments/own/rollback")  # back and forth forgets neither
    until(lambda: own.get("/deployments/own")["target"]["version"] == 4, own.log)
    swept(own, until)
    assert {each["version"]: each["state"] for each in own.get("/deployments/own/revisions")["items"][-4:]} == {
        4: "superseded", 3: "superseded", 2: "dropped", 1: "dropped",
    }  # fmt: skip

    refused = own.post("/deployments/own/rollback", 409, json={"revision": 1})
    assert refused["code"] == "revision_dropped"
    assert "ekiben deploy own --model own --version 1" in refused["hint"]
    own.call("PUT", "/deployments/own", json={"version": 1})  # as the hint says
    until(lambda: own.get("/deployments/own")["target"]["version"] == 1, own.log)
    assert outputs(own) == [1.0, 2.0]

    own.call("DELETE", "/models/own/versions/2", 204)
    until(lambda: not (own.path / "builds" / pushed[1]["build"]).exists(), own.log)
    assert (own.path / "builds" / pushed[2]["build"]).exists()  # its version exists, so its log is kept
    own.call("DELETE", "/deployments/own", 204)
    until(lambda: not folders(own.path / "bentos") and not folders(own.path / "environments"), own.log)
    push(own, 1, status=200)  # and all of it comes again
    assert outputs(own) == [1.0, 2.0]


@pytest.mark.slow
def test_a_build_that_runs_keeps_what_it_works_with(own: Home, until: Until, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    own.start(**AT_ONCE)
    waits = f"while not os.path.exists({str(gate)!r}): time.sleep(0.05)\n"
    slow = own.upload(project(5, waits), "p.tar", name="own", sample=SAMPLE, deploy="false", wait=0)
    until(lambda: own.get(f"/builds/{slow['build']}")["stage"] == "bento", own.log)
    swept(own, until)
    (environment,) = [name for name in folders(own.path / "environments") if not name.startswith(".")]
    assert (own.path / "builds" / slow["build"] / "spec.json").exists()
    gate.touch()
    until(lambda: own.get("/models/own/versions/1")["state"] == "built", lambda: str(own.get("/models/own/versions/1")))
    assert own.get(f"/builds/{slow['build']}")["attempts"] == 1
    until(lambda: environment not in folders(own.path / "environments"), own.log)  # no deployment needs it


@pytest.mark.slow
@pytest.mark.parametrize("boundary", ["sweep-renamed", "sweep-half-deleted", "sweep-record-left"])
def test_a_sweep_that_is_killed_leaves_nothing_half_usable(own: Home, until: Until, boundary: str) -> None:
    own.start()
    pushed = [push(own, factor) for factor in (1, 2, 3)]
    bentos = [bento_of(own, version) for version in pushed]
    own.stop()
    own.start(program=[sys.executable, str(KILLED_AT), boundary], expect=False, keep_revisions="2", **AT_ONCE)
    until(lambda: own.process.poll() is not None, own.log)
    assert own.process.returncode == -9, own.log()
    assert list((own.path / "bentos").glob(".removed-*"))
    assert not (own.path / "bentos" / bentos[0]).exists()
    assert (own.path / "bentos" / f"{bentos[0]}.json").exists() == (boundary == "sweep-record-left")
    until(lambda: not own.processes(), lambda: str(own.processes()))

    own.start(keep_revisions="2", **AT_ONCE)
    own.settled("own")
    swept(own, until)
    assert folders(own.path / "bentos") == {name + end for name in bentos[1:] for end in ("", ".json")}
    assert outputs(own) == [3.0, 6.0]
    own.post("/deployments/own/rollback")
    until(lambda: own.get("/deployments/own")["target"]["version"] == 2, own.log)
    own.call("PUT", "/deployments/own", json={"version": 1})
    until(lambda: own.get("/deployments/own")["target"]["version"] == 1, own.log)
    assert outputs(own) == [1.0, 2.0]


# --- what is needed, by SQL ---------------------------------------------------------------------------------------


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(f"sqlite:///{tmp_path / 'ekiben.db'}")
    made.create()
    yield made
    made.close()


def deploy(database: Database, name: str, number: int, *, live: bool = True, rollback_of: int | None = None) -> None:
    """Version `number` of the model is built and served under its name."""
    with database.write() as connection:
        row, _ = versions.create(
            connection, name=name, digest=f"sha256:{name}{number}", kind="lightgbm", format="lightgbm-text", size=1,
            location=f"models/{name}-{number}", manifest={}, labels={},
        )  # fmt: skip
        build = state.submit_build(connection, f"b-{name}{number}", f"sha256:{name}{number}", row.id, None)
        result = {"environment": {"dir": f"/e/{name}{number}"}, "bento": {"dir": f"/b/{name}{number}"}}
        connection.execute(state.builds.update().where(state.builds.c.id == build.id).values(
            state="succeeded", result=result
        ))  # fmt: skip
        before = state.deployment(connection, name)
        values = {} if before else {"replicas": 1}
        made = state.target(connection, name, row.id, build.id, rollback_of=rollback_of, **values)
        if live:
            if before is not None and before.live is not None:
                state.change_revision(connection, name, before.live, state="superseded")
            state.change_revision(connection, name, made.number, state="live", live_since=now())
            held = state.need_deployment(connection, name)
            assert state.change_deployment(connection, held, state="live", live=made.number)


def states(database: Database, name: str) -> list[str]:
    with database.read() as connection:
        return [each.state for each in reversed(state.revisions_of(connection, name))]


def dropped(database: Database, keep: int) -> int:
    with database.write() as connection:
        return state.drop_revisions(connection, keep)


def test_revisions_are_kept_by_what_they_serve(database: Database) -> None:
    for number in (1, 2, 3, 2, 3, 2):  # a rollback makes a revision
        deploy(database, "churn", number, rollback_of=1)
    assert dropped(database, 3) == 0
    deploy(database, "churn", 4)
    deploy(database, "churn", 5, live=False)  # on its way: wanted, and not yet counted
    assert dropped(database, 3) == 1
    assert states(database, "churn") == ["dropped", *["superseded"] * 5, "live", "pending"]
    assert dropped(database, 3) == 0
    assert dropped(database, 2) == 2  # both that served version 3
    with database.read() as connection:
        needed = state.needed(connection)
        assert state.previous_good(connection, "churn", 7, "") is not None
        before = state.previous_good(connection, "churn", 6, state.revision(connection, "churn", 6).version_id)
    assert before is None
    assert needed.locations == {"models/churn-2", "models/churn-4", "models/churn-5"}
    assert {Path(result["bento"]["dir"]).name for result in needed.results} == {"churn2", "churn4", "churn5"}


def test_a_deleted_deployment_needs_nothing_and_deleted_versions_lose_their_logs(database: Database) -> None:
    deploy(database, "churn", 1)
    deploy(database, "churn", 2)
    deploy(database, "other", 1)
    with database.write() as connection:
        state.delete_deployment(connection, "churn")
        versions.mark_deleted(connection, versions.find(connection, "churn", 1).id)
    assert dropped(database, 2) == 2
    with database.read() as connection:
        needed = state.needed(connection)
    assert needed.locations == {"models/other-1"}
    assert needed.logs == {"b-churn2", "b-other1"}
    assert needed.unneeded_logs == {"b-churn1"}


# --- one sweep ----------------------------------------------------------------------------------------------------


def sweeper(tmp_path: Path, database: Database, use: InUse | None = None, **values: Any) -> Sweeper:
    settings = Settings(home=tmp_path, **values)
    return Sweeper(settings, database, DirectoryStore(tmp_path / "objects"), lambda: use or InUse())


def aged(path: Path, at: float = OLD) -> Path:
    os.utime(path, (at, at))
    return path


def test_what_is_younger_than_its_time_stays(tmp_path: Path, database: Database) -> None:
    deploy(database, "churn", 1)
    for name in ("environments/churn1", "environments/none", "environments/new", "builds/b-none", "builds/b-new",
                 "checkouts/models/churn-1", "checkouts/models/none", "checkouts/models/none.01J"):  # fmt: skip
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_bytes(b"1234567")
        if not name.endswith("new"):
            aged(tmp_path / name)
    assert sweeper(tmp_path, database).sweep() == 3 * 7
    assert folders(tmp_path / "environments") == {"churn1", "new"}
    assert folders(tmp_path / "builds") == {"b-new"}
    assert folders(tmp_path / "checkouts" / "models") == {"churn-1", "none.01J"}  # the last is being fetched
    with database.write() as connection:
        state.delete_deployment(connection, "churn")
    assert sweeper(tmp_path, database).sweep() == 0  # its time begins now that it is needed no more
    used = InUse(folders=frozenset(("churn1",)))  # by a process that finishes its requests
    at_once = {"sweep_grace_seconds": 0, "keep_cache_seconds": 0}
    aged(tmp_path / "environments" / "churn1")
    sweeper(tmp_path, database, used, **at_once).sweep()
    assert "churn1" in folders(tmp_path / "environments")
    aged(tmp_path / "environments" / "churn1")
    assert sweeper(tmp_path, database, **at_once).sweep() >= 7
    assert "churn1" not in folders(tmp_path / "environments")


def test_what_is_being_made_is_left_and_what_a_dead_maker_left_is_not(tmp_path: Path, database: Database) -> None:
    environments = tmp_path / "environments"
    for name in ("held", ".held.7.tmp", ".dead.8.tmp"):
        aged_folder = environments / name
        aged_folder.mkdir(parents=True)
        aged(aged_folder)
    program = (
        "import sys; from pathlib import Path; from registry import shelf\n"
        "with shelf.locked(Path(sys.argv[1]), 'held'): print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(environments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as maker:
        assert maker.stdout is not None
        assert maker.stdout.readline() == b"locked\n"
        sweeper(tmp_path, database).sweep()
        assert folders(environments) == {"held", ".held.7.tmp"}
        maker.kill()
    sweeper(tmp_path, database).sweep()
    assert not folders(environments)


def test_who_finds_a_thing_marks_it_and_it_is_not_taken_away(tmp_path: Path) -> None:
    place = tmp_path / "thing"
    place.mkdir()
    aged(place)
    assert shelf.wanted(tmp_path, "thing", place.is_dir)
    assert shelf.remove(tmp_path, "thing", before=OLD + 1) is None
    assert not shelf.wanted(tmp_path, "other", (tmp_path / "other").is_dir)
    aged(place)
    gone = shelf.remove(tmp_path, "thing", before=OLD + 1)
    assert gone is not None
    assert not shelf.wanted(tmp_path, "thing", place.is_dir)
    assert shelf.rest(tmp_path) == [gone]
    assert not list(tmp_path.glob(".thing*"))


def test_image_layers_go_when_no_build_found_them_for_long(tmp_path: Path, database: Database) -> None:
    kept = staging.Kept(tmp_path / "environments" / "layers", lambda key: None)
    for key in ("deps-old", "deps-found", "deps-new"):
        kept.keep(layers.make("deps", [tarball.file("a", key.encode())], kept.blobs), key)
    for path in (*kept.folder.glob("*-old.json"), *kept.folder.glob("*-found.json"), *kept.blobs.iterdir()):
        aged(path)
    assert kept.find("deps", "deps-found") is not None
    assert sweeper(tmp_path, database).sweep() > 0
    assert kept.find("deps", "deps-old") is None
    for key in ("deps-found", "deps-new"):
        found = kept.find("deps", key)
        assert found is not None
        assert b"".join(found.open())
    assert len(list(kept.blobs.iterdir())) == 2


def test_what_builds_in_a_cluster_left_in_the_store_follows_them(tmp_path: Path, database: Database) -> None:
    deploy(database, "churn", 1)
    deploy(database, "churn", 2)
    store = DirectoryStore(tmp_path / "objects")
    for build in ("b-churn1", "b-churn2", "b-of-another-database"):
        for key in (f"builds/{build}/1/spec.json", f"builds/{build}/1/log/000001"):
            writer = store.writer(key)
            writer.write(b"12345")
            writer.commit()
            aged(tmp_path / "objects" / key)
    with database.write() as connection:
        versions.mark_deleted(connection, versions.find(connection, "churn", 1).id)
    settings = Settings(home=tmp_path).model_copy(update={"platform": "kubernetes"})
    assert Sweeper(settings, database, store, InUse).sweep() == 10
    assert {info.key.split("/")[1] for info in store.list("builds/")} == {"b-churn2", "b-of-another-database"}
