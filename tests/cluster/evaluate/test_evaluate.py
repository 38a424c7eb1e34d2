"""Evaluation: every row once on any number of actors, and a report that is one file."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import cnnray.cluster.evaluate.job as evaluate_module
from cnnray.cluster.evaluate.job import evaluate
from cnnray.cluster.pack.job import pack
from cnnray.errors import DataError, SettingsError, UsageError

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("ray_session"),
]


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_every_row_is_evaluated_once_and_the_metrics_are_those_of_the_rows(
    num_workers, evaluate_settings, dataset, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluate_module, "UNIT_ROWS", 37)  # does not divide a row group
    scaling = {"num_workers": num_workers, "cpus_per_worker": 2 / num_workers - 0.01}
    if num_workers == 1:
        scaling["cpus_per_worker"] = 1
    result = evaluate(evaluate_settings(scaling=scaling))
    keys = pq.read_table(dataset / "train", columns=["key"])["key"].to_pylist()
    rows = pq.read_table(tmp_path / "evaluation/predictions.parquet").to_pylist()
    assert [row["key"] for row in rows] == sorted(keys)
    classes = json.loads((dataset / "manifest.json").read_text())["classes"]
    assert all(classes[row["label"]] == row["key"].split("/")[0] for row in rows)
    correct = sum(row["label"] == row["prediction"] for row in rows)
    assert result["accuracy"] == correct / len(rows) == 1.0
    assert result["samples"] == len(rows)
    metrics = json.loads((tmp_path / "evaluation/metrics.json").read_text())
    assert metrics["accuracy"] == result["accuracy"]
    report = Path(result["report"]).read_text()
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?\s*(https?:)?//""", report)
    assert "<script" not in report


def test_an_average_over_views_is_named_among_the_facts(evaluate_settings, tmp_path):
    evaluate(evaluate_settings())
    plain = pq.read_table(tmp_path / "evaluation/predictions.parquet")
    assert "test-time" not in (tmp_path / "evaluation/metrics.json").read_text()
    evaluate(evaluate_settings(tta="flips", overwrite=True))
    views = pq.read_table(tmp_path / "evaluation/predictions.parquet")
    facts = json.loads((tmp_path / "evaluation/metrics.json").read_text())["facts"]
    assert "mirror image" in facts["test-time augmentation"]
    assert views["key"].equals(plain["key"])
    assert not views["confidence"].equals(plain["confidence"])


def test_another_models_classes_are_refused(
    painter, pack_settings, evaluate_settings, tmp_path, trained
):
    painter.photos(tmp_path / "photos", 10)
    (tmp_path / "photos/red").rename(tmp_path / "photos/rouge")
    pack(pack_settings(input=str(tmp_path / "photos"), output=str(tmp_path / "other")))
    with pytest.raises(DataError, match="differing in red, rouge"):
        evaluate(evaluate_settings(data=str(tmp_path / "other")))
    assert not (tmp_path / "evaluation").exists()


def test_a_wrong_row_in_the_report_is_shown_with_its_image(
    painter, pack_settings, evaluate_settings, tmp_path
):
    painter.photos(tmp_path / "photos", 10)
    (tmp_path / "photos/red/9999.png").write_bytes(painter.image("blue", 77))
    pack(
        pack_settings(
            input=str(tmp_path / "photos"),
            output=str(tmp_path / "other"),
            split={"val": 0.0, "test": 0.0},
        )
    )
    result = evaluate(evaluate_settings(data=str(tmp_path / "other")))
    assert result["accuracy"] == 30 / 31
    report = Path(result["report"]).read_text()
    assert "red/9999.png" in report
    assert "data:image/png;base64," in report


def test_a_damaged_shard_ends_the_evaluation_with_its_name(evaluate_settings, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "dataset")
    [shard] = sorted((tmp_path / "dataset/test").glob("*.parquet"))
    data = bytearray(shard.read_bytes())
    data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
    shard.write_bytes(data)
    with pytest.raises(DataError, match=f"{shard.name} is damaged") as caught:
        evaluate(evaluate_settings(data=str(tmp_path / "dataset"), split="test"))
    assert len(str(caught.value).splitlines()) == 2
    assert not (tmp_path / "evaluation").exists()


def test_what_cannot_be_evaluated_is_refused_at_once(evaluate_settings, tmp_path):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation/metrics.json").write_text("{}")
    with pytest.raises(UsageError, match="holds an evaluation already"):
        evaluate(evaluate_settings())
    assert (tmp_path / "evaluation/metrics.json").read_text() == "{}"
    for changes, said in (
        ({"scaling": {"num_workers": 3}}, "3 workers of 1 CPU do not fit"),
        ({"scaling": {"use_gpu": True, "num_workers": 1}}, "1 CPU and 1 GPU do not fit"),
        ({"tta": "crops"}, "larger than the model's 12 px"),
    ):
        with pytest.raises(SettingsError, match=said):
            evaluate(evaluate_settings(**changes, overwrite=True))
    with pytest.raises(UsageError, match="no bundle at"):
        evaluate(evaluate_settings(model=str(tmp_path)))
    with pytest.raises(DataError, match="no dataset at"):
        evaluate(evaluate_settings(data=str(tmp_path)))
