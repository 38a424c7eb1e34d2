"""What the workers of an evaluation answer, without Ray: good rows and bad ones."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cnnray.cluster.evaluate.actors import (
    EvaluationPredictor,
    ShardImages,
    split_answers,
)
from cnnray.errors import DataError
from cnnray.evaluation.metrics import predictions_from_logits
from cnnray.evaluation.views import mean_logits, plan_views
from cnnray.images.transforms import EvalTransform, Preprocessing
from cnnray.labeling.decoding import Sample, SampleDecoder
from cnnray.labeling.labeler import Labeler, with_columns
from cnnray.models.bundle import BundleSpec
from cnnray.schema import PREDICTIONS_SCHEMA
from cnnray.storage import open_store

PREPROCESSING = Preprocessing(3, 8, 11, "bilinear", (0.5,) * 3, (0.25,) * 3)
SPEC = BundleSpec("toy", {}, ("a", "b", "c"), PREPROCESSING, temperature=1.5)


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (15, 20, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class Linear:
    """An engine of one layer."""

    embeddings = False

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3 * 8 * 8, 3)

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.layer(images.float().flatten(1) / 255), None


def predictor(tta: str) -> EvaluationPredictor:
    return EvaluationPredictor(
        Linear(), SPEC, fitted=plan_views(tta, PREPROCESSING), tta=tta, batch_size=2
    )


@pytest.mark.parametrize("tta", ["none", "flips", "crops"])
def test_predictions_are_those_of_the_mean_over_the_views(tta: str) -> None:
    files = [png(n) for n in range(5)]
    labels = torch.tensor([0, 1, 2, 0, 1])
    fitted = plan_views(tta, PREPROCESSING)
    batch = torch.from_numpy(np.stack([EvalTransform(fitted)(data) for data in files]))
    with torch.inference_mode():
        logits = mean_logits(
            lambda view: Linear()(view)[0], batch, tta=tta, size=8, temperature=1.5
        )
    expected = predictions_from_logits(keys=list("vwxyz"), labels=labels, logits=logits)

    labeler = Labeler(SampleDecoder(fitted), predictor(tta))
    samples = [Sample(key, "", data) for key, data in zip("vwxyz", files, strict=True)]
    beside = pa.table({"label": pa.array(labels.tolist(), pa.int32())})
    answers = with_columns(labeler.label(samples, beside), beside, ["label"])
    predictions, errors = split_answers(answers)
    assert errors.num_rows == 0
    assert predictions.schema.equals(PREDICTIONS_SCHEMA)
    for name in ("key", "label", "prediction", "label_rank"):
        assert predictions[name].to_pylist() == expected[name].to_pylist()
    for name in ("confidence", "loss"):
        assert predictions[name].to_numpy() == pytest.approx(expected[name].to_numpy(), rel=1e-5)


def test_bad_images_are_errors_and_the_others_keep_their_labels() -> None:
    files = {"v": png(0), "w": b"", "x": png(1), "y": png(2)[:-40], "z": b"text"}
    beside = pa.table({"label": pa.array([2, 0, 1, 0, 0], pa.int32())})
    labeler = Labeler(SampleDecoder(PREPROCESSING), predictor("none"))
    samples = [Sample(key, "", data) for key, data in files.items()]
    answers = with_columns(labeler.label(samples, beside), beside, ["label"])
    predictions, errors = split_answers(answers)
    assert dict(zip(*predictions.select(["key", "label"]).to_pydict().values(), strict=True)) == {
        "v": 2,
        "x": 1,
    }
    assert {row["key"]: row["error_code"] for row in errors.to_pylist()} == {
        "w": "empty",
        "y": "truncated",
        "z": "not_image",
    }


@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_units_are_read_whole_or_in_chunks(tmp_path: Path, chunk_rows: int | None) -> None:
    rows = {"key": [f"{n}" for n in range(10)], "image": [bytes([n]) for n in range(10)]}
    table = pa.table({**rows, "label": pa.array(range(10), pa.int32())})
    pq.write_table(table, tmp_path / "shard.parquet", row_group_size=8)
    units = pa.Table.from_pylist(
        [
            {"path": "shard.parquet", "row_group": 0, "start": 2, "stop": 7},
            {"path": "shard.parquet", "row_group": 1, "start": 0, "stop": 2},
        ]
    )
    reader = ShardImages(open_store(str(tmp_path)), chunk_rows=chunk_rows)
    chunks = [(rows, list(samples)) for rows, samples in reader.read(units)]
    assert [rows.num_rows for rows, _ in chunks] == ([5, 2] if chunk_rows is None else [3, 2, 2])
    found = [(sample.key, sample.data) for _, samples in chunks for sample in samples]
    assert found == [(f"{n}", bytes([n])) for n in [2, 3, 4, 5, 6, 8, 9]]
    assert [label for rows, _ in chunks for label in rows["label"].to_pylist()] == [
        *range(2, 7),
        8,
        9,
    ]
    (tmp_path / "shard.parquet").write_bytes(b"no shard")
    with pytest.raises(DataError, match=r"shard\.parquet is damaged"):
        list(reader.read(units))
