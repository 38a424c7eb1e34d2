"""Inference on Ray Data: a pool of actors, each with its own model, fed with small Arrow tables.

The tables go to the actors straight from the object store, with no task in between: actors may then
take every CPU of the cluster, where any other stage would wait for one for ever.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa
import ray
import ray.data
import ray.util.annotations
import torch
from ray.data import ActorPoolStrategy

from cnnray.cluster.ingest import set_up_data_context
from cnnray.cluster.runtime import find_cause, last_line
from cnnray.config import InferenceScalingSettings
from cnnray.errors import CnnrayError, IncompleteError, SettingsError

MAX_RESTARTS = 3
"""Of one actor, and of a table that was with a dead one; Ray Data's defaults are without end."""


def plan_actors(scaling: InferenceScalingSettings, *, num_tables: int) -> int:
    """How many actors to run. Raises ``SettingsError`` when the cluster cannot hold them."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    need = {"CPU": scaling.cpus_per_worker} | ({"GPU": 1.0} if scaling.use_gpu else {})
    places = sum(
        min(int(node.get(name, 0.0) / amount + 1e-6) for name, amount in need.items())
        for node in nodes
    )
    wanted = scaling.num_workers or max(1, places)
    if wanted > places:
        what = " and ".join(f"{amount:g} {name}" for name, amount in need.items())
        raise SettingsError(
            f"{wanted} workers of {what} do not fit: the cluster has room for {places}",
            hint="lower --scaling.num_workers or --scaling.cpus_per_worker",
        )
    return max(1, min(wanted, num_tables))


def actor_device(*, use_gpu: bool) -> torch.device:
    """This actor's device; sets its torch threads to the CPUs that it reserved."""
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    return torch.device("cuda" if use_gpu else "cpu")


def map_tables(
    tables: Iterable[pa.Table],
    actor: Callable[..., Any],
    arguments: dict[str, Any],
    *,
    scaling: InferenceScalingSettings,
    stall_seconds: float,
) -> Iterator[pa.Table]:
    """``actor(**arguments)(table)`` for every table, in the order in which they are done.

    A ``CnnrayError`` of an actor is raised as it is, a bug as ``CnnrayError``, and
    ``IncompleteError`` when workers keep dying or nothing moves.
    """
    tables = list(tables)
    set_up_data_context(stall_seconds=stall_seconds, preserve_order=False)
    with warnings.catch_warnings():  # 2.60 has no other way to bound restarts
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
        results = ray.data.from_arrow(tables).map_batches(
            actor,
            fn_constructor_kwargs=arguments,
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=plan_actors(scaling, num_tables=len(tables))),
            num_cpus=scaling.cpus_per_worker,
            num_gpus=1 if scaling.use_gpu else None,
            max_restarts=MAX_RESTARTS,
            max_task_retries=MAX_RESTARTS,
        )
    try:
        yield from results.iter_batches(batch_size=None, batch_format="pyarrow")
    except (ray.exceptions.RayError, RuntimeError) as error:
        is_bug = isinstance(error, ray.exceptions.RayTaskError)
        kind = CnnrayError if is_bug else IncompleteError
        raise (find_cause(error) or kind(f"a worker failed: {last_line(error)}")) from error
