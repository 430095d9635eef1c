"""One transform, three engines: frames of pandas, DuckDB and PySpark from the same table, and back again.

A test runs its transform on `to_backend(df, name)` for each of `BACKENDS` and compares what `to_pandas` makes of the results. DuckDB and Spark know no order
of rows: sort before you compare. `spark` is a fixture: import it where a test needs the session itself."""

import os
import shutil
import sys
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

BACKENDS = ("pandas", "duckdb", "pyspark")


_session = None


def spark_session():
    "A small Spark of this process, the same for all that ask, anew if somebody stopped it; times are UTC. Skips where there is no Java."
    global _session
    if _session is not None and _session.sparkContext._jsc is not None: return _session
    if not (shutil.which("java") or os.environ.get("JAVA_HOME")): pytest.skip("Spark needs Java, which isn't here")
    pyspark = pytest.importorskip("pyspark.sql", reason="pyspark isn't installed")
    os.environ.update(PYSPARK_PYTHON=sys.executable, SPARK_LOCAL_IP="127.0.0.1")
    builder = pyspark.SparkSession.builder.master("local[2]").appName("tests")
    for name, value in {"spark.ui.enabled": "false", "spark.sql.shuffle.partitions": "2", "spark.sql.session.timeZone": "UTC", "spark.driver.memory": "1g",
                        "spark.sql.execution.arrow.pyspark.enabled": "true", "spark.sql.catalogImplementation": "in-memory"}.items():
        builder = builder.config(name, value)
    _session = builder.getOrCreate()
    _session.sparkContext.setLogLevel("ERROR")
    return _session


@pytest.fixture(scope="session")
def spark():
    "The Spark session; it ends with the tests of this process."
    yield spark_session()
    _session.stop()


def plain(table: pa.Table) -> pa.Table:
    "The same values in one type a kind: text (also where nothing is said), int64, float64, microseconds."
    def kind(given: pa.DataType) -> pa.DataType:
        if pa.types.is_timestamp(given): return pa.timestamp("us", tz=given.tz and "UTC")
        if pa.types.is_integer(given): return pa.int64()
        if pa.types.is_floating(given): return pa.float64()
        return pa.string() if pa.types.is_large_string(given) or pa.types.is_null(given) else given

    return table.cast(pa.schema([pa.field(field.name, kind(field.type)) for field in table.schema]))


def to_arrow(df: pd.DataFrame | pa.Table) -> pa.Table:
    "A plain Arrow table without an index."
    return plain(df if isinstance(df, pa.Table) else pa.Table.from_pandas(df, preserve_index=False))


def to_backend(df: pd.DataFrame | pa.Table, name: str) -> Any:
    "A frame of the engine `name` with these rows: a pandas frame, a DuckDB relation on a connection of its own, or a PySpark frame."
    if name == "pandas": return df.to_pandas() if isinstance(df, pa.Table) else df.copy()
    if name == "duckdb":
        import duckdb
        connection = duckdb.connect(config={"threads": 2})
        connection.execute("SET TimeZone = 'UTC'")
        return connection.from_arrow(to_arrow(df))
    if name == "pyspark": return spark_session().createDataFrame(to_arrow(df))
    raise ValueError(f"{name!r} is none of {', '.join(BACKENDS)}")


def to_pandas(frame: Any, sort_by: str | list[str] | None = None) -> pd.DataFrame:
    """The rows of any frame (native or of Narwhals) as a pandas frame of one form, whatever engine they come from.

    Text, whole numbers and flags keep their missing values as such; times are microseconds UTC. `sort_by` gives the rows an order."""
    import narwhals as nw
    frame = nw.from_native(frame)
    table = frame.collect("pyarrow").to_native() if isinstance(frame, nw.LazyFrame) else frame.to_arrow().select(frame.columns)  # without an index
    df = plain(table).to_pandas(types_mapper={pa.string(): pd.StringDtype("python"), pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}.get)
    return df if sort_by is None else df.sort_values(sort_by, ignore_index=True)
