"""A driver of the real planner and publisher, whose model is the colour of an image.

``python tests/faults/toy_driver.py INPUT OUTPUT [--part_rows N] [--pause SECONDS]`` labels a folder
of images without Ray and torch, so that a test can start and kill hundreds of them. The last line
of its output is the number of images that it has read.
"""

from __future__ import annotations

import argparse
import io
import sys
import time

import numpy as np
import pyarrow as pa
from colours import COLOURS
from PIL import Image

from cnnray.datasets.listing import list_in_order
from cnnray.datasets.sources import Source, open_source
from cnnray.errors import CnnrayError
from cnnray.labeling.commit import finish_run, missing_parts, publish_part
from cnnray.labeling.runs import begin_run, claim_table
from cnnray.schema import LABELS_SCHEMA
from cnnray.storage import open_store


def label_colours(planned: pa.Table, source: Source) -> pa.Table:
    """What a perfect model says."""
    rows = []
    names = zip(planned["key"].to_pylist(), planned["etag"].to_pylist(), strict=True)
    for (key, etag), data in zip(names, source.read(planned), strict=True):
        assert isinstance(data, bytes), data
        means = np.asarray(Image.open(io.BytesIO(data))).mean(axis=(0, 1))
        label = COLOURS[2 - int(means.argmax())]
        rows.append({"key": key, "etag": etag, "status": "ok", "label": label, "model": "toy"})
    return pa.Table.from_pylist(rows, LABELS_SCHEMA)


def main() -> int:
    """Label what is new; the number of images read."""
    parser = argparse.ArgumentParser()
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--part_rows", type=int, default=16)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds before each part")
    options = parser.parse_args()
    store = open_store(options.output)
    source = open_source(options.input, labelled=False)
    claim_table(store, {"model": "toy", "embeddings": False})
    num_read, is_mine = 0, False
    while not is_mine:
        begun = begin_run(
            store,
            config={"input": options.input},
            list_inputs=lambda: list_in_order(source),
            part_rows=options.part_rows,
            on_changed="relabel",
        )
        if begun is None:
            break
        run, is_mine = begun
        published = {}
        for part, planned in run.plan.read_parts(missing_parts(run)):
            time.sleep(options.pause)
            rows = label_colours(planned, source)
            num_read += rows.num_rows
            result = publish_part(run, part, rows)
            if result is not None:
                published[part] = result
        finish_run(run, published)
    return num_read


if __name__ == "__main__":
    try:
        print(main())
    except CnnrayError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
