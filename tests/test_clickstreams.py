"""Click streams: the real sample to the last row, invented files in any pieces, RetailRocket's files, and what happens when a file breaks off."""

import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shopai.core.config import UsageError
from shopai.core.lake import Lake
from shopai.core.schema import validate
from shopai.data.clickstreams import REASONS, REES46, RETAILROCKET, load_clicks, write_clicks
from shopai.data.sources import build_source, load_source


def as_published(rows: pd.DataFrame) -> pd.DataFrame: return rows.assign(event_time=rows.event_time.dt.strftime("%Y-%m-%d %H:%M:%S UTC"))


@pytest.fixture(scope="module")
def sample(data_dir: Path) -> Path:
    path = data_dir / "rees46_oct2019_sample.parquet"
    if not path.is_file(): pytest.skip(f"no {path.name} in {data_dir}")
    return path


@pytest.fixture(scope="module")
def tables(sample: Path): return load_source("rees46", sample)


def test_every_row_of_the_real_sample(sample: Path, tables):
    "17,434 rows = 17,055 views + 165 carts + 214 purchases; five of them stand there twice or more."
    raw, report = pd.read_parquet(sample), tables.report
    assert len(raw) == 17_434 == report["rows_in"] and raw.event_type.value_counts().to_dict() == {"view": 17_055, "purchase": 214, "cart": 165}
    assert report["accepted"] == {"view_item": 17_055 - 4, "add_to_cart": 165 - 1, "remove_from_cart": 0, "purchase": 214}
    assert report["rejected"] == {"unknown event": 0, "unreadable event": 0, "repeated event": 5}
    assert report["rows_out"] + report["rows_rejected"] == len(raw) == len(tables.events) + len(tables.rejected)
    assert tables.rejected.index.tolist() == raw.index[raw.duplicated()].tolist()
    sold = sum(Decimal(repr(price)) for price in raw.price[raw.event_type == "purchase"])
    assert report["net_value"]["purchase"] == report["net_value"]["raw"] == f"{sold:.3f}" and report["net_value"]["difference"] == "0.000"


def test_the_tables_of_the_real_sample(sample: Path, tables):
    raw, events, items = pd.read_parquet(sample), tables.events, tables.items.set_index("item_id")
    assert events.event_id.is_unique and events.event_id.str.fullmatch("[0-9a-f]{24}").all()
    assert validate(events, "events").rejected.empty and validate(tables.items, "items").rejected.empty
    assert set(items.index) == set(raw.product_id.astype(str)) == set(events.item_id) and set(tables.users.user_id) == set(raw.user_id.astype(str))
    assert items.category["1004237"] == "electronics > smartphone" and items.brand["1004237"] == "apple"
    last = raw.groupby("product_id").price.last()  # the file is in the order of time
    assert (items.price.reindex(last.index.astype(str)).to_numpy() == last.to_numpy()).all()
    assert events.transaction_id.isna().all() and events.currency.isna().all() and (events.quantity[events.event_name == "purchase"] == 1).all()


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_the_csv_of_the_publisher_gives_the_same_as_parquet(sample: Path, tables, tmp_path: Path, name: str):
    as_published(pd.read_parquet(sample)).to_csv(tmp_path / name, index=False)
    found = load_clicks(REES46, tmp_path / name, chunk=2_500)
    for table in ("events", "items", "users"): pd.testing.assert_frame_equal(getattr(found, table), getattr(tables, table))
    assert found.report == tables.report and found.rejected.index.tolist() == tables.rejected.index.tolist()


def test_the_real_sample_into_the_lake(sample: Path, tables, tmp_path: Path):
    lake, shares = Lake(tmp_path / "lake"), []
    report = build_source("rees46", lake, sample, progress=lambda stage, done, of, note: shares.append((stage, done, of)))
    assert {name: report[name] for name in tables.report} == tables.report
    assert shares[-1] == ("rows", 100, 100)
    for table in ("events", "items", "users"): pd.testing.assert_frame_equal(lake.read(table), getattr(tables, table))
    quarantine = lake.read("quarantine")
    assert quarantine.source.tolist() == ["rees46"] * 5 and quarantine.reason.str.startswith("repeated event: ").all()
    again = build_source("rees46", lake, sample)
    assert again["tables"] == report["tables"] and len(lake.read("quarantine")) == 5
    assert lake.history("events").operation.tolist() == ["WRITE", "WRITE", "CREATE TABLE"]  # one commit a build: nobody ever sees half of it


cells = st.sampled_from
rows = st.lists(st.tuples(
    cells(["2019-10-01 00:00:00 UTC", "2019-10-02 23:59:59 UTC", "2019-09-30 12:00:00 UTC", "soon", None]),
    cells(["view", "cart", "remove_from_cart", "purchase", "wish", None]),
    cells(["1", "2", None]), cells(["7"]), cells(["electronics.smartphone", None]), cells(["apple", None]),
    cells(["1.1", "2.55", "-3", "inf", "x", None]), cells(["10", "11", None]), cells(["s", None])), min_size=1, max_size=25)


@settings(max_examples=15, deadline=None)
@given(rows, st.integers(3, 26))
def test_any_file_in_any_pieces(tmp_path_factory, rows: list, chunk: int):
    folder = tmp_path_factory.mktemp("invented")
    raw = pd.DataFrame(rows, columns=REES46.columns)
    raw.to_csv(folder / "a.csv", index=False)
    whole, pieces = load_clicks(REES46, folder / "a.csv"), load_clicks(REES46, folder / "a.csv", chunk)
    for table in ("events", "items", "users"): pd.testing.assert_frame_equal(getattr(pieces, table), getattr(whole, table))
    pd.testing.assert_frame_equal(pieces.rejected.fillna(""), whole.rejected.fillna(""))
    report = whole.report
    assert pieces.report == report
    assert report["rows_in"] == len(raw) == len(whole.events) + len(whole.rejected) == sum(report["accepted"].values()) + sum(report["rejected"].values())
    # the same classes, found in another way
    readable = [row for row in rows if row[1] not in ("wish", None) and row[0] not in ("soon", None) and row[2] and row[7] and row[6] not in ("-3", "inf", "x")]
    assert report["rejected"]["unknown event"] == sum(row[1] in ("wish", None) for row in rows)
    assert len(whole.events) == len(set(readable)) and report["rejected"]["repeated event"] == len(readable) - len(set(readable))
    net = report["net_value"]
    assert Decimal(net["difference"]) == 0 and Decimal(net["purchase"]) == sum(Decimal(row[6] or 0) for row in set(readable) if row[1] == "purchase")
    assert Decimal(net["raw"]) == Decimal(net["purchase"]) + sum(map(Decimal, net["rejected"].values()))
    assert set(whole.events.item_id) == set(whole.items.item_id) and set(whole.events.user_id) == set(whole.users.user_id)


MEMORY = """
import sys, tempfile
from pathlib import Path
import psutil
from shopai.data.clickstreams import REES46, Reading, read_pieces
path, small, chunk = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
process, most = psutil.Process(), 0
def run(path):
    global most
    with tempfile.TemporaryDirectory() as folder:
        reading = Reading(REES46, Path(folder))
        for raw in read_pieces(path, REES46.columns, chunk):
            reading(raw)
            most = max(most, process.memory_info().rss)
        return reading.rows
run(small)
before, most = process.memory_info().rss, 0
print(sum(run(path).values()), run(small)["repeated event"], most - before)
"""


def test_memory_is_that_of_a_piece(tmp_path: Path):
    "A file of 100,000 rows in small pieces takes far less memory than in one."
    rng, n = np.random.default_rng(0), 100_000
    times = pd.to_datetime("2019-10-01") + pd.to_timedelta(np.sort(rng.integers(0, 86_400 * 5, n)), unit="s")
    as_published(pd.DataFrame({
        "event_time": times, "event_type": rng.choice(["view", "cart", "purchase"], n), "product_id": rng.integers(0, 2_000, n), "category_id": 1,
        "category_code": "electronics.smartphone", "brand": "apple", "price": rng.integers(1, 1_000, n) / 100, "user_id": rng.integers(0, 3_000, n),
        "user_session": [f"{number:036}" for number in range(n)]})).to_csv(tmp_path / "large.csv", index=False)
    (tmp_path / "small.csv").write_text("".join((tmp_path / "large.csv").open().readlines()[:100]))

    def grown(chunk: int) -> int:
        arguments = [sys.executable, "-c", MEMORY, tmp_path / "large.csv", tmp_path / "small.csv", str(chunk)]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        rows, repeated, by = map(int, done.stdout.split())
        assert (rows, repeated) == (n, 0)
        return by
    small, whole = grown(5_000), grown(n)
    assert small < 60e6 and small < whole / 2, (small, whole)


def test_repetitions_far_apart_and_out_of_order_are_found(tmp_path: Path):
    "RetailRocket's file is in no order of time: a copy may stand anywhere."
    rng, n = np.random.default_rng(1), 1_000
    events = pd.DataFrame({"timestamp": 1_430_000_000_000 + rng.permutation(n) * 3_600_000, "visitorid": rng.integers(0, 50, n), "event": "view",
                           "itemid": rng.integers(0, 20, n), "transactionid": None})
    raw = pd.concat([events, events.sample(40, random_state=2)], ignore_index=True)
    raw.to_csv(tmp_path / "events.csv", index=False)
    found = load_clicks(RETAILROCKET, tmp_path / "events.csv", chunk=100)
    assert found.report["rejected"]["repeated event"] == 40 and found.rejected.index.tolist() == list(range(n, n + 40))


def rocket(folder: Path, tree: bool = True, properties: tuple = (1, 2)) -> Path:
    "RetailRocket's files, small."
    files = {
        "events.csv": "timestamp,visitorid,event,itemid,transactionid\n1433221332117,257597,view,355908,\n1433224214164,992329,view,248676,\n"
                      "1433222276276,599528,transaction,356475,4000\n1433221999827,111016,addtocart,318965,\n1433222276276,599528,transaction,15335,4000\n"
                      "1433221332117,257597,view,355908,\n1433221332117,257597,like,355908,\nnever,257597,view,355908,\n",
        "item_properties_part1.csv": "timestamp,itemid,property,value\n1435460400000,356475,categoryid,1338\n1441508400000,206783,888,1116713 960601 n277.200\n"
                                     "1439089200000,356475,available,0\n1436670000000,355908,categoryid,5\n",
        "item_properties_part2.csv": "timestamp,itemid,property,value\n1433041200000,356475,categoryid,7\n1442113200000,355908,categoryid,1016\n"
                                     "1433041200000,356475,available,1\n",
        "category_tree.csv": "categoryid,parentid\n1016,213\n213,1\n1,\n1338,1278\n"}
    kept = ["events.csv", *(f"item_properties_part{part}.csv" for part in properties), *(["category_tree.csv"] if tree else [])]
    for name in kept: (folder / name).write_text(files[name])
    return folder


def test_retailrocket_with_all_its_files(tmp_path: Path):
    found = load_source("retailrocket", rocket(tmp_path))
    assert found.report["rows_in"] == 8 and found.report["accepted"] == {"view_item": 2, "add_to_cart": 1, "purchase": 2}
    assert found.report["rejected"] == {"unknown event": 1, "unreadable event": 1, "repeated event": 1}
    sold = found.events[found.events.event_name == "purchase"]
    assert sold.transaction_id.tolist() == ["4000"] * 2 and sold.user_id.tolist() == ["599528"] * 2 and sold.quantity.tolist() == [1, 1]
    assert found.events.event_time[0] == pd.Timestamp("2015-06-02 05:02:12.117", tz="UTC")
    assert found.events.price.isna().all() and any("no prices" in note for note in found.report["notes"])
    assert found.items.set_index("item_id").category.dropna().to_dict() == {"355908": "1 > 213 > 1016", "356475": "1278 > 1338"}
    assert found.report["kept"] == {"items with a category": 2, "items not available at the end": 1}
    assert load_source("retailrocket", tmp_path / "events.csv").report == found.report  # the file itself, or its folder


@pytest.mark.parametrize(("tree", "properties", "category", "note"), [
    (False, (1, 2), "1016", "no category_tree.csv"), (True, (2,), "1 > 213 > 1016", None), (True, (), None, "no item_properties_part1.csv")])
def test_retailrocket_without_some_of_its_files(tmp_path: Path, tree: bool, properties: tuple, category: str | None, note: str | None):
    found = load_clicks(RETAILROCKET, rocket(tmp_path, tree, properties))
    assert found.items.set_index("item_id").category.astype(object).where(lambda s: s.notna(), None)["355908"] == category
    assert [text for text in found.report["notes"] if note and text.startswith(note)] or note is None


def test_retailrocket_into_the_lake(tmp_path: Path):
    lake, expected = Lake(tmp_path / "lake"), load_source("retailrocket", rocket(tmp_path))
    report = build_source("retailrocket", lake, tmp_path)
    assert {name: report[name] for name in expected.report} == expected.report
    for table in ("events", "items", "users"): pd.testing.assert_frame_equal(lake.read(table), getattr(expected, table))
    assert sorted(reason.split(":")[0] for reason in lake.read("quarantine").reason) == sorted(REASONS)


def test_preprocessed_sessions_without_times_are_no_events(data_dir: Path):
    "The shared folder has RetailRocket's sessions in the form of a benchmark: no time, no visitor, so no events."
    path = data_dir / "retailrocket_sessions_train.parquet"
    if not path.is_file(): pytest.skip(f"no {path.name} in {data_dir}")
    with pytest.raises(UsageError, match="retailrocket_sessions_train.parquet lacks the column 'timestamp'"): load_source("retailrocket", path)


@pytest.mark.parametrize(("name", "content", "words"), [
    ("a.csv", None, "no such file"), ("a.csv", b"", "a.csv is empty"), ("a.txt", b"x", "ends in '.txt'"),
    ("a.csv", b"a,b\n1,2\n", "a.csv lacks the column 'event_time'"),
    ("a.csv", ",".join(REES46.columns).encode(), "a.csv holds no rows"),
    ("a.csv.gz", b"not gzip", "a.csv.gz can't be read"), ("a.parquet", b"PAR1", "a.parquet can't be read"),
    ("a.csv", ",".join(REES46.columns).encode() + b"\nx,view,1,1,caf\xe9.bar,b,1,1,s\n", "a.csv is not UTF-8"),
])
def test_a_wrong_file_is_one_line_and_leaves_the_lake(tmp_path: Path, name: str, content: bytes | None, words: str):
    if content is not None: (tmp_path / name).write_bytes(content)
    for call in (lambda: load_source("rees46", tmp_path / name), lambda: write_clicks(REES46, Lake(tmp_path / "lake"), tmp_path / name)):
        with pytest.raises(UsageError, match=words) as caught: call()
        assert "\n" not in str(caught.value) and caught.value.__cause__ is None
    assert not (tmp_path / "lake").exists()


def test_rows_past_a_bad_byte_far_down_leave_the_lake(tmp_path: Path):
    good = ",".join(REES46.columns) + "\n" + "".join(f"2019-10-01 00:00:{i % 60:02} UTC,view,{i},1,a,b,1,1,s\n" for i in range(2_000))
    (tmp_path / "a.csv").write_bytes(good.encode() + b"2019-10-01 00:00:00 UTC,view,1,1,caf\xe9,b,1,1,s\n")
    with pytest.raises(UsageError, match="a.csv is not UTF-8"): write_clicks(REES46, Lake(tmp_path / "lake"), tmp_path / "a.csv", chunk=100)
    assert not (tmp_path / "lake").exists()
