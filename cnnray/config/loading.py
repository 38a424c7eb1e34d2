"""Settings from the command line and a YAML file; unknown names are refused with a suggestion."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from cnnray.config.jobs import JobSettings
from cnnray.errors import SettingsError

Settings = TypeVar("Settings", bound=JobSettings)

MAX_SHOWN = 400
"""Characters of a wrong value that a message repeats."""


def load_settings(settings_class: type[Settings], argv: Sequence[str]) -> Settings:
    """Settings from flags over ``--config FILE.yaml`` over defaults. Raises ``SettingsError``."""
    config_path, flags = _take_config_flag(argv)
    known = set(_setting_names(settings_class))
    for flag in flags:
        if flag.startswith("--"):
            _check_known(flag[2:].split("=", 1)[0], known, kind="flag --")
    values = {} if config_path is None else _read_yaml(config_path, known)
    try:
        return settings_class(_cli_parse_args=list(flags), **values)
    except ValidationError as error:
        raise SettingsError(_first_problem(error), hint="see --help") from None
    except Exception as error:
        if type(error).__name__ != "SettingsError":
            raise
        text = " ".join(str(error).replace("error parsing CLI: ", "").split())
        raise SettingsError(_shortened(text), hint="see --help") from None


def build_settings(
    settings_class: type[Settings], values: Mapping[str, Any], *, where: str
) -> Settings:
    """Settings from nested values alone. Raises ``SettingsError``, which names ``where``."""
    try:
        return settings_class(**values)
    except ValidationError as error:
        raise SettingsError(f"{where}: {_first_problem(error)}") from None


def check_names(settings_class: type[JobSettings], names: Iterable[str], *, where: str) -> None:
    """Raise ``SettingsError`` for a dotted name that no setting has."""
    known = set(_setting_names(settings_class))
    for name in names:
        _check_known(name, known, kind="setting ", where=f" in {where}")


def _take_config_flag(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    path, flags = None, []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--config":
            path = next(arguments, None)
            if path is None:
                raise SettingsError("--config needs a file")
        elif argument.startswith("--config="):
            path = argument.removeprefix("--config=")
        else:
            flags.append(argument)
    return path, flags


def _read_yaml(path: str, known: set[str]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of dates, of nesting
        raise SettingsError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(
            f"{path}: settings are 'name: value' lines, found {type(values).__name__}"
        )
    for name in _dotted(values):
        _check_known(name, known, kind="setting ", where=f" in {path}")
    return values


def _dotted(values: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _setting_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _setting_names(field.annotation, f"{prefix}{name}.")


def _check_known(name: str, known: set[str], *, kind: str, where: str = "") -> None:
    plain = name.removeprefix("no-") if name.startswith("no-") else name
    if plain in known or name == "help":
        return
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:  # "--lr" for "--optimizer.lr"
        close = [full for full in sorted(known) if full.rsplit(".", 1)[-1] == name][:1]
    raise SettingsError(
        f"unknown {kind}{_shortened(name)}{where}",
        hint=f"did you mean {close[0]}?" if close else "see --help",
    )


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"--{name} is required"
    message = problem["msg"].removeprefix("Value error, ")
    if not name:
        return message
    return f"--{name}: {message}, got {_shortened(repr(problem['input']))}"


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"
