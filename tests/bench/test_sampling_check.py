"""The true law passes, bent laws do not, and the seed's text is compared as well."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import specdec
from specdec.demo import load_target, load_tokenizer
from specdec.errors import ConfigError
from specdec_bench.checks import sampling as sampling_check
from specdec_bench.checks.sampling import (
    SampledArm,
    Sampler,
    SamplingPlan,
    check_sampling,
)

TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def model() -> Any:
    found = load_target()
    found.generation_config.eos_token_id = None
    return found


@pytest.fixture(scope="module")
def plan() -> SamplingPlan:
    tokenizer = load_tokenizer()
    texts = ("for i in range(10):\n    print(i)\nfor i in range(", "import os\nimport sys\nimport ")
    return SamplingPlan([tokenizer(text).input_ids for text in texts], TEMPERATURE, samples=70)


def sampler(model: Any, temperature: float = TEMPERATURE, **extra: Any) -> Sampler:
    def sample(prompt: Sequence[int], seed: int, tokens: int) -> list[int]:
        torch.manual_seed(seed)
        text = model.generate(
            torch.tensor([list(prompt)]), max_new_tokens=tokens, do_sample=True, top_k=0,
            top_p=1.0, temperature=temperature, pad_token_id=0, **extra,
        )  # fmt: skip
        return text[0, len(prompt) :].tolist()

    return sample


@pytest.mark.parametrize("keeps", [True, False])
def test_only_the_scores_of_the_texts_are_computed(
    model: Any, monkeypatch: pytest.MonkeyPatch, keeps: bool
) -> None:
    prompt, texts = list(range(2, 30)), [(5, 6), (7, 8)]
    widths: list[int] = []
    real = model.forward

    def forward(input_ids: Any, logits_to_keep: int = 0, **more: Any) -> Any:
        found = real(input_ids=input_ids, logits_to_keep=logits_to_keep, **more)
        widths.append(found.logits.shape[1])
        return found

    def whole(input_ids: Any, **more: Any) -> Any:
        return forward(input_ids, **more)

    monkeypatch.setattr(model, "forward", forward if keeps else whole)
    laws = sampling_check._PrefixLaw(model, prompt, 0.8)._laws(texts)
    assert laws.shape[:2] == (2, 3)
    assert widths == [3 if keeps else 30]
    with torch.no_grad():
        own = real(input_ids=torch.tensor([[*prompt, 7, 8]])).logits[0, -3:].double()
    assert torch.allclose(laws[1], (own / 0.8).softmax(-1), atol=1e-6)


def test_sound_arms_pass_and_bent_ones_fail(model: Any, plan: SamplingPlan) -> None:
    plain = sampler(model)
    lookup, tree = specdec.SpecConfig("suffix"), specdec.SpecConfig("recycling", {"nodes": 8})
    with specdec.augmented(model, "none"):
        arms = [
            SampledArm("suffix", sampler(model, specdec=lookup), True),
            SampledArm("recycling", sampler(model, specdec=tree), True),
            SampledArm("another temperature", sampler(model, 0.55), False),
            SampledArm("warmer", sampler(model, 1.15, specdec=tree), False),
            SampledArm("another seed", other_seed(sampler(model)), True),
        ]
        start = time.process_time()
        found = {r.arm: r for r in check_sampling(model, plain, arms, plan)}
        assert (time.process_time() - start) / len(arms) < 20
    for name in ("suffix", "recycling"):
        record = found[name]
        assert record.passed, record
        assert record.same_text == record.samples == 70
        assert record.p_value > record.limit == pytest.approx(1e-4 / 5)
        assert record.total_variation < 2 * record.expected_variation
    for name in ("another temperature", "warmer"):
        assert not found[name].passed, found[name]
        assert found[name].p_value < found[name].limit
    # The right law from other noise: the distribution holds, the promise does not.
    other = found["another seed"]
    assert other.p_value >= other.limit
    assert not other.passed
    assert other.same_text < 70


def other_seed(sample: Sampler) -> Sampler:
    return lambda prompt, seed, tokens: sample(prompt, seed ^ 0x5A5A5A5A, tokens)


class Toy(torch.nn.Module):
    """Scores that depend on the token before, over a small vocabulary."""

    def __init__(self, vocabulary: int, spread: float) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(vocabulary, vocabulary)
        generator = torch.Generator().manual_seed(1)
        self.table.weight.data = spread * torch.randn(vocabulary, vocabulary, generator=generator)
        self.config = self

    vocab_size = property(lambda self: self.table.weight.shape[0])

    def get_text_config(self) -> Toy:
        return self

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.table

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return type("Output", (), {"logits": self.table(input_ids)})


def toy_sampler(toy: Toy, bend: Any = lambda law, step: law) -> Sampler:
    def sample(prompt: Sequence[int], seed: int, tokens: int) -> list[int]:
        generator, text = torch.Generator().manual_seed(seed), [prompt[-1]]
        for step in range(tokens):
            law = toy.table.weight[text[-1]].double().softmax(-1).detach()
            text.append(int(bend(law, step).multinomial(1, generator=generator)))
        return text[1:]

    return sample


def moved_mass(law: torch.Tensor, step: int) -> torch.Tensor:
    """A tenth of the mass of all goes to one ordinary token, from the second step on."""
    return law if step == 0 else 0.9 * law + 0.1 * torch.eye(len(law), dtype=law.dtype)[3]


def first_draft(law: torch.Tensor, step: int) -> torch.Tensor:
    """Every fifth second token is the likeliest one, unchecked."""
    best = torch.eye(len(law), dtype=law.dtype)[int(law.argmax())]
    return 0.8 * law + 0.2 * best if step == 1 else law


@pytest.mark.statistical
@pytest.mark.parametrize("vocabulary", [8, 300])
def test_p_values_are_what_they_say(vocabulary: int) -> None:
    """The true law: about a tenth of 30 seeds lies below 0.1, and none below the limit."""
    toy, values = Toy(vocabulary, 1.5), []
    for seed in range(30):
        plan = SamplingPlan([[1], [2]], 1.0, samples=200, tokens=4, seed=seed)
        arm = SampledArm("true", toy_sampler(toy), True)
        values.append(check_sampling(toy, arm.sample, [arm], plan)[0].p_value)
    assert min(values) > 1e-4
    assert sum(value < 0.1 for value in values) <= 8
    assert sum(value < 0.5 for value in values) >= 7


@pytest.mark.parametrize("bend", [moved_mass, first_draft])
@pytest.mark.parametrize("vocabulary", [8, 300])
def test_bent_laws_are_found(vocabulary: int, bend: Any) -> None:
    toy = Toy(vocabulary, 1.5)
    plan = SamplingPlan([[1], [2]], 1.0, samples=1200, tokens=4)
    arm = SampledArm("bent", toy_sampler(toy, bend), False)
    record = check_sampling(toy, toy_sampler(toy), [arm], plan)[0]
    assert not record.passed
    assert record.total_variation > record.expected_variation


@pytest.mark.parametrize(("vocabulary", "spread"), [(2, 0.1), (5, 4.0), (300, 0.0), (40, 8.0)])
def test_cells_hold_everything_and_none_holds_too_little(vocabulary: int, spread: float) -> None:
    toy = Toy(vocabulary, spread)
    law = sampling_check._PrefixLaw(toy, [1], 1.0)
    cells = sampling_check._cells(law, 3, 200)
    assert sum(cells.values()) == pytest.approx(200)
    assert () in cells
    assert len(cells) == 1 or min(cells.values()) >= 5
    expected = dict.fromkeys(cells, 0.0)  # by enumeration of all texts
    if vocabulary <= 40:
        first = law.after(())
        for a in range(vocabulary):
            second = law.after((a,)) * first[a]
            for b in range(vocabulary):
                for c, share in enumerate((law.after((a, b)) * second[b]).tolist()):
                    expected[sampling_check._cell_of((a, b, c), cells)] += 200 * share
        assert expected == pytest.approx(cells)


def test_bad_plans_and_texts_are_refused(model: Any, plan: SamplingPlan) -> None:
    for change in (
        {"temperature": 0.0}, {"temperature": float("nan")}, {"tokens": 1}, {"samples": 19},
        {"prompts": []}, {"prompts": [[]]},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            replace(plan, **change)
    toy, small = Toy(8, 1.0), SamplingPlan([[1]], 1.0, samples=10, tokens=2)
    sound = toy_sampler(toy)
    for text, words in (([1], "gave 1 tokens"), ([1, 8], "outside"), ([-1, 2], "outside")):
        arm = SampledArm("odd", lambda *_, text=text: text, False)
        with pytest.raises(ConfigError, match=words):
            check_sampling(toy, sound, [arm], small)
