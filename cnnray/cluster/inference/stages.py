"""The actors of inference: how many there are of each kind, and what each one reserves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cnnray.cluster.core.resources import count_places, node_resources
from cnnray.cluster.core.streaming import Stage
from cnnray.cluster.inference.actors import DecodeActor, InferenceJob, LabelActor, PredictActor
from cnnray.cluster.inference.choices import is_split
from cnnray.config import InferenceScalingSettings, InferenceSettings
from cnnray.errors import SettingsError


def plan_stages(job: InferenceJob, settings: InferenceSettings) -> list[Stage]:
    """Where a job's work is done. Raises ``SettingsError`` when the cluster cannot hold it."""
    arguments = {"job": job}
    if is_split(settings):
        return split_stages(
            DecodeActor,
            PredictActor,
            arguments,
            settings.scaling,
            decode_workers=settings.decode_workers,
        )
    return [inference_stage(LabelActor, arguments, settings.scaling)]


def inference_stage(
    actor: type, arguments: dict[str, Any], scaling: InferenceScalingSettings
) -> Stage:
    """As many actors as the settings say, or as there is room for. Raises ``SettingsError``."""
    num_gpus = 1.0 if scaling.use_gpu else 0.0
    need = {"CPU": scaling.cpus_per_worker} | ({"GPU": 1.0} if scaling.use_gpu else {})
    num_workers = _fitting(scaling.num_workers, count_places(node_resources(), need), need)
    return Stage(actor, arguments, num_workers, num_workers, scaling.cpus_per_worker, num_gpus)


def split_stages(
    decoder: type,
    predictor: type,
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
    predictors = _fitting(wanted, count_places(node_resources(), need), need)
    cpus = 0.0 if scaling.use_gpu else scaling.cpus_per_worker
    left = count_places(node_resources(), {"CPU": 1.0}) - math.ceil(predictors * max(cpus, 1.0))
    decoders = _fitting(decode_workers, left, {"CPU": 1.0})
    return [
        Stage(decoder, arguments, decoders, decoders, num_cpus=1.0),
        Stage(predictor, arguments, predictors, predictors, cpus, need.get("GPU", 0.0)),
    ]


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
