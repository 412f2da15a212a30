from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import UserError
from registry.signature import Column, Signature, Tensor, check_compatible, check_sample

CHURN = Signature(
    (
        Column("age", "int"),
        Column("income"),
        Column("plan", "category", ("free", "pro")),
        Column("vip", "bool"),
        Column("city", "string"),
    ),
    named=True,
    n_features=5,
    task="binary",
    classes=(0, 1),
)
ROW = {"age": 31, "income": 2.5, "plan": "pro", "vip": True, "city": "Ulm"}
ARRAY = Signature(tuple(Column(f"f{index}") for index in range(3)), n_features=3, task="regression")
IMAGE = Signature(tensors=(Tensor("X", "float32", ("batch", 2, 2)),), outputs=(Tensor("Y", "float32", (None, 1)),))
TWO = Signature(tensors=(Tensor("a", "int64", (None, 1)), Tensor("b", "string", (None, 1))))


def misfit(signature: Signature, sample: object) -> UserError:
    with pytest.raises(UserError) as error:
        check_sample(signature, sample)
    assert error.value.code == "sample_does_not_fit"
    assert error.value.hint
    return error.value


def test_rows_that_fit_are_counted():
    assert check_sample(CHURN, {"inputs": [ROW, {**ROW, "plan": None}, list(ROW.values())]}) == 3
    assert check_sample(CHURN, {"inputs": [{**ROW, "plan": "never seen in training"}]}) == 1
    assert check_sample(CHURN, {"inputs": [{**ROW, "age": 31.0, "vip": 1, "income": 3}]}) == 1
    assert check_sample(ARRAY, {"inputs": [[1, 2.5, None], {"f0": 1, "f1": 2, "f2": 3}]}) == 2
    assert check_sample(IMAGE, {"inputs": [[[1, 2], [3, 4]], {"X": [[1, 2], [3, 4]]}]}) == 2
    assert check_sample(TWO, {"inputs": [{"a": [1], "b": ["x"]}, {"a": 1, "b": "x"}, [1, "x"]]}) == 3
    assert check_sample(Signature(), {"inputs": [{"anything": 1}, [1, 2], 3]}) == 3


@pytest.mark.parametrize(
    ("signature", "sample", "field"),
    [
        (CHURN, [ROW], "sample"),
        (CHURN, {}, "sample"),
        (CHURN, {"inputs": []}, "sample.inputs"),
        (CHURN, {"inputs": "x"}, "sample.inputs"),
        (CHURN, {"inputs": [ROW, 7]}, "sample.inputs[1]"),
        (CHURN, {"inputs": [ROW, ROW, {**ROW, "age": "31"}]}, "sample.inputs[2].age"),
        (CHURN, {"inputs": [{**ROW, "age": 31.5}]}, "sample.inputs[0].age"),
        (CHURN, {"inputs": [{**ROW, "extra": 1}]}, "sample.inputs[0].extra"),
        (CHURN, {"inputs": [{key: ROW[key] for key in list(ROW)[1:]}]}, "sample.inputs[0].age"),
        (CHURN, {"inputs": [{**ROW, "plan": 2}]}, "sample.inputs[0].plan"),
        (CHURN, {"inputs": [{**ROW, "income": [1]}]}, "sample.inputs[0].income"),
        (CHURN, {"inputs": [{**ROW, "vip": "yes"}]}, "sample.inputs[0].vip"),
        (CHURN, {"inputs": [{**ROW, "city": 3}]}, "sample.inputs[0].city"),
        (CHURN, {"inputs": [list(ROW.values())[1:]]}, "sample.inputs[0]"),
        (CHURN, {"inputs": [["x", 1, "pro", True, "Ulm"]]}, "sample.inputs[0][0]"),
        (ARRAY, {"inputs": [[1, 2]]}, "sample.inputs[0]"),
        (IMAGE, {"inputs": [[[1, 2]]]}, "sample.inputs[0]"),
        (IMAGE, {"inputs": [[[1, 2], [3]]]}, "sample.inputs[0][1]"),
        (IMAGE, {"inputs": [[[1, 2], [3, "x"]]]}, "sample.inputs[0][1][1]"),
        (IMAGE, {"inputs": [{"Z": 1}]}, "sample.inputs[0].Z"),
        (TWO, {"inputs": [{"a": 1}]}, "sample.inputs[0].b"),
        (TWO, {"inputs": [{"a": 1, "b": 2}]}, "sample.inputs[0].b"),
        (TWO, {"inputs": [[1]]}, "sample.inputs[0]"),
    ],
)
def test_rows_that_do_not_fit_are_named_by_their_place(signature, sample, field):
    assert misfit(signature, sample).field == field


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["age", "X", "a", "inputs", ""]), inner)
    ),
    max_leaves=12,
)


@given(st.sampled_from([CHURN, ARRAY, IMAGE, TWO, Signature()]), anything, st.booleans())
def test_any_sample_fits_or_is_a_user_error(signature, sample, wrap):
    try:
        assert check_sample(signature, {"inputs": [sample]} if wrap else sample) >= 1
    except UserError as error:
        assert error.code == "sample_does_not_fit"  # noqa: PT017


@pytest.mark.parametrize("signature", [CHURN, ARRAY, IMAGE, TWO, Signature()])
def test_a_signature_survives_json(signature):
    assert Signature.from_json(json.loads(json.dumps(signature.to_json()))) == signature


def changed(old: Signature, new: Signature) -> str:
    with pytest.raises(UserError) as error:
        check_compatible(old, new)
    assert error.value.code == "schema_incompatible"
    assert "--force" in (error.value.hint or "")
    return error.value.detail


def test_compatible_successors():
    check_compatible(None, CHURN)
    check_compatible(CHURN, None)
    for signature in (CHURN, ARRAY, IMAGE, TWO):
        check_compatible(signature, signature)
    more_levels = replace(CHURN.columns[2], categories=("free", "pro", "team"))
    check_compatible(CHURN, replace(CHURN, columns=(*CHURN.columns[:2], more_levels, *CHURN.columns[3:])))
    check_compatible(CHURN, replace(CHURN, columns=(Column("age", "number"), *CHURN.columns[1:])))
    check_compatible(IMAGE, replace(IMAGE, outputs=(*IMAGE.outputs, Tensor("more", "float32"))))
    check_compatible(ARRAY, replace(ARRAY, columns=tuple(Column(f"Column_{index}") for index in range(3))))
    wider = replace(IMAGE, tensors=(Tensor("X", "float32", (None, None, 2)),))
    check_compatible(IMAGE, wider)
    assert "input X changed" in changed(wider, IMAGE)


def test_incompatible_successors_list_what_changed():
    new = replace(CHURN, columns=(Column("age", "string"), *CHURN.columns[2:], Column("tenure")))
    detail = changed(CHURN, new)
    assert "column income removed" in detail
    assert "column tenure added" in detail
    assert "column age changed from int to string" in detail
    assert "3 features became 4" in changed(ARRAY, replace(ARRAY, columns=(), n_features=4))
    assert "another order" in changed(CHURN, replace(CHURN, columns=CHURN.columns[::-1]))
    assert "output Y removed" in changed(IMAGE, replace(IMAGE, outputs=(Tensor("Z", "float32"),)))
    assert "input b removed" in changed(TWO, replace(TWO, tensors=TWO.tensors[:1]))
    assert "task changed" in changed(CHURN, replace(CHURN, task="regression", classes=None))
    assert "classes changed" in changed(CHURN, replace(CHURN, classes=("no", "yes")))
    assert "tensors in place of columns" in changed(CHURN, IMAGE)
