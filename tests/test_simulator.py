"""The synthetic shop as a whole: contracts, repeatability, and no difference where there is none."""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from shopai.core.config import UsageError
from shopai.core.schema import validate
from shopai.data.behaviour import Behaviour
from shopai.data.policies import CostPlus, Fixed, Flat, Plenty, Policies, Popularity, Random
from shopai.data.simulator import fulfilled, simulate
from shopai.data.world import make_world


@pytest.fixture(scope="module")
def world(): return make_world(customers=250, items=100, days=60, seed=7)


@pytest.fixture(scope="module")
def run(world): return simulate(world, Policies(recover=Flat(share=.5)), seed=3)


@pytest.fixture(scope="module")
def tables(run): return {name: table.to_pandas() for name, table in run.tables.items()}


def test_every_row_keeps_its_contract(tables):
    assert set(tables) == {"events", "orders", "items", "users", "touches", "prices", "market_prices", "stock", "suppliers", "calendar", "external_signals"}
    for name, frame in tables.items():
        rejected = validate(frame, name).rejected
        assert rejected.empty, f"{name}: {rejected.reason.value_counts().to_dict()}"


def test_tables_agree_with_each_other(run, tables):
    events, orders, totals = tables["events"], tables["orders"], run.totals().loc["all"]
    bought, back = (events[events.event_name == name] for name in ("purchase", "refund"))
    assert set(bought.transaction_id) == set(orders.transaction_id)
    assert (bought.quantity * bought.price).sum() == pytest.approx(totals.revenue)
    assert orders.goods.sum() == pytest.approx(totals.revenue, abs=.01 * len(orders))  # each order is rounded to pennies
    assert orders.refunded.sum() == pytest.approx((back.quantity * back.price).sum(), abs=.01 * len(orders))
    assert set(back.transaction_id) <= set(bought.transaction_id)
    lines = bought.set_index(["transaction_id", "item_id"]).quantity
    sent_back = back.set_index(["transaction_id", "item_id"]).quantity
    assert (sent_back <= lines.reindex(sent_back.index)).all()  # no more comes back than was bought
    assert set(events.item_id.dropna()) <= set(tables["items"].item_id) and set(events.user_id.dropna()) <= set(tables["users"].user_id)
    assert events.event_time.is_monotonic_increasing and events.event_id.is_unique


def test_a_visit_happens_in_order(tables):
    "In a session, an item is looked at before it goes into the cart, and the till comes before the purchase."
    events = tables["events"].dropna(subset=["session_id"])
    first = events.pivot_table(index="session_id", columns="event_name", values="event_time", aggfunc="min")
    for before, after in (("ranking", "view_item"), ("view_item", "add_to_cart"), ("add_to_cart", "begin_checkout"), ("begin_checkout", "add_payment_info"),
                          ("add_payment_info", "purchase")):
        both = first[[before, after]].dropna()
        assert len(both) and (both[before] <= both[after]).all(), f"{after} before {before}"


def test_nothing_is_sold_that_is_not_there(tables):
    "Stock of an evening = stock of the evening before + deliveries and returns − sales, never below 0."
    stock, events = tables["stock"], tables["events"]
    assert (stock.on_hand >= 0).all() and (stock.on_order >= 0).all()
    hand = stock.pivot(index="counted_at", columns="item_id", values="on_hand")
    days = lambda name: events[events.event_name == name].groupby([events.event_time.dt.normalize(), "item_id"]).quantity.sum().unstack().reindex(
        index=hand.index.normalize(), columns=hand.columns).fillna(0).to_numpy()
    came = hand.diff().to_numpy() + days("purchase") - days("refund")
    assert (np.nan_to_num(came) >= -1e-6).all()


def test_nobody_is_offered_what_is_not_launched_yet(world, tables):
    launched = tables["items"].set_index("item_id").launched_at
    events = tables["events"].dropna(subset=["item_id"])
    assert (events.event_time >= events.item_id.map(launched)).all()


def test_propensities_are_those_of_the_log(tables):
    "Under the default, a place shows its best seller with probability .9 + .1 / items, anything else with .1 / items; the log's frequencies agree."
    shown = tables["events"].query("event_name == 'ranking'")
    explored = shown.propensity < .5
    n = len(shown)
    assert explored.mean() == pytest.approx(.1 * (1 - 1 / 90), abs=4 * np.sqrt(.09 / n))  # four standard errors; some 90 items are on sale
    assert (shown.groupby("request_id").position.apply(lambda s: sorted(s) == list(range(1, 9)))).all()


def test_consent_and_bots_are_labelled(tables):
    events = tables["events"]
    assert events.is_bot.sum() > 0 and events[events.is_bot].user_id.isna().all()
    answers = events.dropna(subset=["user_id"]).groupby("user_id").consent.nunique(dropna=False)
    assert (answers == 1).all() and events.consent.isna().any() and (events.consent == False).any()  # noqa: E712 - a column with missing values


DIGESTS = """
import hashlib, sys
from shopai.data.simulator import simulate
from shopai.data.world import make_world
run = simulate(make_world(customers=120, items=80, days=30, seed=int(sys.argv[1])), seed=int(sys.argv[2]))
import pyarrow as pa
for name, table in sorted(run.tables.items()):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer: writer.write_table(table)
    print(name, hashlib.sha256(sink.getvalue()).hexdigest())
"""


def digests(world_seed: int, seed: int, threads: int) -> dict[str, str]:
    "Digest of each table, from a process of its own."
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONHASHSEED": str(threads)}
    done = subprocess.run([sys.executable, "-c", DIGESTS, str(world_seed), str(seed)], capture_output=True, text=True, check=True, env=environment)
    return dict(line.split() for line in done.stdout.splitlines())


def test_same_seed_same_bytes_in_any_process():
    assert digests(1, 2, threads=1) == digests(1, 2, threads=2)


def test_other_seed_other_tables():
    first, luck, shop = digests(1, 2, 1), digests(1, 3, 1), digests(4, 2, 1)
    assert {name for name in first if first[name] == luck[name]} == {"items", "suppliers", "calendar", "external_signals"}  # the world is the same …
    assert {name for name in first if first[name] == shop[name]} == {"calendar"}  # … and here only the calendar is


def test_memory_saving_changes_nothing(world, monkeypatch):
    "Visitors are served some at a time; how many must not matter."
    import shopai.data.simulator as simulator
    whole = simulate(world, days=15, seed=1)
    monkeypatch.setattr(simulator, "CHUNK", 700)  # seven visitors at a time
    parts = simulate(world, days=15, seed=1)
    pd.testing.assert_frame_equal(whole.days, parts.days)
    bought = [run.tables["events"].to_pandas().query("event_name == 'purchase'").drop(columns=["event_id", "session_id"]) for run in (whole, parts)]
    pd.testing.assert_frame_equal(*(frame.sort_values(["event_time", "user_id", "item_id"], ignore_index=True) for frame in bought))


def test_arms_of_an_a_a_test_differ_by_no_more_than_chance(world):
    "Twenty seeds: the difference in orders a customer, in standard errors, is standard normal."
    z = []
    for seed in range(20):
        run = simulate(world, {"a": Policies(), "b": Policies()}, days=45, seed=seed)
        orders = run.tables["orders"].to_pandas().groupby("user_id").size().reindex(world.customers.user_ids, fill_value=0).to_numpy()
        a, b = orders[run.arm_of == 0], orders[run.arm_of == 1]
        z.append((a.mean() - b.mean()) / np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b)))
    assert stats.kstest(z, "norm").pvalue > .01, np.round(z, 2)
    assert np.abs(z).max() < 4 and (np.abs(z) > 1.96).sum() <= 4, np.round(z, 2)  # five or more of 20 happen by chance in .3 % of cases


def test_two_policies_meet_the_same_customers(world):
    "Prices don't change who comes, unless shelves are empty: with full shelves, visits are the same to the last one."
    cheap, dear = (simulate(world, Policies(price=Fixed(factor), replenish=Plenty()), seed=1, tables=False) for factor in (.8, 1.25))
    assert (cheap.days.visits == dear.days.visits).all()
    assert cheap.totals().pieces["all"] > dear.totals().pieces["all"]
    assert (cheap.days.unmet == 0).all()


def test_empty_shelves_cost_customers():
    "Whoever finds empty shelves loses interest sooner."
    class Nothing:
        unlimited = False
        def orders(self, view): return np.zeros(len(view.price))
    world = make_world(customers=400, items=80, days=120, seed=2, behaviour=Behaviour(disappointment=30))
    full, empty = (simulate(world, Policies(replenish=policy), seed=1, tables=False).days for policy in (Plenty(), Nothing()))
    assert empty.unmet.sum() > 0 and empty.visits[60:].sum() < full.visits[60:].sum()
    assert (empty.visits[:10] == full.visits[:10]).all()


@pytest.mark.parametrize(("change", "words"), [
    ({"price": type("P", (), {"prices": lambda self, view: (view.price * 0, view.price > 0)})()}, "price policy of 'all': every price must be above 0"),
    ({"replenish": type("R", (), {"orders": lambda self, view: view.price * np.nan})()}, "replenish policy: every order must be a number"),
    ({"recover": type("C", (), {"offers": lambda self, view, customers, value: value * 0 + 2})()}, "every discount must be from 0 to 1"),
])
def test_impossible_policies_are_named(world, change, words):
    with pytest.raises(UsageError, match=words): simulate(world, Policies(**change), days=30, tables=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 30), st.integers(0, 1_000)), max_size=40), st.lists(st.integers(0, 60), min_size=5, max_size=5))
def test_stock_is_given_out_first_come_first_served(lines, stock):
    on_hand = np.array(stock, float)
    item, quantity, second = (np.array([line[k] for line in lines], int) for k in range(3))
    given_out = fulfilled(on_hand, item, quantity, second)
    left = dict(enumerate(stock))
    for row in sorted(range(len(lines)), key=lambda r: second[r]):  # stable: who comes at the same second is served in the order of rows
        expected = min(left[item[row]], quantity[row])
        assert given_out[row] == expected
        left[item[row]] -= expected


@pytest.mark.parametrize("change", [{"recommend": Random(slots=3)}, {"price": CostPlus(chase=0, promoted=0)}, {"recommend": Popularity(explore=0.)}])
def test_other_policies_run(world, change):
    assert simulate(world, Policies(**change), days=10, tables=False).totals().orders["all"] > 0
