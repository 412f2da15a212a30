"""What a user's requirements.txt, pylock.toml or uv.lock asks for, and whether that is more than a kind brings.

A package is code: it is imported where the model is inspected and served, and a `.pth` file of it runs in every process
of its environment. So what a kind's lock does not hold already needs the permission that a project needs.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from registry.errors import UserError

if TYPE_CHECKING:
    from packaging.requirements import Requirement  # a lock that is read needs no packaging

HASH = re.compile(r"\s--hash[= ](\S+)")
_COMMENT = re.compile(r"(^|\s)#.*$")
_PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;]+)")


def lines_of(name: str, data: bytes) -> tuple[str, ...]:
    """The requirement lines of a user's requirements.txt, pylock.toml or pyproject.toml, hashes kept where given.

    Options, URLs, paths and editable installs raise `bad_requirements`: where packages come from is decided by the
    operator of the builder, and a build must be repeatable.
    """
    if name.startswith("pylock.") and name.endswith(".toml"):
        return _pylock_lines(toml(name, data), name)
    if name.endswith(".toml"):
        project = toml(name, data).get("project", {})
        listed = project.get("dependencies", []) if isinstance(project, dict) else None
        if not isinstance(listed, list) or not all(isinstance(line, str) for line in listed):
            raise UserError("bad_requirements", f"The dependencies of {name} must be texts.", field="requirements")
        return requirement_lines(listed, name)
    return requirement_lines(logical_lines(_text(name, data)), name)


def declared(name: str, data: bytes) -> tuple[str, ...]:
    """The same, of uv.lock too: every package that it locks, as the lock's project may need any of them."""
    if name != "uv.lock":
        return lines_of(name, data)
    packages = _tables(toml(name, data).get("package", []), name)
    lines = [
        f"{package.get('name')}=={package.get('version')}"
        for package in packages
        if not {"virtual", "editable"} & set(package.get("source") or ())
    ]
    return requirement_lines(lines, name)


def pins_of(lock: str) -> dict[str, list[tuple[str, frozenset[str]]]]:
    """Name → each pinned version with its hashes, of a lock's text."""
    pins: dict[str, list[tuple[str, frozenset[str]]]] = {}
    for line in logical_lines(lock):
        if (found := _PIN.match(line)) is not None:
            pins.setdefault(canonicalize_name(found[1]), []).append((found[2], frozenset(HASH.findall(line))))
    return pins


def beyond(lines: Iterable[str], lock: str) -> dict[str, str]:
    """Name → requirement of each line that the packages of a lock do not satisfy as they are."""
    pins = pins_of(lock)
    more = {}
    for line in lines:
        wanted = requirement_of(HASH.sub("", " " + line).strip())
        hashes = frozenset(HASH.findall(" " + line))
        name = canonicalize_name(wanted.name)
        satisfied = name in pins and all(
            wanted.specifier.contains(version, prereleases=True) and (not hashes or hashes & known)
            for version, known in pins[name]
        )
        if not satisfied or wanted.extras or wanted.url is not None:
            more[name] = str(wanted)
    return more


def check_permitted(more: Mapping[str, str], kind: str, *, allow_code: bool, allowed: Collection[str]) -> None:
    """UserError `run_code_not_allowed` unless code may run or each package is on the operator's list of names."""
    names = {canonicalize_name(name) for name in allowed}
    refused = sorted(name for name in more if name not in names)
    if allow_code or not refused:
        return
    shown = ", ".join(more[name][:80] for name in refused[:5])
    raise UserError(
        "run_code_not_allowed",
        f"The requirements ask for {shown}, which the kind {kind} does not bring in this form. A package is code, and "
        "this service runs code of users only with permission.",
        field="requirements",
        hint="Leave out what the kind brings, or let the operator set EKIBEN_ALLOWED_PACKAGES="
        f"{','.join(refused[:5])} or EKIBEN_RUN_CODE=true.",
        status=403,
    )


def requirement_lines(lines: Iterable[str], source: str) -> tuple[str, ...]:
    """Check requirement lines and write them in one form; `source` is named in errors."""
    checked = []
    for line in lines:
        if line.startswith("-"):
            option = line.split()[0].split("=")[0]
            raise UserError(
                "bad_requirements",
                f"{source} has the option {option}, which is not accepted",
                field="requirements",
                hint=_OPTION_HINTS.get(option, "keep to lines such as `pandas>=2.2`"),
            )
        requirement = requirement_of(HASH.sub("", " " + line).strip(), source)
        if requirement.url is not None:
            raise UserError(
                "bad_requirements",
                f"{source} takes {requirement.name} from a URL, a path or a repository",
                field="requirements",
                hint="put its wheel into the folder wheels/ of your project, and require it by name",
            )
        hashes = sorted(HASH.findall(" " + line))
        checked.append(" ".join([str(requirement), *(f"--hash={value}" for value in hashes)]))
    return tuple(checked)


_INDEX_HINT = "set the package index where Ekiben runs (UV_DEFAULT_INDEX, UV_INDEX), not in the requirements"
_OPTION_HINTS = {
    **dict.fromkeys(("--index-url", "-i", "--extra-index-url", "--find-links", "-f", "--trusted-host"), _INDEX_HINT),
    **dict.fromkeys(("-e", "--editable"), "put its wheel into the folder wheels/ of your project instead"),
    **dict.fromkeys(("-r", "--requirement", "-c", "--constraint"), "write all requirements into one file"),
}


def logical_lines(text: str) -> list[str]:
    """Lines of a requirements file: continued lines joined, comments and blank lines gone."""
    lines, current = [], ""
    for raw in text.splitlines():
        line = _COMMENT.sub("", raw).rstrip()
        if line.endswith("\\"):
            current += line[:-1] + " "
            continue
        current += line
        if current.strip():
            lines.append(current.strip())
        current = ""
    if current.strip():
        lines.append(current.strip())
    return lines


def canonicalize_name(name: str) -> str:
    """As the index compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_of(text: str, source: str = "the requirements") -> Requirement:
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        return Requirement(text)
    except (InvalidRequirement, RecursionError) as error:
        hint = "one requirement a line, such as `pandas>=2.2`"
        if re.match(r"(git\+|https?:|file:|\.{0,2}/|[A-Za-z]:\\)", text) or text.endswith((".whl", ".tar.gz")):
            hint = "put its wheel into the folder wheels/ of your project, and require it by name"
        raise UserError(
            "bad_requirements",
            f"{source}: {text[:120]!r} is not a requirement",
            field="requirements",
            hint=hint,
        ) from error


def toml(name: str, data: bytes) -> dict[str, Any]:
    """The document in a user's TOML file. UserError `bad_requirements`."""
    try:
        return tomllib.loads(_text(name, data))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError("bad_requirements", f"{name} is not TOML: {error}", field="requirements") from error


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError("bad_requirements", f"{name} is not UTF-8 text: {error}", field="requirements") from error


def _tables(value: object, source: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise UserError("bad_requirements", f"The packages of {source} must be a list of tables.", field="requirements")
    return value


def _pylock_lines(data: Mapping[str, Any], source: str) -> tuple[str, ...]:
    """PEP 751. Packages without a wheel from an index are refused, as in requirements.txt."""
    lines = []
    for package in _tables(data.get("packages", []), source):
        name = str(package.get("name", "?"))
        if not package.get("wheels") or not package.get("version"):
            raise _not_from_index(source, name)
        found = [wheel.get("hashes") for wheel in _tables(package["wheels"], source)]
        hashes = [f"sha256:{each['sha256']}" for each in found if isinstance(each, dict) and "sha256" in each]
        lines.append(_pinned(name, str(package["version"]), package.get("marker"), hashes))
    return requirement_lines(lines, source)


def _pinned(name: str, version: str, marker: str | None, hashes: Sequence[str]) -> str:
    condition = f" ; {marker}" if marker else ""
    return " ".join([f"{name}=={version}{condition}", *(f"--hash={value}" for value in hashes)])


def _not_from_index(source: str, name: str) -> UserError:
    return UserError(
        "bad_requirements",
        f"{source} takes {name} from somewhere else than a package index, or has no wheel of it",
        field="requirements",
        hint="put its wheel into the folder wheels/ of your project, and require it by name",
    )
