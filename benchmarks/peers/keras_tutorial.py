"""The tutorial's program in Keras: ``fit`` on arrays in memory."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import keras
from keras import layers

from benchmarks.peers.fashion_mnist import read_split


class EpochTimes(keras.callbacks.Callback):
    """The seconds of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.started = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def main() -> None:
    """Train; print samples a second of each epoch, seconds of all, and the test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    for name in ("images", "batch", "epochs"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    images, labels = (values[: options.images] for values in read_split(options.data, "train"))
    test_images, test_labels = read_split(options.data, "t10k")
    model = keras.Sequential(
        [
            layers.Input((28, 28, 1)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile("adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    times = EpochTimes()
    started = time.perf_counter()
    model.fit(
        images[..., None] / 255.0,
        labels,
        batch_size=options.batch,
        epochs=options.epochs,
        callbacks=[times],
        verbose=0,
    )
    seconds = time.perf_counter() - started
    _, accuracy = model.evaluate(test_images[..., None] / 255.0, test_labels, verbose=0)
    rates = [len(images) / epoch_seconds for epoch_seconds in times.seconds]
    result = {"samples_per_second": rates, "epochs_seconds": seconds}
    print(json.dumps(result | {"test_accuracy": float(accuracy)}))


if __name__ == "__main__":
    main()
