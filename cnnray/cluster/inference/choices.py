"""What the settings of a job that asks a model come to."""

from __future__ import annotations

from cnnray.config import InferenceSettings
from cnnray.images.transforms import Preprocessing
from cnnray.labeling.decoding import SampleDecoder
from cnnray.models.engines import EngineChoice, choose_engine


def is_split(settings: InferenceSettings) -> bool:
    """Whether some workers decode and others compute."""
    on_gpu = settings.placement == "auto" and settings.scaling.use_gpu
    return settings.placement == "split" or on_gpu


def batch_size_of(settings: InferenceSettings) -> int:
    """Images of one forward pass, at most."""
    return settings.batch_size or (64 if settings.scaling.use_gpu else 16)


def decoded_block_bytes(preprocessing: Preprocessing, settings: InferenceSettings) -> int | None:
    """Just under the size of a decoded chunk, so that each one is a block; None if none travels."""
    if not is_split(settings):
        return None
    image_bytes = preprocessing.channels * preprocessing.size**2
    return max(1, settings.chunk_rows * image_bytes * 3 // 4)


def engine_choice(settings: InferenceSettings) -> EngineChoice:
    """The engine that the settings mean. Raises what ``choose_engine`` does."""
    wanted = settings.engine
    return choose_engine(wanted.name, wanted.precision, use_gpu=settings.scaling.use_gpu)


def make_decoder(
    preprocessing: Preprocessing, settings: InferenceSettings, *, careful: bool
) -> SampleDecoder:
    """What decodes in a worker."""
    return SampleDecoder(
        preprocessing,
        limits=settings.limits,
        careful=careful,
        decode_seconds=settings.decode_seconds,
    )
