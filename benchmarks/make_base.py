"""Make a Debian base image with Python 3.11 as an OCI layout, for figures and tests: no registry, no daemon.

    python -m benchmarks.make_base FOLDER [--cache FOLDER] [--suite bookworm]

Needs root and debootstrap, which takes its packages from the machine's own apt sources. The same packages give the
same bytes: times are fixed, and what an installation leaves behind by chance (logs, caches, machine id) is removed. A
FOLDER that is there already is used again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from builder_image import image, layers, layout
from builder_image.tarball import CREATED, MTIME

PACKAGES = ("ca-certificates", "libgomp1", "python3-minimal", "python3-venv")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_EMPTIED = (
    "dev",
    "proc",
    "run",
    "sys",
    "tmp",
    "usr/share/doc",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/man",
    "var/cache",
    "var/lib/apt/lists",
    "var/log",
    "var/tmp",
)
_LIBRARIES = ("/usr/lib/python3", "/usr/lib/python3.11")
_REMOVED = ("etc/.pwd.lock", "etc/machine-id", "etc/hostname", "etc/resolv.conf", "var/lib/dpkg/lock")
_CHANCE = re.compile(r"etc/(passwd|group|shadow|gshadow|subuid|subgid)-$|var/lib/dpkg/.*-old$|var/lib/systemd/.*seed$")


def make_base(folder: Path, cache: Path | None = None, suite: str = "bookworm") -> Path:
    """The OCI layout at `folder`, made unless it is there; `cache` keeps downloaded packages between runs."""
    if (folder / "index.json").exists():
        return folder
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        raise SystemExit("make_base needs root and the program debootstrap (apt-get install debootstrap)")
    with tempfile.TemporaryDirectory(prefix="ekiben-base-") as work:
        root = Path(work) / "root"
        _bootstrap(root, cache, suite)
        _tidy(root)
        _compile(root)
        tar = Path(work) / "layer.tar"
        diff_id = _write_tar(root, tar)
        draft = Path(work) / "layer"
        layer = _compressed(tar, draft, diff_id)
        machine = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
        config = {
            "architecture": machine,
            "os": "linux",
            "created": CREATED,
            "config": {"Env": [f"PATH={PATH}", "LANG=C.UTF-8"], "Cmd": ["python3"]},
            "history": [{"created": CREATED, "created_by": f"debootstrap {suite} {' '.join(PACKAGES)}"}],
        }
        layout.write_layout(image.Image((layer,), config), folder)
    return folder


def _bootstrap(root: Path, cache: Path | None, suite: str) -> None:
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}"]
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        command.append(f"--cache-dir={cache.resolve()}")
    mirror = _mirror()
    command += [suite, str(root)] + ([mirror] if mirror else [])
    done = subprocess.run(command, stdout=sys.stderr, stderr=sys.stderr, env={**os.environ, "LC_ALL": "C"}, check=False)
    if done.returncode != 0:
        raise SystemExit(f"debootstrap failed with exit code {done.returncode}; its messages are above")


def _mirror() -> str | None:
    """The first archive in the machine's apt sources, in either of their two formats."""
    folder = Path("/etc/apt")
    files = [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]
    for file in files:
        text = file.read_text() if file.is_file() else ""
        for address in re.findall(r"^(?:URIs:\s*|deb\s+(?:\[[^\]]*\]\s*)?)(https?://\S+)", text, re.MULTILINE):
            if re.search(r"/debian/?$", address):
                return str(address)
    return None


def _tidy(root: Path) -> None:
    for name in _EMPTIED:
        for item in (root / name).iterdir() if (root / name).is_dir() else ():
            shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
    for name in _REMOVED:
        (root / name).unlink(missing_ok=True)
    for path in sorted(root.rglob("*")):
        if _CHANCE.search(path.relative_to(root).as_posix()):
            path.unlink()
    _without_dates(root / "etc" / "shadow")


def _without_dates(shadow: Path) -> None:
    """The third field is the day of the installation."""
    lines = [line.split(":") for line in shadow.read_text().splitlines()]
    shadow.write_text("".join(":".join([*line[:2], "3653", *line[3:]]) + "\n" for line in lines))


def _compile(root: Path) -> None:
    """Bytecode that is valid whatever the files' times: Debian's own goes stale once times are fixed."""
    for folder in root.rglob("__pycache__"):
        shutil.rmtree(folder)
    subprocess.run(
        [
            "chroot",
            str(root),
            "python3",
            "-m",
            "compileall",
            "-q",
            "--invalidation-mode",
            "unchecked-hash",
            *_LIBRARIES,
        ],
        check=True,
        env={"PATH": PATH, "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0"},
        stdout=sys.stderr,
    )


def _write_tar(root: Path, file: Path) -> str:
    """Not by builder_image.tarball: a base has owners, absolute links and a sticky /tmp, which our layers must not."""
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as archive:
        for path in _walk(root):
            info = archive.gettarinfo(path, path.relative_to(root).as_posix())
            if not (info.isreg() or info.isdir() or info.issym() or info.islnk()):
                continue
            info.mtime, info.uname, info.gname = MTIME, "", ""
            info.mode &= ~(stat.S_ISUID | stat.S_ISGID)
            if info.isreg():
                with path.open("rb") as content:
                    archive.addfile(info, content)
            else:
                archive.addfile(info)
    return _digest_of(file)


def _walk(root: Path) -> Iterator[Path]:
    return iter(sorted(root.rglob("*"), key=lambda path: path.as_posix().encode()))


def _compressed(tar: Path, file: Path, diff_id: str) -> layers.Layer:
    with file.open("wb") as out:
        for piece in layers.compress(layers.pieces_of(tar), "gzip"):
            out.write(piece)
    return layers.of_file("base", file, layers.TAR_GZIP, diff_id, _digest_of(file), file.stat().st_size)


def _digest_of(file: Path) -> str:

    with file.open("rb") as content:
        return "sha256:" + hashlib.file_digest(content, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cache", type=Path, help="keeps downloaded packages")
    parser.add_argument("--suite", default="bookworm")
    asked = parser.parse_args()
    made = make_base(asked.folder, asked.cache, asked.suite)
    print(f"{made}: {layout.read_layout(made).digest}")


if __name__ == "__main__":
    main()
