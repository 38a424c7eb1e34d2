"""What the workers of the classify job are made from."""

from __future__ import annotations

from dataclasses import dataclass

import ray

from cnnray.cluster.classify.work import PlannedImages, is_split, make_decoder, make_predictor
from cnnray.cluster.core.streaming import Stage
from cnnray.cluster.inference.actors import DecodeActor, LabelActor, PredictActor, set_up_actor
from cnnray.cluster.inference.stages import inference_stage, split_stages
from cnnray.config import ClassifySettings
from cnnray.datasets.sources import Source
from cnnray.labeling.commit import Run
from cnnray.labeling.decoding import SampleDecoder
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

    def plan_stages(self) -> list[Stage]:
        """Where the work is done. Waits and raises as ``inference_stage``."""
        settings, arguments = self.settings, {"job": self}
        if is_split(settings):
            return split_stages(
                DecodeActor,
                PredictActor,
                arguments,
                settings.scaling,
                settings.cluster,
                decode_workers=settings.decode_workers,
            )
        return [inference_stage(LabelActor, arguments, settings.scaling, settings.cluster)]

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


def decoded_chunk_bytes(job: LabelJob) -> int:
    """Just under the size of a decoded chunk, so that each one is a block of its own."""
    preprocessing = read_bundle_spec(job.model).preprocessing
    image_bytes = preprocessing.channels * preprocessing.size**2
    return max(1, job.settings.chunk_rows * image_bytes * 3 // 4)
