"""The command line without a server: help that teaches, errors without tracebacks, exit codes, start-up."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ekiben import UsageError, __version__, _config, _documents, _output, _server

COMMANDS = (
    "up", "down", "doctor", "version", "push", "predict", "status", "models", "builds", "logs", "kinds", "open",
    "deploy", "rollback", "rm", "init", "image", "images", "containerize", "login", "base import", "base list",
    "token create", "token list", "token revoke",
)  # fmt: skip


@pytest.fixture
def clean(tmp_path: Path) -> dict[str, str]:
    """An environment with nothing of ekiben's in it, and a home of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("EKIBEN_", "XDG_"))}
    return {
        **kept,
        "HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "EKIBEN_HOME": str(tmp_path / "home"),
    }


def run(environment: Mapping[str, str], *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ekiben", *arguments],
        env=dict(environment),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_starting_imports_nothing_heavy(clean: dict[str, str]) -> None:
    program = (
        "import sys; sys.argv = ['ekiben', *sys.argv[1:]]\n"
        "from ekiben.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'httpx', 'rich', 'numpy', 'pandas', 'ssl', 'asyncio'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)\n"
    )
    for command in ("--help", "version", "push --help"):
        done = subprocess.run(
            [sys.executable, "-c", program, *command.split()], env=clean, capture_output=True, text=True, check=True
        )
        assert done.stderr.strip() == "[]", command


def test_importing_the_package_imports_nothing_at_all() -> None:
    program = "import sys; before = set(sys.modules); import ekiben; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(ast.literal_eval(done.stdout)) <= {"ekiben", "__future__", "typing", "re", "collections.abc"} | {
        name for name in ast.literal_eval(done.stdout) if name.split(".")[0] in sys.stdlib_module_names
    }


def test_the_version_is_that_of_the_distribution(clean: dict[str, str]) -> None:
    project = Path(__file__).parents[2] / "client" / "pyproject.toml"
    assert tomllib.loads(project.read_text())["project"]["version"] == __version__
    assert json.loads(run(clean, "version", "--json").stdout)["ekiben"] == __version__
    assert run(clean, "--version").stdout == f"ekiben {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_teaches_with_an_example(command: str, clean: dict[str, str]) -> None:
    done = run(clean, *command.split(), "--help")
    assert done.returncode == 0
    assert f"\n  ekiben {command}" in done.stdout


def test_help_lists_every_command(clean: dict[str, str]) -> None:
    text = run(clean, "--help").stdout
    for command in COMMANDS:
        assert re.search(rf"^  {command.split()[0]} ", text, re.MULTILINE), command


@pytest.mark.parametrize(
    "arguments",
    [["status"], ["models"], ["builds"], ["kinds"], ["logs", "x"], ["predict", "x", "-d", "[[1]]"], ["rollback", "x"]],
)
def test_without_a_server_each_command_says_so_and_what_to_do(arguments: list[str], clean: dict[str, str]) -> None:
    url = f"http://localhost:{free_port()}"
    done = run(clean, *arguments, "--url", url)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"error: unreachable: no server at {url}\n  hint: ekiben up\n"
    done = run(clean, "--url", url, *arguments, "--json")
    assert done.returncode == 1
    assert done.stdout == ""
    assert json.loads(done.stderr)["error"]["hint"] == "ekiben up"


def test_push_without_a_server(clean: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "churn.txt").write_text("tree\n")
    done = run({**clean, "EKIBEN_URL": f"http://127.0.0.1:{free_port()}"}, "push", str(tmp_path / "churn.txt"))
    assert done.returncode == 1
    assert "error: unreachable" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["push"], "there is nothing to push"),
        (["nothing"], "No such command"),
        (["push", "absent.txt"], "no_such_file: there is no file absent.txt"),
        (["push", "absent.txt", "--label", "x"], "has no value"),
        (["push", "absent.txt", "--sample", "absent.json"], "there is no file absent.json"),
        (["predict", "churn", "-d", "{"], "--data is not JSON"),
        (["predict", "churn", "-d", "[NaN]"], "write null"),
        (["predict", "churn", "-d", "1", "-f", "x"], "both --data and --file"),
        (["rm", "churn:x"], "is not NAME:VERSION"),
        (["rm", "churn:1", "--deployment"], "no version to delete"),
        (["image", "churn"], "give --push REF or --output FILE"),
        (["status", "--url", "ftp://x"], "bad_url"),
        (["status", "--url", "http://user:secret@host"], "must not hold a password"),
        (["logs", "churn:3"], "a log is that of a deployment"),
        (["init", "--from", "absent.joblib"], "absent.joblib cannot be read"),
    ],
)
def test_wrong_usage_is_said_plainly_with_exit_code_2(arguments: list[str], said: str, clean: dict[str, str]) -> None:
    done = run(clean, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr


def test_a_taken_port_is_told_before_anything_starts(clean: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run(clean, "up", "--port", str(port))
    assert done.returncode == 1
    assert f"port_taken: port {port} of 127.0.0.1 cannot be used" in done.stderr
    assert f"ekiben up --port {port + 1}" in done.stderr
    assert not (Path(clean["EKIBEN_HOME"]) / "up.json").exists()


def test_down_without_a_server_is_no_failure_and_another_process_is_never_stopped(clean: dict[str, str]) -> None:
    home = Path(clean["EKIBEN_HOME"])
    _config.write_private(
        home / "up.json", {"pid": os.getpid(), "started": "1", "url": "http://localhost:1", "log": "x"}
    )
    done = run(clean, "down")
    assert done.returncode == 0
    assert "no server" in done.stdout
    assert not (home / "up.json").exists()


def test_doctor_names_a_remedy_for_whatever_is_wrong(clean: dict[str, str], tmp_path: Path) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text("no certificate")
    url = f"https://localhost:{free_port()}"
    clean.pop("SSL_CERT_FILE", None)
    done = run({**clean, "EKIBEN_CA": str(bad), "HTTPS_PROXY": "http://127.0.0.1:9"}, "doctor", "--json", "--url", url)
    findings = {finding["topic"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert done.returncode == 1
    assert findings["certificates"]["level"] == "error"
    assert findings["proxy"]["level"] == "warning"
    assert findings["server"]["level"] == "error"
    assert all(finding["remedy"] for finding in findings.values() if finding["level"] != "ok")
    assert "Traceback" not in done.stderr


class _Index(BaseHTTPRequestHandler):
    """A package index with one package of one release."""

    wheel = "pip-1.0-py3-none-any.whl"

    def do_GET(self) -> None:
        pages = {
            "/simple/pip/": (f'<a href="/{self.wheel}">{self.wheel}</a>', "text/html"),
            f"/{self.wheel}": (_wheel("pip"), "application/octet-stream"),
        }
        body, media = pages.get(self.path, ("", ""))
        content = body if isinstance(body, bytes) else body.encode()
        self.send_response(200 if content else 404)
        self.send_header("Content-Type", media)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def _wheel(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    return buffer.getvalue()


def test_doctor_asks_the_index_that_uv_is_set_up_for(clean: dict[str, str], tmp_path: Path) -> None:
    url = f"http://localhost:{free_port()}"
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_OFFLINE"):
        clean.pop(name, None)

    def index(**settings: str) -> dict[str, Any]:
        done = run({**clean, **settings}, "doctor", "--json", "--url", url)
        return next(one for one in json.loads(done.stdout)["findings"] if one["topic"] == "package index")

    with ThreadingHTTPServer(("127.0.0.1", 0), _Index) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/simple"
        try:
            assert index(UV_DEFAULT_INDEX=address) == {
                "topic": "package index", "level": "ok", "message": "UV_DEFAULT_INDEX (127.0.0.1)", "remedy": None,
            }  # fmt: skip
            settings = tmp_path / "uv.toml"  # no variable: uv's own file counts
            settings.write_text(f'[[index]]\nurl = "{address}"\ndefault = true\n')
            assert index(UV_CONFIG_FILE=str(settings))["level"] == "ok"
        finally:
            server.shutdown()
    settings.write_text(f'[[index]]\nurl = "http://127.0.0.1:{free_port()}/simple"\ndefault = true\n')
    found = index(UV_CONFIG_FILE=str(settings))
    assert found["level"] == "warning"
    assert found["message"].startswith("as uv is set up, gives no packages: ")
    assert "UV_DEFAULT_INDEX" in found["remedy"]


# --- images ----------------------------------------------------------------------------------------------------------


def test_the_table_of_images_has_the_bytes_of_each_layer() -> None:
    from ekiben._commands.images import by_layer, made

    def build(version: int, digest: str, **more: Any) -> dict[str, Any]:
        layers = [
            {"name": "base", "digest": "sha256:1", "size": 20_000_000, "reused": True},
            {"name": "base", "digest": "sha256:2", "size": 10_000_000, "reused": True},
            {"name": "deps", "digest": "sha256:3", "size": 80_000_000, "reused": version > 1},
            {"name": "model", "digest": f"sha256:m{version}", "size": 1500, "reused": False},
        ]
        image = {"ref": f"shop:churn-{version}", "digest": digest, "size": 0, "layers": layers}
        return {"model": "churn", "version": version, "state": "succeeded", "image": image, **more}

    listed = [build(2, "sha256:b"), build(2, "sha256:b"), build(1, "sha256:a"), build(3, "sha256:c", state="failed"),
              build(4, "sha256:d", image=None)]  # fmt: skip
    found = made(listed)
    assert [each["version"] for each in found] == [2, 1]
    assert by_layer(found) == [
        {"model": "churn", "version": "2", "image": "shop:churn-2", "base": "30.0 MB", "deps": "80.0 MB",
         "model layer": "1.5 kB", "total": "110.0 MB", "new": "1.5 kB"},
        {"model": "churn", "version": "1", "image": "shop:churn-1", "base": "30.0 MB", "deps": "80.0 MB",
         "model layer": "1.5 kB", "total": "110.0 MB", "new": "80.0 MB"},
    ]  # fmt: skip


# --- configuration -----------------------------------------------------------------------------------------------


def test_an_argument_wins_over_the_environment_over_the_login_over_the_local_server(clean: dict[str, str]) -> None:
    assert _config.connection(environment=clean).url == "http://localhost:8000"
    assert _config.connection(environment={**clean, "EKIBEN_PORT": "9"}).url == "http://localhost:9"
    _config.write_private(_config.home(clean) / "up.json", {"url": "http://localhost:1", "pid": 1})
    assert _config.connection(environment=clean).url == "http://localhost:1"
    _config.remember("https://two.example", "secret", None, clean)
    assert _config.connection(environment=clean).url == "https://two.example"
    with_variable = {**clean, "EKIBEN_URL": "https://three.example/"}
    assert _config.connection(environment=with_variable).url == "https://three.example"
    assert _config.connection("four.example", environment=with_variable).url == "https://four.example"


def test_a_stored_token_goes_to_its_own_server_only_and_is_not_shown(clean: dict[str, str]) -> None:
    _config.remember("https://one.example", "secret", None, clean)
    assert _config.connection(environment=clean).token == "secret"
    assert _config.connection("https://other.example", environment=clean).token is None
    assert "secret" not in repr(_config.connection(environment=clean))


def test_the_configuration_is_for_its_owner_only(clean: dict[str, str]) -> None:
    file = _config.remember("https://one.example", "secret", None, clean)
    assert file == Path(clean["XDG_CONFIG_HOME"]) / "ekiben" / "config.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_broken_configuration_is_said_with_its_path(clean: dict[str, str]) -> None:
    file = _config.path(clean)
    file.parent.mkdir(parents=True)
    for text in ("{", "[]", '{"servers": {"x": 1}}'):
        file.write_text(text)
        with pytest.raises(UsageError) as caught:
            _config.connection(environment=clean)
        assert caught.value.code == "bad_config"
        assert str(file) in caught.value.message


@pytest.mark.parametrize(
    ("url", "loopback"),
    [
        ("http://localhost:8000", True), ("http://127.0.0.2", True), ("http://[::1]:80", True),
        ("http://example.org", False), ("http://localhost.example.org", False), ("http://127.0.0.1.example.org", False),
    ],
)  # fmt: skip
def test_loopback_is_what_no_proxy_may_see(url: str, loopback: bool) -> None:
    assert _config.is_loopback(url) is loopback


# --- files of rows and output -----------------------------------------------------------------------------------


def test_a_sample_file_may_hold_its_outputs(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text('{"inputs": [[1], [2]], "outputs": [0.5, 0.7]}')
    assert _documents.sample(file) == ({"inputs": [[1], [2]]}, {"outputs": [0.5, 0.7]})
    file.write_text("[[1], [2]]")
    assert _documents.sample(file) == ({"inputs": [[1], [2]]}, None)
    file.write_text('{"phrase": "cat"}')
    assert _documents.sample(file) == ({"phrase": "cat"}, None)


def test_csv_rows_keep_postcodes_and_lose_no_missing_values(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("age,code,plan,rate\n31,01234,pro,0.5\n,99,,nan\n")
    assert _documents.sample(file)[0] == {
        "inputs": [
            {"age": 31, "code": "01234", "plan": "pro", "rate": 0.5},
            {"age": None, "code": 99, "plan": None, "rate": None},
        ]
    }
    file.write_text("a,b\n1\n")
    with pytest.raises(UsageError, match="line 2"):
        _documents.sample(file)


def test_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert _documents.sample(file)[0] == {"inputs": [{"a": 1}, {"a": 2}]}


def test_sizes_read_as_a_human_says_them() -> None:
    assert [_output.size(n) for n in (0, 999, 1733211, 2e9, 5e12)] == ["0 B", "999 B", "1.7 MB", "2.0 GB", "5.0 TB"]


def test_the_servers_interpreter_is_read_from_its_script(tmp_path: Path) -> None:
    script = tmp_path / "ekiben-server"
    environment = {"PATH": str(tmp_path)}
    for text in (f"#!{sys.executable}\n", f"#!/bin/sh\n'''exec' \"{sys.executable}\" \"$0\" \"$@\"\n' '''\n"):
        script.write_text(text)
        script.chmod(0o755)
        assert _server.program(environment, str(tmp_path / "python")) == script
        found = subprocess.run(
            [sys.executable, "-c", "import sys, os; from ekiben import _server; sys.executable = '/x/python';"
             "_server.program.__defaults__ = ('/x/python',); print(_server.server_python(os.environ))"],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert found.stdout.strip() == sys.executable
