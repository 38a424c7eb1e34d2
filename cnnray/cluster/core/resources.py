"""The reckoning of capacity: how many workers of what size a cluster holds, now and when it grows.

Every job plans with these functions before it starts, and the forecast plans with them on imagined
nodes. They compute on the nodes that they are given and ask no cluster.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from cnnray.cluster.core.nodes import Resources
from cnnray.config import InferenceScalingSettings, ScalingSettings
from cnnray.errors import SettingsError

READER_CPUS = 1.0
"""CPUs that the stages that read data need at least, next to the workers."""


@dataclass(frozen=True)
class Capacity:
    """The nodes of a cluster, and those that its autoscaler may still bring."""

    nodes: tuple[Resources, ...]
    promised: tuple[Resources, ...] = ()
    max_more: int = 0
    """how many of the promised nodes may come"""
    grown: int = 0
    """how many of ``nodes`` were promised ones: this is an imagined cluster if there are any"""

    def largest(self, need: Resources) -> Capacity:
        """The cluster with all the nodes that may come for workers with this need."""
        return self.grow(len(self.promised), need)

    def grow(self, count: int, need: Resources) -> Capacity:
        """The cluster with so many more nodes for such workers, or as many as may come."""
        useful = self._useful(need)
        count = min(count, len(useful))
        return replace(
            self,
            nodes=(*self.nodes, *useful[:count]),
            promised=tuple(useful[count:]),
            max_more=self.max_more - count,
            grown=self.grown + count,
        )

    def _useful(self, need: Resources) -> list[Resources]:
        """Those that may come, the largest first; none with a GPU for workers that use none."""
        fitting = [node for node in self.promised if "GPU" in need or not node.get("GPU")]
        fitting.sort(key=lambda node: (-count_slots([node], need), -node.get("CPU", 0.0)))
        return fitting[: self.max_more]

    def describe(self, name: str) -> str:
        """How much of a resource there is, for a message."""
        return f"{'can grow to' if self.grown else 'has'} {_total(self.nodes, name):g}"


@dataclass(frozen=True)
class WorkerPlan:
    """What each training worker reserves, and how many of them fit."""

    num_workers: int  # that fit the cluster for which they were planned
    cpus: float
    gpus: float
    threads: int
    reading_fraction: float  # of all CPUs: the least that the workers leave for reading

    @property
    def need(self) -> dict[str, float]:
        """What one worker reserves, by Ray's names."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})

    def slots_on(self, nodes: Iterable[Resources]) -> int:
        """How many workers the nodes could hold if nothing else ran there."""
        return count_slots(nodes, self.need)

    def fitting(self, nodes: Collection[Resources]) -> int:
        """How many workers fit the nodes side by side with what reads their data."""
        total = _total(nodes, "CPU")
        left = total - max(READER_CPUS, self.reading_fraction * total)
        return max(0, min(self.slots_on(nodes), _whole(left / self.cpus)))


@dataclass(frozen=True)
class PoolPlan:
    """How many actors a pool begins with, how many it may have, and what each one reserves."""

    min_workers: int
    max_workers: int
    cpus: float
    gpus: float


def count_slots(nodes: Iterable[Resources], need: Resources) -> int:
    """How many workers that need so much of each resource fit on the nodes."""
    return sum(
        min(_whole(node.get(name, 0.0) / amount) for name, amount in need.items()) for node in nodes
    )


def plan_workers(scaling: ScalingSettings, capacity: Capacity) -> WorkerPlan:
    """What each training worker may reserve, so that workers and readers fit side by side.

    An elastic number is planned for as many workers as fit now. Raises ``SettingsError`` when the
    least number does not fit now: workers that take every CPU leave none to read their data.
    Workers get less than a CPU each only on a cluster that cannot grow to give them one.
    """
    nodes = capacity.nodes
    least, most = scaling.min_workers, scaling.max_workers
    total, total_gpus = _total(nodes, "CPU"), _total(nodes, "GPU")
    if scaling.use_gpu and least > total_gpus:
        raise SettingsError(
            f"{least} workers need {least} GPUs, the cluster {capacity.describe('GPU')}",
            hint="lower --scaling.num_workers, or leave out --scaling.use_gpu",
        )
    # On CPUs, more workers only as long as each has a whole one, and its reading another.
    slots = total_gpus if scaling.use_gpu else total / 2
    planned = max(least, min(most, int(slots)))
    cpus = scaling.cpus_per_worker or share_of_cpus(nodes, planned, use_gpu=scaling.use_gpu)
    plan = WorkerPlan(
        num_workers=planned,
        cpus=cpus,
        gpus=1.0 if scaling.use_gpu else 0.0,
        threads=1,
        reading_fraction=0.0 if scaling.use_gpu or scaling.cpus_per_worker else 0.5,
    )
    num_workers = min(most, plan.fitting(nodes))
    if num_workers < least or _should_grow(scaling, plan, capacity):
        needed = max(cpus, _least_cpus(scaling)) * least + READER_CPUS
        raise SettingsError(
            f"{least} workers of {cpus:g} CPUs and {READER_CPUS:g} CPU to read data need"
            f" {needed:g} CPUs, the cluster {capacity.describe('CPU')} on {len(nodes)} nodes",
            hint="lower --scaling.num_workers or --scaling.cpus_per_worker",
        )
    cores = os.cpu_count() or 1
    workers_here = -(-num_workers // max(1, len(nodes)))
    threads = scaling.threads_per_worker or max(1, cores // workers_here)
    return replace(plan, num_workers=num_workers, threads=threads)


def _least_cpus(scaling: ScalingSettings) -> float:
    return scaling.cpus_per_worker or 1.0


def _should_grow(scaling: ScalingSettings, plan: WorkerPlan, capacity: Capacity) -> bool:
    """Whether workers share CPUs that need not, since the cluster can grow to one for each."""
    if scaling.use_gpu or scaling.cpus_per_worker or plan.cpus >= 1:
        return False
    nodes = capacity.largest({"CPU": 1.0}).nodes
    least = scaling.min_workers
    return count_slots(nodes, {"CPU": 1.0}) >= least and _total(nodes, "CPU") >= 2 * least


def worker_bundles(scaling: ScalingSettings) -> list[dict[str, float]]:
    """What the least number of workers and their readers ask an autoscaler for."""
    need = {"CPU": _least_cpus(scaling)} | ({"GPU": 1.0} if scaling.use_gpu else {})
    is_shared = not scaling.use_gpu and scaling.cpus_per_worker is None  # half is for reading
    readers = scaling.min_workers if is_shared else 1
    return [need] * scaling.min_workers + [{"CPU": READER_CPUS}] * readers


def plan_trials(
    scaling: ScalingSettings, capacity: Capacity, *, trials: int, concurrent: int | None
) -> tuple[int, ScalingSettings]:
    """How many of the ``trials`` run at a time, and the settings of each.

    On GPUs as many run as their workers find one each, on CPUs as many as leave every worker a CPU
    and another one for reading. ``concurrent`` is the number that was asked for, if any. Raises
    ``SettingsError`` when not even one trial fits.
    """
    nodes = capacity.nodes
    plan_workers(scaling, capacity)
    total = _total(nodes, "GPU" if scaling.use_gpu else "CPU")
    each = scaling.max_workers * (1 if scaling.use_gpu else 2 * _least_cpus(scaling))
    number = concurrent or max(1, min(int(total // each), trials))
    workers = scaling.max_workers * number
    cores = (os.cpu_count() or 1) * len(nodes)
    shares = {
        "cpus_per_worker": scaling.cpus_per_worker
        or share_of_cpus(nodes, workers, use_gpu=scaling.use_gpu),
        "threads_per_worker": scaling.threads_per_worker or max(1, cores // workers),
    }
    return number, scaling.model_copy(update=shares)


def plan_pool(scaling: InferenceScalingSettings, capacity: Capacity) -> PoolPlan:
    """As many actors as the settings say, or as fit. Raises ``SettingsError``."""
    need = {"CPU": scaling.cpus_per_worker} | ({"GPU": 1.0} if scaling.use_gpu else {})
    return _fit_pool(
        scaling.min_workers,
        scaling.max_workers,
        need,
        now=count_slots(capacity.nodes, need),
        later=count_slots(capacity.largest(need).nodes, need),
        capacity=capacity,
    )


def plan_split_pools(
    scaling: InferenceScalingSettings, capacity: Capacity, *, decode_workers: int | None
) -> tuple[PoolPlan, PoolPlan]:
    """Decoders of one CPU each, and predictors. Raises ``SettingsError``.

    On GPUs the predictors reserve no CPU, so that no number of decoders can keep them waiting, but
    decoders leave one free for each. On CPUs there is one predictor unless the settings say more.
    """
    need = {"GPU": 1.0} if scaling.use_gpu else {"CPU": scaling.cpus_per_worker}
    largest = capacity.largest(need)
    wanted = None if scaling.use_gpu else 1
    least = scaling.min_workers or wanted
    now = count_slots(capacity.nodes, need)
    predictors = _fit_pool(
        least,
        scaling.max_workers or wanted,
        need,
        # On CPUs they begin with the least number, since more would leave none to decode.
        now=now if least is None or scaling.use_gpu else min(now, least),
        later=count_slots(largest.nodes, need),
        capacity=capacity,
    )
    cpus = max(need.get("CPU", 0.0), 1.0)
    one = {"CPU": 1.0}
    now = count_slots(capacity.nodes, one) - math.ceil(predictors.min_workers * cpus)
    later = count_slots(largest.nodes, one) - math.ceil(predictors.max_workers * cpus)
    decoders = _fit_pool(
        decode_workers, decode_workers, one, now=now, later=max(now, later), capacity=capacity
    )
    return decoders, predictors


def pool_bundles(pools: Iterable[PoolPlan]) -> list[dict[str, float]]:
    """What pools, as they begin, ask an autoscaler for."""
    return [
        {name: amount for name, amount in (("CPU", pool.cpus), ("GPU", pool.gpus)) if amount}
        for pool in pools
        for _ in range(pool.min_workers)
    ]


def _fit_pool(
    least: int | None,
    most: int | None,
    need: Mapping[str, float],
    *,
    now: int,
    later: int,
    capacity: Capacity,
) -> PoolPlan:
    """From ``least`` to ``most`` actors (None: one, all), of which ``now`` and ``later`` fit."""
    begin = max(least or 1, min(now, most or now))
    if begin > now:
        what = " and ".join(f"{amount:g} {name}" for name, amount in need.items())
        holds = "can grow to hold" if capacity.grown else "has room for"
        raise SettingsError(
            f"{begin} workers of {what} do not fit: the cluster {holds} {max(0, now)}",
            hint="lower --scaling.num_workers or --scaling.cpus_per_worker",
        )
    end = max(begin, min(later, most or later))
    return PoolPlan(begin, end, need.get("CPU", 0.0), need.get("GPU", 0.0))


def share_of_cpus(nodes: Collection[Resources], workers: int, *, use_gpu: bool) -> float:
    """Half of the CPUs for the workers, half for reading: 1 of 2, 0.5 each for two on 2.

    No more than a node has, or on GPUs than there are beside each, so that all workers fit.
    """
    share = _total(nodes, "CPU") / (2 * workers)
    if use_gpu:
        beside = [node.get("CPU", 0.0) / node["GPU"] for node in nodes if node.get("GPU", 0.0) >= 1]
        share = min([share, *beside])
    if share < 1:
        return int(share * 100) / 100
    for whole in range(int(share), 1, -1):
        if use_gpu or count_slots(nodes, {"CPU": whole}) >= workers:
            return float(whole)
    return 1.0


def _total(nodes: Iterable[Resources], name: str) -> float:
    return sum(node.get(name, 0.0) for node in nodes)


def _whole(number: float) -> int:
    """Rounded down, but not for the last bits of a quotient of fractions."""
    return int(number + 1e-6)
