"""Forecasts as scheduled work, on SQLite and on PostgreSQL: jobs may be repeated, and ended anywhere."""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import func, select

from bentos.forecast import example
from bentos.forecast import train as training
from bentos.forecast.batch import forecasts, sales, tables
from bentos.forecast.batch.__main__ import main
from bentos.forecast.batch.tables import Database
from bentos.forecast.forecasting import Forecaster
from bentos.serving import ModelFolder, Problem
from bentos.serving.images import carry
from bentos.training.outcome import Progress

SILENT = Progress.start(quiet=True)
DAY = dt.date(2024, 3, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return example.write(tmp_path_factory.mktemp("forecast") / "model")


@pytest.fixture(scope="module")
def forecaster(model: ModelFolder) -> Forecaster:
    return Forecaster.load(model.path())


@pytest.fixture
def url(fresh_database: Callable[[], str]) -> str:
    return fresh_database()


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    made = Database(url)
    made.migrate()
    yield made
    made.close()


def rows(days: int, stores: int = 1, start: dt.date = DAY, items: tuple[str, ...] = ("tea", "cola")) -> Iterator[Any]:
    """Sales that rise by one a day and series."""
    for day in range(days):
        for number, (store, item) in enumerate((f"store {s}", item) for s in range(stores) for item in items):
            date = (start + dt.timedelta(days=day)).isoformat()
            yield {"date": date, "store": store, "item": item, "sales": float(10 + day + number), "price": 2.0}


def count(database: Database, table: Any) -> int:
    with database.read() as connection:
        return int(connection.execute(select(func.count()).select_from(table)).scalar_one())


def test_jobs_that_start_together_make_the_tables_once_as_the_code_has_them(url: str) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    databases = [Database(url) for _ in range(4)]
    failed: list[BaseException] = []

    def migrate(one: Database) -> None:
        try:
            one.migrate()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=migrate, args=(one,)) for one in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    with databases[0].read() as connection:
        options = {"version_table": tables.VERSION_TABLE}
        assert compare_metadata(MigrationContext.configure(connection, opts=options), tables.metadata) == []
    for one in databases:
        one.close()


def test_sales_are_written_once_however_often_they_are_registered(database: Database) -> None:
    assert sales.register(database, rows(700)) == (1400, 1400)
    assert sales.register(database, rows(700)) == (1400, 0)
    changed = [{"date": DAY.isoformat(), "store": "store 0", "item": "tea", "sales": 99}]
    assert sales.register(database, changed * 2) == (2, 1)
    plan = [{"date": DAY.isoformat(), "store": "store 0", "item": "tea", "sales": None, "discount": 0.2}]
    assert sales.register(database, plan) == (1, 1)
    with database.read() as connection:
        row = connection.execute(select(tables.sales).order_by("day", "store", tables.sales.c.item.desc())).first()
    assert row is not None
    assert (row.item, row.sales, row.price, row.discount) == ("tea", 99.0, 2.0, 0.2)  # a plan takes nothing away


def test_rows_before_a_wrong_one_stay_and_the_wrong_one_is_named(database: Database) -> None:
    good = list(rows(600))
    with pytest.raises(Problem) as refused:
        sales.register(database, [*good[:1100], {**good[1100], "sales": -3}, *good[1101:]])
    assert refused.value.field == "line 1102.sales"
    assert count(database, tables.sales) == 1000
    assert sales.register(database, good) == (1200, 200)


def test_a_file_of_any_length_is_held_in_small_parts(database: Database) -> None:
    most = 0

    def watched() -> Iterator[Any]:
        nonlocal most
        for number, row in enumerate(rows(1500)):
            if number % 100 == 0:
                most = max(most, number - count(database, tables.sales))
            yield row

    assert sales.register(database, watched()) == (3000, 3000)
    assert 0 < most <= 500


def answering(forecaster: Forecaster, calls: list[Any], fails_at: int | None = None) -> forecasts.Answer:
    def answer(body: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        if fails_at is not None and len(calls) == fails_at:
            raise ConnectionError("the endpoint went away")
        calls.append(body)
        return forecaster.answer(body), "forecast/1"

    return answer


def test_a_run_that_was_ended_goes_on_where_it_was(database: Database, forecaster: Forecaster) -> None:
    sales.register(database, rows(40, stores=30))  # 60 series: two requests
    sales.register(database, rows(20, items=("new",)))  # too short for the model
    calls: list[Any] = []
    with pytest.raises(ConnectionError):
        forecasts.predict(database, answering(forecaster, calls, fails_at=1), "forecast/1", 7, SILENT)
    first = len(_series(calls[0]))
    assert count(database, tables.forecasts) == 7 * first == 7 * 49  # fifty series, one of which is too short
    done = forecasts.predict(database, answering(forecaster, calls), "forecast/1", 7, SILENT)
    assert done == forecasts.Done(made=60 - first, there=first, short=1)
    assert count(database, tables.forecasts) == 60 * 7
    done = forecasts.predict(database, answering(forecaster, calls), "forecast/1", 7, SILENT)
    assert done == forecasts.Done(made=0, there=60, short=1)
    assert len(calls) == 2  # nothing was asked twice

    sales.register(database, rows(1, stores=1, start=DAY + dt.timedelta(days=40)))  # a new day of two series
    done = forecasts.predict(database, answering(forecaster, calls), "forecast/1", 7, SILENT)
    assert (done.made, done.there) == (2, 58)


def _series(body: Mapping[str, Any]) -> set[tuple[str, str]]:
    return {(row["store"], row["item"]) for row in body["history"]}


def test_a_forecast_is_what_the_model_says_of_the_history_gaps_and_plan_included(
    database: Database, forecaster: Forecaster
) -> None:
    known = [row for row in rows(60, items=("tea",)) if row["date"] != "2024-04-05"]  # a day without a row
    plan = {"store": "store 0", "item": "tea", "price": 1.5, "discount": 0.2, "holiday": 1}
    last = DAY + dt.timedelta(days=59)
    planned = [{**plan, "date": (last + dt.timedelta(days=step)).isoformat()} for step in (1, 2, 9)]
    sales.register(database, [*known, *planned])
    forecasts.predict(database, answering(forecaster, []), "forecast/1", 7, SILENT)
    gap = {"date": "2024-04-05", "store": "store 0", "item": "tea", "sales": None}
    expected = forecaster.answer({"history": [*known, gap], "horizon": 7, "future": planned[:2]})["forecast"]
    with database.read() as connection:
        found = connection.execute(select(tables.forecasts).order_by("day")).all()
    assert [row.day.isoformat() for row in found] == [row["date"] for row in expected]
    assert [row.sales for row in found] == pytest.approx([row["sales"] for row in expected], rel=1e-12)
    assert [row.seasonal_naive for row in found] == [10.0 + 59 - 7 + step for step in range(1, 8)]
    assert {row.origin for row in found} == {last}


def test_errors_are_those_of_the_days_that_came(database: Database, forecaster: Forecaster) -> None:
    sales.register(database, rows(60, stores=2))
    forecasts.predict(database, answering(forecaster, []), "forecast/1", 7, SILENT)
    (before,) = forecasts.evaluate(database, 30)
    assert (before["forecasts"], before["compared"], before["rmse"]) == (28, 0, None)
    came = list(rows(3, stores=2, start=DAY + dt.timedelta(days=60)))
    for row in came:
        row["sales"] += 60.0
    sales.register(database, came)
    (after,) = forecasts.evaluate(database, 30)
    assert (after["forecasts"], after["compared"]) == (28, 12)
    with database.read() as connection:
        made = {(r.store, r.item, r.day.isoformat()): r for r in connection.execute(select(tables.forecasts))}
    actual = np.array([row["sales"] for row in came])
    own = np.array([made[row["store"], row["item"], row["date"]].sales for row in came])
    naive = np.array([made[row["store"], row["item"], row["date"]].seasonal_naive for row in came])
    assert after["rmse"] == pytest.approx(training.rmse(actual, own))
    assert after["wape"] == pytest.approx(training.wape(actual, own))
    assert after["rmse_seasonal_naive"] == pytest.approx(training.rmse(actual, naive)) == pytest.approx(7.0)
    assert forecasts.evaluate(database, 30) == [after]
    assert count(database, tables.evaluations) == 1
    assert forecasts.evaluate(database, 1) == []  # older forecasts are left as they are


def test_the_commands_work_on_a_file_and_on_made_up_sales(
    url: str, model: ModelFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--database", url.replace("+psycopg", ""), "--quiet"]
    assert main(["register", "--simulate", "60", "--stores", "1", *where]) == 0
    assert main(["register", "--simulate", "7", "--stores", "1", *where]) == 0
    assert main(["predict", "--model", str(model.root), *where]) == 0
    assert f"{model.digest}: 8 series forecast" in capsys.readouterr().out
    assert main(["register", "--simulate", "2", "--stores", "1", *where]) == 0
    assert main(["evaluate", *where]) == 0
    assert "16/56" in capsys.readouterr().out
    file = tmp_path / "sales.csv"
    file.write_text("date,store,item,sales,holiday\n2022-01-03,corner,tea,3,true\n2022-01-04,corner,tea,,\n")
    assert main(["register", "--csv", str(file), *where]) == 0
    assert "2 rows, 2 new or changed" in capsys.readouterr().out
    file.write_text("date,store,item,sales\n2022-01-03,corner,tea,much\n")
    assert main(["register", "--csv", str(file), *where]) == 1
    assert "line 2.sales" in capsys.readouterr().err


@pytest.mark.parametrize(
    "database",
    [
        "nonsense",
        "mysql://user:hunter2@nowhere/sales",
        "postgresql://user:hunter2@127.0.0.1:9/sales",
        "sqlite:////no/x",
    ],
)
def test_a_database_that_does_not_work_is_told_without_its_password(
    database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--database", database, "--quiet"]) == 1
    where = ["--database", database, "--quiet", "--no-mlflow", "--out", str(tmp_path / "model")]
    assert training.main(["--small", *where]) == 1
    said = capsys.readouterr().err
    assert said.count("the database does not work") == 2, said
    assert "hunter2" not in said


def test_a_training_on_registered_sales_is_evaluated_on_them(database: Database, url: str, tmp_path: Path) -> None:
    from dataclasses import replace

    settings = replace(training.Settings.small(), database=url, days=400, horizon=14, rounds=40)
    with pytest.raises(ValueError, match="no sales are registered"):
        training.train(settings, SILENT)
    sales.register(database, sales.simulated(database, 100, 1, 7))
    with pytest.raises(ValueError, match="needs 168"):
        training.train(settings, SILENT)
    sales.register(database, sales.simulated(database, 300, 1, 7))
    outcome, _ = training.train(settings, SILENT)
    assert outcome.metrics["wape"] < outcome.metrics["wape_seasonal_naive"]
    assert "wape_true_mean" not in outcome.metrics  # nobody knows it
    assert url not in repr(settings) + str(dict(outcome.parameters))  # it may hold a password
    folder = outcome.write(tmp_path / "model")
    found = training.evaluate(folder, settings)
    assert found == {name: outcome.metrics[name] for name in found}
    again = training.read(settings)
    assert again.digest == outcome.dataset_digest
    sales.register(database, sales.simulated(database, 1, 1, 7))
    assert training.read(settings).digest != outcome.dataset_digest


def test_a_bento_does_not_carry_the_jobs(tmp_path: Path) -> None:
    kind = Path(training.__file__).parent
    carry(["bentos.forecast"], tmp_path, kind)
    carried = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert "bentos/forecast/forecasting.py" in carried
    assert not [path for path in carried if "batch" in path]
