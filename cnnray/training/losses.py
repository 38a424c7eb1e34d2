"""Losses: (B, K) logits and (B,) labels → (B,) losses, so that sums over ranks stay exact."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """(B,) negative log-likelihood of the label."""
    return F.cross_entropy(logits.float(), label, reduction="none")


def mean_squared_error(logits: Tensor, label: Tensor) -> Tensor:
    """(B,) mean over K of (softmax - one-hot)², the Brier score over K: the tutorial's loss."""
    target = F.one_hot(label, logits.shape[1]).float()
    return (torch.softmax(logits.float(), dim=1) - target).square().mean(dim=1)


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "mse": mean_squared_error}
