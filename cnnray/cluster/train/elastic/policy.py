"""How many workers train, and what ends a run that cannot have them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import ray.train

from cnnray.cluster.core.nodes import Resources, read_nodes
from cnnray.cluster.core.resources import WorkerPlan
from cnnray.config import ScalingSettings
from cnnray.errors import IncompleteError

RESIZE_SECONDS = 60.0
"""Between two considerations of another number of workers."""
MAX_STARTS = 3
"""Maximum failed starts of the workers in a run whose number of workers is fixed."""
MAX_INTERRUPTIONS = 100
"""Maximum preempted nodes in a run; also of failed starts, where the number may change."""

HINT = "submit the same command again: it goes on from the last checkpoint"

START_FAILURES = {"WorkerGroupStartupTimeoutError", "WorkerGroupStartupFailedError"}
"""Ray Train's exceptions for workers that could not be started; it exports neither."""


def plan_scaling(scaling: ScalingSettings, plan: WorkerPlan) -> ray.train.ScalingConfig:
    """What Ray Train is asked for."""
    return ray.train.ScalingConfig(
        num_workers=(scaling.min_workers, scaling.max_workers)
        if scaling.is_elastic
        else scaling.num_workers,
        use_gpu=scaling.use_gpu,
        resources_per_worker=plan.need,
        elastic_resize_monitor_interval_s=RESIZE_SECONDS,
    )


def plan_failures(scaling: ScalingSettings, *, max_restarts: int) -> ray.train.FailureConfig:
    """How often Ray Train restarts the workers: lost ones count, a resize does not."""
    return ray.train.FailureConfig(
        max_failures=max_restarts,
        max_preemption_failures=MAX_INTERRUPTIONS,
        controller_failure_limit=MAX_INTERRUPTIONS if scaling.is_elastic else MAX_STARTS,
    )


@dataclass
class ElasticRules:
    """The rules of the preflight for a run whose number of workers may change."""

    scaling: ScalingSettings
    plan: WorkerPlan
    wait_seconds: float
    waiting_since: float | None = None  # monotonic seconds

    def count_workers(self, reserved: Mapping[str, Resources]) -> int:
        """How many workers fit what Ray has reserved for the run on each node, by node id.

        Readers are left their CPUs, and nodes that are being drained do not count.
        """
        staying = {node.id: node.resources for node in read_nodes()}
        # Ray moves a reservation from a node that goes only when it is gone.
        ours = reserved if reserved.keys() <= staying.keys() else staying
        fitting = min(self.plan.slots_on(ours.values()), self.plan.fitting(staying.values()))
        return min(fitting, self.scaling.max_workers)

    def check_wait(self) -> None:
        """Begin or continue the wait for workers; raises ``IncompleteError`` at its deadline."""
        now = time.monotonic()
        if self.waiting_since is None:
            self.waiting_since = now
        if now - self.waiting_since > self.wait_seconds:
            raise IncompleteError(
                f"the cluster had no room to start {self.scaling.min_workers} workers for"
                f" {self.wait_seconds:g} s",
                hint=HINT,
            )

    def end_wait(self) -> None:
        """The workers run. (A start that fails does not end the wait.)"""
        self.waiting_since = None


def find_lack_of_workers(error: Exception) -> IncompleteError | None:
    """The error of a run whose workers could not be started or were preempted too often."""
    failure = getattr(error, "controller_failure", None)
    if type(failure).__name__ in START_FAILURES:
        return IncompleteError("the cluster had no room to start the workers", hint=HINT)
    if isinstance(error, ray.train.PreemptionError):
        return IncompleteError(
            f"more than {MAX_INTERRUPTIONS} nodes with workers were taken away", hint=HINT
        )
    return None
