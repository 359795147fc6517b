"""A draft model: its cache, its trees, what it refuses, and what it only warns about."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import specdec
from helpers.families import CHAIN_FAMILIES, FAMILIES, VOCAB, draft_of, model_of
from helpers.laws import GREEDY, SAMPLED, Case, prompts, reference
from helpers.spies import Reads, Seen, cache_error, watch_calls
from specdec import SpecConfig
from specdec.contracts import BatchState, RoundResult
from specdec.drafters import growth
from specdec.drafters.draft_model import loading
from specdec.drafters.draft_model.drafter import DraftModel, DraftModelConfig
from specdec.drafters.draft_model.runner import RaggedDraft
from specdec.errors import ConfigError, DraftWarning, VocabularyMismatchError
from specdec.registry import methods
from specdec.round import verify as verification
from specdec.round.tree import bucket_size
from specdec.round.verify import walk_on_device
from specdec.stats import RoundRecord
from specdec.targets import watched_test

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_warnings() -> Any:
    """A draft that silently gives up would pass every test of the text."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DraftWarning)
        yield


def llama(**options: Any) -> Any:
    """A draft with another shape than the target's, in float64."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**{
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 256, **options,
    })  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().to(torch.float64)


def call(case: Case, **options: Any) -> Any:
    """A call of the case's model with a draft; checks its text and returns the statistics."""
    sequences, _ = case.generate(specdec=SpecConfig("draft_model", options))
    assert torch.equal(sequences, reference(case)[0])
    stats = specdec.last_stats(case.model)
    assert (stats.method, stats.mode) == ("draft_model", FAMILIES[case.family].mode)
    return stats


# The draft's cache


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_cache_holds_the_text_after_every_round(
    family: str, rows: int, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as the draft has seen it: all but the last token, and but what it did not draft."""
    draft = draft_of(family)
    errors: list[float] = []
    lags: set[int] = set()
    uneven: list[bool] = []

    def watch(seen: Seen, result: RoundResult, record: RoundRecord) -> None:
        drafter: Any = seen.drafter
        if record.index == 0 or not all(seen.call.state.active):
            return
        cache, known = drafter._state.cache, drafter._known
        texts = [text[: n + 1] for text, n in zip(seen.texts(), known, strict=True)]
        lags.update(len(text) - n for text, n in zip(seen.texts(), known, strict=True))
        uneven.append(len({len(path) for path in record.paths}) > 1)
        cache.set_lengths(known)
        errors.append(cache_error(draft, cache, texts))

    watch_calls(monkeypatch, watch)
    stats = call(Case(family, GREEDY, rows), draft=draft, num_draft_tokens=4, top_k=top_k)
    assert len(errors) > 5
    assert max(errors) <= 1e-12
    if top_k == 1:
        assert lags == {1, 2}  # the bonus alone, or behind a token that was never fed
    else:
        assert max(lags) == 5  # all that a tree emitted is read again
    assert rows == 1 or any(uneven)
    assert 1.5 < stats.acceptance_length < 4.9


@pytest.mark.parametrize("budgets", [[0], [4, 0, 0, 0], [4, *[0] * 20], [1, 3, 2]])
@pytest.mark.parametrize("rows", [1, 4])
def test_rounds_without_a_budget_are_caught_up(
    rows: int, budgets: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty tokens at once are a prefill again, a few are one forward."""
    rounds: list[int] = []

    class Policy:
        def nodes(self, state: BatchState) -> int:
            rounds.append(budgets[len(rounds) % len(budgets)])
            return rounds[-1]

        def observe(self, record: RoundRecord) -> None:
            pass

    from specdec.generate import decode

    monkeypatch.setattr(decode, "FixedBudget", lambda size: Policy())
    case = Case("llama", GREEDY, rows)
    stats = call(case, draft=case.model, num_draft_tokens=4)
    wanted = sum(rounds) * rows
    assert stats.drafted_nodes <= wanted
    assert rows > 1 or stats.tokens_by_source["draft"] == stats.drafted_nodes


@pytest.mark.parametrize("family", [*CHAIN_FAMILIES, "llama", "gpt_oss", "llama4_text"])
def test_a_perfect_draft_is_believed_to_the_end(family: str) -> None:
    """The draft is the target itself: tau is depth + 1; one row of a draft that is a chain."""
    case = Case(family, GREEDY, 1, FAMILIES[family].widest)
    stats = call(case, draft=case.model, num_draft_tokens=12)
    assert stats.histogram == {13: 3}  # 39 tokens after the first
    assert stats.tokens_by_source == {"target": 4, "draft": 36}
    if FAMILIES[family].mode == "chain":  # no siblings there
        assert call(case, draft=case.model, num_draft_tokens=12, top_k=3).histogram == {13: 3}


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_several_rows_of_a_perfect_draft(family: str) -> None:
    if family == "bloom":
        case = Case(family, GREEDY, 4, torch.float32)
        with pytest.raises(ConfigError, match=r"one row at a time, got 4 rows: .*; generate row"):
            call(case, draft=case.model)
        return
    assert call(Case(family, GREEDY, 4), draft=model_of(family)).acceptance_length > 5.5


def test_siblings_are_accepted() -> None:
    """With a beam of one, a tree is a chain with its siblings."""
    records: list[RoundRecord] = []
    case, draft = Case("llama", SAMPLED, 4), draft_of("llama")
    alone = call(case, draft=draft, num_draft_tokens=3)
    options = {"draft": draft, "num_draft_tokens": 3, "top_k": 3}
    config = SpecConfig("draft_model", options, on_round=records.append)
    assert torch.equal(case.generate(specdec=config)[0], reference(case)[0])
    siblings = 0
    for record in records[1:]:
        assert record.trees is not None
        for tree, path in zip(record.trees, record.paths, strict=True):
            first = {tree.parents.index(parent, 1) for parent in tree.parents[1:]}
            assert {parent for parent in tree.parents[1:] if parent} <= first
            siblings += len(set(path) - first)
    assert siblings > 5
    assert specdec.last_stats(case.model).rounds < alone.rounds


@pytest.mark.parametrize("how", ["nodes", "budget"])
def test_a_small_tree_holds_the_likeliest_nodes(how: str) -> None:
    """Five of ten, chosen when all five levels were drafted."""
    case, draft = Case("llama", GREEDY), FAMILIES["llama"].build(torch.float64)
    size = {"nodes": 5} if how == "nodes" else {}
    budget = 5 if how == "budget" else None
    config = SpecConfig("draft_model", {"draft": draft, "top_k": 2, **size}, budget=budget)
    forwards: list[int] = []
    draft.register_forward_hook(lambda *_: forwards.append(1))
    case.generate(specdec=config)
    forwards.clear()  # the self-test's among them
    sequences, _ = case.generate(specdec=config)
    assert torch.equal(sequences, reference(case)[0])
    stats = specdec.last_stats(case.model)
    assert 5 * (stats.rounds - 1) <= stats.drafted_nodes <= 5 * stats.rounds
    assert 5 * (stats.rounds - 2) < len(forwards) <= 5 * stats.rounds
    assert stats.acceptance_length > 2


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("top_k", [1, 3])
def test_padded_trees_give_the_same_text(
    top_k: int, rows: int, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes for which kernels are kept, as on a GPU."""
    sizes = set()

    def padded_size(nodes: int, device: torch.device) -> int:
        sizes.add((nodes, bucket_size(nodes)))
        return bucket_size(nodes)

    monkeypatch.setattr(verification, "walk_on_host", walk_on_device)
    case, draft = Case("gemma3", GREEDY, rows), draft_of("gemma3")
    wanted = call(case, draft=draft, top_k=top_k, draft_sampling=sampled and top_k == 1)
    monkeypatch.setattr(growth, "padded_size", padded_size)
    found = call(case, draft=draft, top_k=top_k, draft_sampling=sampled and top_k == 1)
    assert found.histogram == wanted.histogram
    assert found.drafted_nodes == wanted.drafted_nodes
    assert top_k == 1 or (16, 16) in sizes
    assert top_k == 1 or any(padded > size for size, padded in sizes)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_round_costs_one_forward_a_token_and_no_read(
    rows: int, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft, counts, reads = draft_of("llama"), [], Reads()  # type: ignore[no-untyped-call]
    forwards = 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    def propose(self: DraftModel, state: BatchState, budget: int) -> Any:
        nonlocal forwards
        forwards = 0
        with reads, monkeypatch.context() as patch:
            for name in ("tolist", "numpy", "cpu"):
                patch.setattr(torch.Tensor, name, None)
            trees = plain_propose(self, state, budget)
        counts.append((forwards, trees.max_depth))
        return trees

    plain_propose = DraftModel.propose
    monkeypatch.setattr(DraftModel, "propose", propose)
    options = {"draft": draft, "num_draft_tokens": 3, "draft_sampling": sampled}
    case = Case("llama", GREEDY, rows)
    handle = draft.register_forward_hook(count)
    try:
        call(case, **options)
        counts.clear()  # the self-test's among them
        call(case, **options)
    finally:
        handle.remove()
    assert len(counts) > 5
    assert all(made == depth for made, depth in counts)
    assert max(made for made, _ in counts) == 3
    assert reads.count == 0


# What it must not touch


def test_the_draft_is_left_as_it_was() -> None:
    """Training mode with dropout, module by module, and no gradients."""
    case = Case("llama", GREEDY, 4)
    wanted = call(case, draft=draft_of("llama"))
    draft = copy.deepcopy(draft_of("llama"))
    draft.train()
    for layer in draft.model.layers:
        layer.self_attn.attention_dropout = 0.9
    draft.model.layers[0].eval()
    modes = [module.training for module in draft.modules()]
    assert call(case, draft=draft).histogram == wanted.histogram
    assert [module.training for module in draft.modules()] == modes
    assert all(parameter.grad is None for parameter in draft.parameters())


def test_another_dtype_and_shape() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call(Case("gemma3", SAMPLED, 4), draft=copy.deepcopy(llama()).to(dtype), top_k=2)


def test_a_sampled_draft_is_drawn_anew_in_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """From where torch's generator stands, which is not moved by it."""
    calls = watch_calls(monkeypatch)
    case = Case("llama", SAMPLED)
    config = SpecConfig("draft_model", {"draft": draft_of("llama"), "draft_sampling": True})

    def seed() -> int:
        case.model.generate(
            **prompts(1), do_sample=True, max_new_tokens=8, specdec=config, pad_token_id=0
        )
        drafter: Any = calls[-1].drafter
        return int(drafter._generator.initial_seed())

    torch.manual_seed(0)
    seeds = [seed(), seed(), seed()]
    assert len(set(seeds)) == 3
    torch.manual_seed(0)
    assert seed() == seeds[0]


# Contexts, ids and vocabularies


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    ("architecture", "positions"),
    [("llama", 3), ("llama", 12), ("llama", 30), ("gpt2", 16), ("gpt2", 30)],
)
def test_a_draft_with_a_short_context_stops_drafting(
    architecture: str, rows: int, positions: int
) -> None:
    """One warning; no position beyond a learned table is ever asked for."""
    if architecture == "llama":
        draft = llama(max_position_embeddings=positions)
    else:
        config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2,
                                         n_positions=positions)  # fmt: skip
        draft = transformers.GPT2LMHeadModel(config).eval()
    case = Case("llama", GREEDY, rows)
    with pytest.warns(DraftWarning, match=f"context of {positions} tokens is full") as caught:
        stats = call(case, draft=draft)
    assert len(caught) == 1
    shortest = 12 if rows == 1 else 5  # prompts of 11 tokens, and of 4, with the first new one
    assert (stats.drafted_nodes > 0) == (shortest + 4 <= positions)


def test_equal_contexts_end_without_a_warning() -> None:
    """The target's own last position comes first."""
    model = specdec.augment(llama(max_position_embeddings=40), "none")
    wanted = model.generate(**prompts(4), max_new_tokens=29, specdec=False)
    for depth in range(4, 9):
        config = SpecConfig("draft_model", {"draft": model, "num_draft_tokens": depth})
        assert torch.equal(model.generate(**prompts(4), max_new_tokens=29, specdec=config), wanted)


def test_ids_that_the_draft_lacks_stop_its_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids of the target's padding: the sizes are close enough."""
    sizes: list[list[int]] = []
    watch_calls(monkeypatch, lambda _, result, __: sizes.append(result.trees.sizes.tolist()))
    torch.manual_seed(0)
    target = specdec.augment(llama(vocab_size=VOCAB + 4), "none")
    with torch.no_grad():
        target.lm_head.weight[VOCAB:] = 0  # never emitted
    ids = prompts(4)["input_ids"].clone()
    ids[2, -2] = VOCAB + 1
    mask = prompts(4)["attention_mask"]
    wanted = target.generate(ids, attention_mask=mask, max_new_tokens=20, specdec=False)
    config = SpecConfig("draft_model", {"draft": llama()})
    with pytest.warns(
        DraftWarning, match=rf"has {VOCAB} token ids, and a text holds id {VOCAB + 1}"
    ):
        found = target.generate(ids, attention_mask=mask, max_new_tokens=20, specdec=config)
    assert torch.equal(found, wanted)
    assert specdec.last_stats(target).drafted_nodes > 20
    assert {row[2] for row in sizes} == {1}
    assert sizes[1] == [6, 6, 1, 6]


@pytest.mark.parametrize("sampled", [False, True])
def test_ids_that_the_target_lacks_are_never_proposed(
    sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft, seen = llama(vocab_size=VOCAB + 4), []
    with torch.no_grad():
        draft.lm_head.weight[VOCAB:] = draft.lm_head.weight[:4] * 3  # the likeliest ones

    def watch(_: Seen, result: RoundResult, record: RoundRecord) -> None:
        seen.extend(result.trees.tokens.flatten().tolist())
        if sampled and record.index:
            law = result.trees.draft_law
            assert law is not None or result.trees.size == 1
            if law is not None:
                assert float((law[:, 1:].sum(-1) - 1).abs().max()) < 1e-6

    watch_calls(monkeypatch, watch)
    call(Case("llama", GREEDY, 4), draft=draft, draft_sampling=sampled, top_k=1 if sampled else 3)
    assert len(seen) > 100
    assert max(seen) < VOCAB


@pytest.mark.parametrize(("sizes", "fits"), [
    ((512, 500), True), ((32_000, 32_064), True), ((151_936, 152_064), True),
    ((32_000, 32_768), False), ((96, 64), False), ((50_257, 32_000), False),
])  # fmt: skip
def test_vocabularies_of_different_size(sizes: tuple[int, int], fits: bool) -> None:
    """Padding explains a few ids."""
    for one, other in (sizes, sizes[::-1]):
        found = loading.ReadyDraft("x", None, one)
        if fits:
            loading._compare_sizes(found, other)
        else:
            with pytest.raises(VocabularyMismatchError, match=f"{one} token ids .* {other}"):
                loading._compare_sizes(found, other)


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tokenizer(words: str) -> Any:
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token=words[0]))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


def test_tokenizers_are_compared_before_any_forward(tmp_path: Path) -> None:
    draft, forwards = llama(vocab_size=VOCAB + 40), []
    handle = draft.register_forward_hook(lambda *_: forwards.append(1))
    case = Case("llama", GREEDY)
    pair = {"tokenizer": tokenizer(LETTERS), "draft_tokenizer": tokenizer(LETTERS[::-1])}
    with pytest.raises(VocabularyMismatchError, match="tokenizer is not the target's"):
        call(case, draft=draft, **pair)
    with pytest.raises(VocabularyMismatchError, match="136 token ids and the target 96"):
        call(case, draft=draft)
    assert forwards == []
    handle.remove()
    pair["draft_tokenizer"] = tokenizer(LETTERS)  # the same: then sizes say nothing
    call(case, draft=draft, **pair)
    draft.save_pretrained(tmp_path)
    tokenizer(LETTERS[::-1]).save_pretrained(tmp_path)
    with pytest.raises(VocabularyMismatchError, match="tokenizer is not the target's"):
        call(case, draft=tmp_path, tokenizer=tokenizer(LETTERS))
    call(case, draft=str(tmp_path), tokenizer=tokenizer(LETTERS[::-1]))


def test_a_folder_without_a_tokenizer_goes_by_its_size(tmp_path: Path) -> None:
    """From no files at all, transformers makes a GPT-2 tokenizer of one token."""
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2,
                                     bos_token_id=None, eos_token_id=None)  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path)) == 1
    call(Case("llama", GREEDY), draft=tmp_path, tokenizer=tokenizer(LETTERS))


# Options and loading


def test_a_folder_is_loaded_and_tested_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama().save_pretrained(tmp_path)
    made: list[str] = []
    for module, name in ((loading, "read_draft_model"), (watched_test, "self_test")):
        plain = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, plain=plain, name=name: made.append(name) or plain(*a)
        )
    target = specdec.augment(FAMILIES["llama"].build(torch.float64), "draft_model", draft=tmp_path)
    made.clear()  # the target's own
    wanted = target.generate(**prompts(4), max_new_tokens=20, specdec=False)
    for _ in range(3):
        assert torch.equal(target.generate(**prompts(4), max_new_tokens=20), wanted)
        assert specdec.last_stats(target).drafted_nodes > 20
    assert made == ["read_draft_model", "self_test"]
    others = [draft_of("llama"), target]
    for draft in [*others, *others]:
        target.generate(**prompts(1), max_new_tokens=4,
                        specdec=SpecConfig("draft_model", {"draft": draft}))  # fmt: skip
    assert made == ["read_draft_model", *["self_test"] * 3]


def test_an_augmented_model_with_a_draft_can_be_copied() -> None:
    model = specdec.augment(llama(), "draft_model", draft=llama())
    wanted = model.generate(**prompts(1), max_new_tokens=8)
    assert torch.equal(copy.deepcopy(model).generate(**prompts(1), max_new_tokens=8), wanted)
    assert len(str(specdec.last_stats(model))) < 400


@pytest.mark.parametrize(("options", "message"), [
    ({}, "draft_model needs draft="),
    ({"draft": 7}, "a folder or a hub id; got int"),
    ({"draft": torch.nn.Linear(2, 2)}, "got Linear"),
    ({"draft": "./not-here"}, "no folder './not-here'"),
    ({"draft": "/not/here"}, "no folder"),
    ({"draft": ""}, "name is empty"),
    ({"draft": "pyproject.toml"}, "is a file"),
    ({"draft": "specdec"}, "no config.json in it"),
    ({"draft": "x/y", "num_draft_tokens": 0}, "num_draft_tokens must be a whole number from 1"),
    ({"draft": "x/y", "num_draft_tokens": 4.0}, "must be a whole number from 1 to 4,096, got 4.0"),
    ({"draft": "x/y", "top_k": 0}, "top_k must be a whole number from 1"),
    ({"draft": "x/y", "top_k": 1000}, "4096 nodes"),
    ({"draft": "x/y", "top_k": 2, "draft_sampling": True}, "leave top_k at 1"),
    ({"draft": "x/y", "temperature": 0}, "a number from 1e-06 on, got 0"),
    ({"draft": "x/y", "temperature": "hot"}, "got 'hot'"),
    ({"draft": "x/y", "temperature": float("nan")}, "a number from 1e-06 on, got nan"),
    ({"draft": "x/y", "depth": 3}, "has no option 'depth'"),
])  # fmt: skip
def test_wrong_options_are_refused_when_augmenting(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        specdec.augment(model_of("llama"), "draft_model", **options)
    with pytest.raises(ConfigError, match=message):
        methods.configure("draft_model", options)


def test_what_cannot_draft_is_refused(tmp_path: Path) -> None:
    encoder = transformers.T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1,
                                    num_heads=2)  # fmt: skip
    with pytest.raises(ConfigError, match="T5ForConditionalGeneration is none"):
        DraftModelConfig(draft=transformers.T5ForConditionalGeneration(encoder))
    case = Case("llama", GREEDY)
    with pytest.raises(ConfigError, match="top_k must be at most the 96 tokens"):
        call(case, draft=draft_of("llama"), top_k=97)
    draft = llama()
    draft.forward = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ConfigError, match="LlamaForCausalLM cannot draft, because "):
        call(case, draft=draft)
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(ConfigError, match="cannot load"):
        call(case, draft=str(tmp_path))
    assert torch.equal(case.generate(specdec=SpecConfig("none"))[0], reference(case)[0])


# The runner by itself


@torch.no_grad()
def test_catching_up_in_any_portions_gives_the_logits_of_one_forward() -> None:
    model = draft_of("gemma3")
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(1, VOCAB, (3, 60), generator=generator).tolist()
    drafter: Any = DraftModel(DraftModelConfig(draft=model))
    drafter._draft = RaggedDraft(model, VOCAB)
    drafter._state, drafter._known = drafter._draft.begin(3, 8), [0, 0, 0]
    for stops in ([5, 9, 7], [6, 11, 8], [8, 12, 40], [50, 13, 41], [51, 14, 0], [53, 15, 0]):
        now = [text[:stop] for text, stop in zip(texts, stops, strict=True)]
        log_probs = drafter._catch_up(now, [stop > 0 for stop in stops])
        for row, text in enumerate(now):
            if text:
                logits = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
                assert torch.allclose(log_probs[row], logits.log_softmax(-1), atol=0, rtol=1e-9)
        step = torch.tensor([[1], [2], [3]])
        drafter._draft.expand(drafter._state, step, torch.zeros_like(step))
        drafter._draft.rewind(drafter._state)
        assert drafter._known == drafter._state.verified or 0 in stops
