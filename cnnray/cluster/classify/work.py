"""What labels a run wherever it runs: its reader, its decoder, its model. It needs no Ray."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch

from cnnray.cluster.inference.choices import batch_size_of
from cnnray.config import LabelingSettings
from cnnray.datasets.sources import Source, copy_rows
from cnnray.labeling.commit import Run
from cnnray.labeling.decoding import Sample
from cnnray.labeling.plan import PlanReader
from cnnray.labeling.prediction import Predictor
from cnnray.models.bundle import Bundle
from cnnray.models.engines import PreparedEngine, open_engine


def make_predictor(
    bundle: Bundle, settings: LabelingSettings, *, device: torch.device, prepared: PreparedEngine
) -> Predictor:
    """What computes in a worker."""
    batch_size, embeddings = batch_size_of(settings), settings.embeddings
    return Predictor(
        open_engine(prepared, bundle, device=device, embeddings=embeddings, batch_size=batch_size),
        bundle.spec,
        digest=bundle.digest,
        top_k=settings.top_k,
        batch_size=batch_size,
    )


class PlannedImages:
    """Reads the images of units of a plan, unless their part is published."""

    def __init__(self, source: Source, run: Run, *, chunk_rows: int | None = None) -> None:
        self.source = source
        self.run = run
        self.chunk_rows = chunk_rows  # None: a unit is one chunk
        self.plan = PlanReader(run.plan)
        self.done: set[int] = set()  # parts that are published

    def read(self, units: pa.Table) -> Iterator[tuple[pa.Table, Iterator[Sample]]]:
        """The rows of ``PlanUnit`` tables with their places, chunk by chunk, and their samples."""
        for unit in units.to_pylist():
            rows = self._planned(**unit)
            size = self.chunk_rows or max(1, rows.num_rows)
            for start in range(0, max(1, rows.num_rows), size):
                chunk = copy_rows(rows, start, size)
                keys, etags = chunk["key"].to_pylist(), chunk["etag"].to_pylist()
                yield chunk, map(Sample, keys, etags, self.source.read(chunk))

    def _planned(self, part: int, start: int, stop: int) -> pa.Table:
        """Rows of a part with their places; none of one that is published."""
        stop = start if self._is_published(part) else stop
        planned = self.plan.read(part).slice(start, stop - start)
        return planned.append_column(
            "part", pa.repeat(pa.scalar(part, pa.int32()), stop - start)
        ).append_column("row", pa.array(np.arange(start, stop, dtype=np.int32)))

    def _is_published(self, part: int) -> bool:
        """Whether another driver was faster: then the work would be in vain."""
        if part not in self.done and self.run.store.head(self.run.part_key(part)) is not None:
            self.done.add(part)
        return part in self.done
