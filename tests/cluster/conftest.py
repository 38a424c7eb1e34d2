"""One Ray for all tests here, and images whose colour is their class: an oracle for every job."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cnnray.config import ClassifySettings, EvaluateSettings, PackSettings, TrainSettings

COLOURS = {"blue": (40, 60, 200), "green": (40, 190, 60), "red": (210, 40, 50)}
ROOT = Path(__file__).parents[2]
POISON = ROOT / "tests/images/poison"
"""With this folder on PYTHONPATH, images may harm their decoder."""
CLUSTER = {"stall_seconds": 120.0, "progress_seconds": 2.0}

HOSTILE = {
    "empty": (b"", "empty"),
    "text": (b"hello, I am no image", "not_image"),
    "script": (
        b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        "format_not_allowed",
    ),
    "huge": (
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x01\x00\x00\x00\x01\x00\x00\x08\x02\x00\x00\x00"
        b"\x91v\xb0\xfb",
        "too_large",
    ),
}
"""File contents that are not images, and the code that each one gets."""


def paint(colour: str, number: int, *, side: int = 12, format: str = "PNG") -> bytes:
    """A small image of a noisy colour; the same number gives the same bytes."""
    noise = np.random.default_rng((sorted(COLOURS).index(colour), number))
    pixels = np.array(COLOURS[colour]) + noise.integers(-30, 31, (side, side, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, format)
    return buffer.getvalue()


def write_photos(folder: Path, count: int, *, first: int = 0) -> None:
    """``count`` images of each colour, one folder for each; PNG and JPEG in turn."""
    for colour in COLOURS:
        (folder / colour).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            kind = ("PNG", "JPEG")[number % 2]
            path = folder / colour / f"{number:04d}.{kind.lower()}"
            path.write_bytes(paint(colour, number, format=kind))


def write_hostile(folder: Path) -> dict[str, str]:
    """Every hostile file and a truncated image; the code expected of each, by file name."""
    folder.mkdir(parents=True, exist_ok=True)
    codes = {}
    for name, (data, code) in HOSTILE.items():
        (folder / f"{name}.jpg").write_bytes(data)
        codes[f"{name}.jpg"] = code
    (folder / "truncated.jpg").write_bytes(paint("red", 7, side=32, format="JPEG")[:-300])
    return codes | {"truncated.jpg": "truncated"}


def write_poison(folder: Path) -> dict[str, str]:
    """An image of each kind that harms its decoder; the code expected of each, by file name."""
    folder.mkdir(parents=True, exist_ok=True)
    codes = {"abort": "decoder_crash", "spin": "decoder_timeout", "bloat": "decoder_oom"}
    for action in codes:
        poison = f"cnnray-poison:{action};".encode()  # see tests/images/poison
        (folder / f"{action}.png").write_bytes(paint("red", 9) + poison)
    return {f"{action}.png": code for action, code in codes.items()}


@pytest.fixture(scope="session")
def ray_session(seaweed: Any) -> Iterator[None]:
    """The Ray of all tests; its workers see the S3 server, because it was started first."""
    import ray

    # No token is left in the home folder; workers are not starved on a busy machine.
    values = {
        "PYTHONPATH": f"{POISON}{os.pathsep}{ROOT}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_worker_niceness": "0",
    }
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=300_000_000,
        log_to_driver=False,
    )
    yield
    ray.shutdown()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 3 x 110 images."""
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, 110)
    return folder


@pytest.fixture(scope="session")
def pack_settings() -> Callable[..., PackSettings]:
    """Settings with the tests' defaults."""

    def build(**changes: Any) -> PackSettings:
        values = {"cluster": CLUSTER, "split": {"val": 0.15, "test": 0.15}}
        return PackSettings(**{**values, **changes})

    return build


@pytest.fixture(scope="session")
def train_settings() -> Callable[..., TrainSettings]:
    """Three epochs of SGD with flips alone: exact enough to compare runs."""

    def build(**changes: Any) -> TrainSettings:
        values: dict[str, Any] = {
            "cluster": CLUSTER,
            "epochs": 3,
            "augment": {"flip": 0.5},
            "optimizer": {"name": "sgd", "lr": 0.02},
            "seed": 7,
        }
        return TrainSettings(**{**values, **changes})

    return build


@pytest.fixture(scope="session")
def dataset(
    ray_session: None,
    photos: Path,
    pack_settings: Callable[..., PackSettings],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """``photos``, packed."""
    from cnnray.cluster.pack.job import pack

    output = tmp_path_factory.mktemp("packed") / "dataset"
    pack(pack_settings(input=str(photos), output=str(output)))
    return output


class Run:
    """A finished training run: its result, its bundle folder, its order log."""

    def __init__(self, result: dict[str, Any], folder: Path, order_log: Path) -> None:
        self.result = result
        self.folder = folder
        self.order_log = order_log

    @property
    def history(self) -> list[dict[str, Any]]:
        """The epochs that the bundle remembers."""
        from cnnray.models.bundle import read_bundle_spec
        from cnnray.storage import open_store

        return list(read_bundle_spec(open_store(str(self.folder))).provenance["history"])

    def batches(self, epoch: int) -> list[set[str]]:
        """The keys of each global batch of an epoch."""
        rows = pq.read_table(self.order_log / f"epoch-{epoch:05d}").to_pylist()
        batches: list[set[str]] = [set() for _ in range(1 + max(row["step"] for row in rows))]
        for row in rows:
            assert row["epoch"] == epoch
            assert row["key"] not in batches[row["step"]]
            batches[row["step"]].add(row["key"])
        return batches


@pytest.fixture(scope="session")
def run_training(
    ray_session: None,
    dataset: Path,
    train_settings: Callable[..., TrainSettings],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Run]:
    """Train on the dataset, with an order log."""
    from cnnray.cluster.train.job import train

    def run(**changes: Any) -> Run:
        folder = tmp_path_factory.mktemp("run")
        places = {
            "data": str(dataset),
            "output": str(folder / "model"),
            "order_log": str(folder / "order"),
        }
        settings = train_settings(**{**places, **changes})
        return Run(train(settings), Path(settings.output), Path(settings.order_log))

    return run


@pytest.fixture(scope="session")
def trained(run_training: Callable[..., Run]) -> Run:
    """Three epochs on one worker: the run that others are compared with."""
    return run_training()


@pytest.fixture
def evaluate_settings(
    dataset: Path, trained: Run, tmp_path: Path
) -> Callable[..., EvaluateSettings]:
    """Evaluation of the trained model on the training split, which has several row groups."""

    def build(**changes: Any) -> EvaluateSettings:
        values: dict[str, Any] = {
            "cluster": CLUSTER,
            "model": str(trained.folder),
            "data": str(dataset),
            "output": str(tmp_path / "evaluation"),
            "split": "train",
            "batch_size": 50,
        }
        return EvaluateSettings(**{**values, **changes})

    return build


@pytest.fixture
def classify_settings(trained: Run, tmp_path: Path) -> Callable[..., ClassifySettings]:
    """Labelling with the trained model, in many small parts and chunks."""

    def build(**changes: Any) -> ClassifySettings:
        values: dict[str, Any] = {
            "cluster": CLUSTER,
            "model": str(trained.folder),
            "output": str(tmp_path / "labels"),
            "part_rows": 50,
            "chunk_rows": 16,
            "batch_size": 16,
            "scaling": {"num_workers": 1},
        }
        return ClassifySettings(**{**values, **changes})

    return build


@pytest.fixture(scope="session")
def painter() -> Any:
    """The functions that make images."""

    class Painter:
        colours = tuple(COLOURS)
        image = staticmethod(paint)
        photos = staticmethod(write_photos)
        hostile = staticmethod(write_hostile)
        poison = staticmethod(write_poison)

    return Painter
