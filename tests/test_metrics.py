"""The metrics against scikit-learn, against plain loops, and against what must hold for any ranking."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import ndcg_score

from shopai.core.config import UsageError
from shopai.recommend.metrics import coverage, evaluate_ranking, hit_rate, hits, mrr, ndcg, novelty, recall, top_k

METRICS = {"hr": hit_rate, "ndcg": ndcg, "mrr": mrr, "recall": recall}


def ragged(rows):
    "A list of lists as (indptr, items)."
    return np.cumsum([0, *map(len, rows)]), np.array([item for row in rows for item in row], dtype=np.int64)


def loops(ranked, rows, k):
    "The definitions, word for word, one customer at a time."
    out = {name: [] for name in METRICS}
    for shown, truth in zip(ranked, rows, strict=True):
        if not truth:
            continue
        places = [r for r, item in enumerate(shown[:k], start=1) if item in truth]
        out["hr"].append(1.0 if places else 0.0)
        out["ndcg"].append(sum(1 / math.log2(r + 1) for r in places) / sum(1 / math.log2(r + 1) for r in range(1, min(k, len(truth)) + 1)))
        out["mrr"].append(1 / places[0] if places else 0.0)
        out["recall"].append(len(places) / len(truth))
    return {name: sum(values) / len(values) for name, values in out.items()}


def random_case(seed, n=60, n_items=40, places=12):
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.tile(np.arange(n_items, dtype=np.float32), (n, 1)), axis=1)  # no ties
    rows = [sorted(rng.choice(n_items, rng.integers(1, 15), replace=False).tolist()) for _ in range(n)]
    return scores, top_k(scores, places)[0], rows


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 3, 10])
def test_ndcg_is_that_of_scikit_learn(seed, k):
    scores, ranked, rows = random_case(seed)
    relevance = np.zeros(scores.shape)
    for i, row in enumerate(rows):
        relevance[i, row] = 1
    assert ndcg(ranked, ragged(rows), k) == pytest.approx(ndcg_score(relevance, scores, k=k), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 5, 10, 20])
def test_all_metrics_are_those_of_plain_loops(seed, k):
    _, ranked, rows = random_case(seed)
    rows[3] = []  # a customer without truth is left out
    ranked[5, 4:] = -1  # a list that ends early
    expected = loops(ranked.tolist(), rows, k)
    assert {name: metric(ranked, ragged(rows), k) for name, metric in METRICS.items()} == pytest.approx(expected, abs=1e-12)


def test_evaluate_ranking_gathers_the_single_metrics():
    _, ranked, rows = random_case(0)
    popularity = np.random.default_rng(0).random(40)
    figures = evaluate_ranking(ranked, ragged(rows), 40, popularity, k=5)
    assert figures == {f"{name}@5": metric(ranked, ragged(rows), 5) for name, metric in METRICS.items()} | {
        "coverage@5": coverage(ranked, 40, 5), "novelty@5": novelty(ranked, popularity, 5)}


def test_popular_lists_are_less_novel_and_cover_less():
    popularity = np.linspace(0.9, 0.01, 30)
    same = np.tile(np.arange(10), (20, 1))
    various = top_k(np.random.default_rng(0).random((20, 30)), 10)[0]
    assert novelty(same, popularity) < novelty(various, popularity)
    assert coverage(same, 30) == pytest.approx(1 / 3) and coverage(various, 30) > 0.9


# What must hold for any ranking

@st.composite
def cases(draw):
    n_items, k = draw(st.integers(3, 12)), draw(st.integers(1, 6))
    n = draw(st.integers(1, 6))
    ranked = np.array([draw(st.permutations(range(n_items))) for _ in range(n)])
    rows = [draw(st.sets(st.integers(0, n_items - 1), max_size=n_items)) for _ in range(n)]
    if not any(rows):
        rows[0] = {draw(st.integers(0, n_items - 1))}
    return ranked, [sorted(row) for row in rows], k, n_items


@given(cases())
def test_between_zero_and_one_and_one_for_a_perfect_list(case):
    ranked, rows, k, n_items = case
    for metric in METRICS.values():
        assert 0 <= metric(ranked, ragged(rows), k) <= 1 + 1e-12
    perfect = np.array([row + [i for i in range(n_items) if i not in row] for row in rows])
    for metric in (hit_rate, ndcg, mrr):
        assert metric(perfect, ragged(rows), k) == pytest.approx(1)
    assert recall(perfect, ragged(rows), n_items) == pytest.approx(1)


@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_customers_does_not_matter(case, random):
    ranked, rows, k, _ = case
    order = list(range(len(rows)))
    random.shuffle(order)
    for metric in METRICS.values():
        assert metric(ranked[order], ragged([rows[i] for i in order]), k) == pytest.approx(metric(ranked, ragged(rows), k))


@given(cases(), st.data())
def test_one_hit_more_never_costs(case, data):
    ranked, rows, k, n_items = case
    misses = [(i, r) for i, row in enumerate(rows) for r in range(min(k, n_items)) if row and ranked[i, r] not in row]
    unshown = {i: [item for item in row if item not in ranked[i, :k]] for i, row in enumerate(rows)}
    misses = [(i, r) for i, r in misses if unshown[i]]
    if not misses:
        return
    i, r = data.draw(st.sampled_from(misses))
    better = ranked[:, :k].copy()
    better[i, r] = unshown[i][0]  # a bought item takes the place of one that was not bought
    for metric in METRICS.values():
        assert metric(better, ragged(rows), k) >= metric(ranked, ragged(rows), k) - 1e-12
    assert hits(better, ragged(rows)).sum() == hits(ranked[:, :k], ragged(rows)).sum() + 1


@given(cases())
def test_what_stands_behind_place_k_does_not_matter(case):
    ranked, rows, k, _ = case
    for metric in METRICS.values():
        assert metric(ranked, ragged(rows), k) == metric(ranked[:, :k], ragged(rows), k)


# top_k

few_values = st.sampled_from([-np.inf, -2.0, -0.5, -0.0, 0.0, 1e-45, 0.5, 3.0, np.inf])
any_float32 = st.floats(width=32, allow_nan=False)


@settings(max_examples=300)
@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=few_values | any_float32), st.integers(1, 12))
def test_top_k_is_a_stable_sort(scores, k):
    items, best = top_k(scores, k)
    for row, codes, values in zip(scores, items, best, strict=True):
        order = [c for c in sorted(range(len(row)), key=lambda c: (-row[c], c)) if row[c] > -np.inf][:k]
        assert codes.tolist() == order + [-1] * (k - len(order))
        assert values.tolist() == [row[c] for c in order] + [-np.inf] * (k - len(order))


@given(hnp.arrays(np.float32, (3, 8), elements=few_values), st.lists(st.sets(st.integers(0, 7)), min_size=3, max_size=3))
def test_top_k_never_shows_what_is_excluded(scores, excluded):
    before = scores.copy()
    items, best = top_k(scores, 8, exclude=ragged([sorted(row) for row in excluded]))
    assert (scores == before).all()
    for codes, values, row in zip(items, best, excluded, strict=True):
        assert not set(codes.tolist()) & row
        assert ((codes == -1) == (values == -np.inf)).all()


def test_top_k_of_one_row_is_that_of_the_batch():
    scores = np.random.default_rng(0).integers(0, 5, (50, 300)).astype(np.float32)
    items, best = top_k(scores, 10)
    for i in range(50):
        one, score = top_k(scores[i:i + 1], 10)
        assert (one[0] == items[i]).all() and (score[0] == best[i]).all()


@pytest.mark.parametrize("arguments, message", [
    (([[1.0, np.nan]], 1), "NaN"),
    (([[1.0]], 0), "k must be at least 1, got 0"),
    (([1.0], 1), "a row for each customer"),
])
def test_what_cannot_be_ranked_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        top_k(*arguments)


def test_a_ranking_without_any_truth_is_refused():
    with pytest.raises(UsageError, match="nothing to judge"):
        ndcg([[1, 2]], ragged([[]]))
    with pytest.raises(UsageError, match="truth has 2 rows, the ranking has 1"):
        hit_rate([[1, 2]], ragged([[1], [2]]))
