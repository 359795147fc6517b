"""What hostile use must not do in chain mode, and chain mode forced upon models for trees."""

from __future__ import annotations

import copy
import pickle  # noqa: TID251 - that a model survives it is what is tested
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import specdec
from helpers.chains import BATCHES, FEW, NEW, run_both, slowly, truth_of
from helpers.families import FAMILIES, TREE_FAMILIES, WINDOW, model_of
from helpers.hf import plain
from helpers.laws import prompts
from helpers.names import cache_of
from helpers.spies import same_states
from specdec import SpecConfig
from specdec.contracts import BatchState, Needs, RoundResult, Shape
from specdec.errors import DrafterError, FallbackWarning
from specdec.registry import methods
from specdec.round.tree import MAX_NODES, TreeBatch
from specdec.targets.self_test import Capability

pytestmark = pytest.mark.usefixtures("throw_away_methods")

CALL: dict[str, Any] = {**prompts(4), "max_new_tokens": NEW}


# Drafters


@dataclass(frozen=True)
class AbsurdConfig:
    kind: str = "right"
    truth: tuple[tuple[int, ...], ...] = ()


class Absurd:
    """A device drafter: five right tokens a row, and something wrong with the batch."""

    Config = AbsurdConfig
    needs = Needs()
    host_needs = False
    shape: Shape = "any"
    source_names = ("draft",)
    max_nodes = 5

    def __init__(self, config: AbsurdConfig) -> None:
        self._config = config

    def start(self, state: BatchState) -> None:
        """Nothing."""

    def observe_prefill(self, *_: Any) -> None:
        """Nothing."""

    def observe(self, round_result: RoundResult) -> None:
        """Nothing."""

    def propose(self, state: BatchState, budget: int) -> TreeBatch:
        known = zip(self._config.truth, state.tokens, strict=True)
        ahead = [[*text[len(tokens) :], *([1] * 5)][:5] for text, tokens in known]
        tokens = torch.cat([state.pending[:, None], torch.tensor(ahead)], 1)
        trees = TreeBatch.chains(tokens)
        wrong = tokens.clone()
        wrong[:, 2] = {"negative": -3, "beyond the vocabulary": 1000}.get(self._config.kind, 5)
        rootless = tokens.clone()
        rootless[:, 0] += 1
        sizes, parents = trees.sizes, trees.parents
        return {
            "right": trees,
            "negative": replace(trees, tokens=wrong),
            "beyond the vocabulary": replace(trees, tokens=wrong),
            "another root": replace(trees, tokens=rootless),
            "a star": replace(trees, parents=parents.clamp(max=0), max_depth=1),
            "a cycle": replace(trees, parents=parents + 1),
            "short parents": replace(trees, parents=parents[:, :3]),
            "no live node": replace(trees, sizes=sizes * 0),
            "a flat depth": replace(trees, max_depth=0),
            "a great depth": replace(trees, max_depth=99),
            "no nodes": replace(trees, tokens=tokens[:, :0], parents=parents[:, :0], max_depth=0),
            "far too many": TreeBatch.chains(torch.cat([tokens, tokens.repeat(1, 99)], 1)),
            "small integers": replace(trees, tokens=tokens.int(), sizes=sizes.long()),
            "one row more": TreeBatch.chains(torch.cat([tokens, tokens[:1]])),
            "nothing": None,
        }[self._config.kind]


@pytest.fixture(scope="module", autouse=True)
def _absurd() -> Iterator[None]:
    methods.register("absurd", Absurd)
    yield
    methods.unregister("absurd")


HARMLESS = ("right", "negative", "beyond the vocabulary", "another root", "a star", "a cycle",
            "no live node", "a flat depth", "a great depth", "no nodes",
            "far too many", "small integers")  # fmt: skip


@pytest.mark.parametrize("kind", HARMLESS)
@pytest.mark.parametrize("family", ["qwen3_5", slowly("bloom")])
def test_absurd_batches_do_not_change_the_text(family: str, kind: str) -> None:
    model = model_of(family)
    for inputs in (prompts(1), prompts(4)):
        expected = plain(model, **inputs, max_new_tokens=NEW)
        options = {"kind": kind, "truth": truth_of(expected, inputs)}
        for budget in (None, 0, 3):
            config = SpecConfig("absurd", options, budget=budget)
            got = model.generate(**inputs, max_new_tokens=NEW, specdec=config)
            assert torch.equal(got, expected), f"budget {budget}"
        if kind == "right":
            assert specdec.last_stats(model).rounds < NEW / 3


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("one row more", "must return a TreeBatch of 4 rows"),
        ("nothing", "must return a TreeBatch of 4 rows"),
        ("short parents", r"must return parents of shape \[4, 6\], got \[4, 3\]"),
    ],
)
def test_other_batches_are_refused(kind: str, why: str) -> None:
    model = model_of("qwen3_5")
    expected = plain(model, **CALL)
    options = {"kind": kind, "truth": truth_of(expected, CALL)}
    with pytest.raises(DrafterError, match=why):
        model.generate(**CALL, specdec=SpecConfig("absurd", options))
    assert torch.equal(model.generate(**CALL, specdec=SpecConfig("prompt_lookup")), expected)


@pytest.mark.parametrize("family", FEW)
def test_a_drafter_of_trees_alone_runs_as_plain(family: str) -> None:
    model = model_of(family)
    with pytest.warns(FallbackWarning, match="takes single paths only"):
        got = model.generate(**CALL, specdec=SpecConfig("device_bigrams"))
    assert torch.equal(got, plain(model, **CALL))
    assert specdec.last_stats(model).mode == "plain"


@pytest.mark.parametrize("budget", [0, 1, MAX_NODES])
@pytest.mark.parametrize("family", FEW)
def test_budgets_beyond_reason(family: str, budget: int) -> None:
    model = model_of(family)
    expected = plain(model, **CALL)
    options = {"truth": truth_of(expected, CALL)}
    got = model.generate(**CALL, specdec=SpecConfig("oracle", options, budget=budget))
    assert torch.equal(got, expected)


# Prompts and calls


@pytest.mark.parametrize("family", FEW)
def test_prompts_of_one_token(family: str) -> None:
    run_both(model_of(family), input_ids=torch.tensor([[7]]), max_new_tokens=NEW)
    inputs = {
        "input_ids": torch.tensor([[0, 7], [5, 9]]),
        "attention_mask": torch.tensor([[0, 1], [1, 1]]),
    }
    run_both(model_of(family), **inputs, max_new_tokens=NEW)


def _masked(rows: int, column: int) -> dict[str, Tensor]:
    inputs = prompts(rows)
    mask = inputs["attention_mask"].clone()
    mask[:, column] = 0
    return {"input_ids": inputs["input_ids"], "attention_mask": mask}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (_masked(1, -3), "mask has holes"),
        (_masked(4, -3), "mask has holes"),
        (_masked(4, -1), "mask has holes|padded on the right"),
        ({"num_beams": 2}, "num_beams is 2"),
        ({"use_cache": False}, "use_cache is False"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states"),
    ],
)
@pytest.mark.parametrize("family", ["qwen3_5", "mamba2", "bloom"])
def test_what_is_left_to_plain(family: str, more: dict[str, Any], reason: str) -> None:
    model, call = model_of(family), {**CALL, **more}
    with pytest.warns(FallbackWarning, match=reason):
        got = model.generate(**call)
    expected = plain(model, **call)
    if "return_dict_in_generate" in more:
        got, expected = got.sequences, expected.sequences
    assert torch.equal(got, expected)


@pytest.mark.parametrize("family", FEW)
def test_training_mode_without_dropout(family: str) -> None:
    model = copy.deepcopy(model_of(family)).train()
    if family == "bloom":
        model.config.hidden_dropout = model.config.attention_dropout = 0.0
    run_both(model, **CALL)
    assert model.training


@pytest.mark.filterwarnings("error::specdec.errors.FallbackWarning")
@pytest.mark.parametrize("family", [*FEW[:2], *map(slowly, FEW[2:])])
def test_copies_and_blocks(family: str) -> None:
    """A deep copy drives itself, and blocks restore."""
    model = model_of(family)
    expected = plain(model, **CALL)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    own = run_both(twin, **CALL)
    assert not torch.equal(own.plain, expected)
    assert torch.equal(run_both(model, **CALL).ours, expected)
    before = model.generate
    with specdec.augmented(model, "prompt_lookup"):
        assert torch.equal(model.generate(**CALL), expected)
        assert specdec.last_stats(model).method == "prompt_lookup"
    assert model.generate == before
    with torch.inference_mode():
        run_both(model, **CALL)
    run_both(model, **CALL)


def test_a_pickled_model_is_a_plain_one() -> None:
    model = specdec.augment(FAMILIES["qwen3_5"].build(torch.float64), "prompt_lookup")
    expected = model.generate(**CALL)
    assert specdec.last_stats(model).mode == "chain"
    revived = pickle.loads(pickle.dumps(model))  # noqa: S301
    assert torch.equal(revived.generate(**CALL), expected)
    assert torch.equal(specdec.augment(revived, "prompt_lookup").generate(**CALL), expected)


def test_two_models_in_two_threads() -> None:
    names = ("qwen3_5", "lfm2")
    expected = [plain(model_of(name), **CALL) for name in names]
    truths = [truth_of(text, CALL) for text in expected]
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def work(name: str, truth: Any) -> None:
        for _ in range(4):
            config = SpecConfig("oracle", {"truth": truth})
            found[name].append(model_of(name).generate(**CALL, specdec=config))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(names, truths, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, text in zip(names, expected, strict=True):
        assert len(found[name]) == 4
        assert all(torch.equal(got, text) for got in found[name])


# The mode forced upon models that take trees


FORCED = ("gemma3", "llama4_text", "deepseek_v3")


def forced(family: str, **base: Any) -> Any:
    """A model of a tree family that is told to verify single paths."""
    kind = FAMILIES[family]
    model = specdec.augment(replace(kind, base={**kind.base, **base}).build(torch.float64), "none")
    model._specdec.test.assume(model, Capability("chain", "forced"))
    return model


def long_prompts(length: int) -> dict[str, Tensor]:
    """Three left-padded rows, the last shorter than the window."""
    ids = torch.randint(15, 96, (3, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, length - 2)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.filterwarnings("error::specdec.errors.FallbackWarning")
@pytest.mark.parametrize(
    "family", [name if name in FORCED else slowly(name) for name in TREE_FAMILIES]
)
def test_tree_families_as_chains(family: str) -> None:
    """Texts and returned caches; within windows of eight tokens and far beyond them."""
    model = forced(family)
    for inputs in (*BATCHES.values(), long_prompts(WINDOW), long_prompts(3 * WINDOW)):
        for method in ("oracle", "random_trees"):
            both = run_both(
                model, **inputs, method=method, max_new_tokens=NEW, return_dict_in_generate=True
            )
            error = same_states(cache_of(both.ours), cache_of(both.plain))
            assert error <= 1e-5
    run_both(model, **prompts(4), do_sample=True, top_k=0, max_new_tokens=NEW)


def test_one_row_at_a_time() -> None:
    """What a model whose batches failed the self-test does."""
    model = forced("llama")
    model._specdec.test.assume(model, Capability("chain", "forced", batched=False))
    run_both(model, **prompts(1), max_new_tokens=NEW)
    with pytest.warns(FallbackWarning, match="one row at a time"):
        got = model.generate(**CALL)
    assert torch.equal(got, plain(model, **CALL))


@pytest.mark.parametrize("spare", [0, 1, 2])
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_the_last_learned_position(family: str, spare: int) -> None:
    """Rows of several lengths at the end of the table; drafts and filling must not leave it."""
    width = prompts(4)["input_ids"].shape[1]
    name = "n_positions" if family == "gpt2" else "max_position_embeddings"
    model = forced(family, **{name: width + NEW + spare})
    for inputs in BATCHES.values():
        for method in ("oracle", "random_trees"):
            run_both(model, **inputs, method=method, max_new_tokens=NEW)
