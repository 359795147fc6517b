"""Near ties pass, everything else is found: in fp32 by the text, in half precision by regrets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import specdec
import specdec.loop
from specdec.audit.exactness import audit, reference_model, replay_noise
from specdec.demo import load_target, load_tokenizer
from specdec.errors import ConfigError, SpecdecError
from specdec_bench.arm_names import parse_arm
from specdec_bench.checks import text as text_module
from specdec_bench.checks.teacher_forced import LARGEST_RATIO, Judged, Requests, judge
from specdec_bench.checks.text import ReferenceModel, check_text
from specdec_bench.results.records import Setting, UnitRecord

VOCAB, NEW, SEED = 256, 48, 5
PROMPTS = [list(range(2, 14)), [7, 3, 9, 200, 41], list(range(90, 115)), [5, 5, 5, 5]]


@dataclass
class Unit:
    record: UnitRecord
    prompt_ids: Sequence[Sequence[int]]
    text_ids: Sequence[Sequence[int]]


def make_model(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture(scope="module")
def bf16() -> LlamaForCausalLM:
    return make_model(torch.bfloat16)


@pytest.fixture(scope="module")
def reference() -> ReferenceModel:
    return ReferenceModel()


def decode(
    model: Any, rows: Sequence[Sequence[int]], temperature: float = 0.0, **extra: Any
) -> list[list[int]]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    options = sampling if temperature else {"do_sample": False}
    torch.manual_seed(SEED)
    text = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, pad_token_id=0, **options, **extra
    )
    return text[:, width:].tolist()


def unit_of(model: Any, rows: Sequence[Sequence[int]], temperature: float = 0.0) -> Unit:
    texts = decode(model, rows, temperature)
    record = UnitRecord(0, "u", "c", "k", SEED, [*map(len, rows)], NEW, 0.0, "")
    return Unit(record, rows, texts)


def setting(dtype: str, rows: int = 1, temperature: float = 0.0) -> Setting:
    return Setting(dtype, rows, temperature)


def test_equal_texts_need_no_reference() -> None:
    model, fresh = make_model(torch.float32), ReferenceModel()
    unit = unit_of(model, PROMPTS)
    found = check_text(fresh, model, unit, unit.text_ids, setting("bfloat16", 4))
    assert found == ("exact", {"exact": 4 * NEW, "near_tie": 0, "wrong": 0}, None, None)
    assert not fresh.made


def test_a_copy_that_does_not_fit_is_made_on_the_cpu(
    bf16: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def made(model: object, device: object = None) -> object:
        asked.append(device)
        return reference_model(model, device)

    monkeypatch.setattr(text_module, "reference_model", made)
    for fits, device in ((True, None), (False, "cpu")):
        monkeypatch.setattr(text_module, "_fits", lambda _, fits=fits: fits)
        assert ReferenceModel().of(bf16).dtype == torch.float64
        assert asked.pop() == device


def test_fp32_forgives_nothing() -> None:
    """A swap to the second best token, whatever it costs, is wrong from there on."""
    model, fresh = make_model(torch.float32), ReferenceModel()
    unit = unit_of(model, PROMPTS[:2])
    rows = [list(row) for row in unit.text_ids]
    rows[1][20] = (rows[1][20] + 1) % VOCAB
    verdict, tokens, first, worst = check_text(fresh, model, unit, rows, setting("float32", 2))
    assert (verdict, first, worst) == ("wrong", (1, 20), None)
    assert tokens == {"exact": NEW + 20, "near_tie": 0, "wrong": NEW - 20}
    assert not fresh.made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("change", ["short", "long", "empty"])
def test_lengths_count(
    bf16: LlamaForCausalLM, reference: ReferenceModel, dtype: str, change: str
) -> None:
    unit = unit_of(bf16, PROMPTS[:1])
    text = list(unit.text_ids[0])
    row = {"short": text[:-3], "long": [*text, 1], "empty": []}[change]
    verdict, tokens, first, _ = check_text(reference, bf16, unit, [row], setting(dtype))
    assert verdict == "wrong"
    assert first == (0, min(len(row), NEW))
    assert tokens["wrong"] == abs(len(row) - NEW)
    assert sum(tokens.values()) == max(len(row), NEW)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_our_bf16_texts_are_near_ties_at_worst(
    bf16: LlamaForCausalLM, reference: ReferenceModel, rows: int, temperature: float
) -> None:
    """This model's noise is large, so texts part; the noise of batch 4 is drawn as plain draws."""
    seen = set()
    for first in range(2):
        prompts = (PROMPTS * 2)[first : first + rows]
        unit = unit_of(bf16, prompts, temperature)
        with specdec.augmented(bf16, "lookahead", window=4, ngram=4, guesses=4):
            emitted = decode(bf16, prompts, temperature)
        where = setting("bfloat16", rows, temperature)
        verdict, tokens, _, worst = check_text(reference, bf16, unit, emitted, where)
        seen.add(verdict)
        assert tokens["wrong"] == 0
        assert sum(tokens.values()) == rows * NEW
        assert worst is None or 0 <= worst <= 2
    assert "near_tie" in seen, "no text parted: the test shows nothing"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_other_noise_than_plains_is_wrong(
    bf16: LlamaForCausalLM, reference: ReferenceModel, temperature: float
) -> None:
    """Texts of another seed, and greedy texts passed off as samples."""
    unit = unit_of(bf16, PROMPTS, 0.8)
    other = unit_of(bf16, PROMPTS[::-1], temperature).text_ids[::-1]
    where = setting("bfloat16", 4, 0.8)
    assert check_text(reference, bf16, unit, other, where)[0] == "wrong"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_batches_are_judged_as_the_core_judges_single_rows(
    bf16: LlamaForCausalLM, temperature: float
) -> None:
    prompt = PROMPTS[0]
    text = decode(bf16, [prompt], temperature)[0]
    text[30] = (text[30] + 1) % VOCAB
    exact = reference_model(bf16)
    mine = judge(exact, bf16, Requests([prompt], SEED, temperature), [text])
    noise = replay_noise(SEED, NEW, VOCAB, torch.device("cpu")) if temperature else None
    sequence = torch.tensor(prompt + text)
    core = audit(exact, bf16, sequence, len(prompt), noise, temperature or 1.0)
    assert torch.allclose(mine.regrets[0], core.regrets, atol=1e-9)
    assert torch.allclose(mine.noise[0], core.noise, atol=1e-9)
    assert int(mine.wrong().sum()) == core.violations > 0


def test_padding_changes_neither_the_noise_nor_the_regrets(bf16: LlamaForCausalLM) -> None:
    """In fp64 a padded row is the unpadded one; its rounding differs, its size does not."""
    texts = decode(bf16, PROMPTS)
    exact = reference_model(bf16)
    together = judge(exact, bf16, Requests(PROMPTS), texts)
    for row, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        alone = judge(exact, bf16, Requests([prompt]), [text])
        assert torch.allclose(together.regrets[row], alone.regrets[0], atol=1e-9)
        spread = float(together.noise[row].mean() / alone.noise[0].mean())
        assert 0.8 < spread < 1.25


# --- planted faults on the bundled target, through the real loop ---


@pytest.fixture(scope="module")
def demo_prompts() -> list[list[int]]:
    tokenizer = load_tokenizer()
    return [
        tokenizer(text).input_ids
        for text in ("def read_lines(path):\n    ", "class Queue:\n    def __init__(self")
    ]


def unchecked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verifier that accepts the first draft token whatever the target picked."""
    right = specdec.loop.verify

    def lossy(trees: Any, picks: torch.Tensor) -> Any:
        if trees.size > 1:
            picks = picks.clone()
            picks[:, 0] = trees.tokens[:, 1]
        return right(trees, picks)

    monkeypatch.setattr(specdec.loop, "verify", lossy)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_verifier_that_lets_the_first_draft_token_through_is_wrong(
    dtype: str, rows: int, demo_prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fresh = load_target(getattr(torch, dtype)), ReferenceModel()
    model.generation_config.eos_token_id = None
    prompts = demo_prompts[:rows]
    unit = unit_of(model, prompts)
    with specdec.augmented(model, "recycling", nodes=8):
        sound = decode(model, prompts)
        unchecked_first(monkeypatch)
        lossy = decode(model, prompts)
    where = setting(dtype, rows)
    assert check_text(fresh, model, unit, sound, where)[0] != "wrong"
    verdict, tokens, first, worst = check_text(fresh, model, unit, lossy, where)
    assert verdict == "wrong"
    assert tokens["wrong"] > 0
    assert first is not None
    assert worst is None if dtype == "float32" else worst is not None and worst > 2


def test_a_near_tie_is_near_and_its_neighbour_is_wrong() -> None:
    """One token swapped for the runner-up where rounding could decide, and where it could not."""
    model, fresh = make_model(torch.bfloat16), ReferenceModel()
    unit = unit_of(model, PROMPTS[:1])
    exact = fresh.of(model)
    text = list(unit.text_ids[0])
    judged = judge(exact, model, Requests(PROMPTS[:1]), [text])
    logits = exact(input_ids=torch.tensor([PROMPTS[0] + text])).logits[0, len(PROMPTS[0]) - 1 : -1]
    top = logits.topk(2).values
    gaps, noise = top[:, 0] - top[:, 1], judged.noise[0]
    near = int((gaps / noise).argmin())
    far = int((gaps / noise).argmax())
    assert gaps[near] < noise[near]
    assert gaps[far] > 3 * noise[far]
    for position, wanted in ((near, "near_tie"), (far, "wrong")):
        pair = logits[position].topk(2).indices.tolist()
        swapped = pair[1] if pair[0] == text[position] else pair[0]
        # What follows is plain's own text on the swapped prefix, so the swap alone is judged.
        prefix = [*PROMPTS[0], *text[:position], swapped]
        after = decode(model, [prefix])[0][: NEW - position - 1]
        row = [*text[:position], swapped, *after]
        verdict, tokens, first, _ = check_text(fresh, model, unit, [row], setting("bfloat16"))
        assert verdict == wanted
        assert first == (0, position)
        assert tokens[wanted] == 1


# --- what cannot be judged says so ---


def test_processors_that_the_rule_does_not_know_are_refused(
    bf16: LlamaForCausalLM, reference: ReferenceModel
) -> None:
    unit = unit_of(bf16, PROMPTS[:1])
    unit = replace(unit, text_ids=decode(bf16, PROMPTS[:1], repetition_penalty=1.8))
    rows = [list(unit.text_ids[0])]
    rows[0][-1] = (rows[0][-1] + 1) % VOCAB
    with pytest.raises(SpecdecError, match="repetition_penalty"):
        check_text(ReferenceModel(), bf16, unit, rows, setting("bfloat16"))


def test_bad_input_is_refused_or_wrong(bf16: LlamaForCausalLM, reference: ReferenceModel) -> None:
    unit = unit_of(bf16, PROMPTS[:1])
    with pytest.raises(ConfigError, match="int8"):
        check_text(reference, bf16, unit, unit.text_ids, setting("int8"))
    with pytest.raises(ConfigError, match="0 rows where plain has 1"):
        check_text(reference, bf16, unit, [], setting("bfloat16"))
    for token in (-1, VOCAB, 10**12):
        row = [token, *unit.text_ids[0][1:]]
        assert check_text(reference, bf16, unit, [row], setting("bfloat16"))[0] == "wrong"


def test_scores_that_are_no_numbers_are_wrong() -> None:
    judged = Judged(
        torch.tensor([[float("nan"), 0.5, float("inf"), 0.0]], dtype=torch.float64),
        torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=torch.float64),
        torch.zeros(1, 4, dtype=torch.bool),
    )
    assert judged.wrong().tolist() == [[True, True, True, False]]
    assert judged.ratios().tolist() == [[LARGEST_RATIO, LARGEST_RATIO, LARGEST_RATIO, 0.0]]


def test_one_reference_a_model() -> None:
    holder, first, second = ReferenceModel(), make_model(torch.bfloat16), make_model(torch.float16)
    copy = holder.of(first)
    assert copy.dtype == torch.float64
    assert holder.of(first) is copy
    holder.trust(Setting("bfloat16"))
    assert holder.of(second) is not copy
    assert not holder.trusts(Setting("bfloat16"))


def test_who_promises_the_text() -> None:
    for name, temperature, wanted in (
        ("hf", 0.8, True),
        ("hf_assisted", 0.0, True),
        ("hf_assisted", 0.8, False),
        ("hf_prompt_lookup", 0.8, False),
        ("server:http://localhost:8000", 0.8, False),
        ("loop0", 0.8, True),
        ("eagle3", 0.8, True),
        ("draft_model", 0.8, True),
        ("draft_model:draft_sampling=true", 0.8, False),
        ("draft_model:draft_sampling=true", 0.0, True),
    ):
        assert parse_arm(name).promises_text(temperature) is wanted, name
