"""Losses: (B, K) logits and targets → (B,) losses, so that sums over ranks stay exact.

Targets are (B,) int64 labels, or (B, K) float distributions over the classes where samples were
mixed or labels are soft.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def build_loss(name: str, *, label_smoothing: float = 0.0, focal_gamma: float = 2.0) -> Loss:
    """The loss ``cross_entropy``, ``mse``, ``focal`` or ``bce``.

    ``label_smoothing`` is the part of each target that is spread over all classes (Szegedy et al.
    2016), for any of them.
    """

    def focal_loss(logits: Tensor, target: Tensor) -> Tensor:
        return focal(logits, target, gamma=focal_gamma)

    loss = {
        "cross_entropy": cross_entropy,
        "mse": mean_squared_error,
        "focal": focal_loss,
        "bce": binary_cross_entropy,
    }[name]
    if label_smoothing == 0.0:
        return loss

    def smoothed(logits: Tensor, target: Tensor) -> Tensor:
        num_classes = logits.shape[1]
        target = distribution(target, num_classes)
        return loss(logits, target * (1 - label_smoothing) + label_smoothing / num_classes)

    return smoothed


def distribution(target: Tensor, num_classes: int) -> Tensor:
    """Labels (B,) as their (B, K) distributions; distributions as they are."""
    if target.ndim == 2:
        return target
    return F.one_hot(target, num_classes).float()


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """(B,) minus the mean over the target of log softmax: of a label, its log-likelihood."""
    return F.cross_entropy(logits.float(), target, reduction="none")


def mean_squared_error(logits: Tensor, target: Tensor) -> Tensor:
    """(B,) mean over K of (softmax - target)², the Brier score over K: the tutorial's loss."""
    expected = distribution(target, logits.shape[1])
    return (torch.softmax(logits.float(), dim=1) - expected).square().mean(dim=1)


def focal(logits: Tensor, target: Tensor, *, gamma: float) -> Tensor:
    """(B,) cross-entropy in which class k counts (1 - p_k)^gamma: easy samples hardly (Lin 2017).

    ``gamma`` 0 is the cross-entropy.
    """
    log_p = torch.log_softmax(logits.float(), dim=1)
    # Exact near p = 1, and never 0, where the slope of a power below 1 is infinite.
    error = (-torch.expm1(log_p)).clamp(min=torch.finfo(torch.float32).eps)
    return -(distribution(target, logits.shape[1]) * error.pow(gamma) * log_p).sum(dim=1)


def binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """(B,) mean over K of each class's own yes or no (Wightman et al. 2021, arXiv:2110.00476)."""
    expected = distribution(target, logits.shape[1])
    return F.binary_cross_entropy_with_logits(logits.float(), expected, reduction="none").mean(1)
