"""Token Recycling: the template of ranks, the matrix on the device, and the tree made of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.contracts import BatchState, RoundResult, TargetOutput
from specdec.drafters.recycling import (
    RankTree,
    Recycling,
    RecyclingConfig,
    _compact,
    _Template,
    rank_weight,
)
from specdec.errors import ConfigError
from specdec.round.pickers import Picks
from specdec.round.tree import TokenTree, TreeBatch, bucket_size
from specdec.round.verify import HostVerdict, Verdict

VOCAB, TOP_K = 30, 3
CPU = torch.device("cpu")


def rows_state(*texts: Sequence[int], **changes: Any) -> BatchState:
    """A state whose rows end with a pending token; a prompt of all but that one."""
    found: dict[str, Any] = {
        "tokens": [list(text) for text in texts],
        "prompt_lengths": [len(text) - 1 for text in texts],
        "active": [True] * len(texts),
        "pending": torch.tensor([text[-1] for text in texts]),
        "lengths": torch.tensor([len(text) - 1 for text in texts]),
        "vocab_size": VOCAB,
        "max_new_tokens": 100,
        "depth_limit": 50,
    }
    return BatchState(**{**found, **changes})


def started(state: BatchState, **options: Any) -> Recycling:
    drafter = Recycling(RecyclingConfig(**{"top_k": TOP_K, "nodes": 12, **options}))
    drafter.start(state)
    return drafter


def candidates(token: int) -> list[int]:
    """A target that is a function of the last token, best candidate first."""
    return [(7 * token + 3 + 5 * rank) % VOCAB for rank in range(TOP_K)]


def finished(trees: TreeBatch, topk: Tensor, rows: Sequence[bool]) -> RoundResult:
    """A round of which nothing was accepted."""
    picks = topk[:, :1, 0]
    host = HostVerdict([[] for _ in rows], [[0] if row else [] for row in rows])
    verdict = Verdict(picks[:, :0].int(), torch.zeros_like(picks[:, 0]), picks)
    output = TargetOutput(topk.float())
    return RoundResult(trees, output, Picks(picks), verdict, host, None, topk)


def learn(drafter: Recycling, trees: TreeBatch, rows: Sequence[bool] = (True,)) -> Tensor:
    """Shows the drafter what the target above says at every node; returns that."""
    topk = torch.tensor([[candidates(token) for token in row] for row in trees.tokens.tolist()])
    drafter.observe(finished(trees, topk, rows))
    return topk


def known_matrix(drafter: Recycling) -> None:
    """Lets the drafter see the target at every token."""
    learn(drafter, TreeBatch.chains(torch.arange(VOCAB)[None]))


# The template


def weights(tree: RankTree) -> list[float]:
    found = [1.0]
    for parent, rank in zip(tree.parents[1:], tree.ranks[1:], strict=True):
        found.append(found[parent] * rank_weight(rank))
    return found


@pytest.mark.parametrize(
    ("nodes", "depth", "top_k"), [(80, 8, 8), (12, 8, 3), (40, 2, 8), (9, 9, 1)]
)
def test_the_template_is_a_tree_with_the_best_node_first(
    nodes: int, depth: int, top_k: int
) -> None:
    tree = RankTree.grow(nodes, depth, top_k)
    assert len(tree.parents) == nodes + 1
    assert TokenTree(list(range(nodes + 1)), tree.parents).depths() == tree.depths
    assert max(tree.depths) <= depth
    assert max(tree.ranks) < top_k
    siblings = list(zip(tree.parents, tree.ranks, strict=True))
    assert len(set(siblings)) == len(siblings)
    assert weights(tree) == sorted(weights(tree), reverse=True)
    # Nothing better was left out: a node's first child and next sibling are worse than the last.
    last, found = min(weights(tree)), set(siblings[1:])
    for node, weight in enumerate(weights(tree)):
        if (node, 0) not in found and tree.depths[node] < depth:
            assert weight * rank_weight(0) <= last
        rank = max((r for p, r in found if p == node), default=-1) + 1
        if 0 < rank < top_k:
            assert weight * rank_weight(rank) <= last


def test_a_smaller_template_is_the_beginning_of_a_larger_one() -> None:
    whole = RankTree.grow(80, 8, 8)
    for nodes in range(1, 80):
        part = RankTree.grow(nodes, 8, 8)
        assert part.parents == whole.parents[: nodes + 1]
        assert part.ranks == whole.ranks[: nodes + 1]


def test_a_template_that_has_no_more_nodes_ends() -> None:
    assert len(RankTree.grow(100, 3, 1).parents) == 4
    assert len(RankTree.grow(100, 2, 2).parents) == 7


# The tree


def test_every_node_is_the_candidate_that_the_template_says() -> None:
    state = rows_state([1, 2, 9], [5, 4])
    drafter = started(state)
    known_matrix(drafter)
    template = RankTree.grow(12, 8, TOP_K)
    for root, tree in zip([9, 4], drafter.propose(state, 12).to_rows(), strict=True):
        assert tree.tokens[0] == root
        assert tree.parents == template.parents
        for node in range(1, len(tree)):
            above = tree.tokens[tree.parents[node]]
            assert tree.tokens[node] == candidates(above)[template.ranks[node]]


def test_unknown_tokens_and_what_hangs_below_them_are_dropped() -> None:
    """By the definition, node after node, on matrices with holes."""
    generator = torch.Generator().manual_seed(0)
    sizes = set()
    for _ in range(40):
        state = rows_state([3], [4], [5])
        drafter = started(state, nodes=20, from_prompt=False)
        matrix = torch.randint(0, VOCAB, (VOCAB, TOP_K), generator=generator).int()
        holes = torch.rand(VOCAB, TOP_K, generator=generator) < 0.3
        drafter.matrix[:VOCAB] = torch.where(holes, -1, matrix)
        template, table = RankTree.grow(20, 8, TOP_K), drafter.matrix.tolist()
        for row, tree in enumerate(drafter.propose(state, 20).to_rows()):
            tokens, place, wanted = {0: 3 + row}, {0: 0}, [(3 + row, -1)]
            for node in range(1, 21):
                parent = template.parents[node]
                token = table[tokens[parent]][template.ranks[node]] if parent in tokens else -1
                if token >= 0:
                    tokens[node], place[node] = token, len(wanted)
                    wanted.append((token, place[parent]))
            assert list(zip(tree.tokens, tree.parents, strict=True)) == wanted
            sizes.add(len(wanted))
    assert len(sizes) > 5


def test_trees_are_no_larger_than_their_largest_row_on_a_cpu() -> None:
    state = rows_state([3], [4])
    drafter = started(state, from_prompt=False)
    assert drafter.propose(state, 12).size == 1
    drafter.matrix[4, 0] = 6
    trees = drafter.propose(state, 12)
    assert trees.tokens.tolist() == [[3, 0], [4, 6]]
    assert trees.sizes.tolist() == [1, 2]
    assert trees.max_depth == 1


@pytest.mark.parametrize("budget", range(14))
def test_budgets(budget: int) -> None:
    state = rows_state([1, 2, 9])
    drafter = started(state)
    known_matrix(drafter)
    assert drafter.propose(state, budget).size == 1 + min(budget, 12)


@pytest.mark.parametrize("limit", range(10))
def test_no_node_is_deeper_than_positions_and_length_allow(limit: int) -> None:
    declared = rows_state([1, 2, 9], depth_limit=limit)
    nearly_done = rows_state([1, 2, 9], max_new_tokens=limit + 2)  # one is emitted, one is picked
    for state in (declared, nearly_done):
        drafter = started(state)
        known_matrix(drafter)
        trees = drafter.propose(state, 12)
        assert int(trees.depths().max()) == trees.max_depth
        assert trees.max_depth == min(limit, max(RankTree.grow(12, min(limit, 8), TOP_K).depths))


def test_a_chain_target_gets_the_best_candidates_as_one_path() -> None:
    state = rows_state([1, 2, 9], shape="chain")
    drafter = started(state, depth=5)
    known_matrix(drafter)
    (tree,) = drafter.propose(state, 12).to_rows()
    assert len(tree) == 6
    assert tree.deepest_path() is tree
    assert tree.tokens[1:] == [candidates(token)[0] for token in tree.tokens[:-1]]


def test_finished_rows_propose_nothing() -> None:
    state = rows_state([1, 2, 9], [5, 4], active=[True, False])
    drafter = started(state)
    known_matrix(drafter)
    assert drafter.propose(state, 12).sizes.tolist() == [13, 1]


def test_ids_that_the_matrix_cannot_hold_are_unknown() -> None:
    """Placeholders in prompts, and logits that are wider than the vocabulary."""
    state = rows_state([1, VOCAB + 5, 2, VOCAB, 9], [3, VOCAB + 7])
    drafter = started(state)
    assert not (drafter.matrix >= VOCAB).any()
    topk = torch.tensor([[[VOCAB, 8, VOCAB + 1]], [[1, 2, 3]]])
    drafter.observe(finished(TreeBatch.roots(state.pending), topk, (True, True)))
    assert drafter.matrix[9].tolist() == [-1, 8, -1]
    trees = drafter.propose(state, 12)
    assert trees.tokens[:, :2].tolist() == [[9, 8], [VOCAB + 7, 0]]
    assert trees.sizes.tolist() == [2, 1]


def test_more_candidates_than_tokens_exist() -> None:
    state = rows_state([1, 0], vocab_size=2)
    drafter = started(state, top_k=8)
    assert drafter.needs.node_topk == drafter.matrix.shape[1] == 2


# The matrix


def test_a_round_leaves_the_candidates_of_every_verified_node() -> None:
    tree = TokenTree([4, 11, 12, 13], [-1, 0, 0, 2])
    trees = TreeBatch.from_rows([tree, tree.limited(2, 1, VOCAB), TokenTree([6], [-1])], CPU)
    drafter = started(rows_state([4], [4], [6]), from_prompt=False)
    learn(drafter, trees, rows=(True, True, False))
    known = {token for token in range(VOCAB + 1) if drafter.matrix[token, 0] >= 0}
    assert known == {4, 11, 12, 13}  # no padding, and no row that has ended
    for token in known:
        assert drafter.matrix[token].tolist() == candidates(token)


def test_of_equal_tokens_the_first_counts_and_the_next_round_replaces_it() -> None:
    drafter = started(rows_state([4]), from_prompt=False)
    trees = TreeBatch.chains(torch.tensor([[4, 5, 4, 4]]))
    drafter.observe(
        finished(trees, torch.tensor([[[1], [2], [3], [4]]]).expand(-1, -1, 3), (True,))
    )
    assert drafter.matrix[4].tolist() == [1, 1, 1]
    trees = TreeBatch.roots(torch.tensor([4]))
    drafter.observe(finished(trees, torch.tensor([[[7, 8, 9]]]), (True,)))
    assert drafter.matrix[4].tolist() == [7, 8, 9]


def test_prompts_seed_the_matrix_latest_follower_first() -> None:
    state = rows_state([1, 2, 1, 3, 1, 2, 1, 4, 1, 5], [9, 8])
    matrix = started(state).matrix
    assert matrix[1].tolist() == [5, 4, 2]
    assert matrix[9].tolist() == [8, -1, -1]
    assert matrix[8].tolist() == [-1, -1, -1]
    assert (started(state, from_prompt=False).matrix == -1).all()


def test_the_matrix_is_kept_only_when_asked() -> None:
    state = rows_state([1, 2])
    known_matrix(started(state))
    assert not state.memory
    assert not (started(state).matrix[9] >= 0).any()
    known_matrix(started(state, keep_matrix=True))
    assert list(state.memory) == ["recycling.matrix"]
    again = started(rows_state([7, 8, 9], memory=state.memory), keep_matrix=True)
    assert again.matrix[9].tolist() == candidates(9)
    assert again.matrix[7].tolist() == candidates(7)  # what the target said stands above a prompt
    assert not (started(rows_state([1, 2], memory=state.memory)).matrix[9] >= 0).any()
    other = started(rows_state([1, 2], memory=state.memory), keep_matrix=True, top_k=2)
    assert not (other.matrix[9] >= 0).any()


def test_a_matrix_from_inference_mode_can_be_used_outside() -> None:
    state = rows_state([1, 2])
    with torch.inference_mode():
        known_matrix(started(state, keep_matrix=True))
    known_matrix(started(state, keep_matrix=True))


# On an accelerator


def test_nothing_is_asked_of_the_device() -> None:
    """Meta tensors have no values: a copy to the host, or a shape that depends on one, raises."""
    meta = torch.device("meta")
    state = rows_state([1, 2, 9], [5, 4], active=[True, False])
    state.pending = state.pending.to(meta)
    drafter = started(state)
    for budget in (12, 5, 1, 0):
        trees = drafter.propose(state, budget)
        assert trees.size == bucket_size(budget + 1)
        assert trees.max_depth <= budget
        topk = torch.empty(2, trees.size, TOP_K, dtype=torch.long, device=meta)
        drafter.observe(finished(trees, topk, (True, False)))
    with pytest.raises((RuntimeError, NotImplementedError)):
        trees.tokens.tolist()


def test_padding_hangs_below_the_root() -> None:
    state = rows_state([1, 2, 9, 1, 7, 1], [5, 4])
    drafter = started(state)
    trimmed = drafter.propose(state, 12)
    template = _Template(RankTree.grow(12, 8, TOP_K), CPU)
    tokens = drafter._look_up(template, state.pending)
    live = (tokens >= 0) | (torch.arange(13) == 0)
    padded = _compact(tokens, live, template, bucket_size(13))
    assert padded.size == bucket_size(13) > trimmed.size > 1
    assert padded.to_rows() == trimmed.to_rows()
    outside = ~padded.live()
    assert not padded.tokens[outside].any()
    assert not padded.parents[outside].any()


@pytest.mark.parametrize(
    "bad", [{"top_k": 0}, {"nodes": 0}, {"nodes": 5000}, {"depth": 0}, {"top_k": -3}]
)
def test_impossible_sizes(bad: dict[str, int]) -> None:
    ((name, value),) = bad.items()
    with pytest.raises(ConfigError, match=rf"{name} must be .* got {value}"):
        RecyclingConfig(**bad)
