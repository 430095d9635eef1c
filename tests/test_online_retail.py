"""The real file: every line and pound accounted for, the figures of protocol R3, and the way through CSV and XLSX."""
import time

import numpy as np
import pandas as pd
import pytest

from shopai.core.lake import Lake
from shopai.core.schema import validate
from shopai.data.interactions import purchases, seconds
from shopai.data.sources import load_source, write_source
from shopai.data.splits import leave_one_out, temporal_split


@pytest.fixture(scope="module")
def raw(online_retail):
    return pd.read_parquet(online_retail)


@pytest.fixture(scope="module")
def year(online_retail):
    return load_source("online-retail", online_retail)


@pytest.fixture(scope="module")
def bought(year):
    return purchases(year.events)


def test_every_line_is_in_exactly_one_class(raw, year):
    assert year.report["rows_in"] == len(raw) == 541_909
    assert len(year.events) + len(year.rejected) == 541_909
    assert year.report["accepted"] == {"purchase": 527_725, "refund": 8_704}
    assert year.report["rejected"] == {"unreadable line": 0, "copied invoice": 0, "adjustment": 3, "no product": 2_992, "stock correction": 1_324,
                                       "odd cancellation": 0, "no price": 1_161}
    assert sum(year.report["rejected"].values()) == len(year.rejected) == 5_480


def test_net_value_reconciles_in_thousandths_of_a_pound(raw, year):
    "Whole numbers all the way: prices have at most three decimals, and int64 sums don't round."
    thousandths = lambda quantity, price: int((np.rint(price * 1000).astype("int64") * quantity.astype("int64")).sum())
    assert (np.rint(raw.UnitPrice * 1000) / 1000 == raw.UnitPrice).all()
    total = thousandths(raw.Quantity, raw.UnitPrice)
    assert total == 9_747_747_934
    parts = {name: thousandths(group.quantity, group.price) for name, group in year.events.groupby("event_name")}
    refused = {reason: thousandths(group.Quantity, group.UnitPrice) for reason, group in year.rejected.groupby("reason")}
    assert total == parts["purchase"] - parts["refund"] + sum(refused.values())
    assert (parts, refused) == ({"purchase": 10_271_034_610, "refund": 478_724_180},
                                {"adjustment": -11_062_060, "no product": -33_500_436, "stock correction": 0, "no price": 0})
    stated = year.report["net_value"]
    assert (stated["raw"], stated["purchase"], stated["refund"], stated["difference"]) == ("9747747.934", "10271034.610", "478724.180", "0.000")
    assert {reason: v for reason, v in stated["rejected"].items() if v != "0.000"} == {"adjustment": "-11062.060", "no product": "-33500.436"}


def test_tables_keep_their_contracts_and_fit_together(year):
    for table in ("events", "items", "users"): assert validate(getattr(year, table), table).rejected.empty
    assert set(year.events.item_id) == set(year.items.item_id)
    assert set(year.events.user_id.dropna()) == set(year.users.user_id)
    assert (len(year.items), len(year.users), int(year.events.user_id.isna().sum())) == (3_805, 4_362, 131_553)
    assert not year.items.title.isna().any()
    assert not year.items.item_id.str.upper().duplicated().any()
    assert year.users.user_id.str.fullmatch(r"\d{5}").all()


def test_huge_orders_cancel_out(year):
    huge = year.events[year.events.quantity > 70_000]
    sign = huge.event_name.map({"purchase": 1, "refund": -1})
    assert len(huge) == 4 and (huge.quantity * sign).groupby(huge.item_id).sum().tolist() == [0, 0]


def test_clerks_notes_are_no_titles(year):
    assert not year.items.title.str.contains("damage|thrown|check|found|wet|\\?", case=True).any()
    titles = year.items.set_index("item_id").title
    assert (titles["85123A"], titles["22423"]) == ("WHITE HANGING HEART T-LIGHT HOLDER", "REGENCY CAKESTAND 3 TIER")


def test_protocol_r3_from_the_raw_file_and_from_the_events_agree(raw, bought):
    "The cleaning of PROTOCOLS.md, done on the raw file in four lines, is what comes out of events and `purchases`."
    clean = raw[~raw.InvoiceNo.str.startswith("C") & (raw.Quantity > 0) & (raw.UnitPrice > 0) & raw.CustomerID.notna() & raw.StockCode.str.match(r"\d{5}")]
    clean = clean.drop_duplicates(["CustomerID", "StockCode", "InvoiceNo"])
    assert (len(clean), clean.CustomerID.nunique(), clean.StockCode.nunique()) == (386_326, 4_334, 3_659)
    assert (len(bought), bought.n_users, bought.n_items) == (386_326, 4_334, 3_659)
    names = pd.DataFrame({"user": bought.user_ids[bought.users], "item": bought.item_ids[bought.items], "time": bought.times})
    expected = pd.DataFrame({"user": clean.CustomerID.astype(str), "item": clean.StockCode.str.upper(),
                             "time": clean.InvoiceDate.astype("datetime64[s]").astype("int64")})
    order = ["user", "time", "item"]
    pd.testing.assert_frame_equal(names.sort_values(order, ignore_index=True)[order].astype({"user": str, "item": str}),
                                  expected.sort_values(order, ignore_index=True)[order].astype({"user": str, "item": str}))


def test_protocol_r3_windows(bought):
    split = temporal_split(bought)
    assert (split.test.start, split.test.end) == (seconds("2011-11-12"), seconds("2011-12-10"))
    assert (split.validation.start, split.validation.end) == (seconds("2011-10-15"), seconds("2011-11-12"))
    assert (len(split.test.new), len(split.test.all)) == (1_189, 1_300)
    assert (len(split.validation.new), len(split.validation.all)) == (1_005, 1_088)
    assert (len(split.train), len(split.test.history)) == (282_105, 330_183)


def test_leave_one_out_judges_customers_with_three_purchases_or_more(bought):
    split = leave_one_out(bought)
    enough = int((np.bincount(bought.users) >= 3).sum())
    assert len(split.test.all) == len(split.validation.all) == enough == 4_211
    assert split.test.history.times.max() > split.test.start  # the leak


def test_the_build_is_quick_and_the_lake_holds_what_was_made(year, online_retail, tmp_path):
    started = time.perf_counter()
    tables = load_source("online-retail", online_retail)
    report = write_source(tables, Lake(tmp_path / "lake"))
    elapsed = time.perf_counter() - started
    lake = Lake(tmp_path / "lake")
    assert {name: len(lake.read(name)) for name in lake.tables()} == {"events": 536_429, "items": 3_805, "users": 4_362, "quarantine": 5_480}
    assert report["tables"]["events"] == {"rows": 536_429, "rejected": 0}
    reasons = lake.read("quarantine").reason.str.split(":").str[0].value_counts().to_dict()
    assert reasons == {reason: n for reason, n in year.report["rejected"].items() if n}
    assert elapsed < 60, f"{elapsed:.0f} s"  # some 4 s on two free cores


def test_csv_of_the_whole_file_gives_the_same_events(raw, year, tmp_path):
    raw.rename(columns={"InvoiceNo": "Invoice", "UnitPrice": "Price", "CustomerID": "Customer ID"}).to_csv(tmp_path / "online_retail_II.csv", index=False)
    got = load_source("online-retail", tmp_path / "online_retail_II.csv")
    pd.testing.assert_frame_equal(got.events, year.events)
    pd.testing.assert_frame_equal(got.items, year.items)
    assert got.report == year.report


def test_xlsx_of_some_thousand_lines_gives_the_same_events(raw, tmp_path):
    some = pd.concat([raw[:3_000], raw[61_600:61_640], raw[299_980:299_990]])
    number = lambda value: int(value) if value.isdigit() else value  # the spreadsheet has numbers where it can
    some.assign(InvoiceNo=some.InvoiceNo.map(number), StockCode=some.StockCode.map(number)).to_excel(tmp_path / "Online Retail.xlsx", index=False)
    some.to_parquet(tmp_path / "some.parquet")
    got, expected = (load_source("online-retail", tmp_path / name) for name in ("Online Retail.xlsx", "some.parquet"))
    pd.testing.assert_frame_equal(got.events, expected.events)
    assert got.report == expected.report
    assert got.report["rejected"]["adjustment"] == 3
