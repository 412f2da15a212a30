"""The client against a real server, as its users use it."""

from __future__ import annotations

import json
import os
import pickle
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pandas as pd
import pytest

import ekiben

Running = Any  # tests/client/conftest.py, which tests cannot import

pytestmark = pytest.mark.slow  # environments of models are installed from the package index


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    rng = np.random.default_rng(1)
    return pd.DataFrame(
        {
            "mean radius": rng.normal(size=200),
            "spend": np.where(np.arange(200) % 9 == 0, np.nan, rng.normal(size=200)),
            "plan": pd.Categorical(rng.choice(["free", "pro"], 200)),
        }
    )


def trained(table: pd.DataFrame, rounds: int) -> lightgbm.Booster:
    target = (table["mean radius"] + table["plan"].cat.codes > 0.5).astype(int)
    return lightgbm.train({"objective": "binary", "verbose": -1}, lightgbm.Dataset(table, target), rounds)


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[ekiben.Client]:
    token = Path(server.environment["EKIBEN_HOME"], "token").read_text().strip()
    with ekiben.Client(server.url, token=token) as made:
        yield made


@pytest.fixture(scope="module")
def deployed(client: ekiben.Client, table: pd.DataFrame) -> ekiben.Deployment:
    return ekiben.push(trained(table, 5), name="notebook", sample=table[:20], client=client)


def test_a_model_of_a_notebook_goes_live_and_answers_as_it_did_there(
    deployed: ekiben.Deployment, table: pd.DataFrame
) -> None:
    assert deployed.pushed is not None
    assert deployed.pushed["checked"] == {"verified": "expected", "rows": 20, "matched": 20}
    assert deployed.state == "live"
    answers = deployed.predict(table)
    assert isinstance(answers, pd.Series)
    assert answers.index.equals(table.index)
    assert np.allclose(answers, trained(table, 5).predict(table), rtol=1e-12)
    assert isinstance(
        deployed.predict([["x", 1]][:0] or table[:2].to_dict("records")[:0] or [[0.1, None, "pro"]]), list
    )


def test_many_rows_go_in_several_calls_and_come_back_in_order(deployed: ekiben.Deployment, table: pd.DataFrame) -> None:
    many = pd.concat([table] * 26, ignore_index=True)
    assert len(many) > 5_000
    assert np.allclose(deployed.predict(many), np.tile(deployed.predict(table).to_numpy(), 26))


def test_a_row_that_does_not_fit_is_an_exception_with_its_field(deployed: ekiben.Deployment) -> None:
    with pytest.raises(ekiben.Invalid) as caught:
        deployed.predict([[0.1, None, "gold"]])
    assert caught.value.code == "unknown_category"
    assert caught.value.field == "inputs[0].plan"
    assert caught.value.hint
    assert caught.value.status == 422 or caught.value.status == 400


def test_the_state_folder_and_its_token_are_their_users_alone(server: Running) -> None:
    home = Path(server.environment["EKIBEN_HOME"])
    assert [stat.S_IMODE((home / name).stat().st_mode) for name in ("", "token", "sockets")] == [0o700, 0o600, 0o700]


def test_the_same_model_again_is_the_version_that_is_there(
    client: ekiben.Client, deployed: ekiben.Deployment, table: pd.DataFrame
) -> None:
    again = ekiben.push(trained(table, 5), name="notebook", sample=table[:20], client=client)
    assert again.version == deployed.version
    assert len(client.versions("notebook")) == 1


def test_expected_values_that_the_model_does_not_give_keep_it_from_going_live(
    client: ekiben.Client, deployed: ekiben.Deployment, table: pd.DataFrame
) -> None:
    with pytest.raises(ekiben.VersionFailed) as caught:
        ekiben.push(trained(table, 7), name="notebook", sample=table[:3], expected=[0.1, 0.2, 0.3], client=client)
    assert caught.value.code == "golden_sample_failed"
    assert caught.value.version["state"] in ("failed", "rolled_back")
    assert deployed.refresh().version == 1, "what was live goes on"


def test_a_second_version_rolls_and_rolls_back_without_a_failed_call(
    client: ekiben.Client, table: pd.DataFrame
) -> None:
    first, second = trained(table, 3), trained(table, 9)
    deployment = ekiben.push(first, name="rolling", sample=table[:5], client=client)
    rows, stop, failures, seen = table[:5], threading.Event(), [], set()

    def call() -> None:
        with ekiben.Client(client.url) as mine:
            while not stop.is_set():
                try:
                    seen.add(tuple(mine.deployment("rolling").predict(rows)))
                except ekiben.EkibenError as error:
                    failures.append(str(error))

    caller = threading.Thread(target=call)
    caller.start()
    try:
        newer = ekiben.push(second, name="rolling", sample=table[:5], client=client)
        assert np.allclose(newer.predict(rows), second.predict(rows))
        deployment.rollback()
        assert np.allclose(deployment.predict(rows), first.predict(rows))
    finally:
        stop.set()
        caller.join()
    assert failures == []
    assert len(seen) == 2


def test_push_roll_back_look_and_predict_from_the_command_line(
    server: Running, table: pd.DataFrame, tmp_path: Path
) -> None:
    model = trained(table, 4)
    model.save_model(tmp_path / "tenure.txt")
    rows = json.loads(table[:5].rename(columns={"mean radius": "mean_radius"}).to_json(orient="records"))
    (tmp_path / "rows.json").write_text(json.dumps({"inputs": rows, "outputs": model.predict(table[:5]).tolist()}))
    done = server.ekiben("push", str(tmp_path / "tenure.txt"), "--sample", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("✓ lightgbm · 3 features   ✓ 5/5 predictions match   ✓ live in ")
    assert second == f"{server.url}/inference/tenure/predict   (docs: …/docs)"
    assert "\x1b" not in done.stdout + done.stderr, "no colours and no spinner without a terminal"

    trained(table, 6).save_model(tmp_path / "tenure-v2.txt")
    done = server.ekiben("push", str(tmp_path / "tenure-v2.txt"), "--name", "tenure", "--json")
    assert json.loads(done.stdout)["version"] == 2
    done = server.ekiben("rollback", "tenure")
    assert done.returncode == 0, done.stderr
    assert "✓ tenure version 1" in done.stdout
    assert server.ekiben("status", "tenure").stdout.splitlines()[1].split() == ["state", "live"]

    done = server.ekiben("predict", "tenure", "-f", str(tmp_path / "rows.json"))
    assert np.allclose(json.loads(done.stdout)["outputs"], model.predict(table[:5]))
    done = server.ekiben("predict", "tenure", stdin=json.dumps(rows))
    assert len(json.loads(done.stdout)["outputs"]) == 5
    assert server.ekiben("open", "tenure").stdout == f"{server.url}/inference/tenure/docs\n"
    assert "golden sample" in server.ekiben("logs", "tenure").stdout
    assert server.ekiben("logs", "tenure", "--build").returncode == 0


def test_replicas_stay_when_only_the_version_changes(
    server: Running, client: ekiben.Client, table: pd.DataFrame
) -> None:
    ekiben.push(trained(table, 2), name="sized", sample=table[:5], client=client)
    assert server.ekiben("deploy", "sized", "--replicas", "2").returncode == 0
    ekiben.push(trained(table, 8), name="sized", sample=table[:5], client=client)
    done = server.ekiben("deploy", "sized", "--version", "1", "--json")
    assert done.returncode == 0, done.stderr
    state = json.loads(done.stdout)
    assert (state["replicas"], state["ready"], state["target"]["version"]) == (2, 2, 1)


def test_a_version_that_fails_ends_with_1_and_says_code_reason_and_hint(
    server: Running, table: pd.DataFrame, tmp_path: Path
) -> None:
    trained(table, 4).save_model(tmp_path / "wrong.txt")
    (tmp_path / "rows.json").write_text(json.dumps([[0.5, 0.5, "pro"]]))
    (tmp_path / "expected.json").write_text("[0.123]")
    arguments = ["push", str(tmp_path / "wrong.txt"), "--sample", str(tmp_path / "rows.json")]
    done = server.ekiben(*arguments, "--expected", str(tmp_path / "expected.json"))
    assert done.returncode == 1
    assert done.stdout == ""
    error = done.stderr[done.stderr.index("error: ") :]
    assert error.startswith("error: golden_sample_failed: wrong version 1 failed: 0 of 1 predictions match")
    assert "\n  hint: " in error
    done = server.ekiben(*arguments, "--expected", str(tmp_path / "expected.json"), "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["code"] == "golden_sample_failed"
    assert json.loads(done.stderr)["error"]["code"] == "golden_sample_failed"


def test_refused_uploads_say_what_to_do(server: Running, tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_bytes(pickle.dumps({"a": 1}))
    done = server.ekiben("push", str(tmp_path / "model.txt"))
    assert done.returncode == 1
    assert "error: pickle_refused" in done.stderr
    assert "ekiben init --from" in done.stderr
    done = server.ekiben("logs", "nobody")
    assert done.returncode == 1
    assert "nobody" in done.stderr
    assert "Traceback" not in done.stderr


def _interruptible() -> None:
    """A program started from a background job of a shell ignores the interrupt, unless it is told not to."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_the_interrupt_of_a_push_leaves_the_work_going_on(
    server: Running, client: ekiben.Client, table: pd.DataFrame, tmp_path: Path
) -> None:
    trained(table, 12).save_model(tmp_path / "patient.txt")
    process = subprocess.Popen(
        [sys.executable, "-m", "ekiben", "push", str(tmp_path / "patient.txt")],
        env=dict(server.environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=_interruptible,
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.readline().startswith("uploading patient.txt")
    assert process.stderr.readline()  # the first stage: it is stored
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "patient version 1 goes on without you" in rest
    assert "ekiben status patient" in rest
    assert "Traceback" not in rest
    assert client.wait({"model": "patient", "version": 1, "state": "queued"}, 120)["state"] == "live"


def test_following_a_log_ends_with_the_interrupt(server: Running, deployed: ekiben.Deployment) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "ekiben", "logs", deployed.name, "-f"],
        env=dict(server.environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=_interruptible,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest == "interrupted\n"


def test_an_interrupt_that_comes_while_the_command_ends_is_no_traceback() -> None:
    late = (
        "import atexit, os, signal, sys\n"
        "from ekiben.__main__ import main\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "sys.argv = ['ekiben', '--version']\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", late], capture_output=True, text=True, check=False, preexec_fn=_interruptible
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ekiben ")


def test_json_everywhere_is_one_value_on_stdout(server: Running, deployed: ekiben.Deployment) -> None:
    build = deployed.pushed["build"] if deployed.pushed else ""
    for arguments in (
        ["status"], ["status", deployed.name], ["models"], ["models", deployed.name], ["models", f"{deployed.name}:1"],
        ["builds"], ["builds", build], ["kinds"], ["open", deployed.name], ["version"], ["doctor"], ["up"],
        ["token", "list"], ["base", "list"],
    ):  # fmt: skip
        done = server.ekiben(*arguments, "--json")
        assert done.returncode == 0, (arguments, done.stderr)
        assert isinstance(json.loads(done.stdout), dict), arguments
        assert done.stderr == "", arguments
    assert server.ekiben("version", "--url", server.url).stdout.splitlines()[-1].startswith("server ")


def test_what_runs_is_not_deleted_and_what_does_not_is(
    server: Running, client: ekiben.Client, table: pd.DataFrame, tmp_path: Path
) -> None:
    file = tmp_path / "gone.txt"
    trained(table, 10).save_model(file)
    assert server.ekiben("push", str(file)).returncode == 0
    done = server.ekiben("rm", "gone:1")
    assert done.returncode == 1
    assert "version_in_use" in done.stderr
    assert server.ekiben("rm", "gone", "--deployment").returncode == 0
    assert server.ekiben("rm", "gone:1").returncode == 0
    with pytest.raises(ekiben.NotFound):
        client.version("gone", 1)


def test_a_version_that_is_not_deployed_is_built_only(server: Running, table: pd.DataFrame, tmp_path: Path) -> None:
    file = tmp_path / "aside.txt"
    trained(table, 11).save_model(file)
    done = server.ekiben("push", str(file), "--no-deploy", "--label", "team=growth")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "✓ lightgbm · 3 features   ✓ built\n"
    assert "growth" in server.ekiben("models", "aside").stdout
    assert "aside" not in server.ekiben("status").stdout


def test_a_pickle_with_preprocessing_goes_live_through_init(server: Running, tmp_path: Path) -> None:
    import joblib
    from sklearn.linear_model import LinearRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LinearRegression()).fit(pd.DataFrame({"age": [1.0, 2.0]}), [2.0, 4.0])
    joblib.dump(model, tmp_path / "ages.joblib", compress=3)
    done = server.ekiben("init", "--from", str(tmp_path / "ages.joblib"), str(tmp_path / "ages"))
    assert done.returncode == 0, done.stderr
    service = tmp_path / "ages" / "service.py"
    service.write_text(service.read_text().replace("# preprocessing goes here", "* 10  # decades"))
    (tmp_path / "rows.json").write_text('{"inputs": [{"age": 3.0}]}')
    done = server.ekiben("push", str(tmp_path / "ages"), "--sample", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr
    done = server.ekiben("predict", "ages", "-d", '[{"age": 3.0}]')
    assert json.loads(done.stdout)["outputs"] == pytest.approx([60.0])


def test_a_sklearn_pipeline_is_checked_by_its_probabilities(client: ekiben.Client, table: pd.DataFrame) -> None:
    from sklearn.compose import make_column_transformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    frame = table[["mean radius", "plan"]].astype({"plan": object})
    transform = make_column_transformer((StandardScaler(), ["mean radius"]), (OneHotEncoder(), ["plan"]))
    model = make_pipeline(transform, LogisticRegression())
    model.fit(frame, np.where(frame["mean radius"] > 0, "yes", "no"))
    deployment = ekiben.push(model, name="pipeline", sample=frame[:10], client=client)
    assert deployment.pushed is not None
    assert deployment.pushed["checked"]["matched"] == 10
    assert deployment.predict(frame).tolist() == model.predict(frame).tolist()
    assert np.allclose(deployment.predict_proba(frame), model.predict_proba(frame))


@pytest.mark.parametrize("form", ["frame", "array"])
def test_xgboost_takes_frames_and_arrays(form: str, client: ekiben.Client, table: pd.DataFrame) -> None:
    import xgboost

    frame = table[["mean radius", "spend"]]
    data: Any = frame if form == "frame" else frame.to_numpy()
    model = xgboost.XGBRegressor(n_estimators=4).fit(data, frame["mean radius"])
    deployment = ekiben.push(model, name=f"boost-{form}", sample=data[:10], client=client)
    assert np.allclose(deployment.predict(data), model.predict(data), rtol=1e-5)
    assert type(deployment.predict(data)) is (pd.Series if form == "frame" else np.ndarray)
    assert np.allclose(deployment.predict(frame), model.predict(data), rtol=1e-5), "a frame by position"


def test_sparse_rows_are_answered_as_xgboost_answers_them(client: ekiben.Client) -> None:
    import scipy.sparse
    import xgboost

    data = scipy.sparse.random(200, 4, 0.5, format="csr", random_state=0)
    model = xgboost.XGBRegressor(n_estimators=4).fit(data, data.toarray()[:, 0])
    deployment = ekiben.push(model, name="sparse", sample=data[:10], client=client)
    assert deployment.predict(data).tolist() == pytest.approx(model.predict(data).tolist(), rel=1e-5)


def test_an_upload_whose_connection_broke_is_sent_once_more(
    client: ekiben.Client, table: pd.DataFrame, tmp_path: Path
) -> None:
    """A relay in front of the server cuts the first connection in the middle of the body."""
    import socket
    from urllib.parse import urlsplit

    file = tmp_path / "cut.txt"
    trained(table, 14).save_model(file)
    address = urlsplit(client.url)
    with socket.create_server(("127.0.0.1", 0)) as relay:
        connections = 0

        def serve() -> None:
            nonlocal connections
            for _ in range(2):
                near, _ = relay.accept()
                connections += 1
                with near:
                    if connections == 1:
                        near.recv(1024)
                        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
                        continue
                    with socket.create_connection((address.hostname, address.port)) as far:
                        back = threading.Thread(target=pump, args=(far, near))
                        back.start()
                        pump(near, far)
                        back.join()

        thread = threading.Thread(target=serve)
        thread.start()
        with ekiben.Client(f"http://localhost:{relay.getsockname()[1]}") as through:
            version = through.upload([file], name="cut")
        thread.join()
    assert connections == 2
    assert version["version"] == 1
    assert len(client.versions("cut")) == 1


def pump(source: Any, target: Any) -> None:
    import socket

    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def test_up_twice_is_one_server_and_down_leaves_no_process(tmp_path: Path, server: Running) -> None:
    home = tmp_path / "home"
    environment = {**server.environment, "EKIBEN_HOME": str(home)}
    mine = server.at("", environment)
    first = json.loads(mine.ekiben("up", "--json", "--port", str(free_port())).stdout)
    assert first["started"] is True
    second = json.loads(mine.ekiben("up", "--json").stdout)
    assert (second["pid"], second["started"]) == (first["pid"], False)
    assert mine.ekiben("status").stderr == "nothing is deployed yet: ekiben push MODEL_FILE\n"
    assert json.loads(mine.ekiben("down", "--json").stdout) == {"stopped": True, "killed": False}
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            os.kill(first["pid"], 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the process is still there")
    assert not (home / "up.json").exists()


def test_a_token_is_asked_for_stored_and_masked(tmp_path: Path, server: Running) -> None:
    """A server that others can reach needs a token; `login` proves it before it is stored."""
    environment = {
        **server.environment, "EKIBEN_HOME": str(tmp_path / "home"), "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "EKIBEN_HOST": "0.0.0.0", "EKIBEN_TOKEN": "a-token-for-this-test-only",
    }  # fmt: skip
    admin = server.at("", environment)
    started = admin.ekiben("up", "--json", "--port", str(free_port()))
    assert started.returncode == 0, started.stderr
    url = json.loads(started.stdout)["url"]
    try:
        bare = server.at(url, {name: value for name, value in environment.items() if name != "EKIBEN_TOKEN"})
        done = bare.ekiben("status", "--url", url)
        assert done.returncode == 1
        assert "unauthorized" in done.stderr
        assert "ekiben login" in done.stderr
        assert bare.ekiben("login", url, "--token", "wrong").returncode == 1
        made = json.loads(admin.ekiben("token", "create", "ci", "--json", "--url", url).stdout)
        done = bare.ekiben("login", url, "--token", "-", stdin=made["token"] + "\n")
        assert done.returncode == 0, done.stderr
        assert made["token"] not in done.stdout + done.stderr
        assert bare.ekiben("kinds").returncode == 0
        assert admin.ekiben("token", "revoke", made["id"], "--url", url).returncode == 0
        assert bare.ekiben("kinds").returncode == 1
    finally:
        admin.ekiben("down")


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_model_of_a_training_run_in_mlflow_goes_live_from_the_shell_and_the_notebook(
    server: Running, client: ekiben.Client, table: pd.DataFrame, tmp_path: Path
) -> None:
    import mlflow

    home = Path(server.environment["EKIBEN_HOME"])
    kept = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    mlflow.set_tracking_uri(f"sqlite:///{home / 'mlflow.db'}")
    try:
        experiment = mlflow.create_experiment("training", artifact_location=tmp_path.as_uri())
        numbers = table.drop(columns="plan")
        model = lightgbm.train({"verbose": -1}, lightgbm.Dataset(numbers, numbers["mean radius"]), 3)
        with mlflow.start_run(experiment_id=experiment) as run:
            logged = mlflow.lightgbm.log_model(model, name="model")
    finally:
        mlflow.set_tracking_uri(kept[0])
        mlflow.set_registry_uri(kept[1])
    done = server.ekiben("push", "--run", run.info.run_id, "--name", "tracked")
    assert done.returncode == 0, done.stderr
    assert "live" in done.stdout
    assert run.info.run_id in server.ekiben("models", "tracked").stdout
    assert json.loads(server.ekiben("models", "tracked:1").stdout)["labels"]["mlflow.run_id"] == run.info.run_id
    deployment = ekiben.push(logged.model_uri, name="tracked", client=client)
    assert (deployment.pushed or {})["version"] == 1  # the same content
    assert list(deployment.predict(numbers[:3])) == pytest.approx(list(model.predict(numbers[:3])))

    without = server.ekiben("push", "--run", run.info.run_id)
    assert (without.returncode, "missing_name" in without.stderr) == (1, True)
    both = server.ekiben("push", "model.txt", "--run", run.info.run_id)
    assert (both.returncode, "file_and_run" in both.stderr) == (2, True)
