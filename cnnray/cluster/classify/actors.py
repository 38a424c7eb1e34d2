"""The workers of the classify job, in one process or in two: they read, and write nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import ray
import torch

from cnnray.cluster.core.streaming import Stage
from cnnray.cluster.inference.stages import inference_stage, set_up_actor, split_stages
from cnnray.config import ClassifySettings
from cnnray.datasets.sources import Source
from cnnray.images.decode import DecodeLimits
from cnnray.images.transforms import Preprocessing
from cnnray.labeling.commit import Run
from cnnray.labeling.decoding import Sample, SampleDecoder
from cnnray.labeling.labeler import Labeler
from cnnray.labeling.prediction import Predictor
from cnnray.models.bundle import Bundle, load_bundle, read_bundle_spec
from cnnray.models.engines import EngineChoice, PreparedEngine, choose_engine, open_engine
from cnnray.storage import Store


@dataclass(frozen=True)
class LabelJob:
    """What every worker of a run is made from; ``engine`` is a ``PreparedEngine``, or eager."""

    model: Store
    source: Source
    run: Run
    settings: ClassifySettings
    engine: ray.ObjectRef | None = None

    @property
    def stages(self) -> list[Stage]:
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

    def decoder(self, preprocessing: Preprocessing) -> SampleDecoder:
        """The part of a worker that decodes."""
        return make_decoder(
            preprocessing,
            self.settings,
            # An actor that died may have been killed by an image, which it will be given again.
            careful=ray.get_runtime_context().was_current_actor_reconstructed,
        )

    def predictor(self, bundle: Bundle) -> Predictor:
        """The part of a worker that computes."""
        device = set_up_actor(use_gpu=self.settings.scaling.use_gpu)
        engine = PreparedEngine() if self.engine is None else ray.get(self.engine)
        return make_predictor(bundle, self.settings, device=device, prepared=engine)


def is_split(settings: ClassifySettings) -> bool:
    """Whether some workers decode and others compute."""
    on_gpu = settings.placement == "auto" and settings.scaling.use_gpu
    return settings.placement == "split" or on_gpu


def make_decoder(
    preprocessing: Preprocessing, settings: ClassifySettings, *, careful: bool
) -> SampleDecoder:
    """What decodes in a worker."""
    return SampleDecoder(
        preprocessing,
        limits=DecodeLimits(**settings.limits.model_dump()),
        careful=careful,
        decode_seconds=settings.decode_seconds,
    )


def engine_choice(settings: ClassifySettings) -> EngineChoice:
    """The engine that the settings mean. Raises what ``choose_engine`` does."""
    wanted = settings.engine
    return choose_engine(wanted.name, wanted.precision, use_gpu=settings.scaling.use_gpu)


def batch_size_of(settings: ClassifySettings) -> int:
    """Images of one forward pass, at most."""
    return settings.batch_size or (64 if settings.scaling.use_gpu else 16)


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


class ChunkReader:
    """Reads the images of chunks, unless the part that they belong to is published."""

    def __init__(self, source: Source, run: Run) -> None:
        self.source = source
        self.run = run
        self.done: set[int] = set()  # parts that are published

    def read(self, chunk: pa.Table) -> tuple[pa.Table, Iterator[Sample]]:
        """The chunk, or none of its rows, and its samples."""
        if self._is_published(chunk["part"][0].as_py()):
            chunk = chunk.slice(0, 0)
        keys, etags = chunk["key"].to_pylist(), chunk["etag"].to_pylist()
        return chunk, map(Sample, keys, etags, self.source.read(chunk))

    def _is_published(self, part: int) -> bool:
        """Whether somebody, perhaps another driver, was faster: then the work would be in vain."""
        if part not in self.done and self.run.store.head(self.run.part_key(part)) is not None:
            self.done.add(part)
        return part in self.done


class LabelActor:
    """One worker: labels chunks with its own copy of the model. It writes nothing."""

    def __init__(self, *, job: LabelJob) -> None:
        self.reader = ChunkReader(job.source, job.run)
        bundle = load_bundle(job.model)
        self.labeler = Labeler(job.decoder(bundle.spec.preprocessing), job.predictor(bundle))

    def __call__(self, chunk: pa.Table) -> pa.Table:
        """Label rows of a chunk with their places in the plan; none if its part is published."""
        chunk, samples = self.reader.read(chunk)
        return _with_places(self.labeler.label(samples), chunk)


class DecodeActor:
    """One worker of those that read and decode for others."""

    def __init__(self, *, job: LabelJob) -> None:
        set_up_actor(use_gpu=False)
        self.reader = ChunkReader(job.source, job.run)
        self.decoder = job.decoder(read_bundle_spec(job.model).preprocessing)

    def __call__(self, chunk: pa.Table) -> pa.Table:
        """Decoded rows of a chunk with their places in the plan."""
        chunk, samples = self.reader.read(chunk)
        return _with_places(self.decoder.decode(list(samples)), chunk)


class PredictActor:
    """One worker of those that label what others have decoded."""

    def __init__(self, *, job: LabelJob) -> None:
        self.predictor = job.predictor(load_bundle(job.model))

    def __call__(self, decoded: pa.Table) -> pa.Table:
        """Label rows with their places in the plan."""
        return _with_places(self.predictor.predict(decoded), decoded)


def _with_places(rows: pa.Table, chunk: pa.Table) -> pa.Table:
    return rows.append_column("part", chunk["part"]).append_column("row", chunk["row"])
