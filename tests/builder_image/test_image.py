"""Config and manifest: pure functions of base, layers and run."""

from __future__ import annotations

import json
from typing import Any

import pytest

from builder_image import image, layout
from builder_image.image import Platform
from registry.errors import InfrastructureError, UserError


def test_an_image_has_no_digest_before_its_stream_was_read(make_image: Any, tmp_path: Any) -> None:
    draft = make_image()
    assert not draft.is_sealed
    with pytest.raises(InfrastructureError) as early:
        _ = draft.digest
    assert early.value.code == "layer_not_read"
    assert layout.write_layout(draft, tmp_path / "out").digest.startswith("sha256:")


def test_the_config_starts_the_program_as_a_plain_user(make_image: Any, tmp_path: Any) -> None:
    built = layout.write_layout(make_image(env={"A": "1", "PATH": "/app/.venv/bin:/usr/bin"}), tmp_path / "out")
    config = json.loads(built.config_bytes)
    assert config["config"]["User"] == "65532:65532"
    assert config["config"]["Entrypoint"] == ["/app/.venv/bin/python"]
    assert config["config"]["Env"] == ["PATH=/app/.venv/bin:/usr/bin", "A=1"], "laid over the base's"
    assert config["config"]["ExposedPorts"] == {"3000/tcp": {}}
    assert config["config"]["Labels"]["io.ekiben.image-format"] == "1"
    assert config["created"] == "1980-01-02T00:00:00Z"
    assert [entry["created_by"] for entry in config["history"]] == [
        "small",
        "ekiben layer deps",
        "ekiben layer code",
        "ekiben layer model",
    ]
    assert len(config["rootfs"]["diff_ids"]) == 4
    manifest = json.loads(built.manifest_bytes)
    assert manifest["mediaType"] == image.MANIFEST
    assert [item.get("annotations", {}).get(image.LAYER_NAME) for item in manifest["layers"]] == [
        None,
        "deps",
        "code",
        "model",
    ]


@pytest.mark.parametrize("user", ["root", "0", "0:0", "", "bentoml", "00"])
def test_root_and_named_users_are_refused(make_image: Any, user: str) -> None:
    with pytest.raises(UserError) as refused:
        make_image(user=user)
    assert refused.value.code == "root_user"


def test_only_what_changed_changes_its_digest(make_image: Any, make_model: Any, tmp_path: Any) -> None:
    first = layout.write_layout(make_image(make_model(where="a")), tmp_path / "out")
    same = layout.write_layout(make_image(make_model(where="b")), tmp_path / "again")
    other = layout.write_layout(make_image(make_model({"churn.txt": b"other"}, where="c")), tmp_path / "out")
    assert first.digest == same.digest
    assert [a.digest == b.digest for a, b in zip(first.layers, other.layers, strict=True)] == [True, True, True, False]  # type: ignore[union-attr]
    assert first.digest != other.digest


def test_a_base_without_history_gets_one_entry_a_layer(make_image: Any, small_base: Any, tmp_path: Any) -> None:
    bare = image.BaseImage(small_base.digest, small_base.platform, small_base.layers, {"os": "linux"})
    built = layout.write_layout(image.assemble(bare, [], image.Run()), tmp_path / "out")
    assert len(json.loads(built.config_bytes)["history"]) == 1


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("linux/amd64", "linux/amd64"),
        ("linux/x86_64", "linux/amd64"),
        ("linux/arm64/v8", "linux/arm64"),
        ("linux/arm/v7",) * 2,
    ],
)
def test_platforms_have_one_spelling(text: str, name: str) -> None:
    assert str(Platform.parse(text)) == name


@pytest.mark.parametrize("text", ["", "linux", "linux/", "a/b/c/d", "Linux/AMD64"])
def test_what_is_no_platform_is_refused(text: str) -> None:
    with pytest.raises(UserError) as refused:
        Platform.parse(text)
    assert refused.value.code == "bad_platform"


@pytest.mark.parametrize(
    "change",
    [
        lambda m, c: m["layers"].pop(),
        lambda m, c: m["layers"][0].update(digest="sha256:../../x"),
        lambda m, c: m["layers"][0].update(urls=["http://elsewhere"]),
        lambda m, c: m["layers"][0].update(mediaType="text/plain"),
        lambda m, c: m["layers"][0].update(size=-1),
        lambda m, c: c.pop("rootfs"),
        lambda m, c: c.update(os=""),
    ],
)
def test_a_broken_image_is_refused_whole(make_image: Any, tmp_path: Any, change: Any) -> None:
    built = layout.write_layout(make_image(), tmp_path / "out")
    manifest, config = json.loads(built.manifest_bytes), json.loads(built.config_bytes)
    change(manifest, config)
    openers = {item["digest"]: (lambda: iter([])) for item in manifest["layers"]}
    with pytest.raises(UserError) as refused:
        image.read(json.dumps(manifest).encode(), json.dumps(config).encode(), openers)
    assert refused.value.code in ("bad_image", "bad_platform")
