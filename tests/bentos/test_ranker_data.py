"""The made-up searches have the structure that bentos.ranker.data writes down, and clicks can be debiased."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bentos.ranker import clicks, data
from bentos.ranker.features import Candidate, Columns, Search, matrix, order, words
from bentos.ranker.ndcg import mean_ndcg, ndcg


@pytest.fixture(scope="module")
def world() -> data.World:
    return data.make(4000, seed=11)


def test_the_same_seed_gives_the_same_world_and_another_seed_another() -> None:
    assert data.make(300, 1).digest == data.make(300, 1).digest
    assert data.make(300, 1).digest != data.make(300, 2).digest


def test_held_out_phrases_are_in_neither_period_of_the_log(world: data.World) -> None:
    def phrases(searches: data.Searches) -> set[str]:
        return {data.phrase_text(phrase) for phrase in searches.phrase}

    unseen = phrases(world.held_out)
    assert len(unseen) > 20
    assert not unseen & phrases(world.train)
    assert not unseen & phrases(world.history)


def test_grades_are_utility_cut_at_the_thresholds_and_all_occur(world: data.World) -> None:
    for grade, low in enumerate((-np.inf, *data.THRESHOLDS)):
        assert (world.train.utility[world.train.grades == grade] >= low).all()
    shares = np.bincount(world.train.grades.ravel(), minlength=data.GRADES) / world.train.grades.size
    assert shares.min() > 0.02
    assert shares[0] == shares.max()


def test_a_search_shows_each_picture_once(world: data.World) -> None:
    assert all(len(set(row)) == data.PLACES for row in world.train.pictures.tolist())
    assert all(sorted(row) == list(range(data.PLACES)) for row in world.train_log.shown.tolist())


def test_likes_decide_the_order_shown_far_more_than_relevance_does(world: data.World) -> None:
    by_place = np.take_along_axis(world.train.utility, world.train_log.shown, axis=1).mean(axis=0)
    likes = np.take_along_axis(data.popularity(world, world.train), world.train_log.shown, axis=1)
    assert np.log1p(likes)[:, 0].mean() > np.log1p(likes)[:, -1].mean() + 1.5
    assert by_place[0] - by_place[-1] < 2 * world.train.utility.std()


def test_swaps_recover_how_much_each_place_is_looked_at() -> None:
    """With many searches, at every place, although better pictures always stand at the top."""
    rng = np.random.default_rng(2)
    count, places = 600_000, 10
    truth = 1.0 / np.arange(1, places + 1)
    attractive = np.tile(np.linspace(0.7, 0.1, places), (count, 1))
    shown, swap = clicks.swap_first(np.tile(np.arange(places), (count, 1)), 1.0, rng)
    log = clicks.Log(shown, clicks.click(shown, attractive, truth, rng), swap)
    np.testing.assert_allclose(clicks.examination(log), truth, rtol=0.06)


def test_the_examination_of_a_small_log_is_right_at_the_top_and_never_rises(world: data.World) -> None:
    """Further down a log of this size has a handful of clicks a place; the floor of training bounds what that does."""
    estimated = clicks.examination(world.history_log)
    assert estimated[0] == 1.0
    assert (np.diff(estimated) <= 0).all()
    np.testing.assert_allclose(estimated[1:6], data.EXAMINATION[1:6], rtol=0.35)


def test_the_plain_click_rate_by_place_is_not_the_examination(world: data.World) -> None:
    """Without swaps the order itself is confounded with the place: the top also shows better pictures."""
    plain = world.history_log.clicked.mean(axis=0)
    plain = plain / plain[0]
    estimated = clicks.examination(world.history_log)
    error = np.abs(np.log(np.maximum(plain, 1e-3) / data.EXAMINATION)).mean()
    assert np.abs(np.log(estimated / data.EXAMINATION)).mean() < error


def test_no_clicks_in_swapped_searches_are_an_error_that_says_what_to_do() -> None:
    log = clicks.Log(np.tile(np.arange(5), (10, 1)), np.zeros((10, 5), dtype=bool), np.zeros(10, dtype=np.int64))
    with pytest.raises(ValueError, match="log more searches"):
        clicks.examination(log)


def test_the_debiased_rate_is_nearer_to_the_attractiveness_than_the_raw_one() -> None:
    """The same two pictures; one is always shown at the top, the other at the end."""
    rng = np.random.default_rng(0)
    searches, places = 40_000, 10
    examination = 1.0 / np.arange(1, places + 1)
    attractive = np.linspace(0.2, 0.6, places)  # the last place holds the best picture
    shown = np.tile(np.arange(places), (searches, 1))
    clicked = clicks.click(shown, np.tile(attractive, (searches, 1)), examination, rng)
    log = clicks.Log(shown, clicked, np.zeros(searches, dtype=np.int64))
    rate, impressions = clicks.debiased_rate(log, shown, examination, places)
    np.testing.assert_allclose(rate, attractive, rtol=0.1)
    assert impressions.tolist() == [searches] * places
    raw = clicked.mean(axis=0)
    assert np.argmax(raw) == 0
    assert np.argmax(rate) == places - 1


def test_weighted_clicks_estimate_the_gain_of_any_order_without_bias() -> None:
    """Σ over clicks of discount / examination has the expectation of the gain with every place looked at."""
    rng = np.random.default_rng(5)
    places, searches = 6, 200_000
    examination = 1.0 / np.arange(1, places + 1)
    attractive = rng.random(places)
    shown = np.array([rng.permutation(places) for _ in range(50)]).repeat(searches // 50, axis=0)
    clicked = clicks.click(shown, np.tile(attractive, (searches, 1)), examination, rng)
    wanted = rng.permutation(places)  # another order than any that was shown
    discount = 1.0 / np.log2(np.argsort(wanted) + 2)  # by candidate
    estimate = (clicked * discount[shown] / examination[None, :]).sum(axis=1).mean()
    assert estimate == pytest.approx((attractive * discount).sum(), rel=0.01)


@given(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=5), st.integers(0, 999))
def test_ndcg_is_between_zero_and_one_and_one_for_the_true_order(grades: list[list[int]], seed: int) -> None:
    truth = np.array(grades)
    scores = np.random.default_rng(seed).random(truth.shape)
    found = ndcg(truth, scores)
    relevant = truth.any(axis=1)
    assert ((found[relevant] >= 0) & (found[relevant] <= 1 + 1e-12)).all()
    assert np.isnan(found[~relevant]).all()
    assert np.allclose(ndcg(truth, truth.astype(float))[relevant], 1.0)


def test_ndcg_of_a_worked_example() -> None:
    grades = np.array([[3, 2, 0, 1]])
    scores = np.array([[0.1, 0.9, 0.8, 0.2]])  # order: 2, 0, 1, 3
    gained = 3 / 1 + 0 + 1 / 2 + 7 / np.log2(5)
    best = 7 / 1 + 3 / np.log2(3) + 1 / 2
    assert mean_ndcg(grades, scores) == pytest.approx(gained / best)


def test_ties_keep_the_order_they_came_in() -> None:
    assert order([1.0, 2.0, 2.0, 1.0]) == [1, 2, 0, 3]


def test_words_are_folded_and_each_counts_once() -> None:
    assert words("The CUTE cat, in a Cute hat — ÉLAN") == ("cute", "cat", "hat", "élan")
    assert words("of the") == ()


def test_features_follow_the_names_given_and_what_is_missing_is_nan() -> None:
    columns = Columns(("likes", "user_mobile", "match_share", "affinity", "style_cute"))
    search = Search(
        "cute cat",
        [
            Candidate("a", {"likes": 3.0, "style_cute": 0.5}, ("cat",)),
            Candidate("b", {"likes": None, "style_cute": 0.0}),
        ],
        {"taste_cute": 0.8},
    )
    expected = [[3.0, np.nan, 0.5, 0.8, 0.5], [np.nan, np.nan, 0.0, np.nan, 0.0]]
    np.testing.assert_array_equal(matrix(columns, search), expected)
    assert columns.candidate == ("likes", "style_cute")
    assert columns.user == ("mobile",)
