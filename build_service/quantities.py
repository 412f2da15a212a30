"""Kubernetes' notation of amounts: `500m` of a CPU, `2Gi` of memory."""

from __future__ import annotations

import math
import re
from decimal import Decimal

_MEMORY = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<unit>Ki|Mi|Gi|Ti|k|M|G|T)?")
_CPU = re.compile(r"\d+(\.\d+)?|\d+m")
_AMOUNT = re.compile(r"(?P<number>[+-]?\d+(\.\d*)?([eE][+-]?\d+)?)(?P<unit>[numkMGTPE]|[KMGTPE]i)?")
_UNITS = {None: 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_ALL_UNITS = {unit: Decimal(factor) for unit, factor in _UNITS.items()} | {
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    "P": Decimal(10**15),
    "E": Decimal(10**18),
    "Pi": Decimal(2**50),
    "Ei": Decimal(2**60),
}


def parse_memory(text: str) -> int:
    """Bytes; ValueError for what is no amount of memory."""
    found = _MEMORY.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no amount of memory: use for instance 512Mi or 2Gi")
    return int(float(found["number"]) * _UNITS[found["unit"]])


def memory_limit(kind_memory: str, size: int) -> str:
    """What a model needs when its deployment says nothing: its kind's share, and twice its files of `size` bytes."""
    step, small = 64 * 2**20, 32 * 2**20
    wanted = parse_memory(kind_memory) + 2 * size
    return f"{math.ceil(wanted / step) * 64}Mi" if size > small else kind_memory


def check_cpu(text: str) -> str:
    """The same text; ValueError for what is no amount of CPU."""
    if _CPU.fullmatch(text) is None:
        raise ValueError(f"{text!r} is no amount of CPU: use for instance 500m or 2")
    return text


def parse_amount(text: str) -> Decimal:
    """Any amount that Kubernetes writes, of whatever it is; ValueError for what is none."""
    found = _AMOUNT.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no amount: use for instance 500m, 2 or 2Gi")
    return Decimal(found["number"]) * _ALL_UNITS[found["unit"]]
