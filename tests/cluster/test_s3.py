"""The whole path on an object store."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cnnray.cluster.classify.job import classify
from cnnray.cluster.evaluate.job import evaluate
from cnnray.cluster.pack.job import pack
from cnnray.cluster.train.job import train
from cnnray.cluster.verify.job import verify
from cnnray.config import VerifySettings
from cnnray.errors import StorageError
from cnnray.storage import open_store

pytestmark = [
    pytest.mark.ray,
    pytest.mark.s3,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("ray_session"),
]


def test_pack_train_evaluate_and_classify_work_from_bucket_to_bucket(
    seaweed, painter, pack_settings, train_settings, evaluate_settings, classify_settings
):
    uri = {name: seaweed.uri(f"path/{name}") for name in ("photos", "data", "model", "eval", "out")}
    photos = open_store(uri["photos"])
    for colour in painter.colours:
        for number in range(40):
            photos.write(f"{colour}/{number:03d}.png", painter.image(colour, number))
    photos.write("red/ü 100%?.jpg", painter.image("red", 100, format="JPEG"))
    photos.write("red/empty.jpg", b"")

    packed = pack(pack_settings(input=uri["photos"], output=uri["data"]))
    assert (packed["samples"], packed["rejected"]) == (121, 1)

    trained = train(train_settings(data=uri["data"], output=uri["model"]))
    assert trained["val_accuracy"] == 1.0
    names = [item.key for item in open_store(uri["model"]).list("training/main/")]
    assert "training/main/epoch-00002/MANIFEST.json" in names

    places = {"model": uri["model"], "output": uri["eval"]}
    result = evaluate(evaluate_settings(**places, data=uri["data"], split="test"))
    assert (result["accuracy"], result["samples"]) == (1.0, packed["splits"]["test"])
    assert {item.key for item in open_store(uri["eval"]).list()} == {
        "metrics.json",
        "predictions.parquet",
        "report.html",
    }

    places["output"] = uri["out"]
    labels = classify(classify_settings(**places, input=uri["photos"]))
    assert (labels["planned"], labels["labeled"], labels["errors"]) == (122, 121, 1)
    output = open_store(uri["out"])
    parts = [output.read(item.key) for item in output.list("data/")]
    rows = pa.concat_tables([pq.read_table(io.BytesIO(part)) for part in parts]).to_pylist()
    assert len({row["key"] for row in rows}) == len(rows) == 122
    assert all(row["label"] == row["key"].split("/")[0] for row in rows if row["status"] == "ok")
    assert classify(classify_settings(**places, input=uri["photos"]))["planned"] == 0
    assert verify(VerifySettings(output=uri["out"]))["rows"] == 122


def test_a_bucket_that_is_not_there_is_named_in_one_line(
    pack_settings, train_settings, evaluate_settings, classify_settings, photos
):
    missing = "s3://no-such-bucket/x"
    for job, settings in (
        (pack, pack_settings(input=missing, output=missing)),
        (train, train_settings(data=missing, output=missing)),
        (evaluate, evaluate_settings(data=missing)),
        (classify, classify_settings(input=missing)),
        (classify, classify_settings(input=str(photos), output=missing)),
    ):
        with pytest.raises(StorageError, match="^no such bucket: no-such-bucket\n") as caught:
            job(settings)
        assert len(str(caught.value).splitlines()) == 2, settings
