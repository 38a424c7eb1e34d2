"""What a cluster has, and how many workers of what size fit on it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import ray

from cnnray.config import ScalingSettings
from cnnray.errors import SettingsError

READER_CPUS = 1.0
"""What the stages that read data need at least, next to the workers."""


@dataclass(frozen=True)
class WorkerResources:
    """What each training worker reserves, and how many of them there is room for."""

    num_workers: int  # that fit the cluster as it was planned for
    cpus: float
    gpus: float
    threads: int
    reading_fraction: float  # of all CPUs: what the workers leave for reading, at least

    @property
    def need(self) -> dict[str, float]:
        """What one worker reserves, as Ray counts it."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})

    def places_on(self, nodes: Iterable[Mapping[str, float]]) -> int:
        """How many workers the nodes could hold, if nothing else ran there."""
        return count_places(nodes, self.need)

    def fitting(self, nodes: Collection[Mapping[str, float]]) -> int:
        """How many workers fit the nodes side by side with what reads their data."""
        total = _total(nodes, "CPU")
        room = total - max(READER_CPUS, self.reading_fraction * total)
        return max(0, min(self.places_on(nodes), _whole(room / self.cpus)))


def node_resources() -> list[dict[str, float]]:
    """What each node that is alive has in all: CPU, GPU, object_store_memory and others."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def count_places(nodes: Iterable[Mapping[str, float]], need: Mapping[str, float]) -> int:
    """How many workers that need so much of each resource fit on the nodes."""
    return sum(
        min(_whole(node.get(name, 0.0) / amount) for name, amount in need.items()) for node in nodes
    )


def plan_workers(scaling: ScalingSettings) -> WorkerResources:
    """What each worker may reserve, so that workers and readers fit side by side.

    Where their number may change, it is planned for as many as there is room for now.
    Raises ``SettingsError`` when the least number cannot run on this cluster at its present size,
    where Ray would wait for ever: workers that take every CPU leave none to read their data.
    """
    nodes = node_resources()
    least, most = scaling.min_workers, scaling.max_workers
    total, total_gpus = _total(nodes, "CPU"), _total(nodes, "GPU")
    if scaling.use_gpu and least > total_gpus:
        raise SettingsError(
            f"{least} workers need {least} GPUs, the cluster has {total_gpus:g}",
            hint="lower --scaling.num_workers, or leave out --scaling.use_gpu",
        )
    # On CPUs, more workers only as long as each has a whole one, and its reading another.
    room = total_gpus if scaling.use_gpu else total / 2
    planned = max(least, min(most, int(room)))
    resources = WorkerResources(
        num_workers=planned,
        cpus=scaling.cpus_per_worker or share_of_cpus(nodes, planned, use_gpu=scaling.use_gpu),
        gpus=1.0 if scaling.use_gpu else 0.0,
        threads=1,
        reading_fraction=0.0 if scaling.use_gpu or scaling.cpus_per_worker else 0.5,
    )
    num_workers = min(most, resources.fitting(nodes))
    if num_workers < least:
        needed = resources.cpus * least + READER_CPUS
        raise SettingsError(
            f"{least} workers of {resources.cpus:g} CPUs and {READER_CPUS:g} CPU to read data need"
            f" {needed:g} CPUs, the cluster has {total:g} on {len(nodes)} nodes",
            hint="lower --scaling.num_workers or --scaling.cpus_per_worker",
        )
    cores = os.cpu_count() or 1
    workers_here = -(-num_workers // max(1, len(nodes)))
    threads = scaling.threads_per_worker or max(1, cores // workers_here)
    return replace(resources, num_workers=num_workers, threads=threads)


def share_of_cpus(nodes: Collection[Mapping[str, float]], workers: int, *, use_gpu: bool) -> float:
    """Half of the CPUs for the workers, half for reading: 1 of 2, 0.5 each for two on 2.

    No more than there are beside each GPU.
    """
    share = _total(nodes, "CPU") / (2 * workers)
    if use_gpu:
        beside = [node.get("CPU", 0.0) / node["GPU"] for node in nodes if node.get("GPU", 0.0) >= 1]
        share = min([share, *beside])
    return float(int(share)) if share >= 1 else int(share * 100) / 100


def _total(nodes: Iterable[Mapping[str, float]], name: str) -> float:
    return sum(node.get(name, 0.0) for node in nodes)


def _whole(number: float) -> int:
    """Rounded down, but not for the last bits of a quotient of fractions."""
    return int(number + 1e-6)
