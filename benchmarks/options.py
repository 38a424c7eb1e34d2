"""Flags that the benchmarks share, and the scratch folder that each one works in."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.harness import Contestant


def make_parser(description: str | None, *, repeats: int = 3) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="once, with little: a smoke test")
    parser.add_argument("--repeats", type=_positive, help=f"rounds ({repeats}; --short: 1)")
    parser.add_argument(
        "--only", metavar="TEXT", action="append", help="contestants with TEXT in their names"
    )
    parser.add_argument("--scratch", metavar="FOLDER", help="where to work (the system's)")
    parser.set_defaults(default_repeats=repeats)
    return parser


def add_count(
    parser: argparse.ArgumentParser, flag: str, *, full: int, short: int, what: str
) -> None:
    """A count with one default for the full form and one for the short form."""
    parser.add_argument(flag, type=_positive, help=f"{what} ({full:,}; --short: {short:,})")
    name = flag.removeprefix("--")
    parser.set_defaults(**{f"full_{name}": full, f"short_{name}": short})


def add_variants(parser: argparse.ArgumentParser) -> None:
    """``--variant NAME=FLAGS``: further contestants of cnnray's."""
    parser.add_argument(
        "--variant",
        metavar="NAME=FLAGS",
        type=_variant,
        action="append",
        default=[],
        help="one more cnnray, with more flags for its job: --variant 'b256=--batch_size 256'",
    )


def settle(options: argparse.Namespace) -> argparse.Namespace:
    """Fill in the defaults of the chosen form."""
    form = "short" if options.short else "full"
    options.repeats = options.repeats or (1 if options.short else options.default_repeats)
    for name in [name for name in vars(options) if name.startswith(f"{form}_")]:
        plain = name.removeprefix(f"{form}_")
        setattr(options, plain, getattr(options, plain) or getattr(options, name))
    return options


def select(contestants: Sequence[Contestant], only: Sequence[str] | None) -> list[Contestant]:
    """Those whose name holds one of the texts; all if there are none."""
    return [c for c in contestants if only is None or any(text in c.name for text in only)]


@contextlib.contextmanager
def scratch_folder(where: str | None) -> Iterator[Path]:
    """An empty folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="cnnray-bench-", dir=where) as folder:
        yield Path(folder)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be positive")
    return number


def _variant(text: str) -> tuple[str, list[str]]:
    name, has_flags, flags = text.partition("=")
    if not (name and has_flags):
        raise argparse.ArgumentTypeError(f"expected NAME=FLAGS, got {text!r}")
    return f"cnnray {name}", shlex.split(flags)
