"""Which point is tried next. The first is always the settings as given, to be compared with."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from cnnray.errors import SettingsError
from cnnray.tuning.space import Choice, Point, Range, Space, grid, point_name, random_points, tidy

DEFAULT: Point = {}
"""The settings as given."""


class Search(Protocol):
    """Proposes points and learns how good they were."""

    def propose(self) -> Point | None:
        """The next point; None: there is none left."""

    def tell(self, point: Point, score: float | None) -> None:
        """What a proposed point gave, greater is better; None: it failed."""


def open_search(
    name: str, space: Space, *, trials: int, seed: int, known: Sequence[Point] = ()
) -> Search:
    """``random``, ``grid`` or ``optuna``, for ``trials`` points, the default one included.

    ``known`` are points that an earlier submission has begun. Raises ``SettingsError``.
    """
    if name == "optuna":
        return OptunaSearch(space, trials=trials, seed=seed, known=known)
    points = random_points(space, seed=seed) if name == "random" else iter(grid(space))
    return PlannedSearch(itertools.islice(itertools.chain([DEFAULT], points), trials))


class PlannedSearch:
    """Points that are known beforehand: a search that goes on proposes the same ones again."""

    def __init__(self, points: Iterable[Point]) -> None:
        self.points = deque(points)

    def propose(self) -> Point | None:
        """The next one."""
        return self.points.popleft() if self.points else None

    def tell(self, point: Point, score: float | None) -> None:
        """Nothing is learnt."""


class OptunaSearch:
    """Tree-structured Parzen estimators (Bergstra et al. 2011) by Optuna, the optuna extra.

    What it proposes depends on what it was told, and when. So a search that goes on proposes the
    points that are known first, and is told of them as their results come in again.
    """

    def __init__(self, space: Space, *, trials: int, seed: int, known: Sequence[Point]) -> None:
        try:
            import optuna
        except ImportError as error:
            raise SettingsError(
                "--search optuna needs Optuna, which is not installed",
                hint="pip install 'cnnray[optuna]'",
            ) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna = optuna
        self.space = space
        self.distributions = {name: self._distribution(values) for name, values in space.items()}
        # Another seed once some are known: the same one would draw their values once more.
        sampler = optuna.samplers.TPESampler(seed=(seed + len(known)) % 2**32)
        self.study = optuna.create_study(direction="maximize", sampler=sampler)
        self.first = deque([DEFAULT, *(point for point in known if point != DEFAULT)])
        self.left = trials
        self.asked: dict[str, Any] = {}

    def propose(self) -> Point | None:
        """The next point; Optuna may ask for one twice."""
        if self.left == 0:
            return None
        self.left -= 1
        if self.first:
            return self.first.popleft()
        trial = self.study.ask(self.distributions)
        point = {
            name: values.values[trial.params[name]]
            if isinstance(values, Choice)
            else tidy(trial.params[name])
            for name, values in self.space.items()
        }
        self.asked[point_name(point)] = trial
        return point

    def tell(self, point: Point, score: float | None) -> None:
        """Let Optuna know; the default point is none of its own."""
        asked = self.asked.pop(point_name(point), None)
        if asked is None and point != DEFAULT and score is not None:
            params = {
                name: values.values.index(point[name])
                if isinstance(values, Choice)
                else point[name]
                for name, values in self.space.items()
            }
            self.study.add_trial(
                self.optuna.trial.create_trial(
                    params=params, distributions=self.distributions, value=score
                )
            )
        elif asked is not None:
            failed = self.optuna.trial.TrialState.FAIL
            self.study.tell(asked, score, state=failed if score is None else None)

    def _distribution(self, values: Choice | Range) -> Any:
        kinds = self.optuna.distributions
        if isinstance(values, Choice):  # by their places: lists and mixed types are values, too
            return kinds.CategoricalDistribution(range(len(values.values)))
        kind = kinds.IntDistribution if values.is_whole else kinds.FloatDistribution
        return kind(values.low, values.high, log=values.is_log)
