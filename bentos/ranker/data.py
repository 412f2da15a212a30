"""A picture-sharing service, made up, with a relevance that is known: what a ranker should find is on this page.

*Pictures* show one animal in one setting, have five styles (cute, funny, wild, sleepy, majestic), a quality, an
orientation, an age and an author. Tags and measured scores show these with errors: 8 % of animals, 20 % of settings and
30 % of styles go untagged, and 4 % of the animals are tagged as another one. *Users* have a taste for each style; three
in ten are anonymous, so nothing is known about them. *Phrases* name an animal, often with a setting, a style or both.

*Relevance* (`utility`) of a picture for a search:

      3.2 · match                 share of what the phrase asks for that the picture really shows: animal 0.6,
                                  setting 0.25, style 0.15 × how much of it; divided by what the phrase asks
    + 0.5 · quality               standard normal
    + 1.8 · (affinity − ½) · b    taste of the user, weighted by the styles of the picture;
                                  b = 1.3 for a phrase of one word, which leaves room for taste, otherwise 0.8
    + 0.25 · (±1)                 on a phone: + portrait, − landscape; elsewhere nothing
    + 0.35 · exp(−age / 60 d)     freshness

cut into grades 0 … 4 at THRESHOLDS. Attractiveness = 0.05 + 0.7 · (2^grade − 1) / 15: even a poor picture gets a click
once in a while. People look at rank k with probability 1/k (`EXAMINATION`), and click what attracts them.

*What the service logs*: its present order is by likes and similarity. Likes come mostly from the author's followers, so
that order, and every click it earns, is biased. A first period of the log gives the examination and the debiased rate
of each picture; a second, later one gives the training clicks; the held-out searches use phrases seen in neither.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bentos.ranker import clicks
from bentos.ranker.features import Candidate, Search

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# fmt: off
ANIMALS = (
    "cat", "dog", "fox", "owl", "bear", "deer", "horse", "rabbit", "squirrel", "hedgehog", "lion", "tiger", "elephant",
    "giraffe", "penguin", "seal", "dolphin", "parrot", "eagle", "frog", "turtle", "lizard", "bee", "butterfly",
)
SETTINGS = ("snow", "beach", "forest", "night", "garden", "river", "city", "mountain")
STYLES = ("cute", "funny", "wild", "sleepy", "majestic")
# fmt: on
PLACES = 20
GRADES = 5
THRESHOLDS = (1.8, 2.6, 3.1, 3.65)  # about 45, 25, 15, 10 and 5 % of the candidates
EXAMINATION: Floats = 1.0 / np.arange(1, PLACES + 1)

# fmt: off
FEATURES = (
    "phrase_words", "match_words", "match_share", "affinity", "similarity", "aesthetic", "sharpness", "portrait",
    "age_days", "likes", "author_followers", "ctr_debiased", "impressions",
    *(f"style_{style}" for style in STYLES),
    "user_mobile", *(f"user_taste_{style}" for style in STYLES),
)
"""Names and order of the features in the model file."""
# fmt: on


@dataclass(frozen=True)
class Pictures:
    """`p` pictures: what is true of them (first block), and what is measured (second block)."""

    animal: Ints
    setting: Ints
    style: Floats  # (p, 5), 0 … 1
    quality: Floats
    portrait: Ints
    age_days: Floats

    tags: tuple[tuple[str, ...], ...]
    styles_measured: Floats
    aesthetic: Floats
    sharpness: Floats
    likes: Floats
    author_followers: Floats


@dataclass(frozen=True)
class Users:
    """`u` users: true taste (u, 5), what is known of it (NaN for anonymous ones), and whether they use a phone."""

    taste: Floats
    taste_known: Floats
    mobile: Ints


@dataclass(frozen=True)
class Searches:
    """`n` searches of PLACES candidates each. `phrase` is (n, 3): animal, setting or −1, style or −1."""

    phrase: Ints
    user: Ints
    pictures: Ints  # (n, PLACES)
    similarity: Floats  # (n, PLACES), measured by an image-and-text model
    utility: Floats  # (n, PLACES), true; what nobody gets to see
    grades: Ints  # (n, PLACES), 0 … 4, true

    @property
    def attractiveness(self) -> Floats:
        gain = (np.exp2(self.grades) - 1.0) / (2.0 ** (GRADES - 1) - 1.0)
        return np.asarray(0.05 + 0.7 * gain)


@dataclass(frozen=True)
class World:
    """All of it: the two periods of the log, and the held-out searches."""

    pictures: Pictures
    users: Users
    history: Searches
    history_log: clicks.Log
    train: Searches
    train_log: clicks.Log
    held_out: Searches
    digest: str


def make(queries: int, seed: int, *, swap_share: float = 0.2) -> World:
    """A world with `queries` training searches, ten times as many in the history, a quarter held out (at least 200)."""
    rng = np.random.default_rng(seed)
    pictures = _pictures(rng, max(600, min(6000, queries // 2)))
    users = _users(rng, max(200, queries // 8))
    phrases = _phrases(rng)
    known, unseen = phrases[len(phrases) // 4 :], phrases[: len(phrases) // 4]
    history = _searches(rng, pictures, users, known, queries * 10)
    train = _searches(rng, pictures, users, known, queries)
    held_out = _searches(rng, pictures, users, unseen, max(200, queries // 4))
    history_log = _log(rng, history, pictures, swap_share)
    train_log = _log(rng, train, pictures, 0.0)
    digest = hashlib.sha256()
    for array in (
        train.pictures,
        train.similarity,
        train.grades,
        train_log.shown,
        train_log.clicked,
        history_log.clicked,
    ):
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(held_out.grades.tobytes())
    return World(pictures, users, history, history_log, train, train_log, held_out, digest.hexdigest())


def as_searches(world: World, searches: Searches, rate: Floats, impressions: Ints) -> list[Search]:
    """The searches as requests: what a caller of the service would send."""
    pictures, users = world.pictures, world.users
    fixed = [
        {
            "aesthetic": round(float(pictures.aesthetic[i]), 3),
            "sharpness": round(float(pictures.sharpness[i]), 3),
            "portrait": float(pictures.portrait[i]),
            "age_days": round(float(pictures.age_days[i]), 1),
            "likes": float(pictures.likes[i]),
            "author_followers": float(pictures.author_followers[i]),
            "ctr_debiased": round(float(rate[i]), 5),
            "impressions": float(impressions[i]),
        }
        | {f"style_{style}": round(float(pictures.styles_measured[i, j]), 3) for j, style in enumerate(STYLES)}
        for i in range(len(pictures.animal))
    ]
    known = [_known_user(users, index) for index in range(len(users.mobile))]
    result = []
    for n in range(len(searches.user)):
        shown = [
            Candidate(
                id=f"p{picture:05d}",
                values=fixed[picture] | {"similarity": round(float(searches.similarity[n, place]), 4)},
                tags=pictures.tags[picture],
            )
            for place, picture in enumerate(searches.pictures[n].tolist())
        ]
        result.append(Search(phrase_text(searches.phrase[n]), shown, known[int(searches.user[n])]))
    return result


def phrase_text(phrase: Ints) -> str:
    """The words of a phrase, e.g. "cute cat in snow"."""
    animal, setting, style = (int(part) for part in phrase)
    text = ANIMALS[animal] if style < 0 else f"{STYLES[style]} {ANIMALS[animal]}"
    return text if setting < 0 else f"{text} in {SETTINGS[setting]}"


def popularity(world: World, searches: Searches) -> Floats:
    """Likes of every candidate, (n, PLACES): the order that a service starts with."""
    return world.pictures.likes[searches.pictures]


def _known_user(users: Users, index: int) -> dict[str, float | None]:
    if np.isnan(users.taste_known[index, 0]):
        return {"mobile": float(users.mobile[index])}
    taste = {f"taste_{style}": round(float(users.taste_known[index, j]), 3) for j, style in enumerate(STYLES)}
    return {"mobile": float(users.mobile[index]), **taste}


def _pictures(rng: np.random.Generator, count: int) -> Pictures:
    animal = rng.integers(0, len(ANIMALS), count)
    setting = rng.integers(0, len(SETTINGS), count)
    style = rng.beta(0.6, 1.2, (count, len(STYLES)))
    quality = rng.normal(size=count)
    age = rng.exponential(180.0, count)
    followers = np.floor(np.exp(rng.normal(5.0, 1.6, count)))
    likes = np.floor(
        np.exp(0.7 * np.log1p(followers) + 0.4 * np.log1p(age) + 0.3 * quality + rng.normal(-1, 0.6, count))
    )
    styles_measured = np.clip(style + rng.normal(0, 0.12, style.shape), 0, 1)
    return Pictures(
        animal=animal,
        setting=setting,
        style=style,
        quality=quality,
        portrait=(rng.random(count) < 0.4).astype(np.int64),
        age_days=age,
        tags=_tags(rng, animal, setting, style),
        styles_measured=styles_measured,
        aesthetic=np.clip(5.0 + 1.6 * quality + rng.normal(0, 1.0, count), 0, 10),
        sharpness=np.clip(0.6 + 0.12 * quality + rng.normal(0, 0.15, count), 0, 1),
        likes=likes,
        author_followers=followers,
    )


def _tags(rng: np.random.Generator, animal: Ints, setting: Ints, style: Floats) -> tuple[tuple[str, ...], ...]:
    draws = rng.random((len(animal), 3 + len(STYLES)))
    wrong = rng.integers(0, len(ANIMALS), len(animal))
    result = []
    for i in range(len(animal)):
        tags = []
        if draws[i, 0] >= 0.08:
            tags.append(ANIMALS[int(wrong[i] if draws[i, 1] < 0.04 else animal[i])])
        if draws[i, 2] >= 0.2:
            tags.append(SETTINGS[int(setting[i])])
        tags += [name for j, name in enumerate(STYLES) if style[i, j] > 0.5 and draws[i, 3 + j] >= 0.3]
        result.append(tuple(tags))
    return tuple(result)


def _users(rng: np.random.Generator, count: int) -> Users:
    taste = rng.beta(0.8, 0.8, (count, len(STYLES)))
    known = np.clip(taste + rng.normal(0, 0.12, taste.shape), 0, 1)
    known[rng.random(count) < 0.3] = np.nan
    return Users(taste, known, (rng.random(count) < 0.55).astype(np.int64))


def _phrases(rng: np.random.Generator) -> Ints:
    """Every phrase there is, in random order, (m, 3)."""
    every = [(a, s, t) for a in range(len(ANIMALS)) for s in range(-1, len(SETTINGS)) for t in range(-1, len(STYLES))]
    return np.array(every, dtype=np.int64)[rng.permutation(len(every))]


def _searches(rng: np.random.Generator, pictures: Pictures, users: Users, phrases: Ints, count: int) -> Searches:
    # Short phrases are typed far more often than long ones.
    length = 1 + (phrases[:, 1] >= 0) + (phrases[:, 2] >= 0)
    weight = np.array([0.0, 12.0, 3.0, 1.0])[length]
    phrase = phrases[rng.choice(len(phrases), count, p=weight / weight.sum())]
    user = rng.integers(0, len(users.mobile), count)
    shown = _retrieve(rng, pictures, phrase)
    match = _match(pictures, phrase, shown)
    similarity = np.clip(0.15 + 0.2 * match + rng.normal(0, 0.04, match.shape), 0, 1)
    utility = _utility(pictures, users, phrase, user, shown, match)
    grades = np.searchsorted(np.array(THRESHOLDS), utility, side="right").astype(np.int64)
    return Searches(phrase, user, shown, similarity, utility, grades)


def _retrieve(rng: np.random.Generator, pictures: Pictures, phrase: Ints) -> Ints:
    """Candidates: about two thirds show the animal, the rest anything; each picture once in a search."""
    count = len(phrase)
    by_animal = [np.flatnonzero(pictures.animal == animal) for animal in range(len(ANIMALS))]
    result = np.empty((count, PLACES), dtype=np.int64)
    for n in range(count):
        own = by_animal[int(phrase[n, 0])]
        right = min(len(own), int(rng.binomial(PLACES, 0.65)))
        picked = rng.choice(own, right, replace=False)
        others = rng.integers(0, len(pictures.animal), PLACES * 3)
        rest = others[~np.isin(others, picked)]
        rest = rest[np.sort(np.unique(rest, return_index=True)[1])][: PLACES - right]
        result[n] = rng.permutation(np.concatenate([picked, rest]))
    return result


def _match(pictures: Pictures, phrase: Ints, shown: Ints) -> Floats:
    animal, setting, style = (phrase[:, [i]] for i in range(3))
    asked = 0.6 + 0.25 * (setting >= 0) + 0.15 * (style >= 0)
    shows = 0.6 * (pictures.animal[shown] == animal) + 0.25 * (pictures.setting[shown] == setting)
    shows = shows + 0.15 * np.where(style >= 0, pictures.style[shown, np.maximum(style, 0)], 0.0)
    return np.asarray(shows / asked)


def _utility(pictures: Pictures, users: Users, phrase: Ints, user: Ints, shown: Ints, match: Floats) -> Floats:
    style = pictures.style[shown]  # (n, PLACES, 5)
    affinity = (style * users.taste[user][:, None, :]).sum(-1) / style.sum(-1)
    room = np.where((phrase[:, 1:] < 0).all(axis=1), 1.3, 0.8)[:, None]
    phone = users.mobile[user][:, None] * (2.0 * pictures.portrait[shown] - 1.0)
    fresh = np.exp(-pictures.age_days[shown] / 60.0)
    return np.asarray(
        3.2 * match + 0.5 * pictures.quality[shown] + 1.8 * (affinity - 0.5) * room + 0.25 * phone + 0.35 * fresh
    )


def _log(rng: np.random.Generator, searches: Searches, pictures: Pictures, swap_share: float) -> clicks.Log:
    """Shows every search in the order of likes and similarity, and lets people click."""
    likes = np.log1p(pictures.likes[searches.pictures])
    score = 0.5 * likes + 6.0 * searches.similarity + rng.normal(0, 0.3, likes.shape)
    order = np.argsort(-score, axis=1, kind="stable")
    shown, swapped = clicks.swap_first(order, swap_share, rng)
    return clicks.Log(shown, clicks.click(shown, searches.attractiveness, EXAMINATION, rng), swapped)
