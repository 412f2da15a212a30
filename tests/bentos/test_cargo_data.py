"""The pictures of a hold: the same for a seed, told apart by their materials, and corrupted as their list says."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bentos.cargo import data, textures
from bentos.cargo.data import Bytes, Sizes

FEW = Sizes(20, 20, 20, 20, 20)


@pytest.fixture(scope="module")
def made() -> data.Data:
    return data.make(FEW, 7)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def scene(label: int = 1) -> Bytes:
    return textures.draw(label, rng(3))


def test_the_same_seed_gives_the_same_pictures_and_another_seed_others(made: data.Data) -> None:
    assert data.make(FEW, 7).digest() == made.digest()
    assert data.make(FEW, 8).digest() != made.digest()


def test_the_digest_is_the_same_in_another_process(made: data.Data) -> None:
    code = f"from bentos.cargo import data; print(data.make(data.{FEW!r}, 7).digest())"
    environment = {**os.environ, "PYTHONHASHSEED": "12"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == made.digest()


def test_a_picture_does_not_depend_on_how_many_are_made(made: data.Data) -> None:
    more = data.part("tuesday-pool", 40, 7)
    assert np.array_equal(more.images[:20], made.parts["tuesday-pool"].images)
    assert more.digest() != made.parts["tuesday-pool"].digest()


def test_one_pixel_or_one_label_changes_the_digest(made: data.Data) -> None:
    part = made.parts["monday-test"]
    images, labels = part.images.copy(), part.labels.copy()
    images[3, 4, 5, 0] ^= 1
    labels[0], labels[1] = labels[1], labels[0]
    others = [
        data.Pictures(images, part.labels, part.paths, part.corruptions, part.set),
        data.Pictures(part.images, labels, part.paths, part.corruptions, part.set),
    ]
    assert len({part.digest(), *(other.digest() for other in others)}) == 3


def test_no_picture_is_in_two_parts(made: data.Data) -> None:
    seen = [image.tobytes() for part in made.parts.values() for image in part.images]
    assert len(set(seen)) == len(seen) == 100


def test_materials_and_corruptions_come_in_equal_numbers(made: data.Data) -> None:
    for name, part in made.parts.items():
        assert np.bincount(part.labels).tolist() == [4, 4, 4, 4, 4], name
        assert part.images.shape == (20, 96, 96, 3)
        assert part.images.dtype == np.uint8
    pool = made.parts["tuesday-pool"]
    pairs = {(label, corruption) for _, label, _, corruption in pool.rows()}
    assert len(pairs) == 20
    assert set(made.parts["monday-train"].corruptions) == {"none"}
    with pytest.raises(ValueError, match="shared equally"):
        data.part("monday-test", 7, 7)


def test_light_camera_and_load_vary() -> None:
    """Of one material no two pictures are alike: not in brightness, nor in how much of the hold is seen."""
    for label in range(5):
        images = np.stack([textures.draw(label, rng(i)) for i in range(30)]).astype(float)
        assert images.mean(axis=(1, 2, 3)).std() > 15
        assert images.std(axis=0).mean() > 25


def test_boxes_are_of_one_colour_each_and_leave_the_rest_as_it_is() -> None:
    image = scene()
    found = data.boxes(image, 0.1, rng(1))
    changed = (found != image).any(axis=2)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    box = found[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert len(np.unique(box.reshape(-1, 3), axis=0)) == 1
    assert 0.003 < changed.mean() < 0.05


def test_a_mosaic_has_squares_of_their_mean_colour() -> None:
    image = scene()
    seeds = [seed for seed in range(40) if (data.mosaic(image, 1.0, rng(seed)) != image).any(axis=2).mean() > 0.97]
    for seed in seeds[:5]:
        side = int(rng(seed).integers(3, 16))
        found = data.mosaic(image, 1.0, rng(seed))
        square = found[side : 2 * side, side : 2 * side].reshape(-1, 3)
        assert len(np.unique(square, axis=0)) == 1
        mean = image[side : 2 * side, side : 2 * side].reshape(-1, 3).mean(axis=0)
        assert np.abs(square[0] - mean).max() <= 1
    assert len(seeds) >= 5


def test_lines_are_thin_and_straight() -> None:
    image = np.zeros((96, 96, 3), np.uint8)
    found = data.lines(image, 0.0, rng(5))
    drawn = found.any(axis=2)
    assert 0.01 < drawn.mean() < 0.12
    colours = np.unique(found[drawn], axis=0)
    assert len(colours) == 3
    for colour in colours:
        at = np.argwhere((found == colour).all(axis=2)).astype(float)
        spread = np.linalg.svd(at - at.mean(axis=0), compute_uv=False) / np.sqrt(len(at))
        assert spread[1] < 1.5  # across the line


def test_mixed_is_more_than_one_of_them() -> None:
    image = np.full((96, 96, 3), 128, np.uint8)
    image[::2] = 100
    several = 0
    for seed in range(20):
        found = data.corrupted(image, "mixed", 1.0, rng(seed))
        blended = ((found != 100) & (found != 128)).any(axis=2)
        several += bool(blended.any())
        assert (found != image).any()
    assert several == 20
    with pytest.raises(ValueError, match="no corruption"):
        data.corrupted(image, "rain", 1.0, rng())


def test_severity_decides_how_much_is_lost() -> None:
    image = scene()
    for name in data.CORRUPTIONS:
        lost = [
            np.mean([(data.corrupted(image, name, severity, rng(seed)) != image).mean() for seed in range(40)])
            for severity in (0.1, 0.9)
        ]
        assert lost[1] > lost[0] * 1.15, name


def test_a_corruption_leaves_what_it_was_given_alone() -> None:
    image = scene()
    image.setflags(write=False)
    for name in data.CORRUPTIONS:
        data.corrupted(image, name, 0.8, rng())


def test_what_is_written_is_what_is_read(made: data.Data, tmp_path: Path) -> None:
    data.write(made, tmp_path)
    with (tmp_path / "tuesday-pool.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["path", "label", "set", "corruption"]
    assert len(rows) == 20
    assert {row["set"] for row in rows} == {"tuesday"}
    for row in rows:
        assert row["path"].split("/")[:2] == ["tuesday", textures.MATERIALS[int(row["label"])]]
        with Image.open(tmp_path / row["path"]) as image:
            assert image.size == (96, 96)
    assert data.read(tmp_path).digest() == made.digest()


def test_lists_that_cannot_be_used_are_told_by_file_and_line(made: data.Data, tmp_path: Path) -> None:
    data.write(made, tmp_path)
    good = (tmp_path / "monday-test.csv").read_text()
    head, first, rest = good.split("\n", 2)
    path = first.split(",")[0]
    for line, said in (
        ("../secret.png,0,monday,none", "not below"),
        ("/etc/passwd,0,monday,none", "not below"),
        (f"{path},5,monday,none", "none of 0 to 4"),
        ("monday/none.png,0,monday,none", "No such file"),
        ("monday-test.csv,0,monday,none", "does not start as"),
    ):
        (tmp_path / "monday-test.csv").write_text(f"{head}\n{line}\n{rest}")
        with pytest.raises(data.PicturesError, match=said) as refused:
            data.read(tmp_path, ("monday-test",))
        assert "monday-test.csv" in str(refused.value)
    (tmp_path / "monday-test.csv").write_text(head + "\n")
    with pytest.raises(data.PicturesError, match="lists no picture"):
        data.read(tmp_path)


def test_the_command_writes_folders_lists_and_digests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data.main([str(tmp_path / "new"), "--small", "--seed", "3"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(
        ["monday", "tuesday", *(f"{name}.csv" for name in data.PARTS)]
    )
    assert said[-1].endswith(data.read(tmp_path / "new").digest())
