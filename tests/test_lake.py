"""The lake under stress: crashes between commits, several processes at once, odd values, a real shop's size."""

import datetime as dt
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from shopai.core import delta
from shopai.core.config import UsageError, get_settings
from shopai.core.lake import Append, Lake
from shopai.core.schema import TABLES, conform


def events(n: int, start: int = 0, **columns) -> pd.DataFrame:
    number = np.arange(start, start + n)
    when = pd.Timestamp("2026-01-01", tz="UTC") + pd.to_timedelta(number, unit="min")
    return conform(pd.DataFrame({"event_id": [f"e{i}" for i in number], "event_name": "purchase", "event_time": when, "user_id": [f"u{i % 7}" for i in number],
                                 "item_id": [f"i{i % 5}" for i in number], "quantity": 1., "price": number % 9 + .5, "currency": "EUR", **columns}), "events")


@pytest.fixture
def lake(tmp_path: Path) -> Lake: return Lake(tmp_path / "a lake with blanks, ü and 100 %")


def test_a_lake_starts_from_nothing(lake: Lake, home: Path):
    assert (lake.tables(), lake.versions(), lake.exists("events")) == ([], {}, False)
    assert Lake.from_settings(get_settings()).location == str(home / "lake")
    for question in (lake.read, lake.version, lake.history, lake.compact, lake.vacuum, lambda table: lake.delete(table, "true")):
        with pytest.raises(UsageError, match="the lake has no table 'events'; it has none yet"): question("events")


def test_what_is_written_is_read(lake: Lake):
    frame = events(100, consent=[True, False, None, None] * 25, search_term=["'; drop table", '"', "ü\n", None] * 25)
    assert lake.append("events", frame) == Append(100, 0, 1)
    pd.testing.assert_frame_equal(lake.read("events"), frame)
    arrow, relation = lake.read("events", as_="arrow"), lake.read("events", as_="duckdb")
    pd.testing.assert_frame_equal(conform(arrow.to_pandas(), "events"), frame)
    pd.testing.assert_frame_equal(conform(relation.df(), "events"), frame)


@pytest.mark.parametrize("name", TABLES)
def test_every_empty_table_has_its_types(lake: Lake, name: str):
    empty = conform(pd.DataFrame({column: [] for column in TABLES[name].names}), name)
    lake.replace(name, empty)
    pd.testing.assert_frame_equal(lake.read(name), empty)
    column = TABLES[name].names[0]
    assert lake.read(name, columns=[column], where=f'"{column}" is not null').dtypes.to_dict() == empty[[column]].dtypes.to_dict()


def test_predicate_and_projection_agree_with_pandas(lake: Lake):
    frame = events(500)
    for first in range(0, 500, 125): lake.append("events", frame[first:first + 125])
    found = lake.read("events", columns=["price", "event_id"], where="user_id in ('u1', 'u2') and price >= 4 and event_time >= '2026-01-01 02:00:00'")
    wanted = frame[frame.user_id.isin(["u1", "u2"]) & (frame.price >= 4) & (frame.event_time >= "2026-01-01 02:00:00Z")]
    assert found.columns.tolist() == ["price", "event_id"]
    assert sorted(found.event_id) == sorted(wanted.event_id) and len(wanted) > 0


def test_times_in_predicates_are_utc_wherever_the_machine_stands(lake: Lake):
    lake.append("events", events(180))
    question = f"from shopai.core.lake import Lake; print(len(Lake({lake.location!r}).read('events', where=\"event_time < '2026-01-01 01:00'\")))"
    for zone in ("UTC", "Asia/Tokyo", "America/New_York"):
        done = subprocess.run([sys.executable, "-c", question], env={"TZ": zone, "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "60", zone


def test_relations_outlive_the_lake_and_can_be_joined(lake: Lake):
    import gc

    lake.append("events", events(50))
    lake.append("items", pd.DataFrame({"item_id": [f"i{i}" for i in range(5)], "category": list("aabbb")}))
    bought, goods = lake.read("events", as_="duckdb", where="quantity > 0"), lake.read("items", as_="duckdb")
    gc.collect()
    sales = bought.set_alias("bought").join(goods.set_alias("goods"), "bought.item_id = goods.item_id").aggregate("category, count(*)").order("category")
    assert sales.fetchall() == [("a", 20), ("b", 30)]


# Bad rows

def test_good_rows_land_and_bad_rows_are_kept_as_they_came(lake: Lake):
    raw = pd.DataFrame({"event_id": ["1", "2", "3"], "event_name": ["purchase", "purchase", "dance"],
                        "event_time": ["2026-01-31T12:00:00Z", "noon", "2026-01-31T12:00:00Z"],
                        "quantity": [1, float("inf"), 3.123456789012345], "search_term": [None, None, "a\u2028b\n\"c\" ü"]})
    assert lake.append("events", raw, source="till 3") == Append(1, 2, 1)
    refused = lake.read("quarantine").sort_values("row", ignore_index=True)
    assert [json.loads(row) for row in refused["row"]] == [
        {"event_id": "2", "event_name": "purchase", "event_time": "noon", "quantity": "inf"},
        {"event_id": "3", "event_name": "dance", "event_time": "2026-01-31T12:00:00Z", "quantity": 3.123456789012345, "search_term": "a\u2028b\n\"c\" ü"}]
    assert refused["reason"].tolist() == ["event_time: must be a time with a zone, such as 2026-01-31T12:00:00Z; quantity: must be ≥ 0",
                                          "event_name: must be a known event, such as purchase"]
    assert refused["source"].unique().tolist() == ["till 3"] and refused["table"].unique().tolist() == ["events"]


def test_a_batch_of_bad_rows_only_is_still_counted_as_done(lake: Lake):
    bad = events(3).assign(quantity=-1.)
    assert lake.append("events", bad, app=("till", 0)) == Append(0, 3, 1)
    assert lake.append("events", bad, app=("till", 0)) == Append(0, 0, 1, repeated=True)
    assert (len(lake.read("events")), len(lake.read("quarantine"))) == (0, 3)


@pytest.mark.parametrize("crash_before", ["quarantine", "events"])
def test_a_crash_between_the_commits_is_mended_by_the_rerun(lake: Lake, monkeypatch: pytest.MonkeyPatch, crash_before: str):
    frame = events(10).assign(quantity=[-1.] * 4 + [1.] * 6)
    whole = delta.commit
    def crash(place, *args, **kwargs):
        if place.name == crash_before: raise KeyboardInterrupt
        return whole(place, *args, **kwargs)
    monkeypatch.setattr(delta, "commit", crash)
    with pytest.raises(KeyboardInterrupt): lake.append("events", frame, app=("till", 5))
    assert not lake.exists("events"), "sales must not land before their rejects are safe"
    monkeypatch.undo()
    for _ in range(2): lake.append("events", frame, app=("till", 5))
    assert (len(lake.read("events")), len(lake.read("quarantine"))) == (6, 4)


def test_batch_numbers_are_kept_for_each_writer_and_table_apart(lake: Lake):
    bad = events(2).assign(quantity=[1., -1.])
    for writer in ("a", "b"):
        for number in (0, 1, 0): lake.append("events", bad, app=(writer, number))
    assert (len(lake.read("events")), len(lake.read("quarantine"))) == (4, 4)
    lake.append("market_prices", pd.DataFrame({"item_id": ["i"], "competitor": ["c"], "observed_at": ["2026-01-31T12:00:00Z"], "price": [-1]}), app=("a", 0))
    assert len(lake.read("quarantine")) == 5
    for wrong in (("", 0), ("a", -1), ("a", "1")):
        with pytest.raises(UsageError, match="app must be"): lake.append("events", bad, app=wrong)


def test_a_frame_that_does_not_fit_changes_nothing(lake: Lake):
    lake.append("events", events(5))
    before = lake.versions()
    for frame in (events(5).drop(columns="event_name"), events(5).assign(colour="red"), events(5).assign(event_time=pd.Timestamp("2026-01-01"))):
        with pytest.raises(UsageError): lake.append("events", frame)
        with pytest.raises(UsageError): lake.replace("events", frame)
    assert lake.versions() == before


# Several processes

def work(lake: Lake, body: str) -> subprocess.Popen:
    "Another process that waits for the starting shot (a file) and then does its work."
    code = ("import pathlib, sys, time; sys.path.insert(0, sys.argv[2]); from test_lake import events; from shopai.core.lake import Lake\n"
            "import deltalake, pandera.pandas\n"
            "lake = Lake(sys.argv[1]); pathlib.Path(sys.argv[3]).touch()\n"
            "while not pathlib.Path(sys.argv[1] + '.go').exists(): time.sleep(.002)\n" + body)
    ready = f"{lake.location}.ready{time.monotonic_ns()}"
    process = subprocess.Popen([sys.executable, "-c", code, lake.location, str(Path(__file__).parent), ready],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.ready = Path(ready)
    return process


def fire(lake: Lake, *processes: subprocess.Popen) -> list[str]:
    while not all(process.ready.exists() for process in processes):
        assert all(process.poll() is None for process in processes), [process.stderr.read() for process in processes if process.poll()]
        time.sleep(.01)
    Path(lake.location + ".go").touch()
    ends = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), [error for _, error in ends]
    return [out.strip() for out, _ in ends]


def test_two_processes_append_at_once_and_both_land(lake: Lake):
    "From nothing, so that they also race to make the table; every batch has a bad row, so that they race in the quarantine too."
    body = "for i in range(8): lake.append('events', events(20, start={start} + 20 * i).assign(quantity=[-1.] + [1.] * 19))"
    fire(lake, work(lake, body.format(start=0)), work(lake, body.format(start=1000)))
    found = lake.read("events")
    assert len(found) == found["event_id"].nunique() == 2 * 8 * 19
    assert len(lake.read("quarantine")) == 16


def test_the_same_batch_from_two_processes_lands_once(lake: Lake):
    body = "print(sum(not lake.append('events', events(20, start=20 * i).assign(quantity=[-1.] + [1.] * 19), app=('till', i)).repeated for i in range(8)))"
    written = fire(lake, work(lake, body), work(lake, body))
    found = lake.read("events")
    assert len(found) == found["event_id"].nunique() == 8 * 19
    assert len(lake.read("quarantine")) == 8
    assert sum(map(int, written)) == 8


def test_deleting_compacting_and_appending_at_once(lake: Lake):
    lake.append("events", events(200))
    append = "for i in range(6): lake.append('events', events(10, start=1000 + 10 * i, user_id='new'))"
    upkeep = "for user in ('u0', 'u1', 'u2'): lake.delete('events', f\"user_id = '{user}'\"); lake.compact('events'); lake.vacuum('events', dry_run=False)"
    fire(lake, work(lake, append), work(lake, upkeep))
    wanted = [*events(200).query("user_id not in ('u0', 'u1', 'u2')")["event_id"], *(f"e{1000 + i}" for i in range(60))]
    assert sorted(lake.read("events")["event_id"]) == sorted(wanted)


def test_a_killed_writer_leaves_the_table_readable(lake: Lake):
    lake.append("events", events(10))
    writer = work(lake, "i = 1\nwhile True: lake.append('events', events(500, start=500 * i)); i += 1")
    while not writer.ready.exists(): time.sleep(.01)
    Path(lake.location + ".go").touch()
    while lake.version("events") < 4: time.sleep(.01)
    writer.kill()
    writer.communicate()
    found = lake.read("events")
    assert found["event_id"].is_unique and (len(found) - 10) % 500 == 0
    assert lake.append("events", events(1, start=10**6)).accepted == 1


# Time travel and upkeep

def test_yesterdays_prices(lake: Lake):
    items = pd.DataFrame({"item_id": ["a", "b"], "price": [1., 2.]})
    lake.replace("items", items)
    between = dt.datetime.now(dt.UTC) + dt.timedelta(milliseconds=5)
    time.sleep(.02)
    lake.replace("items", items.assign(price=[9., 9.]))
    for moment in (between, between.isoformat(), between.astimezone(dt.timezone(dt.timedelta(hours=9))), pd.Timestamp(between)):
        assert lake.read("items", time=moment)["price"].tolist() == [1., 2.]
    assert lake.read("items", version=1, columns=["price"], where="price > 1", as_="arrow").to_pydict() == {"price": [2.]}
    assert lake.read("items", time="2999-01-01T00:00:00Z")["price"].tolist() == [9., 9.]


@pytest.mark.parametrize(("question", "message"), [
    ({"version": 7}, "table 'items' has no version 7; versions 0 to 2 can be read"),
    ({"version": -1}, "table 'items' has no version -1"),
    ({"time": "2020-01-01T00:00:00Z"}, "table 'items' can't be read as of 2020-01-01T00:00:00"),
    ({"time": "2020-01-01"}, "time must have a zone"),
    ({"time": dt.datetime(2020, 1, 1)}, "time must have a zone"),
    ({"time": "last week"}, "time must be ISO 8601"),
    ({"version": 1, "time": "2020-01-01T00:00:00Z"}, "give version or time, not both"),
    ({"columns": ["item_id", "colour"]}, "table 'items' has no column 'colour'; it has item_id, title"),
    ({"where": "colour = 'red'"}, "where: .* is no predicate over item_id, title"),
    ({"where": "price >"}, "where: 'price >' is no predicate"),
    ({"as_": "polars"}, "as_ must be 'pandas', 'arrow' or 'duckdb', got 'polars'"),
])
def test_wrong_questions_get_one_clear_line(lake: Lake, question: dict, message: str):
    for price in (1., 2.): lake.replace("items", pd.DataFrame({"item_id": ["a"], "price": [price]}))
    with pytest.raises(UsageError, match=message) as caught: lake.read("items", **question)
    assert "\n" not in str(caught.value)


def test_an_erased_customer_is_in_no_file(lake: Lake):
    "Under every name: as data, as the smallest or greatest value in a log's statistics, in the deletion's predicate, in a leftover of an interrupted write."
    import pyarrow.parquet as pq
    who = "zz-customer-4711"
    for i in range(3): lake.append("events", events(5, start=5 * i, user_id=[who, "u1", "u2", "u3", None]))
    leftover = Path(lake.location, "events", "part-00000-leftover.parquet")
    pq.write_table(lake.read("events", as_="arrow"), leftover)
    lake.append("events", events(1, start=100, user_id=who).assign(quantity=-1.))
    assert lake.delete("events", f"user_id = '{who}'") == 3
    assert lake.delete("quarantine", f"row like '%{who}%'") == 1

    def traces() -> list[str]:
        files = [path for path in Path(lake.location).rglob("*") if path.is_file()]
        return [path.name for path in files if who in (str(pq.read_table(path).to_pydict()) if path.suffix == ".parquet" else path.read_text(errors="replace"))]
    assert len([name for name in traces() if name.endswith(".json")]) > 2 and leftover.name in traces()
    for table in lake.tables(): lake.vacuum(table, retention_hours=0, dry_run=False)
    assert traces() == []
    assert sorted(lake.read("events")["event_id"]) == sorted(f"e{i}" for i in range(15) if i % 5)


def test_a_week_of_versions_survives_the_nightly_vacuum(lake: Lake):
    for i in range(3): lake.replace("events", events(10, start=10 * i))
    assert lake.vacuum("events", dry_run=False) == []
    assert [lake.read("events", version=v)["event_id"].iloc[0] for v in (1, 2, 3)] == ["e0", "e10", "e20"]


def test_batch_numbers_survive_the_vacuum(lake: Lake):
    lake.append("events", events(5), app=("till", 3))
    lake.compact("events")
    lake.vacuum("events", retention_hours=0, dry_run=False)
    assert lake.append("events", events(5), app=("till", 3)).repeated


def test_a_delete_that_is_no_predicate(lake: Lake):
    lake.append("events", events(5))
    for wrong in ("", "  "):
        with pytest.raises(UsageError, match="predicate must say which rows to delete"): lake.delete("events", wrong)
    for wrong in ("colour = 'red'", "user_id = = 'u1'"):
        with pytest.raises(UsageError, match="predicate: .* can't be used on table 'events'") as caught: lake.delete("events", wrong)
        assert "\n" not in str(caught.value)
    assert lake.version("events") == 1


def test_other_folders_are_no_tables(lake: Lake):
    lake.append("events", events(1))
    Path(lake.location, "notes").mkdir()
    Path(lake.location, "Drafts").mkdir()
    assert lake.tables() == ["events"]
    for wrong in ("../events", "events/../../x", "Events", ""):
        with pytest.raises(UsageError, match="table must be lower-case letters"): lake.append(wrong, events(1))


def test_a_real_shops_year(lake: Lake):
    "540,000 rows, in order, in seconds."
    frame = events(540_000)
    start = time.perf_counter()
    lake.append("events", frame)
    pd.testing.assert_frame_equal(lake.read("events"), frame)
    assert len(lake.read("events", columns=["event_id"], where="user_id = 'u3'")) == (frame["user_id"] == "u3").sum()
    assert time.perf_counter() - start < 40
