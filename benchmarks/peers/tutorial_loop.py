"""The tutorial's program in plain PyTorch: everything in memory, no loader, channels-last."""

from __future__ import annotations

import argparse
import json
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from benchmarks.peers.fashion_mnist import read_split


def build_network(size: int = 28) -> nn.Module:
    """Conv32, pool, Conv64, pool, Dense64, Dense10, for grey images of so many pixels."""
    side = ((size - 2) // 2 - 2) // 2
    return nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * side * side, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def train_epoch(
    network: nn.Module, optimizer: optim.Optimizer, images: Tensor, labels: Tensor, *, batch: int
) -> None:
    """One pass over (N, 1, 28, 28) images and their labels (N,), in a new order."""
    order = torch.randperm(len(images), device=images.device)
    for index in order.split(batch):
        pixels = images[index].contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(network(pixels), labels[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def main() -> None:
    """Train; print samples a second of each epoch, seconds of all, and the test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    for name in ("images", "batch", "epochs", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--fused", action="store_true")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    train, test = (_load(options, split) for split in ("train", "t10k"))
    images, labels = (tensor[: options.images] for tensor in train)
    network = build_network().to(options.device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.001, fused=options.fused)
    rates, started = [], time.perf_counter()
    for _ in range(options.epochs):
        epoch_started = time.perf_counter()
        train_epoch(network, optimizer, images, labels, batch=options.batch)
        if options.device == "cuda":
            torch.cuda.synchronize()
        rates.append(len(images) / (time.perf_counter() - epoch_started))
    seconds = time.perf_counter() - started
    with torch.inference_mode():
        batches = zip(*(tensor.split(1000) for tensor in test), strict=True)
        right = sum((network(x).argmax(dim=1) == y).sum().item() for x, y in batches)
    result = {"samples_per_second": rates, "epochs_seconds": seconds}
    print(json.dumps(result | {"test_accuracy": right / len(test[1])}))


def _load(options: argparse.Namespace, split: str) -> tuple[Tensor, Tensor]:
    """(N, 1, 28, 28) float in [0, 1] and (N,) int64."""
    pixels, labels = read_split(options.data, split)
    images = torch.from_numpy(pixels.copy()).unsqueeze(1).to(options.device).float() / 255
    return images, torch.from_numpy(labels.astype("int64")).to(options.device)


if __name__ == "__main__":
    main()
