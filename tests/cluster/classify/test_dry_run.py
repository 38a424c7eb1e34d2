"""What classify predicts: beforehand with --dry_run, which writes nothing, and in a large run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from colours import write_bundle, write_images

from cnnray.cluster.classify import forecast as estimate
from cnnray.cluster.classify.job import classify
from cnnray.config import ClassifySettings
from cnnray.errors import ConflictError, DataError, SettingsError
from cnnray.labeling.forecast import StageTimes
from cnnray.labeling.measure import Measurement
from cnnray.labeling.runs import begin_run, claim_table
from cnnray.storage import open_store

pytestmark = pytest.mark.timeout(300)


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and folder: when it was written, and what it holds."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def settings(bundle: Path, tmp_path: Path) -> Callable[..., ClassifySettings]:
    """To label a folder of 150 images, in parts of 40."""
    write_images(tmp_path / "images", range(150))

    def build(**changes: Any) -> ClassifySettings:
        values: dict[str, Any] = {
            "model": str(bundle),
            "input": str(tmp_path / "images"),
            "output": str(tmp_path / "labels"),
            "part_rows": 40,
            "chunk_rows": 20,
            "scaling": {"num_workers": 1},
            "cluster": {"num_cpus": 2},
        }
        return ClassifySettings(**{**values, **changes})

    return build


def test_a_dry_run_predicts_and_makes_not_even_a_folder(settings, tmp_path, caplog):
    caplog.set_level(logging.INFO, "cnnray")
    before = files_of(tmp_path)
    result = classify(settings(dry_run=True, price_per_hour=3.6))
    assert files_of(tmp_path) == before
    assert not (tmp_path / "labels").exists()
    assert result["dry_run"] is True
    assert (result["listed"], result["planned"], result["parts"]) == (150, 150, 4)
    assert result["predicted_seconds"] > 1
    assert result["machines_usd"] == pytest.approx(result["predicted_seconds"] / 1000, rel=0.1)
    assert result["bottleneck"] in result["milliseconds"]
    assert (result["workers"], result["sample_errors"]) == (1, 0)
    assert 0 < result["sample"] <= 128
    assert "150 images new of 150 listed, 4 parts" in caplog.text
    assert "predicted: 150 images in " in caplog.text
    assert f"bottleneck: {result['bottleneck']}" in caplog.text


def test_a_dry_run_over_an_open_run_says_what_is_missing_and_leaves_it_open(
    settings, tmp_path, caplog, monkeypatch
):
    caplog.set_level(logging.INFO, "cnnray")
    begun = []

    def begin_and_stop(*arguments: Any, **options: Any) -> None:
        begun.append(begin_run(*arguments, **options)[0])

    monkeypatch.setattr("cnnray.cluster.classify.job.begin_run", begin_and_stop)
    classify(settings())  # as a driver that is killed after it has opened a run
    before = files_of(tmp_path)
    result = classify(settings(dry_run=True))
    assert files_of(tmp_path) == before
    assert (result["run"], result["planned"], result["parts"]) == (begun[0].id, 150, 4)
    assert (
        f"run {begun[0].id} is open: 150 of 150 images in 4 of 4 parts are missing" in caplog.text
    )
    with pytest.raises(ConflictError, match="is open with other settings: --part_rows 40, here 30"):
        classify(settings(dry_run=True, part_rows=30))


def test_a_dry_run_into_the_table_of_another_model_is_refused(settings, tmp_path):
    claim_table(open_store(str(tmp_path / "labels")), {"model": "another"})
    before = files_of(tmp_path)
    with pytest.raises(ConflictError, match="holds labels of another kind"):
        classify(settings(dry_run=True))
    assert files_of(tmp_path) == before


def test_a_dry_run_without_images_or_without_the_gpu_is_a_users_mistake(settings, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images at all in .*/empty"):
        classify(settings(dry_run=True, input=str(tmp_path / "empty")))
    estimate_without_gpu = settings(dry_run=True, scaling={"use_gpu": True})
    if not estimate.torch.cuda.is_available():
        with pytest.raises(SettingsError, match="no GPU here"):
            classify(estimate_without_gpu)


@pytest.mark.parametrize(
    ("changes", "crew"),
    [
        ({"scaling": {}}, (4, 0, 1)),
        ({"scaling": {"cpus_per_worker": 2}}, (2, 0, 1)),
        ({"scaling": {"num_workers": 9}}, (9, 0, 3)),
        ({"scaling": {}, "placement": "split"}, (3, 1, 1)),
        ({"scaling": {"num_workers": 6}, "placement": "split"}, (2, 6, 2)),
        ({"scaling": {}, "placement": "split", "decode_workers": 2}, (2, 1, 1)),
    ],
)
def test_workers_are_as_many_as_the_machine_holds_and_machines_as_many_as_they_need(
    settings, changes, crew
):
    found = estimate.local_crew(settings(cluster={"num_cpus": 4}, **changes))
    assert (found.workers.decode, found.workers.infer, found.machines) == crew


def test_requests_are_counted_and_priced_for_images_in_s3_alone(settings, caplog):
    caplog.set_level(logging.INFO, "cnnray")
    times = StageTimes(0.0, 1e-3, 1e-4, 1e-3, 1e-3, 0.0, 1e-2, 1e-5)
    measured = Measurement(times, images=100, bad=2, bytes_per_image=110_000.0)

    def predict(where: str) -> dict[str, Any]:
        job = settings(input=where)
        return estimate.estimate(
            measured, estimate.local_crew(job), job, images=10**6, listed=2 * 10**6
        )

    found = predict("s3://bucket/photos")
    assert found["requests"] == {"list": 2000, "get": 10**6 + 4, "head": 50_000, "put": 25_008}
    assert found["requests_usd"] == pytest.approx(0.01 + 0.4 + 0.02 + 0.125, abs=0.001)
    assert "at most 2,000 LIST, 1,000,004 GET, 50,000 HEAD, 25,008 PUT: 0.56 USD" in caplog.text
    assert "requests" not in predict("photos")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_large_run_says_what_it_predicted_and_what_it_took(settings, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "cnnray")
    monkeypatch.setattr(estimate, "RUN_IMAGES", 150)
    result = classify(settings())
    assert (result["planned"], result["labeled"]) == (150, 150)
    assert result["predicted_seconds"] > 0
    assert "predicted: " in caplog.text
    assert "took " in caplog.text

    again = classify(settings(dry_run=True))
    assert (again["listed"], again["planned"], again["parts"]) == (150, 0, 0)
    assert again["predicted_seconds"] < 10  # the listing alone: nothing is measured


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_run_goes_on_where_its_sample_cannot_be_measured(settings, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "cnnray")
    monkeypatch.setattr(estimate, "RUN_IMAGES", 10)
    bad = tmp_path / "bad"
    bad.mkdir()
    for number in range(12):
        (bad / f"{number}.jpg").write_bytes(b"text")
    result = classify(settings(input=str(bad)))
    assert (result["planned"], result["errors"], result["predicted_seconds"]) == (12, 12, None)
    assert "no prediction: none of the 12 images" in caplog.text
