"""Conformal scores against values worked out by hand, and what they promise on known pictures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bentos.cargo import selection
from bentos.cargo.selection import Calibration, distances

CENTRES = np.array([[1.0, 0.0], [0.0, 1.0]])

# Two labels with four calibration pictures each: of each label the first and third make the centre, (0.9, 0.1) and
# (0.2, 0.8), and the second and fourth make the scores.
ANSWERS = np.array([[0.8, 0.2], [0.7, 0.3], [1.0, 0.0], [0.5, 0.5], [0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.0, 1.0]])
LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 1])


def test_distances_by_hand() -> None:
    answer = np.array([[0.6, 0.4]])
    assert distances(answer, CENTRES, "l1")[0] == pytest.approx([0.8, 1.2])
    assert distances(answer, CENTRES, "l2")[0] == pytest.approx([0.4 * np.sqrt(2), 0.6 * np.sqrt(2)])
    length = np.sqrt(0.52)
    assert distances(answer, CENTRES, "cosine")[0] == pytest.approx([1 - 0.6 / length, 1 - 0.4 / length])
    with pytest.raises(ValueError, match="no distance 'l3'"):
        distances(answer, CENTRES, "l3")


def test_centres_and_scores_come_from_different_pictures() -> None:
    found = Calibration.of(ANSWERS, LABELS, "l1")
    assert found.centres == pytest.approx(np.array([[0.9, 0.1], [0.2, 0.8]]))
    # |0.7 − 0.9| + |0.3 − 0.1| = 0.4 and |0.5 − 0.9| + |0.5 − 0.1| = 0.8; of label 1: 0 and 0.4
    assert found.scores[0] == pytest.approx([0.4, 0.8])
    assert found.scores[1] == pytest.approx([0.0, 0.4])


def test_p_values_by_hand() -> None:
    found = Calibration.of(ANSWERS, LABELS, "l1")
    new = np.array([[0.8, 0.2], [0.6, 0.4], [0.15, 0.85], [0.55, 0.45]])
    # nonconformity to label 0: 0.2, 0.6, 1.5, 0.7; to label 1: 1.2, 0.8, 0.1, 0.7
    assert found.nonconformity(new) == pytest.approx(np.array([[0.2, 1.2], [0.6, 0.8], [1.5, 0.1], [0.7, 0.7]]))
    # of two scores, so many are as large: 2, 1, 0, 1 of label 0 and 0, 0, 1, 0 of label 1; one is added to both
    assert found.p_values(new) == pytest.approx(np.array([[3, 1], [2, 1], [1, 2], [2, 1]]) / 3)
    assert found.credibility(new) == pytest.approx(np.array([3, 2, 2, 2]) / 3)


def test_a_score_that_is_equal_counts_as_as_odd() -> None:
    found = Calibration("l1", CENTRES, (np.array([0.5, 1.0]), np.array([0.5, 1.0])))
    assert found.p_values(np.array([[0.75, 0.25]]))[0, 0] == 1.0  # a = 0.5


def test_the_order_is_by_credibility_and_then_by_the_distance_to_the_nearest_known_answer() -> None:
    found = Calibration("l1", CENTRES, (np.array([0.1, 0.2]), np.array([0.1, 0.4])))
    #   a to 0, a to 1, credibility, smaller a
    #   0.0     2.0     1            0
    #   1.0     1.0     1/3          1
    #   0.6     1.4     1/3          0.6
    #   1.5     0.5     1/3          0.5
    #   0.15    1.85    2/3          0.15
    firsts = np.array([1.0, 0.5, 0.7, 0.25, 0.925])
    new = np.stack([firsts, 1 - firsts], axis=1)
    assert found.order(new).tolist() == [1, 2, 3, 4, 0]


def test_the_least_credible_are_taken_of_each_predicted_label_in_turn() -> None:
    found = Calibration("l1", CENTRES, (np.array([0.1, 0.2]), np.array([0.1, 0.4])))
    firsts = np.array([1.0, 0.6, 0.7, 0.25, 0.925, 0.1])  # the fourth and the last are taken for label 1
    new = np.stack([firsts, 1 - firsts], axis=1)
    assert found.order(new).tolist() == [1, 2, 3, 5, 4, 0]
    assert selection.choose(found, new, 6).tolist() == [1, 3, 2, 5, 4, 0]
    assert selection.choose(found, new, 2).tolist() == [1, 3]


def test_labels_are_calibrated_apart() -> None:
    """An answer that is ordinary for a vague material is odd for a clear one."""
    vague, clear = np.array([0.5, 0.6, 0.7, 0.8]), np.array([0.01, 0.02, 0.03, 0.04])
    found = Calibration("l1", CENTRES, (vague, clear))
    like_0, like_1 = np.array([[0.8, 0.2]]), np.array([[0.2, 0.8]])
    assert found.credibility(like_0)[0] == 1.0
    assert found.credibility(like_1)[0] == pytest.approx(1 / 5)


@pytest.mark.parametrize("distance", selection.DISTANCES)
def test_for_known_pictures_p_values_hold_their_promise(distance: str) -> None:
    """At most a share ε of exchangeable pictures has a p-value of its own label of ε or less."""
    rng = np.random.default_rng(4)
    sharpness = np.array([8.0, 2.0, 5.0])

    def draw(count: int) -> tuple[selection.Floats, selection.Ints]:
        labels = rng.integers(0, 3, count)
        scores = rng.normal(0, 1.5, (count, 3)) + sharpness[labels][:, None] * np.eye(3)[labels]
        odds = np.exp(scores)
        return odds / odds.sum(axis=1, keepdims=True), labels

    found = Calibration.of(*draw(6000), distance)
    answers, labels = draw(6000)
    p_values = found.p_values(answers)[np.arange(6000), labels]
    for label in range(3):
        for level in (0.05, 0.1, 0.3):
            assert (p_values[labels == label] <= level).mean() == pytest.approx(level, abs=0.035)


@given(st.integers(2, 5), st.integers(0, 2**32 - 1), st.integers(1, 40), st.sampled_from(selection.DISTANCES))
@settings(max_examples=60, deadline=None)
def test_whatever_the_answers_p_values_are_shares_and_the_choice_has_no_picture_twice(
    labels: int, seed: int, count: int, distance: str
) -> None:
    rng = np.random.default_rng(seed)
    known = rng.dirichlet(np.full(labels, 0.3), labels * 6)
    found = Calibration.of(known, np.arange(labels * 6) % labels, distance)
    new = rng.dirichlet(np.full(labels, 0.2), count)
    p_values = found.p_values(new)
    assert ((p_values > 0) & (p_values <= 1)).all()
    chosen = selection.choose(found, new, count)
    assert sorted(chosen.tolist()) == list(range(count))
    credibility, taken_for = found.credibility(new)[chosen], new.argmax(axis=1)[chosen]
    for label in range(labels):
        assert (np.diff(credibility[taken_for == label]) >= 0).all()


def test_certain_answers_have_no_score_above_nought_and_still_an_order() -> None:
    """A network that is sure of every calibration picture: all scores are 0."""
    sure = np.eye(2)[[0, 0, 0, 0, 1, 1, 1, 1]]
    for distance in selection.DISTANCES:
        found = Calibration.of(sure, LABELS, distance)
        new = np.array([[1.0, 0.0], [0.9, 0.1], [0.5, 0.5]])
        assert found.order(new).tolist() == [2, 1, 0], distance
        assert np.isfinite(found.p_values(new)).all()


def test_a_label_without_calibration_is_told() -> None:
    with pytest.raises(ValueError, match="label 1 has 1 calibration pictures"):
        Calibration.of(ANSWERS[:5], LABELS[:5], "l2")
