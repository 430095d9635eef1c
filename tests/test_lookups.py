"""Look-ups give the same on pandas, DuckDB and Spark, keep every row, and know what they should."""

import datetime as dt
from zoneinfo import ZoneInfo, available_timezones

import duckdb
import narwhals as nw
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from backends import BACKENDS, spark, to_backend, to_pandas  # noqa: F401  spark: a fixture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

from shopai.core.config import UsageError
from shopai.events.clock import with_local_time
from shopai.events.lookups import Place, built, device_of, locate, look_up, open_geo_database, with_device, with_location
from shopai.events.terms import SearchCategories, tokens, with_search_category

WORDS = [None, "", " ", "mug", "Mug", "mug ", "ö", "null", "None", "0"]
NAMES = {"shown": "text", "size": "whole", "share": "number", "odd": "flag"}


def describe(values: list[tuple]) -> list[tuple]:
    "One answer that tells the question, and some that are missing."
    assert len(set(map(repr, values))) == len(values), "each distinct value is asked about once"
    return [(repr(value), len(value[0]) if value[0] is not None else None, None if value[1] is None else value[1] / 4, None) for value in values]


def grid() -> pd.DataFrame:
    "All words with all numbers, missing ones too, some of them several times."
    rows = [(word, number, number is None) for word in WORDS for number in (None, 0, 1, -7) for _ in range(1 + (number or 0) % 2)]
    df = pd.DataFrame(rows, columns=["word", "number", "flag"]).astype({"number": "Int64"})
    return df.assign(row=np.arange(len(df)), time=pd.to_datetime(1_770_000_000 + 1_800 * (df.index % 3), unit="s", utc=True).astype("datetime64[us, UTC]"))


@pytest.mark.parametrize("name", BACKENDS)
def test_every_row_gets_the_answer_to_its_values(name: str):
    df = grid()
    got = to_pandas(look_up(to_backend(df, name), ["word", "number"], describe, NAMES), "row")
    asked = list(zip(df.word, (None if n is pd.NA else int(n) for n in df.number), strict=True))
    expected = pd.DataFrame(describe_all(asked), columns=list(NAMES))
    assert_frame_equal(got[list(NAMES)], to_pandas(pa.Table.from_pandas(expected, schema=pa.schema(
        [("shown", pa.string()), ("size", pa.int64()), ("share", pa.float64()), ("odd", pa.bool_())]))))
    assert_frame_equal(got[list(df)], to_pandas(df))


def describe_all(asked: list[tuple]) -> list[tuple]:
    "What `describe` says, asked one by one."
    return [describe([value])[0] for value in asked]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("columns", [["flag"], ["time"], ["time", "word", "flag"]])
def test_flags_and_times_are_looked_up_too(name: str, columns: list[str]):
    def told(values: tuple) -> str: return repr([value.timestamp() if isinstance(value, dt.datetime) else value for value in values])
    df = grid()
    df.loc[::7, "time"] = None
    got = to_pandas(look_up(to_backend(df, name), columns, lambda values: [(told(value),) for value in values], {"told": "text"}), "row")
    rows = df[columns].astype(object).itertuples(index=False, name=None)
    assert got.told.tolist() == [told([None if value is pd.NaT else value for value in row]) for row in rows]


@pytest.mark.parametrize("name", BACKENDS)
def test_a_column_is_replaced_where_it_stands_and_no_other_is_touched(name: str):
    df = pd.DataFrame({"a": ["x", None], "b": [1, 2], "_key_": ["k", "l"]})
    got = look_up(to_backend(df, name), ["a", "b"], lambda values: [(f"{a}{b}", b * 2) for a, b in values], {"a": "text", "c": "whole"})
    assert list(nw.from_native(got).collect_schema()) == ["a", "b", "_key_", "c"]
    assert sorted(to_pandas(got).a) == ["None2", "x1"]


@pytest.mark.parametrize("name", BACKENDS)
def test_no_rows_and_no_answers_keep_their_types(name: str):
    df = grid()
    schema = {"text": nw.String, "whole": nw.Int64, "number": nw.Float64, "flag": nw.Boolean}
    for rows in (df, df.head(0)):
        got = nw.from_native(look_up(to_backend(rows, name), ["word"], lambda values: [(None,) * 4] * len(values), NAMES)).collect_schema()
        assert [got[column] for column in NAMES] == [schema[kind] for kind in NAMES.values()]


@pytest.mark.parametrize("name", ["pandas", "duckdb"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(st.one_of(st.none(), st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=3)),
                               st.one_of(st.none(), st.integers(-2**40, 2**40)), st.one_of(st.none(), st.booleans())), max_size=30))
def test_any_rows(name: str, rows: list[tuple]):
    df = pd.DataFrame({"a": pd.array([a for a, _, _ in rows], "string[python]"), "b": pd.array([b for _, b, _ in rows], "Int64"),
                       "c": pd.array([c for _, _, c in rows], "boolean"), "row": np.arange(len(rows))})
    got = to_pandas(look_up(to_backend(df, name), ["a", "b", "c"], lambda values: [(repr(value),) for value in values], {"told": "text"}), "row")
    assert got.told.tolist() == [repr(row) for row in rows]


@pytest.mark.parametrize("index", [[5, 5, 1], pd.Index(["x", "y", "z"]), pd.MultiIndex.from_tuples([(1, 1), (1, 2), (2, 1)])])
def test_a_pandas_frame_keeps_its_index(index):
    df = pd.DataFrame({"a": ["x", None, "x"]}, index=index)
    got = look_up(df, ["a"], lambda values: [(f"{a}!",) for a, in values], {"b": "text"})
    assert got.index.equals(df.index)
    assert got.b.tolist() == ["x!", "None!", "x!"]
    assert list(df) == ["a"], "the frame given stays as it is"


def test_frames_of_narwhals_and_arrow():
    table = pa.table({"a": ["x", None, "x"]})
    for frame in (table, nw.from_native(table), nw.from_native(table.to_pandas()), nw.from_native(duckdb.from_arrow(table))):
        got = look_up(frame, ["a"], lambda values: [(f"{a}!",) for a, in values], {"b": "text"})
        assert type(got) is type(frame)
        assert sorted(to_pandas(got).b) == ["None!", "x!", "x!"]


def test_what_does_not_fit_is_a_usage_error():
    df = pd.DataFrame({"a": ["x"], "f": [.5]})
    for name in ("pandas", "duckdb"):
        with pytest.raises(UsageError, match="column f must be text"): look_up(to_backend(df, name), ["f"], lambda v: [(1,)], {"b": "whole"})
        with pytest.raises(UsageError, match="1 answers, one for each value; got 2"):
            look_up(to_backend(df, name), ["a"], lambda v: [(1,), (2,)], {"b": "whole"})


def test_results_outlive_the_look_up(spark):  # noqa: F811
    "The answers are a table of DuckDB that hangs on an Arrow table which nobody else holds."
    import gc
    frame = to_backend(grid(), "duckdb")
    for number in range(3): frame = look_up(frame, ["word"], lambda values: [(str(a),) for a, in values], {f"told_{number}": "text"})
    gc.collect()
    got = frame.df()
    assert len(got) == len(grid()) and (got.told_0 == got.told_2).all()


# Where an address is

@pytest.fixture(scope="module")
def cities(data_dir):
    path = data_dir / "geo" / "GeoIP2-City-Test.mmdb"
    if not path.is_file(): pytest.skip(f"no {path.name}")
    return open_geo_database(path)


ADDRESSES = [  # ip, what the sender said, what stands afterwards; networks of MaxMind's test database
    ("81.2.69.142", Place(), Place("GB", "GB-ENG", "London", "Europe/London")),
    ("::ffff:81.2.69.142", Place(), Place("GB", "GB-ENG", "London", "Europe/London")),
    ("81.2.69.142", Place(country="gb"), Place("gb", "GB-ENG", "London", "Europe/London")),
    ("81.2.69.142", Place(country="FR"), Place(country="FR")),
    ("81.2.69.142", Place(timezone="Asia/Tokyo"), Place("GB", "GB-ENG", "London", "Asia/Tokyo")),
    ("2001:218::1", Place(), Place("JP", None, None, "Asia/Tokyo")),
    ("216.160.83.56", Place(), Place("US", "US-WA", "Milton", "America/Los_Angeles")),
    ("10.0.0.1", Place(), Place()), ("192.168.1.7", Place(city="Leeds"), Place(city="Leeds")), ("127.0.0.1", Place(), Place()), ("::1", Place(), Place()),
    ("fe80::1%eth0", Place(), Place()), ("rubbish", Place(), Place()), ("", Place(), Place()), (None, Place(country="DE"), Place(country="DE")),
    ("81.2.69.142:443", Place(), Place()), ("999.1.1.1", Place(), Place())]


@pytest.mark.parametrize("name", BACKENDS)
def test_places_are_coarse_and_fill_gaps_alone(cities, name: str):
    rows = pd.DataFrame([(number, ip, *said) for number, (ip, said, _) in enumerate(ADDRESSES)], columns=["row", "ip", *Place._fields])
    got = to_pandas(with_location(to_backend(rows, name), cities), "row")
    assert list(got) == list(rows), "nothing finer than the contract's columns"
    told = [Place(*(None if pd.isna(value) else value for value in row)) for row in got[list(Place._fields)].itertuples(index=False)]
    assert told == [expected for _, _, expected in ADDRESSES]


def test_ipv6_in_a_database_of_ipv4_is_nowhere():
    class Old:
        def get(self, ip: str): raise ValueError("You attempted to look up an IPv6 address in an IPv4-only database")
    assert locate("2001:218::1", Old()) == Place()


def test_a_file_that_is_no_database_of_places_is_refused(tmp_path, data_dir):
    letter = tmp_path / "letter.mmdb"
    for content in (b"", b"no database", b"\xab\xcd\xefMaxMind.com" * 3):
        letter.write_bytes(content)
        with pytest.raises(UsageError, match=r"SHOPAI_GEO_DATABASE.*letter\.mmdb is none"): open_geo_database(letter)
    for nothing in (tmp_path / "gone.mmdb", tmp_path):
        with pytest.raises(UsageError, match="SHOPAI_GEO_DATABASE.*there is no file"): open_geo_database(nothing)
    real = data_dir / "geo" / "GeoLite2-City-Test.mmdb"
    if not real.is_file(): pytest.skip("no GeoLite2-City-Test.mmdb")
    networks = real.read_bytes().replace(b"GeoLite2-City", b"GeoLite2-ASNs")  # the same file under another type
    letter.write_bytes(networks)
    with pytest.raises(UsageError, match="is a GeoLite2-ASNs database"): open_geo_database(letter)


def test_a_database_tells_its_age(cities):
    assert dt.date(2020, 1, 1) < built(cities) <= dt.datetime.now(dt.UTC).date()


# What a user agent says

CHROME = "AppleWebKit/537.36 (KHTML, like Gecko) Chrome/124.0.0.0"
SAFARI = "AppleWebKit/605.1.15 (KHTML, like Gecko)"
AGENTS = [
    (f"Mozilla/5.0 (iPhone; CPU iPhone OS 17_4_1 like Mac OS X) {SAFARI} Version/17.4.1 Mobile/15E148 Safari/604.1", "mobile", None),
    (f"Mozilla/5.0 (iPhone; CPU iPhone OS 17_4 like Mac OS X) {SAFARI} Mobile/15E148 [FBAN/FBIOS;FBAV/450.0.0.38.108]", "mobile", None),
    (f"Mozilla/5.0 (Linux; Android 14; Pixel 8) {CHROME} Mobile Safari/537.36", "mobile", None),
    (f"Mozilla/5.0 (Linux; Android 11; CUBOT KINGKONG 5 Pro) {CHROME} Mobile Safari/537.36", "mobile", None),  # a phone with "bot" in its name
    ("Mozilla/5.0 (Android 14; Mobile; rv:125.0) Gecko/125.0 Firefox/125.0", "mobile", None),
    ("Mozilla/5.0 (Mobile; Nokia 8110 4G; rv:48.0) Gecko/48.0 Firefox/48.0 KAIOS/2.5", "mobile", None),
    ("okhttp/4.12.0", "other", None),  # an app's, and so a customer's
    (f"Mozilla/5.0 (iPad; CPU OS 16_6 like Mac OS X) {SAFARI} Version/16.6 Mobile/15E148 Safari/604.1", "tablet", None),
    (f"Mozilla/5.0 (Linux; Android 13; SM-X906C) {CHROME} Safari/537.36", "tablet", None),
    ("Mozilla/5.0 (Linux; Android 9; KFMAWI) AppleWebKit/537.36 (KHTML, like Gecko) Silk/108.4.6 like Chrome/108.0.5359.220 Safari/537.36", "tablet", None),
    ("Mozilla/5.0 (Android 14; Tablet; rv:125.0) Gecko/125.0 Firefox/125.0", "tablet", None),
    (f"Mozilla/5.0 (Windows NT 10.0; Win64; x64) {CHROME} Safari/537.36 Edg/124.0.0.0", "desktop", None),
    (f"Mozilla/5.0 (Macintosh; Intel Mac OS X 14_4_1) {SAFARI} Version/17.4.1 Safari/605.1.15", "desktop", None),
    (f"Mozilla/5.0 (X11; CrOS x86_64 14541.0.0) {CHROME} Safari/537.36", "desktop", None),
    ("Mozilla/5.0 (X11; Ubuntu; Linux x86_64; rv:125.0) Gecko/20100101 Firefox/125.0", "desktop", None),
    ("Mozilla/5.0 (Web0S; Linux/SmartTV) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/94.0.4606.128 Safari/537.36 WebAppManager", "other", None),
    (f"Mozilla/5.0 (Linux; Android 12; BRAVIA 4K UR2) {CHROME} Safari/537.36", "other", None),
    ("Mozilla/5.0 (Windows NT 10.0; Win64; x64; Xbox; Xbox One) AppleWebKit/537.36 (KHTML, like Gecko) Edge/44.18363.8131", "other", None),
    ("Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)", "other", "agent: Googlebot"),
    (f"Mozilla/5.0 (Linux; Android 6.0.1; Nexus 5X Build/MMB29P) {CHROME} Mobile Safari/537.36 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)",
     "other", "agent: Googlebot"),
    ("Mozilla/5.0 (compatible; bingbot/2.0; +http://www.bing.com/bingbot.htm)", "other", "agent: bingbot"),
    ("Mozilla/5.0 (compatible; AhrefsBot/7.0; +http://ahrefs.com/robot/)", "other", "agent: AhrefsBot"),
    ("facebookexternalhit/1.1 (+http://www.facebook.com/externalhit_uatext.php)", "other", "agent: FacebookBot"),
    ("curl/8.5.0", "other", "agent: curl"), ("python-requests/2.31.0", "other", "agent: python-requests"),
    ("Go-http-client/2.0", "other", "agent: Go-http-client"), ("python-httpx/0.27.0", "other", "agent: python-httpx"), ("Wget/1.21.4", "other", "agent: Wget"),
    ("Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) HeadlessChrome/124.0.0.0 Safari/537.36", "other", "agent: HeadlessChrome"),
    ("rubbish", "other", None), ("x" * 100_000, "other", None), ("", None, None), ("  ", None, None), (None, None, None)]


@pytest.mark.parametrize("name", BACKENDS)
def test_agents_tell_devices_and_bots(name: str):
    rows = pd.DataFrame([(number, agent, None) for number, (agent, _, _) in enumerate(AGENTS)], columns=["row", "user_agent", "device_type"])
    rows = pd.concat([rows, rows.assign(row=rows.row + len(rows), device_type="tablet")])  # the same, where the sender said so
    got = to_pandas(with_device(to_backend(rows, name)), "row").astype(object)
    assert list(got) == [*rows, "bot_reason"]
    told = [tuple(None if pd.isna(value) else value for value in row) for row in got[["device_type", "bot_reason"]].itertuples(index=False)]
    assert told == [(kind, reason) for _, kind, reason in AGENTS] + [("tablet", reason) for _, _, reason in AGENTS]


def test_an_agent_made_to_be_slow_is_not():
    import time
    began = time.perf_counter()
    for piece in ("Mozilla/5.0 (" * 9_000, "; " * 50_000, "a/1 " * 30_000, "(((((" * 20_000): device_of(piece)
    assert time.perf_counter() - began < 1


# What time it is

@pytest.mark.parametrize("name", BACKENDS)
def test_local_time_is_that_of_the_zone_database(name: str):
    "A year and a half of moments in awkward zones, and moments around every shift of theirs."
    zones = ["Europe/London", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu", "America/St_Johns", "Pacific/Chatham", None, "CEST"]
    rng = np.random.default_rng(0)
    seconds = rng.integers(dt.datetime(2025, 10, 1, tzinfo=dt.UTC).timestamp(), dt.datetime(2027, 4, 1, tzinfo=dt.UTC).timestamp(), 400)
    shifts = [dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC).timestamp() for text in (
        "2026-03-29T01:00", "2026-10-25T01:00", "2026-03-08T07:00", "2026-11-01T06:00", "2026-04-04T15:00", "2026-10-03T15:30")]
    moments = np.unique(np.concatenate([seconds, [shift + step for shift in shifts for step in (-3_601, -1_801, -1, 0, 1, 1_799, 3_599, 3_600)]]))
    times = pd.to_datetime(moments, unit="s", utc=True).astype("datetime64[us, UTC]")
    df = pd.concat([pd.DataFrame({"event_time": times, "timezone": zone}) for zone in zones], ignore_index=True)
    df = pd.concat([df, df.tail(1).assign(event_time=pd.NaT)], ignore_index=True).astype({"event_time": times.dtype}).assign(row=lambda df: df.index)
    got = to_pandas(with_local_time(to_backend(df, name), "Asia/Kolkata"), "row")
    known = available_timezones()
    hours = [time.to_pydatetime().astimezone(ZoneInfo(zone if zone in known else "Asia/Kolkata")).hour
             for time, zone in df[["event_time", "timezone"]][:-1].itertuples(index=False)]
    assert got.local_hour[:-1].tolist() == hours
    assert got.part_of_day[:-1].tolist() == [("night", "morning", "afternoon", "evening")[hour // 6] for hour in hours]
    assert got.local_hour.isna().iloc[-1] and pd.isna(got.part_of_day.iloc[-1])


def test_the_engines_own_zone_changes_nothing(spark):  # noqa: F811
    df = pd.DataFrame({"row": [0, 1], "event_time": pd.to_datetime(["2026-10-03T15:31Z", "2026-03-29T01:00Z"]).astype("datetime64[us, UTC]"),
                       "timezone": ["Australia/Lord_Howe", "Europe/London"]})
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'Asia/Kathmandu'")
    assert to_pandas(with_local_time(connection.from_arrow(pa.Table.from_pandas(df))), "row").local_hour.tolist() == [2, 2]
    spark.conf.set("spark.sql.session.timeZone", "Asia/Kathmandu")
    try: assert to_pandas(with_local_time(to_backend(df, "pyspark")), "row").local_hour.tolist() == [2, 2]
    finally: spark.conf.set("spark.sql.session.timeZone", "UTC")


def test_the_first_year_of_all_has_no_local_time_and_breaks_nothing():
    table = pa.table({"event_time": pa.array([dt.datetime(1, 1, 1, 1, tzinfo=dt.UTC), dt.datetime(9999, 12, 31, 23, tzinfo=dt.UTC)], pa.timestamp("us", "UTC")),
                      "timezone": ["America/New_York", "Asia/Tokyo"]})
    assert with_local_time(table)["local_hour"].to_pylist() == [None, None]


def test_all_clocks_are_set_by_quarters_of_an_hour():
    "What `with_local_time` rests on, for all zones from 2015 to 2035."
    start, days = dt.datetime(2015, 1, 1, tzinfo=dt.UTC), range(0, 20 * 365, 28)
    for name in available_timezones():
        zone = ZoneInfo(name)
        assert {(start + dt.timedelta(days=day)).astimezone(zone).utcoffset() % dt.timedelta(minutes=15) for day in days} == {dt.timedelta()}, name


# What a search is after

ITEMS = pd.DataFrame({"title": ["Red mug", "Blue tea mug", "Cup, tea", "Tea towel", None, "Café clock", "Orphan"],
                      "category": ["Mugs", "Mugs", "Mugs", "Towels", "Towels", "Clocks", None]})
TERMS = ["mug", "MUGS!", "tea towels", "spoon", "orphan", "", None, "cafe", "mug " * 500]


@pytest.mark.parametrize("name", BACKENDS)
def test_terms_point_to_categories(name: str):
    categories = SearchCategories.from_items(to_backend(ITEMS, name))
    rows = pd.DataFrame({"row": range(len(TERMS)), "search_term": TERMS})
    got = to_pandas(with_search_category(to_backend(rows, name), categories), "row")
    assert [None if pd.isna(value) else value for value in got.search_category] == [
        "Mugs", "Mugs", "Towels", None, None, None, None, "Clocks", "Mugs"]
    assert to_pandas(with_search_category(to_backend(rows, name), None)).search_category.isna().all()


TEXT = st.text(st.characters(codec="utf-8"))

@settings(max_examples=200, deadline=None)
@given(term=TEXT, title=TEXT, other=TEXT)
def test_any_text_is_a_term_and_a_title(term: str, title: str, other: str):
    categories = SearchCategories.from_items(pa.table({"title": [title, other, other, None], "category": ["a", "b", title, other]}))
    chance = categories.probabilities(term)
    assert chance is None or (np.isfinite(chance).all() and chance.sum() == pytest.approx(1))
    assert (chance is None) == (not set(tokens(term)) & set(categories.gain))
    assert len(set(tokens(term))) == len(tokens(term))


def test_naive_bayes_by_the_book():
    "The same probabilities as scikit-learn's multinomial naive Bayes with the same smoothing."
    sklearn = pytest.importorskip("sklearn.naive_bayes")
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(30)]
    titles = [" ".join(rng.choice(words, 4, replace=False)) for _ in range(200)]
    labels = [f"c{i}" for i in rng.integers(0, 7, 200)]
    learnt = SearchCategories.from_items(pd.DataFrame({"title": titles, "category": labels}))
    vocabulary = sorted(learnt.gain)
    def bags(texts: list[str]) -> np.ndarray: return np.array([[word in tokens(text) for word in vocabulary] for text in texts], int)
    model = sklearn.MultinomialNB(alpha=1 / 7).fit(bags([f"{title} {label}" for title, label in zip(titles, labels, strict=True)]), labels)
    terms = [" ".join(rng.choice(words, rng.integers(1, 4), replace=False)) for _ in range(50)]
    assert list(model.classes_) == learnt.names
    np.testing.assert_allclose([learnt.probabilities(term) for term in terms], model.predict_proba(bags(terms)), atol=1e-12)
