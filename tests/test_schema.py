"""Contracts against any input: nothing is lost, nothing slips through, what is accepted stays accepted."""

import datetime as dt
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shopai.core.config import UsageError
from shopai.core.schema import EVENT_NAMES, SEGMENT_ALIASES, TABLES, Column, Table, arrow_schema, conform, validate

NOON = "2026-01-31T12:00:00Z"
IDS = st.one_of(st.none(), st.sampled_from(["a", "b", " ", ""]), st.integers(0, 3), st.floats(allow_nan=True))
NAMES = st.one_of(st.none(), st.sampled_from([*EVENT_NAMES[:3], *SEGMENT_ALIASES, "Purchase", "click"]))
BETWEEN = dt.datetime(1900, 1, 1), dt.datetime(2200, 1, 1)
TIMES = st.one_of(st.none(), st.sampled_from([NOON, "2026-01-31", "2026-01-31T12:00:00", "31.01.2026", "2026-01-31 13:00+01:00", 1769860800]),
                  st.datetimes(*BETWEEN), st.datetimes(*BETWEEN, timezones=st.just(dt.UTC)))
NUMBERS = st.one_of(st.none(), st.floats(), st.integers(-5, 5), st.sampled_from(["2", "two", "1e3", True, Decimal("2.5")]))
FLAGS = st.one_of(st.none(), st.booleans(), st.sampled_from([0, 1, 1.0, "true", "FALSE", "maybe", 7]))
CURRENCIES = st.one_of(st.none(), st.sampled_from(["EUR", "eur", "Euro", 978]))
ROWS = st.lists(st.tuples(IDS, NAMES, TIMES, IDS, NUMBERS, NUMBERS, CURRENCIES, FLAGS, FLAGS), max_size=12)
FIELDS = ["event_id", "event_name", "event_time", "item_id", "quantity", "price", "currency", "consent", "is_bot"]


@settings(max_examples=40, deadline=None)
@given(ROWS)
def test_every_row_is_sound_or_rejected_with_a_reason(rows):
    raw = pd.DataFrame({name: pd.Series([row[i] for row in rows], dtype=object) for i, name in enumerate(FIELDS)})
    result = validate(raw, "events")
    assert sorted([*result.accepted.index, *result.rejected.index]) == list(raw.index)
    pd.testing.assert_frame_equal(result.rejected[FIELDS], raw.loc[result.rejected.index])
    assert all(reason for reason in result.rejected["reason"])
    assert {reason.split(":")[0] for text in result.rejected["reason"] for reason in text.split("; ") if "first row is kept" not in reason} <= set(FIELDS)
    events = result.accepted
    assert events["event_id"].is_unique and events["event_id"].notna().all()
    assert set(events["event_name"]) <= set(EVENT_NAMES)
    assert (events["quantity"].dropna() >= 0).all() and np.isfinite(events["price"].dropna()).all()
    assert events.dtypes.to_dict() == {column.name: column.pandas_dtype for column in TABLES["events"].columns}
    again = validate(events, "events")
    assert again.rejected.empty
    pd.testing.assert_frame_equal(again.accepted, events)
    pd.testing.assert_frame_equal(conform(events, "events"), events)


def event(**fields) -> dict: return {"event_id": "e", "event_name": "purchase", "event_time": NOON} | fields


def reason(**fields) -> str | None:
    rejected = validate(pd.DataFrame([event(**fields)]).astype(object), "events").rejected
    return None if rejected.empty else rejected["reason"].iloc[0]


@pytest.mark.parametrize(("fields", "expected"), [
    ({}, None),
    ({"quantity": 0}, None),
    ({"quantity": .25}, None),
    ({"quantity": -1}, "quantity: must be ≥ 0"),
    ({"quantity": float("inf")}, "quantity: must be ≥ 0"),
    ({"quantity": "two"}, "quantity: must be a number"),
    ({"price": -.01, "quantity": "two"}, "quantity: must be a number; price: must be ≥ 0"),
    ({"event_id": None}, "event_id: must not be missing"),
    ({"event_id": "  "}, "event_id: must not be empty"),
    ({"event_name": "Order Completed"}, None),
    ({"event_name": "order completed"}, "event_name: must be a known event, such as purchase"),
    ({"event_time": None}, "event_time: must not be missing"),
    ({"event_time": "2026-01-31T12:00:00"}, "event_time: must be a time with a zone, such as 2026-01-31T12:00:00Z"),
    ({"event_time": dt.datetime(2026, 1, 31, 12)}, "event_time: must be a time with a zone, such as 2026-01-31T12:00:00Z"),
    ({"event_time": "01/02/2026 12:00Z"}, "event_time: must be a time with a zone, such as 2026-01-31T12:00:00Z"),
    ({"event_time": 1769860800}, "event_time: must be a time with a zone, such as 2026-01-31T12:00:00Z"),
    ({"currency": "GBP"}, None),
    ({"currency": "£"}, "currency: must be a three-letter currency code, such as EUR"),
    ({"consent": "perhaps"}, "consent: must be true or false"),
    ({"user_id": b"u1"}, "user_id: must be text"),
    ({"user_id": ["u1"]}, "user_id: must be text"),
])
def test_reasons_are_for_people(fields, expected): assert reason(**fields) == expected


def test_other_zones_become_utc():
    local = pd.Series(pd.to_datetime(["2026-07-01 14:00"])).dt.tz_localize("Europe/Berlin")
    frame = conform(pd.DataFrame({"event_id": ["1"], "event_name": ["purchase"], "event_time": local}), "events")
    assert frame["event_time"].iloc[0] == pd.Timestamp("2026-07-01 12:00", tz="UTC")
    assert str(frame["event_time"].dtype) == "datetime64[us, UTC]"


@pytest.mark.parametrize("check", [conform, validate])
def test_a_column_without_zone_is_the_programs_mistake(check):
    frame = pd.DataFrame({"event_id": ["1"], "event_name": ["purchase"], "event_time": pd.to_datetime(["2026-01-31"])})
    with pytest.raises(UsageError, match="event_time: times must have a zone"): check(frame, "events")


@pytest.mark.parametrize("check", [conform, validate])
@pytest.mark.parametrize(("frame", "message"), [
    (pd.DataFrame({"event_id": ["1"], "event_time": [NOON]}), "events: required column 'event_name' is missing"),
    (pd.DataFrame([event(user="7")]), "events: unknown column 'user'; known are event_id"),
    (pd.DataFrame([["1", "2"]], columns=["event_id", "event_id"]), "events: column 'event_id' occurs twice"),
])
def test_a_frame_that_does_not_fit_is_refused(check, frame, message):
    with pytest.raises(UsageError, match=message): check(frame, "events")


def test_integers_that_pandas_made_floats_keep_their_text():
    frame = conform(pd.DataFrame([event(event_id="1", user_id=17850.), event(event_id="2", user_id=None)]), "events")
    assert frame["user_id"].iloc[0] == "17850" and frame["user_id"].isna().tolist() == [False, True]


def test_the_first_sound_row_of_a_key_is_kept():
    rows = [event(quantity=-1, item_id="broken"), event(quantity=1, item_id="mended"), event(quantity=1, item_id="late")]
    result = validate(pd.DataFrame(rows), "events")
    assert result.accepted["item_id"].tolist() == ["mended"]
    assert result.rejected["reason"].tolist() == ["quantity: must be ≥ 0", "event_id: occurs more than once; the first row is kept"]


def test_a_key_of_several_columns():
    stock = pd.DataFrame({"item_id": ["a", "a", "a"], "counted_at": [NOON, NOON, "2026-02-01T00:00:00Z"], "on_hand": [1, 2, 3],
                          "location": ["main", None, "main"]})
    result = validate(stock, "stock")
    assert result.accepted["on_hand"].tolist() == [1., 3.]
    assert result.rejected["reason"].tolist() == ["item_id, location, counted_at: occurs more than once; the first row is kept"]


def test_labels_of_the_input_survive_even_when_repeated():
    frame = pd.DataFrame([event(event_id="1"), event(event_id="2", price=-1), event(event_id="3")], index=["x", "x", "y"])
    result = validate(frame, "events")
    assert (result.accepted.index.tolist(), result.rejected.index.tolist()) == (["x", "y"], ["x"])


def test_days_and_whole_numbers():
    table = Table("t", "", ("day",), (Column("day", "day", False, ""), Column("n", "whole", True, "")))
    frame = pd.DataFrame({"day": ["2026-01-31", dt.date(2026, 2, 1), "2026-02-02 12:00", "2026-02-03"], "n": ["1", 2., 3, 2.5]}, dtype=object)
    result = validate(frame, table)
    assert result.accepted["n"].tolist() == [1, 2] and str(result.accepted.dtypes["n"]) == "Int64"
    assert result.rejected["reason"].tolist() == ["day: must be a day, such as 2026-01-31", "n: must be a whole number"]


@pytest.mark.parametrize("name", TABLES)
def test_every_table_goes_through_arrow_unchanged(name):
    import pyarrow as pa
    empty = conform(pd.DataFrame({column: [] for column in TABLES[name].names}), name)
    schema = arrow_schema(name)
    assert schema.names == TABLES[name].names
    assert pa.Table.from_pandas(empty, schema=schema, preserve_index=False).schema.remove_metadata() == schema


def test_a_year_of_a_real_shop_validates_in_seconds(online_retail):
    "541,909 lines, a third of a minute at the very most on a busy machine; a Python loop over rows would take longer."
    import time
    raw = pd.read_parquet(online_retail)
    frame = pd.DataFrame({"event_id": np.arange(len(raw)), "event_name": "purchase", "event_time": raw["InvoiceDate"].dt.tz_localize("UTC"),
                          "user_id": raw["CustomerID"], "item_id": raw["StockCode"], "quantity": raw["Quantity"], "price": raw["UnitPrice"],
                          "currency": "GBP", "transaction_id": raw["InvoiceNo"]})
    start = time.perf_counter()
    result = validate(frame, "events")
    assert time.perf_counter() - start < 20
    wrong = (raw["Quantity"] < 0) | (raw["UnitPrice"] < 0)
    assert (len(result.accepted), len(result.rejected)) == ((~wrong).sum(), wrong.sum())
