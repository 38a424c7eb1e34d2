"""Labelling: one row for each image, right, once, and readable by everyone."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import cnnray.cluster.classify.job as classify_module
from cnnray.cluster.classify.job import classify
from cnnray.cluster.inference import stages
from cnnray.cluster.inference.actors import DecodeActor, LabelActor
from cnnray.cluster.verify.job import verify
from cnnray.config import VerifySettings
from cnnray.errors import (
    ConflictError,
    DataError,
    SettingsError,
    TooManyBadImagesError,
    UsageError,
)
from cnnray.models.bundle import load_bundle, save_bundle
from cnnray.storage import open_store

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("ray_session"),
]


def labels_of(output: Path) -> pa.Table:
    files = sorted((output / "data").rglob("*"))
    return pa.concat_tables([pq.ParquetFile(file).read() for file in files if file.is_file()])


def files_of(folder: Path) -> dict[str, int]:
    """Every file and when it was changed."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def folder(painter, tmp_path_factory):
    """3 x 70 good images in a tree of another shape than a class folder each, and hostile files."""
    root = tmp_path_factory.mktemp("folder")
    painter.photos(root / "deep/er", 70, first=500)
    codes = painter.hostile(root)
    return root, codes


def test_a_folder_is_labelled_with_one_row_an_image_and_a_code_for_hostile_files(
    folder, classify_settings, tmp_path
):
    root, codes = folder
    settings = classify_settings(input=str(root), embeddings=True, top_k=2)
    result = classify(settings)
    total = 210 + len(codes)
    assert (result["planned"], result["labeled"], result["errors"]) == (total, 210, len(codes))
    assert result["parts"] == 5
    names = sorted(path.name for path in (tmp_path / "labels/data").rglob("*") if path.is_file())
    assert names == [f"part-{number:05d}-of-00005.parquet" for number in range(5)]
    rows = labels_of(tmp_path / "labels").to_pylist()
    listed = {str(path.relative_to(root)) for path in root.rglob("*.*")}
    assert Counter(row["key"] for row in rows) == Counter(listed)
    for row in rows:
        if row["status"] == "ok":
            assert row["label"] == row["key"].split("/")[2]
            assert row["top_k"][0]["label"] == row["label"]
            assert [len(row["top_k"]), row["width"], row["height"]] == [2, 12, 12]
            assert 0 < row["confidence"] <= 1
            assert len(row["embedding"]) == 64
        else:
            assert row["error_code"] == codes[row["key"]]
            assert row["label"] is row["confidence"] is row["embedding"] is None
    assert len({row["model"] for row in rows}) == 1

    before = files_of(tmp_path / "labels")
    again = classify(settings)
    assert (again["run"], again["planned"]) == (None, 0)
    assert files_of(tmp_path / "labels") == before  # nothing new: nothing is written
    assert verify(VerifySettings(output=str(tmp_path / "labels")))["rows"] == total

    read_by_everyone(f"{tmp_path}/labels/data/**/*.parquet", total=total)


def read_by_everyone(pattern: str, *, total: int) -> None:
    import glob

    import duckdb
    import pandas
    import polars

    query = f"SELECT label, count(*) FROM '{pattern}' WHERE status = 'ok' GROUP BY label"
    wanted = {"blue": 70, "green": 70, "red": 70}
    assert dict(duckdb.sql(query).fetchall()) == wanted
    frame = polars.read_parquet(pattern)
    assert frame.height == total
    assert frame["embedding"].list.len().drop_nulls().unique().to_list() == [64]
    files = glob.glob(pattern, recursive=True)
    assert pq.ParquetDataset(files).read().num_rows == total
    folder = pattern.removesuffix("/**/*.parquet")
    assert pandas.read_parquet(folder)["label"].value_counts().to_dict() == wanted


def test_a_dataset_a_table_and_a_tar_are_labelled(painter, dataset, classify_settings, tmp_path):
    result = classify(classify_settings(input=str(dataset), output=str(tmp_path / "1")))
    rows = labels_of(tmp_path / "1").to_pylist()
    assert result["planned"] == result["labeled"] == len({row["key"] for row in rows}) == 330
    assert all(row["label"] == row["key"].split("/")[0] for row in rows)

    painter.photos(tmp_path / "files", 3)
    paths = [f"files/{colour}/000{n}.png" for colour in painter.colours for n in (0, 2)]
    table = pa.table({"uri": [*paths, paths[0], "files/none.png"]})
    pq.write_table(table, tmp_path / "table.parquet")
    result = classify(
        classify_settings(input=str(tmp_path / "table.parquet"), output=str(tmp_path / "2"))
    )
    assert (result["planned"], result["duplicates"], result["errors"]) == (7, 1, 1)
    rows = labels_of(tmp_path / "2").to_pylist()
    assert {row["error_code"] for row in rows if row["status"] == "error"} == {"missing"}
    assert all(row["label"] in row["key"] for row in rows if row["status"] == "ok")

    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for number in range(20):
            data = painter.image(painter.colours[number % 3], number)
            info = tarfile.TarInfo(f"{number:03d}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    result = classify(
        classify_settings(input=str(tmp_path / "photos.tar"), output=str(tmp_path / "3"))
    )
    assert (result["planned"], result["labeled"]) == (20, 20)
    for row in labels_of(tmp_path / "3").to_pylist():
        assert row["label"] == painter.colours[int(Path(row["key"]).stem) % 3]


def without_run(table: pa.Table) -> list[dict]:
    """The rows by key, with numbers that another batch may round otherwise."""
    rows = table.sort_by("key").drop_columns([name for name in table.column_names if name == "run"])
    for row in (rows := rows.to_pylist()):
        row["confidence"] = row["confidence"] and round(row["confidence"], 5)
        for item in row["top_k"] or ():
            item["probability"] = round(item["probability"], 5)
    return rows


def test_split_workers_give_the_rows_of_fused_ones(folder, classify_settings, tmp_path):
    root, codes = folder
    for placement in ("fused", "split"):
        output = str(tmp_path / placement)
        settings = classify_settings(input=str(root), output=output, placement=placement)
        result = classify(settings)
        assert (result["labeled"], result["errors"]) == (210, len(codes))
    assert without_run(labels_of(tmp_path / "split")) == without_run(labels_of(tmp_path / "fused"))


def test_a_decoder_that_is_killed_costs_no_row_and_doubles_none(
    dataset, classify_settings, tmp_path, monkeypatch
):
    dead = tmp_path / "dead"

    class MortalActor(DecodeActor):
        """Killed, once, in the middle of its work."""

        def __call__(self, chunk: pa.Table) -> pa.Table:
            if chunk["part"][0].as_py() == 2 and not dead.exists():
                dead.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(chunk)

    monkeypatch.setattr(stages, "DecodeActor", MortalActor)
    result = classify(classify_settings(input=str(dataset), placement="split"))
    assert dead.exists()
    assert result["labeled"] == 330
    keys = Counter(labels_of(tmp_path / "labels")["key"].to_pylist())
    assert len(keys) == sum(keys.values()) == 330


def test_a_split_that_leaves_no_cpu_to_decode_is_refused(dataset, classify_settings):
    with pytest.raises(SettingsError, match="workers of 1 CPU do not fit"):
        classify(
            classify_settings(input=str(dataset), placement="split", scaling={"num_workers": 2})
        )


def test_a_worker_that_is_killed_costs_no_row_and_doubles_none(
    dataset, classify_settings, tmp_path, monkeypatch
):
    dead = tmp_path / "dead"

    class MortalActor(LabelActor):
        """Killed, once, in the middle of its work."""

        def __call__(self, chunk: pa.Table) -> pa.Table:
            if chunk["part"][0].as_py() == 2 and not dead.exists():
                dead.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(chunk)

    monkeypatch.setattr(stages, "LabelActor", MortalActor)
    scaling = {"num_workers": 2}
    result = classify(classify_settings(input=str(dataset), scaling=scaling))
    assert dead.exists()
    assert result["labeled"] == 330
    keys = Counter(labels_of(tmp_path / "labels")["key"].to_pylist())
    assert len(keys) == sum(keys.values()) == 330


def test_more_errors_than_the_budget_is_an_error_after_all_rows_are_written(
    folder, classify_settings, tmp_path
):
    root, codes = folder
    budget = {"min_rows": 1, "max_fraction": 0.001}
    with pytest.raises(TooManyBadImagesError, match="could not be labelled") as caught:
        classify(classify_settings(input=str(root), budget=budget))
    assert caught.value.exit_code == 3
    assert caught.value.result["errors"] == len(codes)
    assert labels_of(tmp_path / "labels").num_rows == 210 + len(codes)


def test_a_delta_table_catches_up_with_a_driver_that_died_before_the_export(
    painter, classify_settings, tmp_path, monkeypatch
):
    from deltalake import DeltaTable

    def die(output):
        raise KeyboardInterrupt

    painter.photos(tmp_path / "photos", 2)
    settings = classify_settings(input=str(tmp_path / "photos"), delta=True)
    with monkeypatch.context() as patch:
        patch.setattr(classify_module, "export_runs", die)
        with pytest.raises(KeyboardInterrupt):
            classify(settings)
    assert not (tmp_path / "labels/_delta_log").exists()
    assert classify(settings)["planned"] == 0  # nothing is new
    keys = DeltaTable(tmp_path / "labels").to_pyarrow_table()["key"].to_pylist()
    assert sorted(keys) == sorted(labels_of(tmp_path / "labels")["key"].to_pylist())
    assert len(set(keys)) == len(keys) == 6
    assert verify(VerifySettings(output=str(tmp_path / "labels")))["rows"] == 6


def test_without_the_package_for_delta_nothing_is_labelled(
    photos, classify_settings, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "deltalake", None)
    with pytest.raises(SettingsError, match="--delta needs the package deltalake\nhint: install"):
        classify(classify_settings(input=str(photos), delta=True))
    assert not (tmp_path / "labels").exists()


def test_nothing_to_label_and_no_model_write_nothing(classify_settings, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images at all"):
        classify(classify_settings(input=str(tmp_path / "empty")))
    with pytest.raises(UsageError, match="no bundle at"):
        classify(classify_settings(input=str(tmp_path), model=str(tmp_path)))
    assert not (tmp_path / "labels").exists()


# Engines


def test_another_engine_labels_as_eager_does_and_says_how_often(
    folder, classify_settings, tmp_path, caplog
):
    root, codes = folder
    settings = classify_settings(
        input=str(root),
        embeddings=True,
        placement="split",
        engine={"name": "openvino", "sample": 60},
    )
    with caplog.at_level("INFO"):
        result = classify(settings)
    assert (result["engine"], result["agreement"]) == ("openvino fp32", 1.0)
    assert (result["labeled"], result["errors"]) == (210, len(codes))
    [line] = [text for text in caplog.messages if text.startswith("engine ")]
    good = re.fullmatch(r"engine openvino fp32: (\d+) of \1 labels as in eager \(100.00%\)", line)
    assert 55 <= int(good[1]) <= 60  # without the hostile files among them
    for row in labels_of(tmp_path / "labels").to_pylist():
        if row["status"] == "ok":
            assert row["label"] == row["key"].split("/")[2]
            assert len(row["embedding"]) == 64
    assert classify(settings)["agreement"] is None  # nothing is new, so nothing is compared


@pytest.fixture
def fragile(trained, tmp_path):
    """The trained model, but one channel is 10,000 times the others, where int8 has 256 steps."""
    bundle = load_bundle(open_store(str(trained.folder)))
    first, second = (m for m in bundle.model.modules() if isinstance(m, torch.nn.Conv2d))
    with torch.no_grad():
        first.weight[0] *= 10_000
        first.bias[0] *= 10_000
        second.weight[:, 0] /= 10_000
    save_bundle(open_store(str(tmp_path / "fragile")), bundle.model, bundle.spec)
    return tmp_path / "fragile"


def test_int8_is_refused_below_the_bar_and_is_another_table(
    photos, fragile, classify_settings, tmp_path
):
    values = {"input": str(photos), "model": str(fragile)}
    int8 = {"name": "onnxruntime", "precision": "int8", "sample": 40}
    with pytest.raises(
        SettingsError, match=r"of \d\d labels as in eager .* 0\.99\nhint: "
    ) as caught:
        classify(classify_settings(**values, engine=int8))
    assert caught.value.exit_code == 2
    assert not (tmp_path / "labels/data").exists()
    result = classify(classify_settings(**values, engine={**int8, "min_agreement": 0.0}))
    assert (result["engine"], result["labeled"]) == ("onnxruntime int8", 330)
    assert result["agreement"] < 0.9
    with pytest.raises(ConflictError, match="precision 'int8', here None"):
        classify(classify_settings(**values))
