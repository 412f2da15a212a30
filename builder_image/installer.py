"""uv: where it is, which of its configuration files counts, and what a build starts it with."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from builder_image.process import Processes, tool_environment
from registry.errors import InfrastructureError


@dataclass(frozen=True)
class Uv:
    """The program and the options that every call takes."""

    program: Path
    options: tuple[str, ...]

    def argv(self, *arguments: str | Path) -> list[str]:
        return [str(self.program), *(str(argument) for argument in arguments), *self.options]


@dataclass(frozen=True)
class Tools:
    """What a build works with: uv, the programs it starts, and what of the outer environment they may see."""

    uv: Uv
    processes: Processes
    env: Mapping[str, str]
    outer: Mapping[str, str] = field(default_factory=dict, repr=False)
    """The whole environment, for what the builder itself looks up in it; programs do not get it."""

    @classmethod
    def of(cls, outer: Mapping[str, str], processes: Processes) -> Tools:
        return cls(find(outer), processes, tool_environment(outer), outer)


def find(env: Mapping[str, str]) -> Uv:
    """The uv installed beside the builder, else the one on PATH.

    A uv.toml or pyproject.toml in a folder above the scratch folder must not change a build, so that only the user's
    own configuration (or the one that UV_CONFIG_FILE names) is read: it is where a private index is set.
    """
    program = _program(env)
    if "UV_CONFIG_FILE" in env:
        return Uv(program, ())
    home = Path(env["XDG_CONFIG_HOME"]) if env.get("XDG_CONFIG_HOME") else Path(env.get("HOME", "/")) / ".config"
    own = home / "uv" / "uv.toml"
    return Uv(program, ("--config-file", str(own)) if own.is_file() else ("--no-config",))


@cache
def version() -> str:
    """The version of the uv beside the builder: part of the identity of what it installs.

    Its folder of metadata is named by it; importlib.metadata reads the whole of what is installed to say the same.
    """
    import uv

    found = [folder.name for folder in Path(uv.__file__).parents[1].glob("uv-*.dist-info")]
    if len(found) == 1:
        return found[0].removeprefix("uv-").removesuffix(".dist-info")
    from importlib import metadata

    return metadata.version("uv")


def _program(env: Mapping[str, str]) -> Path:
    try:
        import uv

        return Path(uv.find_uv_bin())
    except (ImportError, FileNotFoundError):
        found = shutil.which("uv", path=env.get("PATH"))
    if found is None:
        raise InfrastructureError(
            "uv_missing", "the program uv was not found beside the builder nor on PATH", hint="pip install uv"
        )
    return Path(found)
