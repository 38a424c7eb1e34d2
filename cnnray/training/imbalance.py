"""What is done about classes of unequal size: weights of samples, or logits moved by the prior.

Both look at the training split's counts alone, and both leave the model as it is: what it gives
out after training needs no correction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cnnray.training.losses import Loss


def balance_loss(
    loss: Loss,
    *,
    method: str,
    class_counts: Sequence[int],
    beta: float,
    tau: float,
    device: torch.device,
) -> Loss:
    """``loss`` with a method applied: ``class_weights``, ``effective_number``,
    ``logit_adjustment``; with any other, as it is.
    """
    counts = torch.tensor(class_counts, dtype=torch.float64)
    if method == "class_weights":
        return _weighted(loss, inverse_frequency(counts).to(device, torch.float32))
    if method == "effective_number":
        return _weighted(loss, effective_number(counts, beta=beta).to(device, torch.float32))
    if method == "logit_adjustment":
        return _adjusted(loss, tau * log_prior(counts).to(device, torch.float32))
    return loss


def inverse_frequency(counts: Tensor) -> Tensor:
    """(K,) weights 1 / n, scaled to a mean of 1 over the samples; all classes then sum to the same.

    A class without samples weighs what one with a single sample does.
    """
    return _normalised(1 / counts.clamp(min=1), counts)


def effective_number(counts: Tensor, *, beta: float) -> Tensor:
    """(K,) weights (1 - beta) / (1 - beta^n), scaled to a mean of 1 over the samples.

    Between none (beta 0) and inverse frequency (beta near 1): Cui et al. 2019, arXiv:1901.05555.
    """
    return _normalised((1 - beta) / (1 - beta ** counts.clamp(min=1)), counts)


def _normalised(weights: Tensor, counts: Tensor) -> Tensor:
    return weights * counts.sum() / (weights * counts).sum()


def log_prior(counts: Tensor) -> Tensor:
    """(K,) log of each class's share of the samples; an empty class is taken to have one."""
    counts = counts.clamp(min=1)
    return torch.log(counts / counts.sum())


def _weighted(loss: Loss, weights: Tensor) -> Loss:
    """Each sample's loss times its class's weight.

    A mixed sample's is the mixture of what its classes alone would cost, as torch's weighted
    cross-entropy has it: exact for losses that are linear in the target, which all are but mse.
    """

    def weighted(logits: Tensor, target: Tensor) -> Tensor:
        if target.ndim == 1:
            return weights[target] * loss(logits, target)
        share = target * weights  # (B, K)
        weight = share.sum(dim=1, keepdim=True)
        return weight[:, 0] * loss(logits, share / weight)

    return weighted


def _adjusted(loss: Loss, offset: Tensor) -> Loss:
    """The loss of logits + offset: Menon et al. 2020, arXiv:2007.07314, equation 10."""

    def adjusted(logits: Tensor, target: Tensor) -> Tensor:
        return loss(logits.float() + offset, target)

    return adjusted
