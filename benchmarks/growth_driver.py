"""What a row of labels costs the driver of classify: its CPU time and its memory.

A program of its own. The plan, the units, Ray Data, the assembler and the files are those of the
job; actors make up the rows, so that two CPUs keep the driver busy. The steady state is counted,
from the first rows to the last.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa

from cnnray.cluster.classify.job import publish_parts
from cnnray.cluster.classify.work import PlannedImages
from cnnray.cluster.core.session import ray_cluster
from cnnray.cluster.core.streaming import MAX_UNITS, Stage, map_units
from cnnray.config import ClassifySettings
from cnnray.labeling.commit import Run, finish_run, missing_parts
from cnnray.labeling.runs import begin_run
from cnnray.labeling.units import plan_units
from cnnray.schema import PLAN_SCHEMA, TOP_K_TYPE, labels_schema
from cnnray.storage import open_store

TABLE_ROWS = 65_536
CLASSES = [f"class {number}" for number in range(10)]
TOP_K = 5
WORKERS = 2


class MadeUpLabels:
    """An actor that labels whatever is planned, and looks at no image."""

    def __init__(self, *, run: Run) -> None:
        self.reader = PlannedImages(_NoImages(), run)  # type: ignore[arg-type]
        self.numbers = np.random.default_rng(0)

    def __call__(self, units: pa.Table) -> Generator[pa.Table, None, None]:
        """Label rows with their places."""
        for rows, _ in self.reader.read(units):
            yield self._label(rows)

    def _label(self, rows: pa.Table) -> pa.Table:
        count = rows.num_rows
        index = self.numbers.integers(len(CLASSES), size=(count, TOP_K))
        names = pa.array(CLASSES).take(pa.array(index.ravel()))
        probability = pa.array(self.numbers.random(index.size, dtype=np.float32))
        items = pa.StructArray.from_arrays([names, probability], ["label", "probability"])
        offsets = pa.array(np.arange(0, index.size + 1, TOP_K, dtype=np.int32))
        columns: dict[str, Any] = {
            "key": rows["key"],
            "etag": rows["etag"],
            "status": pa.repeat("ok", count),
            "label": pa.array(CLASSES).take(pa.array(index[:, 0])),
            "label_index": pa.array(index[:, 0], pa.int32()),
            "confidence": probability.take(pa.array(np.arange(0, index.size, TOP_K))),
            "top_k": pa.ListArray.from_arrays(offsets, items).cast(TOP_K_TYPE),
            "width": pa.repeat(pa.scalar(640, pa.int32()), count),
            "height": pa.repeat(pa.scalar(480, pa.int32()), count),
            "model": pa.repeat("0" * 64, count),
        }
        schema = labels_schema(embeddings=False)
        nothing = pa.nulls(count)
        answers = pa.table(
            [columns.get(field.name, nothing).cast(field.type) for field in schema],
            schema=schema,
        )
        return answers.append_column("part", rows["part"]).append_column("row", rows["row"])


class _NoImages:
    """A source whose images nobody wants."""

    def read(self, entries: pa.Table) -> list[bytes]:
        return []


class Labeler:
    """What the job's own labeler does, with actors that make rows up; notes the first rows."""

    def __init__(self, settings: ClassifySettings) -> None:
        self.settings = settings
        self.first: tuple[float, float, int] | None = None  # wall, CPU and rows

    def label(self, run: Run, parts: Sequence[int]) -> Generator[pa.Table, None, None]:
        """Made-up label rows of some parts."""
        units = plan_units(run.plan, parts, chunk_rows=256, workers=WORKERS, max_units=MAX_UNITS)
        stage = Stage(MadeUpLabels, {"run": run}, WORKERS, WORKERS, num_cpus=1.0)
        for rows in map_units([unit.to_table() for unit in units], [stage], stall_seconds=300.0):
            if self.first is None:
                self.first = time.perf_counter(), time.process_time(), rows.num_rows
            yield rows


def main() -> None:
    """Plan, label, publish, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, required=True, help="rows to plan and to label")
    parser.add_argument("--address", default="local", help="Ray to use")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="cnnray-driver-") as folder:
        print(json.dumps(_measure(Path(folder), options.keys, address=options.address)))


def _measure(folder: Path, keys: int, *, address: str) -> dict[str, float]:
    store = open_store(str(folder / "labels"))
    begun = begin_run(
        store,
        config={},
        list_inputs=lambda: _keys(keys),
        part_rows=TABLE_ROWS,
        on_changed="relabel",
    )
    assert begun is not None
    run, _ = begun
    settings = ClassifySettings(
        model="", input="", output="", cluster={"address": address, "num_cpus": WORKERS}
    )
    labeler = Labeler(settings)
    with ray_cluster(settings.cluster):
        published = publish_parts(run, missing_parts(run), labeler)  # type: ignore[arg-type]
        wall, cpu = time.perf_counter(), time.process_time()
    totals = finish_run(run, published)
    assert totals.rows == keys
    assert labeler.first is not None
    first_wall, first_cpu, first_rows = labeler.first
    rows = keys - first_rows
    return {
        "rows": keys,
        "driver_us": (cpu - first_cpu) / rows * 1e6,
        "rows_per_second": rows / (wall - first_wall),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def _keys(count: int) -> Generator[pa.Table, None, None]:
    for start in range(0, count, TABLE_ROWS):
        numbers = range(start, min(count, start + TABLE_ROWS))
        columns: dict[str, list[Any]] = {
            "key": [f"camera-{number % 97:03d}/2026/11/{number:012d}.jpg" for number in numbers],
            "etag": [f"{number:032x}" for number in numbers],
        }
        columns |= {"path": columns["key"], "offset": [-1] * len(numbers)}
        columns |= {"length": [-1] * len(numbers)}
        yield pa.table({name: columns[name] for name in PLAN_SCHEMA.names}, schema=PLAN_SCHEMA)


if __name__ == "__main__":
    main()
