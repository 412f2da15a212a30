"""Files of rows that a user has: JSON, JSON lines or CSV, as request bodies."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

from ekiben._errors import UsageError


def sample(path: Path) -> tuple[Any, Any]:
    """(request body, expected body or None) of a file."""
    return split(parse(read(path, "sample"), path.suffix.lower(), str(path), "sample"))


def split(value: Any) -> tuple[Any, Any]:
    """(request body, expected body or None): what holds `outputs` beside its `inputs` gives both; rows are `inputs`."""
    if isinstance(value, dict) and "inputs" in value and "outputs" in value:
        rest = {name: item for name, item in value.items() if name != "outputs"}
        return rest, {"outputs": value["outputs"]}
    return {"inputs": value} if isinstance(value, list) else value, None


def expected(path: Path) -> Any:
    value = parse(read(path, "expected"), path.suffix.lower(), str(path), "expected")
    if isinstance(value, list):
        # A CSV with one column is a list of values, one with several a list of rows.
        if path.suffix.lower() == ".csv" and value and all(isinstance(row, dict) and len(row) == 1 for row in value):
            value = [next(iter(row.values())) for row in value]
        return {"outputs": value}
    return value


def read(path: Path, field: str | None = None) -> bytes:
    """A file's bytes, of standard input for `-`."""
    if str(path) == "-":
        return sys.stdin.buffer.read()
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}", code="no_such_file", field=field, hint="check the path") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", code="unreadable", field=field) from None


def parse(content: bytes, suffix: str, place: str, field: str | None = None) -> Any:
    """JSON, or by the suffix JSON lines (.jsonl, .ndjson) and CSV with a header line (.csv)."""
    try:
        text = content.decode("utf-8-sig")
        if suffix == ".csv":
            return _csv(text)
        if suffix in (".jsonl", ".ndjson"):
            return [_json(line) for line in text.splitlines() if line.strip()]
        return _json(text)
    except (ValueError, csv.Error) as error:
        form = "CSV" if suffix == ".csv" else "JSON"
        raise UsageError(
            f"{place} is not {form}: {error}", code="bad_json", field=field, hint='like {"inputs": [{"age": 31}]}'
        ) from None


def _json(text: str) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON; write null for a missing value")

    return json.loads(text, parse_constant=refuse)


def _csv(text: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text), restkey="", strict=True)
    lines = []
    for row in reader:
        if "" in row or None in row.values():
            raise ValueError(f"line {reader.line_num} has not as many fields as the header")
        lines.append({name: _number(value) for name, value in row.items()})
    return lines


def _number(text: str) -> Any:
    """A number where the text is one as a program writes it; `007`, a postcode, stays text; nothing is missing."""
    if text == "":
        return None
    try:
        value = float(text)
    except ValueError:
        return text
    digits = text.lstrip("+-")
    if value != value or value in (float("inf"), float("-inf")):
        return None if digits.lower() == "nan" else text
    if "_" in text or text != text.strip() or (digits[:1] == "0" and digits[1:2].isdigit()):
        return text
    return int(text) if digits.isdecimal() else value
