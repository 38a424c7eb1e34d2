"""No system at all: one process a core that decodes, or decodes and resizes, and keeps nothing.

The limits of the machine: libjpeg-turbo alone, and with the resizing of uint8 pixels that every
pipeline needs at the least.
"""

from __future__ import annotations

import argparse
import multiprocessing
from pathlib import Path

import simplejpeg
import torch
from torchvision.transforms.v2 import functional as F

from benchmarks.peers.task import BATCH_SIZE, Task, mark


def decode_and_fit(data: bytes) -> None:
    """Short side to 256, antialiased, then the central 224 x 224 pixels."""
    pixels = torch.from_numpy(simplejpeg.decode_jpeg(data))  # (H, W, 3)
    resized = F.resize(pixels.permute(2, 0, 1), [256], antialias=True)
    F.center_crop(resized, [224, 224]).contiguous()


def work_through(task: Task, work: str, urls: list[str]) -> None:
    """One process's share."""
    torch.set_num_threads(1)
    step = decode_and_fit if work == "fused" else simplejpeg.decode_jpeg
    for start in range(0, len(urls), BATCH_SIZE):
        batch = urls[start : start + BATCH_SIZE]
        for url in batch:
            step(Path(url).read_bytes())
        mark(task.marks, len(batch))


def main() -> None:
    """Work through the task's images; nothing is labelled or written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", choices=["fused", "decode"], required=True)
    parser.add_argument("--processes", type=int, required=True)
    task, options = Task.parse(parser)
    urls, count = task.urls(), options.processes
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=work_through, args=(task, options.work, urls[first::count]))
        for first in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
