"""One self-contained HTML file that compares trials: accuracy against cost, and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cnnray.evaluation import figures
from cnnray.evaluation.pages import picture, render_page


@dataclass(frozen=True)
class TrialRow:
    """One trial as the report shows it."""

    name: str
    description: str  # its settings
    status: str
    accuracy: float | None
    loss: float | None
    epochs: int
    seconds: float  # of training, over all workers
    parameters: int | None
    is_default: bool = False  # the settings as given


def render_comparison(*, title: str, trials: Sequence[TrialRow], facts: Mapping[str, str]) -> str:
    """Render the report as one HTML document; ``trials`` are in their order, best first."""
    measured = [trial for trial in trials if trial.accuracy is not None]
    png = figures.accuracy_against_cost(
        [trial.seconds for trial in measured],
        [trial.accuracy or 0.0 for trial in measured],
        names=[_mark(place, trial) for place, trial in enumerate(measured)],
    )
    return render_page(
        "comparison.html.j2",
        title=title,
        trials=trials,
        cost=None if png is None else picture(png),
        facts=facts,
    )


def _mark(place: int, trial: TrialRow) -> str:
    """What is written beside a trial's dot: most have nothing."""
    return ", ".join(["best"] * (place == 0) + ["as given"] * trial.is_default)
