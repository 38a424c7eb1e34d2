"""Inference on Ray Data: pools of actors, each with its own model, fed with small Arrow tables.

The tables go to the actors straight from the object store, with no task in between: pools of fixed
sizes may then take every CPU of the cluster, where any other stage would wait for one for ever.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data
import ray.util.annotations
import torch
from ray.data import ActorPoolStrategy, DataContext

from cnnray.cluster.runtime import find_cause, last_line, node_resources
from cnnray.config import InferenceScalingSettings
from cnnray.errors import CnnrayError, IncompleteError, SettingsError
from cnnray.process import keep_freed_memory

MAX_RESTARTS = 3
"""Of one actor, and of a table that was with a dead one; Ray Data's defaults are without end."""


@dataclass(frozen=True)
class Stage:
    """A pool of actors of one kind: how each is made, how many there are, what each reserves.

    With more than one of ``calls`` the next table is fetched while the actor is at work.
    """

    actor: Callable[..., Any]
    arguments: dict[str, Any]
    num_workers: int
    num_cpus: float
    num_gpus: float = 0.0
    calls: int = 1


def inference_stage(
    actor: Callable[..., Any], arguments: dict[str, Any], scaling: InferenceScalingSettings
) -> Stage:
    """As many actors as the settings say, or as there is room for. Raises ``SettingsError``."""
    num_gpus = 1.0 if scaling.use_gpu else 0.0
    need = {"CPU": scaling.cpus_per_worker} | ({"GPU": 1.0} if scaling.use_gpu else {})
    num_workers = _fitting(scaling.num_workers, _places(need), need)
    return Stage(actor, arguments, num_workers, scaling.cpus_per_worker, num_gpus)


def split_stages(
    decoder: Callable[..., Any],
    predictor: Callable[..., Any],
    arguments: dict[str, Any],
    scaling: InferenceScalingSettings,
    *,
    decode_workers: int | None,
) -> list[Stage]:
    """Decoders of one CPU each, and predictors that take the tables of any of them.

    On GPUs the predictors reserve no CPU, so that no number of decoders can keep them waiting, but
    decoders leave one free for each. Raises ``SettingsError``.
    """
    need = {"GPU": 1.0} if scaling.use_gpu else {"CPU": scaling.cpus_per_worker}
    wanted = scaling.num_workers or (None if scaling.use_gpu else 1)
    predictors = _fitting(wanted, _places(need), need)
    cpus = 0.0 if scaling.use_gpu else scaling.cpus_per_worker
    left = _places({"CPU": 1.0}) - math.ceil(predictors * max(cpus, 1.0))
    decoders = _fitting(decode_workers, left, {"CPU": 1.0})
    return [
        Stage(decoder, arguments, decoders, num_cpus=1.0),
        Stage(predictor, arguments, predictors, cpus, need.get("GPU", 0.0), calls=2),
    ]


def _places(need: Mapping[str, float]) -> int:
    """How many workers that need so much of each resource fit on the cluster's nodes."""
    return sum(
        min(int(node.get(name, 0.0) / amount + 1e-6) for name, amount in need.items())
        for node in node_resources()
    )


def _fitting(wanted: int | None, places: int, need: Mapping[str, float]) -> int:
    """As many as are wanted, or as there are places for. Raises ``SettingsError``."""
    number = wanted or max(1, places)
    if number > places:
        what = " and ".join(f"{amount:g} {name}" for name, amount in need.items())
        raise SettingsError(
            f"{number} workers of {what} do not fit: the cluster has room for {max(0, places)}",
            hint="lower --scaling.num_workers or --scaling.cpus_per_worker",
        )
    return number


def set_up_actor(*, use_gpu: bool) -> torch.device:
    """This actor's device; sets its torch threads to the CPUs that it reserved."""
    keep_freed_memory()
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    return torch.device("cuda" if use_gpu else "cpu")


def _set_up_data_context(*, stall_seconds: float) -> None:
    """Bound Ray Data's waits in this process, and leave progress to us."""
    context = DataContext.get_current()
    context.execution_options.preserve_order = False
    context.execution_no_progress_timeout_s = stall_seconds
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # or its type and text never reach the driver
    context.max_map_retries = 2
    context.retried_map_errors = ["the store gave no usable answer"]  # of an UnavailableError
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def map_tables(
    tables: Iterable[pa.Table], stages: Sequence[Stage], *, stall_seconds: float
) -> Iterator[pa.Table]:
    """Every table after all stages, in the order in which they are done.

    A ``CnnrayError`` of an actor is raised as it is, a bug as ``CnnrayError``, and
    ``IncompleteError`` when workers keep dying or nothing moves.
    """
    tables = list(tables)
    _set_up_data_context(stall_seconds=stall_seconds)
    results = ray.data.from_arrow(tables)
    with warnings.catch_warnings():  # 2.60 has no other way to bound restarts
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
        for stage in stages:
            results = results.map_batches(
                stage.actor,
                fn_constructor_kwargs=stage.arguments,
                batch_size=None,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(
                    size=min(stage.num_workers, max(1, len(tables))),
                    max_concurrent_calls_per_actor=stage.calls,
                ),
                num_cpus=stage.num_cpus,
                num_gpus=stage.num_gpus or None,
                max_restarts=MAX_RESTARTS,
                max_task_retries=MAX_RESTARTS,
            )
    try:
        yield from results.iter_batches(batch_size=None, batch_format="pyarrow")
    except (ray.exceptions.RayError, RuntimeError) as error:
        is_bug = isinstance(error, ray.exceptions.RayTaskError)
        kind = CnnrayError if is_bug else IncompleteError
        raise (find_cause(error) or kind(f"a worker failed: {last_line(error)}")) from error
