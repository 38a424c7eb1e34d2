"""What a classify job will take: a sample measured in this process, forecast for its workers."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import torch

from cnnray.cluster.classify.work import make_predictor
from cnnray.cluster.core.resources import Capacity, plan_pool, plan_split_pools
from cnnray.cluster.core.streaming import Stage
from cnnray.cluster.inference.choices import engine_choice, is_split, make_decoder
from cnnray.config import LabelingSettings
from cnnray.console import format_seconds
from cnnray.datasets.sources import Source
from cnnray.errors import SettingsError, UsageError
from cnnray.labeling.commit import Run
from cnnray.labeling.forecast import (
    RAY_START_SECONDS,
    WORKER_START_SECONDS,
    Forecast,
    Workers,
    count_requests,
    forecast,
)
from cnnray.labeling.measure import SAMPLE_RUNS, Measurement, measure_stages, take_sample
from cnnray.models.bundle import Bundle, StoredBundle
from cnnray.models.engines import PreparedEngine, prepare_engine
from cnnray.process import keep_freed_memory

logger = logging.getLogger(__name__)

RUN_IMAGES = 50_000
"""A run of fewer is not predicted: it would be over soon after."""
RUN_SAMPLE = 32
RUN_SECONDS = 1.0
"""What a run may spend on its prediction, at about; a second more to try its images safely."""


@dataclass(frozen=True, slots=True)
class Crew:
    """The workers of a job, and on how many machines like this one they are."""

    workers: Workers
    machines: int


def measure(
    bundle: Bundle,
    source: Source,
    entries: pa.Table,
    settings: LabelingSettings,
    *,
    list_seconds: float,
    max_seconds: float,
) -> Measurement:
    """Measure the stages as in a worker of this job. Raises what ``measure_stages`` does."""
    use_gpu = settings.scaling.use_gpu
    device = torch.device("cuda" if use_gpu else "cpu")
    keep_freed_memory()
    threads = min(int(settings.scaling.cpus_per_worker), os.cpu_count() or 1)
    with _torch_threads(max(1, threads)):
        prepared = _prepared(bundle, settings)
        predictor = make_predictor(bundle, settings, device=device, prepared=prepared)
        return measure_stages(
            source,
            entries,
            make_decoder(bundle.spec.preprocessing, settings, careful=False),
            predictor,
            device=device,
            batch_rows=settings.chunk_rows if is_split(settings) else predictor.batch_size,
            list_seconds=list_seconds,
            max_seconds=max_seconds,
        )


def _prepared(bundle: Bundle, settings: LabelingSettings) -> PreparedEngine:
    """The job's engine; int8 is calibrated on noise, which is as fast as on images."""
    shape = (1, bundle.spec.preprocessing.channels, *[bundle.spec.preprocessing.size] * 2)
    return prepare_engine(
        engine_choice(settings),
        bundle,
        embeddings=settings.embeddings,
        calibration=torch.randint(256, shape, dtype=torch.uint8),
    )


@contextlib.contextmanager
def _torch_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def local_crew(settings: LabelingSettings) -> Crew:
    """The workers that the job would have on this machine, or on as many like it as they need.

    Raises ``SettingsError`` when they need a GPU and there is none here.
    """
    scaling = settings.scaling
    cpus = float(settings.cluster.num_cpus or os.cpu_count() or 1)
    gpus = torch.cuda.device_count() if scaling.use_gpu else 0
    if scaling.use_gpu and not gpus:
        raise SettingsError(
            "there is no GPU here to measure", hint="measure on a machine like the workers'"
        )
    machine = {"CPU": max(cpus, scaling.cpus_per_worker), "GPU": float(gpus)}
    chunk_rows, on_gpu = settings.chunk_rows, scaling.use_gpu
    for machines in itertools.count(_least_machines(settings, machine)):
        capacity = Capacity((machine,) * machines)
        with contextlib.suppress(SettingsError):  # too few machines
            if not is_split(settings):
                pool = plan_pool(scaling, capacity)
                return Crew(
                    Workers(pool.min_workers, on_gpu=on_gpu, chunk_rows=chunk_rows), machines
                )
            decode, infer = plan_split_pools(
                scaling, capacity, decode_workers=settings.decode_workers
            )
            workers = Workers(
                decode.min_workers, infer.min_workers, on_gpu=on_gpu, chunk_rows=chunk_rows
            )
            return Crew(workers, machines)
    raise AssertionError("unreachable: more machines hold any number of workers")


def _least_machines(settings: LabelingSettings, machine: Mapping[str, float]) -> int:
    """A number of machines that is never too high."""
    scaling = settings.scaling
    workers, kind = scaling.min_workers or 1, "GPU" if scaling.use_gpu else "CPU"
    each = 1.0 if scaling.use_gpu else scaling.cpus_per_worker
    decoders = settings.decode_workers or 1 if is_split(settings) else 0
    return max(1, int(workers * each / machine[kind]), int(decoders / machine["CPU"]))


def estimate(
    measured: Measurement, crew: Crew, settings: LabelingSettings, *, images: int, listed: int
) -> dict[str, Any]:
    """Forecast a job for ``images`` of ``listed``, log it as a table, and return it for a result.

    Times are in seconds, those of stages in milliseconds an image; costs in USD.
    """
    predicted = forecast(
        measured.times,
        crew.workers,
        images=images,
        listed=listed,
        start_seconds=RAY_START_SECONDS + WORKER_START_SECONDS,
    )
    costs = _costs(predicted, crew, settings, images=images, listed=listed)
    _log(measured, predicted, crew, costs)
    return {
        "predicted_seconds": round(predicted.seconds, 1),
        "bottleneck": predicted.bottleneck,
        "images_per_second": round(predicted.images_per_second, 1),
        "images_per_second_per_core": round(predicted.images_per_second_per_core, 1),
        "ceiling_per_core": round(predicted.ceiling_per_core, 1),
        "cpus_per_gpu": predicted.cpus_per_gpu and round(predicted.cpus_per_gpu, 2),
        "milliseconds": {
            stage: round(1000 * seconds, 4) for stage, seconds in asdict(measured.times).items()
        },
        "workers": crew.workers.decode,
        "infer_workers": crew.workers.infer,
        "machines": crew.machines,
        "sample": measured.images,
        "sample_errors": measured.bad,
        "bytes_per_image": round(measured.bytes_per_image),
        "core_hours": round(predicted.core_hours, 4),
        "gpu_hours": round(predicted.gpu_hours, 4),
        **costs,
    }


def _costs(
    predicted: Forecast, crew: Crew, settings: LabelingSettings, *, images: int, listed: int
) -> dict[str, Any]:
    costs: dict[str, Any] = {}
    if settings.input.startswith("s3://"):
        requests = count_requests(
            listed=listed,
            images=images,
            part_rows=settings.part_rows,
            chunk_rows=settings.chunk_rows,
        )
        costs = {"requests": asdict(requests), "requests_usd": round(requests.usd, 4)}
    if settings.price_per_hour is not None:
        hours = crew.machines * predicted.seconds / 3600
        costs["machines_usd"] = round(hours * settings.price_per_hour, 4)
    return costs


def _log(measured: Measurement, predicted: Forecast, crew: Crew, costs: dict[str, Any]) -> None:
    """The table for people: what each stage takes, and what follows for the job."""
    logger.info(
        "%d images measured (%d bad, %.0f kB each), one process, one thread:",
        measured.images,
        measured.bad,
        measured.bytes_per_image / 1000,
    )
    logger.info("%-10s %10s %12s", "stage", "ms/image", "images/s")
    for stage, seconds in asdict(measured.times).items():
        if seconds:
            name = {"read_cpu": "  its CPU"}.get(stage, stage)
            logger.info("%-10s %10.3f %12s", name, 1000 * seconds, f"{1 / seconds:,.0f}")
    lines = [
        f"ceiling: {predicted.ceiling_per_core:,.0f} images/s a core (decode and resize alone)",
        f"bottleneck: {predicted.bottleneck}, {predicted.bottleneck_fraction:.0%} of its workers'"
        " time",
    ]
    if predicted.cpus_per_gpu is not None:
        lines.append(f"best ratio: {predicted.cpus_per_gpu:.1f} CPUs for each GPU")
    workers = crew.workers
    kinds = f"{workers.decode} workers"
    if workers.infer:
        kinds = f"{workers.decode} workers that decode, {workers.infer} that compute"
    lines.append(
        f"predicted: {predicted.images:,} images in {format_seconds(predicted.seconds)}, at"
        f" {predicted.images_per_second:,.0f} images/s with {kinds}"
    )
    cost = f"{predicted.core_hours:,.2f} core hours"
    if predicted.gpu_hours:
        cost += f", {predicted.gpu_hours:,.2f} GPU hours"
    if "requests" in costs:
        counts = ", ".join(f"{n:,} {verb.upper()}" for verb, n in costs["requests"].items())
        cost += f"; at most {counts}: {costs['requests_usd']:,.2f} USD"
    if "machines_usd" in costs:
        cost += f"; machines ({crew.machines}): {costs['machines_usd']:,.2f} USD"
    for line in [*lines, f"cost: {cost}"]:
        logger.info("%s", line)


def sample_parts(run: Run, parts: Sequence[int], *, size: int) -> pa.Table:
    """Some ``size`` inputs of some parts of a run, from all over them."""
    some = parts[:: max(1, len(parts) // SAMPLE_RUNS)]
    _, sample = take_sample((table for _, table in run.plan.read_parts(some)), size=size)
    return sample


def measure_run(
    bundle: StoredBundle, source: Source, run: Run, parts: Sequence[int], settings: LabelingSettings
) -> Measurement | None:
    """A small sample of a large run, before its workers start; None where there is no prediction.

    Not on GPUs: the driver's own use of one would stay for the length of the run. Nor with
    another engine than eager, which the driver would have to make for it.
    """
    if settings.scaling.use_gpu or not engine_choice(settings).is_reference:
        return None
    if sum(map(run.plan.rows_of, parts)) < RUN_IMAGES:
        return None
    entries = sample_parts(run, parts, size=RUN_SAMPLE)
    try:
        return measure(
            bundle.load(), source, entries, settings, list_seconds=0.0, max_seconds=RUN_SECONDS
        )
    except UsageError as error:  # the run itself may still go well
        logger.info("no prediction: %s", error)
        return None


def predict_run(
    measured: Measurement, stages: Sequence[Stage], settings: LabelingSettings, *, images: int
) -> float:
    """Log how long the workers that a run begins with will take, and return it."""
    decoders, *others = (stage.min_workers for stage in stages)
    workers = Workers(decoders, infer=sum(others), chunk_rows=settings.chunk_rows)
    predicted = forecast(
        measured.times, workers, images=images, listed=0, start_seconds=WORKER_START_SECONDS
    )
    logger.info(
        "predicted: %s at %s images/s, bottleneck %s",
        format_seconds(predicted.seconds),
        f"{predicted.images_per_second:,.0f}",
        predicted.bottleneck,
    )
    return predicted.seconds
