"""Splits by hash: stable, independent of the other keys, in the asked fractions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cnnray.datasets.splits import ORDER_SALT, SPLIT_SALT, assign_splits, hash_keys

KEYS = [f"class-{number % 7}/image-{number:06d}.jpg" for number in range(20_000)]


@pytest.mark.parametrize(("val", "test"), [(0.1, 0.1), (0.02, 0.3), (0.0, 0.5), (0.2, 0.0)])
def test_fractions_are_those_asked_for_up_to_chance(val: float, test: float) -> None:
    splits = assign_splits(KEYS, val=val, test=test)
    for name, fraction in (("val", val), ("test", test), ("train", 1 - val - test)):
        spread = math.sqrt(len(KEYS) * fraction * (1 - fraction))
        assert abs((splits == name).sum() - len(KEYS) * fraction) <= 4 * spread


def test_each_class_is_cut_alike() -> None:
    splits = assign_splits(KEYS, val=0.1, test=0.1)
    for number in range(7):
        members = splits[number::7]
        spread = math.sqrt(len(members) * 0.1 * 0.9)
        assert abs((members == "test").sum() - len(members) * 0.1) <= 4 * spread


def test_a_key_stays_in_its_split_whatever_comes_with_it() -> None:
    alone = assign_splits(KEYS[:1000], val=0.1, test=0.1)
    together = assign_splits(KEYS, val=0.1, test=0.1)
    backwards = assign_splits(KEYS[::-1], val=0.1, test=0.1)
    assert np.array_equal(alone, together[:1000])
    assert np.array_equal(together, backwards[::-1])


def test_hashes_are_frozen() -> None:
    # Another hash would move images from one split to another: test images would be trained on.
    assert hash_keys(["a", "Ä/猫.png"], salt=SPLIT_SALT).tolist() == [
        12248141478906026769,
        14476403791522286335,
    ]
    assert assign_splits(["a", "b", "c", "d", "e", "f"], val=0.3, test=0.3).tolist() == [
        "train",
        "train",
        "train",
        "val",
        "test",
        "test",
    ]


def test_the_order_is_independent_of_the_split() -> None:
    split = hash_keys(KEYS, salt=SPLIT_SALT).astype(float)
    order = hash_keys(KEYS, salt=ORDER_SALT).astype(float)
    assert abs(np.corrcoef(split, order)[0, 1]) < 4 / math.sqrt(len(KEYS))


def test_no_key_has_no_split() -> None:
    assert assign_splits([], val=0.1, test=0.1).tolist() == []
