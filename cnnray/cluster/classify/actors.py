"""What the workers of the classify job are made from."""

from __future__ import annotations

from dataclasses import dataclass

import ray

from cnnray.cluster.classify.work import PlannedImages, make_predictor
from cnnray.cluster.inference.actors import set_up_actor
from cnnray.cluster.inference.choices import is_split, make_decoder
from cnnray.config import ClassifySettings
from cnnray.datasets.sources import Source
from cnnray.labeling.agreement import sample_plan
from cnnray.labeling.commit import Run
from cnnray.labeling.decoding import Sample, SampleDecoder
from cnnray.labeling.prediction import Predictor
from cnnray.models.bundle import load_bundle, read_bundle_spec
from cnnray.models.engines import PreparedEngine
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
