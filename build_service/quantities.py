"""Kubernetes' notation of amounts: `500m` of a CPU, `2Gi` of memory."""

from __future__ import annotations

import re

_MEMORY = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<unit>Ki|Mi|Gi|Ti|k|M|G|T)?")
_CPU = re.compile(r"\d+(\.\d+)?|\d+m")
_UNITS = {None: 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_memory(text: str) -> int:
    """Bytes; ValueError for what is no amount of memory."""
    found = _MEMORY.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no amount of memory: use for instance 512Mi or 2Gi")
    return int(float(found["number"]) * _UNITS[found["unit"]])


def check_cpu(text: str) -> str:
    """The same text; ValueError for what is no amount of CPU."""
    if _CPU.fullmatch(text) is None:
        raise ValueError(f"{text!r} is no amount of CPU: use for instance 500m or 2")
    return text
