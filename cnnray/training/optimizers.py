"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math

from torch import nn, optim


def build_optimizer(
    model: nn.Module, *, name: str, lr: float, weight_decay: float = 0.0, momentum: float = 0.9
) -> optim.Optimizer:
    """Adam, AdamW or SGD with Nesterov momentum over the parameters that are trained.

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
        return optim.Adam(groups, lr=lr)
    if name == "adamw":
        return optim.AdamW(groups, lr=lr)
    if name == "sgd":
        return optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)
    raise ValueError(f"unknown optimizer {name}")


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
