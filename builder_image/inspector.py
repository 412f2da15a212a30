"""Learns what a BentoML service offers. Run as a script by the interpreter of the service's own environment:

    python inspector.py ORDER.json ANSWER.json

It is the only step of a build that imports a user's code. It runs without secrets, bounded in time and memory, inside
`sandbox.py`, and hands over one JSON document, which the builder trusts as little as an upload. Nothing but the
standard library and the service's own BentoML may be imported here.

ORDER   {"context": dir, "service": "service:Name" | null, "warm": [module, …], "own_files": file | null}
ANSWER  {"service", "entry_service", "schema", "openapi", "services", "envs", "labels", "args", "description", "models",
         "included", "src_layout", "image", "dockerfile", "entrypoint", "bentofile", "bentoml_version"}
        or {"error": {"code", "message", "detail"}}
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

_LONGEST_TRACEBACK = 1800


def main(order_file: str, answer_file: str) -> None:
    order = json.loads(Path(order_file).read_text())
    answer: dict[str, Any]
    try:
        answer = inspect(order)
    except BaseException as error:
        answer = {"error": _failure(error)}
    text = json.dumps(answer, ensure_ascii=False, sort_keys=True, default=_plain)
    Path(answer_file).write_text(text, encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # threads that the service started at import must not keep us


def inspect(order: dict[str, Any]) -> dict[str, Any]:
    import attrs
    from _bentoml_impl.docker import generate_dockerfile
    from _bentoml_sdk.images import populate_image_from_build_config
    from bentoml._internal.bento.bento import BENTO_YAML_FILENAME, BentoServiceInfo, ImageInfo
    from bentoml._internal.bento.build_config import BentoBuildConfig, BentoPathSpec
    from bentoml._internal.configuration import BENTOML_VERSION
    from bentoml._internal.service import Service as LegacyService
    from bentoml._internal.service.loader import load
    from bentoml._internal.utils.cattr import bentoml_cattr

    context = Path(order["context"]).resolve()
    os.chdir(context)
    if order.get("own_files"):
        runpy.run_path(order["own_files"])["allow"]()
    config = _config(BentoBuildConfig, context)
    target = order.get("service") or config.service
    if not target:
        raise _Refused("service_not_found", "neither bentofile.yaml nor pyproject.toml names a service")
    service = load(target, working_dir=str(context))
    if isinstance(service, LegacyService):
        raise _Refused("legacy_service", "the service is of BentoML before 1.2 (bentoml.Service with runners)")
    service.inject_config()
    image = populate_image_from_build_config(service.image, config, str(context))
    if image is None:
        raise _Refused("needs_dockerfile", "bentofile.yaml asks for conda, CUDA or a Dockerfile template")
    envs = [*config.envs, *service.envs]
    config = config.with_defaults()
    object.__setattr__(config, "service", target)
    specs = BentoPathSpec(config.include, config.exclude, str(context))
    included = sorted(path for path in _walk(context) if specs.includes(path))
    info = ImageInfo(
        base_image=image.base_image,
        python_version=image.python_version,
        commands=image.commands,
        python_requirements=image.python_requirements,
        post_commands=image.post_commands,
        build_include=image.build_include_paths,
    )
    with tempfile.TemporaryDirectory() as empty:
        dockerfile = generate_dockerfile(
            info, Path(empty), enable_buildkit=False, envs=[env for env in envs if env.stage != "build"]
        )
    bentofile = io.StringIO()
    config.to_yaml(bentofile)
    entrypoint = Path(importlib.import_module("bentoml._internal.container").__file__ or "").parent
    models = [str(model.tag) for model in config.models]
    for each in service.all_services().values():
        models += [str(getattr(model, "tag", None) or getattr(model, "model_id", model)) for model in each.models]
    services = [] if models else [BentoServiceInfo.from_service(s) for s in service.all_services().values()]
    for module in order.get("warm", []):
        with contextlib.suppress(Exception):
            importlib.import_module(module)
    return {
        "service": target if isinstance(target, str) else service.import_string,
        "entry_service": service.name,
        "name": config.name,
        "schema": service.schema(),
        "openapi": service.openapi_spec.asdict(),
        "services": bentoml_cattr.unstructure(services),
        "envs": bentoml_cattr.unstructure(envs),
        "labels": {**config.labels, **service.labels},
        "args": config.args,
        "description": config.description if config.description is not None else service.description,
        "models": models,
        "included": included,
        "src_layout": bool(config.python.is_src_layout),
        "image": {**attrs.asdict(info), "scripts": list(image.scripts)},
        "unusual": _unusual(image),
        "dockerfile": dockerfile,
        "entrypoint": (entrypoint / "frontend" / "dockerfile" / "entrypoint.sh").read_text(),
        "bentofile": bentofile.getvalue(),
        "bentoml_version": BENTOML_VERSION,
        "bento_yaml": BENTO_YAML_FILENAME,
    }


def _unusual(image: Any) -> list[str]:
    """What the image asks for beyond BentoML's standard one: no layer of files can do it."""
    from bentoml._internal.container.frontend.dockerfile import CONTAINER_METADATA

    standard = CONTAINER_METADATA["debian"]
    found = [str(command) for command in (*image.commands, *image.post_commands)]
    found = [command for command in found if command != standard["default_install_command"]]
    base = standard["python"]["image"].format(spec_version=image.python_version)
    return found if image.base_image == base else [f"base_image {image.base_image}", *found]


class _Refused(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def _config(build_config: Any, context: Path) -> Any:
    for name in ("bentofile.yaml", "pyproject.toml"):
        if (context / name).is_file():
            return build_config.from_file(str(context / name))
    return build_config(service="")


def _walk(context: Path) -> list[str]:
    found = []
    for folder, _, files in os.walk(context):
        for name in files:
            relative = os.path.relpath(folder, context)
            # BentoML's own walk gives `./name` for files at the top; its patterns are made for that
            found.append(os.path.join(relative, name).replace(os.sep, "/"))
    return found


def _failure(error: BaseException) -> dict[str, str]:
    if isinstance(error, _Refused):
        return {"code": error.code, "message": str(error), "detail": ""}
    text = "".join(traceback.format_exception(error))
    code = "service_import_failed"
    message = str(error) or type(error).__name__
    not_there = "not found in module" in message or "No service found" in message
    if type(error).__name__ == "ImportServiceError" and not_there:
        code = "service_not_found"
    if isinstance(error, ModuleNotFoundError) and error.name is None:
        code = "service_not_found"
    return {"code": code, "message": f"{type(error).__name__}: {message}"[:600], "detail": text[-_LONGEST_TRACEBACK:]}


def _plain(value: object) -> Any:
    """What JSON does not know: enums by their value, everything else by its text."""
    plain = getattr(value, "value", None)
    return plain if isinstance(plain, (str, int, float, bool)) else str(value)


if __name__ == "__main__":
    main(*sys.argv[1:3])
