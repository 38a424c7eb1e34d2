"""A user's own Ray Data pipeline over cnnray's datasets and models."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import cnnray
from cnnray.errors import DataError, SettingsError

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("ray_session"),
]


def test_a_packed_dataset_goes_through_a_model_in_a_pipeline_of_ones_own(dataset, trained):
    images = cnnray.read_dataset(str(dataset), split="test")
    labelled = images.map_batches(
        cnnray.Classifier, fn_constructor_args=[str(trained.folder)], concurrency=1, batch_size=20
    )
    rows = labelled.take_all()
    assert len(rows) > 20
    for row in rows:
        assert row["key"].split("/")[0] == row["class_name"] == row["prediction"]
        assert row["confidence"] == pytest.approx(row["top_k"][0]["probability"])
        assert row["error_code"] is None
    assert sorted({row["label"] for row in rows}) == [0, 1, 2]


def test_without_a_split_all_of_a_packed_dataset_is_read(dataset, photos):
    rows = cnnray.read_dataset(str(dataset)).select_columns(["key", "image"]).take_all()
    assert {row["key"]: row["image"] for row in rows} == {
        str(path.relative_to(photos)): path.read_bytes() for path in photos.rglob("*.*")
    }


def test_a_folder_of_images_is_a_dataset_too(painter, tmp_path):
    painter.photos(tmp_path, 3)
    rows = cnnray.read_dataset(str(tmp_path)).take_all()
    assert {row["key"]: row["image"] for row in rows} == {
        str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*.*")
    }
    assert {row["error"] for row in rows} == {None}
    with pytest.raises(SettingsError, match="no splits"):
        cnnray.read_dataset(str(tmp_path), split="test")


def test_a_classifier_takes_files_and_pixels_in_numpy_and_in_pyarrow(trained, painter):
    classifier = cnnray.Classifier(str(trained.folder), top_k=2)
    files = [painter.image(colour, 200) for colour in painter.colours]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in files])
    ragged = np.empty(3, object)
    ragged[:] = [pixels[0], pixels[1], pixels[2].repeat(2, axis=0)]
    batches = [
        {"image": np.array(files, object)},
        {"image": pixels},
        {"image": ragged},
        pa.table({"image": files}),
    ]
    for batch in batches:
        found = classifier(batch)
        names = found["prediction"]
        names = names.to_pylist() if isinstance(found, pa.Table) else names.tolist()
        assert names == list(painter.colours)
        assert all(len(top) == 2 for top in found["top_k"])


def test_a_classifier_gives_bad_images_a_code_and_refuses_other_columns(trained, painter):
    classifier = cnnray.Classifier(str(trained.folder))
    found = classifier(pa.table({"image": [painter.image("red", 1), b"text", None]}))
    assert found["prediction"].to_pylist() == ["red", None, None]
    assert found["error_code"].to_pylist() == [None, "not_image", "missing"]
    with pytest.raises(DataError, match="no column image in the batch"):
        classifier({"picture": np.zeros((1, 12, 12, 3), np.uint8)})
    with pytest.raises(DataError, match=r"the model takes \(H, W, 3\) uint8"):
        classifier({"image": np.zeros((1, 12, 12, 1), np.uint8)})
    with pytest.raises(DataError, match="images must be bytes, not str"):
        classifier(pa.table({"image": ["a/b.png"]}))


def test_the_package_has_its_doors_and_no_others():
    assert {"Classifier", "read_dataset"} <= set(dir(cnnray))
    with pytest.raises(AttributeError, match="no attribute 'classifier'"):
        _ = cnnray.classifier
