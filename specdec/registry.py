"""Names of the drafting methods, imported only when asked for.

A method comes from here, from `register_drafter`, from a package with an entry point in the group
"specdec.drafters", or is named where it lies: "module:Class".
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from importlib import import_module
from importlib.metadata import entry_points
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from specdec.errors import ConfigError
from specdec.method_options import MethodOptions, Option, declared

if TYPE_CHECKING:  # names are checked before torch is imported
    from specdec.artifacts.places import Kind
    from specdec.contracts import Drafter

_BUILT_IN: Mapping[str, str] = {
    "none": "specdec.drafters.none:NoDraft",
    "lookahead": "specdec.drafters.lookahead:Lookahead",
    "jacobi": "specdec.drafters.jacobi:Jacobi",
    "prompt_lookup": "specdec.drafters.prompt_lookup:PromptLookup",
    "suffix": "specdec.drafters.suffix:Suffix",
    "draft_model": "specdec.drafters.draft_model.drafter:DraftModel",
    "eagle3": "specdec.drafters.head:Eagle3",
    "recycling": "specdec.drafters.recycling:Recycling",
}
_GROUP = "specdec.drafters"
_PLACE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class NoOptions:
    """Configuration of a registered drafter that declares none."""


class Registry:
    """Maps a method name to a drafter class. The class takes its `Config` as only argument."""

    def __init__(self, built_in: Mapping[str, str]) -> None:
        self._built_in = dict(built_in)
        self._entries: dict[str, str | Callable[[Any], Drafter]] = dict(built_in)
        self._loaded: dict[str, Callable[[Any], Drafter]] = {}  # from packages and places
        self._knows_packages = False

    def names(self) -> list[str]:
        """All method names, those of installed packages last."""
        if not self._knows_packages:
            self._knows_packages = True
            for entry in entry_points(group=_GROUP):
                if entry.name.isidentifier():
                    self._entries.setdefault(entry.name, entry.value)
        return list(self._entries)

    def register(
        self, name: str, drafter: Callable[[Any], Drafter] | EllipsisType = ...
    ) -> Callable[[Any], Any]:
        """Adds a method, or replaces one that was added before.

        Args:
            name: An identifier, as `--method` and the arms of a benchmark write it.
            drafter: Makes a drafter from its `Config`, a dataclass; without one, from `NoOptions`.
                Left out where this decorates the class.

        Raises:
            ConfigError: The name is built in or no identifier, or the drafter no such thing.
        """
        if not isinstance(name, str) or not name.isidentifier():
            raise ConfigError(
                f"a method's name is an identifier, for example 'my_drafter', got {name!r:.80}"
            )
        if name in self._built_in:
            raise ConfigError(f"method {name!r} is built in; choose another name")
        if isinstance(drafter, EllipsisType):
            return lambda decorated: self.register(name, decorated)
        self._entries[name] = _checked(name, drafter)
        return drafter

    def unregister(self, name: str) -> None:
        """Removes a method that was registered at run time."""
        if name in self._built_in:
            raise ConfigError(f"method {name!r} is built in")
        self._entries.pop(name, None)

    def require(self, name: str) -> None:
        """Raises `ConfigError` for a name that nobody registered, and imports nothing."""
        if name not in self._entries and name not in self.names() and not _PLACE.fullmatch(name):
            known = ", ".join(self.names())
            raise ConfigError(
                f"unknown method {name!r:.80}; choose one of {known}, or name a class of your own "
                "as module:Class"
            )

    def load(self, name: str) -> Callable[[Any], Drafter]:
        """The drafter class of a method; raises `ConfigError` for one that cannot be had."""
        self.require(name)
        entry = self._entries.get(name, name)
        if not isinstance(entry, str):
            return entry
        if name not in self._built_in:
            if name not in self._loaded:
                self._loaded[name] = _checked(name, _imported(name, entry))
            return self._loaded[name]
        module, attribute = entry.split(":")
        loaded: Callable[[Any], Drafter] = getattr(import_module(module), attribute)
        return loaded

    def configure(self, name: str, options: Mapping[str, Any]) -> Any:
        """The method's validated configuration; raises `ConfigError` for unknown options."""
        config_class = getattr(self.load(name), "Config", NoOptions)
        known = self.options(name)
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ConfigError(
                f"method {name!r} has no option {unknown[0]!r}; it has "
                f"{', '.join(known) if known else 'none'}"
            )
        if not issubclass(config_class, MethodOptions):  # those check themselves
            for option, value in options.items():
                known[option].check(value)
        try:
            return config_class(**options)
        except TypeError as problem:  # a required option is missing
            raise ConfigError(f"method {name!r}: {problem}") from problem

    def options(self, name: str) -> Mapping[str, Option]:
        """The options that a method declares, by name."""
        return declared(getattr(self.load(name), "Config", NoOptions))

    def device_defaults(self, name: str, on_cpu: bool) -> Mapping[str, Any]:
        """What options that are left out mean on a device, where that depends on it."""
        config = getattr(self.load(name), "Config", None)
        if isinstance(config, type) and issubclass(config, MethodOptions):
            return config.device_defaults(on_cpu)
        return {}

    def sampling_option(self, name: str) -> str | None:
        """The switch among a method's options that makes it sample its drafts, if it has one."""
        option = getattr(self.load(name), "sampling_option", None)
        return option if isinstance(option, str) else None

    def samples_drafts(self, name: str, options: Mapping[str, Any]) -> bool:
        """Whether the method samples its drafts, by its class and by the switch of its options."""
        option = self.sampling_option(name)
        if option is None:
            return False
        return getattr(self.configure(name, options), option, False) is True

    def draft_kind(self, name: str) -> Kind | None:
        """What the method's option `draft` names, by its class; None for drafts from text alone."""
        return getattr(self.load(name), "draft_kind", None)

    def cpu_sizes(self, name: str) -> Mapping[str, Any]:
        """Options for where every node of a forward costs, by the method's class."""
        return getattr(self.load(name), "cpu_sizes", {})

    def priors(self, name: str) -> Sequence[tuple[Mapping[str, Any], float]]:
        """Some sizes of the method with the tokens a forward that they emit, by its class."""
        return getattr(self.load(name), "priors", ())

    def create(self, name: str, options: Mapping[str, Any]) -> Drafter:
        """A fresh drafter for one call; raises `ConfigError` as `configure` does."""
        return self.load(name)(self.configure(name, options))


def _checked(name: str, drafter: Any) -> Callable[[Any], Drafter]:
    config = getattr(drafter, "Config", NoOptions)
    if not callable(drafter) or not (isinstance(config, type) and is_dataclass(config)):
        raise ConfigError(
            f"method {name!r} needs a class that takes its Config, a dataclass, got {drafter!r:.80}"
        )
    return drafter  # type: ignore[no-any-return]


def _imported(name: str, place: str) -> Any:
    """The class at "module:Class"; modules are looked for in the working directory, too."""
    module, attribute = place.split(":")
    path = sys.path.copy()
    sys.path.insert(0, "")
    try:
        return getattr(import_module(module), attribute)
    except Exception as problem:  # whatever foreign code raises
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise ConfigError(f"cannot load method {name!r:.80}: {reason}") from problem
    finally:
        sys.path[:] = path


methods = Registry(_BUILT_IN)
"""The methods that `augment`, the command line and the law suite know."""

register_drafter = methods.register
