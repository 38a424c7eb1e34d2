"""The start of a first run: Ray beside the imports, and not started for nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from colours import write_bundle, write_images

from cnnray.cluster.classify import early
from cnnray.config import ClassifySettings
from cnnray.errors import ModelError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def settings(tmp_path: Path) -> ClassifySettings:
    write_images(tmp_path / "images", range(3))
    return ClassifySettings(
        model=str(write_bundle(tmp_path / "bundle")),
        input=str(tmp_path / "images"),
        output=str(tmp_path / "labels"),
    )


def test_a_first_run_has_work(settings: ClassifySettings) -> None:
    assert early._has_work(settings)


@pytest.mark.parametrize("wrong", ["model", "input"])
def test_what_is_not_there_is_no_work(settings: ClassifySettings, wrong: str) -> None:
    assert not early._has_work(settings.model_copy(update={wrong: "/nowhere"}))


def test_a_dry_run_is_no_work(settings: ClassifySettings) -> None:
    assert not early._has_work(settings.model_copy(update={"dry_run": True}))


def test_a_table_that_is_there_may_have_all_labels(settings: ClassifySettings) -> None:
    table = Path(settings.output) / "_cnnray/table.json"
    table.parent.mkdir(parents=True)
    table.write_text("{}")
    assert not early._has_work(settings)


def test_nothing_heavy_is_imported_before_ray_is_under_way() -> None:
    code = (
        "import sys, cnnray.cluster.classify.early;"
        " print('torch' in sys.modules, 'ray' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.stdout.split() == ["False", "True"], done.stderr


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_first_run_labels_every_image(settings: ClassifySettings) -> None:
    result = early.classify(settings.model_copy(update={"output": settings.output + "-early"}))
    assert result["labeled"] == result["planned"] == 3


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_broken_bundle_is_named_also_when_it_was_loaded_beside(
    settings: ClassifySettings,
) -> None:
    (Path(settings.model) / "model.json").write_text("{}")
    with pytest.raises(ModelError, match="model.json"):
        early.classify(settings)
    assert not Path(settings.output).exists()
