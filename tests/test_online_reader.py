"""The reader of the online store finds what Feast wrote, says when it can't, and never gives one customer's features to another."""

import contextlib
import os
import socket
import sqlite3
import string
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import redis
from conftest import ROOT
from feast_store import Feast, free_port, micros, redis_at, stop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shopai.core.config import UsageError
from shopai.features.catalogue import SECOND, VIEWS, Derived, Feature, View
from shopai.features.online import ItemVectors, Reader, StoreUnavailable, entity_key, open_reader

NOW = micros("2026-03-02T10:30")
PATIENT = 5.0  # seconds; the machine may be busy


def view_of(name: str, keys: tuple[str, ...], dtypes: dict[str, str], days: float = 30, derived: tuple[Derived, ...] = ()) -> View:
    "A view of this file's own."
    return View(name, keys, tuple(Feature(feature, dtype, "", feature) for feature, dtype in dtypes.items()), derived, timedelta(days=days), "tests", name)


MIXED = view_of("mixed", ("user_id",), {"n": "number", "w": "whole", "f": "flag", "t": "text", "v": "vector", "größe": "number"},
                  derived=(Derived("twice", "number", "", "", ("n",), lambda at, n: 2 * n),))
BESIDE = view_of("beside", ("user_id",), {"t": "text", "w": "whole"}, days=1)
SEASON = view_of("season", ("week", "category"), {"n": "number"})
ITEMS = view_of("items", ("item_id",), {"vector": "vector"})
NEVER = view_of("never", ("user_id",), {"n": "number"})  # Feast isn't told of it
WRITTEN = [MIXED, BESIDE, SEASON, ITEMS]


@pytest.fixture(scope="module")
def shared_redis() -> str:
    "Address of the Redis of this machine."
    try: redis.Redis("127.0.0.1", 6379, socket_timeout=5).ping()
    except redis.RedisError: pytest.skip("no Redis on 127.0.0.1:6379")
    return "127.0.0.1:6379"


@pytest.fixture(scope="module", params=["sqlite", "redis", "guarded sqlite", "guarded redis"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Feast, Reader]]:
    "Feast, and the reader of its online store: Feast's own stores, and the shop's, which guard newer rows."
    folder, project = tmp_path_factory.mktemp("store"), f"reader{uuid.uuid4().hex[:8]}"
    address = request.getfixturevalue("shared_redis") if "redis" in request.param else None
    feast = Feast(folder, project, WRITTEN, address, guarded="guarded" in request.param)
    reader = open_reader(f"redis://{address}/0" if address else f"sqlite:///{folder}/online.db", project, PATIENT)
    yield feast, reader
    reader.close()
    feast.store.teardown()


def same(ours: object, theirs: object) -> bool:
    "Missing is None here; Feast tells NaN apart, and gives a vector as a list of numbers."
    if isinstance(ours, np.ndarray): return ours.dtype == np.float32 and ours.tolist() == theirs
    return type(ours) is type(theirs) and ours == theirs or (ours is None and theirs != theirs)


def moment_of(feast: Feast, at: int) -> int:
    "The clock of a row, as the store keeps it."
    return at // SECOND * SECOND if feast.store.config.online_store.type == "sqlite" else at


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
# Feast writes whole numbers as floats where one of the batch is missing: beyond 2⁵³ it writes others, or fails.
VALUES = {"n": st.floats(allow_nan=True), "w": st.integers(-2**53, 2**53), "f": st.booleans(), "t": TEXT, "größe": st.floats(allow_nan=False),
          "v": st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=70)}
ROW = st.fixed_dictionaries({name: st.none() | values for name, values in VALUES.items()})
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@QUICK
@given(st.lists(st.tuples(TEXT, ROW), min_size=1, max_size=4))
def test_every_value_that_feast_wrote_is_read(both: tuple[Feast, Reader], rows: list[tuple[str, dict]]):
    feast, reader = both
    keys = [{"user_id": f"{user}{uuid.uuid4().hex}"} for user, _ in rows]
    feast.write("mixed", [(key, values, NOW + 123_456 + place) for place, (key, (_, values)) in enumerate(zip(keys, rows, strict=True))])
    for place, (mine, theirs) in enumerate(zip(reader.get_many(MIXED, keys, NOW + SECOND), feast.read("mixed", keys), strict=True)):
        assert (mine.status, mine.at) == ("fresh", moment_of(feast, NOW + 123_456 + place))
        assert [name for name in MIXED.names if not same(mine.values[name], theirs[name])] == []
        assert mine.values["twice"] == (None if mine.values["n"] is None else 2 * mine.values["n"])
        alone = reader.get(MIXED, keys[place], NOW + SECOND)
        assert (alone.status, alone.at, repr(alone.values)) == (mine.status, mine.at, repr(mine.values))


@QUICK
@given(st.lists(st.tuples(TEXT, st.integers(-2**63, 2**63 - 1)), min_size=1, max_size=4, unique=True))
def test_an_entity_of_two_keys_is_found(both: tuple[Feast, Reader], pairs: list[tuple[str, int]]):
    feast, reader = both
    mark = uuid.uuid4().hex
    keys = [{"week": week, "category": f"{category}{mark}"} for category, week in pairs]
    feast.write("season", [(key, {"n": float(place)}, NOW) for place, key in enumerate(keys)])
    assert [looked.values["n"] for looked in reader.get_many(SEASON, keys, NOW)] == [float(place) for place in range(len(keys))]
    turned = [{"category": key["category"], "week": key["week"]} for key in keys]
    assert [answer["n"] for answer in feast.read("season", keys)] == [looked.values["n"] for looked in reader.get_many(SEASON, turned, NOW)]


@QUICK
@given(TEXT, st.integers(-2**63, 2**63 - 1))
def test_keys_are_spelled_as_feast_does(category: str, week: int):
    from feast.infra.key_encoding_utils import serialize_entity_key
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value
    theirs = EntityKey(join_keys=["week", "category"], entity_values=[Value(int64_val=week), Value(string_val=category)])
    assert entity_key(SEASON)({"category": category, "week": week}) == serialize_entity_key(theirs, 3)


def test_a_column_without_any_value_is_missing(both: tuple[Feast, Reader]):
    feast, reader = both
    key = {"user_id": uuid.uuid4().hex}
    feast.write("mixed", [(key, {}, NOW)])
    looked = reader.get(MIXED, key, NOW)
    assert (looked.status, set(looked.values.values())) == ("fresh", {None})
    assert set(feast.read("mixed", [key])[0].values()) == {None}


def test_views_of_one_entity_come_together(both: tuple[Feast, Reader]):
    feast, reader = both
    key = {"user_id": uuid.uuid4().hex}
    feast.write("mixed", [(key, {"n": 1.5, "t": "mixed"}, NOW)])
    feast.write("beside", [(key, {"w": 7, "t": "beside"}, NOW - 2 * 86_400 * SECOND)])
    feast.write("season", [({"week": 3, "category": key["user_id"]}, {"n": 9.0}, NOW)])
    answers = reader.entity({**key, "week": 3, "category": key["user_id"]}, [MIXED, BESIDE, SEASON, NEVER], NOW)
    assert {name: looked.status for name, looked in answers.items()} == {"mixed": "fresh", "beside": "stale", "season": "fresh", "never": "unknown"}
    assert (answers["mixed"].values["t"], answers["mixed"].values["twice"], answers["season"].values["n"]) == ("mixed", 3.0, 9.0)
    assert answers["beside"].values == {"t": None, "w": None}
    earlier = reader.entity(key, [MIXED, BESIDE], NOW - 86_400 * SECOND)
    assert (earlier["mixed"].values["n"], earlier["beside"].values) == (1.5, {"t": "beside", "w": 7})
    assert earlier["beside"] == reader.get(BESIDE, key, NOW - 86_400 * SECOND)


def test_a_row_counts_to_the_end_of_its_age_limit(both: tuple[Feast, Reader]):
    feast, reader = both
    key, last = {"user_id": uuid.uuid4().hex}, NOW + BESIDE.ttl_us
    feast.write("beside", [(key, {"w": 1}, NOW)])
    assert [reader.get(BESIDE, key, at).status for at in (NOW - 1, NOW, last, last + 1)] == ["fresh", "fresh", "fresh", "stale"]


def test_the_clock_is_the_same_in_any_time_zone(both: tuple[Feast, Reader], monkeypatch: pytest.MonkeyPatch):
    feast, reader = both
    key = {"user_id": uuid.uuid4().hex}
    try:
        monkeypatch.setenv("TZ", "America/St_Johns")
        time.tzset()
        feast.write("mixed", [(key, {"w": 1}, NOW)])
        assert reader.get(MIXED, key, NOW).at == NOW
    finally:
        monkeypatch.undo()
        time.tzset()


def test_who_is_not_there_is_unknown(both: tuple[Feast, Reader]):
    feast, reader = both
    known = {"user_id": uuid.uuid4().hex}
    feast.write("mixed", [(known, {"w": 1}, NOW)])
    stranger = {"user_id": "nobody"}
    assert [looked.status for looked in reader.get_many(MIXED, [stranger, known, stranger, known], NOW)] == ["unknown", "fresh", "unknown", "fresh"]
    assert reader.get(MIXED, stranger, NOW).values == dict.fromkeys(MIXED.all_names)
    assert reader.get(NEVER, known, NOW).status == "unknown"
    assert reader.get(MIXED, {"user_id": "\ud800"}, NOW).status == "unknown"
    assert reader.get_many(MIXED, [], NOW) == []


def test_vectors_come_in_the_order_asked_whatever_their_number(both: tuple[Feast, Reader]):
    feast, reader = both
    mark, values = uuid.uuid4().hex, np.random.default_rng(0).normal(size=(1_100, 8)).astype(np.float32)
    feast.write("items", [({"item_id": f"{mark}{n}"}, {"vector": values[n]}, NOW) for n in range(1_100)])
    asked = [f"{mark}{n}" for n in range(1_200)][::-1]
    ids, found = reader.vectors(ITEMS, asked, NOW)
    assert ids == asked[100:]
    np.testing.assert_array_equal(found, values[::-1])
    assert reader.vectors(ITEMS, ["nothing"], NOW)[1].shape == (0, 0)
    assert reader.vectors(ITEMS, asked, NOW + ITEMS.ttl_us + 1)[0] == []
    loaded = ItemVectors.load(reader, ITEMS, asked, NOW)
    cosines = (values @ values[5]) / np.linalg.norm(values, axis=1) / np.linalg.norm(values[5])
    expected = [f"{mark}{n}" for n in np.argsort(-cosines) if n != 5][:10]
    assert [item for item, _ in loaded.similar(f"{mark}5", 10)] == expected
    feast.write("items", [({"item_id": f"{mark}0"}, {"vector": values[0, :5]}, NOW + 1)])
    with pytest.raises(StoreUnavailable, match="vectors of \\[5, 8\\] numbers"): reader.vectors(ITEMS, asked, NOW)


def test_threads_share_a_reader(both: tuple[Feast, Reader]):
    "…while features are written: each customer gets its own, and a row is never a mix of two."
    feast, reader = both
    keys = [{"user_id": f"{uuid.uuid4().hex}"} for _ in range(20)]
    def write(version: int):
        values = {"n": float(version), "größe": float(version)}
        feast.write("mixed", [(key, {"w": place, **values}, NOW + version) for place, key in enumerate(keys)])

    def look(seed: int):
        for turn in range(100):
            place = (seed * 31 + turn) % 20
            values = reader.get(MIXED, keys[place], NOW).values
            assert values["w"] == place and values["n"] == values["größe"]
        assert [looked.values["w"] for looked in reader.get_many(MIXED, keys, NOW)] == [*range(20)]

    write(0)
    if feast.store.config.online_store.type == "sqlite":  # the shop's own does that by itself
        with contextlib.closing(sqlite3.connect(feast.store.config.online_store.path)) as connection: connection.execute("PRAGMA journal_mode=WAL")
    with ThreadPoolExecutor(8) as pool:
        looking = [pool.submit(look, seed) for seed in range(8)]
        for version in range(1, 6): write(version)
        for each in looking: each.result(timeout=120)
    reader.close()
    look(0)  # and opens again


# SQLite


def by_hand(path: Path, value: int, users: tuple[str, ...] = ("u1",), journal: str = "wal", made: int | None = None) -> Path:
    "A store with one feature of `beside`, as Feast lays it out."
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"PRAGMA journal_mode={journal}")
        columns = "entity_key BLOB, feature_name TEXT, value BLOB, event_ts timestamp, created_ts timestamp, PRIMARY KEY(entity_key, feature_name)"
        connection.execute(f"CREATE TABLE shopai_beside ({columns})")
        rows = [(entity_key(BESIDE)({"user_id": user}), "w", bytes([0x20, value]), NOW // SECOND, made) for user in users]
        connection.executemany("INSERT INTO shopai_beside VALUES (?, ?, ?, ?, ?)", rows)
    return path


def of_user(reader: Reader, user: str = "u1") -> object: return reader.get(BESIDE, {"user_id": user}, NOW).values["w"]


def test_a_file_that_is_missing_may_come_and_go(tmp_path: Path):
    path = tmp_path / "online.db"
    reader = open_reader(f"sqlite:///{path}", timeout=PATIENT)
    with pytest.raises(StoreUnavailable, match="no such file"): of_user(reader)
    assert list(tmp_path.iterdir()) == []  # looking makes no file
    by_hand(path, 1)
    assert of_user(reader) == 1
    os.replace(by_hand(tmp_path / "new.db", 2), path)
    assert of_user(reader) == 2
    for file in tmp_path.iterdir(): file.unlink()
    with pytest.raises(StoreUnavailable, match="no such file"): of_user(reader)


@pytest.mark.parametrize("name", ["with space.db", "100%41.db", "a?mode=rw#b.db", "größe.db"])
def test_a_path_may_have_any_letters(tmp_path: Path, name: str):
    assert of_user(open_reader(f"sqlite:///{by_hand(tmp_path / name, 3)}", timeout=PATIENT)) == 3


@pytest.mark.parametrize("damage", ["garbage", "half", "folder", "other columns"])
def test_what_can_not_be_read_is_told_in_a_line(tmp_path: Path, damage: str):
    path = tmp_path / "online.db"
    if damage == "folder": path.mkdir()
    else: by_hand(path, 1, tuple(f"u{n}" for n in range(2_000)), journal="delete")
    content = b"" if damage == "folder" else path.read_bytes()
    if damage == "garbage": path.write_bytes(b"no database at all, but long enough to be taken for one" * 100)
    if damage == "half": path.write_bytes(content[:len(content) // 2])
    if damage == "other columns":
        with contextlib.closing(sqlite3.connect(path)) as connection: connection.execute("ALTER TABLE shopai_beside RENAME COLUMN value TO worth")
    reader = open_reader(f"sqlite:///{path}", timeout=PATIENT)
    with pytest.raises(StoreUnavailable) as told: reader.get_many(BESIDE, [{"user_id": f"u{n}"} for n in range(2_000)], NOW)
    assert "\n" not in str(told.value) and str(path) in str(told.value)
    if damage != "folder":  # and is well again when the file is
        path.unlink()
        path.write_bytes(content) if damage != "other columns" else by_hand(path, 1)
        assert of_user(reader) == 1


def test_a_locked_file_is_told_and_a_writer_that_logs_ahead_is_not_waited_for(tmp_path: Path):
    reader = open_reader(f"sqlite:///{by_hand(tmp_path / 'locked.db', 1, journal='delete')}", timeout=.05)
    with contextlib.closing(sqlite3.connect(tmp_path / "locked.db", isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreUnavailable, match="locked"): of_user(reader)
        writer.execute("ROLLBACK")
    assert of_user(reader) == 1
    reader = open_reader(f"sqlite:///{by_hand(tmp_path / 'ahead.db', 1)}", timeout=.05)
    with contextlib.closing(sqlite3.connect(tmp_path / "ahead.db", isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        writer.execute("UPDATE shopai_beside SET value = x'2002'")
        assert of_user(reader) == 1
        writer.execute("COMMIT")
        assert of_user(reader) == 2


@pytest.mark.parametrize(("made", "at"), [(None, NOW), (NOW // SECOND + 60, NOW), (NOW + 123_456, NOW + 123_456)], ids=["none", "when written", "exact clock"])
def test_the_exact_clock_counts_where_there_is_one(tmp_path: Path, made: int | None, at: int):
    reader = open_reader(f"sqlite:///{by_hand(tmp_path / 'online.db', 1, made=made)}", timeout=PATIENT)
    assert reader.get(BESIDE, {"user_id": "u1"}, NOW).at == at


def test_nothing_is_ever_written(tmp_path: Path):
    path = by_hand(tmp_path / "online.db", 1)
    reader = open_reader(f"sqlite:///{path}", timeout=PATIENT)
    assert of_user(reader) == 1
    with pytest.raises(sqlite3.OperationalError, match="readonly"): reader._connection().execute("DELETE FROM shopai_beside")


# Redis


@pytest.fixture
def server() -> Iterator[tuple[int, list[subprocess.Popen]]]:
    "The port of a Redis of the test's own, with the processes that a test may stop and start."
    port = free_port()
    running = [redis_at(port)]
    yield port, running
    for process in running: stop(process)


def put(port: int, user: str, value: int, project: str = "shopai") -> bytes:
    import mmh3
    from google.protobuf.timestamp_pb2 import Timestamp
    key = entity_key(BESIDE)({"user_id": user}) + project.encode()
    fields = {struct.pack("<I", mmh3.hash("beside:w", signed=False)): bytes([0x20, value]), "_ts:beside": Timestamp(seconds=NOW // SECOND).SerializeToString()}
    with contextlib.closing(redis.Redis("127.0.0.1", port)) as client: client.hset(key, mapping=fields)
    return key


def test_a_server_that_stops_is_told_and_found_again(server: tuple[int, list[subprocess.Popen]]):
    port, running = server
    reader = open_reader(f"redis://127.0.0.1:{port}/0", timeout=PATIENT)
    put(port, "u1", 1)
    assert of_user(reader) == 1
    stop(running.pop())
    for _ in range(3):
        with pytest.raises(StoreUnavailable, match=f"redis://127.0.0.1:{port}/0: .*refused"): of_user(reader)
    running.append(redis_at(port))
    assert reader.get(BESIDE, {"user_id": "u1"}, NOW).status == "unknown"  # it kept nothing
    put(port, "u1", 2)
    assert of_user(reader) == 2
    stop(running.pop())
    running.append(redis_at(port))
    put(port, "u1", 3)
    assert of_user(reader) == 3  # the cut connection is noticed before it is used


def test_a_late_answer_is_not_taken_for_the_next_one(server: tuple[int, list[subprocess.Popen]]):
    port, _ = server
    for number, user in enumerate(("u1", "u2", "u3"), 1): put(port, user, number)
    reader = open_reader(f"redis://127.0.0.1:{port}/0", timeout=.5)
    assert of_user(reader, "u1") == 1
    with contextlib.closing(redis.Redis("127.0.0.1", port)) as client:
        client.execute_command("CLIENT", "PAUSE", 2_500, "ALL")  # all questions of the next seconds are answered after them
        with pytest.raises(StoreUnavailable, match="Timeout"): of_user(reader, "u1")
        with pytest.raises(StoreUnavailable, match="Timeout"): reader.get_many(BESIDE, [{"user_id": "u1"}, {"user_id": "u2"}], NOW)
    patient = open_reader(f"redis://127.0.0.1:{port}/0", timeout=PATIENT)
    for _ in range(5): assert [of_user(each, user) for each in (patient, reader) for user in ("u3", "u2")] == [3, 2, 3, 2]


def test_a_socket_that_never_answers_is_given_up():
    with socket.create_server(("127.0.0.1", 0), backlog=8) as silent:
        port = silent.getsockname()[1]
        reader = open_reader(f"redis://:verysecret@127.0.0.1:{port}/2")
        with pytest.raises(StoreUnavailable, match=f"redis://127.0.0.1:{port}/2: Timeout") as told: of_user(reader)
        assert "verysecret" not in str(told.value) and "\n" not in str(told.value)


def test_a_connection_with_answers_still_to_come_is_not_used_again():
    "The server refuses the first of two questions; its second answer comes when somebody else has asked already."
    asked = []
    def serve(listening: socket.socket):
        for _ in range(2):
            connection = listening.accept()[0]
            asked.append(connection.recv(65_536))
            connection.sendall(b"-ERR not now\r\n" if len(asked) == 1 else b"*2\r\n$6\r\n" + b"\x08\x80\x80\x80\x80\x01\r\n$2\r\n\x20\x09\r\n")
            connections.append(connection)

    connections: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = Thread(target=serve, args=(listening,), daemon=True)
        thread.start()
        lonely = view_of("lonely", ("user_id",), {"w": "whole"})
        reader = open_reader(f"redis://127.0.0.1:{listening.getsockname()[1]}", timeout=PATIENT)
        with pytest.raises(StoreUnavailable, match="not now"): reader.get_many(lonely, [{"user_id": "u1"}, {"user_id": "u2"}], NOW)
        assert reader.get(lonely, {"user_id": "u3"}, 0).values == {"w": 9}
        thread.join(timeout=30)
    assert len(asked) == 2 and b"u3" in asked[1]
    for connection in connections: connection.close()


def test_a_password_is_used_and_never_told(server: tuple[int, list[subprocess.Popen]]):
    port, running = server
    put(port, "u1", 4)
    with contextlib.closing(redis.Redis("127.0.0.1", port)) as client: client.config_set("requirepass", "sehr/geheim")
    assert of_user(open_reader(f"redis://:sehr%2Fgeheim@127.0.0.1:{port}", timeout=PATIENT)) == 4
    assert of_user(open_reader(f"redis://default:sehr%2Fgeheim@127.0.0.1:{port}/0", timeout=PATIENT)) == 4
    for wrong in (f"redis://:andersgeheim@127.0.0.1:{port}", f"redis://127.0.0.1:{port}"):
        reader = open_reader(wrong, timeout=PATIENT)
        with pytest.raises(StoreUnavailable) as told: of_user(reader)
        assert "geheim" not in str(told.value) + repr(reader) + reader.location and told.value.__cause__ is None


def test_projects_and_databases_are_kept_apart(server: tuple[int, list[subprocess.Popen]]):
    port, _ = server
    put(port, "u1", 1), put(port, "u1", 2, "shop")
    assert [of_user(open_reader(f"redis://127.0.0.1:{port}/0", project, PATIENT)) for project in ("shopai", "shop", "sho")] == [1, 2, None]
    assert of_user(open_reader(f"redis://127.0.0.1:{port}/1", timeout=PATIENT)) is None


@pytest.mark.parametrize("value", [b"\x29" + bytes(8), b"\x12\x03abc", b"\x20", b"\x30\x01", b"\xff\xff"],
                         ids=["number", "text", "cut off", "another type", "no message"])
def test_a_value_of_another_type_is_no_missing_value(server: tuple[int, list[subprocess.Popen]], value: bytes):
    port, _ = server
    key = put(port, "u1", 1)
    reader = open_reader(f"redis://127.0.0.1:{port}", timeout=PATIENT)
    assert of_user(reader) == 1
    with contextlib.closing(redis.Redis("127.0.0.1", port)) as client:
        field = next(name for name in client.hkeys(key) if not name.startswith(b"_ts"))
        client.hset(key, field, value)
        with pytest.raises(StoreUnavailable, match="beside can't be read"): of_user(reader)
        client.hset(key, mapping={field: b"\x20\x05", "_ts:beside": b"\xff"})
        with pytest.raises(StoreUnavailable, match="can't be read"): of_user(reader)
        client.set(key, "no hash")
        with pytest.raises(StoreUnavailable, match="WRONGTYPE"): of_user(reader)
    put_again = put(port, "u2", 6)
    assert put_again and of_user(reader, "u2") == 6


# Mistakes of the caller's


@pytest.mark.parametrize("location", [
    "", "online.db", "sqlite:online.db", "sqlite://online.db", "redis://", "redis://host:port/0", "redis://host:99999/0", "redis://host/first", "redis://host/-1",
    "redis://:topsecret@host/x", "redis://:topsecret@host:70000/0", "rediss://:topsecret@host/0?a=b", "http://:topsecret@host", "postgresql://host/db"])
def test_what_is_no_location_is_refused(location: str):
    with pytest.raises(UsageError, match="online store: must be sqlite:///path") as told: open_reader(location)
    assert "topsecret" not in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(("call", "complaint"), [
    (lambda reader: reader.get("nobody", {"user_id": "u1"}), "there is no 'nobody'; known are user_context"),
    (lambda reader: reader.get("user_context", {"item_id": "u1"}), "keys: user_context is looked up by user_id"),
    (lambda reader: reader.get("user_context", {"user_id": None}), "user_id of user_context must be text, got None"),
    (lambda reader: reader.get("user_context", {"user_id": 17850}), "user_id of user_context must be text, got 17850"),
    (lambda reader: reader.get("category_season", {"category": "mugs", "week": "7"}), "week of category_season must be a whole number of 64 bits, got '7'"),
    (lambda reader: reader.get("category_season", {"category": "mugs", "week": True}), "week of category_season must be a whole number"),
    (lambda reader: reader.get("category_season", {"category": "mugs", "week": 2**63}), "week of category_season must be a whole number"),
    (lambda reader: reader.vectors("user_context", ["u1"]), "view: user_context holds no vectors"),
    (lambda reader: open_reader("redis://host", "my-shop"), "project: must be letters"),
    (lambda reader: open_reader("redis://host", timeout=0), "timeout must be more than 0 seconds"),
])
def test_a_mistake_is_told_before_the_store_is_asked(tmp_path: Path, call, complaint: str):
    with pytest.raises(UsageError, match=complaint): call(open_reader(f"sqlite:///{tmp_path}/none.db"))


# What the process that answers has to load


def test_importing_the_reader_imports_nothing_heavy(tmp_path: Path):
    path = by_hand(tmp_path / "online.db", 1)
    heavy = ("feast", "pandas", "pyarrow", "torch", "scipy", "sklearn", "duckdb", "matplotlib", "deltalake", "mlflow")
    code = (f"import sys; sys.modules.update(dict.fromkeys({heavy!r}))\n"
            "from shopai.features.catalogue import VIEWS\nfrom shopai.features.online import open_reader\n"
            f"print(open_reader('sqlite:///{path}', timeout=5).get('user_context', {{'user_id': 'u1'}}).status)\nopen_reader('redis://127.0.0.1')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "unknown\n", "")


def test_feast_and_the_reader_live_in_one_process():
    from feast.protos.feast.types.Value_pb2 import FloatList, Value

    from shopai.features.online import decode
    assert decode("vector", Value(float_list_val=FloatList(val=[1, 2])).SerializeToString()).tolist() == [1, 2]
    assert string.ascii_letters == decode("text", Value(string_val=string.ascii_letters).SerializeToString())
    assert set(VIEWS) >= {"user_context", "item_text"}
