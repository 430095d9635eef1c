"""How far the default synthetic shop (5,000 customers, 1,000 items, 365 days) is from Online Retail, trait by trait, for several seeds.

    python benchmarks/calibration.py --data ../shared/data/online_retail.parquet --seeds 0 1 2

The first seed's row is the one to quote; the others, with other customers, items and luck, say how much of it is chance. The traits and distances are those of
`shopai.data.calibration`.
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
from shopai.core.manifest import code_version
from shopai.data.calibration import LIMIT, Facts, distances, facts, simulated_sales
from shopai.data.sources import load_source
from shopai.data.world import make_world

RESULT = Path(__file__).parent / "results" / "calibration.json"


def measure(real: Facts, seed: int) -> tuple[pd.DataFrame, dict]:
    "The distances of one simulated year, and how large it is."
    started = time.perf_counter()
    found = facts(simulated_sales(make_world(seed=seed), seed=seed))
    size = {"orders": len(found.value), "lines": len(found.pieces), "customers": len(found.orders), "seconds": round(time.perf_counter() - started, 1)}
    return distances(real, found), size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=get_settings().data_dir / "online_retail.parquet", help="Online Retail as Parquet, CSV or XLSX")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the simulated years; the first is the one to quote")
    options = parser.parse_args()
    real = facts(load_source("online-retail", options.data).events)
    tables, sizes = {}, {}
    for seed in options.seeds:
        tables[seed], sizes[seed] = measure(real, seed)
    first = tables[options.seeds[0]]
    every = pd.DataFrame({seed: table["distance"] for seed, table in tables.items()})
    limited = first["limit"].notna()
    within = bool((every[limited] <= LIMIT).all(axis=None))
    rows = {trait: {"real": round(row.real, 4), "simulated": round(row.simulated, 4), "distance": round(row.distance, 4), "kind": row.kind,
                    "limit": LIMIT if limited[trait] else None, "over_seeds": every.loc[trait].round(4).tolist()} for trait, row in first.iterrows()}
    write_json(RESULT, {
        "command": f"python benchmarks/calibration.py --seeds {' '.join(map(str, options.seeds))}", "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}", "code_version": code_version(),
        "shop": "5,000 customers, 1,000 items, 365 days", "simulated": {str(seed): size for seed, size in sizes.items()},
        "real": {"orders": len(real.value), "lines": len(real.pieces), "customers": len(real.orders)}, "within_limits": within, "traits": rows})
    print(first.drop(columns="kind").assign(**{f"seed {seed}": every[seed] for seed in options.seeds[1:]}).round(3).to_string(na_rep=""))
    print(f"order value, items per order and days between orders {'all' if within else 'NOT all'} within {LIMIT}; written to {RESULT}")


if __name__ == "__main__":
    main()
