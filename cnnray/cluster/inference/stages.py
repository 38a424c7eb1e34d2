"""The actors of inference: how many there are of each kind, and what each one reserves."""

from __future__ import annotations

from typing import Any

from cnnray.cluster.core.growth import fit
from cnnray.cluster.core.resources import PoolPlan, plan_pool, plan_split_pools, pool_bundles
from cnnray.cluster.core.streaming import Stage
from cnnray.cluster.inference.actors import DecodeActor, InferenceJob, LabelActor, PredictActor
from cnnray.cluster.inference.choices import is_split
from cnnray.config import ClusterSettings, InferenceScalingSettings, InferenceSettings


def plan_stages(job: InferenceJob, settings: InferenceSettings) -> list[Stage]:
    """Where a job's work is done. Waits and raises as ``inference_stage``."""
    arguments = {"job": job}
    if is_split(settings):
        return split_stages(
            DecodeActor,
            PredictActor,
            arguments,
            settings.scaling,
            settings.cluster,
            decode_workers=settings.decode_workers,
        )
    return [inference_stage(LabelActor, arguments, settings.scaling, settings.cluster)]


def inference_stage(
    actor: type,
    arguments: dict[str, Any],
    scaling: InferenceScalingSettings,
    cluster: ClusterSettings,
) -> Stage:
    """As many actors as the settings say, or as fit, more as the cluster grows.

    Waits for an autoscaler where too few fit. Raises ``SettingsError`` where they never will, and
    ``IncompleteError`` when the wait was in vain.
    """
    need = {"CPU": scaling.cpus_per_worker} | ({"GPU": 1.0} if scaling.use_gpu else {})
    pool = fit(
        lambda capacity: plan_pool(scaling, capacity),
        need=need,
        bundles=lambda plan: pool_bundles([plan]),
        cluster=cluster,
    )
    return _make_stage(actor, arguments, pool)


def split_stages(
    decoder: type,
    predictor: type,
    arguments: dict[str, Any],
    scaling: InferenceScalingSettings,
    cluster: ClusterSettings,
    *,
    decode_workers: int | None,
) -> list[Stage]:
    """Decoders, and predictors that take the tables of any of them. Waits and raises as above."""
    need = {"GPU": 1.0} if scaling.use_gpu else {"CPU": scaling.cpus_per_worker}
    pools = fit(
        lambda capacity: plan_split_pools(scaling, capacity, decode_workers=decode_workers),
        need=need,
        bundles=pool_bundles,
        cluster=cluster,
    )
    return [
        _make_stage(actor, arguments, pool)
        for actor, pool in zip((decoder, predictor), pools, strict=True)
    ]


def _make_stage(actor: type, arguments: dict[str, Any], pool: PoolPlan) -> Stage:
    return Stage(actor, arguments, pool.min_workers, pool.max_workers, pool.cpus, pool.gpus)
