"""A toy bundle and images for it; a table of labels on disk, and what a driver does to it."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from cnnray.errors import CnnrayError
from cnnray.images.transforms import Preprocessing
from cnnray.labeling.commit import Run, finish_run, publish_part
from cnnray.labeling.log import read_log
from cnnray.labeling.parts import PublishedPart
from cnnray.labeling.runs import begin_run, claim_table, read_runs
from cnnray.models.bundle import Bundle, BundleSpec, load_bundle, save_bundle
from cnnray.models.classifier import Classifier
from cnnray.models.registry import build_model
from cnnray.schema import LABELS_SCHEMA, PLAN_SCHEMA
from cnnray.storage import Store, open_store

CLASSES = ("cat", "dog", "Ä/猫", "owl")


@pytest.fixture
def classifier() -> Classifier:
    torch.manual_seed(0)
    backbone = build_model("tutorial_cnn", num_classes=4, channels=3, image_size=12)
    return Classifier(backbone, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), head="head").eval()


@pytest.fixture
def make_bundle(classifier: Classifier, tmp_path: Path) -> Callable[..., Bundle]:
    def make(temperature: float = 1.0) -> Bundle:
        spec = BundleSpec(
            architecture="tutorial_cnn",
            arguments={},
            classes=CLASSES,
            preprocessing=Preprocessing(
                channels=3,
                size=12,
                resize=14,
                interpolation="bilinear",
                mean=(0.4, 0.5, 0.6),
                std=(0.2, 0.25, 0.3),
            ),
            temperature=temperature,
        )
        store = open_store(str(tmp_path / f"bundle-{temperature}"))
        save_bundle(store, classifier, spec)
        return load_bundle(store)

    return make


@pytest.fixture
def photo() -> Callable[[int], bytes]:
    """A PNG file of noise, 20 wide and 16 high."""

    def make(seed: int) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 20, 3)).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    return make


# A table of labels


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Where a table of labels will be; nothing is there yet."""
    return open_store(str(tmp_path / "labels"))


@pytest.fixture
def inputs() -> Callable[..., pa.Table]:
    """A listing of images: of some keys, or of pairs of a key and an etag."""

    def make(*names: str | tuple[str, str]) -> pa.Table:
        pairs = [(name, "e") if isinstance(name, str) else name for name in names]
        rows = [
            {"key": key, "path": f"at {n}", "offset": n, "length": -1, "etag": etag}
            for n, (key, etag) in enumerate(pairs)
        ]
        return pa.Table.from_pylist(rows, PLAN_SCHEMA)

    return make


@pytest.fixture
def label_rows() -> Callable[..., pa.Table]:
    """The label rows of some inputs; those whose keys are in ``bad`` could not be labelled."""

    def make(planned: pa.Table, *, label: str = "cat", bad: Sequence[str] = ()) -> pa.Table:
        rows = []
        for key, etag in zip(planned["key"].to_pylist(), planned["etag"].to_pylist(), strict=True):
            answer = (
                {"status": "error", "error_code": "corrupt"}
                if key in bad
                else {"status": "ok", "label": label}
            )
            rows.append({"key": key, "etag": etag, "model": "toy", **answer})
        return pa.Table.from_pylist(rows, LABELS_SCHEMA)

    return make


@pytest.fixture
def begin(store: Store) -> Callable[..., tuple[Run, bool] | None]:
    """Begin a run over a listing, as a job does: parts have 3 rows."""

    def make(listing: pa.Table, **changes: Any) -> tuple[Run, bool] | None:
        options = {"config": {"input": "photos"}, "part_rows": 3, "on_changed": "relabel"}
        claim_table(store, {"model": "toy"})
        return begin_run(store, list_inputs=lambda: [listing], **{**options, **changes})

    return make


@pytest.fixture
def publish(label_rows: Callable[..., pa.Table]) -> Callable[..., dict[int, PublishedPart]]:
    """Label and publish parts of a run, all of them if none are named."""

    def make(
        run: Run, parts: Iterable[int] | None = None, **options: Any
    ) -> dict[int, PublishedPart]:
        published = {}
        for part, planned in run.plan.read_parts(
            range(run.plan.num_parts) if parts is None else parts
        ):
            result = publish_part(run, part, label_rows(planned, **options))
            published |= {part: result} if result else {}
        return published

    return make


@pytest.fixture
def last_run(store: Store) -> Callable[[], Run]:
    """The last run of the log, as a driver sees it that comes now."""
    return lambda: read_runs(store, read_log(store))[-1]


@pytest.fixture
def label_all(
    begin: Callable[..., tuple[Run, bool]],
    publish: Callable[..., dict[int, PublishedPart]],
    last_run: Callable[[], Run],
) -> Callable[..., Run]:
    """Label a listing and commit: the run, as a driver sees it that comes later."""

    def make(listing: pa.Table, *, bad: Sequence[str] = (), **changes: Any) -> Run:
        run, _ = begin(listing, **changes)
        finish_run(run, publish(run, bad=bad))
        return last_run()

    return make


@pytest.fixture
def snapshot(store: Store) -> Callable[[], dict[str, tuple[int, bytes]]]:
    """Every file and folder of the table: when it was written, and what it holds."""

    def make() -> dict[str, tuple[int, bytes]]:
        return {
            str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
            for path in sorted(Path(store.uri).rglob("*"))
        }

    return make


@pytest.fixture
def at_once() -> Callable[..., list[Any]]:
    """What each of several drivers returns, or raises, when they are started together."""

    def make(*drivers: Callable[[], Any]) -> list[Any]:
        start = threading.Barrier(len(drivers))
        results: list[Any] = [None] * len(drivers)

        def drive(number: int) -> None:
            start.wait(timeout=30)
            try:
                results[number] = drivers[number]()
            except CnnrayError as error:
                results[number] = error

        threads = [threading.Thread(target=drive, args=(n,)) for n in range(len(drivers))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
        return results

    return make
