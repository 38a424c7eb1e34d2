"""Daft, as in the image classification of Daft's own benchmarks.

Source: benchmarking/ai/image_classification/daft_main.py of Eventual-Inc/Daft. On one machine
Daft's documentation recommends its native runner, which is the default.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import daft
import numpy as np
import torch
from torchvision import transforms
from torchvision.models import ResNet18_Weights

from benchmarks.peers.network import LABELS, load_network
from benchmarks.peers.task import BATCH_SIZE, Task, mark

IMAGE_SHAPE = (3, 224, 224)

transform = transforms.Compose([transforms.ToTensor(), ResNet18_Weights.DEFAULT.transforms()])


class Network:
    """Holds the network; labels batches."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.device = torch.device(task.device)
        self.network = load_network(task.network, task.weights).to(self.device)

    @daft.method.batch(return_dtype=daft.DataType.string(), batch_size=BATCH_SIZE)
    def label(self, images: Any) -> list[str]:
        """The label of each image."""
        if len(images) == 0:
            return []
        batch = torch.from_numpy(np.array(images.to_pylist())).to(self.device)
        with torch.inference_mode():
            classes = self.network(batch).argmax(dim=1).cpu()
        mark(self.task.marks, len(classes))
        return [LABELS[index] for index in classes]


def set_up_s3() -> None:
    """Daft's S3 client takes no endpoint from the environment by itself."""
    if "AWS_ENDPOINT_URL" not in os.environ:
        return
    s3 = daft.io.S3Config(
        endpoint_url=os.environ["AWS_ENDPOINT_URL"],
        region_name=os.environ["AWS_REGION"],
        key_id=os.environ["AWS_ACCESS_KEY_ID"],
        access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
    )
    daft.set_planning_config(default_io_config=daft.io.IOConfig(s3=s3))


def main() -> None:
    """Label the task's images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=1)
    task, options = Task.parse(parser)
    set_up_s3()
    gpus = 1 if task.device == "cuda" else 0
    network = daft.cls(Network, max_concurrency=options.replicas, gpus=gpus)(task)
    images = daft.read_parquet(task.table)
    images = images.with_column(
        "decoded_image", images["url"].download().decode_image(mode=daft.ImageMode.RGB)
    )
    images = images.with_column(
        "norm_image",
        images["decoded_image"].apply(
            func=lambda image: transform(image),
            return_dtype=daft.DataType.tensor(dtype=daft.DataType.float32(), shape=IMAGE_SHAPE),
        ),
    )
    images = images.with_column("label", network.label(images["norm_image"]))
    images.select("url", "label").write_parquet(task.output)


if __name__ == "__main__":
    main()
