"""Refuses options that can be seen to be wrong before torch is imported, which takes seconds.

What a name means is the same in every command, so options are checked by their names: a model that
is no folder and no hub id, a file that is not there, a method that nobody registered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from specdec.artifacts.arguments import flag_of
from specdec.artifacts.input_files import check_input_file, check_path
from specdec.artifacts.places import DRAFT_HEAD, DRAFT_MODEL, MODEL, locate, shown
from specdec.cli.options import DemoOptions, GenerateOptions, check_ranges
from specdec.demo.prompts import PROMPTS
from specdec.errors import ConfigError
from specdec.registry import methods

_KINDS = {
    "model": MODEL, "target": MODEL, "draft": DRAFT_MODEL, "head": DRAFT_HEAD,
    "source": DRAFT_HEAD, "init_from": DRAFT_HEAD, "draft_vocab_of": DRAFT_HEAD,
}  # fmt: skip
_FILES = ("file", "files", "chat_template", "prompts", "deepspeed", "results", "base", "new")
_FOLDERS, _INPUTS = ("data", "features"), ("data", "input", "held_out_input")
_POSITIONAL = {
    "results": "RESULTS", "base": "BASE", "new": "NEW", "files": "FILE", "destination": "FOLDER",
}  # fmt: skip


def check_options(options: Any) -> None:
    """Checks the options of any command.

    Raises:
        ConfigError: Names what is wrong, and what to do.
    """
    check_ranges(options)
    values = {option.name: getattr(options, option.name) for option in fields(options)}
    for name, value in values.items():
        _check_paths(name, value)
    own: Callable[[Any], None] = _OWN.get(type(options), lambda _: None)
    own(options)
    if hasattr(options, "check"):
        options.check()
    for name, value in values.items():
        for one in value if isinstance(value, tuple) else (value,):
            _check_place(name, one)


def _check_place(name: str, value: Any) -> None:
    """Refuses what is not where an option says, as far as that can be seen from outside."""
    if isinstance(value, str) and name in _KINDS:
        locate(value, _KINDS[name])
    elif isinstance(value, str) and name == "method":
        methods.require(value)
    elif isinstance(value, str) and name in _INPUTS:
        check_path(Path(value), flag_of(name))
        if value.startswith((".", "/", "~")) and not Path(value).expanduser().exists():
            raise ConfigError(f"there is no file or folder {shown(value)} for {flag_of(name)}")
    elif isinstance(value, Path) and name in _FILES and str(value) != "-":
        check_input_file(value, _called(name))
    elif isinstance(value, Path) and name in _FOLDERS and not value.expanduser().is_dir():
        raise ConfigError(f"there is no folder {shown(str(value))} for {flag_of(name)}")


def _check_paths(name: str, value: Any) -> None:
    """Refuses a path that the system cannot look for; whether it is there is another matter."""
    for path in value if isinstance(value, tuple) else (value,):
        if isinstance(path, Path):
            check_path(path, _called(name))


def _called(name: str) -> str:
    """What a path is called in messages."""
    return _POSITIONAL.get(name) or flag_of(name)


def _check_demo(options: DemoOptions) -> None:
    for name in ("max_new_tokens", "repetitions", "threads"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{flag_of(name)} must be at least 1, got {getattr(options, name)}")
    if not 1 <= options.prompts <= len(PROMPTS):
        raise ConfigError(f"--prompts must be 1 to {len(PROMPTS)}, got {options.prompts}")
    if options.seed < 0:
        raise ConfigError(f"--seed must not be negative, got {options.seed}")


def _check_generate(options: GenerateOptions) -> None:
    given = [
        flag
        for flag, is_given in (
            ("--prompt", options.prompt is not None),
            ("--file", options.file is not None),
            ("--chat", options.chat),
        )
        if is_given
    ]
    if len(given) != 1:
        got = " and ".join(given) or "none of them"
        raise ConfigError(f"give one of --prompt, --file and --chat, got {got}")
    for name, least in (("max_new_tokens", 1), ("budget", 0), ("top_k", 0), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"{flag_of(name)} must be at least {least}, got {value}")
    _check_sampling(options)
    if options.method is None and options.option:
        raise ConfigError(f"--option {options.option[0]} needs --method, for example lookahead")


def _check_sampling(options: GenerateOptions) -> None:
    temperature, top_p = options.temperature, options.top_p
    if temperature is not None and not 0 < temperature < float("inf"):
        raise ConfigError(
            f"--temperature must be above 0, got {temperature}; leave out --sample for greedy"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"--top-p must be above 0 and at most 1, got {top_p}")
    for name in ("temperature", "top_p", "top_k", "seed"):
        if getattr(options, name) is not None and not options.sample:
            raise ConfigError(
                f"{flag_of(name)} needs --sample: without it the likeliest token is taken"
            )


_OWN: Mapping[type, Callable[[Any], None]] = {
    DemoOptions: _check_demo,
    GenerateOptions: _check_generate,
}
