"""Requirements and their lock: which packages, at which versions, with which hashes.

A lock is text of the form `name==version ; marker --hash=sha256:…`, one package a line, nothing else: no index, no
options, no comments, so that its digest is a function of what gets installed. Locks are universal: the same text serves
each platform.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from builder_image.installer import Tools
from registry import digest
from registry import requirements as asked_for
from registry.errors import InfrastructureError, UserError
from registry.requirements import HASH, canonicalize_name, logical_lines, requirement_lines, requirement_of

_FORMAT = 1
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?")
_PLAIN_PIN = re.compile(
    r"([a-z0-9]+(?:-[a-z0-9]+)*)==([0-9][a-z0-9.]*)(?:\s*;\s*"
    r"(sys_platform|platform_machine|platform_system|os_name|implementation_name|python_full_version)"
    r" (==|!=|<|>=) (['\"])([A-Za-z0-9._]+)\5)?"
)
_NETWORK = ("failed to fetch", "error sending request", "connection", "timed out", "dns error", "status code 5")
_NO_WHEEL = re.compile(r"(?:Wheels are required for `([^`]+)`)|(\S+) has no (?:usable )?wheels|has no wheels with")


@dataclass(frozen=True)
class Pin:
    """One line of a lock."""

    name: str
    requirement: str
    hashes: tuple[str, ...]

    def line(self) -> str:
        return " ".join([self.requirement, *(f"--hash={value}" for value in self.hashes)])


@dataclass(frozen=True)
class Lock:
    """Pins sorted by name; equal locks have equal text."""

    pins: tuple[Pin, ...]

    @cached_property
    def text(self) -> str:
        return "".join(pin.line() + "\n" for pin in self.pins)

    @cached_property
    def digest(self) -> str:
        return digest.of_bytes(self.text.encode())

    def version(self, name: str) -> str | None:
        """The pinned version of a package, or None."""
        for pin in self.pins:
            if pin.name == name:
                return pin.requirement.partition("==")[2].split(";")[0].strip()
        return None


def parse(text: str) -> Lock:
    """Read a lock, as uv or pip-compile write it. Every line must be pinned and carry a hash."""
    pins = []
    for line in logical_lines(text):  # most are plain, and parsing them in full takes longer than all the rest
        hashes = tuple(sorted(HASH.findall(" " + line)))
        text = HASH.sub("", " " + line).strip()
        plain = _PLAIN_PIN.fullmatch(text)
        if plain is not None and hashes:
            marker = f'; {plain[3]} {plain[4]} "{plain[6]}"' if plain[3] else ""
            pins.append(Pin(plain[1], f"{plain[1]}=={plain[2]}{marker}", hashes))
            continue
        requirement = requirement_of(text)
        if "==" not in str(requirement.specifier) or not hashes:
            raise UserError(
                "bad_requirements",
                f"the lock line {line[:120]!r} is not pinned with a hash",
                field="requirements",
                hint="make the lock with `uv pip compile --universal --generate-hashes`",
            )
        pins.append(Pin(canonicalize_name(requirement.name), str(requirement), hashes))
    return Lock(tuple(sorted(pins, key=lambda pin: (pin.name, pin.requirement))))


def requirements_of(path: Path) -> tuple[str, ...]:
    """The requirement lines of a user's requirements.txt, pylock.toml or pyproject.toml, hashes kept where given.

    Raises `bad_requirements` as registry.requirements does.
    """
    return asked_for.lines_of(path.name, path.read_bytes())


def user_requirements(path: Path, *, work: Path, tools: Tools) -> tuple[str, ...]:
    """The requirement lines of whichever file the user gave: `requirements_of`, or uv.lock."""
    if path.name == "uv.lock":
        return export_uv_lock(path, work=work, tools=tools)
    return requirements_of(path)


def resolve(
    requirements: Sequence[str],
    *,
    python: str,
    work: Path,
    tools: Tools,
    wheels: Path | None = None,
    known: Path | None = None,
) -> Lock:
    """Resolve requirement lines into a universal lock with hashes, from wheels only.

    `known` is a folder of earlier resolutions: the same requirements give the same lock, also tomorrow and without a
    network, so that new weights do not bring new packages.

    `python` is a minor version such as `3.11`; `wheels` a folder of the user's own wheels, each of which wins over the
    index, so that nobody can publish a newer package under a private name. Raises UserError
    `unresolvable_requirements`, `no_wheel` or `bad_requirements`, InfrastructureError `index_unreachable`.
    """
    own = own_wheels(wheels) if wheels is not None else {}
    asked = [_FORMAT, sorted(requirements), python, sorted((name, wheel.hashes) for name, wheel in own.items())]
    memory = None if known is None else known / f"{digest.of_json(asked)[7:]}.txt"
    if memory is not None and memory.is_file():
        return parse(memory.read_text())
    lock = _resolve(requirements, own, python, work, tools, wheels)
    if memory is not None:
        memory.parent.mkdir(parents=True, exist_ok=True)
        draft = memory.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(lock.text)
        os.replace(draft, memory)
    return lock


def _resolve(
    requirements: Sequence[str],
    own: Mapping[str, OwnWheel],
    python: str,
    work: Path,
    tools: Tools,
    wheels: Path | None,
) -> Lock:
    source, constraints, output = work / "requirements.in", work / "constraints.txt", work / "requirements.lock"
    source.write_text("".join(HASH.sub("", " " + line).strip() + "\n" for line in requirements))
    constraints.write_text("".join(f"{name}=={wheel.version}\n" for name, wheel in own.items()))
    output.unlink(missing_ok=True)
    argv = tools.uv.argv(
        "pip", "compile", source.name, "--constraint", constraints.name, "--output-file", output.name,
        "--universal", "--python-version", python, "--generate-hashes", "--only-binary", ":all:",
        "--no-header", "--no-annotate", "--quiet", *(["--find-links", str(wheels)] if own else []),
    )  # fmt: skip
    done = tools.processes.run(argv, env=tools.env, cwd=work)
    if done.code != 0:
        raise _explain(done.output, python)
    return _narrow(parse(output.read_text()), _given_hashes(requirements), own)


@dataclass(frozen=True)
class OwnWheel:
    version: str
    hashes: tuple[str, ...]


def own_wheels(folder: Path) -> dict[str, OwnWheel]:
    """The user's wheels by package name; one version of each."""
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    found: dict[str, OwnWheel] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.suffix != ".whl":
            continue
        try:
            raw_name, raw_version, _, _ = parse_wheel_filename(path.name)
        except InvalidWheelFilename as error:
            raise UserError("bad_requirements", f"wheels/{path.name}: {error}", field="requirements") from error
        name, version = str(raw_name), str(raw_version)
        with path.open("rb") as file:
            value = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
        other = found.get(name)
        if other is not None and other.version != version:
            raise UserError(
                "bad_requirements",
                f"wheels/ holds two versions of {name}: {other.version} and {version}",
                field="requirements",
                hint="keep the one that your service needs",
            )
        found[name] = OwnWheel(version, tuple(sorted({value, *(other.hashes if other else ())})))
    return found


def _given_hashes(requirements: Iterable[str]) -> dict[str, set[str]]:
    given: dict[str, set[str]] = {}
    for line in requirements:
        if hashes := HASH.findall(" " + line):
            name = canonicalize_name(requirement_of(HASH.sub("", " " + line).strip()).name)
            given.setdefault(name, set()).update(hashes)
    return given


def _narrow(lock: Lock, given: Mapping[str, set[str]], own: Mapping[str, OwnWheel]) -> Lock:
    """Keep only the hashes that the user's own lock or own wheel allow: what they tested is what gets installed."""
    pins = []
    for pin in lock.pins:
        hashes = own[pin.name].hashes if pin.name in own else pin.hashes
        if pin.name in given:
            hashes = tuple(value for value in hashes if value in given[pin.name])
            if not hashes:
                raise UserError(
                    "bad_requirements",
                    f"none of the hashes given for {pin.requirement} is offered by the package index",
                    field="requirements",
                    hint="make your lock again from the same index that Ekiben uses",
                )
        pins.append(Pin(pin.name, pin.requirement, hashes))
    return Lock(tuple(pins))


def _explain(output: str, python: str) -> UserError | InfrastructureError:
    """Translate what uv says."""
    text = " ".join(line.strip() for line in output.splitlines() if line.strip())
    text = text.replace("error: ", "").replace("cause: ", "").strip()
    lower = text.lower()
    if "no solution found" in lower:
        text = text.partition("hint:")[0].replace("No solution found when resolving dependencies", "").strip(" :")
        found = _NO_WHEEL.search(output)
        if found is not None:
            package = found.group(1) or found.group(2) or "a package"
            return UserError(
                "no_wheel",
                f"there is no wheel of {package} for Python {python}: {text}",
                field="requirements",
                hint=f"build its wheel and put it into wheels/ of a project, or choose another version of {package}",
            )
        return UserError(
            "unresolvable_requirements",
            text,
            field="requirements",
            hint="loosen or correct the versions; `uv pip compile requirements.txt` shows the same conflict locally",
        )
    if any(word in lower for word in _NETWORK):
        return InfrastructureError(
            "index_unreachable",
            f"the package index could not be read: {text}",
            hint="check the network, HTTPS_PROXY, SSL_CERT_FILE and UV_DEFAULT_INDEX",
        )
    return UserError("bad_requirements", text or "uv could not read the requirements", field="requirements")


def export_uv_lock(path: Path, *, work: Path, tools: Tools) -> tuple[str, ...]:
    """What the project of a uv.lock itself needs, as requirement lines with hashes: extras and development groups out.

    uv reads a lock only beside a pyproject.toml; a bare one is written, so that nothing of the user's is evaluated.
    """
    packages = asked_for.toml(path.name, path.read_bytes()).get("package", [])
    roots = [package for package in packages if {"virtual", "editable"} & set(package.get("source", {}))]
    if len(roots) != 1 or _NAME.fullmatch(str(roots[0].get("name"))) is None:
        raise UserError(
            "bad_requirements",
            f"{path.name} describes {len(roots)} projects, not one",
            field="requirements",
            hint="export what the service needs: `uv export --no-emit-project > requirements.txt`",
        )
    folder = work / "uv-lock"
    folder.mkdir(exist_ok=True)
    (folder / "uv.lock").write_bytes(path.read_bytes())
    project = {"project": {"name": roots[0]["name"], "version": "0", "requires-python": ">=3.8"}}
    import tomli_w

    (folder / "pyproject.toml").write_text(tomli_w.dumps(project))
    output = folder / "requirements.txt"
    argv = tools.uv.argv(
        "export", "--frozen", "--no-emit-project", "--no-default-groups", "--no-header", "--no-annotate", "--quiet",
        "--output-file", output.name,
    )  # fmt: skip
    done = tools.processes.run(argv, env=tools.env, cwd=folder)
    if done.code != 0:
        raise UserError("bad_requirements", f"{path.name} could not be read: {done.output}", field="requirements")
    return requirement_lines(logical_lines(output.read_text()), path.name)
