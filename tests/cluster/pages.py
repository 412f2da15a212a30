"""Commands of the documentation, read from its pages and run as they stand."""

from __future__ import annotations

import subprocess
from pathlib import Path
from urllib.parse import urlsplit

from tests.k8s.installation import Installation, environment

ROOT = Path(__file__).parents[2]
_MARK = "--- exit code"


def lines_of(page: Path, section: str) -> list[str]:
    """The commands of a section: the lines of its blocks of code."""
    text = page.read_text().partition(f"\n{section}\n")[2].partition("\n## ")[0]
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


class Shell:
    """One shell for several lines, in which `localhost` is the ingress: the cluster's node has another address."""

    def __init__(self, site: Installation, folder: Path) -> None:
        where = urlsplit(site.url)
        (folder / ".curlrc").write_text(
            f'connect-to = "localhost:80:{where.hostname}:{where.port or 80}"\n'
            'noproxy = "*"\nsilent\nshow-error\nfail-with-body\nretry = 30\n'
        )
        # The environment that runs the tests is there; `make` need not look. ARGS are those of `make e2e`.
        settings = {"CURL_HOME": str(folder), "MAKEFLAGS": "--assume-old=setup", "ARGS": ""}
        self._process = subprocess.Popen(
            ["bash"], env={**environment(site.cluster), **settings}, cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, line: str) -> str:
        """What it printed; it must end well."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{{ {line}\n}} </dev/null\nprintf '\\n{_MARK} %s\\n' $?\n")
        self._process.stdin.flush()
        printed = []
        for said in self._process.stdout:
            if said.startswith(_MARK):
                assert said.split()[-1] == "0", f"{line}\n{''.join(printed)}"
                return "".join(printed)
            printed.append(said)
        raise AssertionError(f"the shell ended: {line}\n{''.join(printed)}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
