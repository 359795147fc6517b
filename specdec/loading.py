"""Loads the model that the user named; whatever is wrong with it becomes one sentence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdec.artifacts.model_files import read_config, read_model, read_tokenizer, sentence
from specdec.artifacts.places import TOY, Place, locate
from specdec.errors import ConfigError, SpecdecError
from specdec.hf.compat import vocabulary_size
from specdec.registry import methods

__all__ = [
    "TOY", "check_ids", "check_model", "check_special_tokens", "context_length", "load_config",
    "load_model", "load_tokenizer", "method_options", "pick_device", "sentence", "with_tokenizer",
]  # fmt: skip

_TOKEN_IDS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "forced_bos_token_id", "forced_eos_token_id",
    "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip


def check_model(name: str | None) -> None:
    """Reads the configuration only, so that a wrong model is refused at once.

    Raises:
        SpecdecError: The model is missing, broken, or not a decoder-only language model.
    """
    load_config(name)


def load_config(name: str | None) -> Any:
    """The model's configuration, without its weights.

    Raises:
        SpecdecError: As `check_model`.
    """
    return read_config(_place(name))


def load_model(name: str | None, dtype: str, device: str, device_map: str | None = None) -> Any:
    """The model in evaluation mode on its device; None or "demo" is the bundled toy.

    Args:
        name: Folder or hub id.
        dtype: As torch names it, or "auto".
        device: For the whole model.
        device_map: How Accelerate is to spread it over all devices instead; None does not.

    Raises:
        SpecdecError: As `check_model`; or the device or the weights cannot be used.
    """
    place = _place(name)
    config = read_config(place)
    if name in (None, TOY) and dtype == "auto":
        dtype = "float32"  # where identical text is a promise; the file holds bfloat16
    where = pick_device(device) if device_map is None else None
    model = read_model(place, config, dtype, device_map)
    return model if where is None else model.to(where)


def load_tokenizer(name: str | None) -> Any:
    """The model's tokenizer.

    Raises:
        SpecdecError: There is none, or it is broken.
    """
    return read_tokenizer(_place(name))


def _place(name: str | None) -> Place:
    return locate(TOY if name is None else name)


def pick_device(name: str) -> torch.device:
    """The device to run on; `auto` takes CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    built = torch.accelerator.current_accelerator()
    known = ["cpu"] if built is None else ["cpu", built.type]
    try:
        device = torch.device(name)
        if device.type not in known:
            raise RuntimeError(f"this torch computes on {' and '.join(known)}")
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as problem:
        raise ConfigError(
            f"--device {name or repr(name)} cannot be used: {sentence(problem)}"
        ) from problem


def check_special_tokens(name: str, model: Any) -> None:
    """Refuses token ids that `generate` could only fail on, deep inside.

    Raises:
        SpecdecError: The model's generation settings hold such an id.
    """
    settings = model.generation_config
    size = model.get_input_embeddings().weight.shape[0]
    for option in _TOKEN_IDS:
        value = getattr(settings, option, None)
        for token in value if isinstance(value, list | tuple) else [value]:
            if token is None:
                continue
            if not isinstance(token, int) or isinstance(token, bool):
                wanted = "a token id or a list of them"
            elif option.startswith("forced") and not 0 <= token < size:
                wanted = f"a token id below {size:,}"
            else:
                continue
            raise SpecdecError(f"{option} of {name!r} must be {wanted}, got {value!r}")


def check_ids(ids: Tensor, model: Any, what: str) -> None:
    """Refuses token ids for which the model has no embeddings: the tokenizer is another model's.

    Args:
        model: That is to read them.
        what: Holds them, in the message.

    Raises:
        SpecdecError: Names the first such id.
    """
    rows = vocabulary_size(model)
    unknown = ids[ids >= rows]
    if len(unknown):
        raise SpecdecError(
            f"{what} has token id {int(unknown[0])}, and the model has embeddings for {rows:,} "
            "ids; its tokenizer is another model's"
        )


def context_length(model: Any) -> int | None:
    """Positions that the model has, or None when its configuration does not say."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def method_options(
    method: str | None, pairs: tuple[str, ...], tokenizer: Any = None
) -> dict[str, Any]:
    """`window=7` and the like, checked and converted to the types of the method's options.

    Args:
        method: A registered method, or None.
        pairs: As the user wrote them.
        tokenizer: The model's, for the method that has a use for it.

    Raises:
        ConfigError: There is no such method or option, or a value is wrong.
    """
    if method is None:
        if pairs:
            raise ConfigError(f"--option {pairs[0]} needs --method, for example lookahead")
        return {}
    known = methods.options(method)
    options: dict[str, Any] = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not sign:
            raise ConfigError(f"an option is NAME=VALUE, for example window=7, got {pair!r}")
        options[name] = known[name].read(text.strip()) if name in known else text
    missing = {name for name, option in known.items() if option.required} - set(options)
    if missing:
        raise ConfigError(f"method {method!r} needs --option {min(missing)}=...")
    if tokenizer is not None:
        options = with_tokenizer(method, options, tokenizer)
    methods.configure(method, options)
    return options


def with_tokenizer(method: str | None, options: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The options, with the model's tokenizer where the method has a use for it."""
    takes_one = method is not None and "tokenizer" in methods.options(method)
    return {"tokenizer": tokenizer, **options} if takes_one else options
