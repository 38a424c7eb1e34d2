"""jobs/bench.py as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from colours import write_bundle, write_images

from cnnray.cluster.classify.dry_run import bench
from cnnray.config import BenchSettings

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 50 images and a file that is none."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, range(50))
    (folder / "bad.jpg").write_bytes(b"text")
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.mark.slow
def test_a_table_is_on_stderr_and_one_result_on_stdout_and_in_the_file(
    run, images, bundle, tmp_path
):
    output = tmp_path / "bench.json"
    flags = ("--model", str(bundle), "--input", str(images), "--output", str(output))
    done = run("python", "jobs/bench.py", *flags, "--images", "1000000", seconds=100)
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    result = json.loads(line)
    assert json.loads(output.read_text()) == result
    assert (result["listed"], result["images"]) == (51, 1_000_000)
    assert (result["sample"], result["sample_errors"]) == (51, 1)
    assert result["predicted_seconds"] > 1
    for stage in ("list", "read", "decode", "resize", "model", "write"):
        assert stage in result["milliseconds"]
    for said in (
        "decode ",
        "ceiling: ",
        "bottleneck: ",
        "predicted: 1,000,000 images in ",
        "cost: ",
    ):
        assert said in done.stderr


def test_more_images_and_more_workers_are_predicted_from_the_same_sample(images, bundle):
    def predict(**changes: object) -> dict[str, float]:
        values = {"model": str(bundle), "input": str(images), "sample": 16, "images": 10**6}
        return bench(BenchSettings(**{**values, **changes}))

    one = predict(scaling={"num_workers": 1})
    assert 10 <= one["sample"] <= 16
    assert one["images_per_second"] == pytest.approx(one["images_per_second_per_core"], rel=0.01)
    eight = predict(scaling={"num_workers": 8}, cluster={"num_cpus": 4}, price_per_hour=1.0)
    assert eight["machines"] == 2
    hours = eight["predicted_seconds"] / 3600
    assert eight["machines_usd"] == pytest.approx(2 * hours, rel=0.01, abs=0.001)
