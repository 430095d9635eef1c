"""Enriching gives the same rows however the stream is cut, and on every engine; and nothing that names a person comes out.

What is right is told by `told`, which reads the rules one row at a time, as one would with pencil and paper."""

from collections import defaultdict
from datetime import UTC, datetime
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from backends import spark, spark_session, to_pandas  # noqa: F401
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from shopai.core.lake import Lake
from shopai.core.schema import EVENTS
from shopai.events.bus import Record
from shopai.events.decode import WIRE, decode, hash64
from shopai.events.duplicates import ORDER
from shopai.events.enrich import Enricher, State, in_pandas
from shopai.events.memory import KeyMemory, state_from_lake
from shopai.events.privacy import digest
from shopai.events.wire import Door, read_event

SECOND = 1_000_000
MINUTE, HOUR = 60 * SECOND, 3600 * SECOND
# µs between two events, and that an event is on its way
GAPS = (0, 0, 0, 1, SECOND, 20 * SECOND, 2 * MINUTE, 9 * MINUTE, *[30 * MINUTE, 30 * MINUTE + 1] * 2, 3 * HOUR, 23 * HOUR // 2, 24 * HOUR, 24 * HOUR + 1)
DELAYS = (*[0] * 12, 5 * SECOND, 10 * MINUTE, 10 * MINUTE, 15 * MINUTE, 15 * MINUTE + 1, 31 * MINUTE, 61 * MINUTE, 25 * HOUR)
CLOCKS = (-3, 3, *[0] * 10)  # minutes by which the clocks that stamp `received_at` differ
GIVEN = {"s" + digest(visit, b""): visit for visit in ("one", "two")}
VISITORS = ("v" + "a" * 16, "v" + "b" * 16, *GIVEN, None)  # two whose visits are computed, two that the shop numbers, and one without consent

PHASES = [Phase.explicit, Phase.generate]  # a seed doesn't shrink
SEEDS, SIZES = st.integers(0, 2**32), st.sampled_from((5, 40, 80))


def event(r: np.random.Generator, number: int, visitor: str | None, now: int) -> list[dict]:
    "The rows of a new event; two may be of one item."
    draw = lambda values: values[r.integers(len(values))]
    partition, delay, first, (step, count) = int(visitor in VISITORS[1::2]), draw(DELAYS), r.integers(5), draw(((0, 1), (0, 1), (1, 2), (0, 2)))
    order, client = f"order {partition}{draw('ABCD')}" if visitor and r.random() < .4 else None, draw((None, f"c{partition}", f"c{partition}"))
    alike = {"event_name": "purchase" if order else "view_item", "transaction_id": order, "event_time": now - delay, "session_id": GIVEN.get(visitor),
             "received_at": None if not delay and r.random() < .05 else now + draw(CLOCKS) * MINUTE,
             "visitor": visitor, "client": client, "partition": partition}
    ids = [f"e{number}", f"e{number}:2"]
    return [{"event_id": ids[line], "line": line, "item_id": f"item {(first + line * step) % 5}"} | alike for line in range(count)]


def stream(seed: int, most: int, honest: bool = True) -> pd.DataFrame:
    """Rows as `decode` makes them, of `most` events in two partitions, in the order of time. What isn't honest sends other events under an id that was there.

    Visitors, clients and orders keep to one partition, as they do where the customer is a record's key. Visitors stay a while, to meet the rules' borders."""
    r, now, offsets, sent, visitor = np.random.default_rng(seed), 1_777_629_600 * SECOND, [0, 0], [[]], None
    for number in range(most):
        now += GAPS[r.integers(5 if seed % 3 == 0 else len(GAPS))]  # one in three is of a busy quarter of an hour
        if r.random() < .3: visitor = VISITORS[r.integers(len(VISITORS))]
        new, old = event(r, number, visitor, now), sent[-1 - r.integers(min(4, len(sent)))]
        if old and r.random() < .15:
            if honest: new = [row | {"received_at": row["received_at"] and now} for row in old]
            elif old[0]["partition"] == new[0]["partition"]:
                new = [row | {"event_id": row["event_id"].replace(f"e{number}", old[0]["event_id"])} for row in new]
        partition = new[0]["partition"]
        sent.append([row | {"offset": offsets[partition]} for row in new])
        offsets[partition] += 1
    rows = [row for rows in sent for row in rows]
    columns = {field.name: [row.get(field.name) for row in rows] for field in WIRE} | {"key": hash64([row["event_id"] for row in rows])}
    columns["purchase_key"] = [order and hash64([f"{order}\n{item}"])[0] for order, item in zip(columns["transaction_id"], columns["item_id"], strict=True)]
    kind_of = lambda field: pa.int64() if pa.types.is_timestamp(field.type) else field.type
    return in_pandas(pa.table([pa.array(columns[field.name], kind_of(field)).cast(field.type) for field in WIRE], schema=WIRE))


def told(rows: pd.DataFrame, most: int) -> dict[tuple, tuple]:
    "Row by row: duplicate, session_id, session_events, session_seconds, arrival, bot_reason."
    keys, bought, minutes, visits, answers = set(), {}, defaultdict(int), {}, {}
    for (partition, offset), event in rows.sort_values(list(ORDER)).groupby(["partition", "offset"], sort=True):
        answer, kept, first = None, False, event.iloc[0]
        at = first["event_time"].value // 1000
        received = None if pd.isna(first["received_at"]) else first["received_at"].value // 1000
        clock = at if received is None else received
        repeated = {row.line: row.key in keys for row in event.itertuples()}
        for row in event.itertuples():
            claimed = None if pd.isna(row.purchase_key) else bought.get(row.purchase_key)
            reason = "event_id" if repeated[row.line] else "transaction_id" if claimed not in (None, offset) else None
            keys.add(row.key)
            if not pd.isna(row.purchase_key) and not repeated[row.line]: bought.setdefault(row.purchase_key, offset)
            if reason:
                answers[partition, offset, row.line] = (reason,)
                continue
            if not kept:  # the event is counted with its first line that stays
                kept = True
                if not pd.isna(row.client): minutes[row.client, clock // MINUTE] += 1
                fast = not pd.isna(row.client) and minutes[row.client, clock // MINUTE] > most
                answer = (None, *_visit(visits, row, at, received, clock), f"rate: more than {most} events a minute" if fast else None)
            answers[partition, offset, row.line] = answer
    return answers


def _visit(visits: dict, row, at: int, received: int | None, clock: int) -> tuple:
    "session_id, session_events, session_seconds, arrival."
    late = None if received is None else "late" if received - at > 15 * MINUTE else "on_time"
    if pd.isna(row.visitor): return None, None, None, late
    given, visit = row.visitor.startswith("s"), visits.get(row.visitor)
    if visit and clock - visit["seen"] > 24 * HOUR: visit = None
    if late == "on_time" and visit and at < visit["last"]: late = "out_of_order"
    if visit is None: visit = {"start": at, "last": at, "events": 0, "seen": clock}
    elif not given and at > visit["last"] + 30 * MINUTE: visit |= {"start": at, "events": 0}
    visits[row.visitor] = visit
    visit |= {"last": max(visit["last"], at), "seen": max(visit["seen"], clock)}
    if not given and at < visit["start"] - 30 * MINUTE: return None, None, None, late
    visit["events"] += 1
    return row.session_id if given else f"{row.visitor}-{visit['start']}", visit["events"], (visit["last"] - visit["start"]) / SECOND, late


def answers_of(enriched) -> dict[tuple, tuple]:
    "What `told` tells, from an enriched batch."
    columns = [*ORDER, "session_id", "session_events", "session_seconds", "arrival", "bot_reason"]
    plain = to_pandas(enriched.events)[columns].astype(object)
    found = {row[:3]: (None, *row[3:]) for row in plain.where(plain.notna(), None).itertuples(index=False, name=None)}
    return found | {row[:3]: (row[3],) for row in to_pandas(enriched.duplicates)[[*ORDER, "duplicate"]].itertuples(index=False, name=None)}


def in_pieces(rows: pd.DataFrame, cuts: list[int], enricher: Enricher) -> dict[tuple, tuple]:
    "Enrich batch by batch, with what each leaves for the next. A batch has the records of each partition up to a cut; within it rows lie in any order."
    found, state, known = {}, State(), None
    for first, end in zip([0, *cuts], [*cuts, 10**9], strict=True):
        batch = rows[rows["offset"].between(first, end - 1)].sample(frac=1, random_state=first)
        if batch.empty: continue
        enriched = enricher.enrich(batch, state, known)
        new = answers_of(enriched)
        assert not set(new) & set(found)
        found, state, known = found | new, enriched.state, enriched.keys if known is None else pd.concat([known, enriched.keys])
    return found


@settings(max_examples=25, deadline=None, derandomize=True, phases=PHASES)
@given(SEEDS, SIZES, st.booleans(), st.lists(st.integers(1, 45), max_size=3, unique=True))
def test_wherever_the_stream_is_cut_rows_are_told_what_the_rules_say(seed, size, honest, cuts):
    rows = stream(seed, size, honest)
    assert in_pieces(rows, sorted(cuts), Enricher(most=2)) == told(rows, 2)


@settings(max_examples=15, deadline=None, derandomize=True, phases=PHASES)
@given(SEEDS, SIZES, st.integers(1, 60))
def test_a_restart_goes_on_from_what_is_in_the_lake(seed, size, cut):
    "Only why something is a duplicate may differ: an event that was left out isn't in the lake, but what it repeats is."
    rows = stream(seed, size)
    records, enricher = rows.groupby(["partition", "offset"], sort=False).ngroup(), Enricher(most=10**9)
    before, after = rows[records < cut], rows[records >= cut]
    with TemporaryDirectory(prefix="lake ") as folder:
        lake, first = Lake(folder), enricher.enrich(before)
        lake.append("events", first.events[EVENTS.names])
        known = KeyMemory.from_lake(lake).seen(after["key"].tolist() + after["purchase_key"].dropna().tolist())
        found = answers_of(first) | (answers_of(enricher.enrich(after, state_from_lake(lake), known)) if len(after) else {})
    plain = lambda answers: {place: "duplicate" if answer[0] else answer for place, answer in answers.items()}
    assert plain(found) == plain(told(rows, 10**9))


def fixed_stream() -> pd.DataFrame: return stream(7, 200)


def test_the_stream_has_all_that_the_rules_speak_of():
    answers = [answer + (None,) * (6 - len(answer)) for answer in told(fixed_stream(), 2).values()]
    duplicate, name, events, _, arrival, reason = (set(values) - {None} for values in zip(*answers, strict=True))
    assert (duplicate, arrival, len(reason)) == ({"event_id", "transaction_id"}, {"on_time", "late", "out_of_order"}, 1)
    assert len(name) > 10 and max(events) > 8


def test_an_empty_batch_changes_nothing():
    rows, enricher = fixed_stream(), Enricher(most=2)
    before, after = rows[rows["offset"] < 60], rows[rows["offset"] >= 60]
    first = enricher.enrich(before)
    nothing = enricher.enrich(rows.head(0), first.state, first.keys.head(0))
    assert nothing.events.dtypes.equals(first.events.dtypes)
    assert [len(frame) for frame in (nothing.events, nothing.duplicates, nothing.keys)] == [0, 0, 0]
    assert answers_of(first) | answers_of(enricher.enrich(after, nothing.state, first.keys)) == told(rows, 2)


def test_what_names_or_locates_a_person_ends_here():
    "Through the door and decode, with and without consent."
    door = Door(b"a secret of sixteen", "refused", "81.2.69.142", "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X)")
    told_by = {"user_id": "ann@example.com", "anonymous_id": "browser-7", "session_id": "visit-9", "transaction_id": "order-5", "item_id": "teapot", "price": 3}
    sent = [{"event_name": name, "event_id": f"{name}-{number}"} | told_by | consent
            for name in ("view_item", "purchase") for number, consent in enumerate(({"consent": True}, {"consent": False}, {}))]
    read = [read_event(event, datetime(2026, 5, 1, 10, tzinfo=UTC), door) for event in sent]
    rows = decode([Record(0, offset, one.key, one.to_json()) for offset, one in enumerate(read)], door).rows
    enriched = Enricher().enrich(rows)
    kept = enriched.events
    assert [*kept.columns] == [*EVENTS.names, *ORDER]
    text = kept.to_csv() + enriched.duplicates.to_csv() + enriched.keys.to_csv()
    secrets = {"ann@example.com", "browser-7", door.ip, door.user_agent, *rows["client"].to_pylist()}
    assert not [secret for secret in secrets if secret in text]
    refused = kept[kept["consent"].fillna(False) == False]  # noqa: E712
    assert len(refused) == 3  # two views, and one purchase: it was the same order, which is seen though nobody is named
    assert refused[["user_id", "session_id", "transaction_id", "request_id"]].isna().all(None) and refused["event_id"].str.startswith("x-").all()
    assert kept[["user_id", "session_id"]].notna().all(axis=1).sum() == 2


def on_duckdb():
    import duckdb
    connection = duckdb.connect(config={"threads": 2})
    connection.execute("SET TimeZone = 'UTC'")
    return lambda df: connection.from_arrow(pa.Table.from_pandas(df, preserve_index=False))


def on_spark():
    return lambda df: spark_session().createDataFrame(pa.Table.from_pandas(df, preserve_index=False))


@pytest.mark.parametrize("engine", [on_duckdb, on_spark])
def test_engines_go_on_from_what_pandas_left_and_tell_the_same(engine, request):
    if engine is on_spark: request.getfixturevalue("spark").conf.set("spark.sql.adaptive.enabled", "false")  # plans once: twice as fast for little data
    rows, enricher = fixed_stream(), Enricher(zone="Europe/London", most=2)
    before, after, put = rows[rows["offset"] < 60], rows[rows["offset"] >= 60], engine()
    first = enricher.enrich(before)
    there = enricher.enrich(put(after), State(put(first.state.sessions), put(first.state.rates)), put(first.keys))
    here = enricher.enrich(after, first.state, first.keys)
    assert answers_of(first) | answers_of(there) == told(rows, 2)
    for one, other, order in ((there.events, here.events, list(ORDER)), (there.duplicates, here.duplicates, list(ORDER)), (there.keys, here.keys, "key"),
                              (there.state.sessions, here.state.sessions, "visitor"), (there.state.rates, here.state.rates, ["client", "minute"])):
        pd.testing.assert_frame_equal(to_pandas(one, order), to_pandas(other.reset_index(drop=True), order))
    if engine is on_spark: request.getfixturevalue("spark").conf.unset("spark.sql.adaptive.enabled")
