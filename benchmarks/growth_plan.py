"""Plan a table of keys, say what that took, and publish made-up labels for all of them.

A program of its own, without torch, so that its memory is that of planning. Labelling a million
images would take half an hour.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import pyarrow as pa

from cnnray.datasets.listing import list_in_order
from cnnray.datasets.sources import open_source
from cnnray.labeling.commit import finish_run, publish_part
from cnnray.labeling.runs import begin_run
from cnnray.schema import labels_schema
from cnnray.storage import open_store, read_json

PART_ROWS = 65_536


def main() -> None:
    """Plan, print, publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", required=True)
    parser.add_argument("--labels", required=True)
    options = parser.parse_args()
    store = open_store(options.labels)
    source = open_source(options.keys, format="table", labelled=False)
    started = time.perf_counter()
    begun = begin_run(
        store,
        config={},
        list_inputs=lambda: list_in_order(source),
        part_rows=PART_ROWS,
        on_changed="relabel",
    )
    seconds = time.perf_counter() - started
    peak_mb = _peak_mb()
    assert begun is not None
    run, _ = begun
    model = read_json(store, "_cnnray/table.json")["model"]
    parts = {}
    for part, planned in run.plan.read_parts(range(run.plan.num_parts)):
        published = publish_part(run, part, _made_up_labels(planned, model))
        assert published is not None
        parts[part] = published
    finish_run(run, parts)
    result = {"planned": run.plan.rows, "seconds": round(seconds, 2), "peak_mb": peak_mb}
    print(json.dumps(result))


def _peak_mb() -> float:
    """Linux's high-water mark of this program; getrusage would count the one that started it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    [kilobytes] = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(kilobytes) * 1024 / 1e6


def _made_up_labels(planned: pa.Table, model: str) -> pa.Table:
    """Rows of the labels' schema: all images have the same label."""
    values = {"status": "ok", "label": "class-0000", "label_index": 0, "confidence": 1.0}
    values |= {"width": 500, "height": 375, "model": model}
    schema, rows = labels_schema(embeddings=False), planned.num_rows
    columns = [
        planned[field.name].cast(field.type)
        if field.name in ("key", "etag")
        else pa.repeat(pa.scalar(values.get(field.name), field.type), rows)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


if __name__ == "__main__":
    main()
