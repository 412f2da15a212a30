"""podman with a storage of its own, which is gone at the end; layers are stacked where the kernel can, else copied."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path


class Podman:
    def __init__(self, folder: Path) -> None:
        self._run = tempfile.mkdtemp(prefix="pod-")  # podman wants a run folder of at most 50 characters
        self._folder = folder
        # a state of its own: another podman of the same user would take it away with its storage
        self._command = ["podman", "--root", str(folder), "--runroot", self._run, "--tmpdir", f"{self._run}/state"]
        self._command += ["--runtime", "runc", "--cgroup-manager", "cgroupfs", "--storage-driver"]
        stacked = ["overlay", "--storage-opt", "overlay.skip_mount_home=true"]
        asked = subprocess.run([*self._command, *stacked, "info"], capture_output=True, check=False)
        if asked.returncode != 0:
            shutil.rmtree(folder, ignore_errors=True)
        self._command += stacked if asked.returncode == 0 else ["vfs"]

    def __call__(self, *words: str | Path) -> str:
        """What a command says on standard output."""
        done = subprocess.run([*self._command, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def logs(self, container: str) -> str:
        done = subprocess.run([*self._command, "logs", container], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    def close(self) -> None:
        for words in (["rm", "--all", "--force", "--time", "0"], ["rmi", "--all", "--force"]):
            subprocess.run([*self._command, *words], capture_output=True, check=False)
        shutil.rmtree(self._folder, ignore_errors=True)
        shutil.rmtree(self._run, ignore_errors=True)
