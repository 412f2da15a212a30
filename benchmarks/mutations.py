"""Damaged copies of a model's files: the same number gives the same bytes on any machine."""

from __future__ import annotations

import io
import json
import random
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

Files = dict[str, bytes]

_INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1)
_TOKENS = (
    b"PK\x05\x06", b"PK\x01\x02", b"PK\x06\x07", b"\x93NUMPY", b"\x80\x04", b"../", b"/etc/passwd", b"\x00", b"NaN",
    b"Infinity", b"1e999", b"-1", b"{", b"}", b"[", b"]", b'"', b"Tree=0\n", b"leaf_value=", b"tree_sizes=", b"\n\n",
    b"os", b"system", b"__loader__", b"ReduceNode", b"FunctionNode", b"Lambda", b"WriteFile", b"ReadFile", b"location",
    b"data_offsets", b"F64", b"\xff\xff\xff\xff\x0f", b"end of trees", b"learner", b"&a [*a]", b"!!python/object:",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1 << 31, 1 << 63, 1e308, "", "x" * 4096, "../../x", [], {}, [[]], "NaN", "1e999", "os.system",
)  # fmt: skip
_DEEP = "[" * 3000 + "]" * 3000


def mutated(files: Mapping[str, bytes], number: int, name: str) -> Files:
    """The files with one to four faults, which `number` and `name` decide."""
    chance = random.Random(f"{name} {number}")
    path = _weighted(files, chance)
    data = files[path]
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        data = chance.choice(_ways(data))(data, chance)
    return {**files, path: data}


def _weighted(files: Mapping[str, bytes], chance: random.Random) -> str:
    """A file: any of them, more often the larger half."""
    paths = sorted(files, key=lambda path: (len(files[path]), path))
    return chance.choice(paths[len(paths) // 2 :] if chance.random() < 0.6 else paths)


def _ways(data: bytes) -> list[Callable[[bytes, random.Random], bytes]]:
    ways: list[Callable[[bytes, random.Random], bytes]] = [_flip, _cut, _splice, _number, _token, _remove]
    if data.startswith(b"PK\x03\x04"):
        ways += [_member] * 4
    if data[:1] in (b"{", b"["):
        ways += [_document] * 3
    return ways


def _flip(data: bytes, chance: random.Random) -> bytes:
    body = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8)) if body else 0):
        body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
    return bytes(body)


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def _splice(data: bytes, chance: random.Random) -> bytes:
    """A piece of the file once more, elsewhere in it."""
    start, at = chance.randrange(len(data) + 1), chance.randrange(len(data) + 1)
    piece = data[start : start + chance.choice((1, 8, 64, 1024))]
    return data[:at] + piece + data[at + chance.choice((0, len(piece))) :]


def _remove(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + data[at + chance.choice((1, 4, 32, 512)) :]


def _number(data: bytes, chance: random.Random) -> bytes:
    """A length or a count that lies: binary of 1 to 8 bytes, or digits."""
    digits = (
        [i for i in range(len(data)) if 48 <= data[i] <= 57] if chance.random() < 0.3 and len(data) < 1 << 20 else []
    )
    value = chance.choice(_INTERESTING)
    if digits:
        at = chance.choice(digits)
        return data[:at] + str(value - chance.choice((0, 1, 2 * value))).encode() + data[at + 1 :]
    at, width = chance.randrange(len(data) + 1), chance.choice((1, 2, 4, 8))
    raw = (value & ((1 << 8 * width) - 1)).to_bytes(width, chance.choice(("little", "big")))
    return data[:at] + raw + data[at + width :]


def _token(data: bytes, chance: random.Random) -> bytes:
    at, token = chance.randrange(len(data) + 1), chance.choice(_TOKENS)
    return data[:at] + token + data[at + chance.choice((0, len(token))) :]


def _member(data: bytes, chance: random.Random) -> bytes:
    """A whole zip again, one of whose members is damaged, gone, there twice or under another name."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as source:
            members = [(info.filename, source.read(info)) for info in source.infolist()]
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        ValueError,
        EOFError,
        OSError,
        struct.error,
        zlib.error,
    ):
        return _flip(data, chance)
    if not members:
        return data
    at = chance.randrange(len(members))
    name, content = members[at]
    what = chance.randrange(8)
    if what == 0:
        del members[at]
    elif what == 1:
        members.insert(chance.randrange(len(members)), (name, content))
    elif what == 2:
        members[at] = (chance.choice((name + "\0", "../" + name, name.upper(), "schema.json", "config.json")), content)
    else:
        members[at] = (name, chance.choice(_ways(content))(content, chance))
    out = io.BytesIO()
    packing = chance.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(out, "w", packing) as target, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that is there twice
        for each, inside in members:
            info = zipfile.ZipInfo(each)
            info.filename = each  # ZipInfo ends a name at its NUL
            target.writestr(info, inside, packing)
    return out.getvalue()


def _document(data: bytes, chance: random.Random) -> bytes:
    """A JSON document with one value changed, gone or swapped for another of its own."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return _flip(data, chance)
    places = _places(body)
    if not places:
        return data
    holder, key = chance.choice(places)
    what = chance.randrange(6)
    if what == 0:
        del holder[key]
    elif what == 1:
        other, there = chance.choice(places)
        holder[key] = json.loads(json.dumps(other[there]))
    elif what == 2 and isinstance(holder[key], list):
        holder[key] = holder[key] * chance.choice((0, 2, 100))
    elif what == 3:
        return json.dumps(body).encode().replace(b"0", _DEEP.encode(), 1)
    elif what == 4 and isinstance(holder[key], int | str):
        holder[key] = str(chance.choice(_INTERESTING))
    else:
        holder[key] = chance.choice(_VALUES)
    return json.dumps(body).encode()


def _places(body: Any) -> list[tuple[Any, Any]]:
    """Each value in the document as its holder and key, at most some thousands."""
    found: list[tuple[Any, Any]] = []
    left = [body]
    while left and len(found) < 5000:
        holder = left.pop()
        pairs = list(holder.items()) if isinstance(holder, dict) else list(enumerate(holder))
        for key, value in pairs[:200]:
            found.append((holder, key))
            if isinstance(value, dict | list):
                left.append(value)
    return found
