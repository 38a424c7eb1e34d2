"""Which step and which samples a loss that is not finite came from, without a wait each step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cnnray.datasets.order import Batch
from cnnray.errors import NonFiniteLossError

Reduce = Callable[[Tensor], Tensor]

HINT = "lower --optimizer.lr, or warm up"
MAX_KEYS = 20
"""Keys that a message names."""
MAX_KEY_CHARACTERS = 160
SLOT_BYTES = 4 * MAX_KEYS * (MAX_KEY_CHARACTERS + 1)
"""Room for one rank's keys: UTF-8 takes up to four bytes a character."""


@dataclass(frozen=True)
class Ranks:
    """What a rank knows of the others; ``reduce`` adds a tensor over all, the same on each."""

    rank: int
    num_workers: int
    reduce: Reduce


class LossWatch:
    """Remembers the losses of the last ``steps`` steps, on the device, and their samples' keys."""

    def __init__(self, *, steps: int) -> None:
        self.recent: deque[tuple[int, npt.NDArray[np.object_], Tensor]] = deque(maxlen=steps)

    def add(self, step: int, batch: Batch, losses: Tensor) -> None:
        """Take note of this rank's part of a step, ``losses`` (B,) in the order of the batch."""
        self.recent.append((step, batch["key"], losses))

    def failure(self, ranks: Ranks) -> NonFiniteLossError:
        """The first step whose loss is not finite, and its samples; the same on every rank."""
        bad_here = torch.stack([(~losses.isfinite()).sum() for _, _, losses in self.recent])
        bad = ranks.reduce(bad_here.double())  # (steps,)
        first = int((bad > 0).int().argmax())
        step, keys, losses = self.recent[first]
        culprits = keys[~losses.isfinite().cpu().numpy()][:MAX_KEYS]
        named = share_lines([_shown(str(key)) for key in culprits], ranks, device=bad.device)
        count = int(bad[first])
        named = named[:MAX_KEYS] + ["…"] * (count > MAX_KEYS)
        return NonFiniteLossError(
            f"the loss is not finite at step {step}, for {count} of its samples: "
            + ", ".join(named),
            hint=HINT,
        )


def share_lines(lines: Iterable[str], ranks: Ranks, *, device: torch.device) -> list[str]:
    """The lines of all ranks, rank after rank; those of one rank are ``SLOT_BYTES`` at most."""
    slots = torch.zeros(ranks.num_workers, SLOT_BYTES, dtype=torch.uint8, device=device)
    data = "\n".join(lines).encode()
    slots[ranks.rank, : len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    texts = (bytes(slot).rstrip(b"\0").decode() for slot in ranks.reduce(slots).tolist())
    return [line for text in texts for line in text.splitlines()]


def _shown(key: str) -> str:
    text = repr(key)  # controls and what else cannot be printed are escaped
    return text if len(text) <= MAX_KEY_CHARACTERS else text[: MAX_KEY_CHARACTERS - 1] + "…"
