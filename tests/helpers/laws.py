"""The text law: what a method generates is what plain `generate` generates, token by token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import specdec
from helpers.drafters import THROW_AWAY, Truth
from helpers.families import FAMILIES, VOCAB, draft_of, model_of
from helpers.heads import head_for
from helpers.names import CACHE, cache_of
from specdec import GenerationStats, SpecConfig

NEW_TOKENS = 40
PROMPT_LENGTHS = (11, 7, 4, 9)  # rows of a ragged batch
_SEED = 1234


@dataclass(frozen=True, eq=False)
class Mode:
    """Arguments of `generate` that a law is checked under."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def with_options(self, **more: Any) -> Mode:
        return replace(self, options={**self.options, **more})


def _sampled(name: str, **options: Any) -> Mode:
    return Mode(name, {"do_sample": True, "top_k": 0, **options})


_WARPERS = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02}
_PROCESSORS = {
    "repetition_penalty": 1.1,
    "no_repeat_ngram_size": 3,
    "min_new_tokens": 6,
    "bad_words_ids": [[5], [7, 8]],
    "sequence_bias": [[[9], 2.0], [[10, 11], -3.0]],
    "suppress_tokens": [12, 13],
    "begin_suppress_tokens": [14],
    "exponential_decay_length_penalty": (10, 1.05),
    # All of them: older releases make NaN of a length penalty on one that is ruled out.
    "forced_eos_token_id": [3, 4],
    "eos_token_id": [3, 4],
    "renormalize_logits": True,
}
GREEDY = Mode("greedy")
SAMPLED = _sampled("sampled", **_WARPERS, repetition_penalty=1.1)
MODES = [
    GREEDY,
    SAMPLED,
    *(_sampled(name, **{name: value}) for name, value in _WARPERS.items()),
    _sampled("repetition_penalty", repetition_penalty=1.1),
    # With sampling, remove_invalid_values after a forced EOS makes plain generate itself fail.
    Mode("processors", {**_PROCESSORS, "remove_invalid_values": True}),
    _sampled("processors_sampled", **_WARPERS, **_PROCESSORS, typical_p=0.95, epsilon_cutoff=1e-3),
]


class Ledger:
    """Counts law cells in a test's `user_properties`, which reach the summary from any worker."""

    def __init__(self, properties: list[tuple[str, object]]) -> None:
        self._properties = properties
        self._wrong: list[str] = []

    def enter(self, name: str, outcome: str) -> None:
        """Adds a cell: "same", "margin" (an fp32 near-tie) or "differs"."""
        self._properties.append(("law_cell", outcome))
        if outcome == "differs":
            self._wrong.append(name)

    def settle(self) -> None:
        """Fails the test when a cell differs."""
        assert not self._wrong, f"{len(self._wrong)} cells differ from plain: {self._wrong[:6]}"


@dataclass(frozen=True)
class Case:
    """One model, one batch and one mode; the method comes on top."""

    family: str
    mode: Mode
    rows: int = 1
    dtype: torch.dtype = torch.float64

    @property
    def model(self) -> Any:
        return model_of(self.family, self.dtype)

    def generate(self, **how: Any) -> tuple[Tensor, Tensor]:
        """(sequences, generator state afterwards) of one seeded call."""
        model = self.model  # building one draws from the generator
        torch.manual_seed(_SEED)
        limits = {"max_new_tokens": NEW_TOKENS, **self.mode.options}
        sequences = model.generate(**prompts(self.rows), **limits, **how)
        return sequences, torch.get_rng_state()

    def truth(self) -> Truth:
        """Plain's whole text of each row, without padding in front."""
        rows = reference(self)[0].tolist()
        starts = prompts(self.rows)["attention_mask"].argmax(1).tolist()
        return tuple(tuple(row[start:]) for row, start in zip(rows, starts, strict=True))

    def speculate(
        self, method: str, truth: Truth = (), budget: int | None = None, **how: Any
    ) -> tuple[Tensor, Tensor, GenerationStats]:
        """The same call with a method; checks that it did not fall back to plain."""
        config = SpecConfig(method, options_of(method, truth, self), budget=budget)
        sequences, state = self.generate(specdec=config, **how)
        stats = specdec.last_stats(self.model)
        assert stats.mode == FAMILIES[self.family].mode, stats.mode_reason
        assert stats.method == method
        return sequences, state, stats

    def check(
        self, ledger: Ledger, method: str, truth: Truth, budget: int | None = None
    ) -> GenerationStats:
        """Enters the cell of one method: text, and the generator's state after it."""
        wanted, wanted_state = reference(self)
        got, state, stats = self.speculate(method, truth, budget)
        same_text = got.shape == wanted.shape and bool((got == wanted).all())
        if same_text:
            outcome = "same" if torch.equal(state, wanted_state) else "differs"
        else:
            outcome = "margin" if below_noise(self, got, wanted) else "differs"
        dtype = str(self.dtype).removeprefix("torch.")
        name = f"{self.family}-{dtype}-{self.mode.name}-{self.rows}-{method}-budget={budget}"
        ledger.enter(name, outcome)
        return stats


@lru_cache(maxsize=4)
def prompts(count: int) -> dict[str, Tensor]:
    """Left-padded rows; each repeats itself, so that n-grams find something."""
    rows = []
    for row, length in enumerate(PROMPT_LENGTHS[:count]):
        generator = torch.Generator().manual_seed(row)
        half = torch.randint(15, VOCAB, (length // 2 + 1,), generator=generator)
        rows.append(torch.cat([half, half])[:length])
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
    for row, tokens in enumerate(rows):
        ids[row, width - len(tokens) :], mask[row, width - len(tokens) :] = tokens, 1
    return {"input_ids": ids, "attention_mask": mask.long()}


@lru_cache(maxsize=4096)
def reference(case: Case) -> tuple[Tensor, Tensor]:
    """What the class's own `generate` gives: sequences and the generator's state."""
    return case.generate(specdec=False)


def options_of(method: str, truth: Truth, case: Case) -> dict[str, Any]:
    """Small sizes, so that trees differ from round to round; the text for drafters that cheat."""
    if method == "draft_model":
        return {"draft": draft_of(case.family, case.dtype), "num_draft_tokens": 4, "top_k": 2}
    if method == "eagle3":
        head = head_for(model_of(case.family, case.dtype))
        return {"draft": head, "depth": 3, "top_k": 3, "nodes": 9}
    if method == "lookahead":
        return {"window": 4, "ngram": 4, "guesses": 4}
    if method == "jacobi":
        return {"block": 6, "recycle": 2, "ngram": 4}
    if method == "recycling":
        return {"nodes": 12, "top_k": 3}
    return {"truth": truth} if method in THROW_AWAY else {}


def below_noise(case: Case, got: Tensor, wanted: Tensor) -> bool:
    """Whether every row first differs at a near-tie: an fp64 margin below the fp32 noise there.

    The noise of a margin is the spread of the fp32 errors over the vocabulary, of two ways to run
    the model that are both right.
    """
    if case.dtype != torch.float32:
        return False
    width = prompts(case.rows)["input_ids"].shape[1]
    shared = min(got.shape[1], wanted.shape[1])
    if torch.equal(got[:, :shared], wanted[:, :shared]):
        return False  # one merely stopped early
    for row in range(len(got)):
        unequal = (got[row, :shared] != wanted[row, :shared]).nonzero()
        if not len(unequal):
            continue
        at = int(unequal[0])
        prefix, pair = wanted[row, :at], [int(wanted[row, at]), int(got[row, at])]
        exact = plain_scores(replace(case, dtype=torch.float64), prefix, row, whole=True)
        errors = [plain_scores(case, prefix, row, whole) - exact for whole in (True, False)]
        if at < width or not _is_near_tie(exact, errors, pair):
            return False
    return True


def _is_near_tie(exact: Tensor, errors: Sequence[Tensor], pair: Sequence[int]) -> bool:
    """Whether the margin between two tokens is below the noise that `errors` show.

    A filter that is seen to treat one of the two otherwise in fp32 is such noise, too.
    """
    if any(bool(error[pair].isinf().any()) for error in errors):
        return True
    margin = float((exact[pair[0]] - exact[pair[1]]).abs())
    known = [error[error.isfinite()] for error in errors]
    return margin <= max(float(error.max() - error.min()) for error in known)


@torch.no_grad()
def plain_scores(case: Case, prefix: Tensor, row: int, whole: bool) -> Tensor:
    """[V] what plain takes the argmax of after `prefix` [S]; -inf where it is filtered out."""
    inputs = prompts(case.rows)
    width = inputs["input_ids"].shape[1]
    ids = prefix[width - int(inputs["attention_mask"][row].sum()) :][None]
    if whole:
        logits = case.model(input_ids=ids, use_cache=False).logits[:, -1]
    else:
        cut = ids.shape[1] - (len(prefix) - width)
        output = case.model(input_ids=ids[:, :cut], use_cache=True)
        for token in ids[0, cut:]:
            cache = cache_of(output)
            output = case.model(input_ids=token.view(1, 1), **{CACHE: cache}, use_cache=True)
        logits = output.logits[:, -1]
    found: list[Any] = []

    def capture(_model: Any, ids: Tensor, logits_processor: Any, *_: Any, **__: Any) -> Tensor:
        found.append(logits_processor)
        return ids

    case.generate(specdec=False, custom_generate=capture)
    batch = len(inputs["input_ids"])  # processors hold the padding of every row
    everyone = prefix.expand(batch, -1), logits.double().repeat(batch, 1)
    scores: Tensor = found[0](*everyone)[row]
    if not case.mode.options.get("do_sample"):
        return scores
    torch.manual_seed(_SEED)
    for _ in range(len(prefix) - width + 1):
        noise = torch.empty(batch, VOCAB).exponential_(1)
    return scores.log_softmax(-1) - noise[row].double().log()


def summary(properties: Sequence[Sequence[tuple[str, object]]]) -> str | None:
    """The line at the end of a run, or None when no law was checked."""
    cells = Counter(
        value for entries in properties for name, value in entries if name == "law_cell"
    )
    if not cells:
        return None
    return (
        f"laws: {cells.total()} cells, {cells['differs']} differing, "
        f"{cells['margin']} fp32 margins below noise"
    )
