"""Prints what the data doctor found, as plain columns that read with and without colour."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from specdec.artifacts.terminal import bar, columns, dim, facts, say, wrapped
from specdec_training.data.doctor import Findings, pieces
from specdec_training.data.prepared import PreparedData

_GREEN, _GREY, _RED, _RESET = "\x1b[32m", "\x1b[90m", "\x1b[31m", "\x1b[0m"
_BINS = 8


def show_data(data: PreparedData, found: Findings) -> None:
    """Counts, lengths and the draft vocabulary."""
    meta = data.meta
    share = 100 * meta.loss_tokens / max(1, meta.tokens)
    formats = ", ".join(f"{count:,} {kind}" for kind, count in meta.kinds.items())
    lines = [
        ("examples", f"{meta.rows:,} ({formats})"),
        ("rows read", f"{meta.rows_read:,}, {sum(meta.skipped.values()):,} skipped"),
        *((f"  {reason}", f"{count:,}") for reason, count in meta.skipped.items()),
        ("tokens", f"{meta.tokens:,}, {meta.loss_tokens:,} to be learnt ({share:.1f} %)"),
        ("held out", f"{meta.held_out:,} prompts"),
        ("data hash", meta.data_hash[:16]),
    ]
    say("\n".join(facts(lines)))
    say("tokens of an example")
    say("\n".join(_histogram(found.lengths)))
    say("draft vocabulary (share of the tokens to be learnt)")
    rows = [
        [f"{size:,}", f"{100 * covered:.2f} %", "chosen" if size == meta.draft_vocab_size else ""]
        for size, covered in found.coverage.items()
    ]
    say("\n".join("  " + line for line in columns(rows)))


def show_target(found: Findings) -> None:
    """What only the target could tell."""
    lines = []
    if found.round_trip is not None:
        lines.append(("round trip", f"{100 * found.round_trip:.1f} % of the examples"))
    own = found.on_policy
    if own is not None:
        lines.append(("own choice", f"{100 * own.agreement:.1f} % of {own.tokens:,} tokens"))
        lines.append(("probability", f"{own.probability:.3f} on average"))
    if lines:
        say("what the target says about it")
        say("\n".join(facts(lines, indent=2)))


def show_samples(data: PreparedData, tokenizer: Any, counts: tuple[int, int], colour: bool) -> None:
    """Examples with the tokens to be learnt in green, or in double brackets without colour.

    Args:
        tokenizer: The target's; it decodes the ids.
        counts: How many examples, and tokens of each.
        colour: Whether the terminal takes it.
    """
    samples, tokens = min(counts[0], len(data.examples)), counts[1]
    for number in range(samples):
        at = number * len(data.examples) // samples
        how = "green" if colour else "[[...]]"
        say(dim(f"example {at}, first {tokens} tokens; {how} is to be learnt", colour))
        say(painted(pieces(data.examples[at], tokenizer, tokens), colour))


def painted(parts: Sequence[tuple[str, bool]], colour: bool) -> str:
    """Text and whether it is to be learnt, as one string; control characters become visible."""
    if not colour:
        return "".join(f"[[{_plain(text)}]]" if learnt else _plain(text) for text, learnt in parts)
    # Colour ends before a line break, so that pagers and copied lines stay whole.
    return "".join(
        "\n".join(
            f"{_GREEN if learnt else _GREY}{line}{_RESET}" if line else ""
            for line in _plain(text).split("\n")
        )
        for text, learnt in parts
    )


def show_problems(found: Findings, colour: bool) -> None:
    """One line for each problem, or that there is none."""
    if not found.problems:
        say("no problems found")
    for problem in found.problems:
        mark = f"{_RED}{problem.level}{_RESET}" if colour else problem.level
        say(wrapped(f"{mark}: {problem.text}", 2))


def _plain(text: str) -> str:
    """Data must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def _histogram(lengths: Any) -> list[str]:
    if not len(lengths):
        return []
    heights, borders = np.histogram(lengths, bins=min(_BINS, int(np.ptp(lengths)) + 1))
    most = max(1, int(heights.max()))
    first = np.ceil(borders).astype(int)  # of each bin; a border itself belongs to the next one
    last = [*(first[1:-1] - 1), int(borders[-1])]
    rows = [
        [f"{low:,} to {high:,}", f"{int(height):,}"]
        for height, low, high in zip(heights, first[:-1], last, strict=True)
    ]
    aligned = columns(rows)
    return [
        f"  {line}  {bar(int(height) / most, sys.stdout)}".rstrip()
        for line, height in zip(aligned, heights, strict=True)
    ]
