"""One round captured in a CUDA graph on a capacity view replays equal to the eager round."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.caches.tree_cache import TreeCache, View
from specdec.round.tree import TokenTree, TreeBatch
from specdec.round.verify import verify, walk_on_device
from specdec.targets.prompts import Prompt
from specdec.targets.tree_target import HFTarget

CAPACITY = 64
PROMPT = [3, 14, 15, 92, 65, 35]


def tiny_llama(device: str) -> LlamaForCausalLM:
    """A random fp32 Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device).eval()


def prefilled(model: LlamaForCausalLM, view: View) -> HFTarget:
    """A target that has seen the prompt."""
    ids = torch.tensor([PROMPT], device=model.device)
    cache = TreeCache(1, model.device, CAPACITY, view)
    target = HFTarget(model, Prompt(ids, None, [len(PROMPT)]), cache)
    target.prefill()
    return target


def a_round(target: HFTarget, trees: TreeBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Picks, path and emitted tokens, all on the device."""
    picks = target.forward_tree(trees).logits.argmax(-1)
    verdict = walk_on_device(trees, picks)
    return picks, verdict.path, verdict.tokens


def tree_tensors(seed: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Random tree of 8 nodes as device tensors."""
    generator = torch.Generator().manual_seed(seed)
    parents = [-1] + [int(torch.randint(n, (1,), generator=generator)) for n in range(1, 8)]
    tokens = torch.randint(96, (1, 8), generator=generator)
    return (
        tokens.to(device),
        torch.tensor([parents], dtype=torch.int32, device=device),
        torch.tensor([8], dtype=torch.int32, device=device),
    )


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_capacity_view_equals_live_view(seed: int) -> None:
    """The graph's shapes, without a graph: runs anywhere."""
    model = tiny_llama("cpu")
    live, capacity = prefilled(model, "live"), prefilled(model, "capacity")
    for step in range(3):
        tensors = tree_tensors(10 * seed + step, "cpu")
        expected = a_round(live, TreeBatch(*tensors, max_depth=7))
        found = a_round(capacity, TreeBatch(*tensors, max_depth=7))
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a, b)
        path = [n for n in expected[1][0].tolist() if n >= 0]
        for target in (live, capacity):
            target.commit(expected[1], [path], [True])
        assert live.lengths.tolist() == capacity.lengths.tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_captured_round_replays_equal() -> None:
    model = tiny_llama("cuda")
    live, captured = prefilled(model, "live"), prefilled(model, "capacity")
    tensors = tree_tensors(0, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up: libraries and allocator
        a_round(captured, TreeBatch(*tensors, max_depth=7))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    trees = TreeBatch(*tensors, max_depth=7)  # fresh: its ancestor mask is part of the graph
    with torch.cuda.graph(graph):
        static = a_round(captured, trees)
    for seed in range(4):
        for old, new in zip(tensors, tree_tensors(seed, "cuda"), strict=True):
            old.copy_(new)
        expected = a_round(live, TreeBatch(*tree_tensors(seed, "cuda"), max_depth=7))
        graph.replay()
        for a, b in zip(expected, static, strict=True):
            assert torch.equal(a, b)
        path = [n for n in expected[1][0].tolist() if n >= 0]
        live.commit(expected[1], [path], [True])
        captured.commit(expected[1], [path], [True])


def test_verify_chooses_the_walk_of_the_device() -> None:
    trees = TreeBatch.from_rows([TokenTree.chain(1, [2, 3])], torch.device("cpu"))
    picks = torch.tensor([[2, 3, 4, 0]])
    assert verify(trees, picks).tokens[0].tolist() == [2, 3, 4]
