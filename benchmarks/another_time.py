"""A library that shows programs another time of day, when it is preloaded: LD_PRELOAD=…"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

# Time of day only. libfaketime 0.9.10 shifts or spares the clock that waits are measured by, too, and Python 3.11's
# sleeps then fail or never end.
_SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(id, at);
    if (!code && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) at->tv_sec += FORWARD;
    return code;
}
int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    struct timespec now;
    int code = clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return code;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"""


def preloaded(folder: Path, seconds: int) -> Path | None:
    """The library for a clock that is so far ahead, made in the folder; None where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    source, made = folder / "time.c", folder / "time.so"
    source.write_text(_SOURCE)
    command = [compiler, "-shared", "-fPIC", f"-DFORWARD={seconds}", "-o", str(made), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return made
