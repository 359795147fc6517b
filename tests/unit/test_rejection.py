"""Drafts that were sampled: what is emitted has the target's law, exactly and in experiment."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

import specdec
from specdec import SpecConfig
from specdec.generate import call
from specdec.round import rejection, tree
from specdec.round import verify as verification
from specdec.round.noise import NoiseTape
from specdec.round.pickers import picker_of
from specdec.round.prefix import PrefixIds
from specdec.round.tree import TokenTree, TreeBatch, bucket_size
from specdec.round.verify import verify, walk_on_device

SMALL = 4  # vocabulary of the enumeration
WIDE, DRAWS, FEW = 16, 50_000, 2_500
CPU = torch.device("cpu")

# p and q at one node. Nodes of a case take turns, so that a law of the wrong node is noticed.
LAWS: dict[str, tuple[list[float], list[float]]] = {
    "ordinary": ([0.5, 0.3, 0.15, 0.05], [0.2, 0.2, 0.1, 0.5]),
    "other way round": ([0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]),
    "equal": ([0.25, 0.35, 0.1, 0.3], [0.25, 0.35, 0.1, 0.3]),
    "zeros in p": ([0.0, 0.6, 0.4, 0.0], [0.3, 0.3, 0.2, 0.2]),
    "zeros in q": ([0.3, 0.3, 0.2, 0.2], [0.0, 0.6, 0.4, 0.0]),
    "p is one token": ([0.0, 0.0, 1.0, 0.0], [0.4, 0.3, 0.2, 0.1]),
    "q is one token": ([0.4, 0.3, 0.2, 0.1], [0.0, 1.0, 0.0, 0.0]),
    "disjoint": ([0.7, 0.3, 0.0, 0.0], [0.0, 0.0, 0.1, 0.9]),
    "nearly equal": ([0.25, 0.25, 0.25, 0.25], [0.25 + 1e-15, 0.25 - 1e-15, 0.25, 0.25]),
}


# Exact: the law of a pick, summed over drafts


def context_laws(first: str, which: int) -> Callable[[tuple[int, ...]], Tensor]:
    """A law for every prefix, [V]: those of `LAWS` from `first` on, its tokens moved around."""
    names = list(LAWS)

    def law(prefix: tuple[int, ...]) -> Tensor:
        turn = sum((token + 1) * 3**at for at, token in enumerate(prefix))
        found = LAWS[names[(names.index(first) + turn) % len(names)]][which]
        return torch.tensor(found, dtype=torch.float64).roll(len(prefix))

    return law


def sampled_chain(draft: tuple[int, ...], draft_law: Callable[..., Tensor]) -> TreeBatch:
    """The chain that a drafter proposes, one row, with the law of each of its tokens."""
    trees = TreeBatch.from_rows([TokenTree.chain(0, draft)], CPU)
    laws = [torch.full((SMALL,), torch.nan, dtype=torch.float64)]  # that of the root is unused
    laws += [draft_law(draft[:at]) for at in range(len(draft))]
    return TreeBatch(
        trees.tokens, trees.parents, trees.sizes, trees.max_depth, draft_law=torch.stack(laws)[None]
    )


def pick_laws(trees: TreeBatch, target_laws: Tensor) -> Tensor:
    """[T, V] law of the pick at every node, the coin of acceptance integrated out."""
    drafted, laws = rejection.children(trees)
    stands = rejection.acceptance(target_laws, laws[0], drafted[0])
    laws = torch.where(drafted[0, :, None] >= 0, laws[0], 0)
    replaced = rejection.replacement(target_laws, laws)
    replaced = replaced / replaced.sum(-1, keepdim=True)
    token = torch.nn.functional.one_hot(drafted[0].clamp(min=0), SMALL).double()
    return stands[:, None] * token + (1 - stands[:, None]) * replaced


def emitted_law(target: Callable[..., Tensor], draft: Callable[..., Tensor]) -> Tensor:
    """[V, V, V] law of three tokens: a round with two drafted ones, and what plain adds to it."""
    total = torch.zeros(SMALL, SMALL, SMALL, dtype=torch.float64)
    for x in product(range(SMALL), repeat=2):
        weight = draft(())[x[0]] * draft(x[:1])[x[1]]
        laws = torch.stack([target(()), target(x[:1]), target(x)])
        picks = pick_laws(sampled_chain(x, draft), laws)
        for y in product(range(SMALL), repeat=3):
            chance = weight * picks[0, y[0]]
            on_path = y[0] == x[0]
            chance = chance * (picks[1, y[1]] if on_path else target(y[:1])[y[1]])
            on_path = on_path and y[1] == x[1]
            total[y] += chance * (picks[2, y[2]] if on_path else target(y[:2])[y[2]])
    return total


def plain_law(target: Callable[..., Tensor]) -> Tensor:
    total = torch.zeros(SMALL, SMALL, SMALL, dtype=torch.float64)
    for y in product(range(SMALL), repeat=3):
        total[y] = target(())[y[0]] * target(y[:1])[y[1]] * target(y[:2])[y[2]]
    return total


@pytest.mark.parametrize("first", LAWS)
def test_two_drafted_tokens_and_the_bonus_have_the_targets_law(first: str) -> None:
    target, draft = context_laws(first, 0), context_laws(first, 1)
    assert float((emitted_law(target, draft) - plain_law(target)).abs().max()) <= 1e-12


@pytest.mark.parametrize(("name", "other"), [(n, o) for n in LAWS for o in LAWS])
def test_one_drafted_token_has_the_targets_law(name: str, other: str) -> None:
    """Every p against every q."""
    p, q = (torch.tensor(LAWS[n][at], dtype=torch.float64) for n, at in ((name, 0), (other, 1)))
    law = sum(
        q[x] * pick_laws(sampled_chain((x,), lambda _: q), torch.stack([p, p]))[0]
        for x in range(SMALL)
    )
    assert float((law - p).abs().max()) <= 1e-12


@pytest.mark.parametrize("name", LAWS)
def test_a_pick_is_the_coin_and_the_race(name: str) -> None:
    """`picks` does what the enumeration integrates: threshold of the coin, law of the race."""
    p, q = (torch.tensor(law, dtype=torch.float64) for law in LAWS[name])
    noise = torch.empty(64, SMALL, dtype=torch.float64)
    noise.exponential_(1, generator=torch.Generator().manual_seed(0))
    for x in q.nonzero()[:, 0].tolist():  # what can be drafted at all
        drafted = torch.full((64,), x)
        edge = float(rejection.acceptance(p, q, torch.tensor(x)))
        pick = partial(rejection.picks, p.expand(64, -1), q.expand(64, -1), drafted, noise=noise)
        if edge > 0:
            below = torch.full((64,), 0.999999 * edge, dtype=torch.float64)
            assert (pick(uniforms=below) == x).all()
        if edge < 1:
            replaced = pick(uniforms=torch.full((64,), edge, dtype=torch.float64))
            weights = (p - q).clamp(min=0)
            assert torch.equal(replaced, (weights / noise).argmax(-1))
            assert (replaced != x).all()
            assert (p[replaced] > 0).all()


def test_children_are_those_of_the_row() -> None:
    """Rows of unequal length: the last node has no child, and padding is none."""
    rows = [TokenTree.chain(9, [1, 2, 3]), TokenTree.chain(9, [4])]
    trees = TreeBatch.from_rows(rows, CPU)
    laws = torch.rand(2, 4, SMALL)
    trees = TreeBatch(trees.tokens, trees.parents, trees.sizes, 3, draft_law=laws)
    drafted, aligned = rejection.children(trees)
    assert drafted.tolist() == [[1, 2, 3, -1], [4, -1, -1, -1]]
    assert torch.equal(aligned[:, :3], laws[:, 1:])
    with pytest.raises(ValueError, match="draft_law"):
        rejection.children(TreeBatch.roots(torch.tensor([1])))


@pytest.mark.parametrize("law", [
    [float("nan")] * SMALL, [0.0] * SMALL, [float("inf"), 0.1, 0.1, 0.1], [-2.0, -1.0, -3.0, -0.5],
    [0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1e-30, 0.0, 0.0, 0.0], [7.0, 1.0, 1.0, 1.0],
    [0.4, 0.1, 0.2, 0.1, 0.1, 0.1],
])  # fmt: skip
def test_laws_that_are_none_never_reach_the_text(law: list[float]) -> None:
    """Not a law, without the drafted token, not normalised, narrower or wider than the target's."""
    p, count = torch.tensor(LAWS["ordinary"][0], dtype=torch.float64), 20_000
    q = torch.tensor(law, dtype=torch.float32)
    torch.manual_seed(0)
    sane = bool((q >= 0).all() and q.sum().isfinite() and q.sum() > 0)
    weights = q if sane and q[0] > 0 else torch.ones(SMALL)
    drafted = torch.multinomial(weights, count, replacement=True)
    if not (sane and q[0] > 0):
        drafted.zero_()  # as argmax gives for NaN
    found = rejection.draw(p.expand(count, -1), q.expand(count, -1), drafted)
    assert chi_square_tail(found, p) > 1e-4


# In experiment, through the picker and the walk


def chi_square_tail(samples: Tensor, law: Tensor) -> float:
    """p-value of the samples under `law` [V]; a token of no mass must not occur."""
    counts = torch.bincount(samples.flatten(), minlength=len(law)).double()
    assert len(counts) == len(law), "a token beyond the vocabulary"
    assert counts[law == 0].sum() == 0
    expected, counts = law[law > 0] * samples.numel(), counts[law > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(max(len(expected) - 1, 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


class Rows:
    """What picker and walk want to know of the rows: all active, as far as one another, no end."""

    def __init__(self, rows: int) -> None:
        self.active, self.count = [True] * rows, 1

    def emitted(self, row: int) -> int:
        return self.count

    def is_final(self, row: int, index: int, token: int) -> bool:
        return False


def random_logits(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 1.5


def top_k_five(ids: Tensor, scores: Tensor) -> Tensor:
    """A processor; the target's law is the one after it."""
    kept = scores.topk(5, -1).values[..., -1:]
    return scores.masked_fill(scores < kept, float("-inf"))


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("along_path", "draws"),
    [(False, DRAWS), (True, FEW), pytest.param(True, DRAWS, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("processor", [None, top_k_five])
@pytest.mark.parametrize("filtered", [False, True])
def test_picker_and_walk_have_the_targets_law(
    filtered: bool, processor: Any, along_path: bool, draws: int
) -> None:
    """Chi-square of first token, second token and bonus over rounds of two drafted tokens."""
    torch.manual_seed(2)
    target = random_logits(1 + WIDE + WIDE * WIDE, WIDE, seed=0)  # by context: (), (x), (x, y)
    draft = random_logits(1 + WIDE, WIDE, seed=1)
    if filtered:
        draft = top_k_five(draft, draft)
    first = torch.multinomial(draft[0].softmax(-1), draws, replacement=True)
    second = torch.multinomial(draft[1 + first].softmax(-1), 1)[:, 0]
    contexts = torch.stack([torch.zeros_like(first), 1 + first, 1 + WIDE + WIDE * first + second])
    laws = torch.stack([torch.zeros(draws, WIDE), *draft.softmax(-1)[contexts[:2]]], 1)
    trees = TreeBatch.chains(torch.stack([torch.zeros_like(first), first, second], 1))
    trees = TreeBatch(trees.tokens, trees.parents, trees.sizes, 2, draft_law=laws)
    prefix = PrefixIds(torch.zeros(draws, 1, dtype=torch.long), 8)
    picker = picker_of(processor, prefix, NoiseTape(draws, CPU), along_path)
    rows = Rows(draws)
    picks = picker.picks(trees, target[contexts.T], rows, rows).ids
    verdict = verify(trees, picks)
    assert torch.equal(verdict.tokens, walk_on_device(trees, picks).tokens)
    tokens, length = verdict.tokens, verdict.length
    wanted = (target if processor is None else processor(None, target)).double().softmax(-1)
    assert chi_square_tail(tokens[:, 0], wanted[0]) > 1e-4
    near = 0.01 * (DRAWS / draws) ** 0.5
    found = torch.bincount(tokens[:, 0], minlength=WIDE) / draws
    assert float((found - wanted[0]).abs().sum() / 2) <= near  # total variation
    agreed = torch.minimum(wanted[0], draft[0].double().softmax(-1)).sum()
    assert float((length > 0).double().mean() - agreed) == pytest.approx(0, abs=near)
    common = int(first[length > 0].mode().values)
    there = tokens[(length > 0) & (tokens[:, 0] == common)]
    assert len(there) > draws / 50
    assert chi_square_tail(there[:, 1], wanted[1 + common]) > 1e-4
    # The bonus: pairs are many, so that each token of the third is compared over all of them.
    whole = length == 2
    expected = wanted[contexts[2, whole]]
    spread = (expected * (1 - expected)).sum(0).sqrt().clamp(min=1)
    counts = torch.bincount(tokens[whole, 2], minlength=WIDE)
    assert whole.sum() > draws / 50
    assert float(((counts - expected.sum(0)) / spread).abs().max()) < 4.5


def test_nan_raises_what_plain_raises() -> None:
    trees = TreeBatch.chains(torch.tensor([[1, 2]]))
    laws = torch.full((1, 2, SMALL), 0.25)
    trees = TreeBatch(trees.tokens, trees.parents, trees.sizes, 1, draft_law=laws)
    logits, rows = torch.full((1, 2, SMALL), torch.nan), Rows(1)
    for along_path in (False, True):
        prefix = PrefixIds(torch.zeros(1, 1, dtype=torch.long), 4)
        picker = picker_of(None, prefix, NoiseTape(1, CPU), along_path)
        if along_path:
            with pytest.raises(RuntimeError, match="probability tensor contains"):
                picker.picks(trees, logits, rows, rows)
        else:
            assert (picker.picks(trees, logits, rows, rows).ids == -2).all()


# The generator


def test_the_tape_is_left_for_good() -> None:
    """Before: draws are put back. After: the generator stays, and steps are drawn on demand."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    kept = NoiseTape(1, CPU)
    kept.step(5, SMALL)
    kept.finish(0)
    assert torch.equal(torch.get_rng_state(), before)
    tape = NoiseTape(1, CPU)
    early = tape.step(2, SMALL)
    tape.leave()
    assert torch.equal(tape.step(2, SMALL), early)
    far = tape.step(1000, SMALL)
    assert torch.equal(tape.step(1000, SMALL), far)
    state = torch.get_rng_state()
    tape.release(1001)
    tape.finish(1)
    assert torch.equal(torch.get_rng_state(), state)


class CountingTape(NoiseTape):
    """Counts its draws."""

    draws = 0

    def _draw(self, vocab_size: int) -> Tensor:
        self.draws += 1
        return super()._draw(vocab_size)


@pytest.mark.parametrize("along_path", [False, True])
def test_rounds_without_a_draft_draw_only_their_own_step(along_path: bool) -> None:
    """After five hundred tokens by rejection, the tape does not make up for them."""
    trees = TreeBatch.chains(torch.tensor([[1, 2]]))
    sampled = TreeBatch(
        trees.tokens, trees.parents, trees.sizes, 1, draft_law=torch.full((1, 2, SMALL), 0.25)
    )
    tape, rows = CountingTape(1, CPU), Rows(1)
    prefix = PrefixIds(torch.zeros(1, 1, dtype=torch.long), 1000)
    picker = picker_of(None, prefix, tape, along_path)
    picker.picks(sampled, torch.zeros(1, 2, SMALL), rows, rows)
    rows.count = 500
    picker.picks(TreeBatch.roots(torch.tensor([3])), torch.zeros(1, 1, SMALL), rows, rows)
    assert tape.draws == 1


# Through generate


@pytest.fixture(scope="module")
def chatty() -> tuple[Any, Any]:
    """A tiny model and a draft of it, with vocabularies of twelve tokens."""
    import transformers

    def build(seed: int) -> Any:
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=12, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
            bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(12)
        model.generation_config.eos_token_id = None
        return model

    return specdec.augment(build(0), "none"), build(1)


def law_of_three(model: Any, prompt: Tensor, warp: Callable[[Tensor], Tensor]) -> Tensor:
    """[V, V, V] plain sampling's law of three tokens, by running every prefix."""
    pairs = torch.cartesian_prod(torch.arange(12), torch.arange(12))
    with torch.no_grad():
        ids = torch.cat([prompt.expand(144, -1), pairs], 1)
        logits = model(input_ids=ids).logits[:, -3:]
    laws = warp(logits.double()).softmax(-1).view(12, 12, 3, 12)
    return laws[0, 0, 0][:, None, None] * laws[:, 0, 1][:, :, None] * laws[:, :, 2]


@pytest.mark.statistical
@pytest.mark.parametrize("as_on_a_gpu", [False, True])
@pytest.mark.parametrize("top_k", [0, 5])
def test_generate_has_plains_law(
    chatty: tuple[Any, Any], top_k: int, as_on_a_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many rows in one batch: prefill, a round with a draft, and the length limit."""
    model, draft = chatty
    if as_on_a_gpu:  # padded trees, picks at all nodes, the walk without a loop
        monkeypatch.setattr(tree, "padded_size", lambda nodes, device: bucket_size(nodes))
        monkeypatch.setattr(verification, "walk_on_host", walk_on_device)
        monkeypatch.setattr(
            call,
            "picker_of",
            lambda *args, along_path, **rest: picker_of(*args, along_path=False, **rest),
        )
    prompt, rows = torch.tensor([[3, 7, 1, 4]]), 2500
    torch.manual_seed(5)
    options = {"draft": draft, "draft_sampling": True, "num_draft_tokens": 2, "temperature": 0.6}
    found = model.generate(
        prompt, do_sample=True, top_k=top_k, temperature=0.8, max_new_tokens=3,
        num_return_sequences=rows, specdec=SpecConfig("draft_model", options),
    )[:, 4:]  # fmt: skip
    stats = specdec.last_stats(model)
    assert stats.histogram[2] > rows / 10  # drafts are accepted, and rejected
    assert stats.histogram[1] > rows / 10

    def warp(logits: Tensor) -> Tensor:
        logits = logits / 0.8
        kept = logits.topk(top_k or 12, -1).values[..., -1:]
        return logits.masked_fill(logits < kept, float("-inf"))

    law = law_of_three(model, prompt, warp)
    for names, marginal in (
        (found[:, 0], law.sum((1, 2))),
        (found[:, 1], law.sum((0, 2))),
        (found[:, 2], law.sum((0, 1))),
        (found[:, 0] * 12 + found[:, 1], law.sum(2).flatten()),
        (found[:, 1] * 12 + found[:, 2], law.sum(0).flatten()),
    ):
        many = marginal * rows >= 5  # cells that are too rare for the test's law become one
        lumped = torch.cat([marginal[many], marginal[~many].sum()[None]])
        index = torch.full((len(marginal),), int(many.sum()))
        index[many] = torch.arange(int(many.sum()))
        assert chi_square_tail(index[names], lumped / lumped.sum()) > 1e-4


class Boom(Exception):
    """Thrown by a user's criterion."""


def test_the_generator_goes_on_from_where_a_call_or_a_failure_left_it(
    chatty: tuple[Any, Any],
) -> None:
    """No two calls share their randomness, the draft's included; the same seed repeats."""
    model, draft = chatty
    config = SpecConfig("draft_model", {"draft": draft, "draft_sampling": True})

    def text(**how: Any) -> list[int]:
        found = model.generate(
            torch.tensor([[3, 7, 1]]), do_sample=True, top_k=0, max_new_tokens=24, specdec=config,
            **how,
        )  # fmt: skip
        return found[0].tolist()

    def fails(ids: Tensor, scores: Any) -> Tensor:
        if ids.shape[1] > 12:
            raise Boom
        return torch.zeros(1, dtype=torch.bool)

    torch.manual_seed(0)
    first, state, second = text(), torch.get_rng_state(), text()
    assert first != second
    torch.manual_seed(0)
    assert text() == first
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(Boom):
        text(stopping_criteria=[fails])
    assert not torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(state)
    assert text() == second


def test_a_greedy_call_with_a_sampled_draft_is_plain(chatty: tuple[Any, Any]) -> None:
    model, draft = chatty
    config = SpecConfig("draft_model", {"draft": draft, "draft_sampling": True})
    prompt, state = torch.tensor([[3, 7, 1]]), torch.get_rng_state()
    wanted = model.generate(prompt, do_sample=False, max_new_tokens=40, specdec=False)
    found = model.generate(prompt, do_sample=False, max_new_tokens=40, specdec=config)
    assert torch.equal(found, wanted)
    assert torch.equal(torch.get_rng_state(), state)
    assert specdec.last_stats(model).drafted_nodes > 40


@pytest.mark.parametrize("rows", [1, 3])
def test_processors_that_look_at_the_prefix_see_what_was_emitted(
    chatty: tuple[Any, Any], rows: int
) -> None:
    """I6: with rejection, too; a token that is forbidden to repeat does not."""
    model, draft = chatty
    config = SpecConfig("draft_model", {"draft": draft, "draft_sampling": True})
    torch.manual_seed(0)
    found = model.generate(
        torch.tensor([[3, 7, 1]]).repeat(rows, 1), do_sample=True, top_k=0, max_new_tokens=30,
        no_repeat_ngram_size=2, repetition_penalty=1.2, specdec=config,
    )  # fmt: skip
    for text in found.tolist():
        pairs = list(pairwise(text))
        assert len(set(pairs)) == len(pairs)
    assert specdec.last_stats(model).acceptance_length > 1.1
