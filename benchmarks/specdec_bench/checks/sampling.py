"""Whether an arm that samples has the target's law (`--check-sampling`).

Every arm answers the same prompts from many seeds. Two tests compare the texts with the target's
exact probabilities. The *cells* test counts texts: a text belongs to the longest of its beginnings
that is expected at least five times, so that the common ones have cells of their own and the rest
is pooled; chi-square. The *ranks* test uses every token: in the order of the target's
probabilities, the exact distribution function of the token that came (drawn uniformly within the
token's own step) is uniform whatever came before; chi-square over 20 equal bins, for all tokens
together and for every position. The first finds single texts that come too often, the second finds
laws that are bent, even on large vocabularies. The p value is the smallest of all, times their
number. Where an arm promises plain's text for plain's seed, that is counted as well.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.errors import ConfigError
from specdec.hf.compat import supports_logits_to_keep
from specdec_bench.results.records import SamplingRecord

LEAST_P = 1e-4
"""p value below which a law does not hold; divided by the number of arms."""

_EXPECTED = 5.0  # of a cell, for chi-square to be one
_BINS = 20
_MOST_CELLS = 400  # of one prompt: common texts first
_PROBABILITIES = 2**22  # held at a time

Text = tuple[int, ...]
Sampler = Callable[[Sequence[int], int, int], Sequence[int]]
"""(prompt ids, seed, new tokens) -> the new tokens that an arm emits."""


@dataclass(frozen=True)
class SampledArm:
    """An arm as the test sees it.

    Attributes:
        name: For the record.
        sample: Answers a prompt from a seed.
        promised: It promises plain's text (see `ArmSpec.promises_text`), exactly: fp32 or fp64.
    """

    name: str
    sample: Sampler
    promised: bool


@dataclass(frozen=True)
class SamplingPlan:
    """What is sampled.

    Attributes:
        prompts: Ids of a few prompts; drafts are best tested where they are often right.
        temperature: Of all arms; other warpers are off.
        samples: Texts of an arm over all prompts.
        tokens: New tokens of each. The first comes from the prefill, so fewer than 2 test nothing.
        setting: Index of the setting, for the records.
        seed: Seeds of the texts are drawn from it.
    """

    prompts: Sequence[Sequence[int]]
    temperature: float
    samples: int = 400
    tokens: int = 5
    setting: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the plan; raises `ConfigError`."""
        if not self.prompts or any(not prompt for prompt in self.prompts):
            raise ConfigError("the sampling check needs prompts of at least one token")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(
                f"the sampling check needs a temperature above 0, got {self.temperature}; greedy "
                "text is compared directly"
            )
        if self.tokens < 2 or self.samples < 10 * len(self.prompts):
            raise ConfigError(
                "the sampling check needs at least 2 tokens, of which the first is not drafted, "
                f"and 10 texts a prompt, got tokens={self.tokens}, samples={self.samples}"
            )

    def seeds(self) -> list[list[int]]:
        """Seeds of each prompt's texts, no two alike."""
        each = self.samples // len(self.prompts)
        drawn = random.Random(self.seed).sample(range(2**31), each * len(self.prompts))
        return [drawn[i * each : (i + 1) * each] for i in range(len(self.prompts))]


def check_sampling(
    model: Any, plain: Sampler, arms: Sequence[SampledArm], plan: SamplingPlan
) -> list[SamplingRecord]:
    """Tests every arm; the p value limit is shared by all of them.

    Args:
        model: The target; its plain forward gives the exact law.
        plain: Plain decoding, for comparison seed by seed.
        arms: What is tested.
        plan: Prompts, temperature and sizes.

    Raises:
        ConfigError: An arm gave a text of another length, or an id that the target does not have.
    """
    seeds = plan.seeds()
    originals = _draw("plain", plain, plan, seeds)
    laws = [_PrefixLaw(model, prompt, plan.temperature) for prompt in plan.prompts]
    cells = [_cells(law, plan.tokens, len(seeds[0])) for law in laws]
    return [_test(arm, laws, cells, originals, plan, len(arms)) for arm in arms]


def _draw(
    name: str, sample: Sampler, plan: SamplingPlan, seeds: Sequence[Sequence[int]]
) -> list[list[Text]]:
    """One text a seed, by prompt."""
    found = []
    for prompt, own in zip(plan.prompts, seeds, strict=True):
        texts = [tuple(sample(prompt, seed, plan.tokens)) for seed in own]
        for text in texts:
            if len(text) != plan.tokens:
                raise ConfigError(
                    f"arm {name} gave {len(text)} tokens where {plan.tokens} were asked for; the "
                    "sampling check needs the end of text switched off"
                )
        found.append(texts)
    return found


def _test(
    arm: SampledArm,
    laws: Sequence[_PrefixLaw],
    cells: Sequence[Mapping[Text, float]],
    originals: Sequence[Sequence[Text]],
    plan: SamplingPlan,
    arms: int,
) -> SamplingRecord:
    texts = _draw(arm.name, arm.sample, plan, plan.seeds())
    statistic, freedom, apart, expected_apart = 0.0, 0, 0.0, 0.0
    ranks: list[list[float]] = []
    generator = random.Random(plan.seed)
    for law, expected, own in zip(laws, cells, texts, strict=True):
        counts = Counter(_cell_of(text, expected) for text in own)
        for cell, mean in expected.items():
            statistic += (counts[cell] - mean) ** 2 / mean
            apart += abs(counts[cell] - mean) / 2
            expected_apart += (mean * (1 - mean / len(own)) * 2 / torch.pi) ** 0.5 / 2
        freedom += len(expected) - 1
        ranks.extend(law.ranks(own, generator))
    total = sum(map(len, texts))
    by_position = [_uniform_p(places) for places in zip(*ranks, strict=True)]
    everywhere = _uniform_p([place for own in ranks for place in own])
    tests = [_survival(statistic, freedom), everywhere, *by_position]
    p_value = min(1.0, len(tests) * min(tests))
    pairs = [(a, b) for mine, plain in zip(texts, originals, strict=True)
             for a, b in zip(mine, plain, strict=True)]  # fmt: skip
    same = sum(mine == plain for mine, plain in pairs)
    limit = LEAST_P / arms
    return SamplingRecord(
        setting=plan.setting,
        arm=arm.name,
        samples=total,
        tokens=plan.tokens,
        p_value=p_value,
        limit=limit,
        total_variation=apart / total,
        expected_variation=expected_apart / total,
        same_text=same,
        promised=arm.promised,
        passed=p_value >= limit and (same == total or not arm.promised),
    )


def _cells(law: _PrefixLaw, tokens: int, texts: int) -> dict[Text, float]:
    """Beginning -> how many of `texts` texts are expected to have it as their cell.

    Every cell holds at least five; together they hold all texts.
    """
    cells: dict[Text, float] = {}
    waiting: list[tuple[Text, float]] = [((), float(texts))]
    while waiting:
        beginning, mean = waiting.pop(0)
        below = law.after(beginning) * mean
        rest = mean
        for token in (below >= _EXPECTED).nonzero()[:, 0].tolist():
            share = float(below[token])
            rest -= share
            longer = (*beginning, token)
            if len(longer) < tokens and len(cells) + len(waiting) < _MOST_CELLS:
                waiting.append((longer, share))
            else:
                cells[longer] = share
        cells[beginning] = max(rest, 0.0)
    return _merged(cells)


def _merged(cells: Mapping[Text, float]) -> dict[Text, float]:
    """The cells without those that hold too few: what they hold falls to the one above them."""
    merged = dict(cells)
    for cell in sorted(cells, key=len, reverse=True):
        if cell and merged[cell] < _EXPECTED:
            few = merged.pop(cell)
            merged[_cell_of(cell, merged)] += few
    while merged[()] < _EXPECTED and len(merged) > 1:
        directly_below = [c for c in merged if c and not _cell_of(c[:-1], merged)]
        smallest = min(directly_below, key=lambda cell: merged[cell])
        merged[()] += merged.pop(smallest)
    return merged


def _cell_of(text: Text, cells: Mapping[Text, float]) -> Text:
    """The longest beginning of the text that is a cell; all that have none are pooled."""
    for length in range(len(text), 0, -1):
        if text[:length] in cells:
            return text[:length]
    return ()


class _PrefixLaw:
    """The target's exact law after one prompt."""

    def __init__(self, model: Any, prompt: Sequence[int], temperature: float) -> None:
        self._model, self._prompt, self._temperature = model, list(prompt), temperature
        self._device = model.get_input_embeddings().weight.device

    @torch.no_grad()
    def _laws(self, texts: Sequence[Text]) -> Tensor:
        """[N, n + 1, V] float64 laws at every token of texts of n tokens, and after the last."""
        ids = torch.tensor([[*self._prompt, *text] for text in texts], device=self._device)
        wanted = ids.shape[1] - len(self._prompt) + 1
        # Over a whole prompt, the scores of a large vocabulary are larger than the model.
        keep = {"logits_to_keep": wanted} if supports_logits_to_keep(self._model) else {}
        logits = self._model(input_ids=ids, use_cache=False, **keep).logits
        logits = logits[:, -wanted:].cpu().double()
        laws: Tensor = (logits / self._temperature).softmax(-1)
        return laws

    def after(self, text: Text) -> Tensor:
        """[V] float64 law of the token after `text`."""
        return self._laws([text])[0, -1]

    def ranks(self, texts: Sequence[Text], generator: random.Random) -> Iterable[list[float]]:
        """For each text its tokens' places in [0, 1): uniform when the texts have this law."""
        vocabulary = self._model.config.get_text_config().vocab_size
        if any(not 0 <= token < vocabulary for text in texts for token in text):
            raise ConfigError(f"an arm sampled an id outside the target's {vocabulary}")
        rows = max(1, _PROBABILITIES // (vocabulary * max(map(len, texts))))
        for start in range(0, len(texts), rows):
            part = texts[start : start + rows]
            laws = self._laws([text[:-1] for text in part])
            chosen = torch.tensor(part)[:, :, None]
            own = laws.gather(2, chosen)
            likelier = (laws * (laws > own)).sum(-1)
            # Equal probabilities are ordered by id, so that every token has a step of its own.
            equal = (laws == own) & (torch.arange(laws.shape[-1]) < chosen)
            likelier += (laws * equal).sum(-1)
            for low, width in zip(likelier.tolist(), own[:, :, 0].tolist(), strict=True):
                yield [a + generator.random() * b for a, b in zip(low, width, strict=True)]


def _uniform_p(places: Sequence[float]) -> float:
    """p value of chi-square against the uniform law on [0, 1)."""
    counts = Counter(min(max(int(place * _BINS), 0), _BINS - 1) for place in places)
    mean = len(places) / _BINS
    return _survival(sum((counts[i] - mean) ** 2 / mean for i in range(_BINS)), _BINS - 1)


def _survival(statistic: float, freedom: int) -> float:
    """Probability of a chi-square variable of at least `statistic`; 1 without freedom."""
    if freedom < 1:
        return 1.0
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
