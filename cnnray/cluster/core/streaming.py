"""Ray Data as cnnray uses it: its settings, its bounds, its errors, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stage:
    """A pool of actors of one kind: how each is made, how many there may be, what each reserves.

    ``actor`` is a class; an actor is called with a table and returns one. The pool begins with
    ``min_workers`` and grows up to ``max_workers`` while there is work for more.
    """

    actor: type
    arguments: dict[str, Any]
    min_workers: int
    max_workers: int
    num_cpus: float
    num_gpus: float = 0.0
