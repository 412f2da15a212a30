"""containerfiles/: what docker makes of them is set up as what `make images` makes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from scripts import images

FOLDER = Path(__file__).resolve().parents[2] / "containerfiles"


def last_stage(name: str) -> list[tuple[str, str]]:
    text = (FOLDER / f"{name}.Containerfile").read_text().replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    start = max(at for at, line in enumerate(lines) if line[0] == "FROM")
    return [(word, rest) for word, rest in lines[start:]]


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.Containerfile")))
def test_a_containerfile_sets_up_what_make_images_sets_up(name: str) -> None:
    recipe, stage = images.RECIPES[name], last_stage(name)
    said = dict(stage)
    variables = dict(part.split("=", 1) for word, rest in stage if word == "ENV" for part in shlex.split(rest))
    assert variables == recipe.run.env
    assert json.loads(said["ENTRYPOINT"]) == list(recipe.run.entrypoint)
    assert said["WORKDIR"] == recipe.run.workdir
    assert said["USER"] == recipe.run.user
    assert [int(rest) for word, rest in stage if word == "EXPOSE"] == list(recipe.run.ports)


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.Containerfile")))
def test_a_containerfile_copies_the_packages_of_the_image(name: str) -> None:
    text = (FOLDER / f"{name}.Containerfile").read_text()
    copied = re.findall(r"^COPY (\w+) /app/src/(\w+)$", text, re.MULTILINE)
    assert {source for source, _ in copied} == set(images.RECIPES[name].packages)
    assert all(source == target for source, target in copied)
    assert f"COPY containerfiles/{name}.txt " in text
