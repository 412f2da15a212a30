"""Image search: finds what looks alike, says what is wrong, and grows without a change of its network."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient
from usearch.index import Index

from bentos.image_search import catalogue, data, index
from bentos.image_search import train as training
from bentos.image_search.catalogue import INDEX, NAMES, NETWORK, CatalogueError
from bentos.image_search.learning import Recipe
from bentos.image_search.searching import Search, png
from bentos.serving import ModelFolder, StartError, write_model
from bentos.serving.model import canonical_json
from bentos.training.cifar10 import Cifar10, Split
from bentos.training.outcome import Outcome, Progress
from registry.errors import UserError
from registry.formats import choose_kind, recognise
from registry.kinds import Kinds

QUIET = Progress.start(quiet=True)
SMALL = training.Settings.small()
KINDS = Path(__file__).resolve().parents[2] / "bentos"
Vectors = Mapping[str, catalogue.Vectors]


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    return training.train(SMALL, QUIET)[0]


@pytest.fixture(scope="module")
def model(outcome: Outcome, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return outcome.write(tmp_path_factory.mktemp("image_search") / "model")


@pytest.fixture(scope="module")
def search(model: ModelFolder) -> Search:
    return Search.load(model)


@pytest.fixture(scope="module")
def world() -> data.World:
    return SMALL.world(QUIET)


@pytest.fixture(scope="module")
def client(model: ModelFolder) -> Iterator[TestClient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EKIBEN_MODEL_DIR", str(model.root))
        from bentos.image_search.service import ImageSearch

        # Prometheus' registry is one per process, and takes each of BentoML's metrics once
        patch.setitem(ImageSearch.config, "metrics", {"enabled": False})
        with TestClient(ImageSearch.to_asgi(), raise_server_exceptions=False) as client:
            yield client


def vectors_of(count: int, dimension: int = 8, seed: int = 0) -> Vectors:
    """Random vectors of length 1."""
    made = np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    return {f"p{number}": vector for number, vector in enumerate(made)}


def built(vectors: Vectors) -> catalogue.Catalogue:
    return catalogue.build(vectors, "0" * 64, b"", lambda _: None)


# --- quality ----------------------------------------------------------------------------------------------------------


def test_what_is_found_is_of_the_same_class_far_more_often_than_by_pixels_or_chance(outcome: Outcome) -> None:
    found = outcome.metrics
    assert found["precision_10"] > 0.8
    assert found["precision_10"] > found["precision_10_raw_pixels"] + 0.5
    assert found["precision_10_raw_pixels"] > found["precision_10_random"]
    assert found["precision_10_random"] == pytest.approx(1 / 6, abs=0.02)
    assert found["recall_10"] > 0.99
    assert min(found[f"precision_10_{shape}"] for shape in data.SHAPES) > 0.6


def test_the_figures_are_those_of_a_plain_computation(model: ModelFolder, world: data.World, outcome: Outcome) -> None:
    """Exact search by NumPy with Keras' own prediction, without the index and the compiled function."""
    import keras

    network = keras.saving.load_model(model.path(NETWORK), compile=False)
    known = np.asarray(network(world.catalogue.pixels))
    asked = np.asarray(network(world.held_out.pixels))
    nearest = np.argsort(-(asked @ known.T), axis=1)[:, :10]
    precision = (world.catalogue.labels[nearest] == world.held_out.labels[:, None]).mean()
    assert outcome.metrics["precision_10"] == pytest.approx(precision, abs=0.002)
    pixels = [part.pixels.reshape(len(part), -1).astype(float) for part in (world.held_out, world.catalogue)]
    distances = ((pixels[0][:40, None] - pixels[1][None]) ** 2).sum(axis=2)
    nearest = np.sort(np.argsort(distances, axis=1)[:, :10], axis=1)
    assert (np.sort(training._nearest_pixels(world)[:40], axis=1) == nearest).all()


def test_a_saved_model_has_the_metrics_that_its_training_logged(model: ModelFolder, outcome: Outcome) -> None:
    assert training.evaluate(model, SMALL) == outcome.metrics


def test_the_same_seed_gives_the_same_bytes() -> None:
    recipe = Recipe(widths=(4, 8, 8, 8), dimension=8, epochs=1, batch=32, rate=0.1)
    few = training.Settings("drawn", train=128, catalogue=64, held_out=60, seed=3, recipe=recipe)
    first, second = (training.train(few, QUIET)[0] for _ in range(2))
    assert first.files == second.files
    assert (first.sample, first.expected) == (second.sample, second.expected)
    assert training.train(replace(few, seed=4), QUIET)[0].files[NETWORK] != first.files[NETWORK]


def test_no_picture_is_in_two_parts_of_the_data(world: data.World) -> None:
    parts = (world.train, world.catalogue, world.held_out)
    assert [len(part) for part in parts] == [1200, 600, 300]
    assert len({picture.tobytes() for part in parts for picture in part.pixels}) == 2100
    assert len({name for part in parts for name in part.ids}) == 2100


def test_the_catalogue_of_cifar10_is_none_of_what_is_learnt_from() -> None:
    """In the order of the data: the first to learn from, the last as catalogue, test pictures to search with."""

    def split(count: int, start: int) -> Split:
        numbers = np.arange(start, start + count, dtype=np.uint8)
        return Split(np.broadcast_to(numbers[:, None, None, None], (count, 32, 32, 3)), numbers % 10)

    whole = Cifar10(split(50, 0), split(20, 100))
    found = data.of_cifar10(whole, 30, 15, 20)
    assert found.train.pixels[:, 0, 0, 0].tolist() == list(range(30))
    assert found.catalogue.pixels[:, 0, 0, 0].tolist() == list(range(35, 50))
    assert found.held_out.pixels[:, 0, 0, 0].tolist() == list(range(100, 120))
    assert found.catalogue.ids[0] == "cifar10-train-00035"
    assert found.catalogue.labels.tolist() == [number % 10 for number in range(35, 50)]
    with pytest.raises(ValueError, match="has not"):
        data.of_cifar10(whole, 40, 11, 20)


# --- the service ------------------------------------------------------------------------------------------------------


def test_the_golden_sample_matches(client: TestClient, outcome: Outcome) -> None:
    assert client.post("/predict", json=outcome.sample).json() == outcome.expected
    test = client.get("/predict/test").json()
    assert test["verified"] == "expected"
    assert test["rows"] == test["matched"] == len(outcome.expected["similar"])


def test_distances_are_cosine_distances_nearest_first(
    client: TestClient, model: ModelFolder, world: data.World
) -> None:
    import keras

    network = keras.saving.load_model(model.path(NETWORK), compile=False)
    asked = np.asarray(network(world.held_out.pixels[:1]))[0]
    known = dict(zip(world.catalogue.ids, np.asarray(network(world.catalogue.pixels)), strict=True))
    answer = _ask(client, png(world.held_out.pixels[0]), k=100)
    assert len(answer) == 100
    distances = [each["distance"] for each in answer]
    assert distances == sorted(distances)
    assert distances == pytest.approx([1 - float(known[each["id"]] @ asked) for each in answer], abs=1e-5)
    assert distances[-1] <= sorted(1 - np.stack(list(known.values())) @ asked)[99] + 0.01


def test_a_picture_may_come_in_three_ways_and_each_takes_k(client: TestClient, world: data.World) -> None:
    picture = png(world.held_out.pixels[5])
    answers = [
        client.post("/predict", json={"picture": base64.b64encode(picture).decode(), "k": 3}),
        client.post("/predict", files={"picture": ("a.png", picture)}, data={"k": "3"}),
        client.post("/predict?k=3", content=picture, headers={"content-type": "image/png"}),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert len({answer.text for answer in answers}) == 1
    assert len(answers[0].json()["similar"]) == 3
    assert len(client.post("/predict", files={"picture": ("a.png", picture)}).json()["similar"]) == 10


def test_a_photograph_of_another_size_and_format_finds_its_like(client: TestClient, world: data.World) -> None:
    """A held-out picture, four times as large, as JPEG and lying on its side by EXIF."""
    hits = 0
    for picture, label in zip(world.held_out.pixels[:10], world.held_out.labels[:10], strict=True):
        image = Image.fromarray(picture).resize((128, 128)).transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[0x0112] = 6
        target = io.BytesIO()
        image.save(target, "jpeg", exif=exif, quality=90)
        answer = _ask(client, target.getvalue(), k=1)
        hits += answer[0]["id"].startswith(data.SHAPES[label])
    assert hits >= 8


def test_a_picture_of_the_catalogue_finds_itself_and_its_id_leaves_itself_out(
    client: TestClient, search: Search, world: data.World
) -> None:
    name = world.catalogue.ids[17]
    by_picture = _ask(client, png(world.catalogue.pixels[17]), k=6)
    assert by_picture[0]["id"] == name
    assert by_picture[0]["distance"] == pytest.approx(0, abs=1e-6)
    by_id = client.post("/predict", json={"id": name, "k": 5}).json()["similar"]
    assert [each["id"] for each in by_id] == [each["id"] for each in by_picture[1:]]
    assert len(client.post("/predict", json={"id": name}).json()["similar"]) == 10


@pytest.mark.parametrize(
    ("body", "status", "code", "field"),
    [
        ({}, 422, "missing_field", "picture"),
        ({"k": 3}, 422, "missing_field", "picture"),
        ({"id": None, "picture": None}, 422, "missing_field", "picture"),
        ({"id": "nobody"}, 422, "unknown_id", "id"),
        ({"id": "猫🐈"}, 422, "unknown_id", "id"),
        ({"id": ""}, 422, "invalid_field", "id"),
        ({"id": 7}, 422, "invalid_field", "id"),
        ({"id": ["KNOWN"]}, 422, "invalid_field", "id"),
        ({"id": "x" * 201}, 422, "invalid_field", "id"),
        ({"id": "\ud800"}, 422, "invalid_field", "id"),
        ({"id": "KNOWN", "picture": "AAAA"}, 422, "invalid_field", "id"),
        ({"id": "KNOWN", "k": 0}, 422, "invalid_field", "k"),
        ({"id": "KNOWN", "k": 101}, 422, "invalid_field", "k"),
        ({"id": "KNOWN", "k": -1}, 422, "invalid_field", "k"),
        ({"id": "KNOWN", "k": 2.5}, 422, "invalid_field", "k"),
        ({"id": "KNOWN", "k": True}, 422, "invalid_field", "k"),
        ({"id": "KNOWN", "k": None}, 422, "invalid_field", "k"),
        ({"id": "KNOWN", "k": "ten"}, 422, "invalid_field", "k"),
        ({"id": "KNOWN", "count": 3}, 422, "unknown_field", "count"),
        ({"picture": "not base64!"}, 422, "invalid_base64", "picture"),
        ({"picture": 3}, 422, "invalid_field", "picture"),
        ({"picture": base64.b64encode(b"GIF89a....").decode()}, 422, "unsupported_picture", "picture"),
        ({"picture": base64.b64encode(b"%PNG").decode()}, 422, "not_a_picture", "picture"),
    ],
)
def test_bad_requests_name_the_field(
    client: TestClient, world: data.World, body: dict[str, Any], status: int, code: str, field: str
) -> None:
    text = json.dumps(body).replace("KNOWN", world.catalogue.ids[0])
    answer = client.post("/predict", content=text, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["code"], answer.json()["field"]) == (status, code, field)
    assert answer.json()["hint"]


def test_a_picture_that_is_cut_off_is_refused(client: TestClient, world: data.World) -> None:
    answer = client.post("/predict", files={"picture": png(world.held_out.pixels[0])[:-200]})
    assert (answer.status_code, answer.json()["code"], answer.json()["field"]) == (422, "truncated_picture", "picture")


def test_the_metadata_say_what_a_distance_is(client: TestClient, search: Search) -> None:
    said = client.get("/metadata").json()
    assert said["kind"] == "image_search"
    assert said["details"]["distance"] == "cosine"
    assert said["details"]["pictures"] == 600
    assert said["details"]["network_sha256"] == search.catalogue.network
    assert "osine distance" in json.dumps(said["output"])
    assert client.get("/label").status_code == 404


# --- the catalogue ----------------------------------------------------------------------------------------------------


def test_a_catalogue_comes_back_as_it_was_written() -> None:
    made = built(vectors_of(50))
    files = made.files()
    back = catalogue.load(files[NAMES], files[INDEX], "0" * 64)
    assert back.ids == made.ids
    assert (back.vectors() == made.vectors()).all()
    assert back.files() == files
    asked = vectors_of(1, seed=9)["p0"]
    assert back.near(asked, 5) == made.near(asked, 5)


@settings(max_examples=15, deadline=None)
@given(st.permutations(list(range(12))))
def test_the_same_pictures_give_the_same_files_in_any_order(order: list[int]) -> None:
    vectors = list(vectors_of(12).items())
    assert built(dict(vectors[i] for i in order)).files() == built(dict(vectors)).files()


@pytest.mark.parametrize("count", [640, 1152])
def test_an_index_of_any_size_is_taken_for_what_it_is(count: int) -> None:
    """usearch starts a file with the number of vectors; 640 and 1152 read as the first bytes of a pickle."""
    made = built(vectors_of(count, 4))
    with pytest.raises(UserError) as refused:
        _recognised({"a.usearch": bytes(made.index.save(None))})
    assert refused.value.code == "pickle_refused"
    with pytest.raises(UserError) as unknown:
        _recognised({"a.usearch": made.files()[INDEX]})
    assert unknown.value.code == "unknown_format"  # a file that may lie beside a model


def test_the_upload_is_recognised_as_a_network_with_files_beside_it(outcome: Outcome) -> None:
    found = _recognised(outcome.files)
    assert (found.format, found.path) == ("keras-v3", NETWORK)
    assert choose_kind(found, Kinds.load(KINDS), "image_search") == "image_search"


def test_recall_is_what_a_comparison_one_by_one_gives() -> None:
    """Of an index whose searches are too short to be good."""
    vectors = np.stack(list(vectors_of(2000, 24).values()))
    poor = Index(ndim=24, metric="cos", dtype="f32", connectivity=3, expansion_add=4, expansion_search=1)
    poor.add(np.arange(2000), vectors, threads=1)
    asked = np.stack(list(vectors_of(100, 24, seed=5).values()))
    found = 0
    for query in asked:
        true = set(np.argsort(1 - vectors @ query)[:10].tolist())
        found += len(true & set(poor.search(query, 10, threads=1).keys.tolist()))
    assert 0.05 < found / 1000 < 0.95
    assert catalogue.recall(poor, vectors, asked) == pytest.approx(found / 1000)


def test_the_search_is_made_longer_until_it_finds_enough() -> None:
    """Random directions in 48 dimensions are the hardest to search in."""
    lines: list[str] = []
    made = catalogue.build(vectors_of(3000, 48), "0" * 64, b"", lines.append)
    assert made.index.expansion_search > catalogue.EXPANSIONS[0]
    assert made.recall >= catalogue.LEAST_RECALL
    assert len(lines) > 1
    files = made.files()
    assert catalogue.load(files[NAMES], files[INDEX], "0" * 64).index.expansion_search == made.index.expansion_search


def test_pictures_that_are_all_the_same_are_no_fault_of_the_index() -> None:
    one = vectors_of(1)["p0"]
    made = built({f"copy{number}": one for number in range(300)})
    assert made.recall == 1
    assert [match.distance for match in made.near(one, 5)] == pytest.approx([0] * 5, abs=1e-6)
    assert all(match.distance >= 0 for match in made.near(one, 100))


@pytest.mark.parametrize(
    ("vectors", "said"),
    [
        ({"a": np.ones(4, np.float32) / 2}, "at least two"),
        ({"a": np.ones(4, np.float32) / 2, "": np.ones(4, np.float32) / 2}, "the id ''"),
        ({"a": np.ones(4, np.float32) / 2, "b": np.ones(4, np.float32)}, "length 1"),
        ({"a": np.ones(4, np.float32) / 2, "b": np.full(4, math.nan, np.float32)}, "length 1"),
    ],
)
def test_what_makes_no_catalogue_is_refused(vectors: Vectors, said: str) -> None:
    with pytest.raises(CatalogueError, match=said):
        built(vectors)


def changed(names: bytes, **changes: Any) -> bytes:
    return canonical_json(json.loads(names) | changes)


def test_files_that_do_not_belong_together_are_refused_when_loaded() -> None:
    files = built(vectors_of(20)).files()
    other = built(vectors_of(20, seed=1)).files()
    names, body = files[NAMES], files[INDEX]
    ids = json.loads(names)["ids"]

    def with_index(data: bytes, **more: Any) -> tuple[bytes, bytes]:
        return changed(names, index_sha256=catalogue.digest(data), **more), data

    l2 = Index(ndim=8, metric="l2sq", dtype="f32")
    l2.add(np.arange(20), np.stack(list(vectors_of(20).values())))
    shifted = Index(ndim=8, metric="cos", dtype="f32")
    shifted.add(np.arange(1, 21), np.stack(list(vectors_of(20).values())))
    wrong: dict[str, tuple[bytes, bytes]] = {
        "not the one that": (names, other[INDEX]),
        "does not start with": (names, body[len(catalogue.HEAD) :]),
        "cannot be read by usearch": with_index(body[:-40]),
        "number of vectors is 20, not 19": (changed(names, ids=ids[:19], count=19), body),
        "dimension is 8, not 16": (changed(names, dimension=16), body),
        "metric is L2sq, not Cos": with_index(catalogue.HEAD + bytes(l2.save(None))),
        "keys are not the positions": with_index(catalogue.HEAD + bytes(shifted.save(None))),
        "an id twice": (changed(names, ids=[*ids[:19], ids[0]]), body),
        "is not a list": (changed(names, ids="many"), body),
        "the id '5'": (changed(names, ids=[*ids[:19], 5]), body),
        "the metric is 'l2'": (changed(names, metric="l2"), body),
        "expansion_search is not": (changed(names, expansion_search=-3), body),
        "has not the schema": (b"{}", body),
        "is not JSON": (b"{", body),
        "sample is not": (changed(names, sample="?"), body),
    }
    for said, (given_names, given_index) in wrong.items():
        with pytest.raises(StartError) as refused:
            catalogue.load(given_names, given_index, "0" * 64)
        assert said in refused.value.message
        assert refused.value.code == "model_load_failed"
        assert refused.value.hint
    with pytest.raises(StartError, match="another network"):
        catalogue.load(names, body, "1" * 64)


def test_a_version_with_another_network_does_not_start(model: ModelFolder, tmp_path: Path) -> None:
    files: dict[str, Path | bytes] = {name: model.path(name) for name in model.files}
    files[NETWORK] = model.path(NETWORK).read_bytes() + b"\0"
    with pytest.raises(StartError, match="another network"):
        Search.load(write_model(tmp_path / "a", kind="image_search", format="keras-v3", files=files))
    del files[INDEX]
    with pytest.raises(StartError, match=f"no {INDEX}"):
        Search.load(write_model(tmp_path / "b", kind="image_search", format="keras-v3", files=files))


# --- the job ----------------------------------------------------------------------------------------------------------


def run(model: ModelFolder, out: Path, *arguments: str) -> ModelFolder:
    common = ["--model", str(model.root), "--out", str(out), "--no-mlflow", "--quiet"]
    assert index.main([*common, *arguments]) == 0
    folder = ModelFolder.read(out)
    folder.verify()
    return folder


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with six new pictures, in folders, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("fresh")
    pixels, _ = data.draw(np.random.default_rng(99), 6)
    for number, picture in enumerate(pixels):
        path = folder / f"day{number % 2}" / f"new-{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(picture))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_new_pictures_are_found_and_the_network_is_the_same_file(
    model: ModelFolder, search: Search, fresh: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = search.catalogue.ids[3]
    folder = run(model, tmp_path / "grown", "--add", str(fresh), "--remove", gone, "--remove", "never-was")
    printed = capsys.readouterr()
    assert "broken.jpg" in printed.err
    for line in ("added                                    6", "left out, cannot be read                 1"):
        assert line.split() == next(x.split() for x in printed.out.splitlines() if x.startswith(line.split("  ")[0]))
    assert folder.path(NETWORK).read_bytes() == model.path(NETWORK).read_bytes()
    grown = Search.load(folder)
    assert len(grown.catalogue.ids) == 605
    assert gone not in grown.catalogue.positions
    for number in range(6):
        name = f"day{number % 2}/new-{number}"
        (vector,) = grown.network.run(grown.pixels((fresh / f"{name}.png").read_bytes()))
        assert grown.of_picture(vector, 1)[0].id == name
    assert grown.golden() == (folder.sample(), folder.expected())
    assert index.evaluate(folder)["recall_10"] >= catalogue.LEAST_RECALL
    assert training.evaluate(folder, SMALL)["precision_10"] > 0.8  # pictures of no known class do not count


def test_a_run_that_changes_nothing_gives_the_same_version(model: ModelFolder, fresh: Path, tmp_path: Path) -> None:
    first = run(model, tmp_path / "first", "--add", str(fresh))
    assert run(first, tmp_path / "again", "--add", str(fresh)).digest == first.digest
    assert run(first, tmp_path / "new", "--add", str(fresh), "--new-only").digest == first.digest
    names = [f"day{number % 2}/new-{number}" for number in range(6)]
    (tmp_path / "gone.txt").write_text("\n".join(names) + "\n\n")
    assert run(first, tmp_path / "back", "--remove-list", str(tmp_path / "gone.txt")).digest == model.digest


def test_a_list_names_ids_and_a_picture_is_replaced(
    model: ModelFolder, search: Search, fresh: Path, tmp_path: Path
) -> None:
    name = search.catalogue.ids[0]
    with (tmp_path / "list.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["id", "path"], [name, "here.png"]])
    shutil.copy(fresh / "day0" / "new-0.png", tmp_path / "here.png")
    folder = run(model, tmp_path / "out", "--add", str(tmp_path / "list.csv"))
    made = Search.load(folder)
    assert made.catalogue.ids == search.catalogue.ids
    (vector,) = made.network.run(made.pixels((tmp_path / "here.png").read_bytes()))
    assert made.of_picture(vector, 1)[0].id == name
    assert search.of_picture(vector, 1)[0].distance > 1e-4


def test_added_at_once_or_one_after_the_other_is_the_same_catalogue(search: Search) -> None:
    new = vectors_of(5, search.catalogue.dimension)
    all_at_once, changes = index.rebuilt(search, new, ["p9"], QUIET)
    assert (changes.added, changes.absent) == (5, 1)
    step = search
    for name in reversed(new):
        step, _ = index.rebuilt(step, {name: new[name]}, [], QUIET)
    assert step.catalogue.files() == all_at_once.catalogue.files()


def test_what_the_job_cannot_do_it_says(
    model: ModelFolder, fresh: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.csv").write_text("name,file\na,b\n")
    (tmp_path / "broken").mkdir()
    shutil.copy(fresh / "broken.jpg", tmp_path / "broken")
    (tmp_path / "ids.txt").write_text("\n".join(Search.load(model).catalogue.ids[1:]))
    twice = ["--add", str(fresh), "--add", str(fresh)]
    for said, arguments in (
        ("columns id and path", ["--add", str(tmp_path / "list.csv")]),
        ("cannot be read", ["--add", str(tmp_path / "nothing.csv")]),
        ("none of the 1 pictures", ["--add", str(tmp_path / "broken")]),
        ("is there twice", twice),
        ("both added and taken out", ["--add", str(fresh), "--remove", "day0/new-0"]),
        ("at least two pictures", ["--remove-list", str(tmp_path / "ids.txt")]),
    ):
        out = tmp_path / "out"
        assert index.main(["--model", str(model.root), "--out", str(out), "--no-mlflow", "--quiet", *arguments]) == 2
        assert said in capsys.readouterr().err
        assert not out.exists()
    assert index.main(["--model", str(tmp_path / "no"), "--out", str(tmp_path / "out"), "--no-mlflow"]) == 2


def test_an_index_that_finds_too_little_is_not_written(
    model: ModelFolder, fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(catalogue, "LEAST_RECALL", 1.01)
    out = tmp_path / "out"
    assert index.main(["--model", str(model.root), "--out", str(out), "--no-mlflow", "--add", str(fresh)]) == 2
    assert "of the true 10 nearest" in capsys.readouterr().err
    assert not out.exists()


def _ask(client: TestClient, picture: bytes, k: int) -> list[dict[str, Any]]:
    answer = client.post("/predict", json={"picture": base64.b64encode(picture).decode(), "k": k})
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["similar"]
    return found


def _recognised(files: Mapping[str, bytes | Path]) -> Any:
    held = {name: data if isinstance(data, bytes) else data.read_bytes() for name, data in files.items()}
    return recognise({name: len(data) for name, data in held.items()}, lambda name: io.BytesIO(held[name]))
