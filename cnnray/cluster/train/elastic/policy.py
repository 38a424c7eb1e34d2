"""How many workers train: Ray Train's elastic scaling, with the rules of the preflight.

Ray's own policy counts workers until every CPU is taken, which leaves none to read their data; it
counts nodes that are about to go; it throws away what was trained since the last checkpoint when
more room appears; and while there is too little, it waits for ever. Ray 2.60 has no setting for
any of this, so the policy is extended and handed to the controller.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray
import ray._private.state
import ray.train
import ray.train.torch
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from ray.train.v2._internal.execution.controller.state import RunningState
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)

from cnnray.cluster.core.resources import WorkerResources
from cnnray.cluster.train.elastic.preemption import ask_for_checkpoint
from cnnray.config import ScalingSettings
from cnnray.errors import IncompleteError

RESIZE_SECONDS = 60.0
"""Between two looks whether other numbers of workers would fit."""
LOOK_SECONDS = 1.0
"""Between two looks for room, while there is too little."""
ASK_SECONDS = 10.0
"""For a worker to answer."""
MAX_STARTS = 3
"""Starts of the workers that may fail in a run, where their number is fixed."""
MAX_INTERRUPTIONS = 100
"""Nodes that may give notice and go in a run; also starts that may fail, where it is not fixed."""

HINT = "submit the same command again: it goes on from the last checkpoint"


def plan_scaling(scaling: ScalingSettings, resources: WorkerResources) -> ray.train.ScalingConfig:
    """What Ray Train is asked for."""
    return ray.train.ScalingConfig(
        num_workers=(scaling.min_workers, scaling.max_workers)
        if scaling.is_elastic
        else scaling.num_workers,
        use_gpu=scaling.use_gpu,
        resources_per_worker=resources.need,
        elastic_resize_monitor_interval_s=RESIZE_SECONDS,
    )


def plan_failures(scaling: ScalingSettings, *, max_restarts: int) -> ray.train.FailureConfig:
    """How often Ray Train starts the workers again: lost ones count, a resize does not."""
    return ray.train.FailureConfig(
        max_failures=max_restarts,
        max_preemption_failures=MAX_INTERRUPTIONS,
        controller_failure_limit=MAX_INTERRUPTIONS if scaling.is_elastic else MAX_STARTS,
    )


class ElasticTrainer(ray.train.torch.TorchTrainer):  # type: ignore[misc]
    """Ray's, with our policy where the number of workers may change."""

    def __init__(
        self, *arguments: Any, resources: WorkerResources, wait_seconds: float, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.resources = resources
        self.wait_seconds = wait_seconds

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            options["scaling_policy"] = RoomPolicy(
                self.scaling_config, resources=self.resources, wait_seconds=self.wait_seconds
            )
        return super()._initialize_and_run_controller(**options)


class RoomPolicy(ElasticScalingPolicy):  # type: ignore[misc]
    """As many workers as fit beside their readers; raises ``IncompleteError`` after the wait."""

    def __init__(
        self,
        scaling_config: ray.train.ScalingConfig,
        *,
        resources: WorkerResources,
        wait_seconds: float,
    ) -> None:
        super().__init__(scaling_config)
        self.resources = resources
        self.wait_seconds = wait_seconds
        self.waiting_since: float | None = None

    def _count_possible_workers(self, reserved_resources: Mapping[str, Mapping[str, float]]) -> int:
        """Of what Ray's coordinator has reserved for this run, what fits our rules."""
        staying = staying_nodes()
        # What is reserved on a node that goes is reserved on another one only once it is gone.
        ours = reserved_resources if reserved_resources.keys() <= staying.keys() else staying
        fitting = min(
            self.resources.places_on(ours.values()), self.resources.fitting(staying.values())
        )
        return min(fitting, int(self.scaling_config.max_workers))

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """When a group is to be started, again or for the first time."""
        self._end_the_wait_in_time()
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision):
            time.sleep(LOOK_SECONDS)  # Ray asks again at once, in a loop without a pause or an end
        return decision

    def _end_the_wait_in_time(self) -> None:
        now = time.monotonic()
        if self.waiting_since is None:
            self.waiting_since = now
        if now - self.waiting_since > self.wait_seconds:
            least = self.scaling_config.min_workers
            raise IncompleteError(
                f"the cluster had no room to start {least} workers for {self.wait_seconds:g} s",
                hint=HINT,
            )

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """The wait is over once a group runs; a start that fails is a part of it."""
        if isinstance(current_state, RunningState):
            self.waiting_since = None

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """A resize waits for a checkpoint, since the new group begins at the last one."""
        decision = super().make_decision_for_running_worker_group(
            worker_group_state, worker_group_status
        )
        if isinstance(decision, ResizeDecision) and not _is_checkpointed(worker_group_state):
            self._latest_monitor_time = float("-inf")  # look again in two seconds, not in a minute
            return NoopDecision()
        return decision


def _is_checkpointed(worker_group_state: Any) -> bool:
    rank_0 = worker_group_state.workers[0]
    try:
        return bool(ray.get(rank_0.execute_async(ask_for_checkpoint), timeout=ASK_SECONDS))
    except ray.exceptions.RayError:
        return False  # lost, or busy: the controller will see, or ask again


def staying_nodes() -> dict[str, dict[str, float]]:
    """What each node has, by its id, of those that are alive and will not be taken away."""
    leaving = ray._private.state.state.get_draining_nodes()
    return {
        node["NodeID"]: node["Resources"]
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving
    }


def find_lack_of_workers(error: Exception) -> IncompleteError | None:
    """The end of a run whose workers could not be started again, or went too often; else None."""
    failure = getattr(error, "controller_failure", None)
    if isinstance(failure, WorkerGroupStartupTimeoutError | WorkerGroupStartupFailedError):
        return IncompleteError("the cluster had no room to start the workers", hint=HINT)
    if isinstance(error, ray.train.PreemptionError):
        return IncompleteError(
            f"more than {MAX_INTERRUPTIONS} nodes with workers were taken away", hint=HINT
        )
    return None
