"""Rounds at their edges: the last position, the border of a window, what is left of a cut tree."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.families import FAMILIES, WINDOW
from helpers.laws import GREEDY, SAMPLED, Case, Mode, prompts, reference
from specdec import RowDrafter, SpecConfig, TokenTree, augment
from specdec.drafters.row import DraftRow
from specdec.registry import methods

pytestmark = [
    pytest.mark.usefixtures("throw_away_methods"),
    pytest.mark.filterwarnings("error::specdec.errors.FallbackWarning"),
]

WINDOWED = ("phi3_sw", "gemma3", "gpt_oss", "llama4_text")


# The last position


def with_positions(model: Any, count: int) -> Any:
    """A copy of a GPT-2 whose position table ends after `count` rows."""
    short = copy.deepcopy(model)
    table = torch.nn.Embedding(count, model.config.n_embd, dtype=model.dtype)
    with torch.no_grad():
        table.weight.copy_(model.transformer.wpe.weight[:count])
    short.transformer.wpe, short.config.n_positions = table, count
    return augment(short, "none")


@pytest.mark.parametrize("spare", [0, 1, 2])
@pytest.mark.parametrize("method", ["oracle", "device_bigrams", "lookahead"])
def test_an_end_at_the_last_position(method: str, spare: int) -> None:
    """The limit asks for more tokens than the table has rows; EOS comes just in time for plain.

    Trees that reach beyond the table would be looked up there.
    """
    whole = FAMILIES["gpt2"].build(torch.float64)
    inputs = prompts(1)
    width = inputs["input_ids"].shape[1]
    free = whole.generate(**inputs, max_new_tokens=40, do_sample=False)[0].tolist()
    end = next(n for n in range(len(free) - 1, 0, -1) if free[n] not in free[width:n])
    assert end > width + 8, "the text shows nothing"
    model = with_positions(whole, end + spare)
    call = {**inputs, "max_new_tokens": 100, "do_sample": False, "eos_token_id": free[end]}
    options = {} if method == "lookahead" else {"truth": (tuple(free + free[width:]),)}
    got = model.generate(**call, specdec=SpecConfig(method, options))
    assert got[0].tolist() == free[: end + 1]


# The window's border


class Ahead(RowDrafter):
    """Drafts what the text says next, as a chain without decoys."""

    text: tuple[int, ...] = ()
    depth = 0

    class Row(DraftRow):
        def propose(self, budget: int) -> TokenTree:
            start = len(self.text)
            return TokenTree.chain(self.text[-1], Ahead.text[start : start + Ahead.depth])


@pytest.fixture
def ahead() -> Iterator[type[Ahead]]:
    methods.register("ahead", Ahead)
    yield Ahead
    methods.unregister("ahead")


@pytest.mark.parametrize("family", WINDOWED)
@pytest.mark.parametrize("length", range(1, WINDOW + 2))
def test_the_first_chain_that_leaves_the_window(
    family: str, length: int, ahead: type[Ahead], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cache and draft together fill the window, and exceed it by one token, and by two."""
    model = Case(family, GREEDY).model
    ids = prompts(1)["input_ids"][:, :length]
    call = {"max_new_tokens": 2 * WINDOW, "do_sample": False}
    wanted = model.generate(ids, **call, specdec=False)
    monkeypatch.setattr(ahead, "text", tuple(wanted[0].tolist()))
    for depth in sorted({max(WINDOW - length + more, 1) for more in (-1, 0, 1)}):
        monkeypatch.setattr(ahead, "depth", depth)
        got = model.generate(ids, **call, specdec=SpecConfig("ahead"))
        assert torch.equal(got, wanted), f"depth {depth}"


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("mode", [GREEDY, SAMPLED], ids=lambda mode: mode.name)
@pytest.mark.parametrize("family", WINDOWED)
def test_accepted_paths_longer_than_the_window(family: str, mode: Mode, rows: int) -> None:
    """Nodes whose own ancestors have left their window, in trees whose slots are not positions."""
    case = Case(family, mode, rows)
    longest: list[int] = []
    config = SpecConfig(
        "oracle", {"truth": case.truth(), "lie_every": 1000},
        on_round=lambda record: longest.extend(map(len, record.paths)),
    )  # fmt: skip
    got, _ = case.generate(specdec=config)
    assert torch.equal(got, reference(case)[0])
    assert max(longest) > WINDOW


# What a cut leaves


@st.composite
def scored_trees(draw: st.DrawFn) -> TokenTree:
    """Up to 14 nodes, some with impossible tokens; the score of a node is its number."""
    parents = [-1, *(draw(st.integers(0, n)) for n in range(draw(st.integers(0, 13))))]
    tokens = [0, *(draw(st.integers(-1, 9)) for _ in parents[1:])]
    return TokenTree(tokens, parents, [float(node) for node in range(len(parents))])


def nodes_of(part: TokenTree, whole: TokenTree) -> list[int]:
    """The nodes of `whole` that `part` consists of; checks that they hang as they did."""
    assert part.scores is not None
    nodes = [int(score) for score in part.scores]
    assert part.tokens == [whole.tokens[node] for node in nodes]
    assert [nodes[parent] for parent in part.parents[1:]] == [whole.parents[n] for n in nodes[1:]]
    return nodes


@settings(max_examples=200, deadline=None)
@given(scored_trees(), st.integers(1, 9), st.integers(0, 5), st.integers(1, 9))
def test_a_limited_tree_is_a_part_of_the_tree(
    tree: TokenTree, size: int, depth: int, vocab_size: int
) -> None:
    part = tree.limited(size, depth, vocab_size)
    nodes = nodes_of(part, tree)
    assert nodes[0] == 0
    assert nodes == sorted(nodes)
    assert len(part) <= size
    assert max(part.depths()) <= depth
    assert all(0 <= token < vocab_size for token in part.tokens)
    depths = tree.depths()
    left_out = [node for node in range(len(tree)) if node not in nodes]
    for node in left_out if len(part) < size else []:
        possible = depths[node] <= depth and 0 <= tree.tokens[node] < vocab_size
        assert not possible or tree.parents[node] in left_out


@settings(max_examples=200, deadline=None)
@given(scored_trees())
def test_the_deepest_path_is_the_first_deepest_one(tree: TokenTree) -> None:
    path = tree.deepest_path()
    nodes = nodes_of(path, tree)
    depths = tree.depths()
    assert path.depths() == list(range(max(depths) + 1))
    assert nodes[-1] == depths.index(max(depths))
