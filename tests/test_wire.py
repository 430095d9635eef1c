"""The door of the event stream against everything that senders may send, and decode against everything that may lie on a bus.

What each does with well-behaved events stands in the notebooks nbs/events/10_privacy, 15_wire and 25_decode.
"""

import json
import pickle
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from shopai.core.config import Settings
from shopai.core.names import EVENT_NAMES, SEGMENT_ALIASES
from shopai.core.schema import EVENTS, validate
from shopai.events import decode as decode_module
from shopai.events.bus import Record
from shopai.events.decode import WIRE, decode, each_distinct, hash64
from shopai.events.privacy import digest, identifying, pseudonym, scrub
from shopai.events.wire import Door, Refused, WireEvent, read_event, read_time

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
KEY = b"a secret of the shop"
DOOR = Door(key=KEY)
MARKERS = ("janemarker", "81.2.69.142", "+4915112345678", "doemarker")  # what must never be seen behind the door

# Texts full of what the patterns look for, and of what merely resembles it.
risky = st.lists(st.sampled_from([
    "jane@example.com", "a@b", "%40", "@", "81.2.69.142", "2001:db8::1", "::", ":", ".", "-", "/", "(", ")", "+", "00", "0171", "2345678", "555-123-4567",
    "+49", "1", "2026-01-31", "12:30", " ", "x", "é", "\u00a0", "[ip]", "p-", "٣"]), max_size=8).map("".join)


# Privacy

@example("1.2.3.4::1")  # the second address shows only when the first is gone
@settings(max_examples=300, deadline=None)
@given(risky | st.text(max_size=40))
def test_scrubbing_twice_changes_nothing_more(text: str):
    assert scrub(scrub(text)) == scrub(text)


@settings(max_examples=200, deadline=None)
@given(risky | st.text(max_size=40))
def test_a_pseudonym_stays_and_names_nobody(text: str):
    stand_in = pseudonym(text, KEY)
    assert pseudonym(stand_in, KEY) == stand_in
    assert pseudonym(f" {text.lower()} ", KEY) == stand_in or text.lower().lower() != text.lower()
    assert not identifying(stand_in)


around = st.lists(st.sampled_from(["order", "call", "shoes,", "size 42", "of", "(", ")", "–", "ß", ":", ";"]))
addresses = [
    "jane.doe@example.com", "jane%40example.com", "81.2.69.142", "2001:db8::8a2e", "+49 151 12345678", "0049-151-12345678", "(030) 1234567", "555-123-4567"]


@settings(max_examples=200, deadline=None)
@given(around, st.sampled_from(addresses), around)
def test_an_address_is_found_wherever_it_stands(before: list[str], address: str, after: list[str]):
    assert address not in scrub(" ".join([*before, address, *after]))
    assert identifying(address)


@given(st.integers(0, 10**12).map(lambda n: str(n)) | st.uuids().map(str) | st.uuids().map(lambda u: u.hex) | st.integers(1, 10**6).map(lambda n: f"u-{n}")
       | st.tuples(st.integers(10**8, 2**31), st.integers(1_500_000_000, 1_999_999_999)).map(lambda pair: f"{pair[0]}.{pair[1]}"))
def test_opaque_ids_name_nobody(text: str):
    assert not identifying(text)


@pytest.mark.parametrize("piece", ["0", "a@", "1.", "1:", ":", "0 ", "a-", "(0", "+1", "%40a.", "1.1.1.1 ", "1::", "a", "[", "00"])
def test_a_hostile_text_takes_no_longer(piece: str):
    text = piece * (200_000 // len(piece)) + "!"
    start = time.process_time()
    scrub(text), identifying(text)
    assert time.process_time() - start < 2  # a pattern that looks back over what it has seen would take minutes


# The door

def test_the_door_needs_no_data_frames():
    heavy = {"duckdb", "narwhals", "numpy", "pandas", "pyarrow"}
    script = f"import sys, shopai.events.wire; print(sorted({{name.partition('.')[0] for name in sys.modules}} & {heavy}))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60).stdout == "[]\n"


def test_a_door_can_travel_and_keeps_its_secret():
    door = Door.from_settings(Settings(pseudonym_key="a secret of the shop", unsaid_consent="given"), ip="81.2.69.142")
    assert pickle.loads(pickle.dumps(door)) == door  # noqa: S301 - Spark sends it to its workers
    assert "secret" not in repr(door)


scalars = (st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=20) | risky | st.sampled_from(MARKERS)
           | st.text(min_size=500, max_size=520))
anything = scalars | st.lists(scalars, max_size=2) | st.dictionaries(st.text(max_size=8), scalars | st.lists(scalars, max_size=1), max_size=2)

# Sound values of each field, so that what is sent is an event most of the time; one or two fields may hold anything at all.
ids = st.sampled_from(["12583", "u-42", "jane@example.com", " ", 7, 7.0]) | risky
words = st.sampled_from(["red shoes", "call +49 151 12345678", "Köln", ""]) | risky
amounts = st.sampled_from([0, 1, 2.5, "3.99"]) | st.floats(0, 1e6)
TIMES = ["2026-01-31T11:59:00Z", "2026-01-31T12:30:00+01:00", 1769860740000000, "1769860740000000", "2026-01-31T11:00:00.123456Z"]
FLAGS = [True, False, {"analytics": True}, {"analytics": False, "personalization": True}, {"analytics_storage": "granted", "ad_personalization": "DENIED"}]
times, flags = st.sampled_from(TIMES), st.sampled_from(FLAGS)


def of(**fields: st.SearchStrategy) -> st.SearchStrategy: return st.fixed_dictionaries({}, optional=fields)


def items(item_id: str, position: str) -> st.SearchStrategy:
    item = st.fixed_dictionaries({item_id: ids.filter(lambda value: str(value).strip())}, optional={
        "quantity": amounts, "price": amounts, position: amounts, "propensity": st.floats(0, 1)})
    return st.lists(item, max_size=3)


@st.composite
def spoilt(draw: st.DrawFn, name: str, told: st.SearchStrategy) -> dict:
    "An event of which up to two fields hold anything."
    raw = {name: draw(st.sampled_from([*EVENT_NAMES, *SEGMENT_ALIASES])), **draw(told)}
    for field in draw(st.lists(st.sampled_from(sorted(raw)), max_size=2) if draw(st.booleans()) else st.just([])):
        inner = sorted(raw[field]) if isinstance(raw[field], dict) else []
        if inner: raw[field] = {**raw[field], draw(st.sampled_from(inner)): draw(anything)}
        else: raw[field] = draw(anything)
    return raw


identifiers = {name: ids for name in ("event_id", "user_id", "anonymous_id", "session_id", "transaction_id", "request_id", "item_id", "email")}
connection = {"ip": st.sampled_from(["81.2.69.142", "::1", "unknown"]), "user_agent": words}
canonical = spoilt("event_name", of(
    event_time=times, sent_at=times, currency=st.just("EUR"), search_term=words, city=words, campaign=words, consent=flags, analytics=st.booleans(),
    is_bot=st.booleans(), phone=words, items=items("item_id", "position"), price=amounts, **identifiers, **connection))
ga4 = spoilt("name", of(
    event_id=ids, timestamp_micros=times, client_id=ids, consent=flags,
    params=of(ga_session_id=ids, transaction_id=ids, currency=st.just("EUR"), search_term=words, medium=words, items=items("item_name", "index"), email=ids)))
segment = spoilt("event", of(
    messageId=ids, timestamp=times, originalTimestamp=times, sentAt=times, userId=ids, anonymousId=ids,
    properties=of(order_id=ids, query=words, products=items("sku", "position"), product_id=ids, price=amounts),
    context=of(ip=st.just("::1"), userAgent=words, campaign=of(name=words))))


doors = st.sampled_from([DOOR, Door(), Door(key=KEY, ip="unix", user_agent="u" * 900, sent_at=NOON - timedelta(hours=1))])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(canonical, ga4, segment, anything.map(lambda value: value)), doors)  # the map keeps `anything` one choice of four
def test_whatever_comes_is_taken_or_refused_in_one_line(raw: object, door: Door):
    try: event = read_event(raw, NOON, door)
    except Refused as refused:
        assert len(str(refused)) < 700 and str(refused).isprintable()
        assert str(refused).partition(":")[0]
        return
    record = event.to_json()
    assert record.startswith(b'{"v":1,') and b"\n" not in record
    assert event.key
    again = read_event(json.loads(record), NOON, Door(key=door.key))
    assert (again.to_json(), again.notes) == (record, [])
    assert not decode([Record(0, 0, event.key, record)], door).dead


janes = st.sampled_from([
    "JaneMarker@example.com", "Jane DoeMarker", "+4915112345678", "81.2.69.142", "ask JaneMarker@example.com!", "0049 151 12345678 DoeMarker"])
JANE_FIELDS = [
    "event_id", "user_id", "anonymous_id", "session_id", "transaction_id", "email", "name", "first_name", "phone", "address", "birthday", "price", "currency",
    "event_time", "consent", "items", "quantity", "item_id", "is_bot", "request_id"]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([DOOR, Door()]), st.dictionaries(st.sampled_from(JANE_FIELDS), janes, max_size=4))
def test_neither_record_nor_reason_nor_note_names_anyone(door: Door, told: dict):
    raw = {"event_name": "Order Completed", **told}
    raw = {name: value for name, value in raw.items() if name != "item_id" or "@" in value}  # a name as an item id can't be told from an item's name
    try:
        event = read_event(raw, NOON, door)
        seen = event.to_json().decode() + " ".join(event.notes) + event.key
    except Refused as refused: seen = str(refused)
    assert not [marker for marker in MARKERS if marker in seen.lower()]


@pytest.mark.parametrize("field", ["search_term", "channel", "campaign", "device_type", "country", "region", "city", "timezone"])
def test_free_text_is_scrubbed(field: str):
    event = read_event({"event_name": "search", field: "ask JaneMarker@example.com at 81.2.69.142 or +4915112345678"}, NOON, Door())
    assert getattr(event, field) == "ask [email] at [ip] or [phone]"


def test_an_unknown_name_is_not_told_on():
    for raw in ({"event_name": "JaneMarker@example.com"}, {"name": "Jane DoeMarker"}, {"event": "bought by JaneMarker@example.com"}):
        with pytest.raises(Refused) as refused: read_event(raw, NOON, DOOR)
        assert "marker" not in str(refused.value).lower()


@pytest.mark.parametrize(("raw", "expected"), [
    ({}, NOON),  # no time: now
    ({"event_time": "2026-01-31T12:04:59Z"}, NOON + timedelta(seconds=299)),  # a little ahead
    ({"event_time": "2026-01-31T11:00:00Z", "sent_at": "2026-01-31T12:00:59Z"}, NOON - timedelta(hours=1)),  # the network's delay
    ({"event_time": "2026-01-31T11:00:00Z", "sent_at": "2026-01-31T12:01:01Z"}, NOON - timedelta(hours=1, seconds=61)),  # a clock that is fast
    ({"event_time": "2031-01-31T11:00:00Z", "sent_at": "2031-01-31T12:00:00Z"}, NOON - timedelta(hours=1)),  # a clock five years fast
    ({"event_time": "1990-01-01T00:00:00Z", "sent_at": "1990-01-01T00:00:05Z"}, NOON - timedelta(seconds=5)),  # a clock that was never set
])
def test_clocks_are_set_right(raw: dict, expected: datetime):
    assert read_event({"event_name": "view_cart", **raw}, NOON, DOOR).event_time == expected


def test_a_corrected_time_is_not_corrected_again():
    raw = {"event": "Cart Viewed", "timestamp": "2026-01-31T11:59:00Z", "originalTimestamp": "2026-01-31T09:59:00Z", "sentAt": "2026-01-31T10:00:00Z"}
    assert read_event(raw, NOON, DOOR).event_time == NOON - timedelta(minutes=1)
    del raw["timestamp"]
    assert read_event(raw, NOON, DOOR).event_time == NOON - timedelta(minutes=1)


@pytest.mark.parametrize("time", ["2026-01-31T12:05:01Z", "9999-12-31T12:00:00Z", "9999-12-31T23:59:59-10:00", "0001-01-01T00:00:00+14:00",
                                  "2026-01-31T12:00:00", "31.01.2026", 1769860800, 1e300, True, []])
def test_other_times_are_refused(time: object):
    raw = {"event_name": "view_cart", "event_time": time}
    with pytest.raises(Refused, match="^event_time: must"): read_event(raw, NOON, DOOR)
    with pytest.raises(Refused, match="^event_time: must"): read_event(raw | {"sent_at": "1990-01-01T00:00:00Z"}, NOON, DOOR)  # nor does a correction overflow


def test_limits_are_inclusive():
    item = {"item_id": "i" * 128, "propensity": 1, "price": 0, "position": 0}
    event = {"event_name": "search", "search_term": "x" * 256, "user_id": "u" * 128, "user_agent": "m" * 512, "items": [item] * 200}
    assert len(read_event(event, NOON, DOOR).items) == 200
    for name, too_long in (("search_term", "x" * 257), ("user_id", "u" * 129), ("user_agent", "m" * 513)):
        with pytest.raises(Refused, match=f"^{name}: must have at most"): read_event(event | {name: too_long}, NOON, DOOR)
    wrong = [{"propensity": 1.01}, {"propensity": -.01}, {"quantity": float("nan")}, {"quantity": -1}, {"price": float("inf")}, {"price": True},
             {"position": -1}, {"item_id": " "}]
    for item in [*({"item_id": "a", **fields} for fields in wrong), {}, "a", None]:
        with pytest.raises(Refused, match=r"^items\[1\]"): read_event(event | {"items": [{"item_id": "fine"}, item]}, NOON, DOOR)


def test_numbers_that_stand_for_texts_are_read_as_data_frames_write_them():
    event = read_event({"event_name": "view_item", "user_id": 12583.0, "item_id": 85123.0, "price": "2.50"}, NOON, DOOR)
    assert (event.user_id, event.items[0].item_id, event.items[0].price) == ("12583", "85123", 2.5)


# Decode

KINDS = [
    {"event_name": "purchase", "transaction_id": "T-{}", "items": [{"item_id": "a", "quantity": 1, "price": 2}, {"item_id": "b"}]},
    {"event_name": "search", "search_term": "jane@example.com {}"},
    {"event_name": "view_item", "item_id": "i-{}", "ip": "81.2.69.142", "user_agent": "Mozilla"},
    {"event_name": "view_cart", "user_id": "Jane {}", "consent": False}]


def raws(count: int) -> list[dict]:
    common = [{"event_id": f"e{i}", "event_time": "2026-01-31T11:59:00Z", "anonymous_id": f"a-{i % 3}", "consent": True} for i in range(count)]
    return [json.loads(json.dumps(fields | KINDS[i % 4]).replace("{}", str(i))) for i, fields in enumerate(common)]


def on_bus(values: list[bytes]) -> list[Record]: return [Record(i % 2, i, None, value) for i, value in enumerate(values)]


GOOD = on_bus([read_event(raw, NOON, DOOR).to_json() for raw in raws(20)])
FIRST = GOOD[0].value
POISON = [
    b"", b"oh", b"{}", b"[]", b"null", b'{"v":1,}', b'{"v":1,"event_id":"x"}', b'{"v":2,"event_name":"search"}', b"\x00\x01", b"[" * 100_000,
    b'{"v":1,"event_name":' + b'{"a":' * 50_000 + b"}", FIRST[:-1], FIRST + GOOD[1].value[:-1], FIRST + FIRST, FIRST.replace(b"e0", b"\xff"),
    FIRST.replace(b'"e0"', b'"\\ud800"'), FIRST.replace(b'"quantity":1.0', b'"quantity":"many"'), FIRST.replace(b"2026-01-31T11", b"yesterday")]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(canonical | ga4 | segment, max_size=6), st.sampled_from([DOOR, Door(), Door(unsaid_consent="given")]))
def test_fast_and_slow_path_give_the_same_rows(events: list[dict], door: Door):
    known = []
    for i, raw in enumerate(events):
        raw = raw | {"event_id": f"e{i}", "messageId": f"e{i}", "received_at": NOON.isoformat()}
        try: known.append((json.dumps(raw).encode(), read_event(raw, NOON, door).to_json()))
        except Refused: pass
    fast = decode(on_bus([record for _, record in known]), door)
    one_by_one = [decode([record], door).rows for record in on_bus([record for _, record in known])]
    through_door = decode(on_bus([raw for raw, _ in known]), door)
    assert not fast.dead and not through_door.dead
    assert fast.rows.equals(pa.concat_tables([WIRE.empty_table(), *one_by_one]))
    assert fast.rows.equals(through_door.rows)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.sampled_from(POISON)), max_size=4))
def test_a_broken_record_hurts_nobody_else(poison: list[tuple[int, bytes]]):
    values: list[bytes | int] = list(range(20))
    for place, value in poison: values.insert(place, value)
    records = [GOOD[value]._replace(offset=i) if isinstance(value, int) else Record(0, i, None, value) for i, value in enumerate(values)]
    decoded = decode(records, DOOR)
    assert [record.value for record, _ in decoded.dead] == [value for value in values if not isinstance(value, int)]
    assert decoded.rows.drop(["offset"]).equals(decode(GOOD, DOOR).rows.drop(["offset"]))


@st.composite
def bytes_on_a_bus(draw: st.DrawFn) -> bytes:
    "Noise, a good record with a few bytes overwritten, or JSON of anything."
    if draw(st.booleans()): return draw(st.binary(max_size=30) | (anything | canonical | ga4).map(lambda value: json.dumps(value).encode()))
    value, place, noise = draw(st.sampled_from(GOOD)).value, draw(st.integers(0, 300)), draw(st.binary(max_size=3))
    return value[:place] + noise + value[place + len(noise):]


@example([FIRST[:-1] + b',"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"], 1)  # deeper than Python's stack
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(bytes_on_a_bus(), max_size=8), st.integers(1, 4))
def test_every_record_is_read_or_dead_and_the_cut_does_not_matter(values: list[bytes], cut: int):
    records = on_bus(values)
    whole = decode(records, DOOR)
    read, dead = set(whole.rows["offset"].to_pylist()), [record.offset for record, _ in whole.dead]
    assert sorted([*read, *dead]) == list(range(len(records)))
    parts = [decode(records[i:i + cut], DOOR).rows for i in range(0, len(records), cut)]
    assert [row for part in parts for row in part["event_id"].to_pylist()] == whole.rows["event_id"].to_pylist()
    assert whole.rows.schema == WIRE
    whole.rows.validate(full=True)


def test_what_breaks_a_rule_is_quarantined_with_the_contracts_reason():
    values = [GOOD[0].value.replace(b'"price":2.0', b'"price":-2.0'), GOOD[1].value.replace(b'"search"', b'"serach"'), GOOD[2].value]
    decoded = decode(on_bus(values), DOOR)
    checked = validate(decoded.rows.select([name for name in WIRE.names if name in EVENTS.names]).to_pandas(), "events")
    assert (decoded.dead, len(checked.accepted)) == ([], 2)  # the purchase's second item and the view
    assert sorted(checked.reasons.index) == ["event_name: must be a known event, such as purchase", "price: must be ≥ 0"]


def test_a_record_without_an_id_has_the_same_one_each_time():
    values = [b'{"event_name":"view_cart","event_time":"2026-01-31T12:00:00Z"}'] * 2
    first, again = (decode(on_bus(values), DOOR).rows["event_id"].to_pylist() for _ in range(2))
    assert first == again and len(set(first)) == 2


@pytest.mark.parametrize("key", [KEY, None])
@pytest.mark.parametrize("consent", ["true", "false"])
def test_rows_name_nobody_whoever_wrote_the_record(key: bytes | None, consent: str):
    told = "JaneMarker@example.com"
    fields = dict.fromkeys((*WireEvent.model_fields, "email", "name"), told)
    fields |= {"event_name": "search", "event_time": "2026-01-31T12:00:00Z", "items": [{"item_id": told}]}
    for name in ("received_at", "analytics", "personalisation", "is_bot", "currency", "ip", "user_agent", "notes"): del fields[name]
    value = json.dumps({"v": 1, **fields}, separators=(",", ":"))[:-1] + f',"analytics":{consent}}}'
    slow, fast = value.encode(), value.replace(told, "opaque", 1).encode()  # an event id that names someone takes the slow path
    decoded = decode([Record(0, 0, told, slow), Record(0, 1, told, fast)], Door(key=key))
    assert (decoded.dead, decoded.rows.num_rows) == ([], 2)
    assert "marker" not in str(decoded.rows.to_pylist()).lower()


def test_without_consent_no_column_links_two_events():
    raw = {"event_name": "view_item", "item_id": "shoe"} | dict.fromkeys(("user_id", "anonymous_id", "session_id", "transaction_id", "request_id"), "one-1")
    rows = decode(on_bus([read_event(raw | {"event_id": f"e{i}"}, NOON, DOOR).to_json() for i in range(2)]), DOOR).rows
    values = {value for name in WIRE.names for value in rows[name].to_pylist() if isinstance(value, str)}
    assert values == {"view_item", "shoe", *rows["event_id"].to_pylist()}
    assert rows["event_id"].to_pylist() == [f"x-{digest(f'e{i}', KEY)}" for i in range(2)]


@settings(max_examples=300, deadline=None)
@given(risky | st.text(max_size=30))
def test_no_pattern_overlooks_what_its_function_would_change(text: str):
    column = pa.array([text])
    assert not identifying(text) or pc.match_substring_regex(column, decode_module._ID_SUSPECT)[0].as_py()
    assert scrub(text) == text or pc.match_substring_regex(column, decode_module._TEXT_SUSPECT)[0].as_py()
    assert each_distinct(column, scrub).to_pylist() == each_distinct(column, scrub, decode_module._TEXT_SUSPECT).to_pylist()


def test_hashes_are_the_same_everywhere():
    assert hash64(["e1", "é", ""]).tolist() == hash64(pa.array(["e1", "é", ""])).tolist()
    script = "from shopai.events.decode import hash64; print(hash64(['e1', 'é', '']).tolist())"  # another process, with another seed of Python's own hash
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60).stdout
    assert json.loads(told) == hash64(["e1", "é", ""]).tolist()


def test_times_are_read_to_the_microsecond():
    assert read_time("2026-01-31T12:00:00.123456Z", "x") == NOON + timedelta(microseconds=123456)
    event = WireEvent(event_id="e", event_name="search", event_time=NOON + timedelta(microseconds=1), received_at=NOON)
    assert decode(on_bus([event.to_json()]), DOOR).rows["event_time"].to_pylist() == [NOON + timedelta(microseconds=1)]
