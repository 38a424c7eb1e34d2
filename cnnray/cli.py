"""run_job(): argv and YAML → settings → job → one JSON line on stdout, log on stderr, exit code."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from cnnray.config import Settings, load_settings
from cnnray.errors import CnnrayError

logger = logging.getLogger("cnnray")

Job = Callable[[Settings], Mapping[str, Any]]


def run_job(
    settings_class: type[Settings], job: Job[Settings] | str, argv: Sequence[str] | None = None
) -> NoReturn:
    """Run a job as a process: the last line of stdout is its result, a JSON object.

    A job given as ``module:function`` is imported only once the settings are right: torch and Ray
    take seconds to import, and a mistyped flag should not.

    A ``CnnrayError`` ends in its message and exit code, without a traceback; results that an error
    carries in ``result`` are printed all the same.

    Messages may name files as a stranger has named them, so what a terminal would obey is escaped.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _set_up_log()
    try:
        settings = load_settings(settings_class, arguments)
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result alone
            run = pkgutil.resolve_name(job) if isinstance(job, str) else job
            result = run(settings)
        _print_result(result)
    except CnnrayError as error:
        _print_result(error.result)
        print(_printable(f"error: {error}"), file=sys.stderr)  # noqa: T201
        _exit(error.exit_code)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)  # noqa: T201
        _exit(130)
    except Exception:
        # A bug, not a user's mistake; the process must end all the same.
        print(_printable(traceback.format_exc()), end="", file=sys.stderr)  # noqa: T201
        _exit(1)
    _exit(0)


class _PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _printable(super().format(record))


def _set_up_log() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _PrintableFormatter("%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S")
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logger.setLevel(logging.INFO)


def _printable(text: str) -> str:
    """Lines without control characters, which are escaped; line breaks and tabs are kept."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text
    )


def _print_result(result: Mapping[str, Any] | None) -> None:
    if result is not None:
        line = json.dumps(result, ensure_ascii=False, allow_nan=False)
        # JSON lets DEL and the control characters beyond ASCII be as they are.
        safe = "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in line)
        print(safe, flush=True)  # noqa: T201


def _exit(code: int) -> NoReturn:
    """End the process at once: threads of clients that linger must not hold a finished job."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
