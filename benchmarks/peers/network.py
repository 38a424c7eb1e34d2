"""The same network for every peer, in plain torch, from the weights that cnnray's bundle holds."""

from __future__ import annotations

import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

NUM_CLASSES = 1000
LABELS = [f"class-{number:04d}" for number in range(NUM_CLASSES)]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the transform of torchvision's weights, which all scripts use."""


class PatchMean(nn.Module):
    """A network that costs next to nothing: the mean of linear 32-px patches, then a linear layer.

    forward: normalised float (B, 3, 224, 224) -> logits (B, 1000). It is timm's vision transformer
    without its blocks (``benchmarks.bundles``).
    """

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 16, 32, 32)})
        self.fc_norm = nn.LayerNorm(16, eps=1e-6)
        self.head = nn.Linear(16, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](images).flatten(2)  # (B, 16, 49)
        logits: Tensor = self.head(self.fc_norm(patches.mean(2)))
        return logits


def load_network(name: str, weights: str) -> nn.Module:
    """``tiny`` or a torchvision model in eval mode: normalised float (B, 3, H, W) -> logits."""
    network: nn.Module = (
        PatchMean() if name == "tiny" else torchvision.models.get_model(name, weights=None)
    )
    tensors = safetensors.torch.load_file(weights)
    prefix = "backbone."
    network.load_state_dict(
        {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    )
    return network.eval()


def normalize(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float, as ``weights.transforms()`` does, in one new tensor."""
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1) * 255
    std = torch.tensor(STD, device=images.device).view(3, 1, 1) * 255
    return images.float().sub_(mean).div_(std)
