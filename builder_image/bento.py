"""Bentos, one a kind or project and lock, kept by content (docs/design.md §7).

A Bento is BentoML's own folder: bento.yaml, src/, env/, apis/. BentoML's `bentoml build` stamps the time, names
versions at random, locks again without hashes and copies files with the builder's modes; so the folder is written here,
from what the inspector learnt about the service, and equal inputs give equal bytes.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from builder_image.environment import Environment, made_once
from builder_image.installer import Tools
from builder_image.lock import Lock
from registry import digest, shelf
from registry.errors import InfrastructureError, UserError
from registry.requirements import canonicalize_name

FORMAT = 1
INSPECT_SECONDS = 120.0
INSPECT_MEMORY = 16 << 30
NETWORK = "EKIBEN_INSPECT_NETWORK"
ISOLATION = "EKIBEN_ISOLATION"
"""`allow`: a service is imported with the network."""
_LARGEST_ANSWER = 16 << 20
_DEEPEST = 100
_WORTH_A_LINK = 1 << 20
_IMPORT_HINT = "run `bentoml build` in the project's folder to see the same error"
_LEFT_OUT = ("__pycache__", ".git", ".venv", "venv", ".DS_Store", ".mypy_cache", ".ruff_cache", ".pytest_cache")
_CODE = {".py", ".toml", ".json", ".html", ".md", ".txt", ".in", ".yaml"}
# what the wrapper imports beyond the service: imported once while learning, so that its bytecode is there at the start
_WARM = ("_bentoml_impl.server.app", "uvicorn", "uvicorn.protocols.http.httptools_impl", "uvicorn.loops.uvloop")


@dataclass(frozen=True)
class Bento:
    dir: Path
    digest: str
    tag: str
    schema: Mapping[str, Any]
    predict: str
    envs: tuple[tuple[str, str], ...]
    reused: bool


@dataclass(frozen=True)
class Recipe:
    """What a Bento is made of. `files` and `packages` map a path in src/ to where its content is; of `files` only those
    are taken that the service's build options include."""

    name: str
    files: Mapping[str, Path]
    lock: Lock
    python: str
    content: str
    """Digest of everything that decides what the Bento holds, apart from lock and Python."""
    packages: Mapping[str, Path] = field(default_factory=dict)
    wheels: Path | None = None
    """Folder of the user's own wheels."""
    service: str | None = None
    predict: str = "/predict"
    trusted: bool = True
    """False for a user's code or packages: no network where that can be had, bounded memory."""
    project: bool = False
    """The service is the user's: what it says once it is imported is held against its source."""
    own_files: Path | None = None
    """bentos/serving/own_files.py, for a service that reads files of its own at import."""

    @property
    def version(self) -> str:
        return digest.of_json([FORMAT, self.name, self.content, self.lock.digest, self.python])[7:19]

    @property
    def tag(self) -> str:
        return f"{self.name}:{self.version}"

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.version}"


def tree(folder: Path) -> dict[str, Path]:
    """The files below a folder by path, without links and caches."""
    found = {}
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _LEFT_OUT)
        for name in sorted(names):
            path = Path(here) / name
            if name in _LEFT_OUT or name.endswith((".pyc", ".pyo")) or path.is_symlink() or not path.is_file():
                continue
            found[path.relative_to(folder).as_posix()] = path
    return found


def sources(folder: Path) -> dict[str, Path]:
    """The files of a kind or of a package of `bentos`: its code and small data, not models that were made there."""
    found = {}
    for path, place in tree(folder).items():
        parts = PurePosixPath(path)
        if not {"model", "build"} & set(parts.parts[:1]) and parts.suffix in _CODE:
            found[path] = place
    return found


def content_digest(files: Mapping[str, Path]) -> str:
    """`sha256:…` over path, executable bit and content of each file."""
    entries = []
    for path, source in sorted(files.items()):
        with source.open("rb") as file:
            value = hashlib.file_digest(file, "sha256").hexdigest()
        entries.append([path, bool(source.stat().st_mode & 0o100), value])
    return digest.of_json(entries)


def find(cache: Path, recipe: Recipe) -> Bento | None:
    """The Bento of a recipe if it is there; it is marked as wanted."""
    if not shelf.wanted(cache, recipe.folder, lambda: _known(cache, recipe) is not None):
        return None
    return _known(cache, recipe)


def _known(cache: Path, recipe: Recipe) -> Bento | None:
    place, record = cache / recipe.folder, cache / f"{recipe.folder}.json"
    try:
        known = json.loads(record.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    if not (place / "bento.yaml").is_file():
        return None
    envs = tuple((name, value) for name, value in known["envs"])
    return Bento(place, known["digest"], recipe.tag, known["schema"], _predict(recipe, known["schema"]), envs, True)


def _predict(recipe: Recipe, schema: Mapping[str, Any]) -> str:
    """The route of predictions: the kind's, or for a project `/predict` where there is one, else its first."""
    routes = [str(route.get("route")) for route in schema.get("routes", []) if isinstance(route, dict)]
    return recipe.predict if not recipe.project or recipe.predict in routes or not routes else routes[0]


def ensure(recipe: Recipe, *, environment: Environment, cache: Path, work: Path, tools: Tools) -> Bento:
    """The Bento of a recipe, made when it is not there yet; this is where a service is imported.

    Raises as `ask` and `made`.
    """
    return made(recipe, lambda: ask(recipe, environment, work, tools), cache)


def made(recipe: Recipe, answer: Callable[[], Mapping[str, Any]], cache: Path) -> Bento:
    """The Bento of a recipe, written of its files and of what its service said of itself when it was asked.

    Raises UserError `needs_dockerfile`, `bad_python`, `bad_requirements`, `bad_project`.
    """
    if (known := find(cache, recipe)) is not None:
        return known
    with made_once(cache, recipe.folder) as fresh:
        if (known := _known(cache, recipe)) is not None:
            shelf.mark(known.dir)
            return known
        said = answer()
        if recipe.project:
            _compare(recipe, said)
        _write(fresh, recipe, said)
        value = content_digest(tree(fresh))
        envs = [[env["name"], env["value"]] for env in said["envs"] if env.get("stage", "all") != "build"]
        record = fresh.with_suffix(".json")
        record.write_bytes(digest.canonical_json({"digest": value, "schema": said["schema"], "envs": envs}))
        place = cache / recipe.folder
        shutil.rmtree(place, ignore_errors=True)
        os.replace(fresh, place)
        os.replace(record, cache / f"{recipe.folder}.json")
    found = find(cache, recipe)
    if found is None:
        raise InfrastructureError("cache_damaged", f"the Bento {recipe.tag} vanished from {cache.name}")
    return Bento(found.dir, found.digest, found.tag, found.schema, found.predict, found.envs, reused=False)


def ask(
    recipe: Recipe,
    environment: Environment,
    work: Path,
    tools: Tools,
    *,
    answer: Path | None = None,
    link: bool = False,
) -> dict[str, Any]:
    """Import the service in its environment, inside the sandbox, and give what it says of itself, checked.

    It says so in the file `answer`. With `link` the large files of a project are links to where they are, which must be
    read-only. Raises UserError `service_import_failed`, `service_not_found`, `legacy_service`, `inspect_timeout`,
    `needs_dockerfile`, `needs_model_store`; InfrastructureError `sandbox_failed`.
    """
    from builder_image import sandbox  # ctypes takes its time, and most builds import no service

    context = work / "context"
    shutil.rmtree(context, ignore_errors=True)
    for name in ("home", "tmp"):
        (work / name).mkdir(exist_ok=True)
    large = {path: place for path, place in recipe.files.items() if link and place.stat().st_size >= _WORTH_A_LINK}
    _copy(context, {**{path: place for path, place in recipe.files.items() if path not in large}, **recipe.packages})
    for path, place in large.items():
        (context / path).parent.mkdir(parents=True, exist_ok=True)
        (context / path).symlink_to(place.absolute())
    order, answer = work / "inspect-order.json", answer or work / "inspect-answer.json"
    answer.unlink(missing_ok=True)
    order.write_text(
        json.dumps(
            {
                "context": str(context),
                "service": recipe.service,
                "warm": _WARM,
                "own_files": str(recipe.own_files) if recipe.own_files else None,
            }
        )
    )
    # nothing of the builder's environment but PATH: a user's code must find no token, no index with a password
    env = {
        "PATH": f"{environment.dir / 'bin'}:{tools.env.get('PATH', '/usr/bin:/bin')}",
        "HOME": str(work / "home"),
        "TMPDIR": str(work / "tmp"),
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "PYTHONHASHSEED": "0",
        "BENTOML_HOME": str(work / "home" / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "True",
    }
    if not recipe.trusted:
        env["PYTHONDONTWRITEBYTECODE"] = "1"
    network = _network(tools)
    bounds = {
        "memory": None if recipe.trusted else INSPECT_MEMORY,
        "network": network,
        "files": None if recipe.trusted else _files(tools, recipe, environment, work, answer, in_pod=link),
    }
    done = tools.processes.run(
        [
            sys.executable, "-I", "-S", sandbox.__file__, json.dumps(bounds),
            environment.interpreter, "-P", Path(__file__).with_name("inspector.py"), order, answer,
        ],
        env=env,
        cwd=context,
        seconds=INSPECT_SECONDS,
        own_session=not recipe.trusted,
    )  # fmt: skip
    if done.timed_out:
        raise UserError(
            "inspect_timeout",
            f"importing the service took longer than {INSPECT_SECONDS:.0f} s",
            hint="load the model in the service's __init__, and do no work when the module is imported",
        )
    if done.code == sandbox.FAILED and not answer.exists():
        raise InfrastructureError(
            "sandbox_failed", done.output[-400:].strip(), hint=f"{NETWORK}=allow imports the service with the network"
        )
    hint = _IMPORT_HINT if network else f"{_IMPORT_HINT}; it is imported without network"
    return _answer(answer, done.output, done.code, str(context), hint)


def _files(tools: Tools, recipe: Recipe, environment: Environment, work: Path, answer: Path, *, in_pod: bool) -> Any:
    """What a user's code reads and writes: of one's own machine nothing but the system, its environment and its folder.
    A pod's step has nothing else to read."""
    if tools.outer.get(ISOLATION) == "off":
        return None
    from registry.confinement import system

    own = [environment.dir, system.interpreter(str(environment.interpreter)), Path(__file__).with_name("inspector.py")]
    own += [] if recipe.own_files is None else [recipe.own_files]
    return {
        "read": ["/"] if in_pod else [*system.folders(), *map(str, own)],
        "write": [str(work), str(answer.parent)],
        "devices": system.devices(),
    }


def _network(tools: Tools) -> bool:
    """Whether a service is imported with the network: where somebody wants it so, or the system knows no other way."""
    if tools.outer.get(NETWORK) == "allow":
        return True
    from builder_image import sandbox

    why = sandbox.unavailable()
    if why is not None:
        print(f"services are imported with the network: {why}", file=sys.stderr)
    return why is not None


def told(file: Path) -> dict[str, Any]:
    """What a service said of itself in a process that is trusted with nothing: checked as `ask` does."""
    return _answer(file, "", 0, "")


def _answer(file: Path, output: str, code: int, context: str, hint: str = _IMPORT_HINT) -> dict[str, Any]:
    """Check what the inspector hands over as one checks an upload: what it is, size, shape, types."""
    data = _read(file)
    if data is None:
        raise UserError(
            "service_import_failed",
            f"the service ended its process while it was imported (exit {code}): {output[-1200:].strip()}",
            hint=hint,
        )
    try:
        answer: Any = json.loads(data)
        digest.canonical_json(answer)  # what is no number, or no text in UTF-8, ends here
    except (ValueError, RecursionError) as error:
        raise _malformed("is not JSON") from error
    if not _is_shallow(answer):
        raise _malformed(f"is nested more than {_DEEPEST} deep")
    if isinstance(answer, dict) and isinstance(answer.get("error"), dict):
        raise _refusal(answer["error"], context, hint)
    for name, kind in _SHAPE.items():
        if not isinstance(answer, dict) or not isinstance(answer.get(name), kind):
            raise _malformed(f"has no {name}")
    image, routes = answer["image"], answer["schema"].get("routes", [])
    if not (
        all(_is_env(env) for env in answer["envs"])
        and all(isinstance(path, str) for path in answer["included"])
        and all(isinstance(image.get(name, []), list) for name in ("commands", "post_commands", "build_include"))
        and isinstance(routes, list)
        and all(isinstance(route, dict) and str(route.get("route")).startswith("/") for route in routes)
    ):
        raise _malformed("is malformed")
    if answer["models"]:
        raise UserError(
            "needs_model_store",
            f"the service takes {', '.join(map(str, answer['models']))[:300]} from a model store",
            hint="put the model's files into the project's folder and load them from there",
        )
    return dict(answer)


def _read(file: Path) -> bytes | None:
    """The bytes of a plain file; None where there is none. A link could lead out, a pipe would never end."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _malformed(f"cannot be read ({error.strerror})") from error
    known = os.fstat(descriptor)
    if not stat.S_ISREG(known.st_mode) or known.st_nlink != 1:
        os.close(descriptor)
        raise _malformed("is not a plain file")
    with open(descriptor, "rb") as source:
        data = source.read(_LARGEST_ANSWER + 1)
    if len(data) > _LARGEST_ANSWER:
        raise _malformed("is larger than 16 MiB")
    return data


def _is_shallow(value: object) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        level = [inner for each in level if isinstance(each, dict | list) for inner in _inside(each)]
        if not level:
            return True
    return False


def _inside(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _is_env(env: object) -> bool:
    """Whether a container can be started with the variable."""
    if not isinstance(env, dict):
        return False
    name, value = env.get("name"), env.get("value")
    if not isinstance(name, str) or not isinstance(value, str):
        return False
    return bool(name) and "=" not in name and "\0" not in name + value


def _malformed(how: str) -> UserError:
    return UserError("service_import_failed", f"the service's description {how}", hint=_IMPORT_HINT)


def _compare(recipe: Recipe, answer: Mapping[str, Any]) -> None:
    """Hold what the service said once it was imported against what was read from its source."""
    if answer["unusual"]:
        raise UserError(
            "needs_dockerfile",
            f"the service's image needs what layers cannot do: {'; '.join(map(str, answer['unusual']))[:400]}",
            field="files",
            hint="build this image with `bentoml containerize`, or name a base image that already has it",
        )
    wanted = str(answer["image"].get("python_version"))
    if wanted != recipe.python:
        raise UserError(
            "bad_python",
            f"the service's image asks for Python {wanted}, but Python {recipe.python} was used",
            field="python",
            hint=f"write python_version as a literal in the service's Image, or upload with python={wanted}",
        )
    locked = {pin.name for pin in recipe.lock.pins}
    for line in str(answer["image"].get("python_requirements", "")).splitlines():
        name = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line.strip())
        if name is not None and canonicalize_name(name[0]) not in locked:
            raise UserError(
                "bad_requirements",
                f"the service's image asks for {line.strip()[:80]!r}, which was not found by reading its source",
                field="requirements",
                hint="write it into requirements.txt",
            )


_SHAPE: dict[str, type] = {
    "service": str, "entry_service": str, "schema": dict, "openapi": dict, "services": list, "envs": list,
    "labels": dict, "args": dict, "models": list, "unusual": list, "included": list, "src_layout": bool, "image": dict,
    "dockerfile": str, "entrypoint": str, "bentofile": str, "bentoml_version": str,
}  # fmt: skip


def _refusal(error: Mapping[str, Any], context: str, hint: str) -> UserError:
    code, message = str(error.get("code")), str(error.get("message"))
    detail = "\n".join(part for part in (message, str(error.get("detail") or "")) if part)
    detail = detail.replace(context + "/", "") if context else detail
    hints = {
        "service_not_found": "name it in bentofile.yaml: `service: service:MyService`",
        "legacy_service": "write it with @bentoml.service, as BentoML has since 1.2",
        "needs_dockerfile": "use `bentoml containerize`, or a base image that has what it needs",
    }
    if code not in hints:
        code = "service_import_failed"
    return UserError(code, detail, hint=hints.get(code, hint))


def _write(folder: Path, recipe: Recipe, answer: Mapping[str, Any]) -> None:
    included = {str(PurePosixPath(path)) for path in answer["included"]}
    files = {path: source for path, source in recipe.files.items() if path in included}
    if answer["src_layout"]:
        files = {path.removeprefix("src/"): source for path, source in files.items()}
        if any(str(above) in files for path in files for above in PurePosixPath(path).parents):
            raise UserError(
                "bad_project", "a file and a folder have the same name once src/ is taken away", field="files"
            )
    _copy(folder / "src", {**files, **recipe.packages})
    if "bentofile.yaml" not in files:
        _text(folder / "src" / "bentofile.yaml", answer["bentofile"])
    _text(folder / "env" / "python" / "requirements.txt", _find_links(recipe) + recipe.lock.text)
    _text(folder / "env" / "docker" / "Dockerfile", answer["dockerfile"])
    _text(folder / "env" / "docker" / "entrypoint.sh", answer["entrypoint"], mode=0o755)
    _text(folder / "apis" / "openapi.yaml", _yaml(answer["openapi"]))
    _text(folder / "apis" / "schema.json", json.dumps(answer["schema"], indent=2, sort_keys=True))
    readme = recipe.files.get("README.md")
    description = answer.get("description")
    if isinstance(description, str) and not description.startswith("file:"):
        _text(folder / "README.md", description)
    elif readme is not None:
        _text(folder / "README.md", readme.read_text(encoding="utf-8", errors="replace"))
    else:
        _text(folder / "README.md", f"# {recipe.tag}\n")
    _text(folder / "bento.yaml", _yaml(_bento_yaml(recipe, answer)))


def _bento_yaml(recipe: Recipe, answer: Mapping[str, Any]) -> dict[str, Any]:
    """BentoML's BentoInfoV2. The pins stand without hashes: the lock is in env/python, and this file is read at each
    start of the service."""
    image = answer["image"]
    return {
        "service": answer["service"],
        "name": recipe.name,
        "version": recipe.version,
        "bentoml_version": answer["bentoml_version"],
        "creation_time": "2000-01-01T00:00:00+00:00",
        "labels": {str(key): str(value) for key, value in sorted(answer["labels"].items())},
        "models": [],
        "entry_service": answer["entry_service"],
        "services": answer["services"],
        "envs": answer["envs"],
        "schema": answer["schema"],
        "args": answer["args"],
        "spec": 2,
        "image": {
            "base_image": str(image.get("base_image", "")),
            "python_version": recipe.python,
            "commands": [str(command) for command in image.get("commands", [])],
            "python_requirements": "".join(pin.requirement + "\n" for pin in recipe.lock.pins),
            "post_commands": [str(command) for command in image.get("post_commands", [])],
            "build_include": [str(path) for path in image.get("build_include", [])],
        },
    }


def _find_links(recipe: Recipe) -> str:
    own = any(fnmatch.fnmatch(path, "wheels/*.whl") for path in recipe.files)
    return "--find-links ./wheels\n" if own else ""


def _yaml(value: object) -> str:
    import yaml  # not needed when everything is cached

    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120))


def _text(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
    path.chmod(mode)


def _copy(folder: Path, files: Mapping[str, Path]) -> None:
    """Copy files under new modes: readable by everybody, executable where they were."""
    folder.mkdir(parents=True, exist_ok=True)
    for path, source in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        target.chmod(0o755 if source.stat().st_mode & 0o100 else 0o644)


def packages(names: Sequence[str], serving: Path) -> dict[str, Path]:
    """The shared code a kind carries in src/: `bentos.serving` → `bentos/__init__.py`, `bentos/serving/…`.

    `serving` is the folder of `bentos.serving`; other packages of `bentos` are its siblings.
    """
    root = serving.parent
    found: dict[str, Path] = {}
    if (root / "__init__.py").is_file():
        found["bentos/__init__.py"] = root / "__init__.py"
    for name in _with_serving(names):
        parts = name.split(".")
        if len(parts) != 2 or parts[0] != "bentos" or not parts[1].isidentifier():
            raise InfrastructureError("bad_kind", f"a kind names the package {name!r}, which is not one of bentos")
        folder = serving if parts[1] == "serving" else root / parts[1]
        found |= {f"bentos/{parts[1]}/{path}": place for path, place in sources(folder).items()}
    return found


def _with_serving(names: Iterable[str]) -> list[str]:
    return sorted({"bentos.serving", *names})
