"""Adds pictures to a catalogue, or takes some out, and builds its index again: `python -m bentos.image_search.index`.

The network stays the same, byte for byte: only then do old and new vectors mean the same. The index is built from
nothing each time, so no trace of what was taken out is left in it, and the same pictures give the same files whatever
was added when.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bentos.image_search import catalogue
from bentos.image_search.catalogue import CatalogueError, Vectors
from bentos.image_search.searching import Search, network_path
from bentos.serving.model import ModelFolder
from bentos.serving.problems import Problem, StartError
from bentos.training import command, registration
from bentos.training.gate import Gate
from bentos.training.outcome import Outcome, Progress, table

GATE = ("recall_10", "higher")
TOLERANCE = 0.005
"""Recall that a catalogue may lose as it grows."""
DEPLOYMENT = "image-search"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_AT_ONCE = 256


@dataclass(frozen=True)
class Changes:
    """What became of the pictures that were named."""

    added: int = 0
    replaced: int = 0
    same: int = 0
    """Added again, with the vector that they had."""
    removed: int = 0
    absent: int = 0
    """To be taken out, and not there."""
    unreadable: tuple[str, ...] = ()
    """Why each picture that cannot be read was left out."""

    @property
    def none(self) -> bool:
        return not (self.added or self.replaced or self.removed)


def listed(places: Collection[Path]) -> dict[str, Path]:
    """Picture files by id. A folder gives all its pictures, their ids being their paths in it without the suffix; a CSV
    file has the columns id and path, paths being relative to it. Raises CatalogueError."""
    found: dict[str, Path] = {}
    for place in places:
        for name, path in _pictures(place):
            if said := catalogue.wrong_id(name):
                raise CatalogueError(f"{place}: the id {name[:50]!r} {said}")
            if name in found:
                raise CatalogueError(f"{place}: the id {name!r} is there twice: {found[name]} and {path}")
            found[name] = path
    return found


def embedded(search: Search, files: Mapping[str, Path], progress: Progress) -> tuple[dict[str, Vectors], list[str]]:
    """Vectors by id, and a line for each picture that cannot be read."""
    vectors: dict[str, Vectors] = {}
    unreadable: list[str] = []
    names = list(files)
    with progress.bar("embedding", len(names), "pictures") as advance:
        for start in range(0, len(names), _AT_ONCE):
            part: dict[str, np.ndarray] = {}
            for name in names[start : start + _AT_ONCE]:
                try:
                    part[name] = search.pixels(files[name].read_bytes())
                except Problem as problem:
                    unreadable.append(f"{files[name]}: {problem.detail}")
                except (OSError, ValueError) as error:  # ValueError: a path with a NUL
                    unreadable.append(f"{files[name]}: {error}")
            if part:
                vectors |= zip(part, search.network.run(np.concatenate(list(part.values()))), strict=True)
            advance(len(names[start : start + _AT_ONCE]))
    return vectors, unreadable


def rebuilt(
    search: Search, new: Mapping[str, Vectors], gone: Collection[str], progress: Progress
) -> tuple[Search, Changes]:
    """The catalogue with the new pictures and without those that are gone. Raises CatalogueError."""
    if both := sorted(set(new) & set(gone)):
        raise CatalogueError(f"{both[0]!r} is to be both added and taken out")
    known = search.catalogue
    vectors: dict[str, Vectors] = dict(zip(known.ids, known.vectors(), strict=True))
    same = [name for name, vector in new.items() if name in vectors and catalogue.same(vectors[name], vector)]
    removed = [name for name in set(gone) if vectors.pop(name, None) is not None]
    changed = {name: vector for name, vector in new.items() if name not in set(same)}
    replaced = sum(name in vectors for name in changed)
    vectors |= changed
    changes = Changes(
        added=len(changed) - replaced,
        replaced=replaced,
        same=len(same),
        removed=len(removed),
        absent=len(set(gone)) - len(removed),
    )
    return replace(search, catalogue=catalogue.build(vectors, known.network, known.sample, progress)), changes


def evaluate(folder: ModelFolder) -> dict[str, float]:
    """Recall of a catalogue's index beside an exact search."""
    known = Search.load(folder).catalogue
    return {"recall_10": catalogue.proved(known.index, known.vectors())}


def outcome_of(folder: ModelFolder, search: Search, changes: Changes) -> Outcome:
    """The version with the new catalogue; the network's bytes are those of `folder`."""
    files = search.catalogue.files()
    sample, expected = search.golden()
    return Outcome(
        kind="image_search",
        format="keras-v3",
        files={catalogue.NETWORK: network_path(folder).read_bytes(), **files},
        model=catalogue.NETWORK,
        sample=sample,
        expected=expected,
        parameters={
            "from": folder.digest,
            "network": search.catalogue.network,
            "expansion_search": int(search.catalogue.index.expansion_search),
        },
        metrics={
            "recall_10": search.catalogue.recall,
            "pictures": len(search.catalogue.ids),
            "added": changes.added,
            "replaced": changes.replaced,
            "removed": changes.removed,
            "unreadable": len(changes.unreadable),
        },
        dataset="catalogue",
        dataset_digest=catalogue.digest(files[catalogue.INDEX]),
    )


def report(before: int, search: Search, changes: Changes) -> str:
    rows: list[list[str | float]] = [
        ["before", str(before)],
        ["added", str(changes.added)],
        ["replaced by another picture", str(changes.replaced)],
        ["there already, the same", str(changes.same)],
        ["taken out", str(changes.removed)],
        ["to be taken out, but not there", str(changes.absent)],
        ["left out, cannot be read", str(len(changes.unreadable))],
        ["now", str(len(search.catalogue.ids))],
        ["recall beside exact search, k = 10", f"{search.catalogue.recall:.4f}"],
    ]
    return table(["catalogue", "pictures"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    model = Path(__file__).parent / "model"
    parser = argparse.ArgumentParser(
        prog="python -m bentos.image_search.index",
        description="Add pictures to a catalogue or take some out, build its index again with the same network, and "
        "prove that it finds what an exact search finds. The result is a model folder, ready to upload.",
        epilog="Example: python -m bentos.image_search.index --live http://localhost:8000 --add new-pictures/ "
        "--register http://localhost:8000 --gate",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", type=Path, default=model, metavar="DIR", help="model folder to start from")
    source.add_argument("--live", metavar="URL", help=f"start from what {DEPLOYMENT} of a running Ekiben serves")
    parser.add_argument(
        "--add",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help=f"a folder of pictures ({', '.join(SUFFIXES)}), or a CSV file with columns id and path; may be repeated",
    )
    parser.add_argument("--new-only", action="store_true", help="leave pictures alone whose ids are in the catalogue")
    parser.add_argument("--remove", action="append", default=[], metavar="ID", help="may be repeated")
    parser.add_argument("--remove-list", type=Path, metavar="FILE", help="ids to take out, one a line")
    command.add_options(parser, model)
    options = parser.parse_args(arguments)
    progress = Progress.start(options.quiet)
    try:
        with tempfile.TemporaryDirectory(prefix="ekiben-catalogue-") as scratch:
            outcome, changes, shown = _run(options, Path(scratch), progress)
    except (CatalogueError, StartError, registration.RegistrationError) as error:
        print(error, file=sys.stderr)
        return 1 if isinstance(error, registration.RegistrationError) else 2
    print(shown)
    if changes.none and options.live:
        print("nothing has changed: what is live stays")
        return 0
    return command.finish(outcome, options, progress, Gate(*GATE, TOLERANCE, evaluate))


def _run(options: argparse.Namespace, scratch: Path, progress: Progress) -> tuple[Outcome, Changes, str]:
    gone = {*options.remove, *(_lines(options.remove_list) if options.remove_list else ())}
    files = asked = listed(options.add)
    folder = _downloaded(options.live, scratch) if options.live else ModelFolder.read(options.model)
    folder.verify()
    search = Search.load(folder, _AT_ONCE)
    if options.new_only:
        files = {name: path for name, path in asked.items() if name not in search.catalogue.positions}
    vectors, unreadable = embedded(search, files, progress)
    for line in unreadable:
        print(f"left out: {line}", file=sys.stderr)
    if unreadable and len(unreadable) == len(asked):
        raise CatalogueError(f"none of the {len(asked)} pictures can be read")
    made, changes = rebuilt(search, vectors, gone, progress)
    changes = replace(changes, unreadable=tuple(unreadable))
    return outcome_of(folder, made, changes), changes, report(len(search.catalogue.ids), made, changes)


def _downloaded(url: str, scratch: Path) -> ModelFolder:
    service = registration.Service(url, os.environ.get("EKIBEN_TOKEN"))
    version = service.live(DEPLOYMENT)
    if version is None:
        raise CatalogueError(f"{url} serves no {DEPLOYMENT}; train one: python -m bentos.image_search.train")
    return service.download(version, scratch)


def _pictures(place: Path) -> Iterator[tuple[str, Path]]:
    if place.is_dir():
        for path in sorted(place.rglob("*")):
            if path.is_file() and path.suffix.lower() in SUFFIXES:
                yield path.relative_to(place).with_suffix("").as_posix(), path
        return
    try:
        with place.open(newline="", encoding="utf-8") as stream:
            rows = csv.DictReader(stream)
            if not {"id", "path"} <= set(rows.fieldnames or ()):
                raise CatalogueError(f"{place} is neither a folder nor a CSV file with the columns id and path")
            for row in rows:
                yield row["id"] or "", place.parent / (row["path"] or "")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CatalogueError(f"{place} cannot be read: {error}") from error


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CatalogueError(f"{path} cannot be read: {error}") from error


if __name__ == "__main__":
    raise SystemExit(main())
