from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from registry.errors import InfrastructureError, UserError
from registry.formats import FORMATS
from registry.kinds import Kinds

BENTOS = Path(__file__).parents[2] / "bentos"

TOML = """\
name = "lightgbm"
title = "LightGBM models"
description = "Boosted trees saved by Booster.save_model"
generic = true
formats = ["lightgbm-text"]
service = "service:LightGBM"
packages = ["bentos.serving"]
python = ">=3.11"
device = "cpu"
predict = "/predict"
memory = "512Mi"
"""


def write(root: Path, name: str = "lightgbm", toml: str = TOML) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "kind.toml").write_text(toml)
    (folder / "service.py").write_text("class LightGBM: ...\n")
    serving = root / "serving"
    serving.mkdir(exist_ok=True)
    (serving / "__init__.py").write_text("")
    return folder


def test_kinds_are_read_and_found_by_name_and_format(tmp_path):
    write(tmp_path)
    write(tmp_path, "ranker", TOML.replace('"lightgbm"', '"ranker"').replace("generic = true", "generic = false"))
    kinds = Kinds.load(tmp_path)
    assert kinds.names == ("lightgbm", "ranker")
    generic = kinds.for_format("lightgbm-text")
    assert generic is not None
    assert (generic.name, generic.memory, generic.formats) == ("lightgbm", "512Mi", ("lightgbm-text",))
    assert kinds.for_format("onnx") is None
    assert kinds.named("ranker").generic is False
    with pytest.raises(UserError, match="rankre") as error:
        kinds.named("rankre")
    assert error.value.code == "unknown_kind"
    assert "lightgbm, ranker" in (error.value.hint or "")


def test_reading_a_kind_imports_nothing(tmp_path):
    folder = write(tmp_path)
    (folder / "service.py").write_text("raise SystemExit('imported')\n")
    assert Kinds.load(tmp_path).all[0].digest().startswith("sha256:")


def test_the_digest_depends_on_content_alone(tmp_path):
    write(tmp_path / "one")
    before = Kinds.load(tmp_path / "one").all[0].digest()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    folder = tmp_path / "two" / "lightgbm"
    for ignored in ("README.md", "__pycache__/service.cpython-311.pyc", "model/files/m.txt", ".hidden"):
        path = folder / ignored
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("anything")
    assert Kinds.load(tmp_path / "two").all[0].digest() == before


@pytest.mark.parametrize(
    "name", ["lightgbm/service.py", "lightgbm/new.py", "serving/__init__.py", "lightgbm/kind.toml"]
)
def test_the_digest_changes_with_the_kinds_files_and_those_of_its_packages(tmp_path, name):
    write(tmp_path)
    before = Kinds.load(tmp_path).all[0].digest()
    with (tmp_path / name).open("a") as out:
        out.write("# more\n")
    assert Kinds.load(tmp_path).all[0].digest() != before


def test_a_kind_with_a_link_or_a_missing_package_has_no_digest(tmp_path):
    folder = write(tmp_path)
    (folder / "link").symlink_to("/etc/passwd")
    with pytest.raises(InfrastructureError, match="no regular file"):
        Kinds.load(tmp_path).all[0].digest()
    (folder / "link").unlink()
    shutil.rmtree(tmp_path / "serving")
    with pytest.raises(InfrastructureError, match=r"bentos\.serving"):
        Kinds.load(tmp_path).all[0].digest()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('name = "lightgbm"', 'name = "other"'),
        ('name = "lightgbm"', ""),
        ('name = "lightgbm"', 'name = "lightgbm"\nextra = 1'),
        ("generic = true", 'generic = "yes"'),
        ('["lightgbm-text"]', "[]"),
        ('["lightgbm-text"]', '"lightgbm-text"'),
        ('"service:LightGBM"', '"service.py; rm -rf /"'),
        ('["bentos.serving"]', '["../registry"]'),
        ('"cpu"', '"abacus"'),
        ('"/predict"', '"predict"'),
        ('"512Mi"', '"512"'),
        ("python =", "python"),
    ],
)
def test_a_malformed_kind_is_told(tmp_path, old, new):
    write(tmp_path, toml=TOML.replace(old, new))
    with pytest.raises(InfrastructureError) as error:
        Kinds.load(tmp_path)
    assert error.value.code == "bad_kind"
    assert "lightgbm" in error.value.detail


def test_two_generic_kinds_may_not_claim_one_format(tmp_path):
    write(tmp_path)
    write(tmp_path, "other", TOML.replace('"lightgbm"', '"other"'))
    with pytest.raises(InfrastructureError, match="claims too"):
        Kinds.load(tmp_path)


def test_the_kinds_of_this_house_are_well_formed():
    kinds = Kinds.load(BENTOS)
    for kind in kinds.all:
        assert set(kind.formats) <= set(FORMATS), kind.name
        assert kind.digest() == kind.digest()
