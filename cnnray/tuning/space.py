"""The search space of ``tune``: dotted names of settings, each with the values it may take.

model.name: [tutorial_cnn, resnet18]                 one of
optimizer.lr: {min: 0.0003, max: 0.01, log: true}    a number between, evenly in its logarithm
augment.policy_magnitude: {min: 3, max: 12}          whole, since both ends are
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from cnnray.errors import SettingsError

Point = dict[str, Any]
"""Dotted names of settings and their values; what it does not name is the default."""

MAX_TRIES = 200
"""Draws in a row that may repeat earlier points before a space counts as exhausted."""


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]

    def describe(self) -> str:
        """The values as people write them."""
        return json.dumps(self.values, ensure_ascii=False)

    def sample(self, rng: np.random.Generator) -> Any:
        """One of them, all alike."""
        return self.values[int(rng.integers(len(self.values)))]


@dataclass(frozen=True)
class Range:
    """A number from ``low`` to ``high``, both included."""

    low: float
    high: float
    is_log: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether only whole numbers are meant: both ends were written as such."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def describe(self) -> str:
        """The ends as people write them."""
        return f"{self.low} to {self.high}" + (", log" if self.is_log else "")

    def sample(self, rng: np.random.Generator) -> float | int:
        """A number, even in itself or in its logarithm; floats with four significant digits."""
        if self.is_log:
            value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        elif self.is_whole:
            return int(rng.integers(int(self.low), int(self.high), endpoint=True))
        else:
            value = rng.uniform(self.low, self.high)
        return round(value) if self.is_whole else tidy(value)


Space = dict[str, Choice | Range]


def tidy(value: float | int) -> float | int:
    """A number as people would write it: whole, or with four significant digits."""
    return value if isinstance(value, int) else float(f"{value:.4g}")


def parse_space(text: str, *, where: str) -> Space:
    """The space that a YAML text describes. Raises ``SettingsError``, which names ``where``."""
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of dates, of nesting
        raise SettingsError(f"{where} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict) or not document:
        raise SettingsError(f"{where}: a space is 'setting: values' lines", hint=EXAMPLE)
    return {str(name): _dimension(name, values, where) for name, values in document.items()}


EXAMPLE = "such as 'optimizer.lr: {min: 0.0003, max: 0.01, log: true}' or 'model.name: [a, b]'"


def _dimension(name: str, values: Any, where: str) -> Choice | Range:
    if isinstance(values, list) and values:
        return Choice(tuple(values))
    if isinstance(values, dict) and {"min", "max"} <= set(values) <= {"min", "max", "log"}:
        low, high, is_log = _number(values["min"]), _number(values["max"]), values.get("log", False)
        if low < high and isinstance(is_log, bool) and (low > 0 or not is_log):
            return Range(low, high, is_log)
    raise SettingsError(f"{where}: {name} has no values to choose from: {values!r}", hint=EXAMPLE)


def _number(value: Any) -> float | int:
    """A finite number, or NaN, which is in no order. YAML takes 1e-3, without a dot, for text."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else math.nan


def grid(space: Space) -> list[Point]:
    """All combinations, the last setting varying fastest. Raises ``SettingsError`` for ranges."""
    for name, dimension in space.items():
        if isinstance(dimension, Range):
            raise SettingsError(
                f"a grid needs a list of values for {name}, found a range",
                hint="list its values, or leave out --search grid",
            )
    values = [dimension.values for dimension in space.values() if isinstance(dimension, Choice)]
    return [
        dict(zip(space, combination, strict=True)) for combination in itertools.product(*values)
    ]


def random_points(space: Space, *, seed: int) -> Iterator[Point]:
    """Points drawn at random, none twice, until the space seems exhausted.

    The n-th is the same however many are asked for.
    """
    rng = np.random.default_rng(seed)
    seen: set[str] = set()
    repeated = 0
    while repeated < MAX_TRIES:
        point = {name: dimension.sample(rng) for name, dimension in space.items()}
        name = point_name(point)
        repeated = repeated + 1 if name in seen else 0
        if name not in seen:
            seen.add(name)
            yield point


def point_name(point: Mapping[str, Any]) -> str:
    """A name for a point: the same for the same settings, in any order."""
    text = json.dumps(point, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def describe(point: Mapping[str, Any]) -> str:
    """A point as people write it: ``optimizer.lr 0.003, model.name resnet18``."""
    return ", ".join(f"{name} {value}" for name, value in point.items()) or "the settings as given"


def describe_space(space: Space) -> list[str]:
    """Each setting with its values, one line a setting; other values give another line."""
    return [f"{name}: {values.describe()}" for name, values in space.items()]


def merge(settings: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with a point's values in their places; a mapping changes what it names."""
    merged = dict(settings)
    for name, value in point.items():
        section, _, rest = name.partition(".")
        if rest:
            merged[section] = merge(merged[section], {rest: value})
        elif isinstance(value, Mapping):
            merged[section] = {**merged[section], **value}
        else:
            merged[section] = value
    return merged
