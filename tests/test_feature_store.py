"""The feature store: training sets against a loop in plain Python, answers against training sets, and what goes wrong.

Each test has a Feast project of its own, and Redis is a server of this module's own, so nothing stays behind."""

import math
import shutil
import threading
import time
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from feast_store import free_port, redis_at, stop
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lake_s3 import OPTIONS, endpoint, make_bucket  # noqa: F401 - a fixture

from shopai.core.config import Settings, UsageError
from shopai.core.lake import Lake
from shopai.core.testing import toy_shop
from shopai.features.catalogue import DAY, SECOND, VIEWS, view
from shopai.features.context import context
from shopai.features.online import StoreUnavailable, open_reader
from shopai.features.store import FeatureStore

NOON = 1_777_636_800_000_000  # 2026-05-01 12:00 UTC, in µs
USER, SEASON = view("user_context"), view("category_season")


def times(micros) -> pd.Series: return pd.Series(pd.to_datetime(np.asarray(micros, "int64"), unit="us", utc=True)).astype("datetime64[us, UTC]")


def moment(micros: int) -> datetime: return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=micros)


def states(rows: list[tuple[str | None, int]], **facts) -> pd.DataFrame:
    "Rows of user_context: a customer and a clock (µs); `facts` in place of missing values. `orders` counts the rows."
    frame = pd.DataFrame({"user_id": pd.array([user for user, _ in rows], "string"), "event_timestamp": times([at for _, at in rows])})
    columns = {feature.name: facts.get(feature.name) for feature in USER.features}
    return frame.assign(**columns).assign(seen_at=[at for _, at in rows], orders=range(1, len(rows) + 1))


def vectors(rows: list[tuple[str, int, list[float]]]) -> pd.DataFrame:
    return pd.DataFrame({"user_id": [row[0] for row in rows], "event_timestamp": times([row[1] for row in rows]), "vector": [row[2] for row in rows]})


@pytest.fixture(scope="module")
def redis() -> Iterator[str]:
    "The address of a Redis server of this module's own."
    if shutil.which("redis-server") is None: pytest.skip("no redis-server on this machine")
    port = free_port()
    server = redis_at(port)
    yield f"redis://127.0.0.1:{port}/0"
    stop(server)


@pytest.fixture(params=["sqlite", "redis"])
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FeatureStore]:
    "A store on either kind of online store, with a project of its own."
    where = request.getfixturevalue("redis") if request.param == "redis" else ""
    store = FeatureStore(Settings(home=tmp_path / "home", online_store=where, feature_project=f"test_{request.param}"))
    yield store
    store.feast.teardown()


@pytest.fixture
def lake_shop(tmp_path: Path) -> FeatureStore: return FeatureStore(Settings(home=tmp_path / "home", feature_project="test_lake"))


def reader_of(store: FeatureStore, timeout: float = 5.): return open_reader(store.settings.online_location, store.settings.feature_project, timeout)


def plain(value):
    "A value of either side in plain Python; None where it is missing."
    if value is None or value is pd.NA: return None
    if isinstance(value, list | np.ndarray): return [float(number) for number in value]
    return None if isinstance(value, float) and math.isnan(value) else value.item() if isinstance(value, np.generic) else value


def same(one, other) -> bool:
    one, other = plain(one), plain(other)
    if one is None or other is None or isinstance(one, str): return one == other
    return one == pytest.approx(other, abs=1e-6, rel=1e-12)


# --- the point-in-time join


def by_hand(asked: pd.DataFrame, known: pd.DataFrame, keys: list[str], ttl: int) -> list:
    "The newest value that isn't younger than the question and not older than the TTL, by a loop."
    told = []
    for question in asked.to_dict("records"):
        rows = [row for row in known.to_dict("records") if all(row[key] == question[key] for key in keys)]
        rows = [row for row in rows if row["at"] <= question["at"] and question["at"] - row["at"] <= ttl]
        told.append(max(rows, key=lambda row: (row["at"], row["x"]))["x"] if rows else None)
    return told


ENTITY = st.tuples(st.sampled_from(["a", "b", "c"]), st.sampled_from([1, 2]), st.integers(0, 12))


@given(st.lists(st.tuples(ENTITY, st.integers(0, 9))), st.lists(ENTITY, min_size=1), st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_a_join_as_of_is_what_a_loop_says(known: list, asked: list, ttl: int):
    from shopai.features.offline import as_of, latest
    kinds = {"category": "string", "week": "int64", "at": "int64", "x": "int64"}
    rows = pd.DataFrame([(*each, x) for each, x in known], columns=list(kinds)).astype(kinds)
    questions = pd.DataFrame(asked, columns=["category", "week", "at"])
    arrow = lambda frame: pa.Table.from_pandas(frame.assign(event_timestamp=times(frame["at"])), preserve_index=False)
    relation = duckdb.from_arrow(arrow(rows))
    found = as_of(arrow(questions), relation, ["category", "week"], ["x"], ttl)
    assert found["x"].to_pylist() == by_hand(questions, rows, ["category", "week"], ttl)
    newest = latest(relation, ["category", "week"], ["x"], end=moment(8)).to_pandas()
    there = rows[rows["at"] <= 8].sort_values(["at", "x"]).drop_duplicates(["category", "week"], keep="last").sort_values(["category", "week"])
    assert newest[["category", "week", "x"]].to_numpy().tolist() == there[["category", "week", "x"]].to_numpy().tolist()


def test_no_question_is_lost_and_none_is_answered_from_the_future(lake_shop: FeatureStore):
    rng = np.random.default_rng(1)
    rows = states([(f"u{user}", NOON + int(at)) for user, at in zip(rng.integers(0, 30, 400), rng.integers(0, 900 * DAY, 400), strict=True)])
    lake_shop.write("user_context", rows)
    asked = pd.DataFrame({"user_id": [None if n % 50 == 0 else f"u{n % 40}" for n in range(1000)], "bought": range(1000),
                          "event_timestamp": times(NOON + rng.integers(-10 * DAY, 1000 * DAY, 1000))}, index=rng.integers(0, 300, 1000))
    asked = asked.sample(frac=1, random_state=0)
    asked.iloc[5, 2] = pd.NaT
    told = lake_shop.training_set(asked, ["user_context"])
    pd.testing.assert_frame_equal(told[list(asked)], asked)
    known = rows.assign(at=rows["seen_at"], x=rows["orders"])
    expected = by_hand(asked.assign(at=[at.value // 1000 if at is not pd.NaT else -1 for at in asked["event_timestamp"]]), known, ["user_id"], USER.ttl_us)
    assert [plain(x) for x in told["user_context__orders"]] == expected
    assert 100 < sum(x is None for x in expected) < 900
    first = told["user_context__is_first_time_shopper"]
    assert first.isna().equals(told["user_context__orders"].isna())


@pytest.mark.parametrize(("late", "known"), [(0, True), (1, False)])
def test_the_last_microsecond_of_a_ttl(shop: FeatureStore, late: int, known: bool):
    "A row answers up to its TTL, and the microsecond after it no more, on both sides."
    at, then = NOON + 123_457, NOON + 123_457 + USER.ttl_us + late
    shop.write("user_context", states([("ann", at)]))
    (told,) = shop.training_set(pd.DataFrame({"user_id": ["ann"], "event_timestamp": times([then])}), ["user_context"])["user_context__orders"]
    shop.materialize(["user_context"], until=moment(at))
    looked = reader_of(shop).get("user_context", {"user_id": "ann"}, now=then)
    assert (plain(told), looked.values["orders"], looked.status, looked.at) == ((1, 1, "fresh", at) if known else (None, None, "stale", at))


def test_several_views_with_keys_of_their_own(lake_shop: FeatureStore):
    lake_shop.write("user_context", states([("ann", NOON), ("bob", NOON)]))
    lake_shop.write("user_als", vectors([("ann", NOON, [1., 2.]), ("ann", NOON + DAY, [3., 4.])]))
    weeks = {"category": ["Tea", "Tea"], "week": [18, 19], "event_timestamp": times([NOON, NOON])}
    lake_shop.write("category_season", pd.DataFrame({**weeks, "season_index": [1.5, None], "years": [2, None]}))
    asked = pd.DataFrame({"user_id": ["bob", "ann"], "category": ["Tea", "Tea"], "week": [19., 18.], "event_timestamp": times([NOON, NOON + 2 * DAY])})
    views = ["category_season", "user_context", "user_als"]
    told = lake_shop.training_set(asked, views)
    assert list(told) == [*asked, *(f"{name}__{feature}" for name in views for feature in VIEWS[name].all_names)]
    assert [plain(x) for x in told["category_season__season_index"]] == [None, 1.5]
    assert [plain(x) for x in told["user_als__vector"]] == [None, [3., 4.]]
    assert told["user_context__orders"].tolist() == [2, 1]
    kinds = {"category_season__years": "Int64", "user_context__cart_abandoned": "boolean", "user_context__recent_item_1": "str",
             "user_context__value": "float64"}
    assert {name: str(told[name].dtype) for name in kinds} == kinds


def test_a_zone_other_than_utc(lake_shop: FeatureStore):
    lake_shop.write("user_context", states([("ann", NOON)]).assign(event_timestamp=times([NOON]).dt.tz_convert("Asia/Tokyo")))
    assert lake_shop.lake.read("features_user_context")["event_timestamp"].tolist() == times([NOON]).tolist()
    asked = pd.DataFrame({"user_id": ["ann", "ann"], "event_timestamp": times([NOON - 1, NOON]).dt.tz_convert("America/New_York")})
    told = lake_shop.training_set(asked, ["user_context"])
    assert [plain(x) for x in told["user_context__orders"]] == [None, 1]
    assert str(told["event_timestamp"].dt.tz) == "America/New_York"


def test_a_lake_in_object_storage(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    for name, value in {**OPTIONS, "AWS_ENDPOINT_URL": endpoint}.items(): monkeypatch.setenv(name.upper(), value)
    store = FeatureStore(Settings(home=tmp_path / "home", lake_uri=f"s3://{make_bucket(endpoint, 'features')}/the/lake", feature_project="test_s3"))
    store.write("user_context", states([("ann", NOON), ("ann", NOON + DAY), ("bob", NOON)]))
    store.add("user_context", states([("bob", NOON + DAY)]))
    asked = pd.DataFrame({"user_id": ["ann", "ann", "bob", "eve"], "event_timestamp": times([NOON - 1, NOON + 1, NOON + DAY, NOON])})
    assert [plain(x) for x in store.training_set(asked, ["user_context"])["user_context__orders"]] == [None, 1, 1, None]
    assert store.materialize(until=moment(NOON + DAY)) == {"user_context": 2}
    assert reader_of(store).get("user_context", {"user_id": "ann"}, now=NOON + DAY).values["orders"] == 2


# --- offline = online


def test_training_sees_what_answers_saw(shop: FeatureStore):
    "1,000 customers of the simulated shop at 20 past moments: the training set says what the online store answered then."
    events = toy_shop(customers=1000).events
    shop.write("user_context", context(events, "user_id"))
    users = [*events["user_id"].dropna().unique()[:990], *(f"nobody {n}" for n in range(1000))][:1000]
    first, last = events["event_time"].min(), events["event_time"].max()
    moments = np.sort(np.random.default_rng(7).integers(first.value // 1000 + 5 * DAY, last.value // 1000 + 3 * DAY, 20))
    moments[3] = events["event_time"].iloc[len(events) // 2].value // 1000  # a moment at which something happens counts
    moments.sort()
    asked = pd.DataFrame({"user_id": users * 20, "event_timestamp": times(np.repeat(moments, 1000))})
    told = shop.training_set(asked, ["user_context"])
    assert len(told) == 20_000
    assert told[["user_id", "event_timestamp"]].equals(asked)
    columns = {name: told[f"user_context__{name}"].tolist() for name in USER.all_names}
    reader, differ, known = reader_of(shop), [], 0
    for round_, now in enumerate(moments.tolist()):
        shop.materialize(["user_context"], until=moment(now))
        for place, looked in enumerate(reader.get_many("user_context", [{"user_id": user} for user in users], now=now), round_ * 1000):
            known += looked.status == "fresh"
            differ += [(place, name, value, columns[name][place]) for name, value in looked.values.items() if not same(columns[name][place], value)]
    assert differ == []
    assert 5_000 < known < 20_000  # some weren't customers yet


# --- what is online


def test_an_older_row_never_replaces_a_newer_one(shop: FeatureStore):
    reader = reader_of(shop)
    def orders() -> int: return reader.get("user_context", {"user_id": "ann"}, now=NOON + DAY).values["orders"]
    shop.write("user_context", states([("ann", NOON)]))
    shop.materialize(until=moment(NOON))
    assert orders() == 1
    assert shop.push("user_context", states([("bob", NOON), ("ann", NOON + 2)])) == 2  # ann's is the second row: 2 orders
    assert orders() == 2
    shop.materialize(until=moment(NOON + DAY), full=True)
    shop.push("user_context", states([("ann", NOON + 1)]))
    assert orders() == 2
    shop.push("user_context", states([("bob", 1), ("bob", 2), ("ann", NOON + 2)]))  # the same moment again: a correction
    assert orders() == 3
    shop.push("user_context", states([("ann", NOON + 5), ("ann", NOON + 4)]))  # one batch, the newest first
    assert (orders(), reader.get("user_context", {"user_id": "ann"}, now=NOON + DAY).at) == (1, NOON + 5)


def test_writers_at_the_same_time(shop: FeatureStore):
    "Two processes' worth of writers send the same customers' rows in different orders; the newest of each is what stays."
    shop.apply()
    rng = np.random.default_rng(0)
    def write(seed: int) -> None:
        mine = FeatureStore(shop.settings)
        for n in np.random.default_rng(seed).permutation(12):
            mine.push("user_context", states([(f"u{user}", NOON + int(n) * 10 + user % 3) for user in range(40)]))
    threads = [threading.Thread(target=write, args=(int(seed),)) for seed in rng.integers(0, 1000, 3)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    looked = reader_of(shop).get_many("user_context", [{"user_id": f"u{user}"} for user in range(40)], now=NOON + DAY)
    assert [one.at for one in looked] == [NOON + 110 + user % 3 for user in range(40)]


def test_threads_ask_at_the_same_time(lake_shop: FeatureStore):
    lake_shop.write("user_context", states([(f"u{n % 100}", NOON + n) for n in range(2000)]))
    asked, failed = pd.DataFrame({"user_id": ["u7"], "event_timestamp": times([NOON + DAY])}), []
    def work(what) -> None:
        try:
            for _ in range(5): what()
        except Exception as error: failed.append(error)  # noqa: BLE001 - a thread's errors would be lost
    jobs = [lambda: lake_shop.training_set(asked, ["user_context"]), lambda: lake_shop.materialize(until=moment(NOON + DAY), full=True)]
    threads = [threading.Thread(target=work, args=(job,)) for job in (*jobs, *jobs)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert failed == []


def test_every_kind_of_value_comes_through(shop: FeatureStore):
    facts = {"cart_value": -1.25, "cart_changed_at": 2**52 + 1, "recent_item_1": "naïve ☕", "recent_item_2": ""}
    shop.write("user_context", states([("ann ☕", NOON)], **facts))
    shop.write("user_als", vectors([("ann ☕", NOON, [1.5, -2.25]), ("bob", NOON, None)]))
    season = pd.DataFrame({"category": ["Tea"], "week": [18], "event_timestamp": times([NOON]), "season_index": [np.nan], "years": [3]})
    shop.write("category_season", season)
    assert shop.materialize(until=moment(NOON)) == {"user_context": 1, "user_als": 2, "category_season": 1}
    reader = reader_of(shop)
    looked = reader.entity({"user_id": "ann ☕"}, ["user_context", "user_als"], now=NOON)
    asked = pd.DataFrame({"user_id": ["ann ☕"], "event_timestamp": times([NOON])})
    (told,) = shop.training_set(asked, ["user_context", "user_als"]).to_dict("records")
    for name in ("user_context", "user_als"):
        for feature, value in looked[name].values.items(): assert same(told[f"{name}__{feature}"], value), feature
    assert {name: looked["user_context"].values[name] for name in facts} == facts
    assert looked["user_context"].values["first_order_at"] is None
    assert reader.get("user_als", {"user_id": "bob"}, now=NOON).values == {"vector": None}
    assert reader.get("category_season", {"category": "Tea", "week": 18}, now=NOON).values == {"season_index": None, "years": 3}
    by_feast = shop.feast.get_online_features(["user_context:cart_value", "user_context:recent_item_1"], [{"user_id": "ann ☕"}]).to_dict()
    assert (by_feast["cart_value"], by_feast["recent_item_1"]) == ([-1.25], ["naïve ☕"])


def test_only_what_is_new_is_brought_online_until_the_past_changes(lake_shop: FeatureStore):
    lake_shop.write("user_context", states([(f"u{n}", NOON + n * DAY) for n in range(10)]))
    seen = []
    assert lake_shop.materialize(until=moment(NOON + 6 * DAY), progress=lambda *said: seen.append(said)) == {"user_context": 7}
    assert seen == [("user_context", 7, 7)]
    assert lake_shop.materialize(until=moment(NOON + 9 * DAY)) == {"user_context": 5}  # and the day before
    assert lake_shop.materialize(until=moment(NOON + 9 * DAY), full=True) == {"user_context": 10}
    assert lake_shop.materialize(until=moment(NOON + 3 * DAY)) == {"user_context": 0}  # all of it is there
    lake_shop.add("user_context", states([("late", NOON + 9 * DAY - 1)]))
    assert FeatureStore(lake_shop.settings).materialize(until=moment(NOON + 9 * DAY)) == {"user_context": 3}  # another process goes on
    lake_shop.write("user_context", states([(f"u{n}", NOON + n * DAY) for n in range(10)]))
    assert lake_shop.materialize(until=moment(NOON + 9 * DAY)) == {"user_context": 10}
    view_ = lake_shop.feast.get_feature_view("user_context")
    assert len(view_.materialization_intervals) == 1


def test_what_is_over_leaves_the_store(shop: FeatureStore):
    "A visit says nothing after a day: a file loses it with the next materialisation, Redis by itself."
    rows = states([("s1", NOON), ("s2", NOON + 3 * DAY)]).rename(columns={"user_id": "session_id"})
    shop.write("session_context", rows)
    shop.materialize(until=moment(NOON))
    reader = reader_of(shop)
    assert reader.get("session_context", {"session_id": "s1"}, now=NOON + DAY).status == "fresh"
    assert reader.get("session_context", {"session_id": "s1"}, now=NOON + DAY + 1).status == "stale"
    shop.materialize(until=moment(NOON + 3 * DAY))
    if shop.settings.online_store:
        client = shop.feast._get_provider().online_store._client
        assert {86_000 < client.ttl(key) <= 86_400 for key in client.keys(b"*test_redis")} == {True}
    else:
        assert reader.get("session_context", {"session_id": "s1"}, now=NOON + 3 * DAY).status == "unknown"
    assert reader.get("session_context", {"session_id": "s2"}, now=NOON + 3 * DAY).status == "fresh"


# --- writing


def test_a_table_larger_than_the_memory_comes_in_batches(lake_shop: FeatureStore):
    made = []
    def batches() -> Iterator[pa.RecordBatch]:
        for n in range(30):
            made.append(n)
            frame = states([(f"u{n}", NOON + n), (None, NOON), (f"v{n}", NOON + n)])
            columns = {"cart_value": pa.array([math.nan] * 3, pa.float32()), "orders": pa.array([1, 2, 3], pa.int16())}
            yield pa.record_batch([columns.get(f.name, pa.array(frame[f.name], None if frame[f.name].notna().any() else f.type)) for f in USER.arrow_schema()],
                                  names=USER.arrow_schema().names)
    done = lake_shop.write("user_context", batches())
    assert (done.accepted, done.rejected, made) == (60, 30, [*range(30)])
    kept = lake_shop.lake.read("features_user_context", as_="arrow")
    assert kept.schema.equals(USER.arrow_schema())
    assert kept["cart_value"].null_count == 60
    assert set(lake_shop.lake.read("quarantine")["reason"]) == {"user_id: is missing"}


def test_a_stream_that_breaks_off_changes_nothing(lake_shop: FeatureStore):
    lake_shop.write("user_context", states([("ann", NOON)]))
    def broken() -> Iterator[pa.RecordBatch]:
        yield pa.Table.from_pandas(states([("bob", NOON)]), USER.arrow_schema(), preserve_index=False).to_batches()[0]
        raise OSError("the disk is gone")
    with pytest.raises(OSError, match="the disk is gone"): lake_shop.write("user_context", broken())
    assert lake_shop.lake.read("features_user_context")["user_id"].tolist() == ["ann"]


def test_a_view_that_has_got_a_feature_is_written_anew(lake_shop: FeatureStore, monkeypatch: pytest.MonkeyPatch):
    from dataclasses import replace

    from shopai.features.catalogue import Feature
    lake_shop.write("signal_level", pd.DataFrame({"signal": ["mood"], "region": ["UK"], "event_timestamp": times([NOON]), "value": [1.], "average_28d": [2.]}))
    lake_shop.materialize(until=moment(NOON))
    wider = replace(VIEWS["signal_level"], features=(*VIEWS["signal_level"].features, Feature("trend", "number", "", "where it goes")))
    monkeypatch.setitem(VIEWS, "signal_level", wider)
    again = FeatureStore(lake_shop.settings)
    rows = pd.DataFrame({"signal": ["mood"], "region": ["UK"], "event_timestamp": times([NOON]), "value": [1.], "average_28d": [2.], "trend": [3.]})
    again.write("signal_level", rows)
    assert again.materialize(until=moment(NOON)) == {"signal_level": 1}
    reader = reader_of(again)
    assert reader.get(wider, {"signal": "mood", "region": "UK"}, now=NOON).values == {"value": 1., "average_28d": 2., "trend": 3.}
    asked = pd.DataFrame({"signal": ["mood"], "region": ["UK"], "event_timestamp": times([NOON])})
    assert again.training_set(asked, ["signal_level"])["signal_level__trend"].tolist() == [3.]


@pytest.mark.parametrize(("change", "message"), [
    ({"orders": "many"}, "user_context: column 'orders' must be whole numbers, got"),
    ({"orders": 1.5}, "user_context: column 'orders' must be whole numbers, got"),
    ({"cart_value": "9 EUR"}, "user_context: column 'cart_value' must be numbers, got"),
    ({"recent_item_1": 7}, "user_context: column 'recent_item_1' must be text, got"),
    ({"user_id": 7}, "user_context: column 'user_id' must be text, got"),
    ({"event_timestamp": pd.Timestamp("2026-05-01")}, "user_context: column 'event_timestamp' must be times with a zone, got datetime64"),
    ({"event_timestamp": "2026-05-01T12:00Z"}, "user_context: column 'event_timestamp' must be times with a zone, got"),
    ({"colour": "red"}, "user_context: column 'colour' is unknown; known are user_id, event_timestamp, seen_at"),
])
def test_a_wrong_column_is_named(lake_shop: FeatureStore, change: dict, message: str):
    rows = states([("ann", NOON)]).assign(**change)
    for how in (lake_shop.write, lake_shop.add, lake_shop.push):
        with pytest.raises(UsageError) as error: how("user_context", rows)
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)
    assert not lake_shop.lake.exists("features_user_context")


@pytest.mark.parametrize(("wrong", "views", "message"), [
    ({"user_id": None}, ["user_context"], "entities: column 'user_id' is missing; user_context needs user_id and event_timestamp"),
    ({"event_timestamp": None}, ["user_context"], "entities: column 'event_timestamp' is missing"),
    ({"user_id": 17.}, ["user_context"], "user_context: column 'user_id' must be text, got"),
    ({"event_timestamp": pd.Timestamp("2026-05-01")}, ["user_context"], "user_context: column 'event_timestamp' must be times with a zone"),
    ({"user_context__orders": 1}, ["user_context"], "entities: column 'user_context__orders' is there already"),
    ({}, ["user_contexts"], "view: there is no 'user_contexts'; known are user_context"),
    ({}, [], "views must name at least one of user_context"),
    ({}, ["user_als"], "features of user_als were never written; write them with: shopai run features"),
])
def test_a_wrong_question_is_named(lake_shop: FeatureStore, wrong: dict, views: list, message: str):
    lake_shop.write("user_context", states([("ann", NOON)]))
    asked = pd.DataFrame({"user_id": ["ann"], "event_timestamp": times([NOON])})
    asked = asked.assign(**wrong).drop(columns=[name for name, value in wrong.items() if value is None])
    with pytest.raises(UsageError) as error: lake_shop.training_set(asked, views)
    assert str(error.value).startswith(message)


# --- what goes wrong


def test_an_empty_table_is_a_state_of_its_own(shop: FeatureStore):
    shop.write("user_context", states([]))
    assert shop.materialize(["user_context"]) == {"user_context": 0}
    assert reader_of(shop).get("user_context", {"user_id": "ann"}).status == "unknown"
    told = shop.training_set(pd.DataFrame({"user_id": ["ann"], "event_timestamp": times([NOON])}), ["user_context"])
    assert len(told) == 1
    assert told.filter(like="__").isna().all(axis=None)
    assert shop.push("user_context", states([])) == 0
    nobody = shop.training_set(pd.DataFrame({"user_id": pd.array([], "string"), "event_timestamp": times([])}), ["user_context"])
    assert (len(nobody), "user_context__recency_days" in nobody) == (0, True)


def test_what_was_never_written_is_told_with_what_to_do(lake_shop: FeatureStore):
    for views in (None, ["user_als"]):
        with pytest.raises(UsageError, match="were never written; write them with: shopai run features"): lake_shop.materialize(views)
    with pytest.raises(UsageError, match="until must be a time with a zone"):
        lake_shop.write("user_context", states([("ann", NOON)]))
        lake_shop.materialize(until=datetime(2026, 5, 1))  # noqa: DTZ001
    with pytest.raises(UsageError, match="SHOPAI_ONLINE_STORE: must be a file of SQLite or redis://"):
        FeatureStore(Settings(home=lake_shop.settings.home, online_store="ftp://user:hunter2@host")).apply()


def test_a_row_without_a_name_or_a_time_is_kept_aside(lake_shop: FeatureStore):
    rows = states([("ann", NOON), (None, NOON), ("", NOON), ("eve", NOON)])
    rows.loc[3, "event_timestamp"] = pd.NaT
    done = lake_shop.write("user_context", rows)
    assert (done.accepted, done.rejected) == (1, 3)
    assert lake_shop.push("user_context", rows) == 1
    kept = lake_shop.lake.read("quarantine")
    assert kept["reason"].value_counts().to_dict() == {"user_id: is missing": 4, "event_timestamp: is missing": 2}
    assert (set(kept["table"]), set(kept["source"])) == ({"features_user_context"}, {"features", "push"})


def test_a_store_that_is_down(tmp_path: Path):
    "Training goes on; whatever needs the online store says that it is down, without the password, and what was to come isn't taken for done."
    port = free_port()
    store = FeatureStore(Settings(home=tmp_path, online_store=f"redis://:hunter2@127.0.0.1:{port}/0", feature_project="test_down"))
    store.write("user_context", states([("ann", NOON)]))
    asked = pd.DataFrame({"user_id": ["ann"], "event_timestamp": times([NOON])})
    assert store.training_set(asked, ["user_context"])["user_context__orders"].tolist() == [1]
    for work in (lambda: store.push("user_context", states([("ann", NOON)])), lambda: store.materialize(until=moment(NOON))):
        with pytest.raises(StoreUnavailable, match=f"the online store redis://127.0.0.1:{port}/0: ") as error: work()
        assert "hunter2" not in str(error.value)
        assert "\n" not in str(error.value)
    assert "hunter2" not in "".join(path.read_text(errors="replace") for path in (tmp_path / "features").iterdir())
    if shutil.which("redis-server") is None: return
    server = redis_at(port, "--requirepass", "hunter2")
    try:
        assert store.materialize(until=moment(NOON)) == {"user_context": 1}  # all of it, and the same process goes on
        assert reader_of(store).get("user_context", {"user_id": "ann"}, now=NOON).values["orders"] == 1
    finally:
        stop(server)


def test_a_file_that_is_no_database(tmp_path: Path):
    (tmp_path / "online.db").write_text("no database, " * 100)
    store = FeatureStore(Settings(home=tmp_path / "home", online_store=str(tmp_path / "online.db"), feature_project="test_broken"))
    with pytest.raises(StoreUnavailable, match="the online store sqlite://.*: file is not a database"): store.apply()


def test_a_file_that_another_process_is_writing(lake_shop: FeatureStore):
    "A reader sees the last whole state; a writer waits for its turn."
    import sqlite3
    lake_shop.push("user_context", states([("ann", NOON)]))
    other = sqlite3.connect(lake_shop.settings.home / "features" / "online.db")
    other.execute("begin immediate")
    assert reader_of(lake_shop).get("user_context", {"user_id": "ann"}, now=NOON).values["orders"] == 1
    waiting = threading.Thread(target=lake_shop.push, args=("user_context", states([("bob", NOON), ("ann", NOON + 1)])))
    waiting.start()
    time.sleep(.2)
    assert waiting.is_alive()
    other.rollback()
    waiting.join(20)
    other.close()
    assert reader_of(lake_shop).get("user_context", {"user_id": "ann"}, now=NOON + 1).values["orders"] == 2


def test_feasts_own_tools_find_everything(lake_shop: FeatureStore, monkeypatch: pytest.MonkeyPatch):
    from click.testing import CliRunner
    from feast.cli.cli import cli
    lake_shop.apply()
    folder = lake_shop.settings.home / "features"
    assert list(folder.glob("*.py")) == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shown = CliRunner().invoke(cli, ["-c", str(folder), "feature-views", "list"], catch_exceptions=False).output
    assert all(name in shown for name in VIEWS)


def test_applying_twice_changes_nothing_and_other_projects_are_left_alone(shop: FeatureStore):
    shop.write("user_context", states([("ann", NOON)]))
    shop.materialize(until=moment(NOON))
    assert shop.apply() == shop.apply()
    assert shop._brought("user_context") == moment(NOON)
    other = FeatureStore(shop.settings.model_copy(update={"feature_project": "another_shop"}))
    other.apply()
    assert reader_of(other).get("user_context", {"user_id": "ann"}, now=NOON).status == "unknown"
    assert reader_of(shop).get("user_context", {"user_id": "ann"}, now=NOON).status == "fresh"
    assert Lake.from_settings(other.settings).exists("features_user_context")  # the lake is the shop's, whatever its features are called online


def test_all_seconds_are_told_exactly(lake_shop: FeatureStore):
    "Feast's own column holds whole seconds; the clock of a row is exact to the microsecond."
    at = NOON + 59 * SECOND + 999_999
    lake_shop.push("user_context", states([("ann", at)]))
    assert reader_of(lake_shop).get("user_context", {"user_id": "ann"}, now=at).at == at
    asked = lake_shop.feast.get_feature_view("user_context")
    (stored,) = lake_shop.feast._get_provider().online_store.online_read(lake_shop.feast.config, asked, [entity("ann")])
    assert stored[0] == moment(at).replace(microsecond=0)


def entity(user: str):
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value
    return EntityKey(join_keys=["user_id"], entity_values=[Value(string_val=user)])
