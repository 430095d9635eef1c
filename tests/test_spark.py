"""Ingest by Spark: the rows of the single process, whatever dies, over the local log and over Kafka."""

import json
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pandas as pd
import pytest
from backends import spark as session  # noqa: F401  a fixture

from shopai.core.config import UsageError
from shopai.core.lake import Lake
from shopai.events.bus import BusUnavailable, open_bus
from shopai.events.enrich import Enricher
from shopai.events.wire import Door, read_event

pytest.importorskip("pyspark", reason="pyspark isn't installed")

from shopai.events import spark as by_spark  # noqa: E402
from shopai.events.ingest import Ingest, serve_ingest  # noqa: E402
from shopai.events.spark_bus import BusStream, Piece, read_piece  # noqa: E402

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)
KEY = b"a secret that nobody may read"
DOOR = Door(key=KEY, unsaid_consent="refused")
AGENTS = ["Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/17.5 Mobile/15E148 Safari/604.1",
          "Mozilla/5.0 (Windows NT 10.0; Win64; x64; rv:126.0) Gecko/20100101 Firefox/126.0", "Mozilla/5.0 (compatible; Googlebot/2.1)", None]


class OnlyLondon:
    "A database of places."

    def get(self, ip: str) -> dict | None:
        if ip.startswith("81.2.69."): return {"country": {"iso_code": "GB"}, "city": {"names": {"en": "London"}}, "location": {"time_zone": "Europe/London"}}


LAST = 130  # that many records come from a machine that hurries
ENRICHER = Enricher(OnlyLondon(), "Europe/Vienna")


def stream(count: int = 240, seed: int = 4) -> list[tuple[str | None, bytes]]:
    "Records of a dozen customers: late ones, several items, wrong prices, orders reported twice, no consent, a machine that hurries, repetitions and nonsense."
    draw = random.Random(seed)
    records: list[tuple[str | None, bytes]] = []
    for n in range(count):
        who = draw.randrange(12)
        came = NOON + timedelta(seconds=40 * n)
        event = {"event_id": f"e{n}", "event_name": draw.choice(["view_item", "add_to_cart", "view_item_list"]), "anonymous_id": f"customer{who}",
                 "event_time": (came - timedelta(minutes=draw.choice([0, 0, 0, 2, 12, 40]))).isoformat(), "consent": who % 5 != 4,
                 "ip": f"{'81.2.69' if who % 2 else '10.0.0'}.{who}", "user_agent": AGENTS[who % 4],
                 "items": [{"item_id": f"i{draw.randrange(9)}", "price": 3.5, "quantity": 1} for _ in range(1 + n % 3)]}
        if who == 3: event["session_id"] = f"visit{n // 60}"
        if who == 6: del event["consent"]
        if n % 9 == 4: event |= {"event_name": "purchase", "transaction_id": f"order{who}-{n // 40}"}
        who, value = record(event, came)
        records.append((who, value.replace(b'"price":3.5', b'"price":-1') if n % 37 == 5 else value))  # as a sender might write it who doesn't come by the door
        if n % 20 == 0: records.append(draw.choice(records))
    then, hasty = NOON + timedelta(seconds=40 * count), {"event_name": "view_item", "anonymous_id": "machine", "ip": "10.9.9.9", "consent": True}
    # at the end: the counts of a minute are not in the lake, so who is killed in the middle of it counts anew
    hurry = [record(hasty | {"event_id": f"h{n}", "event_time": then.isoformat()}, then) for n in range(LAST)]
    return records + [(None, b"GET / HTTP/1.1"), ("customer1", b'{"v":2}')] + hurry


def record(event: dict, came: datetime) -> tuple[str, bytes]:
    one = read_event(event, came, DOOR)
    return one.key, one.to_json()


RECORDS = stream()


def rows(lake: Lake, table: str = "events") -> pd.DataFrame:
    "What the lake has, in one order, without the time at which it was written."
    order = "event_id" if table == "events" else ["reason", "row"]
    return lake.read(table).drop(columns="quarantined_at", errors="ignore").sort_values(order, ignore_index=True)


def same(lake: Lake, other: Lake) -> None:
    pd.testing.assert_frame_equal(rows(lake), rows(other))
    pd.testing.assert_frame_equal(rows(lake, "quarantine").drop(columns="source"), rows(other, "quarantine").drop(columns="source"))


# for a few rows, compiling takes longer than it saves
QUICK = {"spark.sql.shuffle.partitions": "1", "spark.sql.codegen.wholeStage": "false", "spark.sql.codegen.factoryMode": "NO_CODEGEN"}


@pytest.fixture(scope="module")
def spark(session):  # noqa: F811
    before = {name: session.conf.get(name) for name in QUICK}
    for name, value in QUICK.items(): session.conf.set(name, value)
    yield session
    for name, value in before.items(): session.conf.set(name, value)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Lake, object]:
    "The lake of the single process, and what became of the records."
    folder = tmp_path_factory.mktemp("alone")
    bus, dead, lake = open_bus(folder / "bus"), open_bus(folder / "bus", "events.dead"), Lake(folder / "lake")
    bus.send(RECORDS)
    ingest = Ingest(bus, lake, ENRICHER, DOOR, dead)
    landed = serve_ingest(ingest, once=True, most=97, wait=.01)
    ingest.close()
    found = rows(lake)
    # the stream has what it should have
    assert landed.dead == 2 and landed.duplicates["event_id"] > 10 and len(landed.quarantined) == 2
    assert {"late", "out_of_order", "on_time"} <= set(found["arrival"]) and 0 < (found["city"] == "London").sum() < len(found)
    assert found["bot_reason"].str.startswith("rate").sum() == 10 and found["event_id"].str.startswith("x-").any()
    return lake, landed


@pytest.fixture(params=["local", "kafka"])
def location(request, tmp_path) -> Iterator[str]:
    "A bus with the records: the local log, or a topic of three partitions."
    if request.param == "local": yield str(tmp_path / "bus")
    else:
        from kafka_broker import broker
        with broker() as running: yield f"kafka://{running.address}/spark?partitions=3"


def fill(location: str, records: list[tuple[str | None, bytes]]) -> None:
    bus = open_bus(location)
    bus.send(records)
    bus.close()


def spark_ingest(spark, location, lake, kind=by_spark.SparkIngest): return kind(spark, location, lake, ENRICHER, DOOR)


class Killed(Exception): "The process is gone."


class DiesBefore(by_spark.SparkIngest):
    "Its files are written, its commit isn't."
    def _commit_files(self, *_): raise Killed


class DiesAfter(by_spark.SparkIngest):
    "The lake has the batch, Spark doesn't know."
    def land(self, records):
        super().land(records)
        raise Killed


def test_a_batch_gives_the_rows_of_the_single_process(spark, tmp_path, alone):
    lake, landed = alone
    fill(str(tmp_path / "bus"), RECORDS)
    ingest = spark_ingest(spark, tmp_path / "bus", Lake(tmp_path / "lake"))
    whole = ingest.land(ingest.waiting())
    same(ingest.lake, lake)
    assert replace(whole, seconds=0) == replace(landed, seconds=0)
    assert ingest.land(ingest.waiting()) is None and ingest.lag() == 0
    assert sum(ingest.dead.ends().values()) - sum(ingest.dead.begins().values()) == 2
    ingest.close()


def test_a_stream_that_dies_and_loses_its_checkpoint_gives_them_too(spark, location, tmp_path, alone):
    fill(location, RECORDS[:-LAST])
    place, checkpoint = Lake(tmp_path / "lake"), tmp_path / "checkpoint"
    for kind, there in ((DiesBefore, 0), (DiesAfter, 1))["kafka" not in location:]:
        ingest = spark_ingest(spark, location, place, kind)
        with pytest.raises(Killed): by_spark.serve_spark_ingest(ingest, once=True, most=110, checkpoint=str(checkpoint))
        ingest.close()
        assert (place.version("events") if place.exists("events") else 0) == there  # version 0 is the empty table
    assert not any((checkpoint / "commits").glob("[0-9]*"))  # Spark believes that nothing has been done
    again = spark_ingest(spark, location, place)
    stop = threading.Event()
    landed = by_spark.serve_spark_ingest(again, once=True, most=110, stop=stop, tell=lambda _: stop.set(), checkpoint=str(checkpoint))
    again.close()
    assert 0 < landed.records < len(RECORDS) - LAST - 100
    for log in sorted((checkpoint / "offsets").glob("*")): assert KEY not in log.read_bytes()
    fill(location, RECORDS[-LAST:])
    fresh = spark_ingest(spark, location, place)
    by_spark.serve_spark_ingest(fresh, once=True, most=400)  # another checkpoint, another size
    assert fresh.lag() == 0
    fresh.close()
    same(place, alone[0])


def test_a_checkpoint_of_another_lake_is_refused(spark, tmp_path):
    bus, checkpoint = open_bus(tmp_path / "bus"), str(tmp_path / "checkpoint")
    bus.send(RECORDS[:20])
    for number in (1, 2):
        ingest = spark_ingest(spark, tmp_path / "bus", Lake(tmp_path / f"lake{number}"))
        if number == 1:
            by_spark.serve_spark_ingest(ingest, once=True, checkpoint=checkpoint)
            bus.send(RECORDS[20:40])
        else:
            with pytest.raises(UsageError, match="belongs to another lake"): by_spark.serve_spark_ingest(ingest, once=True, checkpoint=checkpoint)
            stream = ingest.stream().writeStream.format("noop").option("checkpointLocation", str(tmp_path / "done"))
            stream.trigger(availableNow=True).start().awaitTermination()
            with pytest.raises(UsageError, match="has come to the end"): by_spark.serve_spark_ingest(ingest, once=True, checkpoint=str(tmp_path / "done"))
            assert not ingest.lake.exists("events")
        ingest.close()
    bus.close()


def test_what_was_trimmed_is_told_and_what_is_missing_is_waited_for(tmp_path, caplog):
    bus = open_bus(tmp_path)
    bus.send([(None, b"%d" % n) for n in range(1, 51)])
    bus.trim({0: 21})
    assert [number for batch in read_piece(bus, Piece(0, 11, 31)) for number in batch["offset"].to_pylist()] == list(range(21, 31))
    assert "records 11 to 20 of partition 0 are no longer kept" in caplog.text
    assert list(read_piece(bus, Piece(0, 1, 21))) == []
    stop = threading.Timer(.3, lambda: bus.send([(None, b"late")] * 10))
    stop.start()
    assert sum(batch.num_rows for batch in read_piece(bus, Piece(0, 41, 61))) == 20
    bus.close()


def test_a_partition_that_comes_later_is_read_from_its_first_record(tmp_path):
    class Grown(BusStream):
        def places(self, what, given): return {"begins": {0: 5, 1: 0}, "ends": {0: 9, 1: 3}}[what] | {int(name): offset for name, offset in given.items()}
    stream = Grown({"location": str(tmp_path)})
    end = stream.latestOffset({"0": 7}, stream.getDefaultReadLimit())
    assert end == {"0": 9, "1": 3} and stream.partitions({"0": 7}, end) == [Piece(0, 7, 9), Piece(1, 0, 3)]


def test_users_are_told_in_one_line_what_is_missing(monkeypatch):
    import sys
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pyspark", None)
        with pytest.raises(UsageError, match=r"pip install 'shopai\[spark\]'"): by_spark.spark_session()
    with monkeypatch.context() as without:
        without.setenv("PATH", "")
        without.delenv("JAVA_HOME", raising=False)
        with pytest.raises(UsageError, match="needs Java"): by_spark.spark_session()
    monkeypatch.setenv("SPARK_REMOTE", "sc://nowhere")
    with pytest.raises(UsageError, match="SPARK_REMOTE"): by_spark.spark_session()


def test_a_session_in_another_zone_is_refused(spark, tmp_path):
    spark.conf.set("spark.sql.session.timeZone", "Europe/Vienna")
    try:
        with pytest.raises(UsageError, match="must be in UTC"): spark_ingest(spark, tmp_path / "bus", Lake(tmp_path / "lake"))
    finally: spark.conf.set("spark.sql.session.timeZone", "UTC")


def test_a_silent_bus_ends_a_drain_and_not_a_service(spark, tmp_path, monkeypatch):
    bus = open_bus(tmp_path / "bus")
    bus.send(RECORDS[:5])

    def silent(batches):
        raise BusUnavailable("kafka/shop.events: silent")
        yield from batches

    ingest = spark_ingest(spark, tmp_path / "bus", Lake(tmp_path / "lake"))
    monkeypatch.setattr(ingest, "land", lambda records: records.sparkSession.range(1).mapInArrow(silent, "id long").collect())
    with pytest.raises(BusUnavailable, match="kafka/shop.events: silent$"): by_spark.serve_spark_ingest(ingest, once=True, patience=0)
    stop, told = threading.Event(), []
    def tell(progress):
        told.append(progress.problem)
        if len(told) == 2: stop.set()
    by_spark.serve_spark_ingest(ingest, stop=stop, tell=tell, every=.1)
    assert told == ["kafka/shop.events: silent"] * 2
    ingest.close()
    bus.close()


def test_the_secret_is_nowhere_to_be_seen(spark, tmp_path):
    bus = open_bus(tmp_path / "bus")
    bus.send(RECORDS[:3])
    ingest = spark_ingest(spark, tmp_path / "bus", Lake(tmp_path / "lake"))
    frame = by_spark.decode_frame(ingest.waiting(), DOOR)
    said = frame._jdf.queryExecution().toString() + json.dumps(dict(spark.sparkContext.getConf().getAll()))
    assert KEY.decode() not in said
    ingest.close()
    bus.close()
