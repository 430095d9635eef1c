"""How long it takes to write features, to bring them online, to push what has just happened, and to ask for a training set.

    python benchmarks/feature_store.py
    python benchmarks/feature_store.py --customers 10000 --store sqlite

300,000 moments of 100,000 customers (17 features each, made up) go into a lake in a temporary folder, and the newest of each customer into the shop's own kinds
of online stores: a SQLite file, and a Redis of its own on a free port. Then all of it again, which finds every row there; then batches of rows as the ingest
pushes them. Last come training sets: as many questions as customers, at any moment of the same months. Feast's own file store is asked 10,000 of these
questions, and it is counted how many of them it doesn't give back.
"""

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

from shopai.core.config import Settings
from shopai.core.files import write_json
from shopai.core.manifest import code_version
from shopai.features.catalogue import DAY, VIEWS
from shopai.features.store import FeatureStore

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "feature_store.json"
sys.path.insert(0, str(ROOT / "tests"))
VIEW, START, DAYS = VIEWS["user_context"], 1_767_225_600_000_000, 90  # 2026-01-01, in µs
END = datetime.fromtimestamp(START / 1e6 + DAYS * 86_400, UTC)
FEW = 10_000  # questions that Feast's file store is asked


def moments(customers: int, each: int, seed: int) -> pd.DataFrame:
    "`each` rows of each customer, at any time."
    rng, n = np.random.default_rng(seed), customers * each
    items = np.array([f"item-{i}" for i in range(5000)], object)
    draw = {"whole": lambda: rng.integers(0, START, n), "number": lambda: rng.normal(size=n), "text": lambda: items[rng.integers(0, len(items), n)]}
    who = np.repeat(np.array([f"customer-{i:07d}" for i in range(customers)], object), each)
    when = pd.to_datetime(START + rng.integers(0, DAYS * DAY, n), unit="us", utc=True)
    return pd.DataFrame({"user_id": who, "event_timestamp": when, **{feature.name: draw[feature.dtype]() for feature in VIEW.features}})


def seconds(work, times: int = 1) -> tuple[dict, object]:
    "On the wall and on the processor (this process), for one of the times; and what the work gives."
    start, processor = time.perf_counter(), time.process_time()
    for _ in range(times): told = work()
    return {"seconds": round((time.perf_counter() - start) / times, 4), "processor_seconds": round((time.process_time() - processor) / times, 4)}, told


@contextlib.contextmanager
def online(kind: str) -> Iterator[str]:
    from feast_store import free_port, redis_at, stop
    if kind == "sqlite": yield ""
    else:
        server = redis_at(port := free_port())
        try: yield f"redis://127.0.0.1:{port}/0"
        finally: stop(server)


def filled(kind: str, rows: pd.DataFrame, folder: str) -> tuple[dict, FeatureStore]:
    "Everything about one kind of online store."
    with online(kind) as where:
        store = FeatureStore(Settings(home=Path(folder, kind), online_store=where, feature_project="bench"))
        store.apply()
        found = {"write into the lake": seconds(lambda: store.write(VIEW.name, rows))[0]}
        found["materialize"], sent = seconds(lambda: store.materialize(until=END))
        found["materialize again"], _ = seconds(lambda: store.materialize(until=END, full=True))
        for size, times in ((1, 50), (100, 20), (10_000, 1)):
            batch = moments(size, 1, size)
            found[f"push {size:,}"], _ = seconds(lambda batch=batch: store.push(VIEW.name, batch), times)
        pushed = 10_000 / found["push 10,000"]["seconds"]
        size = {"file_mb": round(Path(store.settings.home, "features", "online.db").stat().st_size / 1e6)} if kind == "sqlite" else \
            {"memory_mb": round(store.feast._get_provider().online_store._client.info("memory")["used_memory"] / 1e6)}
        return {"store": kind, "rows_online": sent[VIEW.name], "pushed_rows_a_second": round(pushed), **size, "took": found}, store


def asked(store: FeatureStore, customers: int) -> dict:
    "Training sets, ours and Feast's own."
    questions = moments(customers, 1, 5)[["user_id", "event_timestamp"]]
    ours, told = seconds(lambda: store.training_set(questions, [VIEW.name]))
    few = questions.sample(min(FEW, customers), random_state=0).reset_index(drop=True)
    mine, same = seconds(lambda: store.training_set(few, [VIEW.name]))
    feast, theirs = seconds(lambda: by_feast(store, few))
    lost = len(few) - len(few.merge(theirs[["user_id", "event_timestamp"]].drop_duplicates(), on=["user_id", "event_timestamp"]))
    answered = int(same[f"{VIEW.name}__seen_at"].notna().sum())
    beside = {"questions": len(few), "answered": answered, "ours": mine, "feast_file_store": feast, "rows_it_lost": lost}
    return {"questions": customers, "rows": len(told), **ours, "beside_feast": beside}


def by_feast(store: FeatureStore, questions: pd.DataFrame) -> pd.DataFrame:
    "The same question to Feast's file store."
    from feast import FeatureStore as Feast
    from feast import RepoConfig
    config = store.feast.config.model_dump(by_alias=True, exclude_none=True)
    with tempfile.TemporaryDirectory() as folder:
        kept = {name: config[name] for name in ("project", "provider", "entity_key_serialization_version")}
        kept |= {"registry": f"{folder}/registry.db", "online_store": {"type": "sqlite", "path": f"{folder}/online.db"}}
        other = Feast(config=RepoConfig(**kept, offline_store={"type": "dask"}))
        other.apply([store.feast.get_entity("user_id"), store.feast.get_feature_view(VIEW.name)])
        return other.get_historical_features(questions, [f"{VIEW.name}:{name}" for name in VIEW.names]).to_df()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--customers", type=int, default=100_000)
    parser.add_argument("--store", nargs="+", choices=["sqlite", "redis"], default=["sqlite", "redis"])
    parser.add_argument("--out", type=Path, default=RESULT)
    a = parser.parse_args()
    warnings.simplefilter("ignore")  # of the libraries
    load, rows, stores = os.getloadavg()[0], moments(a.customers, 3, 0), []
    with tempfile.TemporaryDirectory(prefix="feature-store-") as folder:
        for kind in a.store:
            found, store = filled(kind, rows, folder)
            stores.append(found)
        training = asked(store, a.customers)
    write_json(a.out, {
        "command": "python benchmarks/feature_store.py", "measured": datetime.now(UTC).isoformat(timespec="seconds"), "code": code_version(),
        "customers": a.customers, "features": len(VIEW.features), "stores": stores, "training_set": training,
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "load_before": round(load, 2)}})
    print(json.dumps({"stores": stores, "training_set": training}, indent=2))


if __name__ == "__main__": main()
