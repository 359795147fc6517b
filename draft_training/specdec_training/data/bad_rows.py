"""Rows that cannot be trained on: named by reason, counted, skipped, and refused in the mass.

One broken line must not stop a run of hours, and a thousand must not be skipped in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from specdec.errors import ConfigError, SpecdecError

REASONS: Mapping[str, str] = {
    "broken_json": "the line is no JSON",
    "not_utf8": "the text is not UTF-8",
    "line_too_long": "the line, or the text, is longer than a row may be",
    "not_an_object": "the row is no JSON object",
    "missing_keys": "none of the known formats' keys are there",
    "two_formats": "the row has the keys of two formats; --ignore-field leaves one out",
    "unknown_field": "a field may change what the row means, and is not known; --ignore-field NAME "
    "reads rows as if it were not there",
    "bad_field": "a field is not what it should be",
    "field_not_rendered": "the chat template leaves out a field that changes what the row means; "
    "give a template that writes it, or --ignore-field",
    "needs_conversation": "the chat template would have to write a field, and the row is no "
    "conversation; --as-chat makes one of a prompt",
    "bad_weight": "a weight is neither 0 nor 1, or is not the assistant's",
    "two_systems": "the system prompt beside the turns and the one among them differ",
    "bad_turn": "a turn is no object with a role and a content",
    "unknown_role": "a turn's role is unknown",
    "null_content": "a turn's content is null",
    "content_not_text": "a content is not text",
    "empty_text": "a text is empty",
    "empty_assistant_turn": "an assistant turn is empty",
    "no_assistant_turn": "there is no assistant turn to learn",
    "no_completion": "there is only a prompt; `specdec data regenerate` writes completions",
    "no_prompt": "there is nothing to answer",
    "prompt_too_long": "the prompt is longer than --max-prompt, or leaves no room in the context",
    "bad_token_ids": "token ids are not lists of whole numbers",
    "token_out_of_vocabulary": "a token id is outside the target's vocabulary",
    "special_token_in_text": "the text spells a special token, which would steer the model",
    "duplicate_id": "another row of this file has this id and another content",
    "duplicate_content": "the same content was read before",
    "template_refuses": "the chat template raises on this conversation",
    "template_rewrites_turns": "the chat template renders earlier turns otherwise once others "
    "follow; --turns each trains each turn in its own context",
    "other_generation_prompt": "the chat template's generation prompt is not how it renders the "
    "beginning of an answer; --template-option sets its modes, such as enable_thinking=false",
    "no_generation_prompt": "the chat template opens an answer with a header that its generation "
    "prompt lacks; give a template that knows add_generation_prompt",
    "lost_tags": "what the chat template puts into its {% generation %} tags cannot be followed "
    "into what it renders",
    "nothing_to_learn": "no token of the assistant is left within --max-length",
}
"""Reason -> what it means, for people."""

HARMLESS = frozenset({"duplicate_content"})
"""Skipped and counted, but no sign that the data are wrong."""

_SHOWN = 160  # characters of an example


class BadRow(SpecdecError):
    """A row that is skipped.

    Attributes:
        reason: A key of `REASONS`.
        detail: What exactly was found.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{REASONS[reason]}{detail and ': '}{detail}")
        self.reason, self.detail = reason, shown(detail)


@dataclass
class Tally:
    """Counts rows by what became of them.

    Attributes:
        rows: Rows looked at.
        counts: Reason -> skipped rows.
        first: Reason -> place and detail of the first such row.
    """

    rows: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, where: str, detail: str) -> None:
        """Counts a row; an empty reason means that it was used."""
        self.rows += 1
        if reason:
            self.counts[reason] = self.counts.get(reason, 0) + 1
            self.first.setdefault(reason, f"{where}{detail and ': '}{detail}")

    @property
    def bad(self) -> int:
        """Rows that say something about the data."""
        return sum(count for reason, count in self.counts.items() if reason not in HARMLESS)

    def lines(self) -> list[str]:
        """One line for each reason, the most frequent first, with its first example."""
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return [
            f"{count:,} x {reason} ({REASONS[reason]}), first {self.first[reason]}"
            for reason, count in ordered
        ]

    def check(self, most: float) -> None:
        """Stops before anything is trained on data that are mostly not what they seem.

        Args:
            most: Largest share of bad rows, 0 to 1, among those that are no repetitions.

        Raises:
            BadDataError: There are more; lists counts and first examples.
            ConfigError: There are no rows at all.
        """
        if not self.rows:
            raise ConfigError("the input has no rows; give a file with at least one")
        distinct = self.rows - sum(self.counts.get(reason, 0) for reason in HARMLESS)
        if self.bad > most * distinct:
            share = f"{100 * self.bad / distinct:.1f} % ({self.bad:,} of {distinct:,})"
            summary = f"{share} of the rows are bad, more than --max-bad-fraction {most}"
            raise BadDataError(summary, self)


class BadDataError(ConfigError):
    """Too many rows are bad.

    Attributes:
        summary: How many, without the list.
        tally: Counts of all rows, the good ones too.
    """

    def __init__(self, summary: str, tally: Tally) -> None:
        super().__init__(f"{summary}: {'; '.join(tally.lines())}")
        self.summary, self.tally = summary, tally


def shown(text: object) -> str:
    """`text` on one line, cut, and without anything that a terminal would act on."""
    line = " ".join(str(text).split())
    line = line if len(line) <= _SHOWN else line[:_SHOWN] + " ..."
    return "".join(c if c.isprintable() else "?" for c in line)
