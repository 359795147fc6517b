"""What is trained is what drafts: the unrolled head and the stepped head are one computation."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from specdec.heads.eagle3.config import Eagle3Config
from specdec.heads.eagle3.head import Eagle3Head
from specdec.heads.eagle3.norm import RmsNorm, rms_norm
from specdec.heads.eagle3.ttt_attention import dense_ttt_attention, ttt_attention

FLAGS = (
    "norm_before_residual", "norm_before_fc", "fc_norm", "feed_post_norm", "qk_norm",
    "attention_bias", "fc_bias",
)  # fmt: skip
VOCAB, LENGTH, STEPS = 50, 17, 4


def tiny_config(**changes: object) -> Eagle3Config:
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCAB, "draft_vocab_size": 30,
        "target_hidden_size": 24, "aux_output_layers": (0, 2, 3),
    }  # fmt: skip
    return Eagle3Config(**{**sizes, **changes})  # type: ignore[arg-type]


def random_head(config: Eagle3Config, seed: int = 0) -> Eagle3Head:
    torch.manual_seed(seed)
    head = Eagle3Head(config, own_embeddings=True).double().eval()
    for parameter in head.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    return head


def inputs(rows: int = 2, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (rows, length), generator=generator)
    return tokens, torch.randn(rows, length, 72, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("on", list(product((False, True), repeat=len(FLAGS))), ids=str)
@torch.no_grad()
def test_a_chain_steps_through_the_training_states(
    on: tuple[bool, ...], window: int | None
) -> None:
    head = random_head(tiny_config(sliding_window=window, **dict(zip(FLAGS, on, strict=True))))
    tokens, aux = inputs()
    features, slot = head.features(aux), 9
    trained = [normed[:, slot] for normed in head.unroll(tokens, features, STEPS)]
    state = head.begin(rows=2, capacity=4)
    head.commit(state, tokens[:, 1 : slot + 2], features[:, : slot + 1], [slot + 1] * 2)
    for step, wanted in enumerate(trained):
        if step:
            drafted = tokens[:, slot + 1 + step : slot + 2 + step]
            head.expand(state, drafted, torch.zeros_like(drafted))
        found = state.hidden[:, 0]
        found = found if head.config.feed_post_norm else head.norm(found)
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0)


@torch.no_grad()
def test_every_path_of_a_tree_is_a_chain() -> None:
    """Siblings, ragged rows and a second round: each node is what its path alone would be."""
    head, (tokens, aux) = random_head(tiny_config()), inputs(length=12)
    features, counts = head.features(aux), [11, 7]
    state = head.begin(2, 4)
    head.commit(state, tokens[:, 1:], features[:, :11], counts)
    levels = [torch.tensor([[3, 4], [5, 6]]), torch.tensor([[7, 8], [9, 10]])]
    parents = [torch.zeros(2, 2, dtype=torch.long), torch.tensor([[1, 1], [0, 1]])]
    for _ in range(2):
        found = [head.expand(state, t, p) for t, p in zip(levels, parents, strict=True)][-1]
        head.rewind(state)
    for row, node in product(range(2), range(2)):
        above = levels[0][row, parents[1][row, node]]
        alone = head.begin(1, 4)
        n = counts[row]
        head.commit(alone, tokens[row : row + 1, 1 : n + 1], features[row : row + 1, :n], [n])
        for token in (above, levels[1][row, node]):
            wanted = head.expand(alone, token[None, None], torch.zeros(1, 1, dtype=torch.long))
        torch.testing.assert_close(found[row, node], wanted[0, 0], atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_prompt_in_pieces_is_the_prompt() -> None:
    head, (tokens, aux) = random_head(tiny_config()), inputs()
    features = head.features(aux)
    whole, pieces = head.begin(2, 4), head.begin(2, 4)
    wanted = head.commit(whole, tokens[:, 1:], features[:, :16], [16, 9])
    head.commit(pieces, tokens[:, 1:6], features[:, :5], [5, 5])
    found = head.commit(pieces, tokens[:, 6:], features[:, 5:16], [11, 4])
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    still = head.commit(pieces, tokens[:, :1], features[:, :1], [0, 0])
    torch.testing.assert_close(still, wanted, atol=1e-6, rtol=0)
    assert pieces.verified == [16, 9]


SHORT_SPANS = [[(0, 10), (10, 17)], [(0, 17)]]
SPANS = [[(0, 10), (10, 37)], [(0, 20), (20, 30)]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("spans", [None, SPANS], ids=["one", "packed"])
@pytest.mark.parametrize("later", [0, 1, 3, 6])
def test_merged_attention_is_the_dense_one(
    dtype: torch.dtype, window: int | None, spans: list[list[tuple[int, int]]] | None, later: int
) -> None:
    """Values and all gradients; slots outside every document are padding and excluded."""
    generator = torch.Generator().manual_seed(later)

    def random(heads: int) -> Tensor:
        found = torch.randn(2, heads, 37, 16, generator=generator, dtype=torch.float64).to(dtype)
        return found.requires_grad_()

    query = random(4)
    keys, values = ([random(2) for _ in range(later + 1)] for _ in range(2))
    kept = torch.ones(2, 1, 37, 1, dtype=torch.bool)
    if spans is not None:
        kept[1, :, 30:] = False
    out, dense = (
        torch.where(kept, attend(query, keys, values, spans, window), 0)
        for attend in (ttt_attention, dense_ttt_attention)
    )
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype)
    tolerance = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 3e-2}[dtype]
    assert relative(out, dense) < tolerance
    found, wanted = (torch.autograd.grad(x, [query, *keys, *values], grad) for x in (out, dense))
    assert max(map(relative, found, wanted)) < tolerance


def relative(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("feed_post_norm", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_unwanted_slots_are_left_out(feed_post_norm: bool, recompute: bool) -> None:
    """Their states are zeros; wanted ones and all gradients are as ever."""
    head, (tokens, aux) = random_head(tiny_config(feed_post_norm=feed_post_norm)), inputs()
    wanted = torch.tensor([3, 4, 5, 20, 16, 33])
    kept = torch.zeros(tokens.numel(), 1, dtype=torch.bool).index_fill_(0, wanted, True)
    states, grads = [], []
    for slots in (None, wanted):
        head.zero_grad()
        features = head.features(aux)
        found = list(head.unroll(tokens, features, STEPS, SHORT_SPANS, recompute, slots))
        states.append(torch.stack(found) * kept.view(*tokens.shape, 1))
        states[-1].square().sum().backward()
        grads.append([p.grad.clone() for p in head.parameters() if p.grad is not None])
        assert slots is None or torch.equal(states[-1], torch.stack(found))
    torch.testing.assert_close(*states, atol=1e-12, rtol=0)
    torch.testing.assert_close(*grads, atol=1e-10, rtol=0)


def test_the_norm_is_torchs() -> None:
    """Values, gradients and names."""
    ours, theirs = RmsNorm(24, 1e-5).double(), torch.nn.RMSNorm(24, 1e-5).double()
    torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    states = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    results = []
    for norm in (ours, theirs):
        out = norm(states)
        grads = torch.autograd.grad(out.sin().sum(), [states, norm.weight])
        results.append([out.detach(), *grads])
    torch.testing.assert_close(*results, atol=1e-12, rtol=0)
    with torch.no_grad():
        assert torch.equal(ours(states), theirs(states))


def test_autocast_narrows_no_norm_and_no_attention() -> None:
    """Inner products of float32 states stay float32: training must compute what drafting does."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 5, 24, generator=generator, requires_grad=True)
    norm = RmsNorm(24, 1e-5)
    shape = 2, 4, 17, 16
    query, *both = (torch.randn(shape, generator=generator, requires_grad=True) for _ in range(7))
    attended = dense_ttt_attention(query, both[:3], both[3:])
    with torch.autocast("cpu", torch.bfloat16):
        found, found_attended = norm(states), ttt_attention(query, both[:3], both[3:])
    torch.testing.assert_close(found, norm(states), atol=1e-6, rtol=0)
    torch.testing.assert_close(found_attended, attended, atol=1e-5, rtol=0)
    large, weights = 1e3 * states.detach(), torch.rand(5, 24, generator=generator)
    for dtype in (torch.bfloat16, torch.float16):  # the latter does not hold these squares
        with torch.autocast("cpu", dtype):
            narrow = rms_norm(large, weights, 1e-5)
        torch.testing.assert_close(narrow, rms_norm(large, weights, 1e-5), atol=1e-6, rtol=0)
    grads = [torch.autograd.grad(x.square().sum(), [query, *both])
             for x in (found_attended, attended)]  # fmt: skip
    torch.testing.assert_close(*grads, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_long_prompt_is_taken_in_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that end in different chunks, one that stands still, and a sliding window."""
    for window in (None, 6):
        head, (tokens, aux) = random_head(tiny_config(sliding_window=window)), inputs(rows=3)
        features, counts = head.features(aux), [16, 5, 0]
        found = []
        for chunk in (1024, 4):
            monkeypatch.setattr("specdec.heads.eagle3.head._COMMIT_CHUNK", chunk)
            state = head.begin(3, 4)
            head.commit(state, tokens[:, :1], features[:, :1], [1, 1, 1])
            first = head.commit(state, tokens[:, 1:], features[:, :16], counts)
            below = head.expand(state, tokens[:, :2], torch.zeros(3, 2, dtype=torch.long))
            found.append([first, below])
            assert state.verified == [17, 6, 1]
        torch.testing.assert_close(*found, atol=1e-6, rtol=0)


def test_recomputing_changes_no_gradient() -> None:
    head, (tokens, aux) = random_head(tiny_config(fc_norm=True)), inputs()
    grads = []
    for recompute in (False, True):
        head.zero_grad()
        total = sum(x.square().mean() for x in head.unroll(tokens, head.features(aux), 3, None,
                                                           recompute))  # fmt: skip
        total.backward()  # type: ignore[union-attr]
        grads.append([p.grad.clone() for p in head.parameters() if p.grad is not None])
    assert grads[0]
    assert all(map(torch.equal, *grads))


def test_half_precision_keeps_exact_positions() -> None:
    """Casting a head must not round the frequencies of its rotary positions."""
    head = random_head(tiny_config()).bfloat16()
    position = torch.tensor([1999])
    cos, _ = head._rotary(position[None], 2000, torch.empty(0, dtype=torch.float64))
    wanted = torch.cos(position * 10_000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8))
    torch.testing.assert_close(cos[0, 0, 0, :4], wanted, atol=1e-3, rtol=0)
