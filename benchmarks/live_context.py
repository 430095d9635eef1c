"""Does it help to tell the recommender what the customer did lately? Measured on simulated shops, whose visitors search, view and buy.

    python benchmarks/live_context.py
    python benchmarks/live_context.py --models transformer --seeds 0 --customers 500 --out /tmp/transformer.json

Each model, with the hyper-parameters of the training job, is fitted on purchases up to four weeks before the end and bundled with them. Each first purchase of
an item within those weeks is a question, put at three moments of the visit: at its `start`; at the `choice` of what to look at, just before the first view of
that item; and before the `cart`, when the item has nearly always been viewed. The last five items that the same customer viewed, carted or bought before are
left aside (`history`), or go to the model and are withheld from the answer (`recent`: what is served in a visit), or only go to the model (`recent, shown`).
Where the purchased item was viewed in the visit before, the answer is trivial: these questions are counted apart as well. A visitor without a name gets what is
`popular`, or is known by these items `alone`.
"""

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd

from shopai.core.files import write_json
from shopai.core.lake import Lake
from shopai.data.histories import SECONDS_A_DAY, Histories
from shopai.data.interactions import Interactions, purchases
from shopai.data.shop_lake import build_shop
from shopai.recommend.baselines import Popularity
from shopai.recommend.bundle import Recommender, save_bundle
from shopai.recommend.job import RecommendParameters, line_up

RESULT = Path(__file__).parent / "results" / "live_context.json"
WAYS = ("history", "recent", "recent, shown", "popular", "alone")
SEEN = ("view_item", "add_to_cart", "purchase")


def last_items(codes: np.ndarray, n: int = 5) -> list[int]:
    "The last `n` items, oldest first; consecutive repeats count once."
    return [code for code, _ in groupby(codes[-50:])][-n:]


def questions(events: pd.DataFrame, start: int) -> Iterator[dict]:
    "A question for each moment of each first purchase from `start` on."
    for user, rows in events.groupby("user_id", sort=False):
        code, at, name, visit = (rows[column].to_numpy() for column in ("code", "at", "event_name", "session_id"))
        for bought in np.flatnonzero((name == "purchase") & (at >= start)):
            if (code[:bought][name[:bought] == "purchase"] == code[bought]).any(): continue
            here = np.flatnonzero(visit == visit[bought])
            mine = here[code[here] == code[bought]]
            carts = mine[name[mine] == "add_to_cart"]
            for moment, when in (("start", here[0]), ("choice", mine[0]), ("cart", carts[0] if len(carts) else bought)):
                yield {"user": user, "visit": visit[bought], "moment": moment, "item": code[bought], "last": last_items(code[:when]),
                       "viewed": code[bought] in code[here[0]:when], "pause_days": (at[when] - at[when - 1]) / SECONDS_A_DAY if when else np.nan}


def place(scores: np.ndarray, item: int, withheld: np.ndarray) -> float:
    "Rank of an item from 0; infinite if it is withheld."
    if item in withheld: return np.inf
    scores = scores.copy()
    scores[withheld] = -np.inf
    return float((scores > scores[item]).sum() + (scores[:item] == scores[item]).sum())


def places(recommender: Recommender, question: dict) -> dict[str, float]:
    "Where each way of asking ranks the item."
    row, now, recent, item = recommender.user_ids.find(question["user"]), recommender.histories.now, np.array(question["last"], int), question["item"]
    had, times = recommender.histories.row(row) if row >= 0 else (recent[:0], recent[:0])

    def scores(items: np.ndarray, times: np.ndarray) -> np.ndarray:
        return recommender.score_histories(Histories(np.array([0, len(items)]), items, times, now))[0][0]

    fresh = np.full(len(recent), now)
    told = scores(np.append(had, recent), np.append(times, fresh))
    return {"history": place(scores(had, times), item, had), "recent": place(told, item, np.append(had, recent)), "recent, shown": place(told, item, had),
            "popular": place(scores(recent[:0], recent[:0]), item, recent[:0]), "alone": place(scores(recent, fresh), item, recent)}


def shop(folder: Path, seed: int, customers: int, items: int, days: int) -> tuple[Interactions, pd.DataFrame]:
    "Purchases, and what named customers who may be watched saw in the last weeks, in order."
    lake = Lake(folder / "lake")
    build_shop(lake, customers, items, days, seed)
    bought = purchases(lake.read("events", where="event_name = 'purchase'"))
    columns = ["event_id", "event_name", "event_time", "user_id", "session_id", "item_id", "is_bot", "consent"]
    events = lake.read("events", columns, f"event_name IN {SEEN} AND user_id IS NOT NULL AND NOT coalesce(is_bot, false) AND coalesce(consent, true)")
    code = {item: number for number, item in enumerate(bought.item_ids)}
    events = events.assign(code=events["item_id"].map(code), at=events["event_time"].astype("datetime64[s, UTC]").astype("int64")).dropna(subset="code")
    return bought, events.astype({"code": int}).sort_values(["at", "event_id"], kind="stable")


def measure(models: list[str], seed: int, customers: int, items: int, days: int, weeks: int) -> pd.DataFrame:
    "Every question of one shop with the places, for each model."
    factories = line_up(RecommendParameters(models=models, transformer={"d_model": 64, "epochs": 4, "baskets": 0.1}))  # the network of params/smoke
    with tempfile.TemporaryDirectory() as folder:
        bought, events = shop(Path(folder), seed, customers, items, days)
        start = bought.now - weeks * 7 * SECONDS_A_DAY
        past = bought.before(start)
        asked, found = list(questions(events, start)), []
        for name, make in factories.items():
            save_bundle(f"{folder}/{name}", make(0).fit(past), past, {}, Popularity().fit(past))  # its codes are those of `bought`
            recommender = Recommender.load(f"{folder}/{name}")
            found.append(pd.DataFrame([question | places(recommender, question) for question in asked]).assign(model=name))
        return pd.concat(found).assign(seed=seed).drop(columns="last")


def figures(rows: pd.DataFrame) -> dict:
    "HR@10 and NDCG@10 of each way: mean over shops and standard deviation, and the mean gain over `history`."
    found: dict = {"questions": len(rows), "visits": int(rows.groupby("seed")["visit"].nunique().sum())}
    for name, gain in (("hr@10", lambda p: (p < 10).astype(float)), ("ndcg@10", lambda p: np.where(p < 10, 1 / np.log2(np.minimum(p, 10) + 2), 0.0))):
        by_shop = rows[list(WAYS)].apply(gain).groupby(rows["seed"]).mean()
        found[name] = {way: {"mean": round(by_shop[way].mean(), 4), "sd": round(by_shop[way].std(ddof=len(by_shop) > 1), 4)} for way in WAYS}
        found[name]["gain of recent"] = [round(each, 4) for each in by_shop["recent"] - by_shop["history"]]
    return found


def moments(rows: pd.DataFrame) -> dict:
    "The figures of one model at each moment."
    found = {moment: figures(part) for moment, part in rows.groupby("moment", sort=False)}
    for viewed, part in rows[rows["moment"] == "cart"].groupby("viewed"): found[f"cart, {'viewed' if viewed else 'not viewed'} in the visit"] = figures(part)
    start = rows[rows["moment"] == "start"]
    for days, part in start.groupby(pd.cut(start["pause_days"], [0, 1 / 48, 1, 7, 1_000]), observed=True):
        found[f"start, {days.left:.3g} to {days.right:.3g} days after the last event"] = figures(part)
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a simulated shop each")
    options.add_argument("--customers", type=int, default=2_000)
    options.add_argument("--items", type=int, default=1_000)
    options.add_argument("--days", type=int, default=270, help="length of the history")
    options.add_argument("--weeks", type=int, default=4, help="the last weeks, in which is asked")
    options.add_argument("--models", nargs="+", default=["decayed-ease", "ease", "item-knn"], help="as the training job names them")
    options.add_argument("--out", type=Path, default=RESULT, help="where the figures go")
    given = options.parse_args()
    began = time.perf_counter()
    shops = [measure(given.models, seed, given.customers, given.items, given.days, given.weeks) for seed in given.seeds]
    rows = pd.concat(shops, ignore_index=True)
    found = {model: moments(part) for model, part in rows.groupby("model", sort=False)}
    shown = {name: value for name, value in vars(given).items() if name not in ("models", "out")}
    write_json(given.out, {"command": "python benchmarks/live_context.py", "data": "simulated",
                           "measured": datetime.now(UTC).isoformat(timespec="seconds"),
                           "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}", "shops": shown,
                           "seconds": round(time.perf_counter() - began), "models": found})
    told = {(model, moment, name): {"questions": each["questions"], **{way: each[name][way]["mean"] for way in WAYS}}
            for model, part in found.items() for moment, each in part.items() for name in ("hr@10", "ndcg@10")}
    print(pd.DataFrame(told).T.to_string())


if __name__ == "__main__":
    main()
