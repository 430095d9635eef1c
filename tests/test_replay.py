"""Replay: what was recorded comes in once more just as it was, whatever is stored how, whoever is busy, and whenever it is killed."""

import datetime as dt
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shop_server import running

from shopai.core.config import UsageError
from shopai.core.lake import Lake
from shopai.core.names import EVENT_NAMES
from shopai.core.schema import conform
from shopai.core.testing import toy_shop
from shopai.events.bus import BusUnavailable, LocalBus, Record
from shopai.events.decode import decode
from shopai.events.replay import COLUMNS, ApiTarget, BusTarget, Replayed, patiently, read_recorded, replay, wire_events
from shopai.events.wire import Door, read_event

NOON = dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC)
DOOR = Door(key=b"a key of the test")


def landed(events: list[dict], door: Door = DOOR) -> pd.DataFrame:
    "Rows of the lake that wire events become, in the columns that they come with."
    read = [read_event(event, dt.datetime.fromisoformat(event["received_at"]), door) for event in events]
    rows = decode([Record(0, n, event.key, event.to_json()) for n, event in enumerate(read)], door).rows.select(COLUMNS).to_pandas()
    return conform(rows.assign(is_bot=rows["is_bot"].astype("boolean").fillna(False)), "events")[list(COLUMNS)]


def plain(rows: pd.DataFrame) -> list[dict]:
    "Rows as the replay reads them."
    return [{name: None if pd.isna(value) else value.to_pydatetime() if isinstance(value, pd.Timestamp) else value for name, value in row.items()}
            for row in rows.astype(object).to_dict("records")]


def once_more(rows: pd.DataFrame, door: Door = DOOR) -> pd.DataFrame: return landed(list(wire_events(plain(rows))), door)


def same_rows(first: pd.DataFrame, second: pd.DataFrame) -> None:
    by_id = lambda rows: rows.sort_values("event_id", ignore_index=True)
    pd.testing.assert_frame_equal(by_id(first), by_id(second))


word = st.sampled_from(["a", "b", "c", "u-1", "7f3", "x y z"])
money = st.none() | st.floats(0, 1e6, allow_nan=False)
item = st.fixed_dictionaries({"item_id": st.sampled_from(["mug", "tea pot", "85123A"])},
                             optional={"quantity": money, "price": money, "position": money, "propensity": st.floats(0, 1)})
some_event = st.fixed_dictionaries(
    {"event_name": st.sampled_from(EVENT_NAMES) | st.just("purchase"), "minute": st.integers(0, 3), "later": st.integers(0, 20), "analytics": st.just(True),
     "items": st.lists(item, max_size=4)},
    optional={"session_id": word, "user_id": word, "transaction_id": word, "request_id": word, "search_term": st.sampled_from(["tea", "a\u2028b", "ü'\"\\"]),
              "currency": st.just("EUR"),
              "channel": word, "is_bot": st.booleans(), "personalisation": st.just(True), "model_version": word, "city": st.just("Köln")})


@given(st.lists(some_event, min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_what_came_through_the_door_comes_again_as_it_was(events):
    sent = [{**event, "event_id": f"e{n}", "event_time": (NOON + dt.timedelta(minutes=event["minute"])).isoformat(),
             "received_at": (NOON + dt.timedelta(minutes=event["minute"] + event["later"])).isoformat()} for n, event in enumerate(events)]
    first = landed(sent).sort_values(["event_time", "received_at"], kind="stable", ignore_index=True)
    same_rows(once_more(first), first)


def test_two_orders_of_one_moment_stay_two():
    same = {"event_name": "purchase", "event_time": NOON.isoformat(), "received_at": NOON.isoformat(), "analytics": True, "transaction_id": "t"}
    sent = [{**same, "event_id": name, "items": [{"item_id": "mug"}]} for name in ("a", "b")]
    same_rows(once_more(landed(sent)), landed(sent))


def test_without_consent_nobody_is_recognised_and_all_else_stays():
    sent = [{"event_id": f"e{n}", "event_name": "purchase", "event_time": NOON.isoformat(), "received_at": NOON.isoformat(),
             "user_id": "u", "session_id": "s", "transaction_id": "t", "consent": consent}
            for n, consent in enumerate([True, False, None])]
    recorded = conform(pd.DataFrame([{**event, "item_id": "mug", "price": 5.} for event in sent]), "events")[list(COLUMNS)]
    again = once_more(recorded)
    assert again["user_id"].notna().tolist() == [True, False, False] == again["session_id"].notna().tolist() == again["transaction_id"].notna().tolist()
    assert again["consent"].tolist()[:2] == [True, False] and pd.isna(again["consent"].iloc[2])
    assert set(again["item_id"]) == {"mug"} and set(again["price"]) == {5.}
    assert once_more(recorded, Door(unsaid_consent="given"))["user_id"].notna().tolist() == [True, False, True]


def test_it_does_not_matter_how_rows_are_stored(tmp_path):
    rows = toy_shop(customers=20, items=16, days=28).events
    assert rows.duplicated(["transaction_id", "event_name"]).any()  # orders of several lines are among them
    whole, shuffled = Lake(tmp_path / "whole"), Lake(tmp_path / "shuffled")
    whole.append("events", rows)
    mixed = rows.sample(frac=1, random_state=1)
    for first in range(0, len(mixed), 300): shuffled.append("events", mixed[first:first + 300])
    rows.to_parquet(tmp_path / "rows.parquet")
    read = [[event for batch in recording for event in batch] for recording in
            (read_recorded("events", whole), read_recorded("events", shuffled), read_recorded(str(tmp_path / "rows.parquet")))]
    assert read[0] == read[1] == read[2]
    times = [event["event_time"] for event in read[0]]
    assert times == sorted(times)
    lines = sum(max(1, len(event.get("items", ()))) for event in read[0])
    assert lines == len(rows) and len(read[0]) < len(rows)
    apart = [event for batch in read_recorded("events", whole, keep_ids=True) for event in batch]
    assert sorted(event["event_id"] for event in apart) == sorted(rows["event_id"])


def test_an_order_of_many_lines_loses_none():
    same = {"event_name": "purchase", "event_time": NOON, "transaction_id": "T", "quantity": 1.}
    rows = [dict.fromkeys(COLUMNS) | same | {"event_id": f"{n}", "item_id": f"i{n % 150}"} for n in range(450)]
    events = list(wire_events(rows))
    assert [len(event["items"]) for event in events] == [200, 200, 50]
    assert Counter(item["item_id"] for event in events for item in event["items"]) == Counter(row["item_id"] for row in rows)


def test_an_older_version_of_the_table_can_be_replayed(tmp_path):
    lake, rows = Lake(tmp_path), toy_shop(customers=5, items=16, days=28).events
    version = lake.append("events", rows[:100]).version
    lake.append("events", rows[100:])
    assert read_recorded("events", lake, version=version).total == 100
    with pytest.raises(UsageError, match="has no version 99"): read_recorded("events", lake, version=99)


def test_rows_of_a_file_that_break_the_contract_are_counted(tmp_path):
    lines = ["event_id,event_name,event_time,item_id,price", "a,view_item,2026-03-01T12:00:00Z,mug,5", "b,view_item,2026-03-01 12:00,mug,5",
             "c,laugh,2026-03-01T12:00:00Z,mug,5", "a,view_item,2026-03-01T12:00:00Z,mug,5"]
    (tmp_path / "rows.csv").write_text("\n".join(lines), encoding="utf-8")
    done = replay(read_recorded(str(tmp_path / "rows.csv")), target := BusTarget(LocalBus(tmp_path / "bus"), DOOR))
    assert done.sent == 1 and sum(done.refused.values()) == 3 and any("event_time: must be a time with a zone" in reason for reason in done.refused)
    assert target.bus.ends() == {0: 2}


@pytest.mark.parametrize("what, options, line", [
    ("rows.xlsx", {}, "what must be events"), ("events", {}, "what must be events"), ("rows.csv", {}, "can't be read"), ("rows.jsonl", {}, "can't be read"),
    ("rows.csv", {"version": 3}, "version is of the lake's table"), ("rows.csv", {"source": "nobody"}, "unknown source 'nobody'")])
def test_mistakes_are_told_in_one_line(tmp_path, monkeypatch, what, options, line):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=line) as error: read_recorded(what, **options)
    assert "\n" not in str(error.value)


def test_a_source_speaks_events(data_dir, tmp_path):
    path = data_dir / "rees46_oct2019_sample.parquet"
    if not path.is_file(): pytest.skip(f"no {path.name} in {data_dir}")
    recording = read_recorded(str(path), source="rees46", shift="now")
    done = replay(recording, target := BusTarget(LocalBus(tmp_path), DOOR))
    assert done.sent > 17_000 and done.sent == target.bus.ends()[0] - 1
    assert abs(dt.datetime.fromisoformat(done.at) - dt.datetime.now(dt.UTC)) < dt.timedelta(minutes=2)


def test_a_shift_makes_new_events_and_the_same_shift_the_same_ones(tmp_path):
    lake = Lake(tmp_path / "lake")
    lake.append("events", toy_shop(customers=5, items=16, days=28).events)
    read = lambda **more: [event for batch in read_recorded("events", lake, **more) for event in batch]
    old, once, twice, later = read(), read(shift="now", now=NOON), read(shift="now", now=NOON), read(shift="now", now=NOON + dt.timedelta(days=1))
    assert once == twice
    ids = [{event["event_id"] for event in events} for events in (old, once, later)]
    assert not (ids[0] & ids[1] or ids[1] & ids[2] or ids[0] & ids[2])
    assert {event.get("user_id") for event in once} == {event.get("user_id") for event in old}
    moments = lambda events: [dt.datetime.fromisoformat(event["event_time"]) for event in events]
    gaps = lambda events: [after - before for before, after in pairwise(moments(events))]
    assert gaps(old) == gaps(once)
    assert all(dt.datetime.fromisoformat(event["event_time"]) <= NOON for event in once)


# --- the API ---


@pytest.mark.parametrize("refuse", [False, True])
def test_the_real_api_takes_a_recording(tmp_path, refuse):
    lake = Lake(tmp_path / "lake")
    rows = toy_shop(customers=8, items=16, days=28).events
    lake.append("events", rows.assign(currency="EUR"))
    recording = read_recorded("events", lake, size=200)
    events = [event for batch in recording for event in batch]
    if refuse: events = [{**event, "currency": "euro"} for event in events]
    with running(tmp_path) as server: done = replay([events], ApiTarget(server.address))
    if refuse: assert (done.sent, done.refused) == (0, {"currency: must be a three-letter currency code, such as EUR": len(events)})
    else:
        assert (done.sent, done.refused) == (len(events), {})
        records = LocalBus(tmp_path / "bus").read({0: 1}, 100_000)
        assert [json.loads(record.value)["event_id"] for record in records] == [event["event_id"] for event in events]
        assert decode(records, DOOR).rows["client"].null_count == len(rows)  # nobody is taken for a machine because one machine sends for all


class Busy(BaseHTTPRequestHandler):
    "An API that answers as it is told, one answer after the other."

    protocol_version, script, came = "HTTP/1.1", [], []

    def do_POST(self):
        events = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["events"]
        step = Busy.script.pop(0) if Busy.script else 202
        if step == "hang up":
            self.close_connection = True
            return
        status, after = step if isinstance(step, tuple) else (step, None)
        if status == 202: Busy.came += [event["event_id"] for event in events]
        body = json.dumps({"events": [{"status": "accepted"}] * len(events)}).encode() if status == 202 else b"<html>busy</html>"
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **({"Retry-After": after} if after else {})}.items(): self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_): pass


@pytest.fixture
def busy():
    Busy.script, Busy.came = [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Busy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield ApiTarget(f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()


class FakeTime(threading.Event):
    "A clock that moves only when somebody waits."

    def __init__(self):
        super().__init__()
        self.now, self.waits = 0., []

    def clock(self) -> float: return self.now

    def wait(self, seconds=None) -> bool:
        self.waits.append(seconds)
        self.now += seconds
        return self.is_set()


def numbered(n: int, apart: float = 1.) -> list[list[dict]]:
    times = [(NOON + dt.timedelta(seconds=i * apart)).isoformat() for i in range(n)]
    return [[{"event_id": f"e{i}", "event_name": "search", "event_time": time, "received_at": time} for i, time in enumerate(times)]]


def test_a_busy_api_is_asked_again_when_it_says(busy):
    Busy.script = [(503, "7"), "hang up", (429, "3600"), 502, 202]
    done = replay(numbered(10), busy, stop=(fake := FakeTime()), clock=fake.clock)
    assert done.sent == 10 and Busy.came == [f"e{i}" for i in range(10)]
    assert fake.waits == [7, 2, 30, 8]


def test_patience_ends_and_another_run_finishes_the_work(busy):
    Busy.script = [202, *[503] * 20]
    fake = FakeTime()
    with pytest.raises(BusUnavailable, match="HTTP 503"): replay(numbered(1_200), busy, stop=fake, clock=fake.clock)
    assert sum(fake.waits) <= 120 and len(Busy.came) == 500
    Busy.script = []
    assert replay(numbered(1_200), busy).sent == 1_200
    assert set(Busy.came) == {f"e{i}" for i in range(1_200)}


def test_something_else_than_the_api_is_a_mistake_of_the_user(busy):
    Busy.script = [404]
    with pytest.raises(UsageError, match=r"HTTP 404 from /v1/events; is it an API of shopai\?"): replay(numbered(1), busy)


def test_nobody_there_is_unavailable():
    target = ApiTarget("http://127.0.0.1:9", timeout=2)
    with pytest.raises(BusUnavailable, match="can't be reached"): patiently(lambda: target.send(numbered(1)[0]), patience=0)


# --- pace, stop, kill ---


class Listener:
    def __init__(self, fake: FakeTime): self.fake, self.came = fake, []

    def send(self, events):
        assert 0 < len(events) <= 500
        self.came += [(self.fake.now, event) for event in events]
        return Counter()


@given(st.lists(st.floats(0, 500), min_size=1, max_size=60), st.sampled_from([1, 7.5, 60, 3600]))
@settings(max_examples=60, deadline=None)
def test_no_event_is_sent_much_too_early_or_late(gaps, factor):
    fake, at, events = FakeTime(), 0., []
    for n, gap in enumerate(gaps):
        at += gap if n else 0
        events.append({"event_id": str(n), "event_time": (moment := (NOON + dt.timedelta(seconds=at)).isoformat()), "received_at": moment, "due": at / factor})
    listener = Listener(fake)
    assert replay([events], listener, f"{factor}x", stop=fake, clock=fake.clock).sent == len(events)
    assert [event["event_id"] for _, event in listener.came] == [event["event_id"] for event in events]
    assert all(-.11 <= sent - event["due"] <= .11 for sent, event in listener.came)


def test_a_rate_holds_whenever_events_happened():
    fake = FakeTime()
    listener = Listener(fake)
    done = replay(numbered(5_000, apart=0), listener, "1000/s", stop=fake, clock=fake.clock)
    assert abs(done.seconds - 5) < .2 and all(abs(sent - n / 1000) <= .11 for n, (sent, _) in enumerate(listener.came))


def test_stop_sends_what_is_held_and_ends():
    fake = FakeTime()
    listener, told = Listener(fake), []

    def progress(done: Replayed) -> None:
        told.append(done.sent)
        if done.sent >= 1_000: fake.set()

    done = replay(numbered(5_000), listener, progress=progress, stop=fake, clock=fake.clock)
    assert done.stopped and done.sent == len(listener.came) < 1_600 and told[-1] == done.sent


KILLED = """
import sys
from shopai.core.lake import Lake
from shopai.events.bus import LocalBus
from shopai.events.replay import BusTarget, read_recorded, replay
from shopai.events.wire import Door
replay(read_recorded("events", Lake(sys.argv[1])), BusTarget(LocalBus(sys.argv[2]), Door()), sys.argv[3])
"""


def test_killed_and_started_again_nothing_is_missing(tmp_path):
    rows = toy_shop(customers=20, items=16, days=28).events
    Lake(tmp_path / "lake").append("events", rows)
    bus, wanted = LocalBus(tmp_path / "bus"), [event["event_id"] for batch in read_recorded("events", Lake(tmp_path / "lake")) for event in batch]
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "lake"), str(tmp_path / "bus"), "300/s"], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 30
    while bus.ends()[0] < 100 and time.monotonic() < until: time.sleep(.02)
    time.sleep(random.random() * .3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    arrived = bus.ends()[0] - 1
    assert 0 < arrived < len(wanted)
    replay(read_recorded("events", Lake(tmp_path / "lake")), BusTarget(bus, Door()))
    found = [json.loads(record.value)["event_id"] for record in bus.read({0: 1}, 100_000)]
    assert found == wanted[:arrived] + wanted  # each once more, under the same id
