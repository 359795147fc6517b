"""Conversations as token ids, and which of them the assistant wrote.

A wrong loss mask is the classic reason for a head that learns nothing: all ones, and it learns to
predict users; all zeros, and it learns nothing at all. So the mask comes from the chat template
itself, by its `{% generation %}` tags, or by rendering the conversation up to each assistant turn
and seeing that every rendering begins the whole one. What cannot be seen is skipped, never guessed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec.errors import ConfigError
from specdec_training.bad_rows import BadRow

Messages = Sequence[tuple[str, str]]

_OPENING = 32  # characters of an answer by which it is recognised
_TAGS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Encoded:
    """Token ids and what is to be learnt of them.

    Attributes:
        token_ids: The ids.
        loss_mask: For each id whether the assistant wrote it; of the same length.
    """

    token_ids: list[int]
    loss_mask: list[bool]

    def cut(self, length: int) -> Encoded:
        """The first `length` tokens."""
        return Encoded(self.token_ids[:length], self.loss_mask[:length])

    def prompt(self) -> list[int]:
        """The ids before the first one of the assistant."""
        first = self.loss_mask.index(True) if True in self.loss_mask else len(self.token_ids)
        return self.token_ids[:first]


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer with the chat template and its variables.

    Attributes:
        tokenizer: A Hugging Face tokenizer.
        template: The Jinja template, or None where there is none.
        options: Variables of the template, for example `enable_thinking`.
        stop_ids: Ids that end an answer: the tokenizer's EOS and those of the target.
    """

    tokenizer: Any
    template: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    stop_ids: frozenset[int] = frozenset()

    def hash(self) -> str | None:
        """SHA-256 of the template and its variables; None where there is no template."""
        if self.template is None:
            return None
        described = json.dumps([self.template, self.options], sort_keys=True)
        return hashlib.sha256(described.encode("utf-8", "replace")).hexdigest()

    @property
    def has_tags(self) -> bool:
        """Whether the template itself says what the assistant writes."""
        return self.template is not None and _TAGS.search(self.template) is not None

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """The conversation as text.

        Raises:
            ConfigError: There is no template.
            BadRow: The template refuses the conversation.
        """
        how = self._how()
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    _turns(messages),
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **how,
                )
            )
        except Exception as problem:  # a template is a program
            raise BadRow("template_refuses", str(problem)) from problem

    def tokens(self, text: str) -> list[int]:
        """Ids of rendered text, which holds its own special tokens. Raises nothing."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode(self, messages: Messages, last_only: bool = False) -> Encoded:
        """The whole conversation, with every assistant turn to be learnt, or only the last.

        The token that ends a turn belongs to it: the model has to emit it. What a template writes
        behind it (a line break, for example) does not.

        Raises:
            ConfigError: There is no template.
            BadRow: The template refuses, or the turns cannot be found in what it renders.
        """
        self.check_text(text for _, text in messages)
        if self.has_tags:
            return self._by_tags(messages, last_only)
        return self._by_prefixes(messages, last_only)

    def encode_pair(self, prompt: str, completion: str) -> Encoded:
        """A prompt and what follows it, to be learnt, with the tokenizer's EOS behind.

        Raises:
            BadRow: One of the two spells a special token.
        """
        self.check_text((prompt, completion))
        text = prompt + completion
        ids, owners = self._owners(text, [(len(prompt), len(text))], add_special_tokens=True)
        eos = self.tokenizer.eos_token_id
        if eos is not None and (not ids or ids[-1] not in self.stop_ids | {eos}):
            ids, owners = [*ids, eos], [*owners, 0]
        elif ids:
            owners[-1] = 0  # the tokenizer put it there
        # Nothing can predict the first token.
        return Encoded(ids, [at > 0 and owner == 0 for at, owner in enumerate(owners)])

    def encode_text(self, text: str) -> Encoded:
        """A text, all of it to be learnt but its first token, which nothing can predict.

        Raises:
            BadRow: It spells a special token.
        """
        self.check_text((text,))
        ids = list(self.tokenizer(text)["input_ids"])
        return Encoded(ids, [at > 0 for at in range(len(ids))])

    def check_text(self, texts: Iterable[str]) -> None:
        """Raises `BadRow` for text that spells a special token: it would become that token."""
        for text in texts:
            for token in self.tokenizer.all_special_tokens:
                if token and str(token) in text:
                    raise BadRow("special_token_in_text", str(token))

    def _how(self) -> dict[str, Any]:
        if self.template is None:
            raise ConfigError(
                "the tokenizer has no chat template, and the input has conversations; give "
                "--chat-template FILE, or rows with prompt and completion"
            )
        return {"chat_template": self.template, **self.options}

    def _by_tags(self, messages: Messages, last_only: bool) -> Encoded:
        how = self._how()
        try:
            found = self.tokenizer.apply_chat_template(
                _turns(messages),
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                **how,
            )
        except Exception as problem:  # a template is a program
            raise BadRow("template_refuses", str(problem)) from problem
        ids, mask = list(found["input_ids"]), [bool(m) for m in found["assistant_masks"]]
        for at in range(1, len(ids)):  # tags that leave the end of the turn outside
            if mask[at - 1] and not mask[at] and ids[at] in self.stop_ids:
                mask[at] = ids[at - 1] not in self.stop_ids
        if last_only and True in mask:
            last = len(mask) - 1 - mask[::-1].index(True)
            first = max((at + 1 for at in range(last) if not mask[at]), default=0)
            mask = [first <= at <= last for at in range(len(mask))]
        return Encoded(ids, mask)

    def _by_prefixes(self, messages: Messages, last_only: bool) -> Encoded:
        whole = self.render(messages)
        spans = []
        turns = [at for at, (role, _) in enumerate(messages) if role == "assistant"]
        for index in turns[-1:] if last_only else turns:
            after = whole if index + 1 == len(messages) else self.render(messages[: index + 1])
            before = self._before(messages[: index + 1], after)
            turn = f"turn {index + 1} of {len(messages)}"
            if not whole.startswith(after):
                raise BadRow("template_rewrites_turns", turn)
            if not after.startswith(before):
                raise BadRow("other_generation_prompt", turn)
            self._check_opening(messages[: index + 1], before, after)
            spans.append((len(before), len(after)))
        ids, owners = self._owners(whole, spans)
        mask = [False] * len(ids)
        for span in range(len(spans)):
            tokens = [at for at, owner in enumerate(owners) if owner == span]
            for at in self._without_trailer(ids, tokens):
                mask[at] = True
        return Encoded(ids, mask)

    def _before(self, messages: Messages, rendered: str) -> str:
        """What the model sees before it writes the last of `messages`."""
        if len(messages) > 1:
            return self.render(messages[:-1], add_generation_prompt=True)
        # No generation prompt can be rendered after nothing, so the answer itself is looked for.
        start = rendered.find(messages[0][1].strip()[:_OPENING])
        if start < 0:
            raise BadRow("no_generation_prompt", rendered)
        return rendered[:start]

    def _check_opening(self, messages: Messages, before: str, after: str) -> None:
        """Refuses a header that no generation prompt holds: it would be learnt as an answer."""
        content = messages[-1][1].strip()[:_OPENING]
        if after[len(before) :].lstrip().startswith(content) or len(messages) == 1:
            return
        if before == self.render(messages[:-1]):
            raise BadRow("no_generation_prompt", after[len(before) :])

    def _owners(
        self, text: str, spans: Sequence[tuple[int, int]], add_special_tokens: bool = False
    ) -> tuple[list[int], list[int]]:
        """Token ids of `text`, and for each the span of characters it belongs to, or -1."""
        if not getattr(self.tokenizer, "is_fast", False):
            return self._owners_by_length(text, spans, add_special_tokens)
        found = self.tokenizer(
            text, add_special_tokens=add_special_tokens, return_offsets_mapping=True
        )
        owners, span = [], 0
        for start, end in found["offset_mapping"]:
            while span < len(spans) and start >= spans[span][1]:
                span += 1
            # A token that also holds the end of the prompt is still one the model has to write.
            reaches = span < len(spans) and max(end, start + 1) > spans[span][0]
            owners.append(span if reaches else -1)
        return list(found["input_ids"]), owners

    def _owners_by_length(
        self, text: str, spans: Sequence[tuple[int, int]], add_special_tokens: bool
    ) -> tuple[list[int], list[int]]:
        """As `_owners`, for tokenizers without offsets: the beginnings are tokenised, too."""

        def tokens(beginning: str) -> list[int]:
            found = self.tokenizer(beginning, add_special_tokens=add_special_tokens)
            return list(found["input_ids"])

        ids = tokens(text)
        owners = [-1] * len(ids)
        for span, borders in enumerate(spans):
            lengths = []
            for border in borders:
                beginning = tokens(text[:border])
                if ids[: len(beginning)] != beginning:
                    raise BadRow("template_rewrites_turns", "tokens reach across the turns")
                lengths.append(len(beginning))
            owners[lengths[0] : lengths[1]] = [span] * (lengths[1] - lengths[0])
        return ids, owners

    def _without_trailer(self, ids: Sequence[int], tokens: list[int]) -> list[int]:
        """The turn's positions up to the token that ends it.

        That is its last stop token, else its last special token; a turn without either ends with
        its text, or with the stop token behind it (some templates let the next turn's opening
        token end it).
        """
        for ends in (self.stop_ids, frozenset(self.tokenizer.all_special_ids)):
            for count in range(len(tokens), 0, -1):
                if ids[tokens[count - 1]] in ends:
                    return tokens[:count]
        following = tokens[-1] + 1 if tokens else len(ids)
        if following < len(ids) and ids[following] in self.stop_ids:
            return [*tokens, following]
        return tokens


_RESERVED = frozenset({
    "messages", "conversation", "chat_template", "add_generation_prompt", "tokenize", "padding",
    "continue_final_message", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens",
})  # fmt: skip


def _turns(messages: Messages) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]


def template_options(pairs: Iterable[str]) -> dict[str, Any]:
    """`enable_thinking=false` and the like, as JSON values where they are any.

    Raises:
        ConfigError: A pair lacks its sign or its name.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign or not name.strip().isidentifier():
            raise ConfigError(
                f"--template-option takes NAME=VALUE, for example enable_thinking=false, got "
                f"{pair!r}"
            )
        if name.strip() in _RESERVED:
            raise ConfigError(f"--template-option {name.strip()} is set by specdec; leave it out")
        options[name.strip()] = _value(text.strip())
    return options


def _value(text: str) -> Any:
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except ValueError:
        return text


def chat_template(tokenizer: Any, override: Any | None) -> str | None:
    """The template to use: that of a file, else the tokenizer's own, else None.

    Args:
        tokenizer: May hold several templates; then the one named "default" counts.
        override: Path of a Jinja file, or None.

    Raises:
        ConfigError: The file cannot be read, or is no template.
    """
    if override is None:
        own = getattr(tokenizer, "chat_template", None)
        own = own.get("default") if isinstance(own, dict) else own
        return str(own) if own else None
    try:
        text = str(override.read_text(encoding="utf-8"))
    except OSError as problem:
        raise ConfigError(
            f"cannot read --chat-template {override}: {problem.strerror}"
        ) from problem
    except UnicodeDecodeError as problem:
        raise ConfigError(f"--chat-template {override} is not UTF-8: {problem.reason}") from problem
    if not text.strip():
        raise ConfigError(f"--chat-template {override} is empty")
    return text
