"""Feast itself, for tests and benchmarks of what reads beside it: a store in a folder, for any views. Feast takes long to import: inside functions."""

import contextlib
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shopai.features.catalogue import WHOLE_KEYS, View

PLACEHOLDER = "nothing.parquet"  # a source must be named; nothing is read from it


class Feast:
    "A feature store whose online store is a file in the folder, or Redis at `host:port`; Feast's own kinds of stores, or the shop's, which guard newer rows."

    def __init__(self, folder: Path, project: str, views: Sequence[View], redis: str | None = None, guarded: bool = False):
        from feast import FeatureStore, RepoConfig
        online = {"type": "redis", "connection_string": f"{redis},db=0"} if redis else {"type": "sqlite", "path": str(folder / "online.db")}
        if guarded: online["type"] = f"shopai.features.online_store.Guarded{online['type'].capitalize()}OnlineStore"
        if guarded and redis: online["connection_string"] = f"redis://{redis}/0"
        registry = str(folder / f"{project}.registry")
        config = RepoConfig(project=project, provider="local", registry=registry, online_store=online, entity_key_serialization_version=3)
        self.store, self.views = FeatureStore(config=config), {view.name: view for view in views}
        self.store.apply(self._definitions(views, folder))

    @staticmethod
    def _definitions(views: Sequence[View], folder: Path) -> list:
        from feast import Entity, FeatureView, Field, FileSource, ValueType
        from feast.types import Array, Bool, Float32, Float64, Int64, String
        kinds = {"number": Float64, "whole": Int64, "flag": Bool, "text": String, "vector": Array(Float32)}
        keys = sorted({key for view in views for key in view.keys})
        entities = {key: Entity(name=key, join_keys=[key], value_type=ValueType.INT64 if key in WHOLE_KEYS else ValueType.STRING) for key in keys}
        def defined(view: View) -> Any:
            names = [Field(name=key, dtype=Int64 if key in WHOLE_KEYS else String) for key in view.keys]
            schema = [*names, *(Field(name=feature.name, dtype=kinds[feature.dtype]) for feature in view.features)]
            source = FileSource(name=view.name, path=str(folder / PLACEHOLDER), timestamp_field="event_timestamp")
            return FeatureView(name=view.name, entities=[entities[key] for key in view.keys], schema=schema, source=source, ttl=view.ttl)

        return [*entities.values(), *map(defined, views)]

    def write(self, name: str, rows: Sequence[tuple[Mapping[str, Any], Mapping[str, Any], int]]) -> None:
        "Rows of keys, values and clock (µs), by the way that Feast itself takes from a table to its online store."
        import pyarrow as pa
        from feast.infra.passthrough_provider import _convert_arrow_to_proto
        view = self.views[name]
        schema = view.arrow_schema()
        columns = [[*(keys[key] for key in view.keys), at, *(values.get(feature) for feature in view.names)] for keys, values, at in rows]
        table = pa.table([pa.array([row[place] for row in columns], field.type) for place, field in enumerate(schema)], schema)
        defined = self.store.get_feature_view(name)
        messages = _convert_arrow_to_proto(table, defined, {column.name: column.dtype.to_value_type() for column in defined.entity_columns})
        self.store._get_provider().online_write_batch(self.store.config, defined, messages, None)

    def read(self, name: str, keys: Sequence[Mapping[str, Any]], features: Sequence[str] = ()) -> list[dict[str, Any]]:
        "What Feast answers: one dictionary of features for each entity."
        view = self.views[name]
        found = self.store.get_online_features([f"{name}:{feature}" for feature in features or view.names], [dict(each) for each in keys]).to_dict()
        return [{feature: found[feature][place] for feature in features or view.names} for place in range(len(keys))]


def micros(moment: str) -> int:
    "`2026-03-02T10:30` → µs since 1970."
    return round(datetime.fromisoformat(moment).replace(tzinfo=UTC).timestamp()) * 1_000_000


def redis_at(port: int, *arguments: str) -> subprocess.Popen:
    "A server of the test's own, ready; without files."
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    for _ in range(500):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1): return process
        time.sleep(.02)
    process.kill()
    raise RuntimeError("redis-server didn't start")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stop(process: subprocess.Popen) -> None:
    process.terminate()
    process.wait(timeout=15)
