"""The eagle3 drafter: trees on the device, ragged rows, chains, and heads that do not fit."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import specdec
from helpers.families import model_of
from helpers.heads import head_for
from helpers.hf import plain, prompt, tiny_llama
from helpers.laws import GREEDY, SAMPLED, Case, reference
from helpers.names import CACHE, cache_of
from helpers.spies import Reads
from specdec import SpecConfig
from specdec.contracts import TargetFacts
from specdec.drafters.growth import Growth
from specdec.drafters.head import Eagle3, Eagle3DraftConfig
from specdec.errors import ConfigError
from specdec.heads import ready
from specdec.heads.checkpoints.load import load_head
from specdec.heads.checkpoints.save import save_head
from specdec.heads.eagle3.draft_vocabulary import DraftVocabulary
from specdec.heads.eagle3.head import Eagle3Head
from specdec.round.tree import TokenTree
from specdec.stats import RoundRecord

CALL = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}


def rounds_of(model: Any, ids: Tensor, **options: Any) -> tuple[Tensor, list[RoundRecord]]:
    records: list[RoundRecord] = []
    config = SpecConfig("eagle3", options, on_round=records.append)
    with specdec.augmented(model, config=config):
        return model.generate(ids, **CALL), records


def trees_of(records: list[RoundRecord]) -> list[TokenTree]:
    return [tree for record in records[1:] for tree in record.trees or ()]


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama()


@pytest.fixture(scope="module")
def head(llama: Any) -> Eagle3Head:
    return head_for(llama)


@pytest.mark.parametrize(("rows", "flags"), [
    (1, {}), (3, {}), (3, {"norm_before_residual": True, "fc_norm": True, "feed_post_norm": True}),
    (1, {"qk_norm": True, "norm_before_fc": True, "sliding_window": 4}), (3, {"draft_vocab": 20}),
])  # fmt: skip
@pytest.mark.parametrize("sizes", [
    {"depth": 4, "top_k": 3, "nodes": 10}, {"depth": 4, "top_k": 1}, {"depth": 1, "top_k": 5},
    {"depth": 3, "top_k": 200, "nodes": 30}, {"confidence_threshold": 0.02},
    {"depth": 6, "top_k": 1, "confidence_threshold": 0.01},
    {"depth": 4, "top_k": 3, "beam": 1, "nodes": 8}, {"depth": 3, "top_k": 5, "beam": 2},
    {"depth": 2, "top_k": 2, "beam": 9},
])  # fmt: skip
def test_text_is_that_of_plain(
    llama: Any, flags: dict[str, Any], rows: int, sizes: dict[str, Any]
) -> None:
    draft = head_for(llama, **flags)
    ids = prompt(rows=rows)
    text, _ = rounds_of(llama, ids, draft=draft, **sizes)
    assert torch.equal(text, plain(llama, ids, **CALL))


@pytest.mark.parametrize("mode", [GREEDY, SAMPLED], ids=lambda mode: str(mode.name))
@pytest.mark.parametrize("sizes", [{"top_k": 1}, {"top_k": 3}, {"top_k": 3, "beam": 1}], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3_5", "mamba2", "bloom"])
def test_ragged_batches_of_trees_and_chains(family: str, sizes: dict[str, int], mode: Any) -> None:
    case = Case(family, mode, rows=3)
    options = {"draft": head_for(model_of(family)), "depth": 3, "nodes": 8, **sizes}
    sequences, state = case.generate(specdec=SpecConfig("eagle3", options))
    wanted, wanted_state = reference(case)
    assert torch.equal(sequences, wanted)
    assert torch.equal(state, wanted_state)


@pytest.mark.parametrize("beam", [None, 1, 2])
@pytest.mark.parametrize("draft_vocab", [None, 20])
def test_trees_hold_the_likeliest_candidates(
    llama: Any, draft_vocab: int | None, beam: int | None
) -> None:
    """Against a search of every candidate on the host, with the head's own chain steps."""
    ids, head = prompt(), head_for(llama, draft_vocab=draft_vocab)
    if draft_vocab is not None:
        every_third = 3 * torch.arange(draft_vocab) + 3
        head.set_vocabulary(DraftVocabulary(every_third, head.config.vocab_size))
    _, records = rounds_of(llama, ids, draft=head, depth=3, top_k=3, beam=beam, nodes=9)
    tree = trees_of(records)[0]
    assert tree.scores is not None
    assert tree.scores[1:] == sorted(tree.scores[1:], reverse=True)
    text = torch.cat([ids[0], torch.tensor(records[0].tokens[0])])
    wanted = _search(llama, head, text, (3, 3, beam or 3))
    best = sorted(wanted.items(), key=lambda item: -item[1])[:9]
    assert {path for path, _ in best} == set(_paths(tree))


def _paths(tree: TokenTree) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.tokens[1:], tree.parents[1:], strict=True):
        paths.append((*paths[parent], token))
    return paths[1:]


@torch.no_grad()
def _search(
    model: Any, head: Eagle3Head, text: Tensor, sizes: tuple[int, int, int]
) -> dict[tuple[int, ...], float]:
    """Path -> cumulative log-probability, of all candidates that a tree chooses from.

    `sizes` are levels, candidates below a node, and continued nodes of a level.
    """
    depth, width, beam = sizes
    hidden = model(text[None, :-1], output_hidden_states=True).hidden_states
    taps = head.config.aux_output_layers
    features = head.features(torch.cat([hidden[tap + 1] for tap in taps], -1))
    found: dict[tuple[int, ...], float] = {}
    frontier: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    for _ in range(depth):
        below: dict[tuple[int, ...], float] = {}
        for path, score in frontier:
            state = head.begin(1, 4)
            log_probs = head.commit(state, text[None, 1:], features, [len(text) - 1])[0]
            for token in path:
                one = torch.tensor([[token]])
                log_probs = head.expand(state, one, torch.zeros_like(one))[0, 0]
            scores, tokens = log_probs.topk(width)
            tokens = tokens if head.d2t is None else 3 * tokens + 3
            below |= {(*path, t): score + s
                      for t, s in zip(tokens.tolist(), scores.tolist(), strict=True)}  # fmt: skip
        found |= below
        frontier = sorted(below.items(), key=lambda item: -item[1])[:beam]
    return found


def test_ties_never_tear_a_tree(llama: Any) -> None:
    """A head that is certain of everything: equal scores everywhere, parents still come first."""
    draft = head_for(llama)
    assert draft.lm_head is not None
    torch.nn.init.zeros_(draft.lm_head.weight)
    ids = prompt(rows=2)
    text, records = rounds_of(llama, ids, draft=draft, depth=4, top_k=4, nodes=20)
    assert torch.equal(text, plain(llama, ids, **CALL))
    for tree in trees_of(records):  # its constructor refuses a parent behind its child
        assert all(0 <= parent < node for node, parent in enumerate(tree.parents) if node)


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("rows", [1, 3])
def test_drafting_reads_nothing_from_the_device(
    llama: Any, head: Eagle3Head, rows: int, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither proposing nor observing waits for an accelerator, however deep the tree is."""
    reads = Reads()  # type: ignore[no-untyped-call]
    seen: list[int] = []

    def spied(name: str) -> None:
        own = getattr(Eagle3, name)

        def run(self: Eagle3, *args: Any) -> Any:
            with reads, monkeypatch.context() as patch:
                for method in ("tolist", "numpy", "cpu", "item"):
                    patch.setattr(Tensor, method, None)
                result = own(self, *args)
            seen.append(reads.count)
            return result

        monkeypatch.setattr(Eagle3, name, run)

    spied("propose")
    spied("observe")
    options = {"draft": head, "depth": 4, "top_k": top_k, "nodes": 12}
    with specdec.augmented(llama, "eagle3", **options):
        llama.generate(prompt(rows=rows), **CALL)
        copies, rounds = (getattr(specdec.last_stats(llama), name)
                          for name in ("device_to_host_copies", "rounds"))  # fmt: skip
    assert len(seen) > 4
    assert seen[-1] == 0
    assert copies <= rounds + 1


@pytest.mark.parametrize("sizes", [{"top_k": 1}, {"top_k": 4, "nodes": 99}], ids=str)
def test_drafts_end_where_no_path_is_likely(
    llama: Any, head: Eagle3Head, sizes: dict[str, int]
) -> None:
    """The level that turns out unlikely is drafted already, so it is verified; none below it is."""
    ids, least = prompt(), 1e-4
    _, whole = rounds_of(llama, ids, draft=head, depth=6, **sizes)
    text, short = rounds_of(llama, ids, draft=head, depth=6, confidence_threshold=least, **sizes)
    assert torch.equal(text, plain(llama, ids, **CALL))
    assert sum(map(len, trees_of(short))) < sum(map(len, trees_of(whole)))
    for tree in trees_of(short):
        if len(tree) == 1:
            continue
        assert tree.scores is not None
        depths, best = tree.depths(), dict[int, float]()
        for depth, score in zip(depths, tree.scores, strict=True):
            best[depth] = max(best.get(depth, -math.inf), score)
        assert all(best[depth] >= math.log(least) for depth in range(1, max(depths)))


def test_rows_that_have_ended_hold_no_draft_up() -> None:
    """A row without a draft is not asked how likely its paths are."""
    growth, scores = Growth(5, confidence_threshold=0.5), torch.tensor([[0.0], [-9.0]])
    assert not growth.is_over(scores, [True, True])
    assert growth.is_over(scores, [False, True])
    assert growth.is_over(torch.tensor([[math.nan], [-9.0]]), [True, True])
    # Elsewhere than on a CPU nothing is asked: these scores have no numbers to tell.
    assert not growth.is_over(scores.to("meta"), [True, True])


def test_a_second_turn_on_a_kept_cache(llama: Any, head: Eagle3Head) -> None:
    """The head has no features for the adopted part, and drafts all the same."""
    ids = prompt()
    for method in ("none", "eagle3"):
        options = {"draft": head} if method == "eagle3" else {}
        with specdec.augmented(llama, config=SpecConfig(method, options)):
            first = llama.generate(ids, return_dict_in_generate=True, **CALL)
            more = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], 1)
            second = llama.generate(more, **{CACHE: cache_of(first)}, **CALL)
        if method == "none":
            wanted = second
    assert torch.equal(second, wanted)


def test_embeddings_alone(llama: Any, head: Eagle3Head) -> None:
    """Without ids the prompt has no slots; the head begins with the first emitted token."""
    embeds = llama.get_input_embeddings()(prompt(rows=2))
    wanted = plain(llama, inputs_embeds=embeds, **CALL)
    with specdec.augmented(llama, "eagle3", draft=head):
        assert torch.equal(llama.generate(inputs_embeds=embeds, **CALL), wanted)


@pytest.mark.parametrize(("change", "message"), [
    ({"target_hidden_size": 48}, "hidden_size"),
    ({"vocab_size": 5000, "draft_vocab_size": 20}, "vocab_size"),
    ({"aux_output_layers": (0, 90)}, "layers"),
])  # fmt: skip
def test_another_models_head_is_refused(
    llama: Any, head: Eagle3Head, change: dict[str, Any], message: str
) -> None:
    stranger = Eagle3Head(replace(head.config, **change))
    with pytest.raises(ConfigError, match=message):
        specdec.augment(llama, "eagle3", draft=stranger)
    assert torch.equal(llama.generate(prompt(), **CALL), plain(llama, prompt(), **CALL))


@pytest.mark.parametrize("options", [
    {}, {"draft": ""}, {"draft": 7}, {"draft": "./nowhere"}, {"depth": 0}, {"top_k": 0},
    {"nodes": 0}, {"nodes": 10**6}, {"confidence_threshold": 1.5},
    {"confidence_threshold": True}, {"confidence_threshold": "0.1"}, {"confidence_threshold": -0.1},
])  # fmt: skip
def test_wrong_options(llama: Any, head: Eagle3Head, options: dict[str, Any]) -> None:
    given = options if "draft" in options or not options else {"draft": head, **options}
    with pytest.raises(ConfigError):
        specdec.augment(llama, "eagle3", **given)


def test_a_head_is_loaded_once(llama: Any, head: Eagle3Head) -> None:
    """The first call and the next share one head, made ready at `augment`."""
    with specdec.augmented(llama, "eagle3", draft=head) as model:
        kept = model._specdec.memory["eagle3.heads"]
        model.generate(prompt(), **CALL)
        model.generate(prompt(), **CALL)
        assert model._specdec.memory["eagle3.heads"] is kept
        assert len(kept) == 1
    drafter = Eagle3(Eagle3DraftConfig(draft=head, top_k=1, depth=3))
    assert drafter.max_nodes == 3


@pytest.mark.parametrize("top_k", [1, 3])
def test_a_head_that_overflows_changes_nothing(llama: Any, top_k: int) -> None:
    """What is not a number anywhere below the first level must neither crash nor reach the text."""
    draft = head_for(llama)
    layer: Any = draft.layers[0]
    with torch.no_grad():
        layer.mlp.down_proj.weight.fill_(float("inf"))
    ids = prompt(rows=2)
    text, _ = rounds_of(llama, ids, draft=draft, depth=4, top_k=top_k, nodes=9)
    assert torch.equal(text, plain(llama, ids, **CALL))


def test_one_head_for_two_models_takes_each_ones_embeddings(llama: Any) -> None:
    """And the user's own module stays as it was: nothing of a target hangs in it."""
    draft = Eagle3Head(head_for(llama).config)
    other = tiny_llama()
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(1.0)
    for model in (llama, other):
        with specdec.augmented(model, "eagle3", draft=draft):
            (kept,) = model._specdec.memory["eagle3.heads"]
            shared = kept.head.embed_tokens.weight
            assert torch.equal(shared, model.get_input_embeddings().weight.to(shared.dtype))
            assert kept.head.fc is draft.fc
    assert draft.embed_tokens is None


def test_offloaded_embeddings_are_refused(llama: Any) -> None:
    draft = Eagle3Head(head_for(llama).config)
    with pytest.raises(ConfigError, match="offloaded"):
        draft.attach(torch.empty(64, 32, device="meta"))


def test_rounds_without_a_budget_keep_little(
    llama: Any, head: Eagle3Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting: list[int] = []
    observe = Eagle3.observe
    call = {"max_new_tokens": 90, "do_sample": False, "pad_token_id": 0}

    def watched(self: Eagle3, result: Any) -> None:
        observe(self, result)
        waiting.append(len(self._fresh))

    monkeypatch.setattr(Eagle3, "observe", watched)
    with specdec.augmented(llama, "eagle3", draft=head, budget=0):
        text = llama.generate(prompt(), **call)
    assert torch.equal(text, plain(llama, prompt(), **call))
    assert max(waiting) <= 64


@pytest.mark.parametrize("beam", [0, -1, 2.5, True, "2"])
def test_a_beam_is_a_whole_number(head: Eagle3Head, beam: Any) -> None:
    with pytest.raises(ConfigError, match="beam must be a whole number"):
        Eagle3DraftConfig(draft=head, beam=beam)


CHAIN = Growth(16, 1, None, 16, 0.01)
TREE = Growth(5, 8, None, 48, 0.0)


@pytest.mark.parametrize(("given", "on_cpu", "elsewhere"), [
    ({}, CHAIN, TREE), ({"depth": 3}, replace(TREE, depth=3), replace(TREE, depth=3)),
    ({"top_k": 8}, TREE, TREE), ({"confidence_threshold": 0.0}, TREE, TREE),
    ({"depth": 9, "top_k": 1}, Growth(9, 1, None, 48), Growth(9, 1, None, 48)),
])  # fmt: skip
def test_without_sizes_a_cpu_drafts_chains(
    llama: Any, head: Eagle3Head, given: dict[str, Any], on_cpu: Growth, elsewhere: Growth
) -> None:
    config = Eagle3DraftConfig(draft=head, **given)
    assert (config.growth(on_cpu=True), config.growth(on_cpu=False)) == (on_cpu, elsewhere)
    text, records = rounds_of(llama, prompt(), draft=head, **given)
    assert torch.equal(text, plain(llama, prompt(), **CALL))
    branched = [tree.parents != list(range(-1, len(tree) - 1)) for tree in trees_of(records)]
    assert any(branched) == (on_cpu.top_k > 1)


@pytest.mark.parametrize(("native", "large", "wanted"), [
    (True, False, torch.float32), (True, True, torch.bfloat16), (False, True, torch.float32),
])  # fmt: skip
def test_a_head_of_a_bf16_target_drafts_in_what_is_faster(
    native: bool, large: bool, wanted: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small matrices in float32, large ones in bf16 where the processor multiplies it itself."""
    target = tiny_llama(torch.float32)
    draft = head_for(target)
    layers = target.config.num_hidden_layers
    save_head(draft, tmp_path / "head", fingerprint=None, num_target_layers=layers)
    target.to(torch.bfloat16)
    monkeypatch.setattr(ready, "has_bf16_products", lambda: native)
    if large:
        monkeypatch.setattr(ready, "_CACHED_BYTES", 1)
    facts = TargetFacts(
        target.config, target.get_input_embeddings().weight, target.lm_head.weight,
        torch.device("cpu"), torch.bfloat16, {},
    )  # fmt: skip
    found = ready.ready_head(str(tmp_path / "head"), None, facts).head
    assert found.fc.weight.dtype == wanted
    assert found.embed_tokens is not None
    lent = target.get_input_embeddings().weight
    assert found.embed_tokens.weight.data_ptr() == lent.data_ptr()  # no copy in another dtype
    save_head(found, tmp_path / "again", fingerprint=None, num_target_layers=layers)
    assert load_head(tmp_path / "again").head.fc.weight.dtype == wanted
    with specdec.augmented(target, "eagle3", draft=str(tmp_path / "head"), depth=3):
        assert target.generate(prompt(), **CALL).shape == plain(target, prompt(), **CALL).shape
