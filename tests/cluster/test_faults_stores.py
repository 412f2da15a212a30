"""Faults of what models and images are kept in: a store that is away, an image that is gone, a bit that flipped."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from build_service.kubernetes import names
from tests.cluster.faults import (
    BUILDS,
    MODELS,
    Caller,
    available,
    away,
    calling,
    converged,
    in_service,
    jobs,
    no_pods,
    of_model,
    only_version,
    push_once,
    push_through,
    running,
    same,
    volume,
)
from tests.cluster.workloads import eventually
from tests.k8s.installation import Installation, Trained

pytestmark = pytest.mark.timeout(900)

MINUTE = 60.0
Fresh = Callable[[], Trained]


def test_the_registry_is_away_for_a_minute(installed: Installation, calls: Caller, model: Trained, name: str) -> None:
    with away(installed, "statefulset/registry"):
        began = time.monotonic()
        pushed = installed.push(model.file, name, sample=model.sample)
        time.sleep(MINUTE - (time.monotonic() - began))
        build = installed.call("GET", f"/builds/{pushed['build']}")
        assert build["state"] in ("queued", "running")
        assert build["code"] == "registry_unreachable", build  # its user sees why it takes so long
    converged(installed, name, model)


def test_the_object_store_is_away_for_a_minute(
    installed: Installation, calls: Caller, fresh: Fresh, model: Trained, name: str
) -> None:
    """A build that began before, and an upload that comes meanwhile."""
    other, later, before = f"{name}-l", fresh(), left_over(installed)
    try:
        with contextlib.ExitStack() as held:
            held.enter_context(no_pods(installed.cluster, BUILDS))
            pushed = installed.push(model.file, name, sample=model.sample)
            eventually(lambda: jobs(installed.cluster, pushed["build"]))
            held.enter_context(away(installed, "statefulset/minio"))
            began = time.monotonic()
            installed.cluster.kubectl("-n", BUILDS, "delete", "quota", "no-pods")  # its pod starts, and finds no store
            with pytest.raises(httpx.TimeoutException):  # it is held until the store is back
                push_once(installed, later, other, 20)
            assert installed.http.get(f"/models/{other}").status_code == 404
            assert installed.deployment("steady")["state"] == "live"
            time.sleep(MINUTE - (time.monotonic() - began))
        push_through(installed, later, other)
        converged(installed, other, later)
        converged(installed, name, model)
        eventually(lambda: left_over(installed) <= before, seconds=180)
    finally:
        available(installed)
        installed.remove(other)


def test_an_image_that_was_deleted_is_made_again(
    installed: Installation, calls: Caller, fresh: Fresh, model: Trained, name: str
) -> None:
    """For a revision to return to, and for a further replica of one that is live."""
    installed.push(model.file, name, sample=model.sample)
    first = converged(installed, name, model)
    second = fresh()
    installed.push(second.file, name, sample=second.sample)
    converged(installed, name, second, 2)
    with calling(installed, name, second):
        delete_image(installed, first.digest)
    installed.call("POST", f"/deployments/{name}/rollback")
    back = converged_to(installed, name, model)
    assert back == first.digest

    with calling(installed, name, model):
        installed.call("PUT", f"/deployments/{name}", json={"version": 1, "replicas": 2})
        eventually(lambda: installed.deployment(name)["ready"] == 2, seconds=180)
        delete_image(installed, first.digest)
        one = of_model(installed.cluster, "pods", MODELS, name)[0]["metadata"]["name"]
        installed.cluster.kubectl("-n", MODELS, "delete", "pod", one, "--wait=false")
        told = eventually(lambda: rebuildings(installed, name)[1:], seconds=240)
        assert "cannot be pulled, as the registry does not have it" in told[0]
        eventually(lambda: settled_at(installed, name, 2), seconds=300)
    assert installed.deployment(name)["reason"] is None
    assert len(rebuildings(installed, name)) == 2


def test_a_flipped_bit_is_refused_and_a_new_upload_mends_it(
    installed: Installation, calls: Caller, model: Trained, name: str
) -> None:
    with no_pods(installed.cluster, BUILDS):
        pushed = installed.push(model.file, name, sample=model.sample)
        eventually(lambda: jobs(installed.cluster, pushed["build"]))
        flip_a_bit(installed, name)
    failed = eventually(lambda: ended(installed, pushed["build"]), seconds=300)
    assert (failed["state"], failed["code"], failed["attempts"]) == ("failed", "digest_mismatch", 1)
    assert "has another SHA-256" in failed["reason"]
    assert "upload the model again" in failed["hint"]
    deployment = eventually(lambda: row if (row := installed.deployment(name))["state"] == "failed" else None)
    assert deployment["reason"] == failed["reason"]
    time.sleep(10)
    assert len(jobs(installed.cluster, pushed["build"])) == 1
    assert not running(installed.cluster, pushed["build"])

    again = installed.push(model.file, name, sample=model.sample)
    assert (again["version"], again["build"]) == (1, pushed["build"])
    eventually(lambda: ended(installed, pushed["build"]).get("state") == "succeeded", seconds=300)
    converged(installed, name, model)


def converged_to(site: Installation, name: str, model: Trained) -> str:
    """After a way back: the digest that serves version 1."""
    site.live(name, 1, seconds=400)
    eventually(lambda: only_version(site.cluster, name, 1), seconds=120)
    eventually(lambda: same(site.predict(name, model.rows).json(), model))
    (deployed,) = of_model(site.cluster, "deployments", MODELS, name)
    assert deployed["metadata"]["labels"][names.VERSION] == "1"
    return str(deployed["spec"]["template"]["spec"]["containers"][0]["image"].rpartition("@")[2])


def rebuildings(site: Installation, name: str) -> list[str]:
    """Newest first."""
    return [event["message"] for event in site.events(name) if event["reason"] == "Rebuilding"]


def settled_at(site: Installation, name: str, replicas: int) -> bool:
    row = site.cluster.get("deployment", name, "-n", MODELS)
    counts = ("replicas", "updatedReplicas", "readyReplicas", "availableReplicas")
    rolled = all(row["status"].get(count) == replicas for count in counts)
    return rolled and row["status"]["observedGeneration"] == row["metadata"]["generation"]


def ended(site: Installation, build: str) -> dict[str, Any]:
    found = dict(site.call("GET", f"/builds/{build}"))
    return found if found["state"] in ("succeeded", "failed") else {}


def delete_image(site: Installation, digest: str) -> None:
    """From the registry, as a clean-up does that was told too little, and from the node that had pulled it."""
    registry = volume(site.cluster, "data-registry-0") / "docker/registry/v2"
    hexadecimal = digest.removeprefix("sha256:")
    places: list[Path] = [registry / "blobs/sha256" / hexadecimal[:2] / hexadecimal]
    places += registry.glob(f"repositories/**/revisions/sha256/{hexadecimal}")
    places += registry.glob(f"repositories/**/index/sha256/{hexadecimal}")
    assert len(places) > 1, places
    for place in places:
        shutil.rmtree(place)
    node = site.cluster.node
    ctr = ["ctr", f"--address={node.root}/containerd.sock", "--namespace=k8s.io", "images"]
    for ref in node.run(*ctr, "list", "-q", f"target.digest=={digest}").split():
        node.run(*ctr, "remove", "--sync", ref)


def left_over(site: Installation) -> set[str]:
    """Folders of the bucket that are no version's. A service that was killed leaves some, until they are old."""
    printed = in_service(
        site.cluster,
        """
from build_service import storage
from build_service.settings import Settings
from registry import versions
from registry.database import Database
settings = Settings()
with Database(settings.database_url).read() as connection:
    known = versions.locations(connection)
stored = {"/".join(info.key.split("/")[:2]) for info in storage.bucket(settings).list("models/")}
print(*sorted(stored - known))
""",
    )
    return set(printed.splitlines()[-1].split()) if printed.strip() else set()


def flip_a_bit(site: Installation, name: str) -> None:
    """In the bucket: of the model's only file, one in the middle."""
    in_service(
        site.cluster,
        f"""
from build_service import storage
from build_service.settings import Settings
from registry import versions
from registry.database import Database
settings = Settings()
store = storage.bucket(settings)
with Database(settings.database_url).read() as connection:
    location = versions.find(connection, {name!r}, 1).location
(key,) = [info.key for info in store.list(location + "/files/")]
with store.open(key) as stream:
    data = bytearray(stream.read())
data[len(data) // 2] ^= 1
writer = store.writer(key)
writer.write(data)
writer.commit()
""",
    )
