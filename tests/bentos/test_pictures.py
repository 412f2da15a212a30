"""Pictures from anywhere: seen as a person would see them, or refused with a reason; in three ways, by one service."""

from __future__ import annotations

import base64
import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bentoml
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

from bentos import serving
from bentos.serving import Problem, pictures
from bentos.serving.bodies import check_names, respond, whole_number
from bentos.serving.uploads import Upload

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def scene(width: int = 60, height: int = 40) -> Image.Image:
    """Red above on the left, green above on the right, blue below."""
    image = Image.new("RGB", (width, height), BLUE)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    return image


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    w, h = image.size
    return [image.getpixel(at) for at in ((3, 3), (w - 4, 3), (3, h - 4), (w - 4, h - 4))]  # type: ignore[misc]


def near(found: Any, wanted: Any, by: float = 30) -> bool:
    return bool((np.abs(np.array(found, float) - np.array(wanted, float)) <= by).all())


def refused(data: bytes) -> Problem:
    with pytest.raises(Problem) as raised:
        pictures.decode(data)
    assert raised.value.field == "picture"
    assert raised.value.hint
    return raised.value


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG by hand, for what Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + body + chunk(b"IEND", b"")


# what is seen


@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("JPEG", {"quality": 95}), ("WEBP", {"lossless": True})])
def test_the_three_formats_look_alike(format: str, options: dict[str, Any]) -> None:
    image = pictures.decode(saved(scene(), format, **options))
    assert (image.mode, image.size) == ("RGB", (60, 40))
    assert near(corners(image), [RED, GREEN, BLUE, BLUE])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_upright_whatever_way_the_camera_was_held(format: str, orientation: int) -> None:
    undo = {  # how the sensor saw the scene, by EXIF 2.3 §4.6.4
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = scene().transpose(undo[orientation]) if orientation > 1 else scene()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = pictures.decode(saved(stored, format, exif=exif, quality=95))
    assert image.size == (60, 40)
    assert near(corners(image), [RED, GREEN, BLUE, BLUE])


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_broken_metadata_does_not_matter(exif: bytes) -> None:
    assert near(corners(pictures.decode(saved(scene(), "JPEG", exif=exif))), [RED, GREEN, BLUE, BLUE], 60)


def test_grey_cmyk_and_palette_become_what_they_look_like() -> None:
    grey = Image.new("L", (20, 20), 100)
    assert pictures.decode(saved(grey)).getpixel((5, 5)) == (100, 100, 100)
    assert near(pictures.decode(saved(grey, "JPEG")).getpixel((5, 5)), (100,) * 3, 3)
    cmyk = scene().convert("CMYK")
    assert near(corners(pictures.decode(saved(cmyk, "JPEG", quality=95))), [RED, GREEN, BLUE, BLUE])
    palette = scene().quantize(8)
    assert near(corners(pictures.decode(saved(palette))), [RED, GREEN, BLUE, BLUE])
    assert pictures.decode(saved(Image.new("1", (20, 20), 1))).getpixel((5, 5)) == WHITE


def test_sixteen_bits_keep_their_brightness() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None, :].repeat(4, axis=0)
    seen = np.asarray(pictures.decode(saved(Image.fromarray(ramp))))
    assert np.abs(seen[0, :, 0].astype(int) - np.arange(256)).max() <= 1
    rows = b"".join(b"\0" + struct.pack(">HHH", 65535, 32768, 0) * 8 for _ in range(8))
    assert near(pictures.decode(png(8, 8, 16, 2, rows)).getpixel((3, 3)), (255, 128, 0), 1)
    transparent = struct.pack(">I", 2) + b"tRNS" + b"\0\x10" + struct.pack(">I", zlib.crc32(b"tRNS\0\x10"))
    rows = (b"\0" + b"\0\x10" * 4 + b"\0\x20" * 4) * 8
    seen = np.asarray(pictures.decode(png(8, 8, 16, 0, rows, transparent)))
    assert (seen[0, 0].tolist(), seen[0, 7].tolist()) == ([255] * 3, [0] * 3)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_transparency_is_seen_over_white(format: str) -> None:
    image = scene().convert("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    image.paste((255, 0, 0, 128), (0, 0, 30, 20))
    seen = pictures.decode(saved(image, format, lossless=True))
    assert near(corners(seen), [(255, 127, 127), WHITE, WHITE, WHITE], 3)


def test_transparency_of_a_palette_and_of_grey_is_seen_over_white() -> None:
    palette = Image.new("P", (20, 20), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert pictures.decode(saved(palette, transparency=0)).getpixel((5, 5)) == WHITE
    assert pictures.decode(saved(Image.new("L", (20, 20), 7), transparency=7)).getpixel((5, 5)) == WHITE
    assert pictures.decode(saved(Image.new("LA", (20, 20), (0, 0)))).getpixel((5, 5)) == WHITE


def test_a_phones_two_pictures_in_one_jpeg_are_its_first() -> None:
    data = saved(scene(), "MPO", save_all=True, append_images=[Image.new("RGB", (60, 40))], quality=95)
    assert near(corners(pictures.decode(data)), [RED, GREEN, BLUE, BLUE])


def test_an_array_has_the_asked_sides_and_loses_no_edge() -> None:
    found = pictures.array(scene(600, 200), 32, 48)
    assert (found.shape, found.dtype) == ((32, 48, 3), np.dtype(np.uint8))
    assert near([found[0, 0], found[0, -1], found[-1, 0], found[-1, -1]], [RED, GREEN, BLUE, BLUE], 5)


def test_fine_patterns_do_not_turn_into_coarse_ones() -> None:
    board = (np.indices((640, 640)).sum(axis=0) % 2 * 255).astype(np.uint8)
    assert near(pictures.array(Image.fromarray(board).convert("RGB"), 32, 32), 127, 4)


def test_a_large_jpeg_read_at_a_smaller_scale_looks_the_same() -> None:
    data = saved(scene(3000, 2000), "JPEG", quality=95)
    assert pictures.decode(data, least=96).size < (1000, 1000)
    full = pictures.array(pictures.decode(data), 32, 32)
    assert near(pictures.read(data, 32, 32), full, 12)


# what is refused


OTHERS = {
    "GIF": saved(scene(), "GIF"),
    "BMP": saved(scene(), "BMP"),
    "TIFF": saved(scene(), "TIFF"),
    "PDF": b"%PDF-1.7\n",
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0",
    "AVIF": b"\0\0\0\x1cftypavif\0\0\0\0",
    "SVG": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
    "video": b"\0\0\0\x18ftypisom\0\0\0\0",
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_format_is_refused_by_its_name(name: str) -> None:
    problem = refused(OTHERS[name])
    assert problem.code == "unsupported_picture"
    assert name in problem.detail


@pytest.mark.parametrize("data", [b"", b"hello", b"PK\x03\x04", b"\xff\xd8", b"<html>", bytes(1000)])
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    assert refused(data).code == "not_a_picture"


def _noise(side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("part", [0.05, 0.3, 0.6, 0.9])
def test_a_picture_that_is_cut_off_is_refused(format: str, part: float) -> None:
    data = saved(_noise(), format)
    assert refused(data[: int(len(data) * part)]).code == "truncated_picture"


def test_a_changed_byte_in_a_png_is_noticed() -> None:
    data = bytearray(saved(_noise()))
    data[len(data) // 2] ^= 1
    assert refused(bytes(data)).code == "truncated_picture"


BOMBS = {
    "png of 100 megapixels": lambda: png(10_000, 10_000, 1, 0, (b"\0" + bytes(1250)) * 10_000),
    "png of 2 gigapixels": lambda: png(50_000, 40_000, 8, 2, bytes(1000)),
    "png of the largest sides": lambda: png(2**31 - 1, 2**31 - 1, 8, 2, b""),
    "jpeg of 100 megapixels": lambda: _resized_jpeg(10_000, 10_000),
    "jpeg of the largest sides": lambda: _resized_jpeg(65_500, 65_500),
    "webp of 100 megapixels": lambda: _resized_webp(b"VP8X", 10_000, 10_000),
    "webp of the largest sides": lambda: _resized_webp(b"VP8X", 16_384, 16_384),
    "lossy webp": lambda: _resized_webp(b"VP8 ", 16_383, 16_383),
    "lossless webp": lambda: _resized_webp(b"VP8L", 16_384, 16_384),
}


def _resized_jpeg(width: int, height: int) -> bytes:
    data = bytearray(saved(scene(), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize(("width", "height"), [(0, 10), (10, 0), (0, 0)])
def test_a_webp_with_an_empty_side_is_a_problem(width: int, height: int) -> None:
    with pytest.raises(Problem) as raised:
        pictures.read(_resized_webp(b"VP8 ", width, height), 8, 8)
    assert (raised.value.code, raised.value.field) == ("truncated_picture", "picture")


def _resized_webp(chunk: bytes, width: int, height: int) -> bytes:
    image = scene()
    if chunk == b"VP8X":
        image.putalpha(100)
    data = bytearray(saved(image, "WEBP", lossless=chunk == b"VP8L"))
    assert data[12:16] == chunk
    if chunk == b"VP8X":
        data[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif chunk == b"VP8L":
        data[21:25] = ((width - 1) | (height - 1) << 14).to_bytes(4, "little")
    else:
        data[26:30] = struct.pack("<HH", width, height)
    return bytes(data)


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_by_its_header(name: str) -> None:
    data = BOMBS[name]()
    assert len(data) < 100_000
    problem = refused(data)
    assert problem.code == "picture_too_large"
    assert "million pixels" in problem.detail


def test_the_largest_picture_is_read() -> None:
    data = png(10_000, 5_000, 1, 0, (b"\0" + b"\xff" * 1250) * 5_000)
    assert pictures.read(data, 8, 8).min() >= 254


_PEAK = """
import resource, sys
from bentos.serving import pictures
import numpy, PIL.Image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    with open(path, "rb") as stream:
        assert pictures.read(stream.read(), 32, 32).max() == 0, path
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the size is given in other units")
def test_the_largest_pictures_do_not_take_the_memory_of_a_pod(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    row = b"\0" + (b"\0" * 6 + b"\xff\xff") * 10_000
    files = {
        "rgba16.png": png(10_000, 5_000, 16, 6, row * 5_000),
        "grey16.png": png(10_000, 5_000, 16, 0, (b"\0" + bytes(20_000)) * 5_000),
        "turned.png": saved(Image.new("P", (10_000, 5_000)), exif=exif),
        "scans.jpg": saved(Image.new("RGB", (10_000, 5_000)), "JPEG", progressive=True, subsampling=0, exif=exif),
        "canvas.webp": saved(Image.new("RGB", (6_000, 4_000)), "WEBP", method=0, exif=exif),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    command = [sys.executable, "-c", _PEAK, *(str(tmp_path / name) for name in files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 450  # MB


def test_pictures_read_small_look_as_they_do_in_full() -> None:
    image = scene(1000, 700).convert("RGBA")
    image.paste((0, 0, 0, 0), (400, 250, 600, 450))
    exif = Image.Exif()
    exif[0x0112] = 8
    for options in ({}, {"exif": exif}):
        for each in (image, image.convert("LA"), image.convert("RGB").quantize(16), image.convert("L")):
            data = saved(each, "PNG", **options)
            full = pictures.array(pictures.decode(data), 20, 30)
            assert near(pictures.read(data, 20, 30), full, 12)


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    data = saved(Image.new("RGB", (4000, 4000)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    assert pictures.decode(data).size == (4000, 4000)
    problem = refused(data[:-2] + last * 5000 + b"\xff\xd9")
    assert problem.code == "picture_too_large"
    assert "scans" in problem.detail


def test_a_text_chunk_that_unpacks_to_megabytes_is_no_way_in() -> None:
    text = b"Comment\0\0" + zlib.compress(bytes(200 << 20), 9)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    rows = (b"\0" + bytes(8)) * 8
    assert refused(png(8, 8, 8, 0, rows, chunk)).code == "truncated_picture"


def test_too_many_bytes_are_refused() -> None:
    problem = refused(saved(scene()) + bytes(pictures.MAX_BYTES))
    assert (problem.code, problem.status) == ("picture_too_large", 413)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_an_animation_is_refused(format: str) -> None:
    frames = [scene(), Image.new("RGB", (60, 40))]
    data = saved(frames[0], format, save_all=True, append_images=frames[1:], duration=100)
    problem = refused(data)
    assert problem.code == "animated_picture"
    assert "2 frames" in problem.detail


STARTS = [saved(scene(), f) for f in ("JPEG", "PNG", "WEBP")] + [
    saved(scene(), "JPEG", progressive=True),
    saved(scene().quantize(8), transparency=1),
    saved(scene(), "PNG", save_all=True, append_images=[Image.new("RGB", (60, 40))]),
    saved(Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64))),
]
changes = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=8)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(STARTS), changes, st.integers(0, 6000), st.binary(max_size=20))
def test_whatever_is_broken_is_a_picture_or_a_problem(
    start: bytes, changed: list[tuple[int, int]], length: int, tail: bytes
) -> None:
    data = bytearray(start[:length] + tail)
    for at, value in changed:
        if at < len(data):
            data[at] = value
    told: Problem | None = None
    try:
        assert pictures.read(bytes(data), 8, 8).shape == (8, 8, 3)
    except Problem as problem:
        told = problem
    assert told is None or (told.field == "picture" and told.status in (413, 422))


@given(st.binary(max_size=200))
def test_base64_gives_back_the_bytes(data: bytes) -> None:
    text = base64.b64encode(data).decode()
    lines = base64.encodebytes(data).decode().replace("\n", "\r\n")
    assert pictures.from_base64(text) == data
    assert pictures.from_base64(lines) == data
    assert pictures.from_base64(f"data:image/png;base64,{text}") == data


@pytest.mark.parametrize("text", ["a", "ab=", "a-_b", "äöü=", "YWJj?", None, 7, ["YWJj"]])
def test_what_is_no_base64_is_refused(text: Any) -> None:
    with pytest.raises(Problem) as raised:
        pictures.from_base64(text, "pictures[3]")
    assert raised.value.field == "pictures[3]"
    assert raised.value.code == ("invalid_base64" if isinstance(text, str) else "invalid_field")


# the three ways


@serving.offer
@bentoml.service(name="looker", metrics={"enabled": False})
class Looker:
    """Tells the sides and the colour of a picture, `times` times."""

    def __init__(self) -> None:
        schema = {"picture": {"type": "string"}, "times": {"type": "integer"}}
        self.about = serving.About(kind="looker", input={"type": "object", "properties": schema})

    @bentoml.api(route="/predict")
    async def predict(self, upload: Upload, /) -> dict[str, Any]:
        return await respond(self._look(upload))  # type: ignore[no-any-return]

    async def _look(self, upload: Upload) -> dict[str, Any]:
        fields = upload.fields()
        check_names(fields, ("picture", "times"))
        image = pictures.decode(pictures.given(fields))
        times = whole_number(fields, "times", 1, 1, 9)
        return {"size": list(image.size), "colours": [list(image.getpixel((0, 0)))] * times}  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(Looker.to_asgi(), raise_server_exceptions=False) as client:
        yield client


PICTURE = saved(scene())
SEEN = {"size": [60, 40], "colours": [list(RED)] * 2}


def _problem(response: Any, status: int, code: str, field: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert (problem["code"], problem["field"]) == (code, field)
    assert problem["hint"]


def test_all_three_ways_give_the_same_answer(client: TestClient) -> None:
    form = client.post("/predict", files={"picture": ("a.png", PICTURE)}, data={"times": "2"})
    assert (form.status_code, form.json()) == (200, SEEN)
    assert client.post("/predict", json={"picture": base64.b64encode(PICTURE).decode(), "times": 2}).json() == SEEN
    for media_type in ("image/png", "image/jpeg", "IMAGE/WEBP", "application/octet-stream"):
        raw = client.post("/predict?times=2", content=PICTURE, headers={"content-type": media_type})
        assert raw.json() == SEEN
    text = client.post("/predict", files={"picture": (None, base64.b64encode(PICTURE).decode())}, data={"times": "2"})
    assert text.json() == SEEN


def test_a_large_file_in_a_form_is_whole(client: TestClient) -> None:
    data = saved(_noise(1200))
    assert len(data) > 4 << 20
    found = client.post("/predict", files={"picture": ("a.png", data, "image/png")}).json()
    assert found["colours"] == [list(_noise(1200).getpixel((0, 0)))]  # type: ignore[arg-type]


def test_what_is_missing_or_unknown_is_named_in_every_way(client: TestClient) -> None:
    _problem(client.post("/predict", json={}), 422, "missing_field", "picture")
    _problem(client.post("/predict", content=b""), 422, "missing_field", "picture")
    _problem(client.post("/predict", files={"image": ("a.png", PICTURE)}), 422, "unknown_field", "image")
    _problem(client.post("/predict", files={"times": (None, "2")}), 422, "missing_field", "picture")
    raw = {"content-type": "image/png"}
    _problem(client.post("/predict", content=b"", headers=raw), 422, "missing_field", "picture")
    _problem(client.post("/predict?zoom=2", content=PICTURE, headers=raw), 422, "unknown_field", "zoom")
    for times in ("many", "-1", "10", "1.5", "9" * 5000, "²"):
        answer = client.post("/predict", params={"times": times}, content=PICTURE, headers=raw)
        _problem(answer, 422, "invalid_field", "times")
    for number in (True, 0, 2.0, None, [2], {"a": 1}):
        body = {"picture": base64.b64encode(PICTURE).decode(), "times": number}
        _problem(client.post("/predict", json=body), 422, "invalid_field", "times")


def test_a_form_with_two_pictures_is_refused(client: TestClient) -> None:
    files = [("picture", ("a.png", PICTURE)), ("picture", ("b.png", PICTURE))]
    _problem(client.post("/predict", files=files), 422, "duplicate_field", "picture")


@pytest.mark.parametrize("content", [b"{", b"\xff", b'{"picture": }', b"[" * 100_000, b'{"picture": ' + b"9" * 5000])
def test_json_that_is_none_is_refused(client: TestClient, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    _problem(client.post("/predict", content=content, headers=headers), 400, "invalid_json", "body")


@pytest.mark.parametrize("content", [b"[]", b"null", b'"cat"', b"1"])
def test_json_that_is_no_object_is_refused(client: TestClient, content: bytes) -> None:
    _problem(client.post("/predict", content=content), 422, "invalid_field", "body")


@pytest.mark.parametrize(
    ("media_type", "content"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=", b"x"),
        ("multipart/form-data; boundary=a", b"no form at all"),
        ("multipart/form-data; boundary=a", b"--a\r\nContent-Disposition: form-data\r\n\r\nx\r\n--a--\r\n"),
        ("multipart/form-data; boundary=a; charset=klingon", b"--a\r\nnot a header\r\n\r\nx\r\n--a--\r\n"),
    ],
)
def test_a_form_that_is_none_is_refused(client: TestClient, media_type: str, content: bytes) -> None:
    answer = client.post("/predict", content=content, headers={"content-type": media_type})
    _problem(answer, 400, "invalid_form", "body")


def test_a_form_of_endless_fields_is_refused(client: TestClient) -> None:
    files = [(f"f{i}", (None, "x")) for i in range(1000)]
    _problem(client.post("/predict", files=files), 400, "invalid_form", "body")


def test_a_form_that_ends_early_has_no_picture(client: TestClient) -> None:
    content = b'--a\r\nContent-Disposition: form-data; name="picture"; filename="a"\r\n\r\n' + PICTURE
    answer = client.post("/predict", content=content, headers={"content-type": "multipart/form-data; boundary=a"})
    assert answer.status_code in (400, 422)
    assert answer.json()["field"] in ("body", "picture")


@pytest.mark.parametrize(
    "media_type", ["text/plain", "application/x-www-form-urlencoded", "application/vnd.bentoml+pickle", "video/mp4"]
)
def test_other_media_types_are_refused_with_what_is_taken(client: TestClient, media_type: str) -> None:
    answer = client.post("/predict", content=PICTURE, headers={"content-type": media_type})
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")
    assert "multipart/form-data" in answer.json()["hint"]


def test_the_document_shows_the_three_ways(client: TestClient) -> None:
    operation = client.get("/docs.json").json()["paths"]["/predict"]["post"]
    content = operation["requestBody"]["content"]
    json_way, form, raw = content["application/json"], content["multipart/form-data"], content["image/jpeg"]
    assert json_way["schema"]["properties"]["picture"] == {"type": "string"}
    assert form["schema"]["properties"]["picture"] == {"type": "string", "format": "binary"}
    assert form["schema"]["properties"]["times"] == {"type": "integer"}
    assert raw["schema"] == {"type": "string", "format": "binary"}
    assert [(p["name"], p["in"]) for p in operation["parameters"]] == [("times", "query")]


def test_a_body_beyond_all_bounds_is_cut_short(client: TestClient) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield bytes(1 << 20)

    answer = client.post("/predict", content=endless(), headers={"content-type": "image/png"})
    _problem(answer, 413, "body_too_large", "body")


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["application/json", "multipart/form-data; boundary=a", "image/png", "multipart/form-data"]),
    st.binary(max_size=300) | st.text(max_size=50).map(lambda t: json.dumps({"picture": t}).encode()),
    st.sampled_from([b"", b'--a\r\nContent-Disposition: form-data; name="picture"; filename="x"\r\n\r\n']),
)
def test_no_body_whatever_is_a_server_error(client: TestClient, media_type: str, content: bytes, head: bytes) -> None:
    answer = client.post("/predict", content=head + content, headers={"content-type": media_type})
    assert answer.status_code in (400, 422), answer.text
    assert answer.json()["field"]
