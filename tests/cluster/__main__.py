"""python -m tests.cluster up|down|status|build: a real Kubernetes of one node on this machine.

`build` installs Debian's packages that are missing and builds the rest from Go modules into a cache
(EKIBEN_CLUSTER_CACHE, else ~/.cache/ekiben-cluster); `up` does so too where it must, and joins a cluster that runs.
Several clusters may run side by side, each under a root of its own (--root, EKIBEN_CLUSTER_ROOT).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from tests.cluster import cluster


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("up", "down", "status", "build"))
    parser.add_argument("--root", type=Path, default=cluster.ROOT, help=f"default {cluster.ROOT}")
    parser.add_argument("--keep", action="store_true", help="with down: leave the folder, for a look at the logs")
    parser.add_argument(
        "--only",
        nargs="*",
        default=(),
        help="with build: folders of tests/cluster/go, or `base`, the image that models stand on",
    )
    asked = parser.parse_args()

    def say(line: str) -> None:
        print(line, flush=True)

    if asked.verb == "build":
        cluster.build(say, asked.only)
    elif asked.verb == "down":
        cluster.down(asked.root, asked.keep)
        say("down")
    elif asked.verb == "status":
        say("\n".join(cluster.status(asked.root)))
    else:
        began = time.monotonic()
        made = cluster.up(asked.root, say)
        say(f"up in {time.monotonic() - began:.1f} s")
        say(f"KUBECONFIG={made.kubeconfig}\nINGRESS={made.ingress_url}\nREGISTRY={made.registry.push}")


if __name__ == "__main__":
    main()
