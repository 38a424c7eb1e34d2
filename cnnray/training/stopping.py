"""When to give up: a function of the history alone, which is the same on all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cnnray.training.checkpoints import score


def has_stalled(
    history: Sequence[Mapping[str, Any]], *, patience: int | None, min_delta: float
) -> bool:
    """Whether ``patience`` epochs in a row have not lowered the best loss by ``min_delta`` or more.

    The loss is that of validation (of training without one). No patience, no end. Source: Prechelt
    1998, "Early stopping - but when?".
    """
    best, waited = math.inf, 0
    for result in history:
        loss = score(result)
        if loss < best and best - loss >= min_delta:
            best, waited = loss, 0
        else:
            waited += 1
    return patience is not None and waited >= patience
