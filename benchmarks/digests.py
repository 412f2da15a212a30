"""The same inputs built under other circumstances: is it the same image?"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks import another_time, builder, parts
from benchmarks.figures import ROOT, Figure, Measured, Sample

_NOBODY = 65534
_FORWARD = 40 * 86400  # seconds


@dataclass(frozen=True)
class Circumstance:
    """What is different about one build; everything it makes is made anew, in folders of its own."""

    name: str
    depth: str = "a"
    before: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    umask: int = 0o022
    user: int | None = None
    touched: int = 0


def same_digest(bench: parts.Bench) -> Measured:
    """1 if one image digest comes out of all circumstances, each alone and all together; else 0."""
    clock, how = _clock(bench)
    user, who = _user()
    place = {"LC_ALL": "POSIX", "LANG": "tr_TR.UTF-8", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0",
             "TZ": "Pacific/Chatham"}  # fmt: skip
    deep = "another folder/that is elsewhere/and deeper"
    cases = [
        Circumstance("plain"),
        Circumstance("clock", before=clock, touched=_FORWARD),
        Circumstance("user", before=user, user=_NOBODY),
        Circumstance("folder", depth=f"{deep}/é"),
        Circumstance("umask", umask=0o077),
        Circumstance("locale", env=place),
        Circumstance("all at once", deep, (*clock, *user), place, 0o027, _NOBODY, _FORWARD),
    ]
    if bench.quick:
        cases = [cases[0], cases[-1]]
    found: dict[str, str] = {}
    samples: list[Sample] = []
    for number, case in enumerate(cases):
        built = _build(bench, case)
        found[case.name] = built.result["image"]["digest"]
        parts.say(f"{case.name}: {found[case.name]} ({built.seconds:.1f} s)")
        equal = float(found[case.name] == found["plain"])
        samples += [
            Sample(number, case.name, "same digest", equal, ""),
            Sample(number, case.name, "build", built.seconds, "s"),
        ]
    others = [name for name, digest in found.items() if digest != found["plain"]]
    detail: dict[str, Any] = {"clock": how, "user": who, "circumstances": list(found), "digest": found["plain"]}
    if others:
        detail["different"] = others
    return Measured(float(not others), detail, samples)


def _build(bench: parts.Bench, case: Circumstance) -> builder.Built:
    outer = bench.folder("circumstance")
    folder = outer / case.depth
    model = folder / "model"
    try:
        shutil.copytree(bench.models(1)[0], model)
        home = folder / "home"
        home.mkdir()
        packages = outer / "packages"
        if (kept := bench.scratch / "packages").exists():
            shutil.copytree(kept, packages, symlinks=True)
        for path in [outer, *outer.rglob("*")]:
            if case.touched and path.is_file() and not path.is_symlink():
                os.utime(path, (path.stat().st_atime + case.touched, path.stat().st_mtime + case.touched))
            if case.user is not None:
                os.chown(path, case.user, case.user, follow_symlinks=False)
        env = parts.environment(HOME=str(home), UV_CACHE_DIR=str(packages), TMPDIR=str(home), **case.env)
        if kept.exists():
            env["UV_OFFLINE"] = "1"  # the same files, whatever year the certificates of an index think it is
        # the user must be able to write the spec's folder, and starting a process must not
        (folder / "build").mkdir()
        if case.user is not None:
            os.chown(folder / "build", case.user, case.user)
        built = builder.build(
            folder / "build", model, folder / "cache", bench.base, bench.kinds, output=folder / "build" / "image",
            before=case.before, env=env, umask=case.umask,
        )  # fmt: skip
        if not kept.exists():
            shutil.copytree(packages, kept, symlinks=True)
        return built
    finally:
        parts.remove(outer)


def _clock(bench: parts.Bench) -> tuple[tuple[str, ...], str]:
    """Words in front of a command that show it another time of day, and how that is done."""
    library = another_time.preloaded(bench.scratch, _FORWARD)
    if library is not None:
        words = ("env", f"LD_PRELOAD={library}")
        told, _ = parts.run([*words, sys.executable, "-c", "import time; time.sleep(0.01); print(time.time())"])
        if abs(float(told) - time.time() - _FORWARD) < 60 and _works(words):
            return (
                words,
                "the builder's time of day (a preloaded library) and the times of all input files, 40 days ahead",
            )
    return (), "the times of all input files, 40 days ahead (no compiler for a library that changes the clock)"


def _user() -> tuple[tuple[str, ...], str]:
    """Words in front of a command that make it another user's, who may read this checkout."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return (), "one user only (another needs root and setpriv)"
    nobody = ("setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups")
    if _works(nobody):
        return nobody, "root and nobody"
    # a checkout or interpreter in a folder that only root may enter
    reading = (*nobody, "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    if _works(reading):
        return reading, "root and nobody (allowed to read what root reads)"
    return (), "one user only (nobody cannot read this checkout)"


def _works(words: Sequence[str]) -> bool:
    """Whether the builder can be started so, and can start Python in its turn."""
    code = "import subprocess, sys, builder_image.build; subprocess.run([sys.executable, '-c', ''], check=True)"
    argv = [*words, sys.executable, "-c", code]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, env=parts.environment()).returncode == 0


FIGURES: dict[Figure, Callable[[parts.Bench], Measured]] = {
    Figure(
        "image.same_digest",
        "same inputs, two clocks, users, folders, umasks and locales: one digest (1 = yes)",
        "",
        1,
        "higher",
    ): same_digest,
}
