"""The sizes of a method that the tuner may choose from: what the method's options declare."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from specdec.errors import ConfigError
from specdec.registry import methods
from specdec_bench.arm_names import ArmSpec

_DEALS = 20  # hands that are dealt until enough sizes are accepted


@dataclass(frozen=True)
class Grid:
    """The sizes of one method.

    Attributes:
        method: A registered name, or module:Class.
        draft: Folder or hub id of its head or draft model; None where it takes none.
        on_cpu: Whether it will run there: some defaults depend on it.
    """

    method: str
    draft: str | None = None
    on_cpu: bool = True

    @cached_property
    def axes(self) -> Mapping[str, Sequence[Any]]:
        """Option -> the values to try, in rising order."""
        ranges = {name: option.range for name, option in methods.options(self.method).items()}
        return {name: found.tries for name, found in ranges.items() if found and found.tries}

    @property
    def missing(self) -> str:
        """Why there is nothing to try; empty where there is."""
        if self.draft is None and "draft" in methods.options(self.method):
            return "it needs a draft; give --head or --draft, a folder or hub id"
        return "" if self.axes else "none of its options says what to try"

    def sample(self, count: int, seed: int) -> list[ArmSpec]:
        """The defaults, and others spread evenly over all axes at once (a Latin hypercube).

        Args:
            count: Most sizes, the defaults included; fewer where the method has no more.
            seed: Of the spread.

        Raises:
            ConfigError: The method refuses its own defaults and all others.
        """
        known, generator = methods.options(self.method), random.Random(f"{seed} {self.method}")
        defaults = {
            name: values[len(values) // 2] if known[name].required else known[name].default
            for name, values in self.axes.items()
        }
        here = methods.device_defaults(self.method, self.on_cpu)
        defaults |= {name: here[name] for name in self.axes if name in here}
        found = {spec.name: spec for spec in [self._at(defaults)] if spec is not None}
        for _ in range(_DEALS):
            columns = [_dealt(values, count, generator) for values in self.axes.values()]
            for place in zip(*columns, strict=True):
                spec = self._at(dict(zip(self.axes, place, strict=True)))
                if spec is not None and len(found) < count:
                    found.setdefault(spec.name, spec)
        if not found:
            methods.configure(self.method, {**defaults, **self._fixed})
        return list(found.values())

    def around(self, spec: ArmSpec) -> list[ArmSpec]:
        """One step from these sizes along every axis, both ways."""
        sizes = {name: spec.options[name] for name in self.axes}
        found = []
        for name, values in self.axes.items():
            here = sizes[name]
            # No limit is further than the largest value.
            below = [value for value in values if here is None or value < here]
            above = [value for value in values if here is not None and value > here]
            found += [self._at({**sizes, name: value}) for value in (*below[-1:], *above[:1])]
        return [near for near in found if near is not None]

    @property
    def _fixed(self) -> dict[str, str]:
        return {} if self.draft is None else {"draft": self.draft}

    def _at(self, sizes: Mapping[str, Any]) -> ArmSpec | None:
        """The arm of these sizes; None where the method refuses them."""
        options = {**sizes, **self._fixed}
        try:
            methods.configure(self.method, options)
        except ConfigError:
            return None
        text = ",".join(f"{name}={value}" for name, value in sizes.items())
        return ArmSpec(f"{self.method}:{text}", self.method, options)


def _dealt(values: Sequence[Any], count: int, generator: random.Random) -> list[Any]:
    """`count` of the values, evenly from all of them, in random order."""
    step = len(values) / count
    found = [values[int((place + generator.random()) * step)] for place in range(count)]
    generator.shuffle(found)
    return found
