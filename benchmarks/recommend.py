"""How good the recommenders are on Online Retail (a temporal split, whole catalogue, items new to the customer), and how long that takes.

    python benchmarks/recommend.py --data ../shared/data/online_retail.parquet --profile default --home .shopai/benchmark

Reads the invoices into a lake of its own and runs the job as `shopai run recommend` does. Models are chosen on validation; the figures are of the test weeks,
mean and standard deviation over seeds. RecTools' SASRec, the peer, took 874 s for .3314 / .0636 on two cores under the same protocol.
"""

import argparse
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from shopai.core.config import get_settings
from shopai.core.files import write_json
from shopai.core.jobs import run_job
from shopai.core.lake import Lake
from shopai.data.sources import load_source, write_source

RESULT = Path(__file__).parent / "results" / "recommend.json"
SHOWN = ("hr@10", "ndcg@10", "all_ndcg@10", "coverage@10", "shuffled_ndcg@10", "fit_seconds")


def build(data: Path, lake: Lake) -> dict:
    "The invoices in the lake, and what that took."
    started = time.perf_counter()
    report = write_source(load_source("online-retail", data), lake)
    return {"seconds": round(time.perf_counter() - started, 1), "rows_in": report["rows_in"], "accepted": report["accepted"], "rejected": report["rejected"],
            "net_value": report["net_value"]["raw"], "difference": report["net_value"]["difference"]}


def figures(board: pd.DataFrame) -> dict:
    "split → part → model → figure → mean, and standard deviation where there is more than one seed."
    found: dict = {}
    for (split, part, model), rows in board.groupby(["split", "part", "model"], sort=False):
        mean, spread = rows[list(SHOWN)].mean(), rows[list(SHOWN)].std()
        values = {name: {"mean": round(mean[name], 4)} | ({"sd": round(spread[name], 4)} if len(rows) > 1 else {}) for name in SHOWN}
        found.setdefault(split, {}).setdefault(part, {})[model] = {"seeds": len(rows), **values}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=get_settings().data_dir / "online_retail.parquet", help="Online Retail as Parquet, CSV or XLSX")
    parser.add_argument("--profile", default="default", help="params/<profile>/recommend.yaml")
    parser.add_argument("--home", type=Path, default=Path(".shopai/benchmark"), help="a home of its own")
    options = parser.parse_args()
    settings = get_settings(home=options.home)
    lake = build(options.data, Lake.from_settings(settings))
    result = run_job("recommend", options.profile, settings=settings)
    manifest, board = result.manifest, figures(pd.read_csv(result.folder / "leaderboard.csv"))
    write_json(RESULT, {
        "command": f"python benchmarks/recommend.py --profile {options.profile}", "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}", "code_version": manifest["code_version"], "lake": lake,
        "job_seconds": round(manifest["seconds"]), "leaderboard": board,
        "served": {"model": manifest["model"], **{name: round(value, 4) for name, value in result.metrics.items()}}})
    shown = {model: {name: value["mean"] for name, value in values.items() if name != "seeds"} for model, values in board["temporal"]["test"].items()}
    print(pd.DataFrame(shown).T.to_string())
    print(f"served: {result.manifest['model']}, ndcg@10 {result.metrics['ndcg@10']:.4f}; written to {RESULT}")


if __name__ == "__main__":
    main()
