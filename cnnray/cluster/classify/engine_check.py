"""Before a run: its engine is made once for all workers, and its labels are compared with eager's.

All in one task with the resources of a worker: the head of a cluster may have no GPU, or another
CPU, and should not be busy.
"""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import ray

from cnnray.cluster.classify.actors import LabelJob
from cnnray.cluster.classify.work import batch_size_of, make_decoder
from cnnray.cluster.core.streaming import map_items
from cnnray.cluster.inference.actors import set_up_actor
from cnnray.errors import SettingsError
from cnnray.labeling.agreement import Agreement, count_agreement, read_images, sample_plan
from cnnray.models.bundle import load_bundle
from cnnray.models.engines import (
    EagerEngine,
    EngineChoice,
    PreparedEngine,
    open_engine,
    prepare_engine,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CheckedEngine:
    """An engine that a run may use: what it is, how its labels agree, and Ray's reference to it."""

    choice: EngineChoice = EngineChoice()
    agreement: Agreement | None = None
    prepared: ray.ObjectRef | None = None


def check_engine(job: LabelJob, choice: EngineChoice) -> CheckedEngine:
    """Make the run's engine and log how many labels of a sample are as in eager.

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
        logger.info("fewer than %g: labelling in fp32", settings.min_agreement)
        return check_engine(job, choice.in_fp32)
    raise SettingsError(
        f"engine {choice} gives {agreement}, fewer than --engine.min_agreement"
        f" {settings.min_agreement:g}",
        hint=_remedy(choice),
    )


def _remedy(choice: EngineChoice) -> str:
    other = f"--engine.name {choice.name}" if choice.name == "eager" else "--engine.name eager"
    if choice.precision != "fp32":
        other = "--engine.precision fp32"
    if choice.precision == "int8":  # the table has been claimed for it
        other += " with another --output"
    return f"{other}, or accept them with a lower --engine.min_agreement"


def _run_as_worker(job: LabelJob, choice: EngineChoice) -> CheckedEngine:
    stage = job.plan_stages()[-1]
    [(_, (prepared, agreement))] = map_items(
        partial(_prepare, job),
        [choice],
        stall_seconds=job.settings.cluster.stall_seconds,
        num_cpus=stage.num_cpus,
        num_gpus=stage.num_gpus,
    )
    # From here on it is the driver's object: the node that made it may go.
    return CheckedEngine(prepared.choice, agreement, ray.put(prepared))


def _prepare(job: LabelJob, choice: EngineChoice) -> tuple[PreparedEngine, Agreement]:
    """The engine, and how its labels agree with eager's; in a process like a worker's."""
    settings = job.settings
    device = set_up_actor(use_gpu=settings.scaling.use_gpu)
    bundle = load_bundle(job.model)
    is_int8 = choice.precision == "int8"
    entries = sample_plan(job.run.plan, settings.engine.sample * (1 + is_int8))
    # An image that kills its decoder is left out, too.
    with closing(make_decoder(bundle.spec.preprocessing, settings, careful=True)) as decoder:
        images = read_images(job.source, entries, decoder)
    # int8 is calibrated on every second image and compared on the others.
    calibration = images[1::2] if len(images) > 1 else images
    embeddings, batch_size = settings.embeddings, batch_size_of(settings)
    prepared = prepare_engine(choice, bundle, embeddings=embeddings, calibration=calibration)
    agreement = count_agreement(
        open_engine(prepared, bundle, device=device, embeddings=embeddings, batch_size=batch_size),
        EagerEngine(bundle.model, device=device, embeddings=embeddings),
        images[::2] if is_int8 else images,
        batch_size=batch_size,
    )
    return prepared, agreement


def with_engine(job: LabelJob, checked: CheckedEngine) -> LabelJob:
    """The job with workers that use a checked engine."""
    return replace(job, engine=checked.prepared)
