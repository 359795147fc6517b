"""A row of any format as examples: token ids with a loss mask, cut to length and checked.

Pure: the same row, tokenizer and options give the same examples, which is what the cache of
tokenised rows rests on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specdec_training.data.bad_rows import BadRow
from specdec_training.data.chat import ChatFormat, Encoded
from specdec_training.data.conversations import Row

FORMAT_VERSION = 2
"""Of the encoding: another number makes old caches useless."""

_TEXT_PROMPT = 64  # most tokens that a plain text gives as a held-out prompt


@dataclass(frozen=True)
class Encoder:
    """Turns rows into examples.

    Attributes:
        chat: Tokenizer and chat template of the target.
        vocab_size: Ids that the target scores.
        max_length: Most tokens of an example.
        turns: `all` assistant turns in one example, `each` in one of its own, or the `last`.
    """

    chat: ChatFormat
    vocab_size: int
    max_length: int
    turns: str = "all"

    def examples(self, row: Row) -> list[Encoded]:
        """The row's examples; at least one, each with a token to learn.

        Raises:
            BadRow: It has none, or cannot be encoded.
            ConfigError: A conversation came, and there is no template.
        """
        found = self._encode(row)
        if row.kind == "text":  # what stands in a text may be learnt from anywhere on
            found = [piece for whole in found for piece in whole.pieces(self.max_length)]
        else:
            found = [encoded.cut(self.max_length) for encoded in found]
        for encoded in found:
            for token in encoded.token_ids:
                if not 0 <= token < self.vocab_size:
                    raise BadRow("token_out_of_vocabulary", f"{token} of {self.vocab_size}")
        found = [encoded for encoded in found if any(encoded.loss_mask)]
        if not found:
            raise BadRow("nothing_to_learn", str(self.max_length))
        return found

    def _encode(self, row: Row) -> list[Encoded]:
        row.check_plain()
        if row.kind == "chat":
            return self._conversation(row)
        if row.kind == "pair":
            return [self.chat.encode_pair(row.prompt, row.completion)]
        if row.kind == "text":
            return [self.chat.encode_text(row.prompt)]
        if row.kind == "tokens":
            ids = [*row.prompt_ids, *row.completion_ids]
            return [Encoded(ids, [at >= len(row.prompt_ids) for at in range(len(ids))])]
        raise BadRow("no_completion")

    def _conversation(self, row: Row) -> list[Encoded]:
        answers = [at for at, turn in enumerate(row.messages) if turn.is_answer]
        if not answers:
            raise BadRow("no_assistant_turn", row.speakers())
        if self.turns == "all":
            return [self.chat.encode(row.messages, tools=row.tools)]
        chosen = answers if self.turns == "each" else answers[-1:]
        return [self.chat.encode(row.messages[: at + 1], True, row.tools) for at in chosen]

    def batch(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Columns of rows as columns of examples, for `datasets.map`.

        Args:
            batch: `where`, `row` (JSON or empty), `reason` and `detail`, of n rows.

        Returns:
            Columns with a line for each example, and one for each bad row: `opens` marks the first
            line of a row, `prompt_length` counts the tokens that a held-out prompt would have.
        """
        lines: list[dict[str, Any]] = []
        for where, text, reason, detail in zip(
            *(batch[name] for name in ("where", "row", "reason", "detail")), strict=True
        ):
            common = {"where": where, "reason": reason, "detail": detail, "kind": "", "group": ""}
            if reason:
                lines.append(common | {"opens": True} | _nothing())
                continue
            row = Row.from_json(text)
            common |= {"kind": row.kind, "group": row.belongs_to()}
            try:
                found = self.examples(row)
            except BadRow as problem:
                bad = {"reason": problem.reason, "detail": problem.detail, "opens": True}
                lines.append(common | bad | _nothing())
                continue
            for index, encoded in enumerate(found):
                lines.append(common | {"opens": index == 0} | _filled(encoded, row.kind))
        return {name: [line[name] for line in lines] for name in COLUMNS}


COLUMNS: Mapping[str, str] = {
    "where": "string",
    "reason": "string",
    "detail": "string",
    "kind": "string",
    "group": "string",
    "opens": "bool",
    "prompt_length": "int32",
    "learnt": "int32",
    "token_ids": "list int32",
    "loss_mask": "list bool",
}
"""Name and type of what `Encoder.batch` gives."""


def _nothing() -> dict[str, Any]:
    return {"prompt_length": 0, "learnt": 0, "token_ids": [], "loss_mask": []}


def _filled(encoded: Encoded, kind: str) -> dict[str, Any]:
    prompt = len(encoded.prompt())
    if kind == "text":
        prompt = min(len(encoded.token_ids) // 2, _TEXT_PROMPT)
    return {
        "prompt_length": prompt,
        "learnt": sum(encoded.loss_mask),
        "token_ids": encoded.token_ids,
        "loss_mask": encoded.loss_mask,
    }
