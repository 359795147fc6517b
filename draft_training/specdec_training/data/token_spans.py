"""Which tokens of a text belong to which stretch of its characters.

Knows tokenizers and their offsets, and nothing about conversations.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from specdec_training.data.bad_rows import BadRow

Span = tuple[int, int]
"""First character, and the one behind the last."""


@dataclass(frozen=True)
class OwnedTokens:
    """The tokens of a text.

    Attributes:
        owners: For each token the index of the span it belongs to, or -1.
        torn: Index of a token -> the end of a span, in characters, that is within the token.
    """

    ids: list[int]
    owners: list[int]
    torn: dict[int, int] = field(default_factory=dict)


def owned_tokens(
    tokenizer: Any,
    text: str,
    spans: Sequence[Span],
    add_special_tokens: bool = False,
    cuts: Sequence[int] = (),
) -> OwnedTokens:
    """The tokens of `text` and the spans they belong to.

    Args:
        tokenizer: A Hugging Face tokenizer.
        spans: Stretches of it in ascending order.
        add_special_tokens: Whether the tokenizer frames the text as it does with any.
        cuts: Characters, ascending, before which a new token has to begin.

    Raises:
        BadRow: The tokenizer has no offsets, and a token reaches across the border of a span.
    """
    if not getattr(tokenizer, "is_fast", False):
        return _by_length(tokenizer, text, spans, add_special_tokens)
    ids: list[int] = []
    offsets: list[Span] = []
    for begin, end in pairwise([0, *cuts, len(text)]):
        piece = text[begin:end]
        found = tokenizer(piece, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
        ids += found["input_ids"]
        offsets += [(begin + first, begin + last) for first, last in found["offset_mapping"]]
    return OwnedTokens(ids, *_owners(offsets, spans))


def _owners(offsets: Sequence[Span], spans: Sequence[Span]) -> tuple[list[int], dict[int, int]]:
    owners: list[int] = []
    torn: dict[int, int] = {}
    ends = [end for _, end in spans]
    reached = 0
    for at, (first, end) in enumerate(offsets):
        # A token of nothing but spaces: some tokenizers leave those out of their offsets.
        start = min(first, reached) if first == end else first
        reached = max(reached, end)
        span = bisect_right(ends, start)
        # A token that also holds the end of the prompt is still one the model has to write. A
        # character that is spread over several tokens gives all of them its own two borders.
        is_inside = span < len(spans) and end > spans[span][0]
        owners.append(span if is_inside else -1)
        if is_inside and ends[span] < end:
            torn[at] = ends[span]
    return owners, torn


def _by_length(
    tokenizer: Any, text: str, spans: Sequence[Span], add_special_tokens: bool
) -> OwnedTokens:
    """For tokenizers without offsets: what comes before each border is tokenised, too."""

    def tokens(beginning: str) -> list[int]:
        return list(tokenizer(beginning, add_special_tokens=add_special_tokens)["input_ids"])

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
    return OwnedTokens(ids, owners)
