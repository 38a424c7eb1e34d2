"""What a search refuses before a trial is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cnnray.cluster.tune.job import tune
from cnnray.config import TuneSettings
from cnnray.errors import ConflictError, SettingsError

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("ray_session"),
]


@pytest.fixture
def tune_settings(train_settings: Any, dataset: Path, tmp_path: Path) -> Any:
    def build(*, space: str = "optimizer.lr: [0.1]", **changes: Any) -> TuneSettings:
        (tmp_path / "space.yaml").write_text(space)
        values = train_settings(data=str(dataset), output=str(tmp_path / "best")).model_dump()
        values |= {"space": str(tmp_path / "space.yaml"), "search": "grid", "trials": 9}
        return TuneSettings(**{**values, **changes})

    return build


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
