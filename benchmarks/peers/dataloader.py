"""The hand-written loop: a PyTorch ``DataLoader`` and a network.

``--decoder pil`` is what PyTorch's tutorials write: PIL, ``weights.transforms()``. ``torchvision``
is the best that is commonly written: ``decode_jpeg``, resizing in uint8, normalisation of a whole
batch. ``--workers 0`` decodes in the process of the network.
"""

from __future__ import annotations

import argparse
import io
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.models import ResNet18_Weights
from torchvision.transforms import v2

from benchmarks.peers.network import LABELS, load_network, normalize
from benchmarks.peers.task import BATCH_SIZE, Task, mark

GET_THREADS = 16
"""Objects of a batch that a worker gets from S3 at a time."""


class PilImages(Dataset[Tensor]):
    """(3, 224, 224) float, normalised."""

    def __init__(self, urls: list[str]) -> None:
        self.urls = urls
        self.transform = ResNet18_Weights.DEFAULT.transforms()

    def __len__(self) -> int:
        return len(self.urls)

    def __getitem__(self, index: int) -> Tensor:
        image = Image.open(io.BytesIO(read(self.urls[index]))).convert("RGB")
        return self.transform(image)


class TorchvisionImages(Dataset[Tensor]):
    """(3, 224, 224) uint8. A batch is fetched at once, which only matters to S3."""

    def __init__(self, urls: list[str]) -> None:
        self.urls = urls
        self.fit = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])

    def __len__(self) -> int:
        return len(self.urls)

    def __getitem__(self, index: int) -> Tensor:
        return self._decode(read(self.urls[index]))

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        urls = [self.urls[index] for index in indices]
        if urls[0].startswith("s3://"):
            return [self._decode(data) for data in self._threads.map(read, urls)]
        return [self._decode(read(url)) for url in urls]

    def _decode(self, data: bytes) -> Tensor:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return self.fit(decode_jpeg(encoded, mode=ImageReadMode.RGB))

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(GET_THREADS)


_clients: dict[int, Any] = {}


def read(url: str) -> bytes:
    """The bytes of a file or of an object, with one S3 client in each process."""
    if not url.startswith("s3://"):
        with open(url, "rb") as file:
            return file.read()
    if os.getpid() not in _clients:
        import boto3
        from botocore.config import Config

        config = Config(max_pool_connections=GET_THREADS)
        _clients[os.getpid()] = boto3.client("s3", config=config)
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return _clients[os.getpid()].get_object(Bucket=bucket, Key=key)["Body"].read()


def main() -> None:
    """Label the task's images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decoder", choices=["pil", "torchvision"], required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--channels_last", action="store_true")
    task, options = Task.parse(parser)
    urls = task.urls()
    on_gpu = task.device == "cuda"
    network = load_network(task.network, task.weights).to(task.device)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    network = network.to(memory_format=layout)
    loader = DataLoader(
        PilImages(urls) if options.decoder == "pil" else TorchvisionImages(urls),
        batch_size=BATCH_SIZE,
        num_workers=options.workers,
        pin_memory=on_gpu,
    )
    labels: list[str] = []
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
        for batch in loader:
            images = batch.to(task.device, non_blocking=True)
            images = images if images.is_floating_point() else normalize(images)
            logits = network(images.contiguous(memory_format=layout))
            labels += [LABELS[index] for index in logits.argmax(dim=1).tolist()]
            mark(task.marks, len(batch))
    task.write(urls, labels)


if __name__ == "__main__":
    main()
