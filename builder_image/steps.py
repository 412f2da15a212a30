"""A build in three steps, as the containers of a pod run them: they share nothing but files below EKIBEN_WORK.

    fetch      the spec, the version's files, the environment and the deps layer; runs nothing of the user's
    inspect    imports the service where its code layer is not known yet; holds no secret and has no network
    assemble   the image, the push, the result; imports nothing of the user's and trusts nothing that inspect wrote

Each writes in its own folder only, so that the others can have it read-only (decision 0105). They are the functions of
`build`, cut where one process must know less than another, and give the same image.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder_image import ending
from builder_image import plan as plans
from builder_image.process import Processes, end_on_sigterm
from builder_image.progress import Progress
from registry import digest
from registry.errors import EkibenError, InfrastructureError

if TYPE_CHECKING:  # what a step needs it imports itself: most builds have nothing to inspect, and say so at once
    from builder_image import model
    from builder_image.bento import Bento, Recipe
    from builder_image.environment import Environment
    from builder_image.fetching import Store
    from builder_image.installer import Tools
    from builder_image.layers import Layer
    from builder_image.spec import BuildSpec, ImageOrder
    from builder_image.staging import Recall

_LARGEST_SPEC, _LARGEST_MANIFEST = 64 << 20, 64 << 20
_AT_ONCE = 4
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?")
_POD_FIELDS = frozenset(
    ("schema", "allow_code", "allowed_packages", "lock", "image")
)  # of a spec, besides model and kind


@dataclass(frozen=True)
class Step:
    """Where a step works, and with what."""

    name: str
    work: Path
    env: Mapping[str, str]
    progress: Progress
    processes: Processes

    @property
    def own(self) -> Path:
        return self.work / self.name

    @property
    def scratch(self) -> Path:
        return self.own / "scratch"

    @property
    def fetched(self) -> Path:
        return self.work / "fetch"

    @property
    def model(self) -> Path:
        return self.fetched / "model"

    @property
    def environments(self) -> Path:
        return self.fetched / "environments"

    @property
    def plan(self) -> Path:
        return plans.file(self.work)

    @property
    def answer(self) -> Path:
        return plans.answer(self.work)

    def tools(self) -> Tools:
        """With places to write for programs that want a home and a cache."""
        from builder_image.installer import Tools

        home = self.env.get("HOME", "/")
        own = {"HOME": str(self.own / "home")} if home == "/" else {}
        own["UV_CACHE_DIR"] = self.env.get("UV_CACHE_DIR") or str(self.uv_cache)
        own["UV_PYTHON_INSTALL_DIR"] = self.env.get("UV_PYTHON_INSTALL_DIR") or str(self.fetched / "python")
        return Tools.of({**self.env, "TMPDIR": tempfile.gettempdir(), **own}, self.processes)

    @property
    def uv_cache(self) -> Path:
        return self.own / "uv"

    def spec(self, order: Mapping[str, Any], lock: str | None) -> BuildSpec:
        """The spec of a build in one process, for this step's part."""
        from builder_image.spec import BuildSpec

        environments = self.environments if self.name != "assemble" else self.own / "cache"
        whole = {
            **order,
            "work": str(self.scratch),
            "result": str(self.own / "result.json"),
            "model": {"dir": str(self.model)},
            "cache": {"environments": str(environments), "bentos": str(self.own / "bentos")},
            "lock": lock,
        }
        return BuildSpec.parse(json.dumps(whole).encode())


def main(name: str, env: Mapping[str, str]) -> int:
    """Run a step; the exit code."""
    processes = Processes()
    end_on_sigterm(processes)
    step = Step(name, plans.work(env), env, Progress(sys.stdout), processes)
    step.progress.current = name
    try:
        _own_folder(step)
        _STEPS[name](step)
    except Exception as error:
        said, code = ending.problem(error)
        stage = step.progress.current
        print(f"{stage}: {said['code']}: {said['message']}", file=sys.stderr)
        ending.note(env, stage, said)
        if name == "assemble" and env.get("EKIBEN_RESULT_URL"):
            _deliver_error(step, {"error": {"stage": stage, **said}})
        return code
    return ending.OK


def _own_folder(step: Step) -> None:
    shutil.rmtree(step.scratch, ignore_errors=True)
    step.scratch.mkdir(parents=True)
    if "TMPDIR" not in step.env:
        folder = step.own / "tmp"
        folder.mkdir(exist_ok=True)
        tempfile.tempdir = str(folder)


# fetch


def fetch(step: Step) -> None:
    from builder_image import build
    from builder_image.fetching import Store, local_path

    url = _asked(step, "EKIBEN_SPEC_URL")
    step.plan.unlink(missing_ok=True)
    shutil.rmtree(step.model, ignore_errors=True)
    tools = step.tools()
    with Store(local=local_path(url) is not None) as store:
        with step.progress.stage("fetch", "fetch the spec"):
            order, links, version = _order(store.read(url, _LARGEST_SPEC), step.env)
        with step.progress.stage("fetch", "fetch and verify the model's files"):
            found = _fetch_model(step, store, links, version)
    spec = step.spec(order, order["lock"])
    with step.progress.stage("resolve", "resolve the requirements"):
        recipe = build.recipe_of(spec, found, tools)
    environment = _prepare(step, spec, recipe, tools)
    if "UV_CACHE_DIR" not in step.env:  # neither its room nor what it knows of the index is for the others
        shutil.rmtree(step.uv_cache, ignore_errors=True)
    ending.write(
        step.plan,
        {
            "schema": plans.SCHEMA,
            "order": order,
            "lock": recipe.lock.text,
            "inspect": None
            if environment is None
            else {"dir": str(environment.dir), "python": environment.python, "lock_digest": environment.lock_digest},
            "stages": [{"stage": stage.stage, "seconds": stage.seconds} for stage in step.progress.stages],
        },
    )


def _order(data: bytes, env: Mapping[str, str]) -> tuple[dict[str, Any], Mapping[str, str], str]:
    """(the spec with places of this image and without its links, the links by path, the version's digest).

    The links stay in this step: they are as good as a password while they are valid.
    """
    from builder_image import fetching

    here = Path(__file__).resolve().parents[1]
    bentos, bases = Path(env.get("EKIBEN_BENTOS") or here / "bentos"), Path(env.get("EKIBEN_BASES") or here / "bases")
    try:
        spec = json.loads(data)
        model, kind, image = spec.pop("model"), spec.pop("kind"), spec["image"]
        if set(spec) - _POD_FIELDS or set(model) != {"digest", "files"}:
            raise ValueError("it has fields that no pod's spec has")
        if set(kind) != {"name"} or not _NAME.fullmatch(kind["name"]):
            raise ValueError("kind must be an object with a name")
        if not image.get("push") or image.get("output"):
            raise ValueError("image needs push, and no output")
        base = str(image["base"])
        image["base"] = base if base.endswith(".toml") else str(bases / f"{base}.toml")
        links = fetching.links(model["files"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        text = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise InfrastructureError(
            "bad_spec",
            f"the build's spec cannot be used: {text}",
            hint="service and builder must be of one release",
        ) from error
    order = {
        "lock": None,
        **spec,
        "kind": {"name": kind["name"], "dir": str(bentos / kind["name"])},
        "serving": str(bentos / "serving"),
    }
    return order, links, str(model["digest"])


def _fetch_model(step: Step, store: Store, links: Mapping[str, str], version: str) -> model.Model:
    from builder_image import model
    from builder_image.fetching import Wanted
    from registry.manifest import Manifest

    def link(path: str) -> str:
        if path not in links:
            raise InfrastructureError("bad_spec", f"the build's spec has no link for {path}")
        return links[path]

    for last in (False, True):
        data = store.read(link(model.MANIFEST), _LARGEST_MANIFEST)
        if digest.of_bytes(data) == version:
            break
        if last:
            raise InfrastructureError(
                "digest_mismatch",
                f"{model.MANIFEST} is not the one of {version}; it was fetched twice",
                hint="the stored copy is damaged: upload the model again as a new version",
            )
    manifest = Manifest.parse(data)
    parts = [(f"files/{file.path}", file.size, file.sha256) for file in manifest.files]
    parts += model.attachments(manifest)
    wanted = [Wanted(path, link(path), size, sha256) for path, size, sha256 in parts]
    step.model.mkdir(parents=True, exist_ok=True)
    store.download(wanted, step.model, _streams(step.env))
    (step.model / model.MANIFEST).write_bytes(data)
    return model.read(step.model, files=False)


def _prepare(step: Step, spec: BuildSpec, recipe: Recipe, tools: Tools) -> Environment | None:
    """Make the deps layer where the registry has none, and the environment where the service must be imported."""
    from builder_image import environment, packing

    assert spec.image is not None
    with packing.bench(spec, _to_read(spec.image, step.env), recipe, step.progress, tools) as at:
        at = at.with_recall(_as_far_as_allowed(at.kept.recall))
        at.dependencies()
        if at.found_code() is not None:
            return None
        with step.progress.stage("environment", f"environment of {len(recipe.lock.pins)} packages"):
            return environment.ensure(
                recipe.lock, python=recipe.python, cache=step.environments, tools=tools, wheels=recipe.wheels
            )


def _to_read(order: ImageOrder, env: Mapping[str, str]) -> ImageOrder:
    """The registry under the address that this step knows, where that is one of its own: it needs to read only."""
    from builder_image.remote import Reference

    host = env.get("EKIBEN_REGISTRY_READ")
    if not host or order.push is None:
        return order
    return replace(order, push=replace(order.push, ref=str(replace(Reference.parse(order.push.ref), host=host))))


def _as_far_as_allowed(recall: Recall) -> Recall:
    """A registry that cannot be read without a credential has nothing for this step, which needs none."""
    from builder_image.remote import RegistryRefused

    refused: list[RegistryRefused] = []

    def asked(key: str) -> Layer | None:
        if refused:
            return None
        try:
            return recall(key)
        except RegistryRefused as error:
            print(f"the registry is not read: {error.code}: {error.detail}", file=sys.stderr)
            refused.append(error)
            return None

    return asked


def _streams(env: Mapping[str, str]) -> int:
    given = env.get("EKIBEN_FETCH_STREAMS", "")
    return max(1, int(given)) if given.isdecimal() else _AT_ONCE


# inspect


def inspect(step: Step) -> None:
    plan = _plan(step)
    step.answer.unlink(missing_ok=True)
    if plan["inspect"] is None:
        step.progress.say("there is nothing to import")
        return
    with step.progress.stage("inspect", "import the service"):
        from builder_image import sandbox
        from builder_image.bento import NETWORK

        if step.env.get(NETWORK) != "allow":
            why = sandbox.unavailable()
            if why is not None:
                raise InfrastructureError(
                    "sandbox_failed",
                    f"a service cannot be imported without network: {why}",
                    hint=f"{NETWORK}=allow imports it with the network; a NetworkPolicy must then stand in",
                )
            sandbox.confine()
        sandbox.hide()
        _check_mounts(step)
        _ask(step, plan)


def _ask(step: Step, plan: Mapping[str, Any]) -> None:
    from builder_image import bento, build, environment, model

    tools = step.tools()
    recipe = build.recipe_of(step.spec(plan["order"], plan["lock"]), model.read(step.model, files=False), tools)
    made = plan["inspect"]
    place = environment.Environment(Path(made["dir"]), made["python"], made["lock_digest"], reused=True)
    answer = step.scratch / "answer.json"
    bento.ask(recipe, place, step.scratch, tools, answer=answer, link=True)
    os.replace(answer, step.answer)
    shutil.rmtree(step.scratch, ignore_errors=True)


def _check_mounts(step: Step) -> None:
    """A user's code must not be able to change what the next step packs and pushes with a credential."""
    for place in (step.fetched, step.plan, step.model, step.environments):
        if place.exists() and os.access(place, os.W_OK):
            raise InfrastructureError(
                "unsafe_mounts",
                f"{place} can be written by the step that runs a user's code",
                hint="mount the folder of the step fetch read-only here; decision 0105 says why",
            )


# assemble


def assemble(step: Step) -> None:
    from builder_image import build, model, packing
    from builder_image.spec import BuildResult, Stage, plain

    _asked(step, "EKIBEN_RESULT_URL")
    plan, tools = _plan(step), step.tools()
    spec = step.spec(plan["order"], plan["lock"])
    assert spec.image is not None
    found = model.read(step.model, files=False)  # the pass that makes the model layer checks the rest
    if found.manifest.format == build.PROJECT:
        found.verify_files()
    recipe = build.recipe_of(spec, found, tools)
    before = step.environments / "layers"
    with packing.bench(spec, spec.image, recipe, step.progress, tools, before) as at:
        deps = at.found_dependencies()
        code, facts, had_code = at.code(found, _bento(step, plan, spec, recipe))
        image = at.finish(found, deps, code, facts, {"deps": True, "code": had_code})
    stages = [Stage(stage["stage"], stage["seconds"]) for stage in plan["stages"]]
    result = BuildResult(
        identity=build.identity(found.manifest.digest, recipe, spec),
        bento=None,
        environment=None,
        lock=recipe.lock.text,
        predict=facts.predict,
        schema=dict(facts.schema),
        image=image,
        stages=(*stages, *step.progress.stages),
    )
    with step.progress.stage("result", "hand over the result"):
        _deliver(step, plain(result))


def _bento(step: Step, plan: Mapping[str, Any], spec: BuildSpec, recipe: Recipe) -> Callable[[], Bento]:
    """The Bento, written here of the files that fetch verified and of the one document that inspect left."""
    from builder_image import bento

    def made() -> Bento:
        # Where nothing was to be imported, the pod may have had no step that imports.
        if plan["inspect"] is None or not os.path.lexists(step.answer):
            raise InfrastructureError(
                "layer_missing", "the code layer that the registry had is not there any more", hint="build again"
            )
        with step.progress.stage("bento", f"Bento {recipe.tag}"):
            return bento.made(recipe, lambda: bento.told(step.answer), spec.cache.bentos)

    return made


def _deliver(step: Step, result: Mapping[str, Any]) -> None:
    from builder_image.fetching import Store, local_path

    url = step.env["EKIBEN_RESULT_URL"]
    if (place := local_path(url)) is not None:
        ending.write(place, result)
        return
    with Store() as store:
        store.write(url, digest.canonical_json(result))


def _deliver_error(step: Step, result: Mapping[str, Any]) -> None:
    try:
        _deliver(step, result)
    except (EkibenError, OSError) as error:
        print(f"the result was not handed over: {error}", file=sys.stderr)


# all


def _plan(step: Step) -> dict[str, Any]:
    try:
        plan: dict[str, Any] = json.loads(step.plan.read_bytes())
    except (OSError, ValueError) as error:
        raise InfrastructureError(
            "bad_plan", f"{step.plan} cannot be read: {error}", hint="the step fetch must have ended well before"
        ) from error
    if plan.get("schema") != plans.SCHEMA:
        raise InfrastructureError("bad_plan", f"{step.plan} is no {plans.SCHEMA}", hint="the steps must be one release")
    return plan


def _asked(step: Step, name: str) -> str:
    value = step.env.get(name)
    if not value:
        raise InfrastructureError(
            "bad_environment", f"{name} is not set", hint="the platform that makes the pod sets it"
        )
    return value


_STEPS: Mapping[str, Callable[[Step], None]] = {"fetch": fetch, "inspect": inspect, "assemble": assemble}
NAMES = tuple(_STEPS)
