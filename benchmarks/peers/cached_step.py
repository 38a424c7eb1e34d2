"""The training step alone: one batch that is in memory, again and again, on one or more processes.

Forward, loss, backward and update of a torchvision network on uint8 images, channels-last; with
more than one process under ``DistributedDataParallel``, each with its share of the batch.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peers.network import normalize

WARM_UP_STEPS = 3


def train(rank: int, options: argparse.Namespace, rendezvous: str) -> None:
    """One rank; rank 0 prints the samples a second of all."""
    torch.manual_seed(rank)
    torch.set_num_threads(options.threads)
    device = torch.device(f"cuda:{rank}" if options.device == "cuda" else "cpu")
    network: nn.Module = torchvision.models.get_model(
        options.network, weights=None, num_classes=options.classes
    )
    network = network.to(device).to(memory_format=torch.channels_last)
    if options.workers > 1:
        torch.distributed.init_process_group(
            "nccl" if options.device == "cuda" else "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=options.workers,
        )
        network = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    share = options.batch // options.workers
    images = torch.randint(256, (share, 3, options.size, options.size), dtype=torch.uint8)
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(options.classes, (share,)).to(device)

    def step() -> Tensor:
        loss = F.cross_entropy(network(normalize(images)), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(WARM_UP_STEPS):
        step().item()  # waits for a GPU
    started = time.perf_counter()
    for _ in range(options.steps):
        loss = step()
    loss.item()
    seconds = time.perf_counter() - started
    if rank == 0:
        rate = options.steps * share * options.workers / seconds
        print(json.dumps({"samples_per_second": [rate], "epochs_seconds": seconds}), flush=True)
    if options.workers > 1:
        torch.distributed.destroy_process_group()


def main() -> None:
    """Train; print samples a second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet18")
    for name in ("classes", "size", "batch", "steps", "workers", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = str(Path(folder) / "rendezvous")
        if options.workers == 1:
            train(0, options, rendezvous)
        else:
            spawn(train, args=(options, rendezvous), nprocs=options.workers)


if __name__ == "__main__":
    main()
