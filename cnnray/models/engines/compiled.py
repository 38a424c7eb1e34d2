"""torch.compile: on a GPU, where kernels are fused; needs a C++ compiler on every machine."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cnnray.models.classifier import Classifier
from cnnray.models.engines.base import EagerEngine


class CompiledEngine:
    """The eager engine, compiled at its first call for batches of one size.

    A smaller batch is filled up with black images: every other size would be compiled again, and
    that takes a minute.
    """

    def __init__(
        self,
        model: Classifier,
        *,
        device: torch.device,
        embeddings: bool,
        precision: str,
        batch_size: int,
    ) -> None:
        self.eager = EagerEngine(model, device=device, embeddings=embeddings, precision=precision)
        self.eager.network = torch.compile(self.eager.network, dynamic=False)
        self.embeddings = embeddings
        self.batch_size = batch_size

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        rows = len(images)
        missing = max(0, self.batch_size - rows)
        logits, features = self.eager(functional.pad(images, (0, 0) * 3 + (0, missing)))
        return logits[:rows], None if features is None else features[:rows]
