"""`python -m builder_image SPEC.json`: run one build (docs/design.md §7).

    python -m builder_image SPEC.json                     a build, as build_service starts it
    python -m builder_image fetch | inspect | assemble    a build in three steps, as a pod's containers run them
    python -m builder_image containerize BENTO_TAG …      any Bento of the local Bento store → an OCI image
    python -m builder_image base import REF_OR_LAYOUT …   describe a base image and keep it

A build prints JSON lines on stdout, logs on stderr, and writes its result to the file that the spec names. It exits
with 0 success, 2 the user's error, 3 infrastructure (worth retrying), 4 killed by a limit.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what a command needs it imports itself
    from builder_image.process import Processes


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ("containerize", "base"):
        from builder_image import commands  # their parsers and the registry client are not for builds

        return commands.main(arguments)
    if len(arguments) == 1 and arguments[0] in ("fetch", "inspect", "assemble"):
        from builder_image import plan

        if arguments[0] == "inspect" and plan.nothing_to_inspect(os.environ):
            return 0
        from builder_image import steps

        return steps.main(arguments[0], os.environ)
    from builder_image.process import Processes, hold_lifeline

    spec, lifeline = _options(arguments)
    processes = Processes()
    if lifeline is not None:
        hold_lifeline(lifeline, processes)
    return run(spec, processes)


def _options(arguments: list[str]) -> tuple[Path, int | None]:
    """(the spec, the lifeline's descriptor)."""
    lifeline = os.environ.get("EKIBEN_LIFELINE_FD")
    if len(arguments) == 1 and not arguments[0].startswith("-"):
        return Path(arguments[0]), None if lifeline is None else int(lifeline)
    import argparse  # for people

    parser = argparse.ArgumentParser(
        prog="python -m builder_image", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("spec", type=Path, help="a build's spec, JSON")
    parser.add_argument(
        "--lifeline-fd",
        type=int,
        default=lifeline,
        help="an inherited pipe; at its end of file the build and all it started end",
    )
    options = parser.parse_args(arguments)
    return options.spec, options.lifeline_fd


def run(file: Path, processes: Processes) -> int:
    """Run the build of a spec file; the exit code."""
    import shutil

    from builder_image import ending
    from builder_image.build import build
    from builder_image.installer import Tools
    from builder_image.progress import Progress
    from builder_image.spec import BadSpec, BuildSpec, plain

    try:
        spec = BuildSpec.parse(file.read_bytes())
    except (OSError, BadSpec) as error:
        print(f"{file}: {error}", file=sys.stderr)
        return ending.USER_ERROR
    progress = Progress(sys.stdout)
    try:
        result = build(spec, progress, Tools.of(os.environ, processes))
    except Exception as error:
        problem, code = ending.problem(error)
        ending.write(spec.result, {"error": {"stage": progress.current, **problem}})
        print(f"{progress.current}: {problem['code']}: {problem['message']}", file=sys.stderr)
        return code
    finally:
        shutil.rmtree(spec.work, ignore_errors=True)
    ending.write(spec.result, plain(result))
    return ending.OK


if __name__ == "__main__":
    sys.exit(main())
