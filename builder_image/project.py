"""A user's own Bento project (format `bento-project`): what it needs, read without running any of it.

The requirements must be known before the environment exists in which the service could be imported. So bentofile.yaml
and pyproject.toml are parsed, and BentoML's `Image` in the service's source is read as a syntax tree: its calls with
literal arguments count. What the service says when it is imported later is compared with what was found here.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from builder_image import bento, environment, lock, model
from builder_image.installer import Tools
from builder_image.spec import BuildSpec
from registry.errors import UserError
from registry.requirements import requirement_lines

BENTOML = "1.4.40"
"""For projects that do not say which: what the kinds are served with. The builder itself needs none."""
_OLDEST_BENTOML = Version("1.4")
_REQUIREMENT_FILES = ("pylock.toml", "uv.lock", "requirements.txt")
_WAY_OUT = "build this image with `bentoml containerize`, or name a base image that already has it"
_INDEX = "set the package index where Ekiben runs (UV_DEFAULT_INDEX, UV_INDEX) and remove the option"


@dataclass(frozen=True)
class Wishes:
    """What a project asks for. `packages` are requirement lines, `files` paths of requirement files in the project."""

    service: str | None = None
    packages: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    python: str | None = None
    uses_uv_lock: bool = False


@dataclass(frozen=True)
class Project:
    """The files of a project by their path below its root, which is where its bentofile.yaml or service.py is."""

    files: Mapping[str, Path] = field(default_factory=dict)

    def text(self, path: str) -> str:
        try:
            return self.files[path].read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError("bad_project", f"{path} is not UTF-8 text", field="files") from error


def recipe(spec: BuildSpec, found: model.Model, tools: Tools) -> bento.Recipe:
    """The recipe of a project's Bento.

    Raises UserError `run_code_not_allowed`, `bad_project`, `service_not_found`, `needs_dockerfile`,
    `needs_model_store`, `bad_python`, and those of the resolution.
    """
    if not spec.allow_code:
        raise UserError(
            "run_code_not_allowed",
            "this is a project with code of its own, and this server does not run users' code",
            field="files",
            hint="ask for the permission run-code, or export the model to a format that needs no code (ONNX, skops)",
        )
    project = of_files(found.files)
    wishes = read(project)
    python = environment.minor(found.manifest.python or wishes.python)
    wheels = _wheels(project, spec.work)
    if spec.lock is not None:
        resolved = lock.parse(spec.lock)
    else:
        lines = _requirements(project, wishes, found, spec.work, tools)
        resolved = lock.resolve(
            _with_bentoml(lines), python=python, work=spec.work, tools=tools, wheels=wheels, known=spec.cache.locks
        )
    _check_bentoml(resolved)
    return bento.Recipe(
        name="project",
        files=project.files,
        lock=resolved,
        python=python,
        content=found.manifest.digest,
        wheels=wheels,
        service=wishes.service,
        trusted=False,
        project=True,
        own_files=spec.serving / "own_files.py",
    )


def of_files(files: Mapping[str, Path]) -> Project:
    """Find the root: an archive often wraps everything in one folder."""
    roots = [
        PurePosixPath(path).parent
        for path in files
        if PurePosixPath(path).name in ("bentofile.yaml", "service.py") or _is_bentoml_pyproject(path, files[path])
    ]
    if not roots:
        raise UserError(
            "bad_project",
            "the project has neither bentofile.yaml, nor pyproject.toml with [tool.bentoml.build], nor service.py",
            field="files",
            hint="`ekiben init --from FILE` writes a small project around a model",
        )
    root = min(roots, key=lambda path: (len(path.parts), str(path)))
    inside = {}
    for path, place in files.items():
        if PurePosixPath(path).is_relative_to(root):
            inside[str(PurePosixPath(path).relative_to(root))] = place
    return Project(inside)


def read(project: Project) -> Wishes:
    """Everything that the project's files say, without importing them."""
    if "bentofile.yaml" in project.files:
        try:
            options = yaml.safe_load(project.text("bentofile.yaml"))
        except yaml.YAMLError as error:
            raise UserError("bad_project", f"bentofile.yaml is not YAML: {error}", field="files") from error
        wishes = _of_options(options or {}, "bentofile.yaml")
    elif "pyproject.toml" in project.files:
        wishes = _of_pyproject(project)
    else:
        wishes = Wishes()
    if wishes.service is None:
        if "service.py" not in project.files:
            raise UserError(
                "service_not_found",
                "the project does not say which service to serve",
                field="files",
                hint="write `service: service:MyService` into bentofile.yaml",
            )
        wishes = Wishes("service", wishes.packages, wishes.files, wishes.python, wishes.uses_uv_lock)
    return _with_image(project, wishes)


def _of_pyproject(project: Project) -> Wishes:
    try:
        data = tomllib.loads(project.text("pyproject.toml"))
    except tomllib.TOMLDecodeError as error:
        raise UserError("bad_project", f"pyproject.toml is not TOML: {error}", field="files") from error
    wishes = _of_options(data.get("tool", {}).get("bentoml", {}).get("build", {}), "pyproject.toml")
    dependencies = tuple(map(str, data.get("project", {}).get("dependencies", [])))
    if wishes.files:  # as in BentoML, a requirements file wins over packages
        return wishes
    packages = wishes.packages + dependencies
    return Wishes(wishes.service, packages, (), wishes.python, uses_uv_lock="uv.lock" in project.files)


def _of_options(options: Any, source: str) -> Wishes:
    """BentoML's build options. Those that layers cannot do are refused by name."""
    if not isinstance(options, dict):
        raise UserError("bad_project", f"{source} is not a mapping of options", field="files")
    docker, python = _mapping(options, "docker", source), _mapping(options, "python", source)
    for name in ("system_packages", "setup_script", "dockerfile_template", "cuda_version", "base_image"):
        if docker.get(name):
            raise needs_dockerfile(f"docker.{name}", source)
    if any(_mapping(options, "conda", source).values()):
        raise needs_dockerfile("conda", source)
    for name in ("index_url", "extra_index_url", "trusted_host", "find_links", "no_index", "pip_args"):
        if python.get(name):
            raise UserError("bad_requirements", f"{source} sets python.{name}", field="requirements", hint=_INDEX)
    if python.get("wheels"):
        raise UserError(
            "bad_requirements",
            f"{source} sets python.wheels",
            field="requirements",
            hint="put the wheels into wheels/, and require them by name",
        )
    if options.get("models"):
        raise UserError(
            "needs_model_store",
            f"{source} takes models from the model store",
            field="files",
            hint="put the model's files into the project's folder and load them from there",
        )
    service, file, packages = options.get("service"), python.get("requirements_txt"), python.get("packages") or []
    if not isinstance(packages, list):
        raise UserError("bad_project", f"python.packages in {source} is not a list", field="files")
    return Wishes(
        service=None if not service else str(service),
        packages=() if file else tuple(map(str, packages)),
        files=(_inside(str(file), source),) if file else (),
        python=str(docker["python_version"]) if docker.get("python_version") else None,
    )


def _with_image(project: Project, wishes: Wishes) -> Wishes:
    """Add what `bentoml.images.Image` in the service's source asks for."""
    path = _source_of(project, wishes.service or "")
    if path is None:
        return wishes
    try:
        tree = ast.parse(project.text(path))
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        raise UserError(
            "service_import_failed", f"{path} is not valid Python: {error}" + (f" (line {line})" if line else "")
        ) from error
    packages, files, python, uv_lock = list(wishes.packages), list(wishes.files), wishes.python, wishes.uses_uv_lock
    for method, arguments, keywords in _image_calls(tree):
        if method == "Image":
            if isinstance(keywords.get("python_version"), str):
                python = python or str(keywords["python_version"])
            if keywords.get("base_image") or arguments:
                raise needs_dockerfile("Image(base_image=…)", path)
        elif method in ("system_packages", "run", "run_script"):
            raise needs_dockerfile(f"Image.{method}", path)
        elif method == "python_packages":
            packages += [argument for argument in arguments if isinstance(argument, str)]
        elif method == "requirements_file":
            files += [_inside(argument, path) for argument in arguments if isinstance(argument, str)]
        elif method == "pyproject_toml":
            files.append(_inside(str(arguments[0]) if arguments else "pyproject.toml", path))
        elif method == "uv_lock":
            uv_lock = True
    return Wishes(wishes.service, tuple(packages), tuple(files), python, uv_lock)


def _image_calls(tree: ast.AST) -> Iterator[tuple[str, list[object], dict[str, object]]]:
    """(method, literal arguments, literal keywords) of each call on an Image, innermost first in a chain.

    A name counts as an Image when it was assigned one in the same file. Arguments that are no literals are left out;
    the comparison after the import finds what they hid.
    """
    names = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and _is_image(node.value, set())
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if _is_image_class(function):
            name = "Image"
        elif isinstance(function, ast.Attribute) and _is_image(function.value, names):
            name = function.attr
        else:
            continue
        keywords = {keyword.arg: _literal(keyword.value) for keyword in node.keywords if keyword.arg is not None}
        yield name, [_literal(argument) for argument in node.args], keywords


def _is_image(node: ast.AST, names: set[str]) -> bool:
    while isinstance(node, ast.Call):
        if _is_image_class(node.func):
            return True
        if not isinstance(node.func, ast.Attribute):
            return False
        node = node.func.value
    return isinstance(node, ast.Name) and node.id in names


def _is_image_class(node: ast.AST) -> bool:
    """`bentoml.images.Image`, `images.Image`, or `Image` (PIL's has no call of its own)."""
    if isinstance(node, ast.Attribute):
        return node.attr in ("Image", "PythonImage") and ast.unparse(node.value) in ("bentoml.images", "images")
    return isinstance(node, ast.Name) and node.id in ("Image", "PythonImage")


def _literal(node: ast.AST) -> object:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return None


def _source_of(project: Project, service: str) -> str | None:
    module = service.partition(":")[0]
    stem = module.removesuffix(".py") if module.endswith(".py") else module.replace(".", "/")
    stem = str(PurePosixPath(stem))
    candidates = [f"{stem}.py", f"{stem}/__init__.py", f"src/{stem}.py", f"src/{stem}/__init__.py"]
    return next((path for path in candidates if path in project.files), None)


def _requirements(project: Project, wishes: Wishes, found: model.Model, work: Path, tools: Tools) -> tuple[str, ...]:
    """Requirement lines: those sent along with the upload, else those the project names, else its usual files."""
    if found.requirements is not None:
        return lock.user_requirements(found.requirements, work=work, tools=tools)
    if wishes.uses_uv_lock and "uv.lock" in project.files:
        exported = lock.export_uv_lock(project.files["uv.lock"], work=work, tools=tools)
        return (*exported, *requirement_lines(wishes.packages, "the project"))
    files = list(wishes.files)
    if not files and not wishes.packages:
        files = [name for name in _REQUIREMENT_FILES if name in project.files][:1]
    lines = list(requirement_lines(wishes.packages, "the project"))
    for path in files:
        if path not in project.files:
            raise UserError("bad_requirements", f"the project names {path}, which is not in it", field="requirements")
        lines += lock.user_requirements(project.files[path], work=work, tools=tools)
    return tuple(lines)


def _with_bentoml(lines: Sequence[str]) -> list[str]:
    """A project may leave BentoML out, as BentoML itself lets it: then it gets that of the kinds."""
    names = {canonicalize_name(Requirement(line.split(" --hash=")[0]).name) for line in lines}
    return list(lines) if "bentoml" in names else [*lines, f"bentoml=={BENTOML}"]


def _check_bentoml(resolved: lock.Lock) -> None:
    pinned = resolved.version("bentoml")
    if pinned is None or Version(pinned) < _OLDEST_BENTOML:
        raise UserError(
            "old_bentoml",
            f"the project requires BentoML {pinned}; {_OLDEST_BENTOML} or newer can be served",
            field="requirements",
            hint="raise the version in the requirements",
        )


def _wheels(project: Project, work: Path) -> Path | None:
    """The project's own wheels in a folder of their own: uv must find nothing else beside them."""
    names = [path for path in project.files if PurePosixPath(path).match("wheels/*.whl") and path.count("/") == 1]
    if not names:
        return None
    folder = work / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    for path in names:
        (folder / PurePosixPath(path).name).symlink_to(project.files[path].resolve())
    return folder


def needs_dockerfile(option: str, source: str) -> UserError:
    return UserError(
        "needs_dockerfile",
        f"{source} uses {option}, which an image made of layers cannot do",
        field="files",
        hint=_WAY_OUT,
    )


def _is_bentoml_pyproject(path: str, place: Path) -> bool:
    if PurePosixPath(path).name != "pyproject.toml" or place.stat().st_size > 1 << 20:
        return False
    try:
        return "bentoml" in tomllib.loads(place.read_text(encoding="utf-8")).get("tool", {})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return False


def _mapping(options: Mapping[str, Any], name: str, source: str) -> Mapping[str, Any]:
    value = options.get(name) or {}
    if not isinstance(value, dict):
        raise UserError("bad_project", f"{name} in {source} is not a mapping", field="files")
    return value


def _inside(path: str, source: str) -> str:
    plain = PurePosixPath(path)
    if plain.is_absolute() or ".." in plain.parts:
        raise UserError("bad_project", f"{source} names {path[:100]!r}, which is outside the project", field="files")
    return str(plain)
