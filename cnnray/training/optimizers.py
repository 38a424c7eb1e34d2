"""Optimizers, and how their state is restored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn, optim

from cnnray.errors import SettingsError
from cnnray.training.layers import layer_scales
from cnnray.training.sharding import is_sharded, laid_out_like


def build_optimizer(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    layer_decay: float = 1.0,
) -> optim.Optimizer:
    """Adam, AdamW or SGD with Nesterov momentum, fused, or timm's LAMB (You et al. 2020).

    They move the parameters that are trained. Biases and normalisation parameters (all that have
    one dimension) are not decayed, as in Goyal et al. 2017 and He et al. 2019. Each group's
    ``lr_scale`` is its part of the learning rate, ``layer_decay`` to the power of the layers up to
    the last (``layers.layer_scales``).
    """
    scales = layer_scales(model, decay=layer_decay)
    members: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            members.setdefault((parameter.ndim <= 1, scales[key]), []).append(parameter)
    groups = [
        {"params": params, "weight_decay": 0.0 if is_flat else weight_decay, "lr_scale": scale}
        for (is_flat, scale), params in sorted(members.items(), key=lambda item: item[0])
    ]
    if name == "adam":
        return optim.Adam(groups, lr=lr, fused=True)
    if name == "adamw":
        return optim.AdamW(groups, lr=lr, fused=True)
    if name == "sgd":
        fused = not is_sharded(model)  # torch 2.14 has no fused SGD for shards
        sgd = optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=fused)
        return _with_momentum(sgd) if momentum > 0 else sgd
    if name == "lamb":
        return _lamb()(groups, lr=lr, max_grad_norm=None)  # clipping is a setting of its own
    raise ValueError(f"unknown optimizer {name}")


def _with_momentum(sgd: optim.SGD) -> optim.SGD:
    """With buffers of 0, from which the first step is the one that it is without any.

    By itself the fused SGD of torch 2.14 makes them in a step of all parameters of a group: a
    ``GradScaler`` that skips that step leaves in them what was in memory, and one for parameters
    that were frozen until then fails.
    """
    for group in sgd.param_groups:
        for parameter in group["params"]:
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def _lamb() -> Callable[..., optim.Optimizer]:
    try:
        from timm.optim import Lamb
    except ImportError as error:
        raise SettingsError(
            "--optimizer.name lamb needs timm, which is not installed",
            hint="pip install 'cnnray[timm]'",
        ) from error
    return cast(Callable[..., optim.Optimizer], Lamb)


def restore_optimizer(optimizer: optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a ``state_dict`` of whole tensors, each in the memory format of its parameter.

    The fused optimizers of torch 2.14 go through memory as it lies: a channels-last weight and a
    contiguous moment of it would be paired wrongly, and nothing would say so.
    """
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        if "fused" in group:  # the saved one's own choice: it may have had no shards, or some
            group["fused"] = optimizer.defaults["fused"]
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                moments[name] = laid_out_like(value, parameter)
