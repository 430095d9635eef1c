"""Shop exports: invented orders whose books must balance, names that must not reach the lake, maps and files that are wrong, and the command."""

import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shopai.core.config import UsageError
from shopai.core.lake import Lake
from shopai.core.schema import validate
from shopai.data.shop_exports import REASONS, SHOPIFY, WOOCOMMERCE, load_export, parse_map, pseudonyms
from shopai.data.sources import build_source, load_source

KEY = "a key of the tests alone"
HEAD = """Name,Email,Financial Status,Paid at,Fulfillment Status,Accepts Marketing,Currency,Subtotal,Shipping,Taxes,Total,Discount Code,Discount Amount,
Shipping Method,Created at,Lineitem quantity,Lineitem name,Lineitem price,Lineitem compare at price,Lineitem sku,Billing Name,Billing Street,Billing Zip,
Billing Country,Billing Phone,Shipping Name,Shipping Street,Shipping City,Shipping Zip,Shipping Province,Shipping Country,Shipping Phone,Notes,Cancelled at,
Payment Method,Refunded Amount,Vendor,Id,Tags,Source,Lineitem discount,Phone""".replace("\n", "").split(",")
PERSON = {"Email": "Zoe.Quux@Example.org", "Billing Name": "Zoe Quux", "Billing Street": "7 Plover Lane", "Billing Zip": "ZQ7 7QZ", "Shipping Name": "Zoe Quux",
          "Shipping Street": "7 Plover Lane", "Shipping City": "Quuxham", "Shipping Zip": "ZQ7 7QZ", "Notes": "ring Zoe twice",
          **dict.fromkeys(("Billing Phone", "Shipping Phone", "Phone"), "+44 7700 900123")}
SECRET = ("zoe", "quux", "plover", "zq7", "900123", "@", "%40", "example.org")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch): monkeypatch.setenv("SHOPAI_PSEUDONYM_KEY", KEY)


def first(name: str, status: str = "paid", time: str = "2026-03-28 13:22:33 +0000", **values) -> dict:
    "The first line of an order."
    return {"Name": name, "Financial Status": status, "Created at": time, "Currency": "GBP", "Billing Country": "GB", "Shipping Country": "GB",
            "Lineitem quantity": 1, "Lineitem name": "Pot", "Lineitem price": "2.50", "Lineitem sku": "P-1", "Lineitem discount": "0.00",
            "Refunded Amount": "0.00", **PERSON, **values}


def more(name: str, **values) -> dict:
    "A further line: the e-mail address is repeated, all else of the order is missing."
    return {"Name": name, "Email": PERSON["Email"], "Lineitem quantity": 1, "Lineitem name": "Cup", "Lineitem price": "1.25", "Lineitem sku": "C-1",
            "Lineitem discount": "0.00", **values}


def export(path: Path, *lines: dict, encoding: str = "utf-8", **how) -> Path:
    pd.DataFrame(lines, columns=HEAD).to_csv(path, index=False, encoding=encoding, **how)
    return path


def secrets_in(lake: Lake) -> list[str]:
    "Which secret words are in the lake: in its tables as text; the longer ones also in its files, where short ones would come up by chance."
    tables = "".join(lake.read(name).to_csv() for name in lake.tables()).lower()
    files = "".join(file.read_bytes().decode("latin-1") for file in Path(lake.location).rglob("*") if file.is_file()).lower()
    return [word for word in SECRET if word in tables or len(word) > 5 and word in files]


def test_no_name_reaches_the_lake(tmp_path: Path):
    "Neither by an accepted line nor by a refused one: unpaid, unreadable, a copy, a gift."
    path = export(tmp_path / "orders.csv", first("#1", **{"Refunded Amount": "1.00"}), more("#1"), first("#2", "pending"),
                  first("#3", **{"Lineitem quantity": "two"}), more("#4", **{"Lineitem price": "0"}), first("#1", **{"Refunded Amount": "1.00"}), more("#1"),
                  first("#5", **{"Lineitem name": "Voucher for zoe.quux@example.org", "Lineitem sku": "V-1"}), first("zoe.quux@example.org"))
    lake = Lake(tmp_path / "lake")
    report = build_source("shopify", lake, path)
    assert report["rejected"]["not a sale"] == 2 and report["rejected"]["copied order"] == 2 and report["rejected"]["unreadable line"] == 1
    assert secrets_in(lake) == []
    assert lake.read("events").user_id.str.startswith("p-").all() and "Voucher for [email]" in set(lake.read("items").title)
    assert set(lake.tables()) == {"events", "items", "quarantine", "users"}


def test_the_search_for_names_would_find_one(tmp_path: Path):
    lake = Lake(tmp_path / "lake")
    lake.replace("users", pd.DataFrame({"user_id": ["Zoe Quux"]}))
    assert secrets_in(lake) == ["zoe", "quux"]
    (Path(lake.location) / "users" / "note.txt").write_text("Plover Lane")
    assert secrets_in(lake) == ["zoe", "quux", "plover"]


def test_pseudonyms_are_those_of_events_at_the_door():
    privacy = pytest.importorskip("shopai.events.privacy")
    for text in ("Ann@Example.org", "  ann@example.org ", "12345", "Élodie@example.fr", privacy.pseudonym("x", KEY.encode())):
        assert pseudonyms(pd.Series([text], dtype="str"))[0] == privacy.pseudonym(text, KEY.encode())


def test_without_a_key_customers_are_refused_and_a_file_without_customers_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SHOPAI_PSEUDONYM_KEY")
    with pytest.raises(UsageError, match="set SHOPAI_PSEUDONYM_KEY"): load_export(export(tmp_path / "a.csv", first("#1")), SHOPIFY)
    assert len(load_export(export(tmp_path / "a.csv", first("#1", Email=None)), SHOPIFY).events) == 1


def test_numbers_of_customers_may_stay_but_addresses_are_withheld(tmp_path: Path):
    (tmp_path / "a.csv").write_text("when,who,item,n,price\n2026-01-01T10:00Z,4711,A,1,2\n2026-01-01T11:00Z,Ann@Example.org,A,1,2\n"
                                    "2026-01-01T12:00Z,Ann Miller,A,1,2\n")
    columns = "columns: {event_time: when, user_id: who, item_id: item, quantity: n, price: price}\n"
    found = load_export(tmp_path / "a.csv", parse_map(columns + "pseudonymise: false"))
    assert found.events.user_id.tolist() == ["4711"] and found.rejected.reason.tolist() == ["identifying customer"] * 2
    assert found.rejected.user_id.tolist() == ["[withheld]"] * 2


cells = st.sampled_from
order = st.tuples(cells(["paid", "refunded", "pending", "voided", None]), cells(["0", "1.10", "2.5", "", "x"]),
                  st.lists(st.tuples(cells(["1", "2", "3", "0", "-1", "two"]), cells(["2.50", "9.99", "0", "", "0.333"]), cells(["0", "1.00", "0.07", "50"]),
                                     cells(["A", "B", None])), min_size=1, max_size=4))


@settings(max_examples=20, deadline=None)
@given(st.lists(order, min_size=1, max_size=6), st.booleans())
def test_the_books_of_any_orders_balance(tmp_path_factory, orders: list, copied: bool):
    os.environ["SHOPAI_PSEUDONYM_KEY"] = KEY
    of_order = lambda n, status, back: {"Financial Status": status, "Refunded Amount": back} if n == 0 else {}
    lines = [(first if n == 0 else more)(f"#{number}", **{"Lineitem quantity": q, "Lineitem price": p, "Lineitem discount": d, "Lineitem sku": sku,
                                                          "Lineitem name": sku, **of_order(n, status, back)})
             for number, (status, back, items) in enumerate(orders) for n, (q, p, d, sku) in enumerate(items)]
    if copied: lines = lines + lines[:len(orders[0][2])]
    found = load_export(export(tmp_path_factory.mktemp("orders") / "a.csv", *lines), SHOPIFY)
    report = found.report
    assert report["rows_in"] == len(lines) == sum(report["accepted"].values()) + sum(report["rejected"].values())
    assert report["rows_rejected"] == len(found.rejected) and report["rows_out"] == len(found.events)
    assert found.rejected.reason.value_counts().to_dict() == {reason: n for reason, n in report["rejected"].items() if n}
    net = report["net_value"]
    assert Decimal(net["difference"]) == 0
    assert Decimal(net["raw"]) == Decimal(net["purchase"]) - Decimal(net["refund"]) + sum(map(Decimal, net["rejected"].values()))
    # an independent sum, straight from the invented orders, in exact decimals
    number = lambda text: Decimal(text) if text not in ("two", "x", "", None) else None
    sold = back = Decimal(0)
    for status, refunded, items in orders:
        if status not in ("paid", "refunded"): continue
        # an unreadable amount spoils the line on which it stands, the first
        good = [number(q) * number(p) - Decimal(d) for n, (q, p, d, sku) in enumerate(items) if not (n == 0 and refunded == "x")
                and number(q) is not None and number(p) is not None and sku and number(q) > 0 and number(q) * number(p) > Decimal(d)]
        sold += sum(good)
        if good and number(refunded): back += number(refunded)
    assert (Decimal(net["purchase"]), Decimal(net["refund"])) == (sold, back)
    for table in ("events", "items", "users"): assert validate(getattr(found, table), table).rejected.empty
    assert set(found.events.item_id.dropna()) == set(found.items.item_id) and set(found.events.user_id.dropna()) == set(found.users.user_id)
    assert found.events.event_id.is_unique


def test_order_columns_hold_for_all_lines(tmp_path: Path):
    found = load_source("shopify", export(tmp_path / "a.csv", first("#1", Currency="EUR", **{"Shipping Country": "IE"}), more("#1"), first("#2")))
    assert found.events.currency.tolist() == ["EUR", "EUR", "GBP"] and found.events.country.tolist() == ["IE", "IE", "GB"]
    assert found.events.event_time.nunique() == 1 and found.report["accepted"] == {"purchase": 3}
    assert found.events.event_id.tolist() == ["#1-1", "#1-2", "#2-1"]


def test_the_same_file_gives_the_same_ids(tmp_path: Path):
    lines = [first("#1"), more("#1"), more("#1"), first("#2", **{"Refunded Amount": "2.50"})]
    once, twice = (load_export(export(tmp_path / "a.csv", *lines), SHOPIFY) for _ in range(2))
    pd.testing.assert_frame_equal(once.events, twice.events)
    assert once.report["rejected"]["copied order"] == 0 and len(once.events) == 5  # a line that stands twice in its order was bought twice


def test_an_order_given_back_in_full(tmp_path: Path):
    found = load_export(export(tmp_path / "a.csv", first("#1", "refunded", **{"Refunded Amount": "3.75"}), more("#1")), SHOPIFY)
    refund = found.events[found.events.event_name == "refund"]
    assert refund.item_id.isna().all() and refund.price.tolist() == [3.75] and refund.transaction_id.tolist() == ["#1"]
    assert (found.report["net_value"]["purchase"], found.report["net_value"]["refund"], found.report["net_value"]["raw"]) == ("3.750", "3.750", "0.000")


WOO = ("order_id,order_number,order_date,status,order_currency,billing_first_name,billing_email,billing_country,item_product_id,item_name,item_sku,"
       "item_quantity,item_subtotal,item_total,item_refunded,item_refunded_qty\n")


def test_woocommerce(tmp_path: Path):
    lines = ("9,71,2026-07-01 12:00:00,completed,EUR,Zoe,zoe.quux@example.org,DE,501,Cup,C-1,3,9.00,8.00,0,0",
             "9,71,2026-07-01 12:00:00,completed,EUR,Zoe,zoe.quux@example.org,DE,502,Pot,,1,20.00,20.00,-20.00,-1",
             "10,72,2026-07-01 13:00:00,cancelled,EUR,Zoe,zoe.quux@example.org,DE,501,Cup,C-1,1,3.00,3.00,0,0")
    (tmp_path / "woo.csv").write_text(WOO + "\n".join(lines), encoding="utf-8-sig")
    found = load_source("woocommerce", tmp_path / "woo.csv")
    assert found.events[["event_id", "event_name", "item_id", "quantity"]].values.tolist() == [
        ["71-1", "purchase", "C-1", 3], ["71-2", "purchase", "502", 1], ["71-2-refund", "refund", "502", 1]]
    assert found.report["net_value"] | {"rejected": 0} == {"raw": "11.000", "purchase": "28.000", "refund": "20.000", "rejected": 0, "difference": "0.000"}
    assert "zoe" not in found.events.to_csv() + found.rejected.to_csv()


def test_woocommerce_in_the_zone_of_the_shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SHOPAI_TIMEZONE", "Europe/Berlin")
    (tmp_path / "woo.csv").write_text(WOO + "9,71,2026-07-01 12:00:00,completed,EUR,,,DE,501,Cup,C-1,1,3.00,3.00,0,0\n")
    assert load_export(tmp_path / "woo.csv", WOOCOMMERCE).events.event_time[0] == pd.Timestamp("2026-07-01 10:00", tz="UTC")


def test_woocommerce_with_one_row_an_order_is_told_what_to_export(tmp_path: Path):
    (tmp_path / "woo.csv").write_text("order_id,order_date,status,line_items\n9,2026-07-01,completed,Cup x 1\n")
    with pytest.raises(UsageError, match=r"woo.csv has no column 'item_sku' for item_id; .*export one row for each item"):
        load_source("woocommerce", tmp_path / "woo.csv")


def test_a_click_export_by_a_map(tmp_path: Path):
    "Any CSV: views and purchases of one file, names of its own, times in seconds, customers by number."
    (tmp_path / "clicks.csv").write_text("ts|what|visitor|visit|sku|preis|q\n1767225600|Klick|4711|s1|A|1,5|\n1767225660|Kauf|4711|s1|A|1,5|\n"
                                         "1767225660|Kauf|4711|s1|A|1,5|\n1767225700|Suche|4711|s1|||tea for ann@example.org\n1767225800|Tanz|4711|s1|A||\n")
    columns = "columns: {event_time: ts, event_name: what, user_id: visitor, session_id: visit, item_id: sku, price: preis, search_term: q}\n"
    (tmp_path / "map.yaml").write_text(columns + "names: {klick: view_item, kauf: purchase, suche: search}\ntime_format: seconds\ndecimal: ','\n"
                                       "constants: {currency: EUR}\n")
    found = load_source("csv", tmp_path / "clicks.csv", map=tmp_path / "map.yaml")
    assert found.events.event_name.tolist() == ["view_item", "purchase", "search"] and found.events.event_time[0] == pd.Timestamp("2026-01-01", tz="UTC")
    assert found.events.search_term[2] == "tea for [email]" and found.events.quantity.fillna(0).tolist() == [0, 1, 0]
    assert found.events.user_id.str.startswith("p-").all()
    assert found.rejected.reason.tolist() == ["repeated event", "unknown event"] and found.report["net_value"]["purchase"] == "1.500"
    assert found.report["net_value"]["difference"] == "0.000" and found.events.event_id.str.fullmatch("[0-9a-f]{24}").all()


def test_negative_quantities_as_refunds(tmp_path: Path):
    (tmp_path / "a.csv").write_text("nr;when;sku;n;price\n1;2026-01-01T10:00Z;A;2;3\n2;2026-01-02T10:00Z;A;-1;3\n")
    map = "columns: {transaction_id: nr, event_time: when, item_id: sku, quantity: n, price: price}\n"
    found = load_export(tmp_path / "a.csv", parse_map(map + "refund: {column: n, negative: true}"))
    assert found.events.event_name.tolist() == ["purchase", "refund"] and found.events.quantity.tolist() == [2, 1]
    assert (found.report["net_value"]["raw"], found.report["net_value"]["difference"]) == ("3.000", "0.000")
    assert load_export(tmp_path / "a.csv", parse_map(map)).rejected.reason.tolist() == ["no quantity"]


@pytest.mark.parametrize(("content", "words"), [
    (None, "no such file"), (b"", "a.csv is empty"), (b"Name\n", "a.csv has no column 'Created at' for event_time; it has Name; export orders as plain CSV"),
    (b"a,b\n1,2\n", "a.csv has no column"), (",".join(HEAD).encode(), "a.csv holds no lines"),
    (",".join(HEAD).encode() + b"\n" + b"caf\xe9," * 41, "a.csv is not UTF-8"),
    (",".join(HEAD).encode("utf-16"), "a.csv is not UTF-8"), (",".join(HEAD).encode() + b"\n" + b"x," * 50 + b"x\n", "a.csv can't be read as CSV"),
])
def test_a_wrong_file_is_one_line_and_leaves_the_lake(tmp_path: Path, content: bytes | None, words: str):
    if content is not None: (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UsageError, match=words) as caught: build_source("shopify", Lake(tmp_path / "lake"), tmp_path / "a.csv")
    assert "\n" not in str(caught.value) and not (tmp_path / "lake").exists()


def test_a_misspelt_column_is_named_with_the_nearest(tmp_path: Path):
    (tmp_path / "a.csv").write_text("when,SKU,Unit price\n2026-01-01T10:00Z,A,2\n")
    (tmp_path / "map.yaml").write_text("columns: {event_time: when, item_id: SKU, price: Unit prise}")
    with pytest.raises(UsageError, match="a.csv has no column 'Unit prise' for price; the nearest is 'Unit price'"):
        load_source("csv", tmp_path / "a.csv", map=tmp_path / "map.yaml")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("how", [{}, {"sep": ";"}, {"sep": "\t"}, {"quoting": 1}, {"lineterminator": "\r\n"}], ids=str)
def test_dialects(tmp_path: Path, encoding: str, how: dict):
    lines = [first("#1", **{"Lineitem name": 'Théière, "grande"\nrouge'}), more("#1")]
    found = load_export(export(tmp_path / "a.csv", *lines, encoding=encoding, **how), SHOPIFY)
    assert found.items.set_index("item_id").title["P-1"].replace("\r\n", "\n") == 'Théière, "grande"\nrouge' and len(found.events) == 2


def shopai(home: Path, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([Path(sys.executable).with_name("shopai"), "--home", home, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def test_the_command(tmp_path: Path):
    (tmp_path / "a.csv").write_text("when,SKU,price,who\n2026-01-01T10:00Z,A,2,zoe.quux@example.org\n2026-01-01T11:00Z,A,x,zoe.quux@example.org\n")
    (tmp_path / "map.yaml").write_text("columns: {event_time: when, item_id: SKU, price: price, user_id: who}\nnotes: [prices are gross]\n")
    build = ("data", "build", "--source", "csv", "--path", tmp_path / "a.csv")
    done = shopai(tmp_path / "home", *build, "--map", tmp_path / "map.yaml")
    assert done.returncode == 0 and "net value 2.00 = purchases 2.00" in done.stdout and "note: prices are gross" in done.stdout, done.stdout + done.stderr
    assert secrets_in(Lake(tmp_path / "home" / "lake")) == []
    wrong = shopai(tmp_path / "other", *build)
    assert (wrong.returncode, wrong.stderr) == (2, "error: map must be a file (a YAML file that tells what the columns mean)\n")
    assert not (tmp_path / "other").exists() and set(REASONS) > {"copied order"}
