"""Sources: files that are wrong in every way, both editions in all formats, and accounts of invented files that must balance."""
import json
import sys
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shopai.core.config import UsageError
from shopai.core.lake import Lake
from shopai.core.schema import validate
from shopai.data.invoices import COLUMNS, REASONS, classify, plain_lines, plain_times, trap_lines
from shopai.data.shop_lake import SHOP_TABLES, build_shop
from shopai.data.sources import SOURCES, build_source, load_source, online_retail, write_source

SECOND_EDITION = {"InvoiceNo": "Invoice", "UnitPrice": "Price", "CustomerID": "Customer ID"}


def typed():
    "The trap lines with types as in Parquet or a spreadsheet: dates, numbers, and whole numbers that became floats."
    lines = trap_lines()
    lines = lines[lines.Quantity != "two"]
    return lines.assign(Quantity=lines.Quantity.astype(int), CustomerID=lines.CustomerID.astype(float),
                        InvoiceDate=pd.to_datetime(lines.InvoiceDate, format="%m/%d/%Y %H:%M"))


def save(lines, path, second, encoding="utf-8"):
    if second: lines = lines.rename(columns=SECOND_EDITION)
    if path.suffix == ".parquet": lines.to_parquet(path)
    elif path.suffix == ".xlsx":  # numbers where the original spreadsheet has numbers
        number = lambda value: int(value) if str(value).isdigit() else value
        lines.assign(**{c: lines[c].map(number) for c in lines.columns if c in ("InvoiceNo", "Invoice", "StockCode")}).to_excel(path, index=False)
    else: lines.to_csv(path, index=False, encoding=encoding)
    return path


@pytest.mark.parametrize("second", [False, True], ids=["first edition", "second edition"])
@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.xlsx", "A.CSV"])
def test_both_editions_in_all_formats_give_the_same_tables(tmp_path, name, second):
    expected = online_retail(save(typed(), tmp_path / "reference.parquet", second=False))
    got = online_retail(save(typed(), tmp_path / name, second))
    for table in ("events", "items", "users"): pd.testing.assert_frame_equal(getattr(got, table), getattr(expected, table))
    assert got.report == expected.report
    assert got.rejected.reason.tolist() == expected.rejected.reason.tolist()
    assert list(got.rejected) == [*COLUMNS, "reason"]
    assert len(got.events) == 9


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
def test_pound_signs_survive_each_encoding(tmp_path, encoding):
    lines = typed().assign(Description="VASE £5 — é" if encoding != "latin-1" else "VASE £5 é")
    titles = online_retail(save(lines, tmp_path / "a.csv", False, encoding)).items.title.unique().tolist()
    assert titles == [lines.Description.iloc[0]]


@pytest.mark.parametrize("written", ["%m/%d/%Y %H:%M", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M", "no leading zeros"])
def test_dates_of_both_csv_editions(written):
    times = pd.Series(pd.date_range("2010-12-01 08:26", periods=400, freq="23h"))
    text = times.dt.strftime(written) if "%" in written else times.map(lambda t: f"{t.month}/{t.day}/{t.year} {t.hour}:{t.minute:02}")
    assert (plain_times(text) == times.dt.tz_localize("UTC")).all()


def test_a_column_of_days_first_is_refused_and_one_bad_date_is_not():
    days_first = pd.Series(pd.date_range("2010-12-01", periods=60).strftime("%d/%m/%Y %H:%M"))
    with pytest.raises(UsageError, match="'13/12/2010 00:00' puts the day first"): plain_times(days_first)
    months_first = pd.Series(pd.date_range("2010-12-01", periods=60).strftime("%m/%d/%Y %H:%M"))
    months_first[3] = "31/12/2010 0:00"
    assert plain_times(months_first).isna().sum() == 1


WRONG = {
    "missing": (lambda path: None, "a.csv", "no such file"),
    "folder": (lambda path: path.mkdir(), "a.csv", "is a folder"),
    "empty csv": (lambda path: path.touch(), "a.csv", "a.csv is empty"),
    "empty parquet": (lambda path: path.touch(), "a.parquet", "a.parquet is empty"),
    "only heads": (lambda path: path.write_text(",".join(COLUMNS)), "a.csv", "holds no invoice lines"),
    "only blank lines": (lambda path: path.write_text("\n\n"), "a.csv", "can't be read as csv"),
    "other columns": (lambda path: path.write_text("a;b\n1;2"), "a.csv", "lacks the column 'InvoiceNo' or 'Invoice'"),
    "column missing": (lambda path: typed().drop(columns="Quantity").to_csv(path), "a.csv", "a.csv lacks the column 'Quantity'; it has"),
    "column missing in parquet": (lambda path: typed().drop(columns="UnitPrice").to_parquet(path), "a.parquet", "lacks the column 'UnitPrice' or 'Price'"),
    "no parquet": (lambda path: path.write_bytes(b"PAR1 not really"), "a.parquet", "can't be read as parquet"),
    "no spreadsheet": (lambda path: path.write_bytes(b"PK\3\4 not really"), "a.xlsx", "can't be read as xlsx"),
    "ending": (lambda path: path.write_text("x"), "a.txt", "ends in '.txt'; expected is an Online Retail file (.parquet, .csv, .xlsx)"),
    "no ending": (lambda path: path.write_text("x"), "invoices", "ends in 'nothing'"),
    "ragged csv": (lambda path: path.write_text(",".join(COLUMNS) + "\n1,2\n" + "1," * 20), "a.csv", "can't be read as csv"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_gets_one_line_that_names_it(tmp_path, case):
    make, name, words = WRONG[case]
    make(tmp_path / name)
    with pytest.raises(UsageError) as error: load_source("online-retail", tmp_path / name)
    text = str(error.value)
    assert words in text and name in text and "\n" not in text
    assert error.value.__cause__ is None  # nothing of pandas' own trouble is shown


cells = st.sampled_from
invoice_lines = st.lists(st.tuples(
    cells(["536365", "536366", "C536367", "A536368", "c536369", None]), cells(["85123A", "85123a", "22423", "POST", "M", "D", None]),
    cells(["VASE", "A  VASE", "cup", None]), cells([1, 6, -1, 0, 74215, -74215, "two", None]),
    cells(["12/1/2010 8:26", "2011-01-18 10:01:00", "soon", None]),
    cells([2.55, .85, 0., -11062.06, .001, 1.04, "x", None]), cells(["17850", "17850.0", None]), cells(["United Kingdom", "Unspecified", None])),
    min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(invoice_lines)
def test_every_line_of_any_file_is_in_one_class_and_the_books_balance(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("invented")
    raw = pd.DataFrame(lines, columns=list(COLUMNS))
    raw.to_csv(folder / "a.csv", index=False)
    got = online_retail(folder / "a.csv")
    report = got.report
    assert report["rows_in"] == len(raw) == report["rows_out"] + report["rows_rejected"] == len(got.events) + len(got.rejected)
    assert sum(report["rejected"].values()) == len(got.rejected) and sum(report["accepted"].values()) == len(got.events)
    assert got.rejected.reason.value_counts().to_dict() == {reason: n for reason, n in report["rejected"].items() if n}
    # an independent sum in thousandths of a pound, straight from the invented lines
    number = lambda value: isinstance(value, int | float) and value == value
    thousandths = sum(round(p * 1000) * q for _, _, _, q, _, p, _, _ in lines if number(p) and number(q))
    net = report["net_value"]
    assert Decimal(net["raw"]) * 1000 == thousandths
    assert Decimal(net["difference"]) == 0
    assert Decimal(net["raw"]) == Decimal(net["purchase"]) - Decimal(net["refund"]) + sum(map(Decimal, net["rejected"].values()))
    for table in ("events", "items", "users"): assert validate(getattr(got, table), table).rejected.empty
    assert set(got.events.item_id) == set(got.items.item_id) and set(got.events.user_id.dropna()) == set(got.users.user_id)


def test_a_copied_invoice_of_two_overlapping_sheets_is_taken_once(tmp_path):
    lines = typed().rename(columns=SECOND_EDITION)
    with pd.ExcelWriter(tmp_path / "two.xlsx") as book:
        lines.to_excel(book, sheet_name="Year 2009-2010", index=False)
        lines[lines.Invoice == "536409"].to_excel(book, sheet_name="Year 2010-2011", index=False)
    got = online_retail(tmp_path / "two.xlsx")
    assert got.report["rejected"]["copied invoice"] == 2  # both of its lines, which are alike and were kept on the first sheet
    assert got.report["kept"]["repeated lines"] == 1
    pd.testing.assert_frame_equal(got.events, online_retail(save(typed(), tmp_path / "one.parquet", False)).events)


def test_titles_called_na_are_titles(tmp_path):
    path = save(typed().assign(Description="NA"), tmp_path / "a.csv", False)
    assert online_retail(path).items.title.eq("NA").all()


def test_each_reason_is_reached_and_in_order():
    every = pd.concat([trap_lines(), trap_lines()[6:7].assign(Quantity=5), trap_lines()[:1]], ignore_index=True)
    assert set(classify(plain_lines(every))) == {*REASONS, "purchase", "refund"}


def test_options_are_checked_before_anything_is_made(tmp_path):
    lake = Lake(tmp_path / "lake")
    for name, option in SOURCES["synthetic"].options.items():
        for wrong in (option.low - 1, option.high + 1, "many", 2.5, None):
            with pytest.raises(UsageError, match=rf"^{name} must be a whole number from {option.low:,} to {option.high:,}"):
                build_source("synthetic", lake, **{name: wrong})
    with pytest.raises(UsageError, match="source 'synthetic' reads no file"): build_source("synthetic", lake, "x.csv")
    with pytest.raises(UsageError, match="makes its tables in a lake: use build_source"): load_source("synthetic")
    assert not list(tmp_path.iterdir())


def built(folder, **options) -> dict:
    "The tables of a small simulated shop, as Arrow."
    lake = Lake(folder)
    build_source("synthetic", lake, **{"customers": 60, "items": 50, "days": 30, **options})
    return {name: lake.read(name, as_="arrow") for name in SHOP_TABLES}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_shop(tmp_path):
    one, same, other = (built(tmp_path / name, seed=seed) for name, seed in (("one", 1), ("same", "1"), ("other", 2)))
    assert [name for name in SHOP_TABLES if not one[name].equals(same[name])] == []
    assert [name for name in SHOP_TABLES if one[name].equals(other[name])] == ["calendar"]  # holidays don't depend on luck
    files = [{path.parent.name: path.read_bytes() for path in sorted((tmp_path / shop).rglob("*.parquet"))} for shop in ("one", "same")]
    assert files[0].keys() == set(SHOP_TABLES) and files[0] == files[1]
    for name in one: assert validate(Lake(tmp_path / "one").read(name), name).rejected.empty, name
    assert one["events"]["event_time"].to_pylist() == sorted(one["events"]["event_time"].to_pylist())


@pytest.mark.parametrize("options", [{"customers": 1, "items": 40, "days": 1}, {"customers": 3, "items": 40, "days": 30, "seed": 2**32 - 1}], ids=str)
def test_the_smallest_shops_can_be_built(tmp_path, options):
    "Tables without a row are there, too, and empty."
    tables = built(tmp_path / "lake", **options)
    assert tables["items"].num_rows == 40 and tables["stock"].num_rows > 0


@pytest.mark.parametrize(("stage", "done"), [("days", 1), ("days", 30), ("pictures", 50)])
def test_a_build_that_dies_before_its_commits_leaves_the_lake_as_it_was(tmp_path, stage, done):
    lake = Lake(tmp_path / "lake")
    before = built(lake.location, seed=1)
    versions, files = lake.versions(), sorted(path for path in (tmp_path / "lake").rglob("*"))
    def power_cut(*step):
        if step[:2] == (stage, done): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        build_source("synthetic", lake, images=tmp_path / "images", progress=power_cut, customers=60, items=50, days=30, seed=2)
    assert lake.versions() == versions and sorted(path for path in (tmp_path / "lake").rglob("*")) == files
    assert all(lake.read(name, as_="arrow").equals(before[name]) for name in SHOP_TABLES)


def test_a_build_that_dies_between_its_commits_has_not_touched_the_events(tmp_path):
    "They come last, and a build afterwards mends it."
    lake = Lake(tmp_path / "lake")
    before = built(lake.location, seed=1)
    def power_cut(*step):
        if step[:2] == ("tables", 3): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): build_source("synthetic", lake, progress=power_cut, customers=60, items=50, days=30, seed=2)
    assert lake.read("events", as_="arrow").equals(before["events"]) and not lake.read("items", as_="arrow").equals(before["items"])
    after = built(lake.location, seed=2)
    assert not after["events"].equals(before["events"])


def test_one_shop_takes_the_place_of_the_other(tmp_path):
    "An export after a simulation, and back; what the export lacks is named."
    lake, path = Lake(tmp_path / "lake"), save(trap_lines(), tmp_path / "a.csv", False)
    build_source("online-retail", lake, path)
    assert lake.exists("quarantine") and len(lake.read("quarantine"))
    simulated = build_shop(lake, 40, 40, 14, 0)
    assert len(lake.read("events")) == simulated["tables"]["events"]["rows"] and lake.read("quarantine").empty
    report = build_source("online-retail", lake, path)
    assert len(lake.read("events")) == report["rows_out"]
    assert set(report["untouched"]) == set(SHOP_TABLES) - {"events", "items", "users"}
    json.dumps([simulated, report], allow_nan=False)


def test_writing_twice_is_writing_once(tmp_path):
    lake = Lake(tmp_path / "lake")
    tables = online_retail(save(trap_lines(), tmp_path / "a.csv", False))
    first = write_source(tables, lake)
    content = {name: lake.read(name) for name in lake.tables()}
    second = write_source(tables, lake)
    json.dumps(second, allow_nan=False)
    assert {name: version for name, version in second["lake_versions"].items()} == lake.versions()
    assert first["tables"] == second["tables"] == {name: {"rows": len(getattr(tables, name)), "rejected": 0} for name in ("events", "items", "users")}
    for name, before in content.items():
        drop = ["quarantined_at"] if name == "quarantine" else []
        pd.testing.assert_frame_equal(lake.read(name).drop(columns=drop), before.drop(columns=drop))
    pd.testing.assert_frame_equal(lake.read("events").sort_values("event_id", ignore_index=True), tables.events.sort_values("event_id", ignore_index=True))
    # a refused line can be had back from the quarantine as it came
    refused = lake.read("quarantine")
    assert [json.loads(row)["StockCode"] for row in refused.row] == tables.rejected.StockCode.tolist()
    assert [reason.split(":")[0] for reason in refused.reason] == tables.rejected.reason.tolist()


def test_histories_need_numpy_alone():
    import subprocess
    code = "import sys, shopai.data.histories; print([m for m in ('pandas', 'scipy', 'pyarrow', 'torch', 'mlflow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_exact_values_don_t_round():
    from shopai.data.sources import exact_values
    rng = np.random.default_rng(0)
    quantity, pennies = rng.integers(-80_995, 80_995, 5_000), rng.integers(0, 10**8, 5_000)
    assert exact_values(pd.Series(quantity), pd.Series(pennies / 1000)).sum() * 1000 == int(np.dot(quantity, pennies))
