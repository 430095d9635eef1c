"""The same lake on object storage: the S3 protocol over HTTP against a real server (moto's, in a process of its own)."""

import datetime as dt
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import pandas as pd
import pytest
from test_lake import events

from shopai.core.config import Settings, UsageError
from shopai.core.lake import Append, Lake


def ask(server: str, method: str, path: str) -> None:
    connection = HTTPConnection(server, timeout=10)
    connection.request(method, path)
    assert connection.getresponse().status == 200
    connection.close()


def make_bucket(endpoint: str, bucket: str) -> str:
    ask(endpoint.removeprefix("http://"), "PUT", f"/{bucket}")
    return bucket


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    "The address of a fresh S3 server."
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            assert server.poll() is None, "the S3 server ended by itself"
            try:
                ask(f"127.0.0.1:{port}", "GET", "/")
                break
            except (HTTPException, OSError):
                time.sleep(.1)
        else:
            pytest.fail("the S3 server does not answer")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(10)


OPTIONS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true", "aws_conditional_put": "etag"}


@pytest.fixture(params=["options", "environment"])
def lake(endpoint: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Lake:
    "A lake in a new bucket, told where the server is by its options or, as in production, by the environment."
    bucket = make_bucket(endpoint, f"shop-{request.param}")
    if request.param == "options": return Lake(f"s3://{bucket}/the/lake", {**OPTIONS, "AWS_ENDPOINT_URL": endpoint})
    for name, value in {**OPTIONS, "AWS_ENDPOINT_URL": endpoint}.items(): monkeypatch.setenv(name.upper(), value)
    return Lake.from_settings(Settings(lake_uri=f"s3://{bucket}/the/lake"))


def test_everything_works_as_in_a_folder(lake: Lake):
    assert (lake.tables(), lake.versions()) == ([], {})
    frame = events(50).assign(quantity=[-1.] + [1.] * 49)
    assert lake.append("events", frame, app=("till", 0)) == Append(49, 1, 1)
    assert lake.append("events", frame, app=("till", 0)) == Append(0, 0, 1, repeated=True)
    assert lake.versions() == {"events": 1, "quarantine": 1}
    pd.testing.assert_frame_equal(lake.read("events"), frame[1:].reset_index(drop=True))
    assert lake.read("events", columns=["event_id"], where="price > 8", as_="duckdb").fetchall() == [(i,) for i in frame[1:].query("price > 8")["event_id"]]

    lake.replace("items", pd.DataFrame({"item_id": ["a"], "price": [1.]}))
    between = dt.datetime.now(dt.UTC) + dt.timedelta(milliseconds=5)
    time.sleep(.02)
    lake.replace("items", pd.DataFrame({"item_id": ["a"], "price": [2.]}))
    assert [lake.read("items", **when)["price"].tolist() for when in ({}, {"version": 1}, {"time": between})] == [[2.], [1.], [1.]]

    assert lake.delete("events", "user_id = 'u1'") == 7
    lake.append("events", events(5, start=100))
    assert lake.compact("events")["files_after"] == 1
    removed = lake.vacuum("events", retention_hours=0, dry_run=False)
    assert len(removed) >= 2
    assert len(lake.read("events")) == 49 - 7 + 5
    with pytest.raises(UsageError, match="table 'events' has no version 1"): lake.read("events", version=1)
    with pytest.raises(UsageError, match="the lake has no table 'users'; it has events, items, quarantine"): lake.read("users")


def test_two_writers_on_a_bucket_lose_nothing(endpoint: str):
    "Commits are told apart by conditional put: the server refuses the second of two equal versions."
    make_bucket(endpoint, "shop-two-writers")
    options = {**OPTIONS, "AWS_ENDPOINT_URL": endpoint}
    code = ("import sys; sys.path.insert(0, {here!r}); from test_lake import events; from shopai.core.lake import Lake\n"
            "lake = Lake('s3://shop-two-writers/lake', {options!r})\n"
            "for i in range(5): lake.append('events', events(10, start={start} + 10 * i))")
    programs = [code.format(here=str(Path(__file__).parent), options=options, start=start) for start in (0, 1000)]
    writers = [subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) for program in programs]
    errors = [writer.communicate(timeout=120)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], errors
    found = Lake("s3://shop-two-writers/lake", options).read("events")
    assert len(found) == found["event_id"].nunique() == 100
