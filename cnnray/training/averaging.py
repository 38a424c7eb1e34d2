"""An exponential moving average of the weights, which is what is evaluated and saved."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def build_average(model: nn.Module, *, decay: float) -> AveragedModel:
    """The average over about the last 1 / (1 - ``decay``) updates of ``model``, from its first on.

    The statistics of batch norm are averaged with the weights that they belong to.
    """
    update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)


def restore_average(average: AveragedModel, tensors: Mapping[str, Tensor], *, step: int) -> None:
    """Go on from the ``module``'s saved state, after ``step`` updates."""
    average.module.load_state_dict(tensors)
    average.n_averaged.fill_(step)
