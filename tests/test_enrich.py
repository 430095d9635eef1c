"""Enriching gives the same rows however the stream is cut, and on every engine; and nothing that names a person comes out.

What is right is told by `told`, which reads the rules one row at a time, as one would with pencil and paper."""

from collections import defaultdict
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from backends import spark, spark_session, to_pandas  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

from shopai.core.lake import Lake
from shopai.core.schema import EVENTS
from shopai.events.bus import Record
from shopai.events.decode import WIRE, decode, hash64
from shopai.events.duplicates import ORDER
from shopai.events.enrich import Enricher, State, in_pandas
from shopai.events.memory import KeyMemory, state_from_lake
from shopai.events.privacy import digest
from shopai.events.wire import Door

SECOND = 1_000_000
MINUTE, HOUR = 60 * SECOND, 3600 * SECOND
GAPS = (0, 0, 1, 20 * SECOND, 2 * MINUTE, 2 * MINUTE, 29 * MINUTE, 30 * MINUTE, 30 * MINUTE + 1, 3 * HOUR, 24 * HOUR, 24 * HOUR + 1, 30 * HOUR)
DELAYS = (0, 0, 0, SECOND, 7 * MINUTE, 10 * MINUTE, 10 * MINUTE, 15 * MINUTE, 15 * MINUTE + 1, 31 * MINUTE, 61 * MINUTE, 25 * HOUR, 50 * HOUR)
GIVEN = {"s" + digest(visit, b""): visit for visit in ("one", "two")}
VISITORS = ("v" + "a" * 16, "v" + "b" * 16, *GIVEN, None)  # two whose visits are computed, two that the shop numbers, and one without consent

events = st.lists(st.fixed_dictionaries({
    "visitor": st.sampled_from(VISITORS), "gap": st.sampled_from(GAPS), "delay": st.sampled_from(DELAYS), "skew": st.sampled_from((-3, 0, 0, 0, 3)), "lines": st.integers(1, 3),
    "again": st.integers(0, 14), "order": st.sampled_from((None, None, "A", "B")), "items": st.integers(0, 3), "client": st.sampled_from(("c", "d", None)), "untold": st.integers(0, 9)}),
    min_size=1, max_size=40)


def stream(drawn: list[dict]) -> pd.DataFrame:
    "Rows as `decode` makes them, in two partitions. Visitors, clients and orders keep to one partition, as they do where the customer is a record's key."
    now, offsets, sent, rows = 1_777_629_600 * SECOND, [0, 0], [[], []], []
    for number, event in enumerate(drawn):
        now += event["gap"]
        partition = int(event["visitor"] in VISITORS[1::2])
        root = sent[partition][-event["again"]] if 0 < event["again"] <= min(3, len(sent[partition])) else f"e{number}"  # one in five was sent before
        sent[partition].append(root)
        for line in range(event["lines"]):
            item = f"i{event['items'] if event['lines'] == 3 else (event['items'] + line) % 4}"  # three lines are all of one item
            order = f"{event['order']}{partition}" if event["order"] and event["visitor"] else None
            rows.append({
                "event_id": root if line == 0 else f"{root}:{line + 1}", "line": line, "event_name": "purchase" if order else "view_item", "event_time": now - event["delay"],
                "received_at": None if event["untold"] == 0 and not event["delay"] else now + event["skew"] * MINUTE, "item_id": item, "transaction_id": order,
                "session_id": GIVEN.get(event["visitor"]), "visitor": event["visitor"], "client": event["client"] and f"{event['client']}{partition}",
                "purchase_key": order and hash64([f"{order}\n{item}"])[0], "partition": partition, "offset": offsets[partition]})
        offsets[partition] += 1
    columns = {field.name: [row.get(field.name) for row in rows] for field in WIRE} | {"key": hash64([row["event_id"] for row in rows])}
    read = lambda field: pa.array(columns[field.name], pa.int64()).cast(field.type) if pa.types.is_timestamp(field.type) else pa.array(columns[field.name], field.type)
    return in_pandas(pa.table([read(field) for field in WIRE], schema=WIRE))


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


def in_pieces(rows: pd.DataFrame, cuts: list[int], enricher: Enricher, put=None) -> dict[tuple, tuple]:
    """Enrich batch by batch, with what each leaves for the next. A batch has the records of each partition up to a cut; within it rows lie in any order.

    `put` makes a frame of the engine from a pandas frame; without it, all stays in pandas."""
    found, state, known = {}, State(), None
    for first, end in zip([0, *cuts], [*cuts, 10**9], strict=True):
        batch = rows[rows["offset"].between(first, end - 1)].sample(frac=1, random_state=first)
        if batch.empty: continue
        enriched = enricher.enrich(put(batch) if put else batch, state, put(known) if put and known is not None else known)
        new, keys = answers_of(enriched), to_pandas(enriched.keys)
        assert not set(new) & set(found)
        found, known = found | new, keys if known is None else pd.concat([known, keys])
        state = State(put(to_pandas(enriched.state.sessions)), put(to_pandas(enriched.state.rates))) if put else enriched.state
    return found


@settings(max_examples=40, deadline=None, derandomize=True)
@given(events, st.lists(st.integers(1, 20), max_size=3, unique=True))
def test_wherever_the_stream_is_cut_rows_are_told_what_the_rules_say(drawn, cuts):
    rows = stream(drawn)
    assert in_pieces(rows, sorted(cuts), Enricher(most=1)) == told(rows, 1)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(events, st.integers(1, 20))
def test_a_restart_goes_on_from_what_is_in_the_lake(drawn, cut):
    "The state is read from the lake's rows. Only why something is a duplicate may differ: an event that was left out isn't in the lake, but what it repeats is."
    rows, enricher = stream(drawn), Enricher(most=10**9)
    right, before = told(rows, 10**9), rows[rows["offset"] < cut]
    with TemporaryDirectory(prefix="lake ") as folder:
        lake = Lake(folder)
        found = answers_of(first := enricher.enrich(before))
        lake.append("events", first.events[EVENTS.names])
        after = rows[rows["offset"] >= cut]
        if len(after): found |= answers_of(enricher.enrich(after, state_from_lake(lake), KeyMemory.from_lake(lake).seen(pd.concat([after["key"], after["purchase_key"].dropna()]))))
    told_without_reasons = lambda answers: {place: ("duplicate",) if answer[0] else answer for place, answer in answers.items()}
    assert told_without_reasons(found) == told_without_reasons(right)


def fixed_stream() -> pd.DataFrame:
    "Two hundred events of all kinds."
    r = np.random.default_rng(7)
    draw = lambda values: values[r.integers(len(values))]
    return stream([{"visitor": draw(VISITORS), "gap": draw(GAPS[:7] * 3 + GAPS[7:10]), "delay": draw(DELAYS), "skew": draw((-3, 0, 0, 0, 3)), "lines": int(r.integers(1, 4)), "again": int(r.integers(15)),
                    "order": draw((None, None, None, None, "A", "B", "C", "D")), "items": int(r.integers(4)), "client": draw(("c", "d", None)), "untold": int(r.integers(10))} for _ in range(200)])


def test_the_stream_has_all_that_the_rules_speak_of():
    answers = pd.DataFrame([answer + (None,) * (6 - len(answer)) for answer in told(fixed_stream(), 1).values()], columns=["duplicate", "id", "events", "seconds", "arrival", "reason"])
    for column, least in {"duplicate": 2, "id": 10, "events": 8, "arrival": 3, "reason": 1}.items(): assert answers[column].nunique() >= least, column
    assert (answers["duplicate"].isna() & answers["id"].isna()).sum() > 20


def on_duckdb():
    import duckdb
    connection = duckdb.connect(config={"threads": 2})
    connection.execute("SET TimeZone = 'UTC'")
    return lambda df: connection.from_arrow(pa.Table.from_pandas(df, preserve_index=False))


def on_spark():
    return lambda df: spark_session().createDataFrame(pa.Table.from_pandas(df, preserve_index=False))


@pytest.mark.parametrize("engine", [on_duckdb, on_spark])
def test_engines_tell_the_same(engine, request):
    if engine is on_spark: request.getfixturevalue("spark").conf.set("spark.sql.adaptive.enabled", "false")  # plans once: twice as fast for little data
    rows, enricher = fixed_stream(), Enricher(zone="Europe/London", most=1)
    right, put = told(rows, 1), engine()
    assert in_pieces(rows, [60], enricher) == right
    assert in_pieces(rows, [60], enricher, put) == right
    if engine is on_spark: request.getfixturevalue("spark").conf.unset("spark.sql.adaptive.enabled")
