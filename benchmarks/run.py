"""Measure the README's figures and write benchmarks/report.json.

    python -m benchmarks.run [all | build | upload | uploads | serve | models | cluster] [--quick] [--only FIGURE]

A figure that cannot be measured, or fails, gets null and the reason; the others go on. --quick takes small sizes and
one round to see that everything works, and writes benchmarks/scratch/quick/ in place of the report. The figures of a
cluster and of models are not among `all`; --only models.KIND means all figures of one kind.
"""

from __future__ import annotations

import argparse
import datetime
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from types import FrameType

from benchmarks import build, cluster, crowd, digests, fuzz, hostile_uploads, kinds, layers, neighbours, serve, upload
from benchmarks.figures import RAW, REPORT, Absent, Figure, Measured, entry, merge, write_raw
from benchmarks.parts import WORK, Bench

Measure = Callable[[Bench], Measured]

# verb → family (a file of raw values each) → its figures; the order is the report's
VERBS: dict[str, dict[str, dict[Figure, Measure]]] = {
    "build": {"build": build.FIGURES, "layers": layers.FIGURES, "digests": digests.FIGURES},
    "upload": {"upload": upload.FIGURES},
    "uploads": {
        "hostile_uploads": hostile_uploads.FIGURES,
        "neighbours": neighbours.FIGURES,
        "fuzz": fuzz.FIGURES,
    },
    "serve": {"serve": serve.FIGURES},
    "models": {"models": kinds.FIGURES},
    "cluster": {"cluster": cluster.FIGURES, "crowd": crowd.FIGURES},
}
APART = ("models", "cluster")  # only when asked for by name: one takes long, the other makes the machine a Kubernetes
ORDER = [figure.name for families in VERBS.values() for figures in families.values() for figure in figures]

ONE_KIND = sorted({name.rpartition(".")[0] for name in ORDER if name.startswith("models.")})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", nargs="?", default="all", choices=["all", *VERBS])
    parser.add_argument("--quick", action="store_true", help="small sizes, one round, another report")
    parser.add_argument(
        "--only", metavar="FIGURE", nargs="+", choices=[*ORDER, *ONE_KIND], help=f"some of {', '.join(ORDER)}"
    )
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupted)
    report, raw = (WORK / "quick" / "report.json", WORK / "quick" / "raw") if asked.quick else (REPORT, RAW)
    report.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    missing = 0
    with Bench(asked.quick) as bench:
        for verb, families in VERBS.items():
            for family, figures in families.items():
                if asked.verb != verb and (asked.verb != "all" or verb in APART):
                    continue
                chosen = {key: value for key, value in figures.items() if _is_meant(key.name, asked.only)}
                if not chosen:
                    continue
                measured: dict[str, Measured] = {}
                for figure, measure in chosen.items():
                    print(f"{time.monotonic() - started:5.0f} s  {figure.name}: {figure.title}", flush=True)
                    found, why = _attempt(bench, measure)
                    if found is None:
                        missing += 1
                        print(f"    not measured: {why}", flush=True)
                    else:
                        measured[figure.name] = found
                        _tell(figure, found)
                    file = f"benchmarks/raw/{family}.csv"
                    today = datetime.datetime.now(datetime.UTC).date().isoformat()
                    merge(report, [entry(figure, verb, today, found, why, file)], ORDER)
                    others = [one.name for one in figures if one not in chosen]
                    write_raw(raw / f"{family}.csv", measured, others)
    print(f"{time.monotonic() - started:5.0f} s  {report}", flush=True)
    return 1 if missing else 0


def _is_meant(name: str, only: Sequence[str] | None) -> bool:
    return only is None or any(name == one or (one in ONE_KIND and name.startswith(f"{one}.")) for one in only)


def _attempt(bench: Bench, measure: Measure) -> tuple[Measured | None, str | None]:
    try:
        return measure(bench), None
    except Absent as absent:
        return None, str(absent)
    except Exception as error:
        traceback.print_exc()
        words = " ".join(str(error).split())
        return None, f"{type(error).__name__}: {words[:300]}"


def _tell(figure: Figure, found: Measured) -> None:
    if figure.target is None:
        print(f"    {found.value:.3g} {figure.unit}", flush=True)
        return
    met = found.value >= figure.target if figure.better == "higher" else found.value <= figure.target
    sign = "≥" if figure.better == "higher" else "≤"
    print(f"    {found.value:.3g} {figure.unit} ({sign} {figure.target:g}): {'met' if met else 'NOT MET'}", flush=True)


def _interrupted(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
