"""How a job ends on a signal."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest

from cnnray.errors import IncompleteError
from cnnray.process import stop_on_sigterm


def test_a_stop_gets_through_a_library_that_goes_on_after_any_exception():
    def work() -> None:
        with contextlib.suppress(Exception):
            os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the stop was swallowed")

    with pytest.raises(IncompleteError, match="stopped by SIGTERM"), stop_on_sigterm():
        work()


def test_an_interrupt_stays_an_interrupt():
    with pytest.raises(KeyboardInterrupt), stop_on_sigterm():
        raise KeyboardInterrupt
