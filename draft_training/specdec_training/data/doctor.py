"""Examines prepared data: what would make a head learn the wrong thing, or nothing.

Measures only; what is printed is the command's business. Reads the target only when it is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from specdec_training.data import draft_vocab
from specdec_training.data.prepared import Example, PreparedData
from specdec_training.data.target import DataTarget

Level = Literal["error", "warning"]

_VOCABULARIES = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
_ROUND_TRIPS = 200  # examples that are decoded and encoded again
_LONGEST_READ = 1024  # tokens of an example that the target reads
_FEW_EXAMPLES, _LOW_COVERAGE, _MANY_CUT, _MANY_SKIPPED = 100, 0.9, 0.2, 0.01
_FOREIGN = 0.35  # less of it the target's own choice: the text is someone else's
_LOW_ROUND_TRIP = 0.9


@dataclass(frozen=True)
class Problem:
    """Something to act on.

    Attributes:
        level: An `error` makes the data useless.
        text: What it is and what to do.
    """

    level: Level
    text: str


@dataclass(frozen=True)
class OnPolicy:
    """How much of what is to be learnt is what the target itself would say.

    Attributes:
        tokens: Tokens looked at.
        agreement: Share of them that is the target's likeliest token.
        probability: Mean probability that the target gives them.
    """

    tokens: int
    agreement: float
    probability: float


@dataclass
class Findings:
    """What an examination found.

    Attributes:
        lengths: Tokens of each example, [rows].
        learnt: Tokens to be predicted of each example, [rows].
        coverage: Size of a draft vocabulary -> share of the tokens to be predicted that it holds.
        round_trip: Share of examples whose text survives encoding and decoding, or None.
        on_policy: None without a target.
        problems: What to act on.
    """

    lengths: NDArray[np.int64]
    learnt: NDArray[np.int64]
    coverage: Mapping[int, float]
    round_trip: float | None = None
    on_policy: OnPolicy | None = None
    problems: list[Problem] = field(default_factory=list)

    @property
    def errors(self) -> int:
        """Problems that make the data useless."""
        return sum(problem.level == "error" for problem in self.problems)


def examine(data: PreparedData) -> Findings:
    """What can be told without the target."""
    lengths, learnt = _sizes(data)
    found = Findings(lengths, learnt, _coverage(data))
    meta, note = data.meta, found.problems
    if data.examples.hash() != meta.data_hash:
        note.append(Problem("error", "the examples were changed after they were prepared"))
    empty = int((learnt == 0).sum())
    if empty:
        note.append(Problem("error", f"{empty:,} examples have no token to learn"))
    if meta.kinds.get("chat") and bool((learnt == lengths).all()):
        note.append(Problem("error", "every token is to be learnt, users' words too"))
    if meta.rows < _FEW_EXAMPLES:
        note.append(Problem("warning", f"there are few examples ({meta.rows}); give more rows"))
    if not meta.held_out:
        note.append(
            Problem("warning", "no prompts are held out, so acceptance cannot be measured on any")
        )
    if meta.draft_vocab_coverage < _LOW_COVERAGE:
        share = f"{100 * meta.draft_vocab_coverage:.1f} %"
        note.append(
            Problem(
                "warning",
                f"the draft vocabulary holds {share} of the tokens to learn; raise --draft-vocab",
            )
        )
    full = int((lengths == meta.max_length).sum()) - meta.kinds.get("text", 0)  # those go on
    cut = full / max(1, len(lengths))
    if cut > _MANY_CUT:
        note.append(
            Problem("warning", f"{100 * cut:.0f} % of the examples are cut; raise --max-length")
        )
    skipped = sum(meta.skipped.values())
    if skipped > _MANY_SKIPPED * meta.rows_read:
        most = max(meta.skipped, key=lambda reason: meta.skipped[reason])
        text = f"{skipped:,} of {meta.rows_read:,} rows were skipped, most of them as {most}"
        note.append(Problem("warning", text))
    return found


def examine_with_target(
    data: PreparedData, target: DataTarget, model: Any, examples: int, found: Findings
) -> None:
    """Adds what only the target can tell.

    Args:
        target: Its tokenizer and facts.
        model: The target itself, in evaluation mode.
        examples: How many examples it reads.
        found: Findings so far; what the target tells is added to them.
    """
    note = found.problems
    differences = data.meta.target.differences(target.fingerprint)
    if differences:
        text = f"the data were prepared for another target: {', '.join(differences)}"
        note.append(Problem("error", f"{text}; prepare them again"))
        return
    chosen = _spread(data, _ROUND_TRIPS)
    same = sum(_round_trips(example.token_ids, target.tokenizer) for example in chosen)
    found.round_trip = same / max(1, len(chosen))
    if found.round_trip < _LOW_ROUND_TRIP:
        text = f"only {100 * found.round_trip:.0f} % of the texts survive encoding and decoding"
        note.append(Problem("warning", f"{text}; is the tokenizer the target's?"))
    plain = data.meta.kinds.get("text", 0)
    if plain < data.meta.rows and not any(int(data.counts[t]) for t in target.stop_ids):
        note.append(Problem("warning", "no answer ends with a stop token; a head never learns it"))
    found.on_policy = _on_policy(_spread(data, examples), model)
    if found.on_policy.tokens and found.on_policy.agreement < _FOREIGN:
        share = f"{100 * found.on_policy.agreement:.0f} %"
        text = f"the target would have said {share} of the tokens to learn"
        note.append(Problem("warning", f"{text}; `specdec data regenerate` has it write them"))


def pieces(example: Example, tokenizer: Any, most: int) -> list[tuple[str, bool]]:
    """The example as text: stretches of context and of what is to be learnt, in turn.

    Args:
        example: Token ids and loss mask.
        most: Tokens after which it is cut.
    """
    found: list[tuple[str, bool]] = []
    ids, mask = example.token_ids[:most], example.loss_mask[:most]
    start = 0
    for at in range(1, len(ids) + 1):
        if at == len(ids) or mask[at] != mask[start]:
            found.append((_decoded(ids[start:at], tokenizer), mask[start]))
            start = at
    return found


def _sizes(data: PreparedData) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    lengths, learnt = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for sizes, _, mask in data.examples.columns():
        ends = np.cumsum(sizes)
        sums = np.concatenate([[0], np.cumsum(mask)])
        lengths.append(sizes)
        learnt.append(sums[ends] - sums[ends - sizes])
    return np.concatenate(lengths), np.concatenate(learnt)


def _coverage(data: PreparedData) -> dict[int, float]:
    """Of the usual sizes and the chosen one."""
    total = data.meta.vocab_size
    sizes = {size for size in _VOCABULARIES if size < total}
    ranked = data.counts.sort(descending=True).values.cumsum(0)
    learnt = max(1, int(data.counts.sum()))
    found = {size: int(ranked[size - 1]) / learnt for size in sizes}
    # The chosen one also holds tokens that must be in it, so it is measured and not ranked.
    found[data.meta.draft_vocab_size] = draft_vocab.coverage(data.counts, data.vocabulary)
    return dict(sorted(found.items()))


def _spread(data: PreparedData, most: int) -> list[Example]:
    """At most so many examples, evenly from the whole."""
    rows = len(data.examples)
    count = min(most, rows)
    return [data.examples[at * rows // count] for at in range(count)]


def _decoded(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _round_trips(ids: Sequence[int], tokenizer: Any) -> bool:
    """Whether the text survives. The ids need not: a model may write what no text encodes to."""
    text = _decoded(ids, tokenizer)
    again = _decoded(tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer)
    return again.split() == text.split()  # some tokenizers put a space before everything


@torch.inference_mode()
def _on_policy(examples: Sequence[Example], model: Any) -> OnPolicy:
    tokens = agreed = 0
    probability = 0.0
    for example in examples:
        ids = torch.tensor([example.token_ids[:_LONGEST_READ]], device=model.device)
        mask = torch.tensor(example.loss_mask[1:_LONGEST_READ], device=model.device)
        if not bool(mask.any()):
            continue
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1][mask].float()
        wanted = ids[0, 1:][mask]
        tokens += len(wanted)
        agreed += int((logits.argmax(-1) == wanted).sum())
        chosen = logits.softmax(-1).gather(-1, wanted[:, None])
        probability += float(chosen.sum())
    return OnPolicy(tokens, agreed / max(1, tokens), probability / max(1, tokens))
