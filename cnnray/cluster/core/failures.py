"""What went wrong, out of the errors that Ray wraps it in."""

from __future__ import annotations

import re

from cnnray.errors import CnnrayError

RETRY_ADVICE = re.compile(r"\nFailed to apply UDF transform after \d+/\d+ attempts.*", re.DOTALL)
"""What Ray Data appends to the text of an exception that it may retry."""


def find_cause(error: BaseException) -> CnnrayError | None:
    """The cnnray error that a Ray error wraps, however deep, or None."""
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        current = waiting.pop()
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, CnnrayError):
            return _plain(current)
        waiting += [current.__cause__, current.__context__, getattr(current, "cause", None)]
        failures = getattr(current, "worker_failures", None) or {}
        waiting += [*failures.values(), getattr(current, "controller_failure", None)]
    return None


def _plain(error: CnnrayError) -> CnnrayError:
    """The error without the remote traceback and the advice that Ray adds to its text."""
    text = RETRY_ADVICE.sub("", str(getattr(error, "cause", error)))
    if text == str(error):
        return error
    for kind in type(error).__mro__:
        if issubclass(kind, CnnrayError) and kind.__module__ == "cnnray.errors":
            return kind(text)
    return error


def last_line(error: BaseException) -> str:
    """One line that says what happened: a task's own exception, or the end of a Ray error's text.

    (Ray Data adds advice of its own below the traceback of a task.)
    """
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return f"{type(cause).__name__}: {cause}".splitlines()[0]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def alone(error: BaseException) -> BaseException:
    """The error without traceback and causes: their frames hold the actors of what failed.

    Ray ends an actor, and frees its CPUs and GPUs, when nothing refers to it any more. What
    happened in a worker is in the text of its error.
    """
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
