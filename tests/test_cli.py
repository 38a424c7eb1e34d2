"""run_job() as a process: what is on stdout, what on stderr, and the exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cnnray import errors
from cnnray.config import DemoSettings

Run = Callable[..., "subprocess.CompletedProcess[str]"]

SCRIPT = """
import logging, os, sys, threading, time
from cnnray import errors
from cnnray.cli import run_job
from cnnray.config import DemoSettings

def job(settings):
{body}

if __name__ == "__main__":
    run_job(DemoSettings, job)
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a job with this body as a process."""

    def run_script(body: str, *flags: str) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "job.py"
        indented = "\n".join(f"    {line}" for line in body.splitlines())
        script.write_text(SCRIPT.format(body=indented))
        return subprocess.run(
            [sys.executable, str(script), *flags],
            capture_output=True,
            text=True,
            timeout=30,
            cwd=Path(__file__).parents[1],
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[1])},
        )

    return run_script


def test_stdout_holds_the_result_alone_even_when_the_job_prints(run: Run) -> None:
    done = run("print('chatter')\nreturn {'accuracy': 0.5, 'name': 'Ä', 'n': settings.epochs}")
    assert done.returncode == 0
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"accuracy": 0.5, "name": "Ä", "n": DemoSettings().epochs}
    ]
    assert "chatter" in done.stderr


def test_the_result_is_the_last_line_when_a_child_process_writes_to_stdout(run: Run) -> None:
    done = run("os.system('echo from a child')\nreturn {'done': True}")
    assert json.loads(done.stdout.splitlines()[-1]) == {"done": True}


def test_flags_reach_the_job(run: Run) -> None:
    done = run("return {'epochs': settings.epochs}", "--epochs", "3")
    assert json.loads(done.stdout) == {"epochs": 3}


def test_the_log_goes_to_stderr(run: Run) -> None:
    body = "logging.getLogger('cnnray.x').info('halfway')\nlogging.info('of others')\nreturn {}"
    done = run(body)
    assert "halfway" in done.stderr
    assert "of others" not in done.stderr
    assert json.loads(done.stdout) == {}


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("CnnrayError", 1),
        ("UsageError", 2),
        ("SettingsError", 2),
        ("DataError", 2),
        ("ModelError", 2),
        ("StorageError", 2),
        ("MissingObjectError", 2),
        ("AlreadyExistsError", 2),
        ("TooManyBadImagesError", 3),
        ("IncompleteError", 4),
        ("ConflictError", 5),
        ("NonFiniteLossError", 6),
    ],
)
def test_each_error_has_its_exit_code(name: str, code: int) -> None:
    assert getattr(errors, name)("it failed").exit_code == code


@pytest.mark.parametrize("name", ["CnnrayError", "TooManyBadImagesError", "NonFiniteLossError"])
def test_an_error_ends_the_process_in_its_message_and_its_exit_code(run: Run, name: str) -> None:
    done = run(f"raise errors.{name}('it failed', hint='try this')")
    assert done.returncode == getattr(errors, name).exit_code
    assert done.stderr == "error: it failed\nhint: try this\n"
    assert done.stdout == ""


def test_the_result_of_an_error_is_printed(run: Run) -> None:
    done = run("raise errors.IncompleteError('two parts are left', result={'parts': 7})")
    assert done.returncode == 4
    assert json.loads(done.stdout) == {"parts": 7}
    assert done.stderr == "error: two parts are left\n"


def test_a_wrong_flag_is_two_lines_and_exit_code_2(run: Run) -> None:
    done = run("return {}", "--epoch", "3")
    assert done.returncode == 2
    assert done.stderr == "error: unknown flag --epoch\nhint: did you mean epochs?\n"


def test_an_unexpected_exception_leaves_a_traceback_and_exit_code_1(run: Run) -> None:
    done = run("return 1 / 0")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize(
    ("ending", "code"),
    [("return {}", 0), ("1 / 0", 1), ("raise errors.DataError('x')", 2), ("return {1j: 0}", 1)],
)
def test_a_thread_that_never_ends_does_not_hold_the_process(
    run: Run, ending: str, code: int
) -> None:
    done = run(f"threading.Thread(target=time.sleep, args=(600,)).start()\n{ending}")
    assert done.returncode == code


def test_a_result_that_is_not_json_is_no_success(run: Run) -> None:
    done = run("return {'loss': float('nan')}")
    assert done.returncode == 1
    assert done.stdout == ""


HOSTILE = "\x1b]0;pwned\x07\x1b[2J\r\x9b31m\x7f\u202egpj.exe"
"""A file name that sets the title of a terminal, clears it, paints it, and reads backwards."""
ESCAPED = r"\x1b]0;pwned\x07\x1b[2J\r\x9b31m\x7f\u202egpj.exe"


def test_a_hostile_name_in_an_error_is_escaped_and_its_hint_keeps_its_line(run: Run) -> None:
    done = run(f"raise errors.DataError('no image: ä/' + {HOSTILE!r}, hint='remove it')")
    assert done.returncode == 2
    assert done.stderr == f"error: no image: ä/{ESCAPED}\nhint: remove it\n"


def test_a_hostile_name_in_the_log_is_escaped(run: Run) -> None:
    done = run(f"logging.getLogger('cnnray').info('ä %s\\tx', {HOSTILE!r})\nreturn {{}}")
    assert done.stderr.endswith(f" I ä {ESCAPED}\tx\n")


def test_a_hostile_name_in_a_traceback_is_escaped(run: Run) -> None:
    done = run(f"raise OSError({HOSTILE!r})")
    assert done.stderr.endswith(f"OSError: {ESCAPED}\n")
    assert "\x1b" not in done.stderr
    assert done.stderr.startswith("Traceback (most recent call last):\n")


def test_a_hostile_name_in_the_result_is_escaped_as_json(run: Run) -> None:
    done = run(f"return {{'name': 'ä/' + {HOSTILE!r}}}")
    assert json.loads(done.stdout) == {"name": f"ä/{HOSTILE}"}
    assert done.stdout.rstrip("\n").isprintable()


def test_an_interrupted_job_says_so_without_a_traceback(run: Run) -> None:
    done = run("raise KeyboardInterrupt")
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


def test_help_names_the_job_its_flags_and_their_defaults(run: Run) -> None:
    done = run("return {}", "--help")
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    assert "Run the whole path on the handwritten digits" in text
    assert f"passes over the training split (default: {DemoSettings().epochs})" in text
    assert "seconds between two progress lines in a log (default: 10.0)" in text
