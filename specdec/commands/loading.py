"""Loads the model that the user named; whatever is wrong with it becomes one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from specdec import demo
from specdec.errors import ConfigError, SpecdecError, UnsupportedModelError
from specdec.registry import NoOptions, methods

TOY = "demo"
"""Names the bundled model where a model is asked for."""

_LONG_LOAD_BYTES = 1_000_000_000  # above it, loading takes seconds and deserves its bar
_MESSAGE_CHARS = 200
_TOKEN_IDS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "forced_bos_token_id", "forced_eos_token_id",
    "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip


def check_model(name: str | None) -> None:
    """Reads the configuration only, so that a wrong model is refused at once.

    Raises:
        SpecdecError: The model is missing, broken, or not a decoder-only language model.
    """
    _read_config(*_locate(name))


def load_config(name: str | None) -> Any:
    """The model's configuration, without its weights.

    Raises:
        SpecdecError: As `check_model`.
    """
    return _read_config(*_locate(name))


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
    source, local = _locate(name)
    config = _read_config(source, local)
    if name in (None, TOY) and dtype == "auto":
        dtype = "float32"  # where identical text is a promise; the file holds bfloat16
    where = pick_device(device) if device_map is None else None
    with _loading(source, local) as how:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, device_map=device_map, **how
        )
        return model.eval() if where is None else model.eval().to(where)


def load_tokenizer(name: str | None) -> Any:
    """The model's tokenizer.

    Raises:
        SpecdecError: There is none, or it is broken.
    """
    source, local = _locate(name)
    with _loading(source, local, "the tokenizer of ") as how:
        return transformers.AutoTokenizer.from_pretrained(source, **how)


def _read_config(source: str, local: bool) -> Any:
    with _loading(source, local) as how:
        config = transformers.AutoConfig.from_pretrained(source, **how)
        _check_causal(source, config)
        return config


@contextmanager
def _loading(source: str, local: bool, what: str = "") -> Iterator[dict[str, bool]]:
    """Yields how to call `from_pretrained`; its output and errors become brief."""
    transformers_logging.set_verbosity_error()
    if local and _size(Path(source)) < _LONG_LOAD_BYTES:
        transformers_logging.disable_progress_bar()
    try:
        # Without trust_remote_code=False, transformers would ask on the terminal whether to run
        # the repository's own code; we never do.
        yield {"local_files_only": local, "trust_remote_code": False}
    except SpecdecError:
        raise
    except Exception as problem:  # any failure to read foreign files means that they are wrong
        if "custom code" in str(problem):
            raise UnsupportedModelError(
                f"{source!r} brings its own code (trust_remote_code), which specdec never runs"
            ) from problem
        raise SpecdecError(f"cannot load {what}{source!r}: {sentence(problem)}") from problem
    finally:
        transformers_logging.enable_progress_bar()


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
        raise ConfigError(f"--device {name} cannot be used: {sentence(problem)}") from problem


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
    config_class = getattr(methods.load(method), "Config", NoOptions)
    types, known = get_type_hints(config_class), {f.name for f in fields(config_class)}
    required = {
        f.name
        for f in fields(config_class)
        if f.default is MISSING and f.default_factory is MISSING
    }
    options: dict[str, Any] = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not sign:
            raise ConfigError(f"an option is NAME=VALUE, for example window=7, got {pair!r}")
        options[name] = _convert(name, text.strip(), types[name]) if name in known else text
    missing = required - set(options)
    if missing:
        raise ConfigError(f"method {method!r} needs --option {min(missing)}=...")
    if tokenizer is not None:
        options = with_tokenizer(method, options, tokenizer)
    methods.configure(method, options)
    return options


def with_tokenizer(method: str | None, options: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The options, with the model's tokenizer where the method has a use for it."""
    config_class = (
        NoOptions if method is None else getattr(methods.load(method), "Config", NoOptions)
    )
    takes_one = any(field.name == "tokenizer" for field in fields(config_class))
    return {"tokenizer": tokenizer, **options} if takes_one else options


def _convert(name: str, text: str, wanted: Any) -> Any:
    """`text` as the type of the option's field; what is no simple type stays text."""
    choices = get_args(wanted) or (wanted,)
    if NoneType in choices and text.lower() == "none":
        return None
    words = {"true": True, "yes": True, "false": False, "no": False}
    if bool in choices:
        if text.lower() not in words:
            raise ConfigError(f"option {name} must be true or false, got {text!r}")
        return words[text.lower()]
    for kind, described in ((int, "a whole number"), (float, "a number")):
        if kind in choices:
            try:
                return kind(text)
            except ValueError:
                message = f"option {name} must be {described}, got {text!r}"
                raise ConfigError(message) from None
    return text


def _locate(name: str | None) -> tuple[str, bool]:
    """(folder or hub id, whether it is a folder)."""
    if name is None or name == TOY:
        return str(demo.target_path()), True
    if not name:
        raise SpecdecError("the model's name is empty; give a folder or a hub id")
    try:
        path = Path(name).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
        holds_model = is_folder and (path / "config.json").is_file()
    except (OSError, RuntimeError, ValueError) as problem:  # RuntimeError: no such user after ~
        reason = getattr(problem, "strerror", None) or problem
        raise SpecdecError(f"cannot look for the model {name!r}: {reason}") from problem
    if is_folder:
        if not holds_model:
            raise SpecdecError(f"{name!r} holds no model: there is no config.json in it")
        return str(path), True
    if exists:
        raise SpecdecError(f"{name!r} is a file; give the model's folder or a hub id")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise SpecdecError(f"there is no folder {name!r}; give the model's folder or a hub id")
    return name, False


def _check_causal(name: str, config: Any) -> None:
    """Refuses what `AutoModelForCausalLM` would load with an untrained head, or not at all."""
    found = ", ".join(config.architectures or []) or type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name!r} is an encoder-decoder model ({found}); specdec needs a decoder-only one"
        )
    causal: set[str] = set()
    for entry in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        causal.update([entry] if isinstance(entry, str) else entry)
    is_known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not is_known or (config.architectures and not causal & set(config.architectures)):
        raise UnsupportedModelError(
            f"{name!r} is not a causal language model ({found}); specdec needs one that "
            "AutoModelForCausalLM loads with its own head"
        )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def sentence(problem: BaseException) -> str:
    """The beginning of a library's message, on one line."""
    text = " ".join(str(problem).split()) or type(problem).__name__
    if len(text) <= _MESSAGE_CHARS:
        return text
    start = text[:_MESSAGE_CHARS]
    whole, stop, _ = start.rpartition(". ")
    return whole + stop.strip() if whole else start.rsplit(" ", 1)[0] + " ..."
