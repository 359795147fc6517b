"""Names of the drafting methods; a new one is one line here, imported only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields, is_dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from specdec.errors import ConfigError

if TYPE_CHECKING:  # names are checked before torch is imported
    from specdec.drafters.base import Drafter

_BUILT_IN: Mapping[str, str] = {
    "none": "specdec.drafters.none:NoDraft",
    "lookahead": "specdec.drafters.lookahead:Lookahead",
    "jacobi": "specdec.drafters.jacobi:Jacobi",
    "prompt_lookup": "specdec.drafters.prompt_lookup:PromptLookup",
    "suffix": "specdec.drafters.suffix:Suffix",
    "draft_model": "specdec.drafters.draft_model:DraftModel",
    "eagle3": "specdec.drafters.eagle3:Eagle3",
    "recycling": "specdec.drafters.recycling:Recycling",
}


@dataclass(frozen=True)
class NoOptions:
    """Configuration of a registered drafter that declares none."""


def _check_type(method: str, option: Field[Any], options: Mapping[str, Any]) -> None:
    """Integers must be integers, and switches switches; both would fail late otherwise."""
    value = options.get(option.name)
    is_switch, is_integer = isinstance(value, bool), hasattr(value, "__index__")
    wrong = (option.type in ("int", int) and (is_switch or not is_integer)) or (
        option.type in ("bool", bool) and not is_switch
    )
    if option.name in options and wrong:
        raise ConfigError(
            f"option {option.name!r} of method {method!r} must be {option.type}, got {value!r}"
        )


class Registry:
    """Maps a method name to a drafter class. The class takes its `Config` as only argument."""

    def __init__(self, built_in: Mapping[str, str]) -> None:
        self._entries: dict[str, str | Callable[[Any], Drafter]] = dict(built_in)

    def names(self) -> list[str]:
        """All method names."""
        return list(self._entries)

    def register(self, name: str, drafter: Callable[[Any], Drafter]) -> None:
        """Adds a method, or replaces one that was added before.

        Args:
            name: An identifier, as `--method` and the arms of a benchmark write it.
            drafter: Makes a drafter from its `Config`, a dataclass; without one, from `NoOptions`.

        Raises:
            ConfigError: The name is built in or no identifier, or the drafter no such thing.
        """
        if not isinstance(name, str) or not name.isidentifier():
            raise ConfigError(
                f"a method's name is an identifier, for example 'my_drafter', got {name!r:.80}"
            )
        if isinstance(self._entries.get(name), str):
            raise ConfigError(f"method {name!r} is built in; choose another name")
        config = getattr(drafter, "Config", NoOptions)
        if not callable(drafter) or not (isinstance(config, type) and is_dataclass(config)):
            raise ConfigError(
                f"method {name!r} needs a class that takes its Config, a dataclass, got "
                f"{drafter!r:.80}"
            )
        self._entries[name] = drafter

    def unregister(self, name: str) -> None:
        """Removes a method that was registered at run time."""
        if isinstance(self._entries.get(name), str):
            raise ConfigError(f"method {name!r} is built in")
        self._entries.pop(name, None)

    def require(self, name: str) -> None:
        """Raises `ConfigError` for a name that nobody registered, and imports nothing."""
        if name not in self._entries:
            known = ", ".join(self.names())
            raise ConfigError(f"unknown method {name!r:.80}; choose one of {known}")

    def load(self, name: str) -> Callable[[Any], Drafter]:
        """The drafter class of a method; raises `ConfigError` for an unknown name."""
        self.require(name)
        entry = self._entries[name]
        if isinstance(entry, str):
            module, attribute = entry.split(":")
            loaded: Callable[[Any], Drafter] = getattr(import_module(module), attribute)
            return loaded
        return entry

    def configure(self, name: str, options: Mapping[str, Any]) -> Any:
        """The method's validated configuration; raises `ConfigError` for unknown options."""
        config_class = getattr(self.load(name), "Config", NoOptions)
        known = [f.name for f in fields(config_class)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ConfigError(
                f"method {name!r} has no option {unknown[0]!r}; it has "
                f"{', '.join(known) if known else 'none'}"
            )
        for option in fields(config_class):
            _check_type(name, option, options)
        try:
            return config_class(**options)
        except TypeError as problem:  # a required option is missing
            raise ConfigError(f"method {name!r}: {problem}") from problem

    def samples_drafts(self, name: str, config: Any) -> bool:
        """Whether the method samples its drafts, by its class and by the switch of its options."""
        option = getattr(self.load(name), "sampling_option", None)
        return isinstance(option, str) and getattr(config, option, False) is True

    def create(self, name: str, config: Any) -> Drafter:
        """A fresh drafter for one call."""
        return self.load(name)(config)


methods = Registry(_BUILT_IN)
"""The methods that `augment`, the command line and the law suite know."""

register_drafter = methods.register
