"""Turns recorded text into ids: with a tokenizer that exists, or one trained for the purpose.

Figures of n-gram methods depend on the tokenizer: longer tokens, fewer of them repeat. The right
one is the recorded model's own. Where it is not at hand, a byte-level BPE trained on like text
comes close; what it was trained on is part of the result.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.artifacts.input_files import read_start
from specdec.artifacts.tokenizers import tokenizer_fingerprint
from specdec.errors import ConfigError, SpecdecError
from specdec_bench.json_rows import is_rows, read_rows
from specdec_bench.replay.traces import Message

STDLIB = "stdlib"
"""Names the sources of the running Python's standard library as training text."""

_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_END = "<|endoftext|>"


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


def existing(name: str, with_template: bool) -> Encoder:
    """A tokenizer by folder or hub id.

    Args:
        name: `demo` is the bundled toy's.
        with_template: Conversations go through its chat template; else line breaks join them.

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

    def templated(said: Sequence[Message]) -> list[int]:
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

    arrange = templated if with_template else _joining(encode)
    return Encoder(name, tokenizer_fingerprint(tokenizer), len(tokenizer), encode, arrange)


def trained(size: int, texts: Iterable[str], name: str) -> Encoder:
    """A byte-level BPE, trained on `texts`.

    Args:
        size: Tokens of its vocabulary, from 257 on.
        texts: What it learns from.
        name: How it is called in the output.

    Raises:
        ConfigError: The texts are empty.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    filled = [text for text in texts if text]
    if not filled:
        raise ConfigError("--train-tokenizer has no text to learn from")
    tokenizer.train_from_iterator(filled, trainer)

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    found = tokenizer_fingerprint(tokenizer)
    return Encoder(name, found, tokenizer.get_vocab_size(), encode, _joining(encode))


def training_texts(sources: Sequence[str], most: int) -> Iterator[str]:
    """Texts of all sources, up to `most` characters of each.

    Raises:
        ConfigError: A source cannot be read.
    """
    for source in sources:
        left = most
        for text in _source(source, most):
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break


def _joining(encode: Callable[[str], list[int]]) -> Callable[[Sequence[Message]], list[int]]:
    """Everything that was said, one below the other, without roles: right for any tokenizer."""
    return lambda said: encode("\n".join(text for _, text in said))


def _source(name: str, most: int) -> Iterator[str]:
    if name == STDLIB:
        yield from _library()
        return
    path = Path(name).expanduser()
    if is_rows(path):
        for row in read_rows(path):
            yield "\n".join(_strings(row.value))
        return
    yield read_start(path, "--tokenizer-text", most)


def _library() -> Iterator[str]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(folder.rglob("*.py")):
        if not _NOT_LIBRARY & set(path.relative_to(folder).parts):
            yield path.read_text(encoding="utf-8", errors="ignore")


def _strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
