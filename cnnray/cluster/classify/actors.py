"""What the workers of the classify job read, and what they are made from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray
import torch

from cnnray.cluster.inference.actors import set_up_actor
from cnnray.cluster.inference.choices import batch_size_of, is_split, make_decoder
from cnnray.config import ClassifySettings
from cnnray.datasets.sources import Source, copy_rows
from cnnray.labeling.agreement import sample_plan
from cnnray.labeling.commit import Run
from cnnray.labeling.decoding import Sample, SampleDecoder
from cnnray.labeling.plan import PlanReader
from cnnray.labeling.prediction import Predictor
from cnnray.models.bundle import Bundle, load_bundle, read_bundle_spec
from cnnray.models.engines import PreparedEngine, open_engine
from cnnray.storage import Store


@dataclass(frozen=True)
class LabelJob:
    """What every worker of a run is made from; ``engine`` is a ``PreparedEngine``, or eager."""

    model: Store
    source: Source
    run: Run
    settings: ClassifySettings
    engine: ray.ObjectRef | None = None

    kept = ("part", "row")

    is_bound_to_precision = True  # by the table, which has been claimed

    @property
    def embeddings(self) -> bool:
        """Whether the engine gives features, too."""
        return self.settings.embeddings

    def read_sample(self, size: int) -> list[Sample]:
        """Some of the run's images, from all over its plan."""
        entries = sample_plan(self.run.plan, size)
        keys, etags = entries["key"].to_pylist(), entries["etag"].to_pylist()
        return [*map(Sample, keys, etags, self.source.read(entries))]

    def open_reader(self) -> PlannedImages:
        """What reads in a worker."""
        chunk_rows = self.settings.chunk_rows if is_split(self.settings) else None
        return PlannedImages(self.source, self.run, chunk_rows=chunk_rows)

    def open_decoder(self, *, careful: bool) -> SampleDecoder:
        """What decodes in a worker."""
        spec = read_bundle_spec(self.model)
        return make_decoder(spec.preprocessing, self.settings, careful=careful)

    def open_predictor(self) -> Predictor:
        """What computes in a worker."""
        device = set_up_actor(use_gpu=self.settings.scaling.use_gpu)
        engine = PreparedEngine() if self.engine is None else ray.get(self.engine)
        bundle = load_bundle(self.model)
        return make_predictor(bundle, self.settings, device=device, prepared=engine)


def make_predictor(
    bundle: Bundle, settings: ClassifySettings, *, device: torch.device, prepared: PreparedEngine
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
