"""Turns recorded text into ids.

Figures of n-gram methods depend on the tokenizer: longer tokens, fewer of them repeat. The right
one is that of the model that wrote the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from specdec.artifacts.tokenizers import tokenizer_fingerprint
from specdec.errors import ConfigError, SpecdecError
from specdec_bench.replay.traces import Message


@dataclass(frozen=True)
class Encoder:
    """A tokenizer for replay.

    Attributes:
        name: How it is called in the output.
        fingerprint: Equal for tokenizers that give the same ids.
        size: Ids are below it.
        encode: Text to ids, nothing added.
        arrange: Conversation to ids.
    """

    name: str
    fingerprint: str
    size: int
    encode: Callable[[str], list[int]]
    arrange: Callable[[Sequence[Message]], list[int]]


def encoder_of(name: str, with_template: bool) -> Encoder:
    """A tokenizer by folder or hub id.

    Args:
        name: `demo` is the bundled toy's.
        with_template: Conversations go through its chat template; else line breaks join what was
            said, without roles, which is right for any tokenizer.

    Raises:
        SpecdecError: There is none, it is broken, or it has no template.
    """
    from specdec.loading import load_tokenizer, sentence

    try:
        tokenizer = load_tokenizer(name)
    except SpecdecError as problem:
        raise ConfigError(f"--tokenizer: {problem}") from problem
    if with_template and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(f"the tokenizer {name!r} has no chat template; leave out --chat-template")

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    def arrange(said: Sequence[Message]) -> list[int]:
        if not with_template:
            return encode("\n".join(text for _, text in said))
        messages = [{"role": role, "content": text} for role, text in said]
        try:
            found = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True
            )
        except Exception as problem:  # a program that came with the tokenizer
            raise ConfigError(
                f"the chat template of {name!r} fails: {sentence(problem)}"
            ) from problem
        return list(found["input_ids"])

    return Encoder(name, tokenizer_fingerprint(tokenizer), len(tokenizer), encode, arrange)
