"""Spaces of settings: what a file may say, and the points that come out of it."""

from __future__ import annotations

import itertools

import pytest

from cnnray.errors import SettingsError
from cnnray.tuning.space import (
    Choice,
    Range,
    describe,
    describe_space,
    grid,
    merge,
    parse_space,
    point_name,
    random_points,
)

SPACE = """
model.name: [tutorial_cnn, resnet18]
optimizer.lr: {min: 1e-4, max: 1e-2, log: true}
model.dropout: {min: 0.0, max: 0.5}
augment.policy_magnitude: {min: 3, max: 12}
"""


def test_lists_are_choices_and_two_ends_a_range_also_in_the_notation_that_yaml_takes_for_text():
    assert parse_space(SPACE, where="space.yaml") == {
        "model.name": Choice(("tutorial_cnn", "resnet18")),
        "optimizer.lr": Range(0.0001, 0.01, is_log=True),
        "model.dropout": Range(0.0, 0.5),
        "augment.policy_magnitude": Range(3, 12),
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "just text",
        "optimizer.lr: 0.1",
        "optimizer.lr: []",
        "optimizer.lr: {min: 0.1}",
        "optimizer.lr: {min: 0.2, max: 0.1}",
        "optimizer.lr: {min: 0.0, max: 0.1, log: true}",
        "optimizer.lr: {min: low, max: high}",
        "optimizer.lr: {min: .nan, max: 1.0}",
        "optimizer.lr: {min: 0.1, max: .inf}",
        "optimizer.lr: {min: 0.1, max: 0.2, step: 2}",
    ],
)
def test_a_space_without_values_to_choose_from_is_refused_with_an_example(text):
    with pytest.raises(SettingsError, match="space.yaml") as caught:
        parse_space(text, where="space.yaml")
    assert "optimizer.lr" in str(caught.value)


def test_broken_yaml_is_one_line():
    with pytest.raises(SettingsError, match="space.yaml is not YAML") as caught:
        parse_space("a: [1, 2\nb: ]", where="space.yaml")
    assert "\n" not in str(caught.value).partition("\nhint")[0]


def test_random_points_lie_in_the_space_and_logarithms_are_even():
    points = list(itertools.islice(random_points(parse_space(SPACE, where=""), seed=1), 400))
    assert {point["model.name"] for point in points} == {"tutorial_cnn", "resnet18"}
    assert all(0.0001 <= point["optimizer.lr"] <= 0.01 for point in points)
    below = sum(point["optimizer.lr"] < 0.001 for point in points)
    assert 150 < below < 250  # half of the two decades
    assert {point["augment.policy_magnitude"] for point in points} == set(range(3, 13))


def test_the_first_points_are_the_same_however_many_are_drawn_and_others_for_another_seed():
    space = parse_space(SPACE, where="")
    few, many = (list(itertools.islice(random_points(space, seed=5), n)) for n in (3, 30))
    assert many[:3] == few
    assert next(random_points(space, seed=6)) != few[0]


def test_a_small_space_ends_when_each_of_its_points_was_drawn_once():
    space = parse_space("a: [1, 2, 3]\nb: [x, y]", where="")
    points = list(random_points(space, seed=0))
    assert len(points) == 6
    assert len({point_name(point) for point in points}) == 6


def test_a_grid_has_every_combination_and_no_ranges():
    space = parse_space("a: [1, 2]\nb: [x, y]", where="")
    assert grid(space) == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    ]
    with pytest.raises(SettingsError, match="optimizer.lr"):
        grid(parse_space(SPACE, where=""))


def test_a_point_has_one_name_in_any_order_of_its_settings():
    assert point_name({"a": 1, "b": 2}) == point_name({"b": 2, "a": 1})
    assert point_name({"a": 1}) != point_name({"a": 2})


def test_a_point_is_put_into_nested_settings_and_leaves_what_it_does_not_name():
    settings = {"epochs": 3, "optimizer": {"name": "adam", "lr": 0.1}, "mix": {"a": {"b": 1}}}
    point = {"epochs": 5, "optimizer.lr": 0.2, "mix.a.b": 2}
    assert merge(settings, point) == {
        "epochs": 5,
        "optimizer": {"name": "adam", "lr": 0.2},
        "mix": {"a": {"b": 2}},
    }
    assert settings["optimizer"] == {"name": "adam", "lr": 0.1}


def test_settings_that_belong_together_are_put_in_together():
    settings = {"optimizer": {"name": "adam", "lr": 0.1, "momentum": 0.9}}
    merged = merge(settings, {"optimizer": {"name": "sgd", "lr": 0.5}})
    assert merged == {"optimizer": {"name": "sgd", "lr": 0.5, "momentum": 0.9}}


def test_points_and_spaces_are_described_for_people():
    assert (
        describe({"optimizer.lr": 0.003, "model.name": "a"}) == "optimizer.lr 0.003, model.name a"
    )
    assert describe({}) == "the settings as given"
    assert describe_space(parse_space(SPACE, where=""))[1:3] == [
        "optimizer.lr: 0.0001 to 0.01, log",
        "model.dropout: 0.0 to 0.5",
    ]
