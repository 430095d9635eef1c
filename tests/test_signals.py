"""Signals from outside: sources that lie, stall and break off; landing that is killed and run twice at a time; secrets that stay where they are."""

import datetime as dt
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shopai.core.lake import Lake
from shopai.events import landing
from shopai.events.bus import BusUnavailable, LocalBus
from shopai.events.landing import Landed, land_signals, last_known, run
from shopai.events.signals import Poller, Source, SourceFailed, encode, fetch

NOON = dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC)
ROWS = [{"sku": "mug", "price": 4.5}, {"sku": "pot", "price": 19}]


class Outside(BaseHTTPRequestHandler):
    "A source that does as it is told: path → what to do with the connection."

    pages: dict[str, Callable] = {}
    keys: list[str | None] = []

    def do_GET(self):
        Outside.keys.append(self.headers.get("Authorization"))
        Outside.pages[self.path.partition("?")[0]](self)

    def log_message(self, *_): pass


def answer(body: bytes = json.dumps(ROWS).encode(), status: int = 200, **headers) -> Callable:
    def page(self):
        self.send_response(status)
        for name, value in headers.items(): self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
    return page


def raw(data: bytes) -> Callable: return lambda self: self.wfile.write(data)


def drip(self):
    "A byte now and then, for ever: no single read takes long."
    self.send_response(200)
    self.end_headers()
    for _ in range(100):
        self.wfile.write(b" ")
        self.wfile.flush()
        time.sleep(.05)


class Server(ThreadingHTTPServer):
    def handle_error(self, *_): pass  # who gives up waiting hangs up


@pytest.fixture
def outside():
    Outside.pages, Outside.keys = {"/": answer()}, []
    server = Server(("127.0.0.1", 0), Outside)
    threading.Thread(target=server.serve_forever, args=(.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def rivals(url: str, **more) -> Source:
    fields = {"item_id": "sku", "competitor": "=acme", "observed_at": "=now", "price": "price", "currency": "=EUR"}
    return Source(**{"name": "rivals", "table": "market_prices", "http": url, "columns": fields, "every": "15m", "timeout": .5, **more})


class Clock:
    def __init__(self): self.now = NOON

    def __call__(self) -> dt.datetime: return self.now


# --- asking ---


@pytest.mark.parametrize("page, says", [
    (answer(status=500), "HTTP 500"), (answer(status=204), "HTTP 204"), (lambda self: time.sleep(1), "no answer within 0.4 s"), (drip, "within 0.4 s"),
    (answer(b"x" * 3_000), "longer than 0.002 MB"), (answer(b"[]", Content_Length="500"), "broke off"), (raw(b"\x00\xff garbage\r\n\r\n"), "no HTTP"),
    (raw(b""), "no HTTP"), (answer(status=302, Location="file:///etc/hostname"), "not http or https"),
    (answer(status=302, Location="ftp://localhost/x"), "not http or https"),
    (answer(status=302, Location="/"), "more than 5 redirects"), (answer(status=302), "more than 5 redirects")])
def test_a_bad_answer_is_told_in_one_line_and_in_time(outside, page, says):
    Outside.pages["/"] = page
    began = time.monotonic()
    with pytest.raises(SourceFailed, match=says) as error: fetch(outside + "/?key=s3cret", key="t0ken", seconds=.4, most=2_000)
    assert time.monotonic() - began < 1 and "\n" not in str(error.value)
    assert "s3cret" not in str(error.value) and "t0ken" not in str(error.value)


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(SourceFailed, match="can't be reached: Connection refused"): fetch(f"http://127.0.0.1:{free.getsockname()[1]}")


def test_a_key_goes_to_no_other_host(outside):
    port = outside.rpartition(":")[2]
    Outside.pages = {"/": answer(status=302, Location="/here"), "/here": answer(status=307, Location=f"http://localhost:{port}/there"), "/there": answer()}
    assert fetch(outside, key="t0ken")[1] == json.dumps(ROWS).encode()
    assert Outside.keys == ["Bearer t0ken", "Bearer t0ken", None]


def test_the_key_comes_from_the_environment_and_is_told_nowhere(outside, tmp_path, monkeypatch):
    source = rivals(outside, key_env="SHOPAI_SIGNAL_RIVALS")
    poller = Poller([source], LocalBus(tmp_path, "signals"), tmp_path, Clock())
    assert "SHOPAI_SIGNAL_RIVALS is not set" in poller.poll()[0].error and not Outside.keys
    monkeypatch.setenv("SHOPAI_SIGNAL_RIVALS", "t0ken")
    told = poller.poll(everything=True)
    assert told[0].sent == 2 and Outside.keys == ["Bearer t0ken"]
    assert not any(b"t0ken" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()) and "t0ken" not in repr(told) + repr(source)


# --- the poller ---


def test_one_that_fails_stops_no_other(outside, tmp_path):
    Outside.pages |= {"/slow": lambda self: time.sleep(1), "/html": answer(b"<html>"), "/other": answer(b'[{"id": 1}]')}
    pages = [rivals(outside + page, name=name) for name, page in (("slow", "/slow"), ("html", "/html"), ("other", "/other"), ("good", "/"))]
    missing = Source(name="file", table="external_signals", csv=tmp_path / "no.csv", every="1h")
    unknown = Source(name="days", table="calendar", holidays=["XX"], every="1d")
    asked = {one.source: one for one in Poller([*pages, missing, unknown], LocalBus(tmp_path, "signals"), tmp_path, Clock()).poll()}
    assert asked["good"].sent == 2 and [name for name, one in asked.items() if one.error] == ["slow", "html", "other", "file", "days"]
    assert asked["slow"].error == "no answer within 0.5 s" and "HTML" in asked["html"].error
    assert asked["other"].error == "no row has the field 'sku'; the first has id"


def test_only_changes_are_sent_and_a_restart_changes_nothing(outside, tmp_path):
    clock, bus = Clock(), LocalBus(tmp_path, "signals")
    source = rivals(outside, columns={"item_id": "sku", "competitor": "=acme", "observed_at": "=2026-03-01T00:00:00Z", "price": "price"})
    assert Poller([source], bus, tmp_path, clock).poll()[0].sent == 2
    Outside.pages["/"] = answer(json.dumps([ROWS[0], {"sku": "pot", "price": 18}]).encode())
    again = Poller([source], bus, tmp_path, clock)
    assert again.poll() == []
    clock.now += dt.timedelta(minutes=15)
    assert (again.poll()[0].sent, bus.ends()) == (1, {0: 4})
    lake = Lake(tmp_path / "lake")
    assert land_signals(bus, lake) == Landed(read=3, added=2, known=1)  # the old price of the pot is overtaken
    assert dict(lake.read("market_prices")[["item_id", "price"]].values) == {"mug": 4.5, "pot": 18}


@pytest.mark.parametrize("state", [b"", b"{", b"[]", b'{"rivals": 3}', b'{"rivals": {"due": "soon", "answered": null, "failures": 0, "seen": []}}'])
def test_a_lost_state_costs_a_row_sent_twice_and_no_more(outside, tmp_path, state):
    bus, lake = LocalBus(tmp_path, "signals"), Lake(tmp_path / "lake")
    source = rivals(outside, columns={"item_id": "sku", "competitor": "=acme", "observed_at": "=2026-03-01T00:00:00Z", "price": "price"})
    Poller([source], bus, tmp_path, Clock()).poll()
    (tmp_path / "signals.json").write_bytes(state)
    assert Poller([source], bus, tmp_path, Clock()).poll()[0].sent == 2
    assert land_signals(bus, lake) == Landed(read=4, added=2, known=2)


def test_a_bus_that_is_away_keeps_rows_for_the_next_time(outside, tmp_path, monkeypatch):
    clock, bus = Clock(), LocalBus(tmp_path, "signals")
    poller = Poller([rivals(outside)], bus, tmp_path, clock)
    with monkeypatch.context() as patch:
        patch.setattr(bus, "send", lambda *_: (_ for _ in ()).throw(BusUnavailable("local/signals: locked")))
        assert poller.poll()[0].error == "local/signals: locked"
    clock.now += dt.timedelta(seconds=30)
    assert poller.poll()[0].sent == 2


def test_a_clock_that_was_put_back_does_not_silence_a_source(outside, tmp_path):
    clock = Clock()
    poller = Poller([rivals(outside)], LocalBus(tmp_path, "signals"), tmp_path, clock)
    poller.poll()
    clock.now -= dt.timedelta(days=2)
    assert len(poller.poll()) == 1


# --- landing ---


def put(bus: LocalBus, table: str, rows: list[dict], at: dt.datetime = NOON) -> None:
    source = Source(name="test", table=table, csv="x.csv", every="1h")
    bus.send([(None, encode(source, row, at)) for row in rows])


def price(item: str, value, day: int = 1) -> dict:
    return {"item_id": item, "competitor": "acme", "observed_at": f"2026-03-{day:02}T00:00:00Z", "price": value}


def test_all_three_tables_from_one_queue(tmp_path):
    bus, lake = LocalBus(tmp_path, "signals"), Lake(tmp_path / "lake")
    put(bus, "market_prices", [price("mug", 4), price("mug", -1, 2)])
    warm = {"signal": "t", "observed_at": "2026-03-01T00:00:00Z", "value": 3}
    put(bus, "external_signals", [{**warm, "region": "GB"}, warm])
    poller = Poller([Source(name="days", table="calendar", holidays=["GB", "DE"], every="30d")], bus, tmp_path, Clock())
    days = poller.poll()[0].sent
    assert land_signals(bus, lake) == Landed(read=days + 4, added=days + 3, refused=1)
    unity = lake.read("calendar", where="country = 'DE' and name = 'German Unity Day'")["day"]
    assert {str(day)[:10] for day in unity} == {f"{year}-10-03" for year in range(2025, 2029)}
    known = lake.read("external_signals")
    assert known["known_at"].eq(pd.Timestamp(NOON)).all() and set(known["region"]) == {"GB", "all"}
    assert lake.read("quarantine")["reason"].tolist() == ["price: must be ≥ 0"]
    assert land_signals(bus, lake) == Landed()


@pytest.mark.parametrize("table, point", [
    (None, "before"), ("calendar", "after"), ("market_prices", "before"), ("market_prices", "after"), ("external_signals", "before"), ("quarantine", "after")])
def test_a_crash_between_two_commits_doubles_nothing(tmp_path, monkeypatch, table, point):
    bus, lake = LocalBus(tmp_path, "signals"), Lake(tmp_path / "lake")
    put(bus, "market_prices", [price("mug", 4), price("mug", -1, 2)])
    put(bus, "calendar", [{"day": "2026-03-01", "country": "GB", "name": "Spring"}, {"day": "soon", "country": "GB", "name": "Spring"}])
    bus.send([(None, b"?")])
    upsert, quarantine = landing.upsert, Lake.quarantine

    class Crash(Exception): pass

    def crashing(work: Callable, hit: Callable) -> Callable:
        def step(*args, **kwargs):
            if hit(args) and point == "before": raise Crash
            done = work(*args, **kwargs)
            if hit(args) and point == "after": raise Crash
            return done
        return step

    with monkeypatch.context() as patch:
        if table == "quarantine": patch.setattr(Lake, "quarantine", crashing(quarantine, lambda args: args[1] == "calendar"))
        elif table == "external_signals": patch.setattr(landing, "_close", crashing(landing._close, lambda args: True))
        else: patch.setattr(landing, "upsert", crashing(upsert, lambda args: args[1] == (table or "calendar")))
        with pytest.raises(Crash): land_signals(bus, lake)
    put(bus, "market_prices", [price("pot", 9), price("pot", -9, 2)])  # meanwhile more has come, so that the next batch is another one
    land_signals(bus, lake)
    assert (len(lake.read("market_prices")), len(lake.read("calendar")), len(lake.read("quarantine"))) == (2, 1, 4)


LANDER = """
import sys, time
from shopai.core.lake import Lake
from shopai.events.bus import LocalBus
from shopai.events.landing import land_signals
bus, lake = LocalBus(sys.argv[1], "signals"), Lake(sys.argv[1] + "/lake")
until = time.monotonic() + float(sys.argv[2])
while time.monotonic() < until: land_signals(bus, lake, most=7)
import os; os._exit(0)
"""


def test_two_processes_at_a_time_land_each_signal_once(tmp_path):
    bus, lake = LocalBus(tmp_path, "signals"), Lake(tmp_path / "lake")
    landers = [subprocess.Popen([sys.executable, "-c", LANDER, str(tmp_path), "3"]) for _ in range(2)]
    for n in range(40):
        put(bus, "market_prices", [price(f"i{n}", n), price(f"i{n}", -1, 2), price(f"i{n // 2}", n)])
        time.sleep(.03)
    landers[0].kill()
    landers[1].wait(60)
    landers[0].wait()
    land_signals(bus, lake)
    prices = lake.read("market_prices").set_index("item_id")["price"]
    assert prices.index.is_unique and len(prices) == 40 and len(lake.read("quarantine")) == 40
    last = {f"i{n}": float(n) for n in range(40)} | {f"i{n // 2}": float(n) for n in range(40)}  # later values of the same key replace
    assert prices.loc[[f"i{n}" for n in range(20, 40)]].to_dict() == {f"i{n}": float(n) for n in range(20, 40)} and prices["i19"] == last["i19"]


scalar = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
json_value = st.recursive(scalar, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=5)
field = st.sampled_from(["item_id", "competitor", "observed_at", "price", "signal", "value", "region", "known_at", "day", "country", "name", "colour"])
good_value = st.sampled_from(["2026-03-01T00:00:00Z", "2026-03-01", "GB", 3.5, "4"])
record = st.fixed_dictionaries({
    "v": st.just(1), "table": st.sampled_from(["market_prices", "calendar", "external_signals"]), "observed": st.just(NOON.isoformat()) | st.text(max_size=3),
    "row": st.dictionaries(field, good_value | json_value, max_size=8)})


@given(st.lists(st.binary(max_size=20) | (record | json_value).map(lambda value: json.dumps(value).encode()), min_size=1, max_size=12))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_whatever_comes_is_counted_and_nothing_stops_the_rest(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("any")
    bus, lake = LocalBus(folder, "signals"), Lake(folder / "lake")
    bus.send([(None, value) for value in values])
    put(bus, "market_prices", [price("a good one", 1)])
    landed = land_signals(bus, lake)
    assert landed.read == len(values) + 1 == landed.added + landed.replaced + landed.known + landed.refused
    assert "a good one" in lake.read("market_prices")["item_id"].tolist() and land_signals(bus, lake) == Landed()


# --- what is known ---


def test_no_value_is_known_before_it_was(tmp_path):
    bus, lake = LocalBus(tmp_path, "signals"), Lake(tmp_path / "lake")
    row = lambda day, value, known: {"signal": "gdp", "region": "GB", "observed_at": f"2026-01-{day:02}T00:00:00Z", "value": value, "known_at": known}
    put(bus, "external_signals", [row(1, 1., "2026-02-01T00:00:00Z"), row(2, 2., "2026-02-02T00:00:00Z"), row(2, 2.5, "2026-03-02T00:00:00Z")])
    land_signals(bus, lake)
    at = lambda month, day: last_known(lake, "external_signals", dt.datetime(2026, month, day, 12, tzinfo=dt.UTC))["value"].tolist()
    assert [at(1, 20), at(2, 1), at(2, 20), at(3, 2)] == [[], [1.], [1.], [2.5]]


def test_the_service_goes_on_through_an_outage_and_ends_when_told(outside, tmp_path):
    bus, lake, told, stop = LocalBus(tmp_path, "signals"), Lake(tmp_path / "lake"), [], threading.Event()

    def progress(one) -> None:
        told.append(str(one))
        Outside.pages["/"] = answer(status=503) if len(told) == 2 else answer()
        if sum(line.startswith("rivals: 2 rows sent") for line in told) == 3: stop.set()

    service = threading.Thread(target=run, args=(Poller([rivals(outside, every="1s")], bus, tmp_path), lake), kwargs={"stop": stop, "progress": progress})
    service.start()
    service.join(20)
    assert not service.is_alive() and any("rivals: HTTP 503" in line and "its last answer is 1 s old" in line for line in told)
    assert len(lake.read("market_prices")) >= 4 and set(last_known(lake, "market_prices")["price"]) == {4.5, 19}
