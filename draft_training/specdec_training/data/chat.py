"""Conversations as token ids, and which of them the assistant wrote.

A wrong loss mask is the classic reason for a head that learns nothing: all ones, and it learns to
predict users; all zeros, and it learns nothing at all. So the mask comes from the chat template
itself, by its `{% generation %}` tags, or by rendering the conversation up to each assistant turn
and seeing that every rendering begins the whole one. What cannot be seen is skipped, never guessed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec.artifacts.input_files import MOST_TEMPLATE, read_input_text
from specdec.errors import ConfigError
from specdec_training.data.answer_spans import Conversation, prefix_spans, tagged_spans
from specdec_training.data.bad_rows import BadRow
from specdec_training.data.token_spans import OwnedTokens, owned_tokens
from specdec_training.data.turns import Turn, strings_in

Messages = Sequence[Turn | tuple[str, str]]
"""Turns; a role and a content make one, too."""
Tools = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Encoded:
    """Token ids and what is to be learnt of them.

    Attributes:
        loss_mask: For each id whether the assistant wrote it; of the same length.
    """

    token_ids: list[int]
    loss_mask: list[bool]

    def cut(self, length: int) -> Encoded:
        """The first `length` tokens."""
        return Encoded(self.token_ids[:length], self.loss_mask[:length])

    def pieces(self, length: int) -> list[Encoded]:
        """All of it, in pieces of `length` tokens; nothing predicts the first of a piece."""
        starts = range(0, len(self.token_ids), length)
        ids = [self.token_ids[at : at + length] for at in starts]
        masks = [self.loss_mask[at : at + length] for at in starts]
        return [Encoded(i, [False, *m[1:]]) for i, m in zip(ids, masks, strict=True)]

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

    def conversation(self, messages: Messages, tools: Tools = ()) -> Conversation:
        """The turns with the template that renders them.

        Raises:
            ConfigError: There is no template.
        """
        if self.template is None:
            raise ConfigError(
                "the tokenizer has no chat template, and the input has conversations; give "
                "--chat-template FILE, or rows with prompt and completion"
            )
        turns = [Turn(*turn) for turn in messages]
        return Conversation(self.tokenizer, self.template, self.options, turns, tools)

    def render(
        self, messages: Messages, add_generation_prompt: bool = False, tools: Tools = ()
    ) -> str:
        """The conversation as text.

        Raises:
            ConfigError: There is no template.
            BadRow: The template refuses the conversation.
        """
        return self.conversation(messages, tools).text(add_generation_prompt)

    def tokens(self, text: str) -> list[int]:
        """Ids of rendered text, which holds its own special tokens. Raises nothing."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode(self, messages: Messages, last_only: bool = False, tools: Tools = ()) -> Encoded:
        """The whole conversation, with every answer to be learnt, or only the last.

        The token that ends a turn belongs to it: the model has to emit it. What a template writes
        behind it (a line break, for example) does not.

        Raises:
            ConfigError: There is no template.
            BadRow: The template refuses, leaves out a field that matters, or the turns cannot be
                found in what it renders.
        """
        conversation = self.conversation(messages, tools)
        self.check_turns(conversation.turns, tools)
        answers = [at for at, turn in enumerate(conversation.turns) if turn.is_answer]
        answers = answers[-1:] if last_only else answers
        conversation.check_fields(answers)
        find = tagged_spans if conversation.has_tags else prefix_spans
        whole, spans = find(conversation, answers)
        tokens = owned_tokens(self.tokenizer, whole, spans)
        mask = self._mask(tokens, conversation.has_tags)
        # An answer is over where it ends: no token of it may hold what somebody says next.
        cuts = sorted({end for at, end in tokens.torn.items() if mask[at]})
        if cuts:
            tokens = owned_tokens(self.tokenizer, whole, spans, cuts=cuts)
            mask = self._mask(tokens, conversation.has_tags)
        return Encoded(tokens.ids, mask)

    def encode_pair(self, prompt: str, completion: str) -> Encoded:
        """A prompt and what follows it, to be learnt, with the tokenizer's EOS behind.

        Raises:
            BadRow: One of the two spells a special token.
        """
        self.check_text((prompt, completion))
        text = prompt + completion
        span = (len(prompt), len(text))
        tokens = owned_tokens(self.tokenizer, text, [span], add_special_tokens=True)
        ids, owners = tokens.ids, tokens.owners
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

    def check_turns(self, turns: Iterable[Turn], tools: Tools = ()) -> None:
        """As `check_text`, for every text of the turns, their fields and the tools."""
        self.check_text(strings_in([[turn.content, list(turn.fields)] for turn in turns]))
        self.check_text(strings_in(list(tools)))

    def check_text(self, texts: Iterable[str]) -> None:
        """Raises `BadRow` for text that spells a special token: it would become that token."""
        for text in texts:
            for token in self.tokenizer.all_special_tokens:
                if token and str(token) in text:
                    raise BadRow("special_token_in_text", str(token))

    def _mask(self, tokens: OwnedTokens, has_tags: bool) -> list[bool]:
        """Which tokens are to be learnt, of those that are within the answers' spans."""
        ids, mask = tokens.ids, [owner >= 0 for owner in tokens.owners]
        if has_tags:
            for at in range(1, len(ids)):  # tags that leave the end of the turn outside
                if mask[at - 1] and not mask[at] and ids[at] in self.stop_ids:
                    mask[at] = ids[at - 1] not in self.stop_ids
            return mask
        spans: dict[int, list[int]] = {}
        for at, owner in enumerate(tokens.owners):
            spans.setdefault(owner, []).append(at)
        spans.pop(-1, None)
        learnt = {at for span in spans.values() for at in self._without_trailer(ids, span)}
        return [at in learnt for at in range(len(ids))]

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
    "messages", "conversation", "tools", "chat_template", "add_generation_prompt", "tokenize",
    "padding", "continue_final_message", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens",
})  # fmt: skip


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
    except (ValueError, RecursionError):
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
    text = read_input_text(override, "--chat-template", MOST_TEMPLATE)
    if not text.strip():
        raise ConfigError(f"--chat-template {override} is empty")
    return text
