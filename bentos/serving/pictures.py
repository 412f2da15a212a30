"""Pictures as they come in from anywhere: checked before they are decoded, and seen as a person would see them.

Colour profiles are not applied: what they change is less than what differs between two cameras.
"""

from __future__ import annotations

import binascii
import struct
import threading
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from io import BytesIO
from typing import TYPE_CHECKING, Any

from bentos.serving.problems import Problem

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

PICTURE = "picture"
"""The field of a request."""
MAX_PIXELS = 50_000_000
MAX_BYTES = 20 << 20
_MAX_WEBP_PIXELS = 25_000_000
"""Its decoder takes four times the memory that others take."""
_MAX_SCANNED = 2_000_000_000
"""Pixels times scans of a progressive JPEG; one made to keep a decoder busy has thousands of scans."""

_ALONE_PIXELS = 500_000
_alone = threading.Lock()
"""Larger pictures are decoded one after the other: each may take 400 MB for a second."""

_STRIP = 256
"""Rows that are converted at once, so that a large picture is not there twice."""

_SEND = "send a JPEG, PNG or WebP picture"
_ORIENTATION = 0x0112
_OTHER_FORMATS = (
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "TIFF"),
    (0, b"MM\0+", "TIFF"),
    (0, b"%PDF", "PDF"),
    (0, b"8BPS", "Photoshop"),
    (0, b"\0\0\1\0", "icon"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (4, b"ftypheic", "HEIC"),
    (4, b"ftypheix", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftyp", "video"),
    (0, b"\x1aE\xdf\xa3", "video"),
)


def from_base64(text: Any, field: str = PICTURE) -> bytes:
    """The bytes behind base64 text, which may be a data URL or broken into lines. Raises Problem `invalid_base64`."""
    if not isinstance(text, str):
        raise Problem("invalid_field", f"{field} is not text in base64", field=field, hint=f"{_SEND} in base64")
    if text.startswith("data:"):
        _, _, text = text.partition(",")
    if len(text) > MAX_BYTES * 2:
        raise _too_many_bytes(len(text) * 3 // 4, field)
    try:
        data = text.encode("ascii").translate(None, b" \t\r\n")
        return binascii.a2b_base64(data, strict_mode=True)
    except ValueError as error:  # binascii.Error and UnicodeEncodeError are of it
        hint = f"{_SEND} in base64 (the standard alphabet, with padding), as multipart/form-data, or as the body itself"
        raise Problem("invalid_base64", f"{field} is not base64: {error}", field=field, hint=hint) from error


def given(fields: Mapping[str, Any], field: str = PICTURE) -> bytes:
    """The picture's bytes from the fields of an Upload, however it was sent. Raises Problem."""
    value = fields.get(field)
    if value is None:
        hint = f"{_SEND}: as the file field {field} of multipart/form-data, in base64 in JSON, or as the body itself"
        raise Problem("missing_field", f"{field} is missing", field=field, hint=hint)
    return value if isinstance(value, bytes) else from_base64(value, field)


def decode(data: bytes, field: str = PICTURE, least: int | None = None) -> Image.Image:
    """The picture as RGB, upright by its EXIF orientation, over white where it is transparent.

    JPEG, PNG and WebP are told by their content. Grey, palette, CMYK and 16-bit pictures become what they look like.
    `least`: sides of this length are enough, which saves time and memory with large pictures.
    Raises Problem: not_a_picture, unsupported_picture, truncated_picture, picture_too_large, animated_picture.
    """
    kind = _format(data, field)
    if len(data) > MAX_BYTES:
        raise _too_many_bytes(len(data), field)
    from PIL import Image

    try:
        if kind == "WEBP":  # its decoder takes memory for the whole picture when it is opened
            _check_size(_webp_size(data) or (1, 1), field, _MAX_WEBP_PIXELS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that is odd, and of sizes that are checked below
            image = Image.open(BytesIO(data), formats=[kind])
            _check_size(image.size, field)
            if kind != "JPEG" and getattr(image, "is_animated", False):
                detail = f"{field} is animated: it has {getattr(image, 'n_frames', 2)} frames"
                raise Problem("animated_picture", detail, field=field, hint="send one frame of it")
            pixels = image.width * image.height
            if kind == "JPEG":
                _check_scans(data, pixels, field)
            with _alone if pixels > _ALONE_PIXELS else nullcontext():
                if least is not None and kind == "JPEG":
                    image.draft(None, (least, least))
                image.load()
                return _upright(_rgb(image, least), _orientation(image))
    except Problem:
        raise
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(str(error), field) from error
    except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error on what is broken
        detail = f"{field} starts as a {kind} picture but cannot be read to its end: {error}"
        raise Problem("truncated_picture", detail, field=field, hint="send the whole file as it is") from error


def array(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    """The picture as [height, width, 3], stretched to these sides: nothing at its edges is lost.

    The filter (bicubic) looks at all pixels, so that fine patterns do not turn into coarse ones.
    """
    import numpy as np
    from PIL import Image

    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return np.asarray(image, dtype=np.uint8)


def read(data: bytes, height: int, width: int, field: str = PICTURE) -> NDArray[np.uint8]:
    """`array` of `decode`: [height, width, 3] from a file's bytes. Raises Problem."""
    return array(decode(data, field, least=3 * max(height, width)), height, width)


def _format(data: bytes, field: str) -> str:
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    for offset, mark, name in _OTHER_FORMATS:
        if data.startswith(mark, offset):
            raise Problem("unsupported_picture", f"{field} is a {name} file", field=field, hint=_SEND)
    if b"<svg" in data[:1000].lower():
        raise Problem("unsupported_picture", f"{field} is an SVG drawing", field=field, hint=_SEND)
    detail = f"{field} is empty" if not data else f"{field} does not start as a JPEG, PNG or WebP picture does"
    raise Problem("not_a_picture", detail, field=field, hint=_SEND)


def _check_size(size: tuple[int, int], field: str, most: int = MAX_PIXELS) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ValueError("a side has no pixels")
    if width * height > most:
        raise _too_many_pixels(f"{width} × {height} pixels", field, most)


def _check_scans(data: bytes, pixels: int, field: str) -> None:
    scans = data.count(b"\xff\xda")
    if scans > 1 and scans * pixels > _MAX_SCANNED:
        detail = f"{field} is a progressive JPEG of {scans} scans over {pixels} pixels, which takes too long to read"
        raise Problem("picture_too_large", detail, field=field, hint="save it again as a plain JPEG")


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height from the header (RFC 9649), without decoding; None where the header is cut off."""
    chunk, head = data[12:16], data[20:30]
    if len(head) < 10:
        return None
    if chunk == b"VP8X":
        return int.from_bytes(head[4:7], "little") + 1, int.from_bytes(head[7:10], "little") + 1
    if chunk == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack("<HH", head[6:10])
    return width & 0x3FFF, height & 0x3FFF


def _orientation(image: Image.Image) -> int:
    """1 to 8 (EXIF 2.3, §4.6.4); 1 where there is none, or none that makes sense."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # whatever broken metadata raises: people see such a picture as it is stored
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    from PIL import Image

    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image, least: int | None) -> Image.Image:
    """As RGB, with sides of at least `least` where that makes it smaller."""
    from PIL import Image

    across, down = (max(1, side // least) if least else 1 for side in image.size)
    if across == down == 1 and image.mode == "RGB" and "transparency" not in image.info:
        return image
    width, height = image.size
    rows = down * max(1, _STRIP // down)
    seen = Image.new("RGB", (-(-width // across), -(-height // down)))
    for top in range(0, height, rows):
        strip = _over_white(image.crop((0, top, width, min(top + rows, height))))
        seen.paste(strip.reduce((across, down)), (0, top // down))
    return seen


def _over_white(image: Image.Image) -> Image.Image:
    from PIL import Image

    transparent = image.info.get("transparency")
    if image.mode.startswith("I"):  # 16 bits of grey: Pillow's own conversion would cut off all that is above 255
        import numpy as np

        values = np.asarray(image)
        grey = Image.fromarray((values >> 8).astype(np.uint8))
        if isinstance(transparent, int):
            grey.paste(255, mask=Image.fromarray(values == transparent))
        return grey.convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or transparent is not None:
        seen = image.convert("RGBA")
        white = Image.new("RGB", seen.size, (255, 255, 255))
        white.paste(seen, mask=seen.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _too_many_pixels(said: str, field: str, most: int = MAX_PIXELS) -> Problem:
    detail = f"{field} is too large: {said}; at most {most // 1_000_000} million pixels are read"
    return Problem("picture_too_large", detail, field=field, hint="scale it down before sending it")


def _too_many_bytes(size: int, field: str) -> Problem:
    detail = f"{field} has {size} bytes; at most {MAX_BYTES} are read"
    return Problem("picture_too_large", detail, field=field, hint="scale it down before sending it", status=413)
