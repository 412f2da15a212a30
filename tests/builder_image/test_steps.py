"""A build in three steps, each in a container of its own as a pod's are: process 1, a read-only root, no capability,
its own folder and nothing else to write."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from builder_image import layout, remote, validate
from builder_image.process import tool_environment
from tests.builder_image.links import Links
from tests.servers import BCRYPT_OF_HUNTER2

REPOSITORY = Path(__file__).parents[2]
pytestmark = [pytest.mark.needs_registry, pytest.mark.slow, pytest.mark.timeout(900)]

KIND_TOML = 'name = "tiny"\nservice = "service:Tiny"\npackages = ["bentos.serving"]\npredict = "/predict"\n'
SERVICE = """
import bentoml

{first}

@bentoml.service(name="tiny")
class Tiny:
    @bentoml.api(route="/predict")
    def predict(self, inputs: list[float]) -> dict[str, list[float]]:
        return {{"outputs": inputs}}
"""
_CONTAINER = """
set -e
mount -t proc proc /proc
for place in $WRITABLE; do mkdir -p "$place"; mount --bind "$place" "$place"; done
mount -o remount,ro,bind /
exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs "$@"
"""


@dataclass
class Pod:
    """Runs the steps of one build."""

    folder: Path
    links: Links
    registry: str
    bentos: Path
    bases: Path
    uv_cache: Path
    warm: Path
    """Where the first environment and deps layer are kept for the pods of other tests."""
    env: dict[str, str] = field(default_factory=dict)
    repository: str = "ekiben"

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def note(self) -> dict[str, Any]:
        """What the last step left for Kubernetes."""
        data = (self.folder / "note" / "termination-log").read_bytes()
        assert len(data) <= 4096
        found: dict[str, Any] = json.loads(data)
        return found

    @property
    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.links.objects["result.json"])
        return found

    def offer(self, model: Path, served: str, **more: Any) -> None:
        """Lay a version and its spec into the store, as the service does."""
        files = [path for path in sorted(model.rglob("*")) if path.is_file()]
        names = [path.relative_to(model).as_posix() for path in files]
        for name, path in zip(names, files, strict=True):
            self.links.objects[f"m/{hashlib.sha1(name.encode()).hexdigest()}"] = path.read_bytes()
        order = {
            "schema": "ekiben.build.v1",
            "model": {
                "digest": "sha256:" + hashlib.sha256((model / "manifest.json").read_bytes()).hexdigest(),
                "files": [{"path": name, "url": self.url(name)} for name in names],
            },
            "kind": {"name": served},
            "allow_code": served == "project",
            "lock": None,
            "image": {
                "base": "python",
                "platform": "linux/amd64",
                "push": {"ref": f"{self.registry}/{self.repository}:v1", "insecure": False, "ca": None},
                "compression": "zstd",
            },
            **more,
        }
        self.links.objects["spec.json"] = json.dumps(order).encode()

    def key(self, name: str) -> str:
        return f"m/{hashlib.sha1(name.encode()).hexdigest()}"

    def url(self, name: str) -> str:
        return self.links.url(self.key(name))

    def start(self, step: str, writable: tuple[str, ...] = (), **env: str) -> subprocess.Popen[bytes]:
        known = {
            "PATH": os.environ["PATH"],
            "EKIBEN_WORK": str(self.work),
            "EKIBEN_BENTOS": str(self.bentos),
            "EKIBEN_BASES": str(self.bases),
            "EKIBEN_TERMINATION_LOG": str(self.folder / "note" / "termination-log"),
        }
        if step == "fetch":
            outer = tool_environment(os.environ)
            known |= {"EKIBEN_SPEC_URL": self.links.url("spec.json"), "UV_CACHE_DIR": str(self.uv_cache)}
            known |= {name: value for name, value in outer.items() if name not in ("HOME", "TMPDIR", "UV_CACHE_DIR")}
            own = Path.home() / ".config" / "uv" / "uv.toml"
            known |= {"UV_CONFIG_FILE": str(own)} if own.is_file() else {}
        if step == "assemble":
            known["EKIBEN_RESULT_URL"] = self.links.url("result.json")
        places = [self.work / step, self.folder / "note", *([self.uv_cache] if step == "fetch" else []), *writable]
        writable_ones = {**os.environ, "WRITABLE": " ".join(map(str, places))}
        variables = [f"{name}={value}" for name, value in {**known, **self.env, **env}.items() if value]
        return subprocess.Popen(
            [
                "unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", _CONTAINER, "sh",
                "env", "-i", *variables, sys.executable, "-m", "builder_image", step,
            ],
            cwd=REPOSITORY, env=writable_ones, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, step: str, expected: int = 0, **env: str) -> list[dict[str, Any]]:
        """The progress lines of a step that ends as expected."""
        (self.folder / "note" / "termination-log").unlink(missing_ok=True)
        process = self.start(step, **env)
        out, said = process.communicate()
        assert process.returncode == expected, out.decode() + said.decode()
        assert (self.folder / "note" / "termination-log").exists() == (expected != 0)
        assert "secret" not in out.decode() + said.decode()
        made = self.work / "fetch" / "environments"
        if made.is_dir() and not self.warm.is_dir():
            subprocess.run(["cp", "-al", made, self.warm], check=True)
        return [json.loads(line) for line in out.splitlines()]

    def run_all(self) -> dict[str, Any]:
        for step in ("fetch", "inspect", "assemble"):
            self.run(step)
        return self.result

    def forget(self) -> None:
        """Another pod: nothing of its folders is there."""
        shutil.rmtree(self.work, ignore_errors=True)

    def pushed(self, repository: str = "ekiben") -> bytes:
        with remote.Registry(self.registry) as registry:
            return registry.get_manifest(repository, self.result["image"]["digest"])[0]

    def in_one_process(self, model: Path, kind: str) -> dict[str, Any]:
        """The result of the same build as the local platform runs it, to a file."""
        home = self.folder / "home"
        order = json.loads(self.links.objects["spec.json"])
        image = {**order["image"], "base": str(self.bases / "python.toml"), "push": None, "output": str(home / "out/")}
        spec = {
            "schema": order["schema"],
            "work": str(home / "work"),
            "result": str(home / "result.json"),
            "model": {"dir": str(model)},
            "kind": {"name": kind, "dir": str(self.bentos / kind)},
            "serving": str(self.bentos / "serving"),
            "cache": {"environments": str(home / "environments"), "bentos": str(home / "bentos")},
            "allow_code": order["allow_code"],
            "image": image,
        }
        home.mkdir()
        (home / "spec.json").write_text(json.dumps(spec))
        env = {**os.environ, "UV_CACHE_DIR": str(self.uv_cache)}
        subprocess.run(
            [sys.executable, "-m", "builder_image", home / "spec.json"],
            cwd=REPOSITORY, check=True, env=env, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        found: dict[str, Any] = json.loads((home / "result.json").read_text())
        return found


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Environments and deps layers that an earlier test made: a pod's are its own, and made anew they take minutes."""
    return tmp_path_factory.mktemp("warm") / "environments"


@pytest.fixture
def pod(
    tmp_path: Path, warm: Path, registry_server: Any, python_base: Path, request: pytest.FixtureRequest
) -> Iterator[Pod]:
    if os.geteuid() != 0:
        pytest.skip("containers of the test: needs root here")
    bentos = tmp_path / "bentos"
    shutil.copytree(REPOSITORY / "bentos" / "serving", bentos / "serving", ignore=shutil.ignore_patterns("__pycache__"))
    (bentos / "__init__.py").touch()
    (bentos / "tiny").mkdir()
    (bentos / "tiny" / "kind.toml").write_text(KIND_TOML)
    (bentos / "tiny" / "service.py").write_text(SERVICE.format(first=""))
    (bentos / "tiny" / "bentofile.yaml").write_text("service: 'service:Tiny'\n")
    (bentos / "tiny" / "requirements.in").write_text("bentoml==1.4.40\n")
    lock = (REPOSITORY / "bentos" / "lightgbm" / "requirements.txt").read_text()
    (bentos / "tiny" / "requirements.txt").write_text(lock)
    (tmp_path / "note").mkdir()
    links = Links().start()
    uv_cache = Path(os.environ.get("UV_CACHE_DIR") or Path.home() / ".cache" / "uv")
    made = Pod(tmp_path, links, registry_server.host, bentos, python_base.parent, uv_cache, warm)
    if warm.is_dir():
        (made.work / "fetch").mkdir(parents=True)
        subprocess.run(["cp", "-al", warm, made.work / "fetch" / "environments"], check=True)
    yield made
    links.stop()


MakeVersion = Callable[..., Path]


def project(make: MakeVersion, folder: Path, first: str = "", **files: str | bytes) -> Path:
    """A project whose service begins with a line of its own. Its lock is the kind's, so that its layers are known."""
    lock = (REPOSITORY / "bentos" / "lightgbm" / "requirements.txt").read_text()
    sources: Mapping[str, str | bytes] = {"service.py": SERVICE.format(first=first), "README.md": "mine", **files}
    return make(folder, sources, requirements=("requirements.txt", lock))


def test_three_steps_make_the_image_of_one_process(pod: Pod, tmp_path: Path, make_version: MakeVersion) -> None:
    first = make_version(tmp_path / "m1", {"w.bin": os.urandom(3 << 20)}, kind="tiny", format="plain")
    pod.offer(first, "tiny")
    result = pod.run_all()
    one = pod.in_one_process(first, "tiny")
    for name in ("identity", "lock", "predict", "schema"):
        assert result[name] == one[name], name
    assert result["image"]["digest"] == one["image"]["digest"]
    assert (result["bento"], result["environment"]) == (None, None)
    assert {stage["stage"] for stage in result["stages"]} >= {"fetch", "resolve", "deps", "code", "push"}
    stored = layout.read_layout(tmp_path / "home" / "out")
    validate.validate(stored)
    assert pod.pushed() == stored.manifest_bytes

    # new weights in a new pod: nothing is installed, nothing imported
    pod.forget()
    second = make_version(tmp_path / "m2", {"w.bin": os.urandom(3 << 20)}, kind="tiny", format="plain")
    pod.offer(second, "tiny")
    lines = pod.run("fetch", UV_OFFLINE="1", UV_CACHE_DIR=str(pod.work / "fetch" / "none"))
    assert {"stage": "deps", "message": "already there"} in lines
    assert "environment" not in {line["stage"] for line in lines}
    assert [line["message"] for line in pod.run("inspect")] == ["there is nothing to import"]
    pod.run("assemble")
    again = pod.result
    layers = {layer["name"]: layer for layer in again["image"]["layers"]}
    assert [layers[name]["reused"] for name in ("base", "deps", "code", "model")] == [True, True, True, False]
    assert again["schema"] == result["schema"]
    assert pod.pushed()
    left = {path.name for path in (pod.work / "fetch").iterdir()}
    assert left == {"model", "plan.json", "scratch", "tmp"}


def test_a_project_is_packed_from_what_was_fetched(pod: Pod, tmp_path: Path, make_version: MakeVersion) -> None:
    """Its code tries to change the files, the environment, the plan; to call out; and to leave things of its own."""
    tricks = f"""
import glob, os, socket, sys
WORK = {str(pod.work)!r}
def tried(do):
    try:
        do()
        return "done"
    except OSError as error:
        return error.strerror
found = [
    tried(lambda: open(WORK + "/fetch/model/files/service.py", "a")),
    tried(lambda: open(WORK + "/fetch/plan.json", "a")),
    tried(lambda: open(glob.glob(WORK + "/fetch/environments/*/bin/python")[0] + "2", "w")),
    tried(lambda: open(WORK + "/fetch/environments/layers/deps-x.json", "w")),
    tried(lambda: os.mkdir(WORK + "/assemble")),
    tried(lambda: open(os.path.realpath("data.bin"), "r+b")),
    tried(lambda: socket.create_connection(("127.0.0.1", {pod.links.port}))),
    tried(lambda: socket.getaddrinfo("example.org", 80) and None),
    tried(lambda: open(f"/proc/{{os.getppid()}}/environ").read()),
    tried(lambda: open(f"/proc/{{os.getppid()}}/mem", "r+b")),
]
secrets = [name for name in os.environ if "EKIBEN" in name or "UV_" in name]
labels = {{"found": "|".join(found), "secrets": ",".join(secrets)}}
open("left-behind.py", "w").write("x = 1")
"""
    source = SERVICE.format(first=tricks).replace('name="tiny"', 'name="tiny", labels=labels')
    model = make_version(
        tmp_path / "m",
        {"service.py": source, "data.bin": bytes(2 << 20), "src/a.txt": "a"},
        requirements=("requirements.txt", (REPOSITORY / "bentos" / "lightgbm" / "requirements.txt").read_text()),
    )
    pod.offer(model, "project")
    pod.env = {"EKIBEN_SECRET": "hidden-value", "UV_TOKEN": "hidden-value"}
    result = pod.run_all()
    answer = json.loads((pod.work / "inspect" / "answer.json").read_text())
    assert "done" not in answer["labels"]["found"], answer["labels"]
    assert "Permission denied" in answer["labels"]["found"].split("|")[6]
    assert answer["labels"]["secrets"] == ""
    assert b"hidden-value" not in (pod.work / "inspect" / "answer.json").read_bytes()
    assert (pod.work / "fetch" / "model" / "files" / "service.py").read_text() == source
    code = next(layer for layer in result["image"]["layers"] if layer["name"] == "code")
    names = _members(pod, code["digest"])
    assert "home/bentoml/bento/src/service.py" in names
    assert "home/bentoml/bento/src/data.bin" in names
    assert not [name for name in names if "left-behind" in name]
    pod.env = {}
    assert result["image"]["digest"] != ""
    assert pod.pushed()


def _members(pod: Pod, digest: str) -> list[str]:
    import tarfile

    from builder_image import layers

    with remote.Registry(pod.registry) as registry:
        pieces = layers.decompress(registry.pull_blob("ekiben", digest), layers.TAR_ZSTD)
        with tarfile.open(fileobj=layers.readable(pieces), mode="r|") as archive:
            return archive.getnames()


@pytest.mark.parametrize(
    ("left", "says"),
    [
        ("os.symlink('/etc/passwd', ANSWER)", "cannot be read"),
        ("os.mkfifo(ANSWER)", "not a plain file"),
        ("os.mkdir(ANSWER)", "not a plain file"),
        ("open(ANSWER + '2', 'w').write('{}'); os.link(ANSWER + '2', ANSWER)", "not a plain file"),
        ("open(ANSWER, 'w').truncate(1 << 34)", "larger than"),
        ("open(ANSWER, 'w').write('[' * 100000)", "not JSON"),
        ("open(ANSWER, 'w').write('{\"schema\": NaN}')", "not JSON"),
        ("open(ANSWER, 'w').write('{}')", "has no service"),
    ],
)
def test_what_inspect_leaves_is_not_trusted(
    pod: Pod, tmp_path: Path, make_version: MakeVersion, left: str, says: str
) -> None:
    """A project that got hold of the whole step writes its answer itself."""
    pod.offer(project(make_version, tmp_path / "m"), "project")
    pod.run("fetch")
    answer = pod.work / "inspect" / "answer.json"
    answer.parent.mkdir()
    exec(f"import os\nANSWER = {str(answer)!r}\n{left}")
    lines = pod.run("assemble", expected=2)
    assert pod.note["code"] == "service_import_failed"
    assert says in pod.note["message"]
    assert pod.note["stage"] == "bento"
    assert pod.result["error"]["code"] == "service_import_failed"
    assert "push" not in {line["stage"] for line in lines}


def test_a_users_error_is_told_in_the_termination_log(pod: Pod, tmp_path: Path, make_version: MakeVersion) -> None:
    pod.offer(project(make_version, tmp_path / "m", first="raise ValueError('é' * 5000)"), "project")
    pod.run("fetch")
    pod.run("inspect", expected=2)
    assert (pod.note["stage"], pod.note["code"]) == ("inspect", "service_import_failed")
    assert "ValueError: é" in pod.note["message"]
    assert "without network" in pod.note["hint"]


def test_inspect_refuses_to_run_where_it_could_change_what_is_packed(
    pod: Pod, tmp_path: Path, make_version: MakeVersion
) -> None:
    pod.offer(project(make_version, tmp_path / "m"), "project")
    pod.run("fetch")
    process = pod.start("inspect", writable=(str(pod.work / "fetch"),))
    process.communicate()
    assert process.returncode == 3
    assert pod.note["code"] == "unsafe_mounts"


def test_damage_in_the_store_is_the_infrastructures_fault(pod: Pod, tmp_path: Path, make_version: MakeVersion) -> None:
    pod.offer(make_version(tmp_path / "m", {"w.bin": b"right"}, kind="tiny", format="plain"), "tiny")
    pod.links.objects[pod.key("files/w.bin")] = b"wrong"
    pod.run("fetch", expected=3)
    assert (pod.note["stage"], pod.note["code"]) == ("fetch", "digest_mismatch")
    pod.run("inspect", expected=3)
    assert pod.note["code"] == "bad_plan"
    pod.links.objects[pod.key("files/w.bin")] = b"right"
    pod.links.objects[pod.key("manifest.json")] += b" "
    pod.run("fetch", expected=3)
    assert "manifest.json" in pod.note["message"]


@pytest.mark.parametrize(
    "change",
    [{"work": "/etc"}, {"kind": {"name": "../x"}}, {"kind": {"name": "tiny", "dir": "/x"}}, {"image": None}, {"x": 1}],
)
def test_a_spec_of_another_form_is_refused(
    pod: Pod, tmp_path: Path, make_version: MakeVersion, change: dict[str, Any]
) -> None:
    pod.offer(make_version(tmp_path / "m", {"w.bin": b"x"}, kind="tiny", format="plain"), "tiny", **change)
    pod.run("fetch", expected=3)
    assert pod.note["code"] == "bad_spec"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_each_step_ended_in_the_middle_and_run_again_gives_the_same(
    pod: Pod, tmp_path: Path, make_version: MakeVersion, how: signal.Signals
) -> None:
    slow = tmp_path / "slow"
    first = f"import os, time\nif os.path.exists({str(slow)!r}):\n    print(open('begun', 'w')); time.sleep(600)"
    model = project(make_version, tmp_path / "m", first=first)
    pod.offer(model, "project")
    whole = pod.run_all()["image"]["digest"]
    pod.links.objects.pop("result.json")
    pod.repository = "again"  # where no layer of the first build is known
    pod.offer(model, "project")
    asked, go_on = threading.Event(), threading.Event()

    def hold(method: str, path: str) -> None:
        if path in (pod.key("files/service.py"), "result.json"):
            asked.set()
            go_on.wait(60)

    def ended(step: str, under_way: Callable[[], bool]) -> None:
        process = pod.start(step)
        while not under_way():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        inner = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
        os.kill(inner, how)
        process.communicate(timeout=60)  # though the store does not answer
        assert process.returncode in (128 + how, -how, 1)

    for step, under_way in (
        ("fetch", asked.is_set),
        ("inspect", (pod.work / "inspect" / "scratch" / "context" / "begun").exists),
        ("assemble", asked.is_set),
    ):
        asked.clear(), go_on.clear(), slow.touch()
        pod.links.on_request = hold
        ended(step, under_way)
        pod.links.on_request = lambda method, path: None
        go_on.set(), slow.unlink()
        pod.run(step)
    assert pod.result["image"]["digest"] == whole
    assert pod.pushed("again")


@pytest.mark.needs_minio
def test_with_presigned_urls_of_a_real_store_and_a_registry_that_asks_for_a_password(
    pod: Pod, tmp_path: Path, make_version: MakeVersion, start_registry: Any
) -> None:
    from tests.object_stores import Server

    (tmp_path / "htpasswd").write_text(f"builder:{BCRYPT_OF_HUNTER2}\n")
    closed = start_registry(auth=f"auth: {{htpasswd: {{realm: test, path: {tmp_path / 'htpasswd'}}}}}\n")
    auth = {"auths": {closed.host: {"auth": base64.b64encode(b"builder:hunter2").decode()}}}
    (tmp_path / "config.json").write_text(json.dumps(auth))
    server = Server("minio", tmp_path / "minio").start()
    try:
        store = server.store("builds")

        def put(key: str, data: bytes) -> None:
            out = store.writer(key)
            out.write(data)
            out.commit()

        pod.registry = closed.host
        pod.offer(make_version(tmp_path / "m", {"ä b+%.bin": os.urandom(6 << 20)}, kind="tiny", format="plain"), "tiny")
        order = json.loads(pod.links.objects["spec.json"])
        for file in order["model"]["files"]:
            put(f"m/{file['path']}", (tmp_path / "m" / file["path"]).read_bytes())
            file["url"] = store.presign_get(f"m/{file['path']}", 600)
        put("spec.json", json.dumps(order).encode())
        pod.run("fetch", EKIBEN_SPEC_URL=store.presign_get("spec.json", 600))
        pod.run("inspect")
        put = store.presign_put("result.json", 600)
        pod.run("assemble", expected=2, EKIBEN_RESULT_URL=put)
        assert "401" in pod.note["message"] or "credential" in pod.note["message"] + str(pod.note["hint"]), pod.note
        pod.run("assemble", EKIBEN_RESULT_URL=put, EKIBEN_REGISTRY_AUTH=str(tmp_path / "config.json"))
        with store.open("result.json") as stored:
            digest = json.load(stored)["image"]["digest"]
        with remote.Registry(closed.host, remote.Credentials("builder", "hunter2")) as registry:
            assert registry.head_manifest("ekiben", "v1") == digest
    finally:
        server.kill()
