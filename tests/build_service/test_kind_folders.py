"""A folder of the operator's reaches the models of a kind that reads it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from build_service.settings import Settings
from tests.bentos import kinds

Home = Any  # tests/build_service/conftest.py, which tests cannot import


@pytest.mark.parametrize("named", ["pictures", "/no/such/folder"])
def test_what_is_no_folder_is_told_at_the_start(named: str) -> None:
    with pytest.raises(ValidationError, match="EKIBEN_KIND_FOLDERS"):
        Settings(kind_folders={"cargo": named})


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_a_picture_in_the_operators_store_is_named_by_its_path(home: Home, tmp_path: Path) -> None:
    kind = kinds.found()["cargo"]
    folder = kinds.example(kind.name, tmp_path)
    store = tmp_path / "store" / "today"
    store.mkdir(parents=True)
    picture = next(each for each in sorted((folder.root / "files" / "pictures").rglob("*")) if each.is_file())
    shutil.copy(picture, store / f"hold{picture.suffix}")
    home.start(kind_folders=f'{{"cargo": "{store.parent}"}}')
    with home.http(timeout=660) as client:
        uploaded = client.post("/models?wait=600", files=kinds.files(folder), data=kinds.form(kind, folder))
        assert uploaded.json()["state"] == "live", home.log()
        path = f"/inference/{kinds.deployment(kind)}/predict"
        named = client.post(path, json={"image_path": f"today/hold{picture.suffix}"})
        sent = client.post(path, files={"picture": picture.read_bytes()})
        outside = client.post(path, json={"image_path": "../store/today"})
    assert named.json() == sent.json()
    assert named.status_code == 200
    assert (outside.status_code, outside.json()["field"]) == (422, "image_path")
