"""Splits against a slow, obvious implementation with sets, on shops that hypothesis invents to break it."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shopai.core.config import UsageError
from shopai.data.interactions import Interactions
from shopai.data.splits import leave_one_out, temporal_split

DAY = 86_400
# customer, item, quarter of a day: coarse, so that ties are common
rows = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 7), st.integers(0, 40 * 4)), min_size=1, max_size=80)


def shop(rows):
    return Interactions.from_frame(pd.DataFrame(rows, columns=["user_id", "item_id", "quarter"]).assign(event_time=lambda d: d.quarter * DAY // 4))


def triples(x):
    return list(zip(x.users.tolist(), x.items.tolist(), x.times.tolist(), strict=True))


def as_sets(truth):
    return {int(user): set(truth.row(i).tolist()) for i, user in enumerate(truth.users)}


def without_empty(truth):
    return {user: items for user, items in truth.items() if items}


@settings(max_examples=300, deadline=None)
@given(rows)
def test_rows_are_sorted_by_customer_and_time_and_ties_keep_their_order(rows):
    x = shop(rows)
    names = [(x.user_ids[u], x.item_ids[i], t) for u, i, t in triples(x)]
    assert names == [(str(u), str(i), q * DAY // 4) for u, i, q in sorted(rows, key=lambda r: (str(r[0]), r[2]))]  # Python's sort is stable


@settings(max_examples=300, deadline=None)
@given(rows)
def test_histories_hold_each_customers_own_rows(rows):
    x = shop(rows)
    asked = np.arange(x.n_users)[::-1]
    histories = x.histories(asked)
    for i, user in enumerate(asked):
        assert list(zip(*(part.tolist() for part in histories.row(i)), strict=True)) == [(item, t) for u, item, t in triples(x) if u == user]
    dense = np.zeros((x.n_users, x.n_items))
    for user, item, _ in triples(x): dense[user, item] += 1
    assert (x.matrix().toarray() == dense).all()


def slow_window(x, start, end):
    "What `window_holdout` promises, with loops and sets."
    before = [r for r in triples(x) if r[2] < start]
    window = [r for r in triples(x) if start <= r[2] < end]
    users, items, pairs = {r[0] for r in before}, {r[1] for r in before}, {r[:2] for r in before}
    everything = {u: {i for v, i, _ in window if v == u and i in items} for u in users}
    new = {u: {i for i in bought if (u, i) not in pairs} for u, bought in everything.items()}
    return before, without_empty(everything), without_empty(new)


@settings(max_examples=300, deadline=None)
@given(rows, st.integers(1, 15), st.integers(1, 15))
def test_temporal_split_is_what_the_slow_one_gives(rows, test_days, validation_days):
    x = shop(rows)
    end = (max(x.times) // DAY + 1) * DAY
    windows = [(end - (test_days + validation_days) * DAY, end - test_days * DAY), (end - test_days * DAY, end)]
    expected = [slow_window(x, *window) for window in windows]
    if not all(everything for _, everything, _ in expected):
        with pytest.raises(UsageError, match="no customer to judge"): temporal_split(x, test_days, validation_days)
        return
    split = temporal_split(x, test_days, validation_days)
    for holdout, window, (before, everything, new) in zip((split.validation, split.test), windows, expected, strict=True):
        assert (holdout.start, holdout.end) == window
        assert triples(holdout.history) == before
        assert holdout.history.now == holdout.start
        assert (as_sets(holdout.all), as_sets(holdout.new)) == (everything, new)
        assert holdout.users.tolist() == sorted(everything)
        assert not set(holdout.history.times.tolist()) & set(range(holdout.start, holdout.end))
    assert split.train is split.validation.history
    # the three parts are everything, and nothing twice
    parts = triples(split.train) + [r for h in (split.validation, split.test) for r in triples(x.between(h.start, h.end))]
    assert sorted(parts) == sorted(triples(x))


@settings(max_examples=300, deadline=None)
@given(rows)
def test_leave_one_out_is_what_the_slow_one_gives(rows):
    x = shop(rows)
    by_user = {u: [r for r in triples(x) if r[0] == u] for u in range(x.n_users)}
    judged = {u for u, own in by_user.items() if len(own) >= 3}
    if not judged:
        with pytest.raises(UsageError, match="at least 3 interactions"): leave_one_out(x)
        return
    split = leave_one_out(x)
    for holdout, place in ((split.validation, -2), (split.test, -1)):
        history = {u: own[:place] if u in judged else own for u, own in by_user.items()}
        held = {u: by_user[u][place][1] for u in judged}
        assert triples(holdout.history) == [r for u in sorted(history) for r in history[u]]
        assert as_sets(holdout.all) == {u: {item} for u, item in held.items()}
        assert as_sets(holdout.new) == {u: {item} for u, item in held.items() if item not in {r[1] for r in history[u]}}
        times = [by_user[u][place][2] for u in judged]
        assert (holdout.start, holdout.end) == (min(times), max(times) + 1)
    assert len(split.train) + len(split.validation.all) + len(split.test.all) == len(x)


def test_a_truth_is_listed_in_the_order_of_purchase():
    x = shop([(0, 1, 0), (0, 2, 0), (0, 3, 0), (1, 1, 160), (0, 3, 120), (0, 1, 100), (0, 2, 110), (0, 3, 90), (0, 1, 60), (1, 1, 0)])
    assert temporal_split(x, 20, 10).test.all.row(0).tolist() == [2, 0, 1]
