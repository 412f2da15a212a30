"""A build's spec: what is not as it should be is named, and a build that only packs imports little."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from builder_image.spec import BadSpec, BuildSpec, BuiltImage, BuiltLayer, Push, plain

WHOLE: dict[str, Any] = {
    "schema": "ekiben.build.v1",
    "work": "/w",
    "result": "/r.json",
    "model": {"dir": "/m"},
    "kind": {"name": "tiny", "dir": "/k"},
    "serving": "/s",
    "cache": {"environments": "/e", "bentos": "/b"},
    "image": {"base": "/base.toml", "push": {"ref": "h:1/x:1"}},
}


def test_a_spec_is_read_with_its_defaults() -> None:
    found = BuildSpec.parse(json.dumps(WHOLE).encode())
    assert found.image is not None
    assert (found.work, found.kind.name, found.allow_code, found.lock) == (Path("/w"), "tiny", False, None)
    assert (found.image.platform, found.image.compression, found.image.output) == ("linux/amd64", "zstd", None)
    assert found.image.push == Push("h:1/x:1", insecure=False, ca=None)
    assert BuildSpec.parse(json.dumps({**WHOLE, "image": None}).encode()).image is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"extra": 1}, "the spec has extra fields: extra"),
        ({"model": {}}, "model.dir is missing"),
        ({"model": {"dir": 3}}, "model.dir must be a text"),
        ({"model": None}, "model must be an object"),
        ({"allow_code": "yes"}, "allow_code must be true or false"),
        ({"allow_code": 1}, "allow_code must be true or false"),
        ({"schema": "ekiben.build.v2"}, "schema is 'ekiben.build.v2', but must be 'ekiben.build.v1'"),
        ({"schema": ["ekiben.build.v1"]}, "schema is"),
        ({"image": {"base": "/b", "compression": "xz"}}, "image.compression is 'xz', but must be 'gzip' or"),
        ({"image": {"base": "/b", "push": {"ref": "x", "cert": ""}}}, "image.push has extra fields: image.push.cert"),
    ],
)
def test_what_is_wrong_in_a_spec_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(BadSpec) as refused:
        BuildSpec.parse(json.dumps({**WHOLE, **change}).encode())
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b'{"schema": '])
def test_what_is_no_spec_at_all_is_refused(data: bytes) -> None:
    with pytest.raises(BadSpec, match="the spec"):
        BuildSpec.parse(data)


def test_a_result_is_json() -> None:
    built = BuiltImage("h/x:1", "sha256:0", 3, (BuiltLayer("model", "sha256:1", 2, True),))
    layer = {"name": "model", "digest": "sha256:1", "size": 2, "reused": True}
    assert plain(built) == {"ref": "h/x:1", "digest": "sha256:0", "size": 3, "layers": [layer]}


def test_a_build_that_only_packs_imports_no_library_that_takes_longer_than_it() -> None:
    heavy = "{'httpx', 'pydantic', 'packaging', 'yaml', 'argparse', 'bentoml', 'urllib.request'}"
    script = f"import sys, builder_image.__main__, builder_image.packing; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
