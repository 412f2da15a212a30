"""The command of the batch jobs."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from bentos.forecast.batch import forecasts, sales
from bentos.forecast.batch.tables import Database, trouble
from bentos.serving.problems import Problem, StartError
from bentos.training.command import positive
from bentos.training.outcome import Progress, table
from bentos.training.registration import RegistrationError

_TRIES = 5
_ANSWER_SECONDS = 120.0


class EndpointError(Exception):
    """The endpoint refused a request, or could not be reached. The text says what to do next."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    url = options.database or os.environ.get("EKIBEN_FORECAST_DATABASE")
    if not url:
        print("name the database: --database URL, or EKIBEN_FORECAST_DATABASE", file=sys.stderr)
        return 2
    say = Progress.start(options.quiet)
    try:
        database = Database(url)
        try:
            database.migrate()
            _JOBS[options.job](database, options, say)
        finally:
            database.close()
    except Problem as error:
        print(f"{error.detail}" + (f"; {error.hint}" if error.hint else ""), file=sys.stderr)
        return 1
    except (EndpointError, RegistrationError, StartError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except SQLAlchemyError as error:
        print(trouble(error), file=sys.stderr)
        return 1
    return 0


def _register(database: Database, options: argparse.Namespace, say: Progress) -> None:
    if options.csv is None:
        rows = sales.simulated(database, options.simulate, options.stores, options.seed)
        seen, changed = sales.register(database, rows)
    else:
        with sys.stdin if str(options.csv) == "-" else options.csv.open(newline="", encoding="utf-8") as stream:
            seen, changed = sales.register(database, sales.of_csv(stream))
    print(f"{seen} rows, {changed} new or changed")


def _predict(database: Database, options: argparse.Namespace, say: Progress) -> None:
    if options.model is not None:
        answer, model = _of_folder(options.model)
    elif options.live is not None:
        answer, model = _of_service(options.live, os.environ.get("EKIBEN_TOKEN"))
    else:
        answer, model = _of_endpoint(options.url, os.environ.get("EKIBEN_TOKEN"))
    done = forecasts.predict(database, answer, model, options.horizon, say)
    print(f"{model}: {done.made} series forecast, {done.there} were there, {done.short} too short")


def _evaluate(database: Database, options: argparse.Namespace, say: Progress) -> None:
    found = forecasts.evaluate(database, options.days)
    compared = [each for each in found if each["compared"]]
    names = ("rmse", "rmse_seasonal_naive", "wape", "wape_seasonal_naive")
    rows = [
        [
            f"{each['model']}, {each['origin']}",
            f"{each['compared']}/{each['forecasts']}",
            *(_text(each[n]) for n in names),
        ]
        for each in compared[:20]
    ]
    print(table(["model, forecast from", "compared", *names], rows) if rows else "nothing to compare yet")


_JOBS = {"register": _register, "predict": _predict, "evaluate": _evaluate}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bentos.forecast.batch",
        description="Sales, forecasts and their errors in a database; each job may be repeated, or ended and begun "
        "again.",
    )
    jobs = parser.add_subparsers(dest="job", required=True)
    register = jobs.add_parser("register", help="write down sales, and what is planned")
    source = register.add_mutually_exclusive_group(required=True)
    source.add_argument("--csv", type=Path, metavar="FILE", help="date, store, item, sales, price, …; - is stdin")
    source.add_argument("--simulate", type=positive, metavar="DAYS", help="made-up sales of the next DAYS days")
    register.add_argument("--stores", type=positive, default=5, help="with --simulate (default 5)")
    register.add_argument("--seed", type=int, default=7, help="with --simulate (default 7)")
    predict = jobs.add_parser("predict", help="forecast the next days of every series")
    model = predict.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--url", help="a deployment, e.g. http://localhost:8000/inference/forecast; EKIBEN_TOKEN is sent"
    )
    model.add_argument("--live", metavar="URL", help="a running Ekiben, whose live version of forecast is brought here")
    model.add_argument("--model", type=Path, metavar="DIR", help="a model folder, as training writes it")
    predict.add_argument("--horizon", type=positive, default=7, help="days (default 7)")
    evaluate = jobs.add_parser("evaluate", help="compare forecasts with what came")
    evaluate.add_argument("--days", type=positive, default=90, help="forecasts of the last DAYS days (default 90)")
    for job in (register, predict, evaluate):
        job.add_argument(
            "--database", metavar="URL", help="sqlite:///FILE or postgresql+psycopg://… (EKIBEN_FORECAST_DATABASE)"
        )
        job.add_argument("--quiet", action="store_true", help="no progress, only the result")
    return parser


def _of_folder(folder: Path) -> tuple[forecasts.Answer, str]:
    from bentos.forecast.forecasting import Forecaster
    from bentos.serving.model import ModelFolder

    model = ModelFolder.read(folder)
    model.verify()
    forecaster = Forecaster.load(model.path())
    return lambda body: (forecaster.answer(body), model.digest), model.digest


def _of_service(url: str, token: str | None) -> tuple[forecasts.Answer, str]:
    """The model itself in place of its endpoint, which has better things to do than every series at once."""
    from bentos.forecast.forecasting import Forecaster
    from bentos.training.registration import Service

    service = Service(url, token)
    version = service.live("forecast")
    if version is None:
        raise EndpointError(f"{url} serves no forecast; train one: python -m bentos.forecast.train --register {url}")
    with tempfile.TemporaryDirectory(prefix="ekiben-forecast-") as scratch:
        forecaster = Forecaster.load(service.download(version, Path(scratch)).path())
    name = f"{version['model']}/{version['version']}"
    return lambda body: (forecaster.answer(body), name), name


def _of_endpoint(url: str, token: str | None) -> tuple[forecasts.Answer, str]:
    """A deployment; its own word says which model answers, since another may be released while the job runs."""
    import httpx

    local = httpx.URL(url).host in ("localhost", "127.0.0.1", "::1")
    client = httpx.Client(
        headers={"authorization": f"Bearer {token}"} if token else {}, timeout=_ANSWER_SECONDS, trust_env=not local
    )

    def call(method: str, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        for attempt in range(_TRIES):
            try:
                answer = client.request(method, f"{url.rstrip('/')}/{path}", json=body)
            except httpx.HTTPError as error:
                raise EndpointError(f"{url} cannot be reached: {error}") from error
            if answer.status_code != 503 or attempt == _TRIES - 1:
                break
            time.sleep(min(float(answer.headers.get("retry-after") or 1), 30.0))
        if answer.status_code >= 400:
            raise EndpointError(f"{url} answered {answer.status_code}: {answer.text[:500]}")
        return answer

    def named(answer: httpx.Response) -> str:
        return f"{answer.headers.get('ekiben-model', 'model')}/{answer.headers.get('ekiben-version', '0')}"

    def predict(body: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        answer = call("POST", "predict", body)
        return answer.json(), named(answer)

    return predict, named(call("GET", "health"))


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    raise SystemExit(main())
