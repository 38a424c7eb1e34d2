"""Ray Data, as in the image classification of Ray's own release benchmarks.

Source: release/nightly_tests/multimodal_inference_benchmarks/image_classification/ray_data_main.py
of ray-project/ray, the branch for Ray 2.50 and later. On a CPU the model reserves no CPU, as the
one on a GPU does not there, so that reading and decoding may use every core.
"""

from __future__ import annotations

import argparse
import io
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image
from ray.data.expressions import download
from torchvision import transforms
from torchvision.models import ResNet18_Weights

from benchmarks.peers.network import LABELS, load_network
from benchmarks.peers.task import BATCH_SIZE, Task, mark

Row = dict[str, Any]

transform = transforms.Compose([transforms.ToTensor(), ResNet18_Weights.DEFAULT.transforms()])


def deserialize_image(row: Row) -> Row:
    """Encoded bytes → RGB pixels."""
    row["image"] = np.array(Image.open(io.BytesIO(row.pop("bytes"))).convert("RGB"))
    return row


def transform_image(row: Row) -> Row:
    """Pixels → the network's input."""
    row["norm_image"] = transform(row.pop("image")).numpy()
    return row


class NetworkActor:
    """Holds the network; labels batches."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.device = torch.device(task.device)
        self.network = load_network(task.network, task.weights).to(self.device)

    def __call__(self, batch: Row) -> Row:
        """Replace the input by the label."""
        images = torch.from_numpy(batch.pop("norm_image")).to(self.device)
        with torch.inference_mode():
            classes = self.network(images).argmax(dim=1).cpu()
        batch["label"] = [LABELS[index] for index in classes]
        mark(self.task.marks, len(classes))
        return batch


@ray.remote
def warm_up() -> None:
    """A task that does nothing."""


def main() -> None:
    """Label the task's images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=1)
    task, options = Task.parse(parser)
    ray.init(include_dashboard=False)
    ray.get([warm_up.remote() for _ in range(64)])
    resources = {"num_gpus": 1.0} if task.device == "cuda" else {"num_cpus": 0}
    (
        ray.data.read_parquet(task.table)
        .with_column("bytes", download("url"))
        .map(fn=deserialize_image)
        .map(fn=transform_image)
        .map_batches(
            fn=NetworkActor,
            fn_constructor_args=(task,),
            batch_size=BATCH_SIZE,
            concurrency=options.replicas,
            **resources,
        )
        .select_columns(["url", "label"])
        .write_parquet(task.output)
    )


if __name__ == "__main__":
    main()
