"""The warehouse: a real PostgreSQL with a database of the test's own, SQLite for the rest, and drivers that are not there."""

import datetime as dt
import subprocess
import sys
from uuid import uuid4

import narwhals as nw
import numpy as np
import pandas as pd
import psutil
import pytest
import sqlalchemy as sa

from shopai.core.config import UsageError
from shopai.core.lake import Lake
from shopai.core.schema import TABLES, arrow_schema, conform
from shopai.core.testing import toy_shop
from shopai.core.warehouse import Warehouse, WarehouseUnavailable, read_table, warehouse_url
from shopai.events.clock import with_local_time
from shopai.events.sessions import with_sessions

SERVER = {"host": "127.0.0.1", "port": 5432, "user": "postgres"}
TYPES = {"text": sa.Text, "number": sa.Float, "whole": sa.BigInteger, "flag": sa.Boolean, "day": sa.Date, "time": lambda: sa.DateTime(timezone=True)}


def put(uri: str, name: str, frame: pd.DataFrame, schema: str | None = None, **other) -> None:
    "A table by contract, with real SQL types; `other`: types of further columns."
    known = {column.name: TYPES[column.dtype]() for column in TABLES[name].columns}
    table = sa.Table(name, sa.MetaData(), *(sa.Column(column, {**known, **other}[column]) for column in frame), schema=schema)
    plain = frame.astype(object).where(frame.notna(), None)
    engine = sa.create_engine(warehouse_url(uri))
    with engine.begin() as connection:
        if schema: connection.execute(sa.schema.CreateSchema(schema, if_not_exists=True))
        table.create(connection)
        connection.execute(table.insert(), plain.to_dict("records"))
    engine.dispose()


@pytest.fixture(scope="module")
def postgres():
    "Address of an empty database of this file's own, with one table: the toy shop's events."
    psycopg2 = pytest.importorskip("psycopg2")
    name = f"shopai_test_{uuid4().hex[:12]}"

    def administer(statement: str) -> None:
        connection = psycopg2.connect(dbname="postgres", connect_timeout=5, **SERVER)
        connection.autocommit = True  # a database can't be made in a transaction
        try:
            with connection.cursor() as cursor: cursor.execute(statement)
        finally: connection.close()

    try: administer(f"create database {name}")
    except psycopg2.OperationalError as error: pytest.skip(f"no PostgreSQL on 127.0.0.1:5432: {str(error).splitlines()[0]}")
    uri = f"postgresql://postgres@127.0.0.1:5432/{name}"
    try:
        put(uri, "events", toy_shop().events, "shop")
        yield uri
    finally: administer(f"drop database {name} with (force)")


@pytest.fixture(scope="module")
def shop_lake(tmp_path_factory) -> Lake:
    lake = Lake(tmp_path_factory.mktemp("warehouse") / "lake")
    lake.replace("events", toy_shop().events)
    return lake


def in_order(frame: pd.DataFrame) -> pd.DataFrame: return frame.sort_values("event_id", ignore_index=True)


def test_postgresql_and_the_lake_hold_the_same(postgres: str, shop_lake: Lake):
    found, kept = read_table(postgres, "shop.events"), shop_lake.read("events")
    pd.testing.assert_frame_equal(in_order(found), in_order(kept))
    with Warehouse(postgres) as warehouse:
        assert warehouse.tables() == ["shop.events"]
        assert warehouse.read("shop.events", as_="arrow").schema.equals(arrow_schema("events"))


def funnel(frame):
    "Of each item: views, purchases, revenue, and the time of the last purchase; for any backend of Narwhals."
    count = lambda name: (nw.col("event_name") == name).cast(nw.Int64)
    rows = nw.from_native(frame).with_columns(viewed=count("view_item"), sold=count("purchase"))
    rows = rows.with_columns(revenue=nw.col("price").fill_null(0.) * nw.col("quantity").fill_null(0.) * nw.col("sold"))
    by_item = rows.group_by("item_id").agg(nw.col("viewed", "sold", "revenue").sum(), nw.col("event_time").max())
    return by_item.sort("item_id").to_native()


@pytest.mark.parametrize("as_", ["pandas", "arrow"])
def test_one_transform_gives_the_same_from_postgresql_and_from_the_lake(postgres: str, shop_lake: Lake, as_: str):
    results = [funnel(frame) for frame in (read_table(postgres, "shop.events", as_=as_), shop_lake.read("events", as_=as_))]
    from_warehouse, from_lake = (result if as_ == "pandas" else result.to_pandas() for result in results)
    pd.testing.assert_frame_equal(from_warehouse, from_lake, check_exact=False, rtol=1e-12)
    assert from_lake.sold.sum() == (toy_shop().events.event_name == "purchase").sum() > 0


def visits(frame: pd.DataFrame) -> pd.DataFrame:
    "Sessions and local time by the steps of the enrichment, over events in the order of their time."
    rows = frame.sort_values(["event_time", "event_id"], ignore_index=True).drop(columns=["session_id", "session_events", "session_seconds", "arrival"])
    rows = rows.assign(visitor="v" + rows.user_id, session_id=pd.Series(None, rows.index, "str"), timezone="Europe/London",
                       partition=0, offset=rows.index, line=0)
    found, _ = with_sessions(with_local_time(rows.drop(columns=["local_hour", "part_of_day"])))
    return found.sort_values("event_id", ignore_index=True)[["event_id", "session_id", "session_events", "session_seconds", "local_hour", "part_of_day"]]


def test_enrichment_gives_the_same_from_postgresql_and_from_the_lake(postgres: str, shop_lake: Lake):
    from_warehouse, from_lake = visits(read_table(postgres, "shop.events")), visits(shop_lake.read("events"))
    pd.testing.assert_frame_equal(from_warehouse, from_lake)
    assert from_lake.session_events.max() > 1 and from_lake.session_id.nunique() > 60
    assert from_lake.part_of_day.nunique() > 1


def test_conditions_run_on_the_server(postgres: str):
    events = toy_shop().events
    noon = events.event_time.median().to_pydatetime()
    with Warehouse(postgres) as warehouse:
        found = warehouse.read("shop.events", ["event_id", "user_id"], {"event_time": (noon, None), "event_name": ["purchase", "view_item"], "user_id": None})
    expected = events[(events.event_time >= noon) & events.event_name.isin(["purchase", "view_item"]) & events.user_id.isna()]
    assert sorted(found.event_id) == sorted(expected.event_id) and len(expected)
    assert list(found) == ["event_id", "user_id"]


def test_names_and_values_are_never_sql(postgres: str):
    evil = "shop.events; drop table shop.events --"
    with Warehouse(postgres) as warehouse:
        with pytest.raises(UsageError, match="the warehouse has no table"): warehouse.read(evil)
        with pytest.raises(UsageError, match="has no column"): warehouse.read("shop.events", ["event_id; drop table shop.events"])
        with pytest.raises(UsageError, match="has no column"): warehouse.read("shop.events", where={"true or event_id": "x"})
        assert warehouse.read("shop.events", where={"event_id": "x' or true --"}).empty
        assert len(warehouse.read("shop.events", ["event_id"])) == len(toy_shop().events)


def test_types_of_postgresql_come_into_the_contract(postgres: str):
    "Exact decimals, whole numbers as text, days, times in another zone, JSON beside it."
    noon = dt.datetime(2026, 7, 1, 12, tzinfo=dt.timezone(dt.timedelta(hours=2)))
    frame = pd.DataFrame({"item_id": [22423, 22424], "price": ["12.75", None], "launched_at": [noon, None],
                          "tags": ['{"a": 1}', None]})
    put(postgres, "items", frame, "odd", item_id=sa.BigInteger(), price=sa.Numeric(12, 2), tags=sa.JSON())
    with Warehouse(postgres) as warehouse:
        items = warehouse.read("odd.items")
        pd.testing.assert_frame_equal(items, conform(items, "items")[list(items)])
        assert items.item_id.tolist() == ["22423", "22424"] and items.price[0] == 12.75 and items.launched_at[0] == pd.Timestamp("2026-07-01 10:00", tz="UTC")
        assert warehouse.read("odd.items", ["tags", "item_id"], where={"price": 12.75}).iloc[0].tolist()[1] == "22423"


def test_two_hundred_thousand_rows_in_bounded_memory(postgres: str):
    "The server keeps the cursor: a reader in a process of its own grows by far less than the table."
    engine = sa.create_engine(warehouse_url(postgres))
    with engine.begin() as connection:
        connection.execute(sa.text("create table numbers as select i, md5(i::text) || repeat('x', 500) as padding from generate_series(1, 200000) as i"))
    engine.dispose()
    code = """
import sys, psutil
import pandas, pyarrow
from shopai.core.warehouse import Warehouse
from shopai.core import schema
process = psutil.Process()
with Warehouse(sys.argv[1]) as warehouse:
    warehouse.read("numbers", ["i"], {"i": (1, 10)})
    before, most, rows, total = process.memory_info().rss, 0, 0, 0
    for batch in warehouse.batches("numbers", chunk=int(sys.argv[2])):
        most, rows, total = max(most, process.memory_info().rss), rows + len(batch), total + sum(batch["i"].to_pylist())
print(most - before, rows, total)
"""
    def grown(chunk: int) -> int:
        done = subprocess.run([sys.executable, "-c", code, postgres, str(chunk)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        by, rows, total = map(int, done.stdout.split())
        assert (rows, total) == (200_000, 200_000 * 200_001 // 2)
        return by
    assert grown(5_000) < 40e6 < 200_000 * 532 * .5  # 106 MB of text alone
    assert grown(200_000) > 106e6  # in one piece it would show


def test_a_cursor_left_behind_is_closed(postgres: str):
    with Warehouse(postgres) as warehouse:
        next(warehouse.batches("shop.events", chunk=1))
        assert len(warehouse.read("shop.events", ["event_id"])) == len(toy_shop().events)
    connected = [one for one in psutil.Process().net_connections() if one.raddr and one.raddr.port == 5432 and one.status == "ESTABLISHED"]
    assert not connected


@pytest.mark.parametrize(("uri", "words"), [
    ("postgresql://ann:sesame@127.0.0.1:9/sales", "Connection refused"),
    ("postgresql://postgres:sesame@127.0.0.1:5432/no_such_database", "no_such_database|refused"),
    ("postgresql://ann:sesame@no-such-host.invalid/sales", "could not translate host name"),
])
def test_a_server_that_lets_nobody_in_is_one_line_without_the_password(uri: str, words: str):
    pytest.importorskip("psycopg2")
    with pytest.raises(WarehouseUnavailable, match=words) as caught: read_table(uri, "events")
    assert "sesame" not in str(caught.value) and "\n" not in str(caught.value) and isinstance(caught.value, OSError)
    assert "sesame" not in repr(Warehouse(uri))


@pytest.mark.parametrize(("scheme", "package"), [("snowflake", "snowflake-sqlalchemy"), ("bigquery", "sqlalchemy-bigquery")])
def test_a_missing_dialect_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch, scheme: str, package: str):
    def absent(*_, **__): raise sa.exc.NoSuchModuleError(f"can't load sqlalchemy.dialects:{scheme}")
    monkeypatch.setattr(sa, "create_engine", absent)
    with pytest.raises(UsageError) as caught: Warehouse(f"{scheme}://ann:sesame@account/db")
    assert str(caught.value) == f"{scheme}:// needs {package}: pip install {package}"


def test_a_missing_driver_of_an_installed_dialect_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(UsageError, match="postgresql:// needs psycopg2-binary: pip install psycopg2-binary"):
        Warehouse("postgresql://ann:sesame@127.0.0.1/sales")


@pytest.fixture
def sqlite(tmp_path) -> str:
    (tmp_path / "shop.db").touch()
    return f"sqlite:///{tmp_path / 'shop.db'}"


def test_sqlite_gives_the_contract_from_text(sqlite: str):
    events = toy_shop().events
    put(sqlite, "events", events.assign(event_time=events.event_time.dt.strftime("%Y-%m-%dT%H:%M:%S.%fZ")), event_time=sa.Text())
    pd.testing.assert_frame_equal(in_order(read_table(sqlite, "events", chunk=97)), in_order(events))


def test_times_without_a_zone_ask_for_one(sqlite: str):
    put(sqlite, "stock", pd.DataFrame({"item_id": ["a"], "counted_at": [dt.datetime(2026, 1, 1, 18)], "on_hand": [3.]}), counted_at=sa.DateTime())
    with pytest.raises(UsageError, match=r"stock\.counted_at: times have no zone"): read_table(sqlite, "stock")
    assert read_table(sqlite, "stock", zone="America/New_York").counted_at[0] == pd.Timestamp("2026-01-01 23:00", tz="UTC")


def test_what_does_not_fit_the_contract_is_named(sqlite: str):
    put(sqlite, "items", pd.DataFrame({"item_id": ["a"], "price": ["cheap"]}), price=sa.Text())
    with pytest.raises(UsageError, match=r"items\.price: must be a number, got 'cheap'"): read_table(sqlite, "items")


def test_an_empty_table_has_its_columns(sqlite: str):
    put(sqlite, "users", pd.DataFrame({"user_id": ["a"], "country": ["GB"]}))
    frame = read_table(sqlite, "users", where={"user_id": "nobody"})
    assert frame.empty and list(frame) == ["user_id", "country"] and frame.dtypes.equals(conform(frame, "users")[list(frame)].dtypes)


def test_batches_that_hold_only_missing_values_fit_the_others(sqlite: str):
    put(sqlite, "users", pd.DataFrame({"user_id": [f"u{i}" for i in range(6)], "country": [None, None, "GB", None, None, "FR"]}))
    with Warehouse(sqlite) as warehouse: schemas = [batch.schema for batch in warehouse.batches("users", chunk=2)]
    assert len(schemas) == 3 and all(schema.equals(schemas[0]) for schema in schemas)
    assert np.array_equal(read_table(sqlite, "users", chunk=2).country.isna(), [True, True, False, True, True, False])
