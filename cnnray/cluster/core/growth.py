"""A plan that fits the cluster: at once, or when its autoscaler has brought what is missing.

A job asks with a placement group, whose pending bundles every autoscaler of Ray sees. Unlike
``request_resources``, which has one list for a whole cluster that stays when a job is killed, each
job has its own, and Ray removes it with the job.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from cnnray.cluster.core.autoscaling import read_autoscaler
from cnnray.cluster.core.nodes import Autoscaler, Resources, promised_nodes, read_nodes
from cnnray.cluster.core.resources import Capacity
from cnnray.config import ClusterSettings
from cnnray.console import format_seconds
from cnnray.errors import IncompleteError, SettingsError

logger = logging.getLogger(__name__)

Plan = TypeVar("Plan")
Bundles = Sequence[Mapping[str, float]]

POLL_SECONDS = 1.0
HINT = "see `ray status` for what the autoscaler does; the same command tries again"


def read_capacity(autoscaler: Autoscaler | None = None) -> Capacity:
    """The nodes of the cluster as it is now, and what ``autoscaler``, or its own, may bring."""
    nodes = read_nodes()
    promised, most = promised_nodes(autoscaler or read_autoscaler(nodes), nodes)
    return Capacity(tuple(node.resources for node in nodes), tuple(promised), most)


def fit(
    plan: Callable[[Capacity], Plan],
    *,
    need: Resources,
    bundles: Callable[[Plan], Bundles],
    cluster: ClusterSettings,
) -> Plan:
    """``plan`` of the cluster as it is, or as it is once the autoscaler has made it large enough.

    ``need`` is what one worker reserves, and ``bundles`` tells what a plan asks for. Raises the
    ``SettingsError`` of the plan where it can never fit, and ``IncompleteError`` when no node has
    come for ``cluster.stall_seconds``.
    """
    nodes = read_nodes()
    autoscaler = read_autoscaler(nodes)
    capacity = read_capacity(autoscaler)
    with contextlib.suppress(SettingsError):
        return plan(capacity)
    wanted = bundles(_plan_for_growth(plan, capacity, need))
    with _requested(wanted):
        for is_last in _waiting(wanted, cluster, seconds=cluster.stall_seconds):
            with contextlib.suppress(SettingsError):
                return plan(read_capacity(autoscaler))
            if is_last:
                break
    raise IncompleteError(
        f"the autoscaler brought nothing for {cluster.stall_seconds:g} s that holds"
        f" {_describe(wanted)}",
        hint=HINT,
    )


def gather(bundles: Bundles, *, cluster: ClusterSettings, seconds: float) -> None:
    """Ask for more than is necessary, and wait until it is there or no node has come for a while.

    A worker of the autoscaler's may take minutes to start, so several are asked for at once.
    """
    with _requested(bundles) as group:
        for is_last in _waiting(bundles, cluster, seconds=seconds):
            if is_last or group.wait(0):
                return


def _plan_for_growth(plan: Callable[[Capacity], Plan], capacity: Capacity, need: Resources) -> Plan:
    """The plan on the smallest grown cluster that holds it. Raises the error of the largest one."""
    best, too_few = plan(capacity.largest(need)), 0
    enough = capacity.largest(need).grown
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        try:
            best, enough = plan(capacity.grow(middle, need)), middle
        except SettingsError:
            too_few = middle
    return best


@contextlib.contextmanager
def _requested(bundles: Bundles) -> Iterator[ray.util.placement_group]:
    """Demand that the autoscaler sees; what it brings is free again at the end."""
    group = placement_group([dict(bundle) for bundle in bundles])
    try:
        yield group
    finally:
        remove_placement_group(group)


def _waiting(bundles: Bundles, cluster: ClusterSettings, *, seconds: float) -> Iterator[bool]:
    """Pause and yield whether the wait is over: no node has come for so many ``seconds``."""
    started = progressed = logged = time.monotonic()
    most = len(read_nodes())
    logger.info("asking the autoscaler for %s", _describe(bundles))
    while True:
        time.sleep(POLL_SECONDS)
        now, nodes = time.monotonic(), len(read_nodes())
        if nodes > most:
            most, progressed = nodes, now
        if now - logged >= cluster.progress_seconds:
            logged = now
            logger.info(
                "waiting for %s: %d nodes after %s",
                _describe(bundles),
                nodes,
                format_seconds(now - started),
            )
        yield now - progressed >= seconds


def _describe(bundles: Bundles) -> str:
    """2 x 1 CPU + 1 GPU and 1 x 4 CPU."""
    counts = Counter(
        " + ".join(f"{amount:g} {name}" for name, amount in bundle.items()) for bundle in bundles
    )
    return " and ".join(f"{number} x {bundle}" for bundle, number in counts.items())
