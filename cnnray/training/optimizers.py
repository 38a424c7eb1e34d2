"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn, optim


def build_optimizer(
    model: nn.Module, *, name: str, lr: float, weight_decay: float = 0.0, momentum: float = 0.9
) -> optim.Optimizer:
    """Adam, AdamW or SGD with Nesterov momentum over the parameters that are trained, fused.

    Biases and normalisation parameters (all that have one dimension) are not decayed, as in
    Goyal et al. 2017 and He et al. 2019.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "adam":
        return optim.Adam(groups, lr=lr, fused=True)
    if name == "adamw":
        return optim.AdamW(groups, lr=lr, fused=True)
    if name == "sgd":
        return optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=True)
    raise ValueError(f"unknown optimizer {name}")


def restore_optimizer(optimizer: optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a ``state_dict``, each tensor in the memory format of its parameter.

    The fused optimizers of torch 2.14 go through memory as it lies: a channels-last weight and a
    contiguous moment of it would be paired wrongly, and nothing would say so.
    """
    optimizer.load_state_dict(state)
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter).copy_(value)


def learning_rate_factor(
    step: int, *, name: str, total_steps: int, warmup_steps: int, min_fraction: float
) -> float:
    """Fraction of the peak learning rate at a 0-based step.

    Linear warm-up from 1/warmup_steps, then constant, or a half cosine (Loshchilov & Hutter 2017)
    that ends at ``min_fraction`` on the last step.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if name == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return min_fraction + (1 - min_fraction) * cosine
