"""Files by link, from a server over a real connection that breaks, lies and forgets."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder_image.fetching import ATTEMPTS, Store, Wanted
from registry.errors import InfrastructureError
from tests.builder_image.links import Links

BIG = os.urandom(5 << 20)


@pytest.fixture
def links() -> Iterator[Links]:
    server = Links().start()
    yield server
    server.stop()


@pytest.fixture
def store() -> Iterator[Store]:
    with Store(pause=lambda seconds: None) as made:
        yield made


def wanted(links: Links, path: str, data: bytes) -> Wanted:
    links.objects.setdefault(path, data)
    return Wanted(path, links.url(path), len(data), hashlib.sha256(data).hexdigest())


def test_files_arrive_as_they_are(links: Links, store: Store, tmp_path: Path) -> None:
    files = {"files/a.txt": b"a", "files/deep/er/b": b"", "files/ü ö+%20.bin": BIG, "sample.json": b"{}"}
    quoted = [
        Wanted(path, links.url(f"o{number}"), len(data), hashlib.sha256(data).hexdigest())
        for number, (path, data) in enumerate(files.items())
    ]
    links.objects = {f"o{number}": data for number, data in enumerate(files.values())}
    store.download(quoted, tmp_path, 3)
    assert {path: (tmp_path / path).read_bytes() for path in files} == files
    assert len(links.asked) == len(files)


def test_a_broken_connection_goes_on_where_it_was(links: Links, store: Store, tmp_path: Path) -> None:
    links.faults["big"] = [str(2 << 20), str(1 << 20), 503, "0"]
    store.download([wanted(links, "big", BIG)], tmp_path, 1)
    assert (tmp_path / "big").read_bytes() == BIG
    starts = links.ranges_of("big")
    assert starts[0] == ""
    assert starts[1:] == [f"bytes={2 << 20}-", *[f"bytes={3 << 20}-"] * 3]


def test_a_server_without_ranges_is_read_again_from_the_start(links: Links, store: Store, tmp_path: Path) -> None:
    links.ranges = False
    links.faults["big"] = [str(2 << 20), str(3 << 20)]
    store.download([wanted(links, "big", BIG)], tmp_path, 1)
    assert (tmp_path / "big").read_bytes() == BIG


def test_a_file_that_changes_under_way_is_fetched_anew(links: Links, store: Store, tmp_path: Path) -> None:
    links.objects["big"] = os.urandom(len(BIG))
    one = wanted(links, "big", BIG)

    def change(method: str, path: str) -> None:
        if len(links.asked) > 1:
            links.objects["big"] = BIG

    links.on_request = change
    links.faults["big"] = [str(1 << 20)]
    store.download([one], tmp_path, 1)
    assert (tmp_path / "big").read_bytes() == BIG


def test_one_wrong_copy_is_fetched_again(links: Links, store: Store, tmp_path: Path) -> None:
    links.faults["a"] = [b"wrong"]
    store.download([wanted(links, "a", b"right")], tmp_path, 1)
    assert (tmp_path / "a").read_bytes() == b"right"


@pytest.mark.parametrize("stored", [b"wrong", b"shor", b"longer than it was"])
def test_damage_in_the_store_ends_the_build(links: Links, store: Store, tmp_path: Path, stored: bytes) -> None:
    links.objects["files/a"] = stored
    with pytest.raises(InfrastructureError, match="files/a") as caught:
        store.download([wanted(links, "files/a", b"right")], tmp_path, 1)
    assert caught.value.code == "digest_mismatch"
    assert caught.value.hint
    assert len(links.asked) == 2


def test_a_file_that_never_ends_is_not_kept(links: Links, store: Store, tmp_path: Path) -> None:
    one = Wanted("a", links.url("a"), 10, "0" * 64)
    links.objects["a"] = bytes(8 << 20)
    with pytest.raises(InfrastructureError, match="the manifest says 10"):
        store.download([one], tmp_path, 1)
    assert (tmp_path / "a").stat().st_size <= 1 << 20


@pytest.mark.parametrize(
    ("status", "code"), [(403, "store_refused"), (404, "model_missing"), (400, "store_failed"), (302, "store_failed")]
)
def test_a_refusal_is_told_without_the_links_secret(
    links: Links, store: Store, tmp_path: Path, status: int, code: str
) -> None:
    links.faults["a"] = [status]
    with pytest.raises(InfrastructureError) as caught:
        store.download([wanted(links, "a", b"x")], tmp_path, 1)
    assert caught.value.code == code
    assert "/a" in caught.value.detail
    assert "secret" not in caught.value.detail + (caught.value.hint or "")


def test_a_store_that_stays_away_is_named(links: Links, store: Store, tmp_path: Path) -> None:
    links.faults["a"] = [503] * ATTEMPTS
    with pytest.raises(InfrastructureError, match="503") as caught:
        store.download([wanted(links, "a", b"x")], tmp_path, 1)
    assert caught.value.code == "store_unreachable"
    assert len(links.asked) == ATTEMPTS


def test_several_files_are_on_their_way_at_once(links: Links, store: Store, tmp_path: Path) -> None:
    links.gate = threading.Barrier(3)  # each request is answered only when three are there
    store.download([wanted(links, f"f{number}", b"x") for number in range(6)], tmp_path, 3)
    assert len(links.asked) == 6


@pytest.mark.parametrize("at_once", [1, 3])
def test_one_failure_ends_the_others_and_is_the_one_that_is_told(
    links: Links, store: Store, tmp_path: Path, at_once: int
) -> None:
    links.faults["bad"] = [404]
    if at_once > 1:  # the others are in their first bytes when it comes
        links.faults |= {f"f{number}": ["1000"] * ATTEMPTS for number in range(50)}
    files = [wanted(links, "bad", BIG), *(wanted(links, f"f{number}", BIG[:-1]) for number in range(50))]
    with pytest.raises(InfrastructureError, match="/bad is not there"):
        store.download(files, tmp_path, at_once)
    assert len({path for _, path, _ in links.asked}) < (2 if at_once == 1 else 51)


def test_files_of_this_machine_only_where_they_are_meant(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"x")
    one = Wanted("a", secret.as_uri(), 1, hashlib.sha256(b"x").hexdigest())
    with Store() as store, pytest.raises(InfrastructureError, match="no http link"):
        store.download([one], tmp_path / "to", 1)
    with Store(local=True) as store:
        store.download([one], tmp_path / "to", 1)
    assert (tmp_path / "to" / "a").read_bytes() == b"x"


def test_a_result_is_put_though_the_store_stumbles(links: Links, store: Store) -> None:
    links.faults["result.json"] = [503, 500]
    store.write(links.url("result.json"), b"{}")
    assert links.objects["result.json"] == b"{}"
    links.faults["result.json"] = [403]
    with pytest.raises(InfrastructureError) as caught:
        store.write(links.url("result.json"), b"{}")
    assert caught.value.code == "store_refused"


def test_a_proxy_of_the_environment_is_used(
    links: Links, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{links.port}")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{links.port}")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    with pytest.raises(InfrastructureError):
        store.read("http://store.invalid/object?secret=1", 100)
    assert links.asked[0][1].startswith("ttp://store.invalid/object")  # the whole URL: asked as one asks a proxy
