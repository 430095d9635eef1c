"""Ingest by Spark beside the single process: the same records of the local log, on this machine.

    python benchmarks/spark.py [--records 200000] [--cores 2]

Spark lands the records in two halves, since its first batch compiles what the later ones use."""

import argparse
import json
import random
import tempfile
import time
from datetime import UTC, datetime, timedelta

from shopai.core.lake import Lake
from shopai.events.bus import open_bus
from shopai.events.enrich import Enricher
from shopai.events.ingest import Ingest, serve_ingest
from shopai.events.spark import SparkIngest, spark_session
from shopai.events.wire import Door

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)
DOOR = Door(key=b"a secret of the benchmark", unsaid_consent="given")


def records(count: int) -> list[tuple[str, bytes]]:
    "As the API writes them: views of 5,000 items by 20,000 visitors on 200 kinds of browsers, 100 a second."
    draw = random.Random(1)
    made = []
    for n in range(count):
        who, at = draw.randrange(20_000), (NOON + timedelta(seconds=n / 100)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        event = {"v": 1, "event_id": f"e{n}", "event_name": "view_item", "event_time": at, "received_at": at, "anonymous_id": f"v{who}",
                 "ip": f"10.{who % 250}.{who // 250}.1",
                 "user_agent": f"Mozilla/5.0 (Windows NT 10.0; Win64; x64; rv:{who % 200}.0) Gecko/20100101 Firefox/{who % 200}.0",
                 "items": [{"item_id": f"i{draw.randrange(5_000)}", "price": 9.9, "quantity": 1}]}
        made.append((f"v{who}", json.dumps(event, separators=(",", ":")).encode()))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--cores", type=int, default=2)
    chosen = parser.parse_args()
    made, half = records(chosen.records), chosen.records // 2
    with tempfile.TemporaryDirectory(prefix="spark benchmark ") as folder:
        bus = open_bus(f"{folder}/bus")
        bus.send(made[:half])
        began = time.perf_counter()
        spark = spark_session(f"local[{chosen.cores}]")
        found = {"start of Spark, s": round(time.perf_counter() - began, 1)}
        many = SparkIngest(spark, f"{folder}/bus", Lake(f"{folder}/many"), Enricher(), DOOR)
        for name, new in (("first batch", []), ("second batch", made[half:])):
            bus.send(new)
            landed = many.land(many.waiting())
            found[f"Spark, {name}, events a second"] = round(landed.events / landed.seconds)
        many.close()
        spark.stop()
        alone = Ingest(bus, Lake(f"{folder}/alone"), Enricher(), DOOR, open_bus(f"{folder}/bus", "alone.dead"))
        began = time.perf_counter()
        landed = serve_ingest(alone, once=True, wait=.01)
        found["single process, events a second"] = round(landed.events / (time.perf_counter() - began))
        alone.close()
        bus.close()
    print(json.dumps({"records": chosen.records, "cores": chosen.cores} | found, indent=2))


if __name__ == "__main__": main()
