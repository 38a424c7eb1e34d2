"""The network alone, on one batch again and again: the limit of a compute-bound run.

Channels-last; on a GPU in bfloat16 and compiled.
"""

from __future__ import annotations

import argparse

import pyarrow.parquet as pq
import torch

from benchmarks.peers.network import load_network, normalize
from benchmarks.peers.task import BATCH_SIZE, Task, mark


def main() -> None:
    """Infer as many images as the task's table has rows."""
    task, _ = Task.parse(argparse.ArgumentParser(description=__doc__))
    on_gpu = task.device == "cuda"
    network = load_network(task.network, task.weights).to(task.device)
    network = network.to(memory_format=torch.channels_last)
    if on_gpu:
        network.compile()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (BATCH_SIZE, 3, 224, 224), dtype=torch.uint8, generator=generator)
    pixels = pixels.to(task.device).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
        for _ in range(0, pq.read_metadata(task.table).num_rows, BATCH_SIZE):
            network(normalize(pixels)).argmax(dim=1).cpu()
            mark(task.marks, BATCH_SIZE)


if __name__ == "__main__":
    main()
