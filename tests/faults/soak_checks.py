"""What a soak watches a table for: what was seen stays, ids are single, and any reader can read.

In DuckDB, Polars and pyarrow, with nothing of cnnray's.
"""

from __future__ import annotations

import glob
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import duckdb
import polars
import pyarrow as pa
import pyarrow.dataset

POLL_SECONDS = 0.05

ROWS = """
    SELECT key, etag, status, error_code, label, confidence
    FROM read_parquet('{table}/data/**', union_by_name=true)"""
TWICE = "SELECT count(*) FROM (SELECT key, etag FROM now GROUP BY ALL HAVING count(*) > 1)"
GONE = "SELECT count(*) FROM seen ANTI JOIN now USING (key, etag)"
CHANGED = "SELECT count(*) FROM (SELECT * FROM seen EXCEPT ALL SELECT * FROM now)"


class Witness:
    """Remembers every row of a table that was visible when it looked."""

    def __init__(self, table: Path) -> None:
        self.table = table
        self.seen: pa.Table | None = None

    def look(self) -> list[str]:
        """What has happened to the table since the last look that never may."""
        if not has_rows(self.table):
            return [] if self.seen is None else ["every row has gone"]
        with duckdb.connect() as connection:
            now = connection.sql(ROWS.format(table=self.table)).to_arrow_table()
            connection.register("now", now)
            connection.register("seen", now.slice(0, 0) if self.seen is None else self.seen)
            twice, gone, changed = (
                connection.sql(query).fetchall()[0][0] for query in (TWICE, GONE, CHANGED)
            )
        self.seen = now
        counts = {
            "ids visible twice": twice,
            "rows have gone": gone,
            "visible rows have changed": changed - gone,
        }
        return [f"{count} {what}" for what, count in counts.items() if count]

    @property
    def num_rows(self) -> int:
        return 0 if self.seen is None else int(self.seen.num_rows)

    @property
    def keys(self) -> set[str]:
        return set() if self.seen is None else set(self.seen["key"].to_pylist())


def has_rows(table: Path) -> bool:
    """Whether a reader's pattern would find any file at all."""
    return bool(glob.glob(f"{table}/data/**/*.parquet", recursive=True))


def find_differences(table: Path, expected: Sequence[tuple[str, str]]) -> list[str]:
    """How the rows differ from (key, label or code) pairs; a key may have several contents."""
    keys, answers = zip(*expected, strict=True)
    with duckdb.connect() as connection:
        connection.execute(f"CREATE VIEW now AS {ROWS.format(table=table)}")
        connection.register("expected", pa.table({"key": keys, "answer": answers}))
        rows = "SELECT key, coalesce(label, error_code) FROM now"
        wanted = "SELECT key, answer FROM expected"
        surplus, lack = (
            connection.sql(f"SELECT count(*) FROM ({query})").fetchall()[0][0]
            for query in (f"{rows} EXCEPT ALL {wanted}", f"{wanted} EXCEPT ALL {rows}")
        )
    counts = {"rows that should not be there": surplus, "rows that are not there": lack}
    return [f"{count} {what}" for what, count in counts.items() if count]


# Readers that poll


def count_by_duckdb(table: Path) -> tuple[int, int]:
    """Rows and different ids."""
    query = f"SELECT count(*), count(DISTINCT (key, etag)) FROM '{table}/data/**/*.parquet'"
    with duckdb.connect() as connection:
        rows, ids = connection.sql(query).fetchall()[0]
    return rows, ids


def count_by_polars(table: Path) -> tuple[int, int]:
    """Rows and different ids."""
    frame = polars.read_parquet(f"{table}/data/**/*.parquet", columns=["key", "etag"])
    return frame.height, frame.n_unique()


def count_by_pyarrow(table: Path) -> tuple[int, int]:
    """Rows and different ids."""
    dataset = pyarrow.dataset.dataset(table / "data", format="parquet", partitioning="hive")
    rows = dataset.to_table(columns=["key", "etag"])
    return rows.num_rows, rows.group_by(["key", "etag"]).aggregate([]).num_rows


READERS: dict[str, Callable[[Path], tuple[int, int]]] = {
    "duckdb": count_by_duckdb,
    "polars": count_by_polars,
    "pyarrow": count_by_pyarrow,
}


def poll(name: str, table: Path, until: Path, deadline_seconds: float) -> tuple[int, int, str]:
    """Read a table again and again until a file appears, and once more.

    Returns the polls that found rows, the rows of the last one, and what was wrong.
    """
    count, polls, before = READERS[name], 0, 0
    deadline = time.monotonic() + deadline_seconds
    while True:
        is_last = until.exists()
        if has_rows(table):
            try:
                rows, ids = count(table)
            except Exception as error:  # whatever a reader raises is what is looked for
                return polls, before, f"{name} fails: {error}"
            if rows != ids:
                return polls, rows, f"{name} sees {rows - ids} ids twice"
            if rows < before:
                return polls, rows, f"{name} sees {rows} rows where there were {before}"
            polls, before = polls + 1, rows
        if is_last or time.monotonic() > deadline:
            return polls, before, "" if is_last else f"{name} waited in vain for the end"
        time.sleep(POLL_SECONDS)
