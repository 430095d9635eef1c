"What a customer's context says, against a slow and obvious fold in plain Python: on three engines, in batches, for rows that lack everything."

import math
import random
from collections import defaultdict
from itertools import pairwise

import pandas as pd
import pytest
from backends import BACKENDS, to_backend, to_pandas
from hypothesis import given, settings
from hypothesis import strategies as st

from shopai.core.config import UsageError
from shopai.core.testing import toy_shop
from shopai.features.catalogue import CONTEXT, DAY, VIEWS, derive_frame
from shopai.features.context import context, context_batches, context_step, memory_from
from shopai.features.leaks import leaks
from shopai.features.steps import READ

NAMES = ("view_item", "add_to_cart", "remove_from_cart", "purchase", "refund", "search")
START = pd.Timestamp("2026-03-01T00:00Z")


def us(time) -> int | None: return None if pd.isna(time) else time.value // 1000


def table(rows: list[dict]) -> pd.DataFrame:
    "Events with all columns, typed so that every engine takes them."
    plain = dict.fromkeys(READ) | {"event_name": "search", "is_bot": False}
    frame = pd.DataFrame([plain | {"event_id": f"e{n:04}"} | row for n, row in enumerate(rows)], columns=READ)
    texts = dict.fromkeys(("event_id", "event_name", "user_id", "session_id", "item_id", "transaction_id"), "string[python]")
    return frame.astype(texts | {"quantity": "float64", "price": "float64", "is_bot": "boolean", "consent": "boolean", "event_time": "datetime64[us, UTC]",
                                 "received_at": "datetime64[us, UTC]"})


# --- the reference: one event after the other

class Entity:
    def __init__(self):
        self.visits, self.cart, self.orders, self.recent = {}, {}, set(), []
        self.value, self.changed, self.bought = 0., None, []
        self.views, self.opened = [], []

    def take(self, event: dict, clock: int, at: int) -> None:
        name, item, quantity, price = (event[key] for key in ("event_name", "item_id", "quantity", "price"))
        quantity = quantity if quantity is not None and 0 <= quantity <= 1e6 else 1.
        price = price if price is not None and 0 <= price <= 1e9 else 0.
        self.visit(event["session_id"], clock, at)
        if name == "purchase":
            if self.cart: self.change(at)
            self.cart, self.value = {}, self.value + quantity * price
            self.bought.append(at)
            order = ("named", event["transaction_id"]) if event["transaction_id"] is not None else ("alone", event["event_id"])
            if order not in self.orders: self.opened.append(clock)
            self.orders.add(order)
        if name == "refund": self.value -= quantity * price
        if name == "view_item": self.views.append(clock)
        sign = {"add_to_cart": 1, "remove_from_cart": -1}.get(name)
        if sign and item is not None and at > max(self.bought, default=-math.inf): self.put(item, sign, quantity, price, at)
        if name in ("view_item", "add_to_cart", "purchase") and item is not None and self.recent[:1] != [item]: self.recent.insert(0, item)

    def visit(self, session: str | None, clock: int, at: int) -> None:
        if session is None:
            self.now = {"start": at, "events": 1}
            return
        self.now = self.visits.get(session)
        if self.now is None or clock - self.now["clock"] > DAY: self.now = self.visits[session] = {"start": at, "events": 0}
        self.now.update(clock=clock, events=self.now["events"] + 1, start=min(self.now["start"], at))

    def put(self, item: str, sign: int, pieces: float, price: float, at: int) -> None:
        held, old = self.cart.get(item, (0., 0.))
        left = max(0., held + sign * pieces)
        if left != held: self.change(at)
        self.cart.pop(item, None)
        if left: self.cart[item] = (left, price if sign > 0 else old)

    def change(self, at: int) -> None: self.changed = at if self.changed is None else max(self.changed, at)

    def state(self, clock: int) -> dict:
        fading = lambda moments, days: sum(2 ** (-(clock - moment) / (days * DAY)) for moment in moments)
        return {"seen_at": clock, "session_started_at": self.now["start"], "session_events": self.now["events"],
                "cart_size": len(self.cart), "cart_value": sum(pieces * price for pieces, price in self.cart.values()), "cart_changed_at": self.changed,
                "orders": len(self.orders), "value": self.value, "views_7d": fading(self.views, 7), "orders_30d": fading(self.opened, 30),
                "first_order_at": min(self.bought, default=None), "last_order_at": max(self.bought, default=None),
                **{f"recent_item_{n + 1}": self.recent[n] if n < len(self.recent) else None for n in range(5)}}


def fold(events: pd.DataFrame, by: str) -> pd.DataFrame:
    entities, rows, last = defaultdict(Entity), {}, {}
    plain = events.astype(object).where(events.notna(), None).to_dict("records")
    clock_of = lambda event: us(event["event_time"] if event["received_at"] is None else event["received_at"])
    timed = [(clock_of(event), us(event["event_time"]), event["event_id"], event) for event in plain if event["event_time"] is not None]
    for clock, at, _, event in sorted(timed, key=lambda step: step[:3]):
        if event["is_bot"] or event["consent"] is False or event[by] is None: continue
        if by == "session_id" and clock - last.get(event[by], clock) > DAY: entities[event[by]] = Entity()  # silent for a day: it begins anew
        last[event[by]] = clock
        entities[event[by]].take(event, clock, at)
        rows[event[by], clock] = {by: event[by], "event_timestamp": pd.Timestamp(clock, unit="us", tz="UTC"), **entities[event[by]].state(clock)}
    return pd.DataFrame(rows.values(), columns=[by, "event_timestamp", *(feature.name for feature in CONTEXT)])


FORM = {"whole": "Int64", "number": "float64", "text": "string[python]"}

def form(frame: pd.DataFrame, by: str) -> pd.DataFrame:
    "One form, one order: the last row of each entity and moment."
    kinds = {feature.name: FORM[feature.dtype] for feature in CONTEXT} | {by: "string[python]", "event_timestamp": "datetime64[us, UTC]"}
    return frame.drop_duplicates([by, "event_timestamp"], keep="last").astype(kinds).sort_values([by, "event_timestamp"], ignore_index=True)


def assert_same(one: pd.DataFrame, other: pd.DataFrame, by: str) -> None:
    pd.testing.assert_frame_equal(form(one, by), form(other, by), rtol=1e-9, atol=1e-9)


def in_batches(events: pd.DataFrame, by: str, cuts: list[int], memory=None) -> tuple[pd.DataFrame, pd.DataFrame]:
    "The rows of all batches, and the last memory."
    rows, edges = [], [0, *sorted(cuts), len(events)]
    for begin, end in pairwise(edges):
        told, memory = context_step(events.iloc[begin:end], by, memory)
        rows.append(told)
    return pd.concat(rows, ignore_index=True), memory


def arranged(events: pd.DataFrame) -> pd.DataFrame:
    "In the order in which the shop learnt of them."
    clocked = events.assign(clock=events["received_at"].fillna(events["event_time"]))
    return clocked.sort_values(["clock", "event_time", "event_id"], ignore_index=True).drop(columns="clock")


# --- by hand

def test_a_customers_story_value_by_value():
    at = lambda minute: START + pd.Timedelta(minutes=minute)
    def row(minute, name, item=None, quantity=None, price=None, known=None, **more):
        return {"user_id": "ann", "event_name": name, "event_time": at(minute), "item_id": item, "quantity": quantity, "price": price,
                "received_at": at(minute if known is None else known), **more}

    one = {"session_id": "s1"}
    events = table([
        row(0, "add_to_cart", "mug", 1, 10., **one), row(1, "add_to_cart", "mug", 2, 12., **one),   # 3 mugs at the newer price
        row(2, "remove_from_cart", "mug", 5, **one), row(3, "add_to_cart", "tea", None, 4., **one),  # more than there was; a tea
        row(4, "purchase", "tea", 1, 4., transaction_id="t1", **one),
        row(3.5, "add_to_cart", "pot", 1, 30., known=6, **one),                                      # of before the order, told after it
        row(6.5, "remove_from_cart", "tea", 1, known=7, **one),                                      # nothing to remove
        row(600, "add_to_cart", "pot", 2, None, session_id="s2"),                                    # without a price
        row(601, "purchase", "pot", 2, 30., transaction_id="t2", session_id="s2"), row(601, "purchase", "cup", 1, 6., transaction_id="t2", session_id="s2"),
        row(700, "refund", "pot", 1, 30., transaction_id="t2", session_id="s2")])
    told = form(context(events), "user_id")
    minutes = lambda name: [None if pd.isna(value) else (value - us(START)) / 60e6 for value in told[name]]
    assert minutes("seen_at") == [0, 1, 2, 3, 4, 6, 7, 600, 601, 700]
    assert told["cart_size"].tolist() == [1, 1, 0, 1, 0, 0, 0, 1, 0, 0]
    assert told["cart_value"].tolist() == [10, 36, 0, 4, 0, 0, 0, 0, 0, 0]
    assert minutes("cart_changed_at") == [0, 1, 2, 3, 4, 4, 4, 600, 601, 601]
    assert told["orders"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert told["value"].tolist() == [0, 0, 0, 0, 4, 4, 4, 4, 70, 40]
    assert minutes("first_order_at") == [None] * 4 + [4] * 6
    assert minutes("last_order_at") == [None] * 4 + [4] * 4 + [601] * 2
    assert told["session_events"].tolist() == [1, 2, 3, 4, 5, 6, 7, 1, 3, 4]
    assert minutes("session_started_at") == [0] * 7 + [600] * 3
    assert told["recent_item_1"].tolist() == ["mug", "mug", "mug", "tea", "tea", "pot", "pot", "pot", "cup", "cup"]
    assert told.iloc[-1][["recent_item_2", "recent_item_3", "recent_item_4"]].tolist() == ["pot", "tea", "mug"] and pd.isna(told.iloc[-1]["recent_item_5"])
    assert told["views_7d"].tolist() == [0] * 10
    assert told["orders_30d"].iloc[-1] == pytest.approx(2 ** (-696 / 1440 / 30) + 2 ** (-99 / 1440 / 30), rel=1e-12)
    now = derive_frame(VIEWS["user_context"], told, told["seen_at"] + 60 * 60_000_000)
    assert now["cart_abandoned"].fillna(False).tolist() == [True, True, False, True, False, False, False, True, False, False]
    assert now["is_first_time_shopper"].tolist() == [True] * 4 + [False] * 6


# --- rows as they come

def strange_events(n: int, seed: int) -> list[dict]:
    "Rows of few customers, with much missing, many ties, late arrivals, and texts from everywhere."
    rng, rows = random.Random(seed), []
    for number in range(n):
        at = START + pd.Timedelta(minutes=rng.choice([rng.randrange(40), rng.randrange(5) * 1440, rng.randrange(1_000_000)]))
        late = rng.choice([None, None, 0, 1, 30, 3000])
        rows.append({
            "event_id": f"{rng.choice(['ö', 'z', '😀', 'A', chr(0xffff)])}{number}", "event_name": rng.choice(NAMES), "event_time": at,
            "received_at": None if late is None else at + pd.Timedelta(minutes=late), "user_id": rng.choice([None, "ann", "Jürgen", "李", "' OR 1=1 --"]),
            "session_id": rng.choice([None, "s1", "s2", "ü"]), "item_id": rng.choice([None, "mug", "tea", "kettle", "Ärmel", "杯"]),
            "quantity": rng.choice([None, 0., 1., 2., .5, .333, -1., 1e12]), "price": rng.choice([None, 0., 9.99, 1e3, -5., 1e300]),
            "transaction_id": rng.choice([None, "t1", "t2", "t3"]), "is_bot": rng.random() < .1, "consent": rng.choice([None, True, True, False])})
    return rows + [{"user_id": "ann"}, {"event_name": None, "event_time": START, "user_id": "ann"}, {"event_time": START, "is_bot": None, "user_id": "bob"}]


@pytest.mark.parametrize("engine", BACKENDS)
def test_engines_agree_with_the_fold(engine: str):
    shop = toy_shop(customers=12, days=40).events[list(READ)]
    events = table([*strange_events(400, seed=1), *shop.astype(object).where(shop.notna(), None).to_dict("records")])
    for by in ("user_id",) if engine == "pyspark" else ("user_id", "session_id"):  # Spark takes long to plan
        told = to_pandas(context(to_backend(events, engine), by))
        assert not told.duplicated([by, "event_timestamp"]).any()
        assert_same(told, fold(events, by), by)


@pytest.mark.parametrize("engine", ["pandas", "duckdb"])
def test_no_events_no_rows(engine: str):
    empty = table([{"user_id": "ann"}])  # says no time
    assert len(to_pandas(context(to_backend(empty, engine)))) == 0
    rows, memory = context_step(empty)
    assert len(rows) == len(memory) == len(memory_from(to_backend(empty, engine))) == 0
    assert list(context_batches(to_backend(empty, "duckdb"))) == []
    bought = table([{"user_id": "ann", "event_name": "purchase", "event_time": START, "price": 5.}])
    rows, after = context_step(bought, memory=memory)
    assert rows["value"].tolist() == [5] and context_step(empty, memory=after)[1].equals(after)


def test_missing_columns_are_named():
    with pytest.raises(UsageError, match="missing: price"): context(table([]).drop(columns="price"))
    with pytest.raises(UsageError, match="missing: customer"): context(table([]), by="customer")


# --- properties

minute = st.one_of(st.integers(0, 30), st.integers(0, 3).map(lambda day: day * 1440), st.integers(0, 2_000_000))
event = st.fixed_dictionaries({
    "event_name": st.sampled_from(NAMES), "event_time": minute.map(lambda m: START + pd.Timedelta(minutes=m)), "late": st.sampled_from([None, 0, 1, 20, 2000]),
    "user_id": st.sampled_from(["ann", "bob"]), "session_id": st.sampled_from([None, "s1", "s2"]), "item_id": st.sampled_from([None, "a", "b", "c"]),
    "quantity": st.sampled_from([None, 0., 1., 2., .25]), "price": st.sampled_from([None, 1., 2.5]), "transaction_id": st.sampled_from([None, "t1", "t2"])})


@settings(max_examples=12, deadline=None)
@given(st.lists(event, min_size=1, max_size=40), st.lists(st.integers(0, 40), max_size=2), st.sampled_from(["user_id", "session_id"]))
def test_any_events_however_cut_give_what_the_fold_gives(rows: list[dict], cuts: list[int], by: str):
    rows = [{**row, "received_at": None if row["late"] is None else row["event_time"] + pd.Timedelta(minutes=row["late"])} for row in rows]
    events = arranged(table([{name: value for name, value in row.items() if name != "late"} for row in rows]))
    expected = fold(events, by)
    assert_same(context(events, by), expected, by)
    told, _ = in_batches(events, by, [min(cut, len(events)) for cut in cuts])
    assert_same(told, expected, by)


def test_a_history_in_duckdb_and_what_came_since():
    events = arranged(table(strange_events(600, seed=2)).dropna(subset="event_time"))
    past = memory_from(to_backend(events.iloc[:400], "duckdb"), parts=3)
    told, memory = in_batches(events.iloc[400:], "user_id", [50, 50, 120], past)
    expected = fold(events, "user_id")
    last = lambda frame: form(frame, "user_id").groupby("user_id", as_index=False).tail(1)
    assert_same(last(told), last(expected[expected["user_id"].isin(told["user_id"])]), "user_id")
    content = lambda memory: memory.drop(columns="_time").sort_values(["user_id", "_id", "_item", "_order", "_session"], ignore_index=True)
    pd.testing.assert_frame_equal(content(memory), content(memory_from(events)), rtol=1e-9)


def test_what_arrives_in_a_later_batch_is_known_later():
    "A batch whose clock runs behind, as from another partition of the bus, never rewrites the past."
    row = lambda minute, item: {"user_id": "ann", "event_name": "add_to_cart", "event_time": START + pd.Timedelta(minutes=minute), "item_id": item, "price": 1.}
    first, memory = context_step(table([row(10, "a")]))
    second, _ = context_step(table([row(5, "b")]), memory=memory)
    assert second["seen_at"].tolist() == first["seen_at"].tolist() and second["cart_size"].tolist() == [2]
    assert second["event_timestamp"].tolist() == first["event_timestamp"].tolist() and second["recent_item_1"].tolist() == ["b"]


@pytest.mark.parametrize("by", ["user_id", "session_id"])
def test_visits_that_go_on_and_visits_that_are_over(by: str):
    "Told one by one: a visit goes on after 23 hours, whatever happened in between, and begins anew after more than 24, remembered or not."
    def row(hour, session, name="add_to_cart", user="ann"):
        return {"user_id": user, "session_id": session, "event_name": name, "event_time": START + pd.Timedelta(hours=hour), "item_id": f"i{hour}", "price": 1.}

    events = table([row(0, "s1"), row(1, "s2", "purchase"), row(14, "s1", "purchase"), row(20, "s2"), row(23, "s1"), row(40, "s3", user="bob"), row(43.9, "s2"),
                    row(46.9, "s1"), row(70, "s4"), row(72, "s1"), row(94, "s4", "purchase"),
                    row(94.5, "s4"), row(119, "s4"), row(119.5, "s4"), row(120, "s1", "view_item")])
    told, memory = in_batches(events, by, list(range(1, len(events))))
    assert_same(told, fold(events, by), by)
    assert_same(context(events, by), told, by)
    after = told[told["seen_at"] == us(START + pd.Timedelta(hours=72))].iloc[0]  # s1, silent for 25 hours
    assert (after["session_events"], after["orders"]) == ((1, 0) if by == "session_id" else (1, 2))
    assert set(memory[by]) == ({"s4", "s1"} if by == "session_id" else {"ann", "bob"})


def test_parts_make_no_difference():
    import pyarrow as pa
    events = table(strange_events(500, seed=3))
    for parts in (None, 7):
        batches = list(context_batches(to_backend(events, "duckdb"), parts=parts, size=50))
        assert max(map(len, batches)) <= 50 and {batch.schema for batch in batches} == {VIEWS["user_context"].arrow_schema()}
        assert_same(pa.Table.from_batches(batches).to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get), fold(events, "user_id"), "user_id")


def test_years_of_views_keep_their_digits():
    clock = [START - pd.Timedelta(hours=7 * n) for n in range(6000)]  # almost five years
    told = form(context(table([{"user_id": "ann", "event_name": "view_item", "event_time": at} for at in clock])), "user_id")
    count, gap = 0., 2 ** (-7 / 24 / 7)
    for got in told["views_7d"]:
        count = count * gap + 1
        assert got == pytest.approx(count, rel=1e-11)


# --- leaks

def test_the_context_is_honest_and_the_same_by_event_time_is_not():
    shop = toy_shop(customers=15, days=40).events
    events = shop.assign(received_at=shop["event_time"] + pd.to_timedelta((shop.index % 4 == 0) * 3 * 3600, unit="s"))
    moments = (events.loc[events["event_name"] == "purchase", "event_time"].sample(5, random_state=0) - pd.Timedelta(seconds=1)).tolist()
    for by in ("user_id", "session_id"): assert leaks(lambda events, by=by: context(events, by), events, by, moments).empty
    in_duckdb = leaks(lambda events: context(to_backend(events, "duckdb")), events, "user_id", moments[:2])
    assert in_duckdb.empty
    assert "cart_value" in set(leaks(lambda events: context(events.assign(received_at=pd.NaT)), events, "user_id", moments)["feature"])


@pytest.mark.parametrize("feature, leaky", [
    ("total over the table", lambda rows: rows.groupby("user_id")["price"].transform("sum")),
    ("gap filled with the mean of everything", lambda rows: rows["price"].where(rows.index % 3 > 0, rows["price"].mean())),
    ("time until the next event", lambda rows: rows.groupby("user_id")["event_time"].diff(-1).dt.total_seconds()),
    ("rank among all", lambda rows: rows["price"].rank(pct=True))])
def test_a_feature_computed_with_tomorrows_data_is_caught(feature: str, leaky):
    events = toy_shop(customers=15, days=40).events.dropna(subset="user_id").reset_index(drop=True)
    moments = events["event_time"].quantile([.3, .6, .9]).tolist()
    compute = lambda events: events[["user_id"]].assign(event_timestamp=events["event_time"], price=events["price"], leaky=leaky(events))
    caught = leaks(compute, events, "user_id", moments)
    assert set(caught["feature"]) == {"leaky"} and set(caught["moment"]) == set(moments), feature


def test_a_row_from_the_future_is_a_leak_and_a_moments_own_events_are_none():
    noon = pd.Timestamp("2026-05-01T12:00Z")
    events = pd.DataFrame({"k": ["a", "b"], "m": [1, 1], "event_time": [noon, noon + pd.Timedelta(hours=1)], "v": [1., 2.]})
    early = lambda events: events.assign(event_timestamp=events["event_time"] - pd.Timedelta(hours=2))  # tells of things before they happen
    caught = leaks(early, events, ["k", "m"], [noon])
    assert set(caught["k"]) == {"b"} and {"v", "event_timestamp"} <= set(caught["feature"]) and caught["without"].isna().all()
    assert leaks(lambda events: events.assign(event_timestamp=events["event_time"]), events, ["k", "m"], [noon, noon - pd.Timedelta(days=1)]).empty
    lists = lambda events: events.assign(event_timestamp=events["event_time"], vector=[[float(len(events)), 1.]] * len(events), v=True)
    assert set(leaks(lists, events, "k", [noon])["feature"]) == {"vector"}
    with pytest.raises(UsageError, match="at least one"): leaks(lists, events, "k", [])
    with pytest.raises(UsageError, match="known_at"): leaks(lists, events, "k", [noon], known="known_at")
