"""Records of trials: kept once, ranked, and shown."""

from __future__ import annotations

import io

import pyarrow.parquet as pq
import pytest

from cnnray.errors import StorageError
from cnnray.storage import open_store
from cnnray.tuning.report import write_report
from cnnray.tuning.space import parse_space
from cnnray.tuning.trials import (
    Trial,
    begin_trial,
    begun_points,
    load_trial,
    rank,
    save_trial,
    score_of,
    trial_store,
)

HOSTILE = "<script>alert(1)</script>\x1b[31m"


def epoch(accuracy: float | None, *, loss: float = 0.5, seconds: float = 2.0) -> dict[str, object]:
    """One epoch of a history, as far as trials look at it."""
    return {
        "val_accuracy": accuracy,
        "val_loss": loss,
        "train_loss": 0.4,
        "seconds": seconds,
    }


def trial(accuracy: float, *, lr: float = 0.1, status: str = "done") -> Trial:
    """A trial of two epochs, the second the better one."""
    history = (epoch(accuracy / 2, loss=0.9), epoch(accuracy))
    return Trial({"optimizer.lr": lr}, status, history, best_epoch=1, parameters=10)


@pytest.fixture
def output(tmp_path):
    return open_store(str(tmp_path / "out"))


def test_a_trial_that_is_over_is_read_back_as_it_was_written(output):
    begin_trial(output, {"optimizer.lr": 0.1})
    assert load_trial(output, {"optimizer.lr": 0.1}) is None
    save_trial(output, trial(0.9))
    assert load_trial(output, {"optimizer.lr": 0.1}) == trial(0.9)
    assert begun_points(output) == [{"optimizer.lr": 0.1}]


def test_the_first_record_of_a_trial_stays(output):
    save_trial(output, trial(0.9))
    save_trial(output, trial(0.2))
    assert load_trial(output, {"optimizer.lr": 0.1}) == trial(0.9)


def test_a_record_that_is_none_is_named(output):
    store = trial_store(output, {})
    store.create("trial.json", b'{"points": 3}')
    with pytest.raises(StorageError, match="no record of a trial"):
        load_trial(output, {})


def test_whole_trials_come_before_stopped_ones_and_failed_ones_last():
    whole, better = trial(0.8), trial(0.9, lr=0.2)
    stopped = trial(0.95, lr=0.3, status="stopped")
    failed = Trial({}, "failed", error="the loss is NaN")
    assert rank([failed, stopped, whole, better], "val_accuracy") == [
        better,
        whole,
        stopped,
        failed,
    ]


def test_a_lower_loss_ranks_higher():
    low = Trial({"a": 1}, "done", (epoch(0.5, loss=0.1),), best_epoch=0)
    high = Trial({"a": 2}, "done", (epoch(0.9, loss=0.7),), best_epoch=0)
    assert rank([high, low], "val_loss") == [low, high]
    assert rank([low, high], "val_accuracy") == [high, low]


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_a_metric_that_is_missing_or_not_finite_is_no_score(value):
    assert score_of(epoch(value), "val_accuracy") is None


def test_the_table_has_a_column_a_setting_and_the_report_escapes_what_strangers_wrote(output):
    space = parse_space("optimizer.lr: [0.1, 0.2]\naugment.policy: [none, augmix]", where="")
    failed = Trial({"optimizer.lr": HOSTILE}, "failed", error=HOSTILE)
    trials = [trial(0.9), Trial({}, "done", (epoch(0.7),), best_epoch=0, workers=3), failed]
    write_report(output, trials, space, title=HOSTILE, facts={"dataset": HOSTILE})
    rows = pq.read_table(io.BytesIO(output.read("trials.parquet"))).to_pylist()
    assert [row["optimizer.lr"] for row in rows] == ["0.1", None, HOSTILE]
    assert [row["val_accuracy"] for row in rows] == [0.9, 0.7, None]
    assert [row["seconds"] for row in rows] == [4.0, 6.0, 0.0]
    page = output.read("report.html").decode()
    assert "90.0%" in page
    assert "as given" in page
    assert "<script>" not in page
    assert "\x1b" not in page
