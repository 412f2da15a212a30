"""A program below the supervisor: what it cannot do, what it cannot outgrow, and that nothing of it is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from registry.confinement import landlock, supervisor, system
from registry.confinement.orders import Bounds, Cage, Log, Order

USER = 60578
ROOT = os.geteuid() == 0
needs_landlock = pytest.mark.skipif(landlock.version() == 0, reason="the kernel has no Landlock")
needs_root = pytest.mark.skipif(not ROOT, reason="needs root")
# Another user than root, who may still read the interpreter where the checkout's owner keeps it.
UNPRIVILEGED = [
    "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=+dac_read_search",
    "--ambient-caps=+dac_read_search",
]  # fmt: skip


def until(condition: Callable[[], Any]) -> Any:
    """The first true value."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError("it never happened")


class Started:
    """A supervisor and the folder that its program may write to; `state` is what it may not see."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, folder / "state"
        self.scratch, self.log = self.state / "scratch", self.state / "log"
        self.scratch.mkdir(parents=True)
        (self.state / "secret").write_text("secret")
        self.lifeline = -1
        self.process: subprocess.Popen[bytes] | None = None

    def start(
        self,
        source: str,
        *,
        cage: bool = True,
        own: Cage | None = None,
        user: int | None = None,
        unprivileged: bool = False,
        **changes: Any,
    ) -> subprocess.Popen[bytes]:
        self.folder.chmod(0o755)
        self.state.chmod(0o700)
        if user is not None:
            os.chown(self.scratch, user, user)
        elif unprivileged:
            for path in (self.state, self.scratch, self.state / "secret"):
                os.chown(path, 65534, 65534)
        reading, self.lifeline = os.pipe()
        read = [*system.folders(), sys.prefix, system.interpreter(sys.executable)]
        bounds = Cage(read, [str(self.scratch)], system.devices(), [str(self.state)], user, True, 1 << 20)
        order = Order(
            [sys.executable, "-c", textwrap.dedent(source)], {"PATH": os.environ["PATH"]}, str(self.scratch), [],
            reading, [Log(str(self.log), 1 << 20, True)], 64 << 20, [], Bounds(), (own or bounds) if cage else None,
        )._replace(**changes)  # fmt: skip
        with tempfile.TemporaryFile() as asked:
            asked.write(order.encode())
            asked.seek(0)
            self.process = subprocess.Popen(
                [*(UNPRIVILEGED if unprivileged else ()), sys.executable, "-I", "-S", supervisor.__file__],
                env={"PATH": os.environ["PATH"]}, stdin=asked, pass_fds=[reading], start_new_session=True,
            )  # fmt: skip
        os.close(reading)
        return self.process

    def run(self, source: str, **options: Any) -> str:
        """What the program wrote."""
        self.start(source, **options).wait(60)
        return self.written()

    def written(self) -> str:
        return "".join(log.read_text() for log in (self.log.with_name("log.1"), self.log) if log.exists())

    def end(self) -> None:
        with suppress(OSError):
            os.close(self.lifeline)
        if self.process is not None:
            self.process.wait(60)


@pytest.fixture
def started() -> Iterator[Started]:
    folder = Path(tempfile.mkdtemp())  # pytest's folders are closed to other users, as only some service's are
    made = Started(folder)
    yield made
    made.end()
    shutil.rmtree(folder)


TRIES = """
import json, os, signal, socket, sys
def tried(do):
    try:
        do()
        return "done"
    except OSError as error:
        return type(error).__name__
state = os.path.dirname(os.getcwd())
service, supervisor = {service}, os.getppid()
print(json.dumps({{
    "write own": tried(lambda: open("own", "w").write("x")),
    "read secret": tried(lambda: open(state + "/secret").read()),
    "list state": tried(lambda: os.listdir(state)),
    "write state": tried(lambda: open(state + "/new", "w")),
    "write environment": tried(lambda: open({prefix!r} + "/written", "w")),
    "write temporary": tried(lambda: open("/tmp/ekiben-written", "w")),
    "link secret": tried(lambda: os.link(state + "/secret", "linked")),
    "read memory": tried(lambda: open(f"/proc/{{service}}/mem", "rb")),
    "read environ": tried(lambda: open(f"/proc/{{service}}/environ").read()),
    "read supervisor": tried(lambda: open(f"/proc/{{supervisor}}/environ").read()),
    "signal service": tried(lambda: os.kill(service, signal.SIGCONT)),
    "signal supervisor": tried(lambda: os.kill(supervisor, signal.SIGCONT)),
    "lock": tried(lambda: __import__("multiprocessing").Lock()),
}}))
"""
REFUSED = {
    "read secret", "list state", "write state", "write environment", "write temporary", "link secret", "read memory",
    "read environ", "read supervisor", "signal service", "signal supervisor",
}  # fmt: skip


@needs_landlock
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"user": USER}, id="with-a-user", marks=needs_root),
        pytest.param({"unprivileged": True}, id="not-root", marks=needs_root),
        pytest.param({}, id="as-the-service"),
    ],
)
def test_a_program_writes_its_own_folder_and_reaches_nothing_of_the_service(
    started: Started, options: dict[str, Any]
) -> None:
    source = TRIES.format(service=os.getpid(), prefix=sys.prefix)
    found = json.loads(started.run(source, **options))
    # Signals are not kept by the first versions of Landlock.
    scoped = set() if landlock.version() >= 6 or "user" in options else {"signal service", "signal supervisor"}
    assert {name for name, result in found.items() if result != "done"} - scoped == REFUSED - scoped, found
    assert (started.scratch / "own").exists()


@needs_root
def test_mounts_and_user_alone_keep_it_where_there_is_no_landlock(started: Started) -> None:
    read = [*system.folders(), sys.prefix, system.interpreter(sys.executable)]
    cage = Cage(read, [str(started.scratch)], [], [str(started.state)], USER, False, 1 << 20)
    source = TRIES.format(service=os.getpid(), prefix=sys.prefix)
    found = json.loads(started.run(source, user=USER, own=cage))
    # The folder is there to be listed, with nothing in it but the program's own.
    assert {name for name, result in found.items() if result != "done"} == REFUSED - {"list state"}, found


def descendants(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cmdline()[-1:] == [mark] and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


FORKS_AWAY = """
import os, subprocess, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(600)", {mark!r}])
    os._exit(0)
os.wait()
while not os.path.exists("go"):
    time.sleep(0.01)
{then}
"""


@pytest.mark.parametrize("how", ["it ends", "it is killed", "its parent ends"])
def test_a_process_that_forked_away_ends_with_the_program(started: Started, how: str) -> None:
    mark = f"mark-{os.getpid()}-{time.time_ns()}"
    process = started.start(FORKS_AWAY.format(mark=mark, then="time.sleep(600)"), cage=False)
    away = until(lambda: descendants(mark))
    assert len(away) == 1
    if how == "its parent ends":
        os.close(started.lifeline)
    else:
        program = psutil.Process(process.pid).children()
        next(each for each in program if each.pid != away[0].pid).send_signal(
            signal.SIGKILL if how == "it is killed" else signal.SIGTERM
        )
    process.wait(60)
    assert descendants(mark) == []


def test_it_ends_as_the_program_ended(started: Started) -> None:
    assert started.start("raise SystemExit(7)", cage=False).wait(60) == 7
    started.end()
    assert started.start("import os; os.kill(os.getpid(), 11)", cage=False).wait(60) == -11


def test_a_request_to_end_reaches_the_program(started: Started) -> None:
    source = """
    import signal, sys, time
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    print("ready", flush=True)
    time.sleep(600)
    """
    process = started.start(source, cage=False)
    until(lambda: "ready" in started.written())
    process.terminate()
    assert process.wait(60) == 3


def test_a_flood_of_output_fills_no_more_than_its_log_and_the_last_lines_are_kept(started: Started) -> None:
    source = "for number in range(40_000):\n    print(f'line {number:06} ' + 80 * 'x')\nprint('the end')"
    written = started.run(source, cage=False)
    sizes = [path.stat().st_size for path in (started.log, started.log.with_name("log.1"))]
    assert sum(sizes) <= 1 << 20
    lines = written.splitlines()
    assert lines[-1] == "the end"
    numbers = [int(line.split()[1]) for line in lines[:-1]]
    assert numbers == list(range(numbers[0], 40_000))  # whole lines, none lost of those that are kept


def test_a_flood_waits_for_its_log(started: Started) -> None:
    """At 64 KiB a second and a burst of 256 KiB, a writer of a megabyte is not done when the burst is written."""
    source = "import os\nos.write(1, b'x' * (1 << 20))\nopen('written', 'w')"
    started.start(source, cage=False, log_rate=64 * 1024)
    until(lambda: started.log.exists() and started.log.stat().st_size >= 192 * 1024)
    assert not (started.scratch / "written").exists()


def test_what_a_bounded_log_cannot_take_is_dropped(started: Started) -> None:
    logs = [Log(str(started.log), 1000, False)]
    assert started.run("print('x' * 5000); print('y')", cage=False, logs=logs).startswith("xxx")
    assert started.log.stat().st_size <= 1000


def test_a_file_outgrows_no_bound(started: Started) -> None:
    source = """
    try:
        open("large", "wb").write(b"x" * 2_000_000)
    except OSError as error:
        print(error.strerror)
    """
    assert started.run(source, cage=False, bounds=Bounds(file_bytes=1_000_000)) == "File too large\n"


def test_memory_over_the_bound_is_an_error_of_the_program(started: Started) -> None:
    source = """
    try:
        bytearray(1 << 30)
    except MemoryError:
        print("MemoryError")
    """
    assert started.run(source, cage=False, bounds=Bounds(data_bytes=512 << 20)) == "MemoryError\n"


def test_a_program_that_cannot_be_started_says_why(started: Started) -> None:
    assert started.start("", cage=False, argv=["/nowhere/program"]).wait(60) == supervisor.FAILED
    assert "No such file" in started.written()


def test_an_order_survives_its_encoding() -> None:
    order = Order(
        ["a"], {"B": "ü"}, "/", [3], 4, [Log("/l", 5, True)], 6, ["/g"], Bounds(1, None, 3),
        Cage(["/r"], ["/w"], ["/d"], ["/c"], None, True, 7),
    )  # fmt: skip
    assert Order.decode(order.encode()) == order
