"""What a self-test depended on, read off the running model: cheap enough to compare before a call.

Classes, training mode, hooks, replaced methods, the kind of every parameter, switches and numbers
set on modules, and the configuration. Weights are not looked at. No forward is run.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from specdec.hf.attention import attention_function, own_settings

_SIMPLE = frozenset({bool, int, float, str, torch.dtype})
_METHODS = frozenset({FunctionType, MethodType, BuiltinFunctionType, partial})
_KEPT = _SIMPLE | _METHODS
_ONLOOKERS = ("specdec.", "specdec_", "transformers.utils.output_capturing")  # modules of hooks
_CAPTURES = "_output_capturing_hooks_installed"  # with those of transformers, at their first use
_NO_STATE = ("generate", "_specdec", _CAPTURES)  # the first two are set by `augment`


@dataclass(frozen=True, slots=True, eq=False)
class ModelState:
    """A model as it stood; compare two with `same_as`.

    Attributes:
        facts: What no forward changes, module by module.
        notes: Per module, plain values that somebody set on it; some modules count their forwards.
    """

    facts: list[object]
    notes: list[list[object]]

    @classmethod
    def of(cls, model: nn.Module) -> ModelState:
        """Walks the modules once, without recursion or names."""
        facts, notes = _surroundings(model), list[list[object]]()
        kinds: dict[type, bool] = {}
        seen, stack = {id(model)}, [model]
        while stack:
            module = stack.pop()
            kind, own = type(module), module.__dict__
            looks_inside = kinds.get(kind)
            if looks_inside is None:
                looks_inside = kinds[kind] = not kind.__module__.startswith(("torch.", "transf"))
                facts += (kind.forward, kind.__call__)
            facts += (kind, module.training)
            if "_forward_hooks" not in own:  # compiled by TorchScript: nobody changes it
                continue
            if own["_forward_hooks"] or own["_forward_pre_hooks"]:
                facts += _hooks(own["_forward_hooks"], own["_forward_pre_hooks"])
            for tensor in own["_parameters"].values():
                if tensor is not None:
                    facts += (type(tensor), tensor.dtype, tensor.device)
            values = own.values()
            if module is model or _CAPTURES in own:
                values = {n: v for n, v in own.items() if n not in _NO_STATE}.values()
            note = [v if type(v) in _SIMPLE else _reference(v) for v in values if type(v) in _KEPT]
            notes.append(note + _inside(own) if looks_inside else note)
            for child in own["_modules"].values():
                if child is not None and id(child) not in seen:
                    seen.add(id(child))
                    stack.append(child)
        return cls(facts, notes)

    def same_as(self, other: ModelState, ignoring: Collection[int] = ()) -> bool:
        """Whether nothing differs but the notes of the modules `ignoring`."""
        if self.facts != other.facts or len(self.notes) != len(other.notes):
            return False
        return self.notes == other.notes or set(self.noted_otherwise(other)) <= set(ignoring)

    def noted_otherwise(self, other: ModelState) -> list[int]:
        """Modules whose notes differ, of a state with as many modules."""
        pairs = enumerate(zip(self.notes, other.notes, strict=True))
        return [index for index, (own, others) in pairs if own != others]


def _surroundings(model: Any) -> list[object]:
    """Facts about the whole model: configuration, attention, hooks on every module."""
    config, text = model.config, model.config.get_text_config()
    facts: list[object] = [attention_function(model)]
    facts += _hooks(torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
    for each in [config] if text is config else [config, text]:
        for name, value in own_settings(each).items():
            if type(value) in _SIMPLE:
                facts += (name, value)
            elif type(value) in (list, dict, tuple):
                facts += (name, repr(value))
    return facts


def _inside(own: Mapping[str, object]) -> list[object]:
    """Plain values in the lists and dictionaries of a module, where adapters keep their switches.

    A dictionary of tensors or modules holds none.
    """
    found: list[object] = []
    for value in own.values():
        if type(value) is list and value and type(value[0]) in _SIMPLE:
            found.append(tuple(value))
        elif type(value) is dict and value and type(next(iter(value.values()))) in _SIMPLE:
            found.append(tuple(value.items()))
    return found


def _hooks(behind: Mapping[int, Any], before: Mapping[int, Any]) -> list[object]:
    """References to hooks; those that only look on, ours and transformers', are left out."""
    return [
        (place, _reference(hook))
        for place, hooks in (("behind", behind), ("before", before))
        for hook in hooks.values()
        if not str(getattr(hook, "__module__", "")).startswith(_ONLOOKERS)
    ]


def _reference(function: Any) -> object:
    """Weak: it equals a reference to the same function, and keeps nothing alive."""
    try:
        return weakref.ref(function)
    except TypeError:
        return function
