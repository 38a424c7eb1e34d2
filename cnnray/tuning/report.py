"""All trials for people: a table in Parquet and a page in HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cnnray.evaluation.comparison import TrialRow, render_comparison
from cnnray.storage import Store, encode_parquet
from cnnray.tuning.search import DEFAULT
from cnnray.tuning.space import Space, describe
from cnnray.tuning.trials import Trial, trials_table

TABLE_KEY, REPORT_KEY = "trials.parquet", "report.html"


def write_report(
    output: Store, trials: Sequence[Trial], space: Space, *, title: str, facts: Mapping[str, str]
) -> None:
    """Write both, replacing what is there; ``trials`` are in their order, best first."""
    output.write(TABLE_KEY, encode_parquet(trials_table(trials, space)))
    page = render_comparison(title=title, trials=[_row(trial) for trial in trials], facts=facts)
    output.write(REPORT_KEY, page.encode())


def _row(trial: Trial) -> TrialRow:
    return TrialRow(
        name=trial.name,
        description=describe(trial.point),
        status=trial.status if trial.error is None else f"{trial.status}: {trial.error}",
        accuracy=trial.value("val_accuracy"),
        loss=trial.value("val_loss"),
        epochs=len(trial.history),
        seconds=trial.seconds,
        parameters=trial.parameters,
        is_default=trial.point == DEFAULT,
    )
