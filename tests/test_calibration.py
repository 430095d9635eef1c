"""The default synthetic shop beside Online Retail: near where it must be, and a shop that is far is seen."""
import duckdb
import numpy as np
import pandas as pd
import pytest

from shopai.data.calibration import LIMIT, LIMITED, SAMPLES, Facts, distances, facts, simulated_sales
from shopai.data.customers import Population
from shopai.data.sources import load_source
from shopai.data.world import make_world

LIMITED_LABELS = [SAMPLES[name] for name in LIMITED]


@pytest.fixture(scope="module")
def books(online_retail) -> pd.DataFrame:
    return load_source("online-retail", online_retail).events


@pytest.fixture(scope="module")
def real(books) -> Facts:
    return facts(books)


def beyond(table: pd.DataFrame) -> pd.DataFrame:
    "The rows over their limit."
    return table[table["distance"] > table["limit"]]


def test_facts_of_the_real_year_are_those_that_sql_finds(books, real):
    "DuckDB counts the same things in another language."
    words = dict.fromkeys(("event_name", "user_id", "item_id", "transaction_id"), object)
    sales = books.loc[books["user_id"].notna(), [*words, "event_time", "quantity", "price"]].astype(words)
    sql = duckdb.connect()
    sql.register("sales", sales.assign(event_time=sales["event_time"].dt.tz_localize(None)))
    sql.execute("CREATE VIEW sold AS FROM sales WHERE event_name = 'purchase'")
    sql.execute("CREATE VIEW orders AS SELECT sum(quantity * price) AS value, count(DISTINCT item_id) AS items FROM sold GROUP BY transaction_id")
    sql.execute("CREATE VIEW days AS SELECT DISTINCT user_id, event_time::DATE AS day FROM sold")
    sql.execute("CREATE VIEW gaps AS SELECT day - lag(day) OVER (PARTITION BY user_id ORDER BY day) AS gap FROM days")
    one = lambda query: sql.execute(query).fetchone()
    assert one("SELECT count(*), median(items), quantile_cont(items, .9) FROM orders") == (len(real.items), np.median(real.items), np.quantile(real.items, .9))
    assert one("SELECT sum(value), median(value) FROM orders") == pytest.approx((real.value.sum(), np.median(real.value)))
    assert one("SELECT count(gap), median(gap), max(gap) FROM gaps") == (len(real.gap), np.median(real.gap), real.gap.max())
    assert one("SELECT count(*), avg((n > 1)::INT) FROM (SELECT count(*) AS n FROM days GROUP BY user_id)") == pytest.approx((len(real.orders), real.repeat))
    assert one("SELECT max(n) / sum(n) FROM (SELECT count(*) AS n FROM sold GROUP BY item_id)") == pytest.approx((real.popularity[0],))
    assert one("SELECT count(*) FILTER (event_name = 'refund') / count(*) FILTER (event_name = 'purchase') FROM sales") == pytest.approx((real.refund,))
    spread = "SELECT median(s) FROM (SELECT stddev_pop(ln(price)) AS s FROM sold GROUP BY item_id HAVING count(*) > 1)"
    assert one(spread) == pytest.approx((np.median(real.spread),), abs=1e-9)


def test_the_default_shop_resembles_the_real_one(real):
    "Order value, items per order and days between orders; all other distances stand in the message."
    table = distances(real, facts(simulated_sales(make_world())))
    assert table["limit"].dropna().to_dict() == dict.fromkeys(LIMITED_LABELS, LIMIT)
    assert beyond(table).empty, f"over the limit: {', '.join(beyond(table).index)}\n{table.round(3).to_string()}"


def test_a_shop_that_is_unlike_the_real_one_is_seen(real):
    "Baskets of a corner shop: the length of orders, and with it their value, leave the limit."
    table = distances(real, facts(simulated_sales(make_world(600, 150, 45, population=Population(basket=1.)))))
    assert {"order value", "items per order"} <= set(beyond(table).index), table.round(3).to_string()
