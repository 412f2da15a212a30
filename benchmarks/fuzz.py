"""Damaged models of every format through recognition and load, in bounded children that start again when they end.

A child gets no network, a bound on memory and CPU time for each file, and a home and scratch folder of its own. What
was recognised is loaded and asked for one row, as its kind does it. Counted are: faults of recognition (anything but an
answer or a user's error), children that ended while they recognised or loaded, files that took too long, and files
outside of the scratch folder that changed. A child that ends while it loads is a serving process that does not start;
one that ends while it recognises is a refused upload. Neither is the service, which is why children do it.

    python -m benchmarks.fuzz FORMAT SEEDS FIRST LAST SCRATCH     one child; reports on standard output
"""

from __future__ import annotations

import importlib
import io
import json
import math
import mmap
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from benchmarks import parts
from benchmarks.figures import ROOT, Absent, Figure, Measured
from benchmarks.mutations import Files, mutated
from builder_image import sandbox
from registry import formats
from registry.errors import EkibenError

CASES, QUICK_CASES = 10_000, 200
_CHILDREN = 2  # at once
_CPU_SECONDS = 20  # of one file
_WALL_SECONDS = 180.0  # of one file: others work on the machine too
_MEMORY = 8 << 30  # bytes of address space of a child; TensorFlow maps much that it does not use
_RECORDED = 50  # cases kept in the detail


@dataclass(frozen=True)
class Seed:
    """A model that is damaged: its files, and the kind and format that serve it."""

    kind: str
    format: str
    files: Files

    def write(self, folder: Path) -> None:
        for path, data in self.files.items():
            (folder / "files" / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / "files" / path).write_bytes(data)
        (folder / "seed.json").write_text(json.dumps({"kind": self.kind, "format": self.format}))

    @classmethod
    def read(cls, folder: Path) -> Seed:
        top = folder / "files"
        files = {p.relative_to(top).as_posix(): p.read_bytes() for p in sorted(top.rglob("*")) if p.is_file()}
        return cls(**json.loads((folder / "seed.json").read_text()), files=files)


@dataclass
class Tally:
    """What became of the files of one format."""

    outcomes: Counter[str] = field(default_factory=Counter)
    cases: list[dict[str, Any]] = field(default_factory=list)

    def note(self, number: int, outcome: str, said: str = "") -> None:
        self.outcomes[outcome] += 1
        if outcome in BAD and len(self.cases) < _RECORDED:
            self.cases.append({"case": number, "outcome": outcome, "said": said[-2000:]})


CRASHED, HUNG, FAULTED = "recognition_crash", "recognition_hang", "recognition_fault"
LOAD_CRASHED, LOAD_HUNG, LOAD_FAULTED = "load_crash", "load_hang", "load_fault"
BAD = frozenset((CRASHED, HUNG, FAULTED, LOAD_CRASHED, LOAD_HUNG, LOAD_FAULTED))


# --- one child ------------------------------------------------------------------------------------------------------


def examine(seed: Seed, number: int) -> tuple[str, Files, formats.Recognised | None, str]:
    """(outcome, damaged files, what was recognised, what was said) of one damaged copy."""
    files = mutated(seed.files, number, seed.format)
    try:
        found = formats.recognise(
            [(path, len(data)) for path, data in files.items()], lambda path: io.BytesIO(files[path])
        )
    except EkibenError as error:
        return "refused", files, None, error.code
    except MemoryError:
        return "costly", files, None, ""  # the service's child says so too
    except Exception:
        return FAULTED, files, None, traceback.format_exc()
    return "recognised", files, found, ""


def _serve(kind: str, found: formats.Recognised, files: Files, scratch: Path) -> tuple[str, str]:
    """Load what was recognised and ask it for a row."""
    serving = importlib.import_module("bentos.serving")
    folder = serving.write_model(scratch / "model", kind=kind, format=found.format, files=files, model=found.path)
    try:
        model = _loader(found.format)(folder)
        about = getattr(model, "about", None)
        if about is not None:
            model.outputs(about.example["inputs"])
    except (serving.StartError, serving.Problem) as error:
        return "load_refused", str(error)
    except Exception:  # the wrapper makes a problem of it; still, the loader ought to have
        return LOAD_FAULTED, traceback.format_exc()
    return "served", ""


_LOADERS: Mapping[str, str] = {
    "lightgbm-text": "bentos.formats.lightgbm:Model",
    "xgboost-json": "bentos.formats.xgboost:Model",
    "xgboost-ubj": "bentos.formats.xgboost:Model",
    "onnx": "bentos.formats.onnx:Model",
    "skops": "bentos.formats.skops:Model",
    "keras-v3": "bentos.tensorflow.model:Model",
    "tensorflow-savedmodel": "bentos.tensorflow.model:Model",
    "transformers-onnx": "bentos.serving.texts:TextModel.load",
    "transformers-safetensors": "bentos.serving.texts:TextModel.load",
    "mlflow": "bentos.mlflow.model:Model",
}


def _loader(format: str) -> Callable[[Any], Any]:
    module, _, name = _LOADERS[format].partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found  # type: ignore[no-any-return]


def child(format: str, seeds: Path, first: int, last: int, scratch: Path) -> None:
    """Go through the cases in a fork of this process, and in a new fork after each that ended."""
    seed = Seed.read(seeds / format)
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print
    if format in _LOADERS:
        _loader(format)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    reached = mmap.mmap(-1, 8)  # the case that the fork is at
    while first < last:
        pid = os.fork()
        if pid == 0:
            _cases(seed, range(first, last), scratch, report, reached)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            return
        first = int.from_bytes(reached[:], "little")
        report.write(json.dumps({"case": first, "ended": code}) + "\n")
        first += 1


def _cases(seed: Seed, numbers: range, scratch: Path, report: TextIO, reached: mmap.mmap) -> None:
    for number in numbers:
        reached[:] = number.to_bytes(8, "little")
        used = math.ceil(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (used + _CPU_SECONDS, resource.RLIM_INFINITY))
        report.write(json.dumps({"case": number, "stage": "recognise"}) + "\n")
        outcome, files, found, text = examine(seed, number)
        if found is not None and found.format in _LOADERS:
            report.write(json.dumps({"case": number, "stage": "load"}) + "\n")
            shutil.rmtree(scratch / "model", ignore_errors=True)
            outcome, text = _serve(seed.kind, found, files, scratch)
        report.write(json.dumps({"case": number, "outcome": outcome, "said": text}) + "\n")


# --- all of them ----------------------------------------------------------------------------------------------------


def run(format: str, seeds: Path, cases: int, scratch: Path) -> Tally:
    """Every case of a format; a child that is silent for too long is ended and started again at the next case."""
    tally, number = Tally(), 0
    while number < cases:
        number = _children(format, seeds, number, cases, scratch, tally)
    return tally


def _children(format: str, seeds: Path, first: int, last: int, scratch: Path, tally: Tally) -> int:
    """Run one child as far as it comes, and return the number of the next case."""
    scratch.mkdir(parents=True, exist_ok=True)
    bounds = json.dumps({"memory": _MEMORY, "network": False})
    program = [sys.executable, "-m", "benchmarks.fuzz", format, str(seeds), str(first), str(last), str(scratch)]
    env = {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"), "HOME": str(scratch), "TMPDIR": str(scratch),
        "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", sandbox.__file__, bounds, *program],
        env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    number, loading = first - 1, False
    try:
        for line in _lines(process):
            if line is None:
                tally.note(number, LOAD_HUNG if loading else HUNG, "silent")
                return number + 1
            said = json.loads(line)
            number = said["case"]
            if "outcome" in said:
                tally.note(number, said["outcome"], said["said"])
            elif (code := said.get("ended")) is not None:
                ends = (LOAD_HUNG, HUNG) if code == -signal.SIGXCPU else (LOAD_CRASHED, CRASHED)
                tally.note(number, ends[0] if loading else ends[1], f"code {code}")
            loading = said.get("stage") == "load"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        shutil.rmtree(scratch, ignore_errors=True)
    if number != last - 1:
        raise parts.Failed(f"a child of {format} ended at case {number} (code {code})")
    return last


def _lines(process: subprocess.Popen[bytes]) -> Iterator[bytes | None]:
    """Each line of a child's reports; None where it was silent for too long."""
    assert process.stdout is not None
    descriptor, pending = process.stdout.fileno(), b""
    while True:
        ready, _, _ = select.select([descriptor], [], [], _WALL_SECONDS)
        if not ready:
            yield None
            return
        data = os.read(descriptor, 1 << 16)
        if not data:
            return
        *whole, pending = (pending + data).split(b"\n")
        yield from whole


def seeds_of(folder: Path) -> list[str]:
    """Write a small real model of each format that is loaded, by the kinds' own examples; their formats."""
    for kind in ("lightgbm", "xgboost", "onnx", "sklearn", "transformers", "mlflow", "tensorflow"):
        _example(kind, folder)
    keras = Seed.read(folder / "keras-v3")
    script = "import sys, keras; keras.saving.load_model(sys.argv[1]).export(sys.argv[2])"
    (path,) = (folder / "keras-v3" / "files").glob("*.keras")
    exported = folder / "exported"
    _python("-c", script, str(path), str(exported))
    files = {p.relative_to(exported).as_posix(): p.read_bytes() for p in exported.rglob("*") if p.is_file()}
    Seed(keras.kind, "tensorflow-savedmodel", files).write(folder / "tensorflow-savedmodel")
    shutil.rmtree(exported)
    encoder = ROOT / "tests" / "bentos" / "encoders" / "bert"
    files = {p.name: p.read_bytes() for p in encoder.iterdir() if p.is_file()}
    tokenizer = Seed.read(folder / "transformers-onnx").files["tokenizer.json"]
    whole = {"tokenizer.json": tokenizer, **files}
    Seed("transformers", "transformers-safetensors", whole).write(folder / "transformers-safetensors")
    Seed("transformers", "safetensors", {"m.safetensors": files["model.safetensors"]}).write(folder / "safetensors")
    booster = "import sys, xgboost; xgboost.Booster(model_file=sys.argv[1]).save_model(sys.argv[2])"
    (path,) = (p for p in (folder / "xgboost-json" / "files").iterdir())
    _python("-c", booster, str(path), str(folder / "m.ubj"))
    Seed("xgboost", "xgboost-ubj", {"m.ubj": (folder / "m.ubj").read_bytes()}).write(folder / "xgboost-ubj")
    project = {
        "bentofile.yaml": b"service: service:S\n",
        "service.py": b"import bentoml\n@bentoml.service\nclass S: ...\n",
    }
    Seed("project", "bento-project", project).write(folder / "bento-project")
    return sorted(path.name for path in folder.iterdir() if (path / "seed.json").exists())


def _example(kind: str, folder: Path) -> None:
    made = folder / "made"
    _python("-m", f"bentos.{kind}.example", str(made))
    format = json.loads((made / "manifest.json").read_text())["format"]
    files = {
        p.relative_to(made / "files").as_posix(): p.read_bytes() for p in (made / "files").rglob("*") if p.is_file()
    }
    Seed(kind, format, files).write(folder / format)
    shutil.rmtree(made)


def _python(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise parts.Failed(f"{' '.join(arguments[:2])} failed: {done.stderr[-800:]}")


def _watched(*folders: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file that a child could have reached."""
    found = {}
    for folder in folders:
        for place, inner, names in os.walk(folder):
            inner[:] = [name for name in inner if name not in (".git", "__pycache__", "scratch")]
            for name in names:
                status = os.lstat(os.path.join(place, name))
                found[os.path.join(place, name)] = (status.st_size, status.st_mtime_ns)
    return found


def fuzzed(bench: parts.Bench) -> dict[str, Any]:
    def make() -> dict[str, Any]:
        if (why := sandbox.unavailable()) is not None:
            raise Absent(f"children cannot be confined: {why}")
        seeds = bench.scratch / "seeds"
        seeds.mkdir(parents=True)
        chosen = seeds_of(seeds)
        outside = (ROOT, Path(sys.prefix) / "lib")
        before = _watched(*outside)
        cases = QUICK_CASES if bench.quick else CASES
        with ThreadPoolExecutor(_CHILDREN) as pool:
            tallies = list(pool.map(lambda each: run(each, seeds, cases, bench.scratch / "fuzz" / each), chosen))
        after = _watched(*outside)
        for each, tally in zip(chosen, tallies, strict=True):
            parts.say(f"{each}: {dict(tally.outcomes)}")
        changed = sum(before.get(path) != after.get(path) for path in before.keys() | after.keys())
        return {"tallies": dict(zip(chosen, tallies, strict=True)), "changed": changed, "cases": cases}

    found: dict[str, Any] = bench.part("fuzz", make)
    return found


def _counted(bench: parts.Bench, *outcomes: str) -> Measured:
    found: Mapping[str, Any] = fuzzed(bench)
    tallies: dict[str, Tally] = found["tallies"]
    detail = {
        "cases_per_format": found["cases"],
        "formats": {name: dict(sorted(tally.outcomes.items())) for name, tally in tallies.items()},
        "cases": {name: [c for c in tally.cases if c["outcome"] in outcomes][:5] for name, tally in tallies.items()},
    }
    return Measured(sum(tally.outcomes[outcome] for tally in tallies.values() for outcome in outcomes), detail)


def written(bench: parts.Bench) -> Measured:
    return Measured(fuzzed(bench)["changed"], {})


FIGURES: dict[Figure, Callable[[parts.Bench], Measured]] = {
    Figure(
        "uploads.fuzz_crashes", "damaged files of every format: faults and ends of recognition", "files", 0, "lower", 4,
    ): lambda bench: _counted(bench, CRASHED, FAULTED),
    Figure(
        "uploads.fuzz_hangs", "damaged files of every format: recognition or load without end", "files", 0, "lower", 4,
    ): lambda bench: _counted(bench, HUNG, LOAD_HUNG),
    Figure(
        "uploads.fuzz_written", "damaged files of every format: files written outside of the child's folder", "files",
        0, "lower", 4,
    ): written,
    Figure(
        "uploads.fuzz_load_ends", "damaged files that were recognised and ended the process that loads them", "files",
        None, "lower", 4,
    ): lambda bench: _counted(bench, LOAD_CRASHED, LOAD_FAULTED),
}  # fmt: skip


if __name__ == "__main__":
    child(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
