"""Before a job: its engine is made once for all workers, and its labels compared with eager's.

All in one task with the resources of a worker: the head of a cluster may have no GPU, or another
CPU, and should not be busy.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import ray

from cnnray.cluster.core.streaming import map_items
from cnnray.cluster.inference.actors import InferenceJob, set_up_actor
from cnnray.cluster.inference.choices import batch_size_of, make_decoder
from cnnray.cluster.inference.stages import plan_stages
from cnnray.config import InferenceSettings
from cnnray.errors import SettingsError
from cnnray.labeling.agreement import Agreement, count_agreement, decode_good
from cnnray.labeling.decoding import Sample
from cnnray.models.bundle import load_bundle
from cnnray.models.engines import (
    EagerEngine,
    EngineChoice,
    PreparedEngine,
    open_engine,
    prepare_engine,
)
from cnnray.storage import Store

logger = logging.getLogger(__name__)


class CheckableJob(InferenceJob, Protocol):
    """A job that can tell what its engine is compared on."""

    @property
    def model(self) -> Store:
        """The bundle's store."""

    @property
    def settings(self) -> InferenceSettings:
        """How it is to be done."""

    @property
    def embeddings(self) -> bool:
        """Whether the engine gives features, too."""

    @property
    def is_bound_to_precision(self) -> bool:
        """Whether the job's output is of int8 for good, once that has been asked for."""

    def read_sample(self, size: int) -> Sequence[Sample]:
        """Some images of the job, ``size`` at most, from all over them; the same every time."""


@dataclass(frozen=True, slots=True)
class CheckedEngine:
    """An engine that a run may use: what it is, how its labels agree, and Ray's reference to it."""

    choice: EngineChoice = EngineChoice()
    agreement: Agreement | None = None
    prepared: ray.ObjectRef | None = None


def check_engine(job: CheckableJob, choice: EngineChoice) -> CheckedEngine:
    """Make the job's engine and log how many labels of a sample are as in eager.

    Eager itself costs nothing. Raises ``SettingsError`` below ``--engine.min_agreement``, unless
    the choice is content with fp32, and ``ModelError`` for a model that the engine cannot take.
    """
    if choice.is_reference:
        return CheckedEngine(choice)
    checked = _run_as_worker(job, choice)
    settings = job.settings.engine
    agreement = checked.agreement
    assert agreement is not None
    logger.info("engine %s: %s", checked.choice, agreement)
    if agreement.fraction is None or agreement.fraction >= settings.min_agreement:
        return checked
    if choice.or_fp32:
        logger.info("fewer than %g: computing in fp32", settings.min_agreement)
        return check_engine(job, choice.in_fp32)
    raise SettingsError(
        f"engine {choice} gives {agreement}, fewer than --engine.min_agreement"
        f" {settings.min_agreement:g}",
        hint=_remedy(choice, is_bound=job.is_bound_to_precision),
    )


def _remedy(choice: EngineChoice, *, is_bound: bool) -> str:
    other = f"--engine.name {choice.name}" if choice.name == "eager" else "--engine.name eager"
    if choice.precision != "fp32":
        other = "--engine.precision fp32"
    if choice.precision == "int8" and is_bound:
        other += " with another --output"
    return f"{other}, or accept them with a lower --engine.min_agreement"


def _run_as_worker(job: CheckableJob, choice: EngineChoice) -> CheckedEngine:
    stage = plan_stages(job, job.settings)[-1]
    [(_, (prepared, agreement))] = map_items(
        partial(_prepare, job),
        [choice],
        stall_seconds=job.settings.cluster.stall_seconds,
        num_cpus=stage.num_cpus,
        num_gpus=stage.num_gpus,
    )
    # From here on it is the driver's object: the node that made it may go.
    return CheckedEngine(prepared.choice, agreement, ray.put(prepared))


def _prepare(job: CheckableJob, choice: EngineChoice) -> tuple[PreparedEngine, Agreement]:
    """The engine, and how its labels agree with eager's; in a process like a worker's."""
    settings = job.settings
    device = set_up_actor(use_gpu=settings.scaling.use_gpu)
    bundle = load_bundle(job.model)
    is_int8 = choice.precision == "int8"
    samples = job.read_sample(settings.engine.sample * (1 + is_int8))
    # An image that kills its decoder is left out, too.
    with closing(make_decoder(bundle.spec.preprocessing, settings, careful=True)) as decoder:
        images = decode_good(samples, decoder)
    # int8 is calibrated on every second image and compared on the others.
    calibration = images[1::2] if len(images) > 1 else images
    embeddings, batch_size = job.embeddings, batch_size_of(settings)
    prepared = prepare_engine(choice, bundle, embeddings=embeddings, calibration=calibration)
    agreement = count_agreement(
        open_engine(prepared, bundle, device=device, embeddings=embeddings, batch_size=batch_size),
        EagerEngine(bundle.model, device=device, embeddings=embeddings),
        images[::2] if is_int8 else images,
        batch_size=batch_size,
    )
    return prepared, agreement
