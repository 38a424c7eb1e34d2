"""All that cnnray uses of Ray Train's private interfaces; only elastic runs import this module.

Ray's own elastic policy counts workers until every CPU is taken, which leaves none to read their
data; it counts nodes that are being drained; it throws away what was trained since the last
checkpoint when it resizes; and it waits for workers without a deadline or a pause. Ray 2.60 has no
setting for any of this. What would make each private name needless:

- ``ElasticScalingPolicy``, ``NoopDecision``, ``ResizeDecision``, ``_count_possible_workers`` and
  ``_latest_monitor_time``: a public scaling policy, as ``ray.train.UserCallback`` is public.
- ``_initialize_and_run_controller``: ``ScalingConfig(policy=...)`` or an argument of the trainer.
- ``RunningState``: a callback for the start of a worker group in ``UserCallback``.
- ``get_train_context().preemption_context``: a ``get_preemption_info`` that is not a barrier.
- ``execute_async`` on a worker: a callback that may run code in workers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray
import ray.train.torch
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.controller.state import RunningState
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)

from cnnray.cluster.train.elastic.policy import ElasticRules
from cnnray.cluster.train.elastic.preemption import request_checkpoint

RETRY_SECONDS = 1.0
"""Between two counts of workers while too few fit."""
ANSWER_SECONDS = 10.0
"""For a worker to answer."""


class ElasticTrainer(ray.train.torch.TorchTrainer):  # type: ignore[misc]
    """Ray's trainer with our policy."""

    def __init__(self, *arguments: Any, rules: ElasticRules, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.rules = rules

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        options["scaling_policy"] = ElasticPolicy(self.scaling_config, self.rules)
        return super()._initialize_and_run_controller(**options)


class ElasticPolicy(ElasticScalingPolicy):  # type: ignore[misc]
    """Ray's policy with our rules; raises ``IncompleteError`` when the wait is over."""

    def __init__(self, scaling_config: ray.train.ScalingConfig, rules: ElasticRules) -> None:
        super().__init__(scaling_config)
        self.rules = rules

    def _count_possible_workers(self, reserved_resources: Mapping[str, Mapping[str, float]]) -> int:
        return self.rules.count_workers(reserved_resources)

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Called before a group is started, for the first time or again."""
        self.rules.check_wait()
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision):
            time.sleep(RETRY_SECONDS)  # the controller would ask again at once
        return decision

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Called when the controller enters a state."""
        if isinstance(current_state, RunningState):
            self.rules.end_wait()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """A resize waits for a checkpoint, since the new group begins at the last one."""
        decision = super().make_decision_for_running_worker_group(
            worker_group_state, worker_group_status
        )
        if isinstance(decision, ResizeDecision) and not _has_checkpoint(worker_group_state):
            self._latest_monitor_time = float("-inf")  # decide again at the next poll
            return NoopDecision()
        return decision


def _has_checkpoint(worker_group_state: Any) -> bool:
    rank_0 = worker_group_state.workers[0]
    try:
        return bool(ray.get(rank_0.execute_async(request_checkpoint), timeout=ANSWER_SECONDS))
    except ray.exceptions.RayError:
        return False  # lost or busy: the controller will notice, or ask again


def find_preempted_nodes() -> list[str]:
    """Ids of the nodes of this worker's group that Ray reports as being preempted."""
    info = get_train_context().preemption_context.preemption_info
    return [] if info is None else list(info.preempted_node_ids)
