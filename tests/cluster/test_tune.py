"""Model selection for real: trials of Ray Tune that train, end, are stopped, fail and go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cnnray.cluster.tune import tune
from cnnray.config import TuneSettings
from cnnray.errors import ConflictError, SettingsError, UsageError
from cnnray.models.bundle import load_bundle
from cnnray.storage import open_store

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("ray_session"),
]

SPACE = "optimizer.lr: [1.0e-7, 1.0e+30]\n"
"""Beside the 0.02 of the tests' settings: one that learns nothing, one whose loss is not finite."""


@pytest.fixture
def tune_settings(train_settings: Any, dataset: Path, tmp_path: Path) -> Any:
    def build(*, space: str = SPACE, **changes: Any) -> TuneSettings:
        (tmp_path / "space.yaml").write_text(space)
        values = train_settings(data=str(dataset), output=str(tmp_path / "best")).model_dump()
        values |= {"space": str(tmp_path / "space.yaml"), "search": "grid", "trials": 9}
        return TuneSettings(**{**values, **changes})

    return build


def table(folder: Path) -> dict[str | None, dict[str, Any]]:
    """The rows of the table of trials, by the learning rate."""
    rows = pq.read_table(folder / "trials.parquet").to_pylist()
    return {row["optimizer.lr"]: row for row in rows}


def test_a_search_stops_what_is_behind_keeps_the_best_and_goes_on_with_more_trials(
    tune_settings, tmp_path
):
    settings = tune_settings(trials=2, epochs=4, grace_epochs=1)
    result = tune(settings)
    assert (result["done"], result["stopped"]) == (1, 1)
    assert result["val_accuracy"] == result["default"] == 1.0
    first = table(tmp_path / "best")
    assert first["1e-07"]["epochs"] < 4
    assert load_bundle(open_store(str(tmp_path / "best"))).digest == result["model"]
    with pytest.raises(UsageError, match="holds the best of 2 trials already"):
        tune(settings)

    result = tune(settings.model_copy(update={"trials": 9, "refit_epochs": 5}))
    assert [result[name] for name in ("trials", "done", "stopped", "failed")] == [3, 1, 1, 1]
    rows = table(tmp_path / "best")
    assert "not finite" in rows["1e+30"]["error"]
    assert {lr: rows[lr] for lr in first} == first, "trials that were over ran again"
    bundle = load_bundle(open_store(str(tmp_path / "best")))
    assert bundle.digest == result["model"]
    assert len(bundle.spec.provenance["history"]) == 5
    assert bundle.spec.provenance["settings"]["optimizer"]["lr"] == 0.02
    assert not list((tmp_path / "best/trials").glob("*/training/main/epoch-*"))


def test_mistakes_are_found_before_a_trial_is_started(tune_settings, tmp_path):
    for space, message in {
        "optimiser.lr: [0.1]": "did you mean optimizer.lr",
        "optimizer.lr: [0.1, -1]": "optimizer.lr -1",
        "output: [a, b]": "a setting of the job",
        "scaling.num_workers: [1, 2]": "a setting of the job",
    }.items():
        with pytest.raises(SettingsError, match=message):
            tune(tune_settings(space=space))
    with pytest.raises(SettingsError, match="a range"):
        tune(tune_settings(space="optimizer.lr: {min: 0.1, max: 0.2}"))
    assert not (tmp_path / "best").exists()


def test_another_search_at_the_same_output_is_a_conflict(tune_settings, tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best/tuning.json").write_text('{"space": ["optimizer.lr: 0.1 to 0.2"]}')
    with pytest.raises(ConflictError, match="space"):
        tune(tune_settings())
