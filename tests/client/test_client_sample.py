"""Tables become JSON rows that mean the same, and answers come back in the form of the question."""

from __future__ import annotations

import decimal
import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekiben import ExportError, _sample


def test_a_frame_becomes_objects_by_column_name_with_plain_values() -> None:
    frame = pd.DataFrame(
        {
            "age": np.array([31, 40], dtype="int32"),
            "rate": np.array([0.5, np.nan], dtype="float32"),
            "plan": pd.Categorical(["pro", None], categories=["free", "pro"]),
            "since": [pd.Timestamp("2026-01-02T03:04:05Z"), pd.NaT],
            "active": [True, False],
            "count": pd.array([1, None], dtype="Int64"),
        }
    )
    body = _sample.body(frame)
    assert json.loads(json.dumps(body, allow_nan=False)) == {
        "inputs": [
            {"age": 31, "rate": 0.5, "plan": "pro", "since": "2026-01-02T03:04:05+00:00", "active": True, "count": 1},
            {"age": 40, "rate": None, "plan": None, "since": None, "active": False, "count": None},
        ]
    }


def test_categories_that_are_numbers_stay_numbers() -> None:
    frame = pd.DataFrame({"zone": pd.Categorical([3, 1])})
    assert _sample.rows(frame) == [{"zone": 3}, {"zone": 1}]


def test_a_frame_without_column_names_and_an_array_become_arrays() -> None:
    values = np.array([[1.0, np.nan], [2.5, 3.0]])
    assert _sample.rows(values) == [[1.0, None], [2.5, 3.0]]
    assert _sample.rows(pd.DataFrame(values)) == [[1.0, None], [2.5, 3.0]]


def test_lists_with_numpy_scalars_become_plain() -> None:
    rows = [{"a": np.float32(0.5), "b": np.int64(3), "c": np.str_("x"), "d": np.datetime64("2026-01-02")}]
    assert json.loads(json.dumps(_sample.rows(rows))) == [{"a": 0.5, "b": 3, "c": "x", "d": "2026-01-02"}]


def test_whole_numbers_are_not_rounded_on_the_way_out_or_back() -> None:
    big = 2**53 + 1
    frame = pd.DataFrame({"a": [big, 1], "b": pd.array([big, None], dtype="Int64"), "c": [0.5, 1.0]})
    assert _sample.rows(frame) == [{"a": big, "b": big, "c": 0.5}, {"a": 1, "b": None, "c": 1.0}]
    assert _sample.rows([[decimal.Decimal(big), decimal.Decimal("0.5"), decimal.Decimal("NaN")]]) == [[big, 0.5, None]]
    assert _sample.rows(np.array([2**64 - 1], dtype="uint64")) == [2**64 - 1]
    for values in ([big, None], [big, 0.5], [big, 1]):
        assert list(_sample.like(frame, values)) == list(_sample.like(np.zeros((2, 1)), values)) == values


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_dates_are_written_alike_from_frames_and_arrays(unit: str) -> None:
    days = np.array(["2024-01-31", "NaT", "2024-01-31T12:00:01"], dtype=f"datetime64[{unit}]")
    expected = ["2024-01-31T00:00:00", None, "2024-01-31T12:00:01"]
    assert _sample.rows(days) == _sample.rows(pd.Series(days)) == _sample.rows(list(days)) == expected
    assert _sample.rows(days.reshape(3, 1)) == [[day] for day in expected]
    assert [row["d"] for row in _sample.rows(pd.DataFrame({"d": days}))] == expected
    if unit in ("us", "ns"):
        short = np.array(["2024-01-31T12:00:01.5"], dtype=days.dtype)
        assert _sample.rows(short) == _sample.rows(pd.Series(short)) == ["2024-01-31T12:00:01.500000"]


def test_texts_in_a_series_become_one_row_each() -> None:
    assert _sample.body(pd.Series(["good", "bad"])) == {"inputs": ["good", "bad"]}


def test_a_request_body_is_sent_as_it_is() -> None:
    assert _sample.body({"phrase": "cat", "ids": np.array([1, 2])}) == {"phrase": "cat", "ids": [1, 2]}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (pd.DataFrame({"x": [math.inf]}), "x holds an infinity"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), "two columns"),
        (pd.DataFrame({"x": [complex(1, 2)]}), "x holds a builtins.complex"),
        (pd.DataFrame({"x": pd.to_timedelta([1], unit="s")}), "x holds a pandas"),
        (np.array([1], dtype="timedelta64[s]"), "sample holds a numpy.timedelta64"),
        (np.array([0.1], dtype=np.longdouble), "sample holds a numpy.longdouble"),
        (pd.DataFrame({"x": [b"a"]}), "x holds a builtins.bytes"),
        (object(), "no rows"),
        (np.float64(3.0), "no rows"),
    ],
)
def test_what_json_cannot_carry_is_refused_with_the_column_and_a_way_out(data: object, said: str) -> None:
    with pytest.raises(ExportError) as caught:
        _sample.body(data)
    assert said in caught.value.message
    assert caught.value.code == "bad_sample"
    assert caught.value.hint


def test_a_sparse_matrix_is_refused_with_the_way_out() -> None:
    import scipy.sparse

    with pytest.raises(ExportError, match="toarray"):
        _sample.body(scipy.sparse.csr_matrix([[1, 0]]))


def test_a_matrix_that_does_not_give_its_rows_back_is_refused() -> None:
    import numpy as np
    import xgboost

    with pytest.raises(ExportError, match="DMatrix") as caught:
        _sample.body(xgboost.DMatrix(np.zeros((2, 2))))
    assert "ekiben.missing" in (caught.value.hint or "")


def test_answers_take_the_form_of_the_question() -> None:
    frame = pd.DataFrame({"a": [1, 2]}, index=["x", "y"])
    series = _sample.like(frame, [0.5, None])
    assert list(series.index) == ["x", "y"]
    assert series["x"] == 0.5
    assert math.isnan(series["y"])
    table = _sample.like(frame, [[0.1, 0.9], [0.8, 0.2]])
    assert table.shape == (2, 2)
    assert list(table.index) == ["x", "y"]
    array = _sample.like(np.zeros((2, 1)), [1.0, 2.0])
    assert array.dtype == float
    assert list(_sample.like(np.zeros((2, 1)), ["a", "b"])) == ["a", "b"]
    assert _sample.like([[1], [2]], [1, 2]) == [1, 2]


@given(
    st.lists(
        st.lists(st.floats(allow_infinity=False) | st.integers(-(2**53), 2**53) | st.none(), min_size=3, max_size=3),
        min_size=1,
        max_size=8,
    )
)
def test_numbers_survive_the_way_through_json_bit_for_bit(rows: list[list[float | None]]) -> None:
    array = np.array([[math.nan if v is None else v for v in row] for row in rows], dtype=float)
    sent = json.loads(json.dumps(_sample.body(array), allow_nan=False))["inputs"]
    back = np.array([[math.nan if v is None else v for v in row] for row in sent], dtype=float)
    assert np.array_equal(array, back, equal_nan=True)
