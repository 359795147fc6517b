"""How commands declare options and check them; imports nothing heavy, so that help answers at once.

Commands are frozen dataclasses; tyro makes the command line of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any

import tyro

from specdec.errors import ConfigError

Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]
"""A switch that is off unless it is named."""
N = tyro.conf.arg(metavar="N")
X = tyro.conf.arg(metavar="X")
_MOST = 2**31 - 1


def arg(metavar: str, default: str = "") -> Any:
    """How a value is called in the help, and what leaving it out means."""
    hint = f"(default: {default})" if default else ""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)


def each(metavar: str, default: str) -> tuple[Any, Any]:
    """The same for an option that may be given several times."""
    return tyro.conf.UseAppendAction, arg(metavar, f"{default}; repeatable")


def flag_of(name: str) -> str:
    """How an option is written on the command line."""
    return "--" + name.replace("_", "-")


def check_numbers(
    options: Any, least: Mapping[str, int], most: Mapping[str, int] | None = None
) -> None:
    """Refuses numbers out of range; None is none.

    Args:
        least: Smallest value by option; those that are not named are not looked at.
        most: Largest value, where it is not that of torch's counters.

    Raises:
        ConfigError: Names the option, its value, and what it may be.
    """
    for name, low in least.items():
        found, high = getattr(options, name), (most or {}).get(name, _MOST)
        for value in found if isinstance(found, tuple) else (found,):
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{flag_of(name)} must be from {low} to {high}, got {value}")


def check_repeats(options: Any) -> None:
    """Refuses an option that names something twice.

    Raises:
        ConfigError: Names it.
    """
    for field in fields(options):
        value = getattr(options, field.name)
        if isinstance(value, tuple) and len(set(value)) < len(value):
            twice = next(item for item in value if value.count(item) > 1)
            raise ConfigError(f"{flag_of(field.name)} names {twice!r} twice")
