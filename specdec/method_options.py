"""Options of a drafting method, declared once: a frozen dataclass with types and ranges.

    @dataclass(frozen=True)
    class LookupConfig(MethodOptions):
        max_ngram: Annotated[int, Range(1, 64, tries=(2, 3, 4, 6))] = 4

The class checks itself, the command line converts its text by the same types, and
`specdec bench tune` tries the same values. Knows no method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from specdec.errors import ConfigError

_WORDS = {"true": True, "yes": True, "false": False, "no": False}


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers that an option takes, and those that a tuner tries.

    Attributes:
        least: Smallest number that is accepted.
        most: The largest, itself included.
        tries: In rising order; empty where there is nothing to tune.
    """

    least: float
    most: float = math.inf
    tries: tuple[Any, ...] = ()

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and self.least <= value <= self.most

    def __str__(self) -> str:
        end = "on" if math.isinf(self.most) else f"to {self.most:,}"
        return f"from {self.least:,} {end}"


@dataclass(frozen=True, slots=True)
class Option:
    """One declared option.

    Attributes:
        name: Of the field, with underscores.
        types: What it may be; empty where anything is taken.
        range: Of a number, or None.
        required: Whether it has no default.
        default: Value where none is given; meaningless for a required option.
    """

    name: str
    types: tuple[type, ...]
    range: Range | None
    required: bool
    default: Any = None

    def check(self, value: Any) -> None:
        """Raises `ConfigError` for a value that the option does not take."""
        numbers = {int, float} & set(self.types)
        if not ({bool, *numbers} & set(self.types)) or (value is None and NoneType in self.types):
            return
        if isinstance(value, bool):
            fits = bool in self.types
        elif hasattr(value, "__index__"):
            fits = bool(numbers)
        else:
            fits = float in numbers and isinstance(value, float)
        if not fits or (self.range is not None and value not in self.range):
            raise ConfigError(f"option {self.name} must be {self.wanted}, got {value!r:.60}")

    @property
    def wanted(self) -> str:
        """What it takes, in words."""
        what = "true or false"
        if {int, float} & set(self.types):
            what = "a number" if float in self.types else "a whole number"
            what = f"{what} {self.range}" if self.range is not None else what
        return f"{what}, or none" if NoneType in self.types else what

    def read(self, text: str) -> Any:
        """The value that a command line means; text where the type is none of the simple ones.

        Raises:
            ConfigError: It is not of the option's type.
        """
        if NoneType in self.types and text.lower() == "none":
            return None
        if bool in self.types and text.lower() in _WORDS:
            return _WORDS[text.lower()]
        for kind in (int, float):
            if kind in self.types:
                try:
                    return kind(text)
                except ValueError:
                    continue
        if {bool, int, float} & set(self.types):
            raise ConfigError(f"option {self.name} must be {self.wanted}, got {text!r:.60}")
        return text


class MethodOptions:
    """Base of a method's options: types and ranges are checked when it is made."""

    def __post_init__(self) -> None:
        """Checks every option, then all of them together."""
        own: Any = type(self)
        for option in declared(own).values():
            option.check(getattr(self, option.name))
        self.check()

    def check(self) -> None:
        """Checks what options must be together; raises `ConfigError`."""

    @classmethod
    def device_defaults(cls, on_cpu: bool) -> Mapping[str, Any]:
        """Options whose default is None because it depends on the device, and what it is there."""
        return {}


@cache
def declared(config: type) -> Mapping[str, Option]:
    """The options of a method's `Config`, a dataclass, by name."""
    found = {}
    hints = get_type_hints(config, include_extras=True)
    for field in fields(config):
        hint, limits = hints[field.name], None
        if get_origin(hint) is Annotated:
            hint, *extras = get_args(hint)
            limits = next((extra for extra in extras if isinstance(extra, Range)), None)
        types = tuple(kind for kind in get_args(hint) or (hint,) if isinstance(kind, type))
        required = field.default is MISSING and field.default_factory is MISSING
        found[field.name] = Option(field.name, types, limits, required, field.default)
    return found
