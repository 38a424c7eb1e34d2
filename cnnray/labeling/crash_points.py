"""Places where a test may kill the driver: each side of every step that another driver can see.

``CNNRAY_CRASH_AT=part.after_create:3`` ends the process by SIGKILL when the point is passed for the
third time. Without the variable a point costs a look into a dictionary.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

CRASH_POINTS = (
    "plan.after_pieces",
    "log.before_open",
    "log.after_open",
    "part.before_create",
    "part.after_create",
    "run.before_manifest",
    "run.after_manifest",
    "log.after_commit",
)

_passed: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """Die here, if the environment says so."""
    wanted, _, number = os.environ.get("CNNRAY_CRASH_AT", "").partition(":")
    if wanted != name:
        return
    assert name in CRASH_POINTS
    _passed[name] += 1
    if _passed[name] == int(number or 1):
        os.kill(os.getpid(), signal.SIGKILL)
