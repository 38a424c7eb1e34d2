"""What follows from the agreement of an engine's labels with eager's; the rest is in classify."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cnnray.cluster.inference import engine_check
from cnnray.cluster.inference.engine_check import CheckedEngine, check_engine
from cnnray.config import ClassifySettings
from cnnray.errors import SettingsError
from cnnray.labeling.agreement import Agreement
from cnnray.models.engines import EngineChoice


@pytest.fixture
def check(monkeypatch):
    """Check an engine of which so many of 200 labels are eager's."""

    def make(choice, same, *, images=200, **engine):
        agreement = Agreement(same, images)
        monkeypatch.setattr(
            engine_check, "_run_as_worker", lambda job, choice: CheckedEngine(choice, agreement)
        )
        settings = ClassifySettings(model="m", input="i", output="o", engine=engine)
        return check_engine(SimpleNamespace(settings=settings, is_bound_to_precision=True), choice)

    return make


def test_eager_in_fp32_is_not_compared(check):
    assert check(EngineChoice(), 0).agreement is None


def test_the_bar_itself_is_enough(check):
    assert check(EngineChoice("openvino"), 198).agreement.fraction == 0.99
    with pytest.raises(SettingsError, match="gives 197 of 200 labels as in eager"):
        check(EngineChoice("openvino"), 197)
    assert check(EngineChoice("openvino"), 180, min_agreement=0.9).agreement.same == 180


def test_bf16_that_nobody_asked_for_becomes_fp32(check):
    eager = check(EngineChoice("eager", "bf16", or_fp32=True), 190)
    assert eager == CheckedEngine(EngineChoice("eager", "fp32"))
    with pytest.raises(SettingsError, match="--engine.precision fp32, or accept"):
        check(EngineChoice("eager", "bf16"), 190)


def test_a_run_of_bad_images_alone_goes_on(check):
    assert check(EngineChoice("openvino"), 0, images=0).agreement.fraction is None
