"""A catalogue of pictures as vectors in a usearch index, with the names of the pictures beside it.

    catalogue.usearch   a line of text (`HEAD`), then the index as usearch writes it: vectors and their HNSW graph
    catalogue.json      ids, what the index must be like, and the digests of the index and of the network

The line comes first because usearch's own bytes start with the number of vectors: a catalogue of 640 pictures would
look like a pickle, and be refused by everybody who is careful.

Key `i` of the index is picture `ids[i]`. Ids are kept in the order of their SHA-256, so that the same pictures give
the same bytes whatever way the catalogue came about, and pictures whose names are alike are not added in a row.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from usearch.index import Index

from bentos.serving import StartError
from bentos.serving.model import canonical_json

Vectors = NDArray[np.float32]

HEAD = b"ekiben catalogue index 1\n"
SCHEMA = "ekiben.catalogue.v1"
NETWORK, INDEX, NAMES = "embedding.keras", "catalogue.usearch", "catalogue.json"
METRIC = "cosine"
LONGEST_ID = 200
CONNECTIVITY = 16
EXPANSION_ADD = 128
EXPANSIONS = (64, 128, 256, 512, 1024)
"""Lengths of the list of candidates in a search. The first one that finds enough of the true neighbours is taken."""
NEIGHBOURS = 10
"""`k` of the recall that a catalogue is held to."""
LEAST_RECALL = 0.99
_PROVED_ON = 1000
_SAME = 1e-6
"""Distances that differ by less are the same: float32 has seven digits."""
_SAME_VECTOR = 1e-5
_REBUILD = "build it again: python -m bentos.image_search.index"


class CatalogueError(ValueError):
    """A catalogue cannot be made of this. The text says why, and what to do."""


@dataclass(frozen=True)
class Match:
    id: str
    distance: float
    """1 − cosine of the angle: 0 for the same direction, 2 for the opposite one."""


@dataclass(frozen=True)
class Catalogue:
    """Ids with their vectors of length 1, and an index that finds the nearest of them."""

    ids: tuple[str, ...]
    index: Index
    network: str
    """SHA-256 of the network's file that made the vectors, in hex."""
    recall: float
    """Share of the true ten nearest that a search finds, measured when the index was built."""
    sample: bytes
    """A picture to ask with, as a PNG file: what a catalogue is proved by stays with it when it is built again."""

    @property
    def dimension(self) -> int:
        return int(self.index.ndim)

    @cached_property
    def positions(self) -> Mapping[str, int]:
        """Of each id, the key in the index."""
        return {name: i for i, name in enumerate(self.ids)}

    def vectors(self) -> Vectors:
        """All vectors, in the order of `ids`."""
        return np.asarray(self.index.get(np.arange(len(self.ids))), np.float32).reshape(-1, self.dimension)

    def vector(self, position: int) -> Vectors:
        return np.asarray(self.index.get(position), np.float32)

    def near(self, vector: Vectors, k: int, leave_out: int | None = None) -> list[Match]:
        """Up to `k` pictures, nearest first, equal distances by id; without the one at position `leave_out`."""
        found = self.index.search(vector, k + (leave_out is not None), threads=1)
        pairs = zip(found.keys.tolist(), found.distances.tolist(), strict=True)
        matches = [Match(self.ids[key], max(0.0, distance)) for key, distance in pairs if key != leave_out]
        return sorted(matches, key=lambda m: (m.distance, m.id))[:k]

    def files(self) -> dict[str, bytes]:
        """The two files; the same catalogue gives the same bytes."""
        index = HEAD + bytes(self.index.save(None))
        names = {
            "schema": SCHEMA,
            "metric": METRIC,
            "dimension": self.dimension,
            "count": len(self.ids),
            "connectivity": CONNECTIVITY,
            "expansion_add": EXPANSION_ADD,
            "expansion_search": int(self.index.expansion_search),
            "recall_10": self.recall,
            "network_sha256": self.network,
            "index_sha256": digest(index),
            "sample": base64.b64encode(self.sample).decode(),
            "ids": list(self.ids),
        }
        return {INDEX: index, NAMES: canonical_json(names)}


def build(vectors: Mapping[str, Vectors], network: str, sample: bytes, progress: Callable[[str], None]) -> Catalogue:
    """A catalogue of vectors by id. `network` is the SHA-256 of the file of the network that made them.

    The index must find LEAST_RECALL of the true ten nearest (`proved`); the list of candidates is made longer until it
    does. Raises CatalogueError.
    """
    for name in vectors:
        if said := wrong_id(name):
            raise CatalogueError(f"the id {name[:50]!r} {said}")
    if len(vectors) < 2:
        raise CatalogueError("a catalogue needs at least two pictures")
    ids = tuple(sorted(vectors, key=lambda name: hashlib.sha256(name.encode()).digest()))
    matrix = np.stack([vectors[name] for name in ids]).astype(np.float32)
    if not np.isfinite(matrix).all() or (np.abs(np.linalg.norm(matrix, axis=1) - 1) > 1e-3).any():
        raise CatalogueError("the network gives vectors that are not of length 1; end it with UnitNormalization")
    index = Index(
        ndim=matrix.shape[1], metric="cos", dtype="f32", connectivity=CONNECTIVITY, expansion_add=EXPANSION_ADD
    )
    index.add(np.arange(len(ids)), matrix, threads=1)  # one thread: the same bytes each time
    for expansion in EXPANSIONS:
        index.expansion_search = expansion
        found = proved(index, matrix)
        progress(f"{len(ids)} pictures; {expansion} candidates find {found:.2%} of the true {NEIGHBOURS} nearest")
        if found >= LEAST_RECALL:
            return Catalogue(ids, index, network, found, sample)
    raise CatalogueError(
        f"the index finds only {found:.2%} of the true {NEIGHBOURS} nearest, less than {LEAST_RECALL:.0%}; "
        "are many of the pictures the same?"
    )


def nearest(index: Index, queries: Vectors, k: int) -> NDArray[np.int64]:
    """Keys of the nearest found for each query, [n, k]; −1 where fewer were found."""
    found = index.search(queries, k, threads=1)
    counts = np.asarray(getattr(found, "counts", [len(found)])).reshape(-1, 1)
    keys = np.asarray(found.keys).astype(np.int64).reshape(len(queries), -1)
    return np.where(np.arange(keys.shape[1]) < counts, keys, -1)


def recall(index: Index, vectors: Vectors, queries: Vectors, k: int = NEIGHBOURS) -> float:
    """Share of the true `k` nearest that a search finds, beside an exact search that looks at every vector.

    Whatever is as near as the k-th true neighbour counts.
    """
    k = min(k, len(vectors))
    keys = nearest(index, queries, k)
    found = 0
    for start in range(0, len(queries), 256):
        part = slice(start, start + 256)
        distances = 1 - queries[part] @ vectors.T
        near = np.take_along_axis(distances, keys[part], axis=1)
        near[keys[part] < 0] = np.inf
        furthest = np.partition(distances, k - 1, axis=1)[:, k - 1]
        found += int((near <= furthest[:, None] + _SAME).sum())
    return found / (k * len(queries))


def proved(index: Index, vectors: Vectors) -> float:
    """Recall of searches with up to 1,000 vectors that are not in the catalogue, though near to what is.

    Each is a vector of the catalogue turned in a random direction by as far as its tenth neighbour is away. Those of
    the catalogue itself are no proof: the graph leads to them, and a search with them finds more than one with a new
    picture does.
    """
    rng = np.random.default_rng(0)
    some = np.sort(rng.choice(len(vectors), min(_PROVED_ON, len(vectors)), replace=False))
    probes = []
    for start in range(0, len(some), 256):
        own = vectors[some[start : start + 256]]
        tenth = min(NEIGHBOURS, len(vectors) - 1)
        cosine = -np.partition(-(own @ vectors.T), tenth, axis=1)[:, tenth]
        away = np.sqrt(np.maximum(0, 2 - 2 * cosine))
        probes.append(own + away[:, None] * _unit(rng.normal(size=own.shape)))
    return recall(index, vectors, _unit(np.concatenate(probes)))


def _unit(vectors: NDArray[Any]) -> Vectors:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def same(one: Vectors, other: Vectors) -> bool:
    """Whether two vectors are of the same picture: a network gives the last digits as its batches happen to fall."""
    return bool(np.abs(one - other).max() < _SAME_VECTOR)


def load(names: bytes, index: bytes, network: str) -> Catalogue:
    """A catalogue from its two files, for the network with this SHA-256. Raises StartError `model_load_failed`."""
    said = _names(names)
    if said["network_sha256"] != network:
        raise _broken(
            f"{INDEX} was made with another network than {NETWORK}: its distances would mean nothing",
            f"upload the network that the catalogue was made with, or {_REBUILD}",
        )
    if not index.startswith(HEAD):
        raise _broken(f"{INDEX} does not start with {HEAD.decode().strip()!r}", _REBUILD)
    if digest(index) != said["index_sha256"]:
        raise _broken(
            f"{INDEX} is not the one that {NAMES} was written with", f"upload both of one build, or {_REBUILD}"
        )
    body = memoryview(index)[len(HEAD) :]
    try:
        about = Index.metadata(body)
        read = Index.restore(body) if about else None
    except (ValueError, RuntimeError) as error:
        raise _broken(f"{INDEX} cannot be read by usearch: {error}", _REBUILD) from error
    if about is None or read is None:
        raise _broken(f"{INDEX} is not an index of usearch", _REBUILD)
    ids = tuple(said["ids"])
    for what, found, wanted in (
        ("metric", about["kind_metric"].name, "Cos"),
        ("type of numbers", about["kind_scalar"].name, "F32"),
        ("dimension", about["dimensions"], said["dimension"]),
        ("number of vectors", about["count_present"], len(ids)),
        ("number of deleted vectors", about["count_deleted"], 0),
    ):
        if found != wanted:
            raise _broken(f"{INDEX}: its {what} is {found}, not {wanted}", _REBUILD)
    if not np.array_equal(np.sort(np.asarray(read.keys[:])), np.arange(len(ids))):
        raise _broken(f"{INDEX}: its keys are not the positions 0 to {len(ids) - 1}", _REBUILD)
    read.expansion_search = said["expansion_search"]
    return Catalogue(ids, read, network, said["recall_10"], said["sample"])


def wrong_id(name: Any) -> str | None:
    """What is wrong with an id, or None."""
    if type(name) is not str or not name:
        return "is not a text of at least one character"
    if len(name) > LONGEST_ID:
        return f"is longer than {LONGEST_ID} characters"
    if any(0xD800 <= ord(character) <= 0xDFFF for character in name):
        return "holds half a character (a lone surrogate)"
    return None


def _names(data: bytes) -> dict[str, Any]:
    try:
        said = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _broken(f"{NAMES} is not JSON: {error}", _REBUILD) from error
    if not isinstance(said, dict) or said.get("schema") != SCHEMA:
        raise _broken(f"{NAMES} has not the schema {SCHEMA}", _REBUILD)
    ids = said.get("ids")
    if not isinstance(ids, list) or len(ids) < 2 or len(ids) != said.get("count"):
        raise _broken(f"{NAMES}: ids is not a list of `count` texts", _REBUILD)
    for name in ids:
        if said_of := wrong_id(name):
            raise _broken(f"{NAMES}: the id {str(name)[:50]!r} {said_of}", _REBUILD)
    if len(set(ids)) != len(ids):
        raise _broken(f"{NAMES} holds an id twice", _REBUILD)
    if said.get("metric") != METRIC:
        raise _broken(f"{NAMES}: the metric is {said.get('metric')!r}, not {METRIC!r}", _REBUILD)
    for name, least, most in (("dimension", 1, 65536), ("expansion_search", 1, 65536)):
        if type(said.get(name)) is not int or not least <= said[name] <= most:
            raise _broken(f"{NAMES}: {name} is not a whole number from {least} to {most}", _REBUILD)
    for name in ("network_sha256", "index_sha256"):
        if type(said.get(name)) is not str:
            raise _broken(f"{NAMES}: {name} is missing", _REBUILD)
    try:
        said["sample"] = binascii.a2b_base64(str(said["sample"]), strict_mode=True)
    except (KeyError, ValueError) as error:
        raise _broken(f"{NAMES}: sample is not a picture in base64", _REBUILD) from error
    if type(said.get("recall_10")) not in (int, float):
        raise _broken(f"{NAMES}: recall_10 is missing", _REBUILD)
    return said


def _broken(message: str, hint: str) -> StartError:
    return StartError("model_load_failed", message, hint)


def digest(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()
