"""Where in a rendered conversation the assistant's answers stand.

The chat template says so itself, by its `{% generation %}` tags; or the conversation is rendered up
to each answer, and every rendering must begin the whole one. What cannot be seen is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from specdec_training.data.bad_rows import BadRow
from specdec_training.data.token_spans import Span
from specdec_training.data.turns import Turn

_OPENING = 32  # characters of an answer by which it is recognised
_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
# Two characters that Unicode sets aside for use within a program. The tags call a macro that writes
# them around what they hold, and so they are found wherever in the text that ends up.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MACRO = f"{{% macro specdec_answer() %}}{_OPEN}{{{{ caller() }}}}{_CLOSE}{{% endmacro %}}\n"
# These only link a tool's result to its call; the order of the turns does that, too.
_LINKS = frozenset({"tool_call_id"})


@dataclass(frozen=True)
class Conversation:
    """Turns and tools, and what renders them.

    Attributes:
        tokenizer: A Hugging Face tokenizer.
        options: Variables of the template.
        tools: JSON objects, of what the assistant may call.
    """

    tokenizer: Any
    template: str
    options: Mapping[str, Any]
    turns: Sequence[Turn]
    tools: Sequence[dict[str, Any]] = ()

    @property
    def has_tags(self) -> bool:
        """Whether the template itself says what the assistant writes."""
        return _TAG.search(self.template) is not None

    def text(self, add_generation_prompt: bool = False) -> str:
        """All of it, rendered.

        Raises:
            BadRow: The template refuses the conversation.
        """
        try:
            return self._rendered(add_generation_prompt)
        except Exception as problem:  # a template is a program
            if any(turn.calls_tools for turn in self.turns):
                # Most templates take the arguments of calls as objects, DeepSeek's as text.
                with suppress(Exception):
                    return self._rendered(add_generation_prompt, arguments_as_text=True)
            raise BadRow("template_refuses", str(problem)) from problem

    def _rendered(self, add_generation_prompt: bool, arguments_as_text: bool = False) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                [turn.for_template(arguments_as_text) for turn in self.turns],
                tools=list(self.tools) or None,
                chat_template=self.template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self.options,
            )
        )

    def first(self, count: int) -> Conversation:
        """Its first `count` turns."""
        return replace(self, turns=self.turns[:count])

    def check_fields(self, learnt: Sequence[int]) -> None:
        """Refuses what the template leaves out although it changes what the text means.

        Args:
            learnt: Indices of the answers to learn. What those thought or called must be in the
                whole text; a template may leave it out of earlier answers that are context.

        Raises:
            BadRow: The template leaves something out, or refuses the conversation.
        """
        if self.tools and not self._shows(replace(self, tools=())):
            raise BadRow("field_not_rendered", "tools")
        for index, turn in enumerate(self.turns):
            links = _LINKS | ({"name"} if turn.role == "tool" else set())
            for name, _ in turn.fields:
                if name in links or self._shows(self._without(index, name)):
                    continue
                where = f"{name} of turn {index + 1} of {len(self.turns)}"
                own = self.first(index + 1)
                if turn.role != "assistant" or not own._shows(own._without(index, name)):
                    raise BadRow("field_not_rendered", where)
                if index in learnt:
                    raise BadRow("template_rewrites_turns", where)

    def _without(self, index: int, field: str) -> Conversation:
        turns = list(self.turns)
        turns[index] = turns[index].without(field)
        return replace(self, turns=turns)

    def _shows(self, less: Conversation) -> bool:
        """Whether the text is another one than that of a conversation with less."""
        whole = self.text()
        try:
            return whole != less.text()
        except BadRow:  # it needs what the other one lacks
            return True


def tagged_spans(conversation: Conversation, answers: Sequence[int]) -> tuple[str, list[Span]]:
    """The rendered text, and what the template's tags hold of those answers.

    Args:
        conversation: Whose template has tags.
        answers: Indices of the turns to find.

    Raises:
        BadRow: The template refuses, or writes otherwise what its tags hold.
    """
    whole, spans = _marked(conversation)
    turns = [at for at, turn in enumerate(conversation.turns) if turn.role == "assistant"]
    if len(answers) == len(turns):
        return whole, spans
    found, before = [], 0
    for index in turns:  # a turn may have several spans, or none
        is_last = index == turns[-1]
        after = len(spans if is_last else _marked(conversation.first(index + 1))[1])
        if not before <= after <= len(spans):
            raise BadRow("template_rewrites_turns", f"turn {index + 1}")
        if index in answers:
            found += spans[before:after]
        before = after
    return whole, found


def _marked(conversation: Conversation) -> tuple[str, list[Span]]:
    """The rendered text, and what stands between tags in it."""
    template = _MACRO + _TAG.sub(_call, conversation.template)
    text, spans, depth, start = "", [], 0, 0
    for piece in re.split(f"([{_OPEN}{_CLOSE}])", replace(conversation, template=template).text()):
        if piece == _OPEN:
            start = len(text) if depth == 0 else start
            depth += 1
        elif piece == _CLOSE:
            depth -= 1
            spans += [(start, len(text))] * (depth == 0)
        else:
            text += piece
    if depth or text != conversation.text():
        raise BadRow("lost_tags")
    return text, spans


def _call(tag: re.Match[str]) -> str:
    left, end, right = tag.groups()
    return f"{{%{left} {'endcall' if end else 'call specdec_answer()'} {right}%}}"


def prefix_spans(conversation: Conversation, answers: Sequence[int]) -> tuple[str, list[Span]]:
    """The rendered text, and the answers with what the template writes behind each.

    Args:
        conversation: Any; its template's tags are not looked at.
        answers: Indices of the turns to find.

    Raises:
        BadRow: The template refuses, or the turns cannot be found in what it renders.
    """
    whole, spans = conversation.text(), []
    for index in answers:
        upto = conversation.first(index + 1)
        after = whole if index + 1 == len(conversation.turns) else upto.text()
        before = _before(upto, after)
        turn = f"turn {index + 1} of {len(conversation.turns)}"
        if not whole.startswith(after):
            raise BadRow("template_rewrites_turns", turn)
        if not after.startswith(before):
            raise BadRow("other_generation_prompt", turn)
        _check_opening(upto, before, after)
        spans.append((len(before), len(after)))
    return whole, spans


def _before(upto: Conversation, rendered: str) -> str:
    """What the model sees before it writes the last turn."""
    if len(upto.turns) > 1:
        return upto.first(len(upto.turns) - 1).text(add_generation_prompt=True)
    # No generation prompt can be rendered after nothing, so the answer itself is looked for.
    content = upto.turns[0].content.strip()[:_OPENING]
    start = rendered.find(content) if content else -1
    if start < 0:
        raise BadRow("no_generation_prompt", rendered)
    return rendered[:start]


def _check_opening(upto: Conversation, before: str, after: str) -> None:
    """Refuses a header that no generation prompt holds: it would be learnt as an answer."""
    *others, last = upto.turns
    if not others:
        return
    if last.fields:  # calls and thoughts come before the text, so a plain answer is looked at
        last = Turn("assistant", "x")
        after = replace(upto, turns=[*others, last]).text()
    content = last.content.strip()[:_OPENING]
    if after[len(before) :].lstrip().startswith(content):
        return
    if before == replace(upto, turns=others).text():
        raise BadRow("no_generation_prompt", after[len(before) :])
