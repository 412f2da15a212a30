"""safetensors: a JSON header that says where each tensor lies, then the tensors (huggingface/safetensors, README)."""

from __future__ import annotations

import math

from registry.formats import bounded_json
from registry.formats.upload import Recognised, Upload, invalid, read_up_to, truncated

FORMAT = "safetensors"
_SAVE = "safetensors.torch.save_file(tensors, 'model.safetensors')"
_LARGEST_HEADER = 100_000_000  # the format's own bound
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
         "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
         "C64": 64}  # fmt: skip


def recognise(upload: Upload, path: str) -> Recognised | None:
    """The tensors in a file, None if the file is no safetensors. UserError where it is one and is not whole."""
    size = upload.sizes[path]
    head = upload.head(path, 9)
    if len(head) < 9 or head[8:9] != b"{":
        return None
    length = int.from_bytes(head[:8], "little")
    if not 2 <= length <= _LARGEST_HEADER:
        return None
    if 8 + length > size:
        # eight bytes of any file may look like a length: only a well-begun header is one
        if upload.head(path, 64)[8:].startswith((b'{"', b"{}", b'{ "')):
            truncated(path, "it ends within its header", _SAVE)
        return None
    with upload.open(path) as stream:
        raw = read_up_to(stream, 8 + length)[8:]
    try:
        header = bounded_json.loads(raw, "its header", pairs=_no_duplicates)
    except (ValueError, RecursionError):
        return None
    if not isinstance(header, dict):
        return None
    header.pop("__metadata__", None)
    spans = []
    for entry in header.values():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            return None
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or not _numbers(shape) or not _numbers(offsets) or len(offsets) != 2:
            invalid(path, "a tensor of its header is not as it should be", _SAVE)
        if dtype in _BITS and (offsets[1] - offsets[0]) * 8 != math.prod(shape) * _BITS[dtype]:
            invalid(path, "the size of a tensor does not fit its shape", _SAVE)
        spans.append((offsets[0], offsets[1]))
    end = 0
    for start, stop in sorted(spans):
        if start != end or stop < start:
            invalid(path, "its tensors overlap or leave holes", _SAVE)
        end = stop
    if 8 + length + end > size:
        truncated(path, f"it has {size} of {8 + length + end} bytes", _SAVE)
    if 8 + length + end < size:
        invalid(path, "something follows its tensors", _SAVE)
    return Recognised(FORMAT, path, signature=None, notes=(f"Holds {len(spans)} tensors.",))


def _numbers(value: object) -> bool:
    return (
        isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 60 for item in value) and len(value) < 65
    )


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    body = dict(pairs)
    if len(body) != len(pairs):
        raise ValueError("a key is there twice")
    return body
