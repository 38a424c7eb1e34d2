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
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        _exit(error.exit_code)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)  # noqa: T201
        _exit(130)
    except Exception:
        traceback.print_exc()  # a bug, not a user's mistake; the process must end all the same
        _exit(1)
    _exit(0)


def _set_up_log() -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.WARNING,
        format="%(asctime)s %(levelname).1s %(message)s",
        datefmt="%H:%M:%S",
    )
    logger.setLevel(logging.INFO)


def _print_result(result: Mapping[str, Any] | None) -> None:
    if result is not None:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False), flush=True)  # noqa: T201


def _exit(code: int) -> NoReturn:
    """End the process at once: threads of clients that linger must not hold a finished job."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
