"""Evaluation: every row once on any number of actors, and a report that is one file."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import cnnray.cluster.evaluate.job as evaluate_module
from cnnray.cluster.evaluate.job import evaluate
from cnnray.cluster.pack.job import pack
from cnnray.errors import DataError, SettingsError, TooManyBadImagesError, UsageError

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


def with_images(dataset: Path, copy: Path, change: Callable[[int, str, bytes], bytes]) -> list[str]:
    """A copy of a dataset with other images in its test split, by number and key; the PNGs' keys.

    (Only they are decoded by what the tests can poison.)
    """
    shutil.copytree(dataset, copy)
    keys: list[str] = []
    for shard in sorted((copy / "test").glob("*.parquet")):
        file = pq.ParquetFile(shard)
        group_rows = file.metadata.row_group(0).num_rows
        rows = file.read().to_pylist()
        for row in rows:
            if row["key"].endswith(".png"):
                row["image"] = change(len(keys), row["key"], row["image"])
                keys.append(row["key"])
        changed = pa.Table.from_pylist(rows, file.schema_arrow)
        pq.write_table(changed, shard, row_group_size=group_rows)
    return keys


def test_images_that_crash_hang_or_exhaust_their_decoder_are_errors_and_the_rest_is_evaluated(
    evaluate_settings, dataset, tmp_path
):
    actions = {3: "abort", 9: "spin", 14: "bloat"}

    def poison(number: int, key: str, image: bytes) -> bytes:
        return image + f"cnnray-poison:{actions[number]};".encode() if number in actions else image

    keys = with_images(dataset, tmp_path / "poisoned", poison)
    result = evaluate(
        evaluate_settings(data=str(tmp_path / "poisoned"), split="test", decode_seconds=1)
    )
    metrics = json.loads((tmp_path / "evaluation/metrics.json").read_text())
    assert {row["key"]: row["error_code"] for row in metrics["errors"]} == {
        keys[3]: "decoder_crash",
        keys[9]: "decoder_timeout",
        keys[14]: "decoder_oom",
    }
    predictions = pq.read_table(tmp_path / "evaluation/predictions.parquet")
    assert {keys[3], keys[9], keys[14]}.isdisjoint(predictions["key"].to_pylist())
    assert set(keys) - {keys[3], keys[9], keys[14]} <= set(predictions["key"].to_pylist())
    assert (result["errors"], result["samples"]) == (3, predictions.num_rows)
    assert "decoder_timeout 1" in metrics["facts"]["left out"]
    assert result["seconds"] < 90


def test_more_bad_images_than_the_budget_end_with_the_key_of_one_and_the_rest_evaluated(
    evaluate_settings, dataset, tmp_path
):
    keys = with_images(
        dataset, tmp_path / "bad", lambda number, key, image: image[:-30] if number == 5 else image
    )
    budget = {"min_rows": 0, "max_fraction": 0.0}
    with pytest.raises(TooManyBadImagesError, match=re.escape(keys[5])) as caught:
        evaluate(evaluate_settings(data=str(tmp_path / "bad"), split="test", budget=budget))
    assert caught.value.exit_code == 3
    assert caught.value.result["errors"] == 1
    [error] = json.loads((tmp_path / "evaluation/metrics.json").read_text())["errors"]
    assert (error["key"], error["error_code"]) == (keys[5], "truncated")


def test_another_engine_in_another_placement_evaluates_as_eager_does(evaluate_settings, tmp_path):
    evaluate(evaluate_settings())
    eager = pq.read_table(tmp_path / "evaluation/predictions.parquet")
    result = evaluate(
        evaluate_settings(
            overwrite=True,
            placement="split",
            chunk_rows=40,
            scaling={"num_workers": 1},
            engine={"precision": "bf16", "sample": 60},
        )
    )
    assert (result["engine"], result["agreement"]) == ("eager bf16", 1.0)
    found = pq.read_table(tmp_path / "evaluation/predictions.parquet")
    assert found.select(["key", "label", "prediction"]).equals(
        eager.select(["key", "label", "prediction"])
    )
    assert not found["confidence"].equals(eager["confidence"])
    facts = json.loads((tmp_path / "evaluation/metrics.json").read_text())["facts"]
    assert facts["engine"].startswith("eager bf16, 60 of 60 labels")


def test_what_cannot_be_evaluated_is_refused_at_once(evaluate_settings, tmp_path):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation/metrics.json").write_text("{}")
    with pytest.raises(UsageError, match="holds an evaluation already"):
        evaluate(evaluate_settings())
    assert (tmp_path / "evaluation/metrics.json").read_text() == "{}"
    for changes, said in (
        ({"scaling": {"num_workers": 3}}, "3 workers of 1 CPU do not fit"),
        (
            {"placement": "fused", "scaling": {"use_gpu": True, "num_workers": 1}},
            "1 CPU and 1 GPU do not fit",
        ),
        ({"scaling": {"use_gpu": True, "num_workers": 1}}, "1 GPU do not fit"),
        ({"tta": "crops"}, "larger than the model's 12 px"),
    ):
        with pytest.raises(SettingsError, match=said):
            evaluate(evaluate_settings(**changes, overwrite=True))
    with pytest.raises(UsageError, match="no bundle at"):
        evaluate(evaluate_settings(model=str(tmp_path)))
    with pytest.raises(DataError, match="no dataset at"):
        evaluate(evaluate_settings(data=str(tmp_path)))
