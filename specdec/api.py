"""`augment`: makes one model's `generate` speculative, reversibly.

It sets an instance attribute `model.generate` that calls the class's own `generate` with a decoding
loop of ours. No class is patched, nothing is global, and a deep copy drives itself.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar

from specdec.audit.broken_weights import check_weights
from specdec.config import DEFAULT_METHODS, SpecConfig
from specdec.cost.curve import measure_cost
from specdec.cost.sizes import choose_sizes
from specdec.cost.tuned_file import read_tuned
from specdec.errors import ConfigError, UnsupportedModelError
from specdec.generate.call import introduce
from specdec.generate.decode import SpeculativeDecode
from specdec.generate.fallback import option, warn_plain, why_call_is_plain
from specdec.hf import compat
from specdec.hf.names import users_cache, warn_when_untested
from specdec.registry import methods
from specdec.stats import GenerationStats
from specdec.targets.self_test import Capability, probe
from specdec.targets.watched_test import WatchedTest

ModelT = TypeVar("ModelT")
_ATTRIBUTE = "_specdec"
_FARTHEST = 2  # times the largest tuned batch size
_SETTINGS = ("on_round", "trace", "kernels")  # of `SpecConfig`, whatever the method


@dataclass
class Augmentation:
    """What `augment` leaves on a model.

    Attributes:
        settings: Defaults of every call.
        test: The self-test, which follows the model.
        memory: What drafters keep from call to call.
        last_stats: Of the newest call.
        replaced: A `generate` that had been set on the model itself.
        by_batch: Defaults by batch size, from a tuned file; empty without one.
        warned: It was said that a call was larger than anything that was tuned.
    """

    settings: SpecConfig
    test: WatchedTest = field(default_factory=WatchedTest)
    memory: dict[str, Any] = field(default_factory=dict)
    last_stats: GenerationStats | None = None
    replaced: Any = None
    by_batch: Mapping[int, SpecConfig] = field(default_factory=dict)
    warned: bool = False

    def defaults(self, rows: int) -> SpecConfig:
        """Of a call of `rows` rows: those of the largest tuned batch size that is not above it.

        What pays for one row can cost much for a hundred, so rows beyond `_FARTHEST` times all
        that was tuned are not speculated on, with one warning.
        """
        largest = max(self.by_batch, default=rows)
        if rows > _FARTHEST * largest:
            if not self.warned:
                self.warned = True
                warnings.warn(
                    f"specdec: a batch of {rows} is far above {largest}, the largest that was "
                    "tuned for, and runs without speculation; `specdec bench tune --batches "
                    f"{rows}` can tell what pays there",
                    UserWarning,
                    stacklevel=3,
                )
            return replace(self.settings, method="none", options={})
        below = [batch for batch in self.by_batch if batch <= rows]
        return self.by_batch[max(below)] if below else self.settings


def augment(
    model: ModelT,
    method: str | None = None,
    *,
    config: SpecConfig | None = None,
    tuned: str | Path | None = None,
    **options: Any,
) -> ModelT:
    """Makes `model.generate` speculative; same seed, same text.

    Args:
        model: A decoder-only Hugging Face model (a PEFT wrapper around one works too).
        method: Drafting method; None chooses `lookahead` sizes, or `none`, by a cost probe of
            about a second on this device.
        config: Everything at once, instead of `method` and `options`.
        tuned: File that `specdec bench tune` wrote for this target, instead of `method` and
            `options`: method and sizes by batch size. It may be joined by `on_round`, `trace` and
            `kernels`, and by the `draft` and `tokenizer` of its methods.
        **options: `budget`, `on_round`, `trace` and `kernels` of `SpecConfig`; all others go to the
            method.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: It is no decoder-only language model, or holds NaN or infinities.
        ConfigError: Unknown method or option, or a value out of range; kernels that cannot run
            here; or a tuned file that is broken or of another target.
    """
    _check_model(model)
    warn_when_untested()
    if config is not None and (method is not None or options):
        raise ConfigError("give either config= or a method with options, not both")
    if config is not None and not isinstance(config, SpecConfig):
        raise ConfigError(f"config= takes a SpecConfig, got {config!r}")
    if tuned is not None and (method is not None or config is not None):
        raise ConfigError("give either tuned= or a method or config=, not both")
    by_batch = {} if tuned is None else _tuned_settings(compat.unwrap(model), tuned, options)
    if by_batch:
        settings = by_batch[min(by_batch)]
    else:
        settings = config if config is not None else _settings(method, options)
    if settings.method is None and settings.options:
        example, given = DEFAULT_METHODS["tree"], next(iter(settings.options))
        raise ConfigError(f"option {given!r} needs a method, for example {example!r}")
    test = WatchedTest()
    found = test.verdict(compat.unwrap(model), settings.kernels)
    if settings.method is None:
        settings = _with_default_method(model, settings, found)
    memory: dict[str, Any] = {}
    for each in by_batch.values() or [settings]:
        method = each.method or "none"
        drafter = methods.create(method, each.options)
        introduce(drafter, compat.unwrap(model), memory)
    restore(model)
    replaced = vars(model).get("generate")
    handle = Augmentation(settings, test, memory, replaced=replaced, by_batch=by_batch)
    setattr(model, _ATTRIBUTE, handle)
    model.generate = MethodType(generate, model)  # type: ignore[attr-defined]
    return model


def restore(model: ModelT) -> ModelT:
    """Gives the model its own `generate` back; harmless when it was never augmented."""
    handle = vars(model).get(_ATTRIBUTE)
    if handle is not None:
        delattr(model, _ATTRIBUTE)
        delattr(model, "generate")
        if handle.replaced is not None:
            model.generate = handle.replaced  # type: ignore[attr-defined]
    return model


@contextmanager
def augmented(
    model: ModelT,
    method: str | None = None,
    *,
    config: SpecConfig | None = None,
    tuned: str | Path | None = None,
    **options: Any,
) -> Iterator[ModelT]:
    """`augment` for the length of a `with` block; an earlier augmentation comes back after it."""
    before = vars(model).get(_ATTRIBUTE)
    augment(model, method, config=config, tuned=tuned, **options)
    try:
        yield model
    finally:
        restore(model)
        if before is not None:
            setattr(model, _ATTRIBUTE, before)
            model.generate = MethodType(generate, model)  # type: ignore[attr-defined]


def last_stats(model: Any) -> GenerationStats:
    """What the newest `generate` call of an augmented model measured.

    Raises:
        ConfigError: The model is not augmented, or has not generated yet.
    """
    stats = getattr(vars(model).get(_ATTRIBUTE), "last_stats", None)
    if stats is None:
        raise ConfigError(
            "no statistics yet: call specdec.augment(model), then model.generate(...)"
        )
    return stats  # type: ignore[no-any-return]


def capability(model: Any) -> Capability:
    """How an augmented model is verified as it stands ("tree", "chain" or "plain"), and why.

    It is tested again when it has changed since it was last tested.
    """
    handle: Augmentation | None = vars(model).get(_ATTRIBUTE)
    if handle is None:
        raise ConfigError("the model is not augmented: call specdec.augment(model) first")
    return handle.test.verdict(compat.unwrap(model), handle.settings.kernels)


def generate(self: Any, *args: Any, specdec: SpecConfig | bool | None = None, **kwargs: Any) -> Any:
    """`generate` of an augmented model; takes what the model's own takes.

    Args:
        self: The model.
        *args: As in `GenerationMixin.generate`.
        specdec: False runs this call as plain `generate`; a `SpecConfig` replaces the defaults.
        **kwargs: As in `GenerationMixin.generate`.
    """
    handle: Augmentation = vars(self)[_ATTRIBUTE]
    plain = type(self).generate
    if specdec is False or _serves_another_loop(kwargs):
        return plain(self, *args, **kwargs)
    kwargs = {**compat.name_arguments(self, args), **kwargs}
    named = isinstance(specdec, SpecConfig) and specdec.method is not None
    by_rows = bool(handle.by_batch) and not named
    defaults = handle.defaults(_rows(self, kwargs)) if by_rows else handle.settings
    settings = _call_settings(specdec, defaults)
    found = handle.test.verdict(compat.unwrap(self), settings.kernels)
    reason = why_call_is_plain(self, kwargs, found)
    if reason is not None:
        warn_plain(reason)
        handle.last_stats = GenerationStats("none", mode="plain", mode_reason=reason)
        return plain(self, **kwargs)
    decode = SpeculativeDecode(
        settings,
        handle.memory,
        found,
        streamer=kwargs.get("streamer"),
        keeps_cache=users_cache(kwargs) is not None,
    )
    _own_stop_strings(self, kwargs)
    kwargs["custom_generate"] = decode
    try:
        return plain(self, **kwargs)
    finally:
        handle.last_stats = decode.stats


def _check_model(model: Any) -> None:
    name = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModelError(
            f"{name} is what torch.compile returns; augment the model first, then compile it"
        )
    config = getattr(model, "config", None)
    if config is None or not callable(getattr(model, "generate", None)):
        raise UnsupportedModelError(
            f"{name} is not a Hugging Face model with a generate method; load one with "
            "AutoModelForCausalLM.from_pretrained"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder model; specdec works on decoder-only models"
        )
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{name} has no language-model head; load it with AutoModelForCausalLM"
        )
    check_weights(compat.unwrap(model), name)


def _settings(method: str | None, options: Mapping[str, Any]) -> SpecConfig:
    own = {name: options[name] for name in ("budget", *_SETTINGS) if name in options}
    rest = {name: value for name, value in options.items() if name not in own}
    return SpecConfig(method=method, options=rest, **own)


def _tuned_settings(
    model: Any, tuned: str | Path, options: Mapping[str, Any]
) -> dict[int, SpecConfig]:
    """Settings by batch size from a tuned file, joined by what a file cannot hold."""
    own = {name: options[name] for name in _SETTINGS if name in options}
    objects = {name: options[name] for name in ("draft", "tokenizer") if name in options}
    left = sorted(set(options) - set(own) - set(objects))
    if left:
        raise ConfigError(f"option {left[0]!r} cannot join tuned=: the file sets the sizes")
    found = read_tuned(tuned)
    found.check(model)
    settings = {}
    for batch, choice in found.choices.items():
        joined = {name: objects[name] for name in objects if "draft" in choice.options}
        settings[batch] = SpecConfig(choice.method, {**choice.options, **joined}, **own)
    return settings


def _rows(model: Any, kwargs: Mapping[str, Any]) -> int:
    """Rows that a call decodes together."""
    names = ("input_ids", "inputs", "inputs_embeds")
    rows = next((len(kwargs[name]) for name in names if kwargs.get(name) is not None), 1)
    copies = option(model, kwargs, "num_return_sequences")
    return rows * copies if isinstance(copies, int) else rows


def _with_default_method(model: Any, settings: SpecConfig, found: Capability) -> SpecConfig:
    if found.mode == "plain":  # it may be so for as long as the model is in training mode alone
        found = probe(compat.unwrap(model))  # by dense masks, if by trees
    method = DEFAULT_METHODS[found.mode]
    if not methods.priors(method):
        return replace(settings, method=method)
    curve = measure_cost(compat.unwrap(model), backend=found.backend)
    choice = choose_sizes(curve, method)
    return replace(settings, method=choice.method, options=choice.options)


def _serves_another_loop(kwargs: Mapping[str, Any]) -> bool:
    """Whether an augmented wrapper around this model, or assisted generation, makes the call."""
    config = kwargs.get("generation_config")
    return isinstance(kwargs.get("custom_generate"), SpeculativeDecode) or bool(
        getattr(config, "is_assistant", False)
    )


def _call_settings(given: SpecConfig | bool | None, defaults: SpecConfig) -> SpecConfig:
    if given is None or given is True:
        return defaults
    if not isinstance(given, SpecConfig):
        raise ConfigError(f"specdec= takes False or a SpecConfig, got {given!r}")
    return given if given.method else _fill_in(given, defaults)


def _fill_in(config: SpecConfig, defaults: SpecConfig) -> SpecConfig:
    """A per-call configuration without a method keeps the augmented one."""
    return replace(config, method=defaults.method, options={**defaults.options, **config.options})


def _own_stop_strings(model: Any, kwargs: dict[str, Any]) -> None:
    """Builds the stop-string criterion here: `generate` drops the tokenizer before a callable."""
    strings = option(model, kwargs, "stop_strings")
    tokenizer = kwargs.get("tokenizer")
    if strings is None or tokenizer is None:
        return  # without a tokenizer, generate raises its own clear error
    kwargs["stop_strings"] = None
    config = kwargs.get("generation_config")
    if config is not None and config.stop_strings is not None:
        kwargs["generation_config"] = copy.deepcopy(config)
        kwargs["generation_config"].stop_strings = None
        if model.generation_config.stop_strings is None:
            del kwargs["stop_strings"]
    criteria = kwargs.get("stopping_criteria")
    own = compat.stop_string_criterion(strings, tokenizer)
    kwargs["stopping_criteria"] = type(criteria or [])([*(criteria or []), own])
