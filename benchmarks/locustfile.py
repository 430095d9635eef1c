"""Traffic for `benchmarks/serving.py`: request bodies from a file, in turn, at a constant rate; each response time is kept, not a histogram of them.

By hand: SHOPAI_TRAFFIC=bodies.json SHOPAI_TIMES=times.json locust -f benchmarks/locustfile.py --headless -u 10 -t 30s --host http://127.0.0.1:8000
"""

import itertools
import json
import os
import random
from pathlib import Path

import gevent
from locust import FastHttpUser, constant_throughput, events, task

BODIES = itertools.cycle(json.loads(Path(os.environ["SHOPAI_TRAFFIC"]).read_text(encoding="utf-8")))
EACH = float(os.environ.get("SHOPAI_RATE_EACH", "5"))  # requests a second of one user
STARTS: list[float] = []  # seconds since 1970
TIMES: list[float] = []   # milliseconds
LABELS: list[str | None] = []  # what the answer says in `context`
ERRORS: list[str] = []


@events.request.add_listener
def _keep(start_time, response_time, exception, response, **_):
    STARTS.append(start_time)
    TIMES.append(response_time)
    LABELS.append(None if exception else response.json().get("context"))
    if exception is not None: ERRORS.append(str(exception))


@events.quitting.add_listener
def _write(**_):
    kept = {"starts": STARTS, "milliseconds": TIMES, "labels": LABELS, "errors": ERRORS}
    Path(os.environ["SHOPAI_TIMES"]).write_text(json.dumps(kept), encoding="utf-8")


class Customer(FastHttpUser):
    "One of a few clients that share the rate. They start at random moments, or all of them would ask in the same millisecond of each second."

    wait_time = constant_throughput(EACH)

    def on_start(self):
        gevent.sleep(random.random() / EACH)  # noqa: S311

    @task
    def recommend(self):
        with self.client.post("/v1/recommendations", json=next(BODIES), catch_response=True) as answer:
            if answer.status_code != 200: answer.failure(f"status {answer.status_code}")
            elif not answer.json()["items"]: answer.failure("no items")
