"""Searches: what is proposed first, how many, and what is learnt."""

from __future__ import annotations

from typing import Any

import pytest

from cnnray.errors import SettingsError
from cnnray.tuning.search import DEFAULT, Search, open_search
from cnnray.tuning.space import Point, parse_space

SPACE = parse_space("optimizer.lr: {min: 0.001, max: 1.0}\nmodel.name: [a, b]", where="")


def run(search: Search, score: Any = lambda point: 0.0) -> list[Point]:
    """Every point that a search proposes, told of at once."""
    points = []
    while (point := search.propose()) is not None:
        points.append(point)
        search.tell(point, score(point))
    return points


def closeness(point: Point) -> float | None:
    """A score with its peak at a rate of 0.7; none for the default."""
    return -abs(point["optimizer.lr"] - 0.7) if point else None


@pytest.mark.parametrize("name", ["random", "optuna"])
def test_the_settings_as_given_come_first_and_as_many_points_as_asked_for(name):
    points = run(open_search(name, SPACE, trials=5, seed=0))
    assert len(points) == 5
    assert points[0] == DEFAULT
    assert all(set(point) == set(SPACE) for point in points[1:])


def test_a_grid_ends_after_its_last_combination():
    space = parse_space("model.name: [a, b]", where="")
    points = run(open_search("grid", space, trials=9, seed=0))
    assert points == [DEFAULT, {"model.name": "a"}, {"model.name": "b"}]


def test_a_random_search_that_goes_on_proposes_the_same_points_again():
    first = run(open_search("random", SPACE, trials=4, seed=3))
    assert run(open_search("random", SPACE, trials=6, seed=3, known=first))[:4] == first


def test_optuna_nears_the_best_where_chance_does_not():
    learnt = run(open_search("optuna", SPACE, trials=60, seed=0), closeness)
    drawn = run(open_search("random", SPACE, trials=60, seed=0), closeness)
    error = [sum(abs(p["optimizer.lr"] - 0.7) for p in ps[30:]) / 30 for ps in (learnt, drawn)]
    assert error[0] < 0.6 * error[1]


def test_optuna_goes_on_from_the_points_that_are_known():
    first = run(open_search("optuna", SPACE, trials=30, seed=0), closeness)
    points = run(open_search("optuna", SPACE, trials=60, seed=0, known=first), closeness)
    assert points[:30] == first
    assert len(points) == 60
    rates = [point["optimizer.lr"] for point in points[30:]]
    assert sum(abs(rate - 0.7) for rate in rates) / 30 < 0.15
    assert not {str(point) for point in points[30:]} & {str(point) for point in first}


def test_optuna_survives_points_that_failed():
    points = run(open_search("optuna", SPACE, trials=20, seed=0), lambda point: None)
    assert len(points) == 20


def test_without_optuna_the_remedy_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(SettingsError, match=r"cnnray\[optuna\]"):
        open_search("optuna", SPACE, trials=1, seed=0)
