"""What preparing data needs of a target: its tokenizer and a few facts, but not its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from specdec import demo
from specdec.artifacts.target_fingerprint import TargetFingerprint
from specdec.errors import ConfigError
from specdec.loading import TOY, check_model, load_tokenizer, sentence
from specdec_training.data.chat import ChatFormat, chat_template, template_options


@dataclass(frozen=True)
class DataTarget:
    """A target without its weights.

    Attributes:
        name: As the user named it.
        config: Its Hugging Face configuration.
        stop_ids: Ids that end an answer.
        fingerprint: Which target it is.
    """

    name: str
    config: Any
    tokenizer: Any
    stop_ids: frozenset[int]
    fingerprint: TargetFingerprint

    @property
    def vocab_size(self) -> int:
        """V: ids that the target scores."""
        return self.fingerprint.vocab_size

    def chat(self, template: Path | None, options: Sequence[str]) -> ChatFormat:
        """How this target writes conversations.

        Args:
            template: File of another chat template, or None.
            options: NAME=VALUE pairs for it.

        Raises:
            ConfigError: The file or a pair is wrong.
        """
        return ChatFormat(
            self.tokenizer,
            chat_template(self.tokenizer, template),
            template_options(options),
            self.stop_ids,
        )


def open_target(name: str) -> DataTarget:
    """Reads the configuration and the tokenizer of a folder, a hub id, or the bundled toy.

    Raises:
        SpecdecError: The target or its tokenizer is missing, broken, or of the wrong kind.
    """
    check_model(name)
    tokenizer = load_tokenizer(name)
    source = demo.target_path() if name == TOY else Path(name).expanduser()
    local = source.is_dir()
    where = str(source) if local else name
    try:
        config = transformers.AutoConfig.from_pretrained(
            where, local_files_only=local, trust_remote_code=False
        )
    except Exception as problem:  # any failure to read foreign files means that they are wrong
        raise ConfigError(f"cannot load --target {name!r}: {sentence(problem)}") from problem
    return DataTarget(
        name,
        config,
        tokenizer,
        _stop_ids(where, local, config, tokenizer),
        TargetFingerprint.of(config, tokenizer),
    )


def _stop_ids(where: str, local: bool, config: Any, tokenizer: Any) -> frozenset[int]:
    """The ids at which `generate` stops, and the tokenizer's EOS."""
    try:
        settings = transformers.GenerationConfig.from_pretrained(where, local_files_only=local)
    except Exception:  # noqa: BLE001 - there is no such file; generate then takes the model's
        settings = config.get_text_config()
    ends = getattr(settings, "eos_token_id", None)
    found = [*(ends if isinstance(ends, list | tuple) else [ends]), tokenizer.eos_token_id]
    return frozenset(token for token in found if type(token) is int and token >= 0)
