"""One clock, and writers that wait for each other rather than fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from sqlalchemy import insert, select, text, update

from registry.database import Database, now
from registry.versions import counters


def test_the_clock_is_the_databases_and_counts_seconds_since_1970(fresh_database: Callable[[], str]) -> None:
    database = Database(fresh_database())
    with database.read() as connection:
        before = time.time()
        value = connection.execute(select(now())).scalar_one()
        assert before - 1 <= value <= time.time() + 1
    database.close()


def test_writers_that_read_first_do_not_lose_each_others_writes(fresh_database: Callable[[], str]) -> None:
    database = Database(fresh_database())
    database.create()
    database.create()  # fine when the tables are there
    with database.write() as connection:
        connection.execute(insert(counters).values(name="a", last=0))

    def count() -> None:
        for _ in range(25):
            with database.write() as connection:
                last = connection.execute(select(counters.c.last)).scalar_one()
                connection.execute(update(counters).values(last=last + 1))

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as connection:
        assert connection.execute(select(counters.c.last)).scalar_one() == 200
    database.close()


def test_as_many_may_read_at_once_as_the_service_has_threads(fresh_database: Callable[[], str]) -> None:
    database = Database(fresh_database())
    database.create()
    together = threading.Barrier(40, timeout=60)
    seen: list[int] = []

    def read() -> None:
        with database.read() as connection:
            together.wait()  # all hold a connection now
            seen.append(len(connection.execute(select(counters)).all()))

    threads = [threading.Thread(target=read) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [0] * 40
    database.close()


def test_a_name_is_claimed_by_one_at_a_time_and_free_again_when_its_holder_dies(
    fresh_database: Callable[[], str],
) -> None:
    url = fresh_database()
    database = Database(url)
    # A second service works with the same database only where that is a server.
    other = database if database.embedded else Database(url)
    with database.claimed("upload/1") as first, other.claimed("upload/1") as second, other.claimed("upload/2") as third:
        assert (first, second, third) == (True, False, True)
        with other.claimed("upload/1") as still:  # the refused one took nothing away
            assert not still
    with other.claimed("upload/1") as again:
        assert again
        if other is not database:
            other.engine.dispose(close=False)
            # and waited for, in milliseconds
            ended = "SELECT pg_terminate_backend(pid, 60000) FROM pg_locks WHERE locktype = 'advisory'"
            with other.read() as connection:  # as when the holder's machine goes
                connection.execute(text(ended))
            with database.claimed("upload/1") as free:
                assert free
    with database.claimed("upload/1") as at_last:
        assert at_last
    other.close()
    database.close()
