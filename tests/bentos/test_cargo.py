"""Cargo as it is trained and served: what it learns, which pictures it reads, and which it never opens."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from bentos.cargo import data, store, textures
from bentos.cargo import train as training
from bentos.serving import ModelFolder, Problem, StartError, pictures, write_model
from bentos.training.outcome import Outcome, Progress

SETTINGS = training.Settings.small()
QUIET = Progress.start(quiet=True)


@pytest.fixture(scope="module")
def trained() -> tuple[Outcome, str]:
    return training.train(SETTINGS, QUIET)


@pytest.fixture(scope="module")
def outcome(trained: tuple[Outcome, str]) -> Outcome:
    return trained[0]


@pytest.fixture(scope="module")
def model(outcome: Outcome, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return outcome.write(tmp_path_factory.mktemp("cargo") / "model")


@pytest.fixture(scope="module")
def picture() -> bytes:
    return data.png(textures.draw(1, np.random.default_rng(3)))


@pytest.fixture
def shelf(tmp_path: Path, picture: bytes) -> store.Store:
    """A store with hostile things in it and beside it."""
    folder = tmp_path / "pictures"
    (folder / "monday" / "brick").mkdir(parents=True)
    (folder / "monday" / "brick" / "1.png").write_bytes(picture)
    (folder / "monday" / "Säge 1.png").write_bytes(picture)
    (folder / ".hidden.png").write_bytes(picture)
    (folder / "monday" / "notes.txt").write_text("no picture")
    (tmp_path / "secret.png").write_bytes(picture)
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "1.png").write_bytes(picture)
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "relative.png").symlink_to("../secret.png")
    (folder / "inside.png").symlink_to("monday/brick/1.png")
    (folder / "nowhere.png").symlink_to("gone.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "linked").symlink_to(tmp_path / "secrets")
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as named:
        here = os.getcwd()
        os.chdir(folder)  # the path of a socket has at most 107 bytes
        try:
            named.bind("socket.png")
        finally:
            os.chdir(here)
    return store.Store(folder, "operator")


def refused(shelf: store.Store, path: Any) -> Problem:
    with pytest.raises(Problem) as raised:
        shelf.read(path)
    assert raised.value.field == "image_path"
    assert raised.value.hint
    assert 400 <= raised.value.status < 500
    return raised.value


def test_a_picture_in_the_store_is_read(shelf: store.Store, picture: bytes) -> None:
    assert shelf.read("monday/brick/1.png") == picture
    assert shelf.read("monday/Säge 1.png") == picture


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "..",
        "../secret.png",
        "monday/../../secret.png",
        "monday/../monday/brick/1.png",
        "./monday/brick/1.png",
        "monday//brick/1.png",
        "monday/brick/1.png/",
        "/etc/passwd",
        "//etc/passwd",
        "~/secret.png",
        "..\\secret.png",
        "C:\\secret.png",
        "file:///etc/passwd",
        "http://127.0.0.1/1.png",
        "https:1.png",
        "data:image/png;base64,AAAA",
        ".hidden.png",
        "monday/brick/1.png\0.txt",
        "monday/brick/1.png\n",
        "monday/\ud800.png",
        "a" * 1025,
        "out.png",
        "relative.png",
        "inside.png",
        "nowhere.png",
        "loop.png",
        "linked/1.png",
        None,
        7,
        True,
        ["monday/brick/1.png"],
        b"monday/brick/1.png",
    ],
)
def test_what_is_no_plain_path_in_the_store_is_refused(shelf: store.Store, path: Any) -> None:
    assert refused(shelf, path).code == "bad_image_path"


def test_what_is_not_there_is_404(shelf: store.Store) -> None:
    for path in ("gone.png", "gone/1.png", "monday/brick/1.png/x.png", "b" * 300, "linkedx"):
        found = refused(shelf, path)
        assert (found.code, found.status) == ("no_such_picture", 404), path


def test_what_is_no_file_is_refused_at_once(shelf: store.Store) -> None:
    """A pipe would be waited for; a folder has no bytes."""
    for path in ("pipe.png", "socket.png", "monday", "monday/brick"):
        assert refused(shelf, path).code == "unreadable_picture", path


def test_a_file_that_is_too_large_is_refused_without_reading_it_whole(shelf: store.Store) -> None:
    assert shelf.folder is not None
    with (shelf.folder / "huge.png").open("wb") as stream:
        stream.truncate(1 << 40)  # a hole: to read it would take all memory
    assert refused(shelf, "huge.png").code == "picture_too_large"
    (shelf.folder / "largest.png").write_bytes(b"x" * pictures.MAX_BYTES)
    assert len(shelf.read("largest.png")) == pictures.MAX_BYTES


def test_a_folder_that_becomes_a_link_while_it_is_read_leads_nowhere(
    shelf: store.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check says what is wrong; the opening alone keeps the caller in the store."""
    monkeypatch.setattr(store, "_refuse_link", lambda folder, name, path: None)
    refused(shelf, "linked/1.png")
    monkeypatch.setattr(store.os, "stat", lambda *a, **k: os.lstat(shelf.folder / "monday" / "brick" / "1.png"))
    assert refused(shelf, "out.png").code == "bad_image_path"
    assert refused(shelf, "monday").code == "unreadable_picture"


def test_the_store_is_opened_anew_for_each_picture(shelf: store.Store, tmp_path: Path, picture: bytes) -> None:
    assert shelf.folder is not None
    shelf.folder.rename(tmp_path / "old")
    with pytest.raises(Problem) as gone:
        shelf.read("monday/brick/1.png")
    assert (gone.value.code, gone.value.status, gone.value.field) == ("picture_store_failed", 503, "image_path")
    shelf.folder.mkdir()
    (shelf.folder / "2.png").write_bytes(picture)
    assert shelf.read("2.png") == picture


def test_no_descriptor_is_left_open(shelf: store.Store) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for path in ("monday/brick/1.png", "gone/1.png", "linked/1.png", "monday/notes.txt/x", "monday"):
        with contextlib.suppress(Problem):
            shelf.read(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_operators_store_goes_before_the_versions_own(tmp_path: Path, picture: bytes) -> None:
    plain = write_model(tmp_path / "plain", kind="cargo", format=None, files={"a": b"1"})
    own = write_model(tmp_path / "own", kind="cargo", format=None, files={"a": b"1", "pictures/x/1.png": picture})
    (tmp_path / "named").mkdir()
    named = {"EKIBEN_FOLDER": str(tmp_path / "named")}
    assert store.find(named, own) == store.Store(tmp_path / "named", "operator")
    assert store.find({}, own).read("x/1.png") == picture
    assert store.find({}, plain).kind is None
    assert refused(store.find({}, plain), "x/1.png").code == "no_picture_store"
    assert refused(store.find({}, own), "../a").code == "bad_image_path"
    for wrong in (tmp_path / "gone", tmp_path / "own" / "manifest.json"):
        with pytest.raises(StartError, match="EKIBEN_FOLDER"):
            store.find({"EKIBEN_FOLDER": str(wrong)}, own)


def test_the_network_learns_more_than_the_most_frequent_material(outcome: Outcome) -> None:
    found = outcome.metrics
    assert found["accuracy_prior"] == pytest.approx(0.2)
    assert found["accuracy_monday_before"] > 0.5
    assert found["accuracy_tuesday"] > 0.4
    assert found["accuracy_tuesday_before"] < found["accuracy_monday_before"]


def test_the_table_and_the_plot_show_every_selection(trained: tuple[Outcome, str]) -> None:
    outcome, shown = trained
    for said in ("before retraining", "monday alone", "random", "conformal, l1", "conformal, l2", "conformal, cosine"):
        assert shown.count(said) >= 2, said
    for method in ("random", "l1", "l2", "cosine"):
        for budget in SETTINGS.budgets:
            assert 0 < outcome.metrics[f"accuracy_tuesday_{method}_{budget}"] <= 1
    with Image.open(io.BytesIO(outcome.plots["selections.png"])) as plot:
        assert plot.format == "PNG"
        assert min(plot.size) > 300


def test_the_same_seed_gives_the_same_bytes_from_pictures_that_are_drawn_or_read(tmp_path: Path) -> None:
    few = replace(SETTINGS, sizes=data.Sizes(40, 20, 20, 40, 20), steps=6, retrain_steps=3, budgets=(10,), rounds=(1,))
    data.write(data.make(few.sizes, few.seed), tmp_path)
    drawn, read = (training.train(each, QUIET)[0] for each in (few, replace(few, pictures=tmp_path)))
    assert dict(drawn.files) == dict(read.files)
    assert drawn.metrics == read.metrics
    assert drawn.expected == read.expected
    assert drawn.plots == read.plots
    assert drawn.dataset_digest == read.dataset_digest
    assert training.train(replace(few, seed=8), QUIET)[0].files["cargo.keras"] != drawn.files["cargo.keras"]


def test_a_saved_model_has_the_metrics_that_were_logged(outcome: Outcome, model: ModelFolder) -> None:
    found = training.evaluate(model, SETTINGS)
    assert set(found) >= {"accuracy_tuesday", "accuracy_monday", "accuracy_tuesday_mosaic"}
    assert found == {name: outcome.metrics[name] for name in found}


@pytest.fixture(scope="module")
def serving_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    data.write(data.Data({"tuesday-test": data.part("tuesday-test", 20, 7)}), folder)
    (folder / "out.png").symlink_to("/etc/hostname")
    return folder


@pytest.fixture(scope="module")
def client(model: ModelFolder, serving_store: Path) -> Iterator[TestClient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EKIBEN_MODEL_DIR", str(model.root))
        patch.setenv("EKIBEN_FOLDER", str(serving_store))
        from bentos.cargo.service import Cargo as Service

        # Prometheus' registry is one per process, and takes each of BentoML's metrics once
        patch.setitem(Service.config, "metrics", {"enabled": False})
        with TestClient(Service.to_asgi(), raise_server_exceptions=False) as client:
            yield client


def test_a_picture_has_the_same_answer_whichever_way_it_comes(client: TestClient, serving_store: Path) -> None:
    path = "tuesday/wood/test-00004.png"
    sent = (serving_store / path).read_bytes()
    answers = [
        client.post("/predict", json={"image_path": path}),
        client.post("/predict", json={"picture": base64.b64encode(sent).decode()}),
        client.post("/predict", files={"picture": ("wood.png", sent, "image/png")}),
        client.post("/predict", files={"image_path": (None, path)}),
        client.post("/predict", content=sent, headers={"content-type": "image/png"}),
    ]
    for answer in answers:
        assert answer.status_code == 200, answer.text
        assert answer.json() == answers[0].json()
    body = answers[0].json()
    assert list(body["probabilities"]) == list(textures.MATERIALS)
    assert sum(body["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert body["name"] == textures.MATERIALS[body["label"]]
    assert body["probabilities"][body["name"]] == max(body["probabilities"].values())


def test_the_service_answers_what_the_training_expected(client: TestClient, model: ModelFolder) -> None:
    answer = client.post("/predict", json=model.sample()).json()
    expected = model.expected()
    assert expected is not None
    assert answer["label"] == expected["label"]
    assert answer["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)


@pytest.mark.parametrize(
    ("body", "status", "code", "field"),
    [
        ({"image_path": "../x.png"}, 422, "bad_image_path", "image_path"),
        ({"image_path": "/etc/passwd"}, 422, "bad_image_path", "image_path"),
        ({"image_path": "http://localhost/x.png"}, 422, "bad_image_path", "image_path"),
        ({"image_path": "out.png"}, 422, "bad_image_path", "image_path"),
        ({"image_path": "monday/brick/test-00001.png"}, 404, "no_such_picture", "image_path"),
        ({"image_path": "tuesday-test.csv"}, 422, "not_a_picture", "image_path"),
        ({"image_path": None}, 422, "bad_image_path", "image_path"),
        ({"image_path": "\ud800"}, 422, "bad_image_path", "image_path"),
        ({"image_path": "a.png", "picture": "AAAA"}, 422, "several_pictures", "image_path"),
        ({"path": "a.png"}, 422, "unknown_field", "path"),
        ({"picture": "AAAA"}, 422, "not_a_picture", "picture"),
        ({"picture": 5}, 422, "invalid_field", "picture"),
        ({}, 422, "missing_field", "picture"),
        ([], 422, "invalid_field", "body"),
    ],
)
def test_what_is_wrong_is_named(client: TestClient, body: Any, status: int, code: str, field: str) -> None:
    answer = client.post("/predict", content=json.dumps(body), headers={"content-type": "application/json"})
    found = answer.json()
    assert (answer.status_code, found["code"], found["field"]) == (status, code, field)
    assert found["hint"]
    assert answer.headers["content-type"] == "application/problem+json"


def test_the_store_is_no_secret_and_the_materials_are_named(client: TestClient) -> None:
    said = client.get("/metadata").json()
    assert said["details"]["picture_store"] == "operator"
    assert said["classes"] == client.get("/label").json()["labels"] == list(textures.MATERIALS)


def test_a_version_without_its_parts_is_told(model: ModelFolder, tmp_path: Path) -> None:
    from bentos.cargo.classifier import Classifier

    network, about = (model.path(name).read_bytes() for name in ("cargo.keras", "model.json"))
    for number, (files, said) in enumerate(
        [
            ({"cargo.keras": network}, "holds cargo.keras and model.json"),
            ({"cargo.keras": network, "model.json": b"[]"}, "model.json cannot be read"),
            ({"cargo.keras": network, "model.json": b'{"materials": ["a", "b"]}'}, "names 2"),
            ({"cargo.keras": b"PK\3\4", "model.json": about}, "cannot be loaded by Keras"),
        ]
    ):
        folder = write_model(tmp_path / str(number), kind="cargo", format="keras-v3", files=files)
        with pytest.raises(StartError, match=said) as refused:
            Classifier.load(folder)
        assert refused.value.code == "model_load_failed"
        assert refused.value.hint
