"""A toy problem: dark images and light ones, and a network small enough to see through."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from cnnray.datasets.order import Batch
from cnnray.training.loop import Trainer
from cnnray.training.losses import cross_entropy
from cnnray.training.optimizers import build_optimizer


class Toy(nn.Module):
    """(B, 1, 4, 4) uint8 to (B, 2) logits, with dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.hidden(images.float().flatten(1) / 255)))
        return self.head(self.dropout(x))


def _make_trainer(*, optimizer: str = "adam", lr: float = 0.01, dropout: float = 0.0) -> Trainer:
    torch.manual_seed(0)
    model = Toy(dropout)
    return Trainer(
        model=model,
        optimizer=build_optimizer(model, name=optimizer, lr=lr),
        loss=cross_entropy,
        learning_rate=lambda step: lr,
        device=torch.device("cpu"),
    )


def _make_batch(size: int, *, seed: int) -> Batch:
    generator = np.random.default_rng(seed)
    label = generator.integers(0, 2, size)
    low = np.where(label, 140, 0)[:, None, None, None]
    image = (low + generator.integers(0, 110, (size, 1, 4, 4))).astype(np.uint8)
    return Batch(image=image, label=label, key=np.array([f"{seed}/{n}" for n in range(size)]))


@pytest.fixture
def make_trainer() -> Callable[..., Trainer]:
    """The same toy each time."""
    return _make_trainer


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """``size`` images: label 0 is dark, label 1 is light."""
    return _make_batch
