"""Pictures of a hold in two sets: `python -m bentos.cargo.data DIR` writes them as folders of PNG with lists.

*monday* is what the camera was set up for. On *tuesday* something went wrong with it: each picture is corrupted by
random boxes, a mosaic, random lines, or a mix of these, from hardly to badly. Each set has pictures of all five
materials in equal numbers, and is cut into parts:

    monday    train          what the network learns from
              calibration    never learnt from: what its answers on known pictures look like (bentos.cargo.selection)
              test           how well it does, before and after
    tuesday   pool           from which a few are chosen, given a label, and learnt from too
              test           how well it does, before and after

    DIR/monday/brick/train-00001.png     DIR/tuesday/wood/pool-00004.png     …
    DIR/monday-train.csv                 path,label,set,corruption, a line a picture; likewise for each part

The same seed gives the same pictures, each of them independent of how many are made. PNG keeps every pixel, so the
files hold exactly what a training sees.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from bentos.cargo import textures
from bentos.cargo.textures import MATERIALS, SIZE, Rng
from bentos.serving import Problem
from bentos.serving.pictures import read as read_picture

CORRUPTIONS = ("boxes", "mosaic", "lines", "mixed")
NONE = "none"
PARTS = ("monday-train", "monday-calibration", "monday-test", "tuesday-pool", "tuesday-test")
HEAD = ("path", "label", "set", "corruption")

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Sizes:
    """How many pictures each part has; each number is a multiple of five."""

    train: int = 2500
    calibration: int = 500
    monday_test: int = 500
    pool: int = 1500
    tuesday_test: int = 1000

    def by_part(self) -> dict[str, int]:
        counts = (self.train, self.calibration, self.monday_test, self.pool, self.tuesday_test)
        return dict(zip(PARTS, counts, strict=True))


@dataclass(frozen=True)
class Pictures:
    """One part: `n` pictures [n, SIZE, SIZE, 3] with what is known of them."""

    images: Bytes
    labels: NDArray[np.int64]
    paths: tuple[str, ...]
    corruptions: tuple[str, ...]
    set: str

    def __len__(self) -> int:
        return len(self.labels)

    def some(self, chosen: NDArray[np.int64]) -> Pictures:
        """Those at these places, in their order."""
        places = chosen.tolist()
        paths, corruptions = (tuple(each[i] for i in places) for each in (self.paths, self.corruptions))
        return Pictures(self.images[chosen], self.labels[chosen], paths, corruptions, self.set)

    def rows(self) -> Iterator[tuple[str, int, str, str]]:
        """Lines of the list: path, label, set, corruption."""
        for path, label, corruption in zip(self.paths, self.labels.tolist(), self.corruptions, strict=True):
            yield path, label, self.set, corruption

    def digest(self) -> str:
        """SHA-256 of the list and of every pixel, in hex."""
        hasher = hashlib.sha256(csv_text(self).encode())
        hasher.update(np.ascontiguousarray(self.images).tobytes())
        return hasher.hexdigest()


@dataclass(frozen=True)
class Data:
    """All parts, by their names in PARTS."""

    parts: dict[str, Pictures]

    def digest(self) -> str:
        """One SHA-256 for all of them."""
        lines = (f"{name} {part.digest()}\n" for name, part in self.parts.items())
        return hashlib.sha256("".join(lines).encode()).hexdigest()


class PicturesError(ValueError):
    """Pictures or lists that cannot be used; the text names the file and what to do."""


def make(sizes: Sizes, seed: int, names: Sequence[str] = PARTS) -> Data:
    """Draw all parts, or some of them."""
    counts = sizes.by_part()
    return Data({name: part(name, counts[name], seed) for name in names})


def part(name: str, count: int, seed: int) -> Pictures:
    """Draw `count` pictures of one part: materials, and on tuesday corruptions, in turn."""
    if count % len(MATERIALS):
        raise ValueError(f"{name}: {count} pictures cannot be shared equally by {len(MATERIALS)} materials")
    day, _, use = name.partition("-")
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    labels = np.arange(count) % len(MATERIALS)
    paths, corruptions = [], []
    for number, label in enumerate(labels.tolist()):
        rng = np.random.default_rng([seed, PARTS.index(name), number])
        image = textures.draw(label, rng)
        corruption = NONE
        if day == "tuesday":
            # five materials and four corruptions: twenty pictures have each pair once
            corruption = CORRUPTIONS[number // len(MATERIALS) % len(CORRUPTIONS)]
            image = corrupted(image, corruption, rng.uniform(0.1, 1.0), rng)
        images[number] = image
        corruptions.append(corruption)
        paths.append(f"{day}/{MATERIALS[label]}/{use}-{number:05d}.png")
    return Pictures(images, labels.astype(np.int64), tuple(paths), tuple(corruptions), day)


def corrupted(image: Bytes, corruption: str, severity: float, rng: Rng) -> Bytes:
    """A picture [h, w, 3] after what went wrong with the camera, from hardly (0) to badly (1)."""
    if corruption == "boxes":
        return boxes(image, severity, rng)
    if corruption == "mosaic":
        return mosaic(image, severity, rng)
    if corruption == "lines":
        return lines(image, severity, rng)
    if corruption != "mixed":
        raise ValueError(f"there is no corruption {corruption!r}")
    left_out = rng.integers(0, 4)  # one of the three, or none
    for at, each in enumerate((mosaic, boxes, lines)):
        if at != left_out:
            image = each(image, severity * 0.7, rng)
    return image


def boxes(image: Bytes, severity: float, rng: Rng) -> Bytes:
    """Rectangles of one colour each, anywhere."""
    height, width = image.shape[:2]
    image = image.copy()
    for _ in range(1 + int(severity * 9 * rng.random())):
        high, wide = (int(rng.uniform(0.08, 0.15 + 0.35 * severity) * side) for side in (height, width))
        top, left = rng.integers(0, height - high), rng.integers(0, width - wide)
        image[top : top + high, left : left + wide] = rng.integers(0, 256, 3)
    return image


def mosaic(image: Bytes, severity: float, rng: Rng) -> Bytes:
    """Squares of their mean colour, over a part of the picture or all of it."""
    height, width = image.shape[:2]
    side = int(rng.integers(3, 5 + int(11 * severity)))
    rows, columns = np.arange(height) // side, np.arange(width) // side
    tops, lefts = np.arange(0, height, side), np.arange(0, width, side)
    sums = np.add.reduceat(np.add.reduceat(image.astype(np.int64), tops, axis=0), lefts, axis=1)
    area = np.bincount(rows)[:, None] * np.bincount(columns)[None, :]
    squares = (sums // area[..., None])[rows][:, columns].astype(np.uint8)
    reach = min(1.0, rng.uniform(0.4, 0.6 + 0.8 * severity))
    high, wide = max(1, int(reach * height)), max(1, int(reach * width))
    top, left = rng.integers(0, height - high + 1), rng.integers(0, width - wide + 1)
    image = image.copy()
    image[top : top + high, left : left + wide] = squares[top : top + high, left : left + wide]
    return image


def lines(image: Bytes, severity: float, rng: Rng) -> Bytes:
    """Straight lines of random colours from anywhere to anywhere."""
    height, width = image.shape[:2]
    canvas = Image.fromarray(image)
    pen = ImageDraw.Draw(canvas)
    for _ in range(3 + int(severity * 37 * rng.random())):
        ends = [(float(rng.uniform(0, width)), float(rng.uniform(0, height))) for _ in range(2)]
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        pen.line(ends, fill=colour, width=int(rng.integers(1, 3 + int(3 * severity))))
    return np.asarray(canvas).copy()


def png(image: Bytes) -> bytes:
    """A picture as a file."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def csv_text(pictures: Pictures) -> str:
    """The list of a part."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(HEAD)
    writer.writerows(pictures.rows())
    return stream.getvalue()


def write(data: Data, folder: Path) -> None:
    """Write pictures and lists."""
    for name, pictures in data.parts.items():
        for image, path in zip(pictures.images, pictures.paths, strict=True):
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(png(image))
        (folder / f"{name}.csv").write_text(csv_text(pictures), encoding="utf-8")


def read(folder: Path, names: Sequence[str] = PARTS) -> Data:
    """Read what `write` wrote, or pictures of one's own with such lists.

    Pictures of another size are scaled. Raises PicturesError naming the list and line that cannot be used.
    """
    return Data({name: _read_part(folder, name) for name in names})


def _read_part(folder: Path, name: str) -> Pictures:
    images: list[Bytes] = []
    labels: list[int] = []
    paths: list[str] = []
    corruptions: list[str] = []
    try:
        with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                where = f"{name}.csv, picture {len(paths) + 1}"
                path, label = row.get("path") or "", row.get("label") or ""
                if not path or path.startswith("/") or ".." in PurePosixPath(path).parts:
                    raise PicturesError(f"{where}: path {path!r} is not below {folder}")
                if label not in {str(known) for known in range(len(MATERIALS))}:
                    raise PicturesError(f"{where}: label {label!r} is none of 0 to {len(MATERIALS) - 1}")
                try:
                    images.append(read_picture((folder / path).read_bytes(), SIZE, SIZE, path))
                except Problem as problem:
                    raise PicturesError(f"{where}: {problem.detail}; {problem.hint}") from problem
                labels.append(int(label))
                paths.append(path)
                corruptions.append(row.get("corruption") or NONE)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PicturesError(f"{name}.csv: {error}") from error
    if not images:
        raise PicturesError(f"{name}.csv lists no picture; its head is {','.join(HEAD)}")
    day = name.partition("-")[0]
    return Pictures(np.stack(images), np.array(labels, np.int64), tuple(paths), tuple(corruptions), day)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bentos.cargo.data",
        description="Write the pictures of a hold, monday and tuesday, as folders of PNG files with lists.",
        epilog="Example: python -m bentos.cargo.data pictures; EKIBEN_FOLDER=pictures serves from them.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to write; made if it does not exist")
    parser.add_argument("--seed", type=int, default=7, help="same seed, same pictures (default 7)")
    parser.add_argument("--small", action="store_true", help="60 pictures a part instead of 500 to 2500")
    options = parser.parse_args(arguments)
    data = make(Sizes(60, 60, 60, 60, 60) if options.small else Sizes(), options.seed)
    write(data, options.folder)
    for name, pictures in data.parts.items():
        print(f"{name:20}{len(pictures):6} pictures  sha256 {pictures.digest()}")
    print(f"{'all':20}{sum(map(len, data.parts.values())):6} pictures  sha256 {data.digest()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
