"""What the step fetch found out for the steps after it: `plan.json` in its folder.

Read before anything else is imported: most builds have nothing to inspect, and that step is then over at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCHEMA = "ekiben.plan.v1"


def work(env: Mapping[str, str]) -> Path:
    return Path(env.get("EKIBEN_WORK") or "/build")


def file(work: Path) -> Path:
    return work / "fetch" / "plan.json"


def answer(work: Path) -> Path:
    """What the service says of itself, where it is asked."""
    return work / "inspect" / "answer.json"


def nothing_to_inspect(env: Mapping[str, str]) -> bool:
    """Whether the step inspect is over. Anything unusual is for the step itself to tell."""
    place = work(env)
    try:
        plan: Any = json.loads(file(place).read_bytes())
        if plan["schema"] != SCHEMA or plan["inspect"] is not None or os.path.lexists(answer(place)):
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    print(json.dumps({"stage": "inspect", "message": "there is nothing to import"}), flush=True)
    return True
