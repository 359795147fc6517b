"""Trees by fused attention, on every family: the text of plain `generate`, to the token.

With `TRITON_INTERPRET=1` set, the same laws are checked of the Triton kernels in their interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel

import specdec
from helpers import laws
from helpers.families import FAMILIES, REPRESENTATIVE, TREE_FAMILIES, VOCAB, WINDOW, model_of
from helpers.laws import Case, Ledger, Mode
from specdec import SpecConfig
from specdec.api import capability
from specdec.caches.tree_cache import TreeCache, TreeLayer
from specdec.hf.attention import BORROWED, attention_name
from specdec.round.tree import TokenTree, TreeBatch
from specdec.targets import tree_attention
from specdec.targets.attention_choice import with_attention
from specdec.targets.prompts import Prompt
from specdec.targets.tree_target import HFTarget
from specdec_kernels import Backend
from specdec_kernels.dispatch import interpreting

pytestmark = [
    pytest.mark.usefixtures("throw_away_methods"),
    pytest.mark.filterwarnings("error::specdec.errors.FallbackWarning"),
]

BACKEND: Backend = "triton" if interpreting() else "reference"
_OWN_CODE = {"gptj": "gptj.modeling_gptj", "falcon_rope": "falcon.modeling_falcon"}
OWN_ATTENTION = tuple(  # classes that do not ask transformers for attention, in this release of it
    family
    for family, file in _OWN_CODE.items()
    if not hasattr(import_module(f"transformers.models.{file}"), "ALL_ATTENTION_FUNCTIONS")
)
KEYS_MADE_ANEW = ("deepseek_v3",)  # MLA: keys are made from what is cached
# Before 5.24 Gemma 2 runs on SDPA, which leaves its softcap out: so does plain, and so must we.
CAP_LEFT_OUT = ("gemma2",) if Gemma2PreTrainedModel._supports_sdpa else ()
BY_KERNEL = tuple(name for name in TREE_FAMILIES if name not in OWN_ATTENTION + CAP_LEFT_OUT)
CPU = torch.device("cpu")
NEW_TOKENS = 26
GREEDY, SAMPLED = [mode.with_options(max_new_tokens=NEW_TOKENS) for mode in laws.MODES[:2]]
METHODS = ("oracle", "lookahead", "device_bigrams", "eagle3")
ROWS = (1, 3)  # three of different lengths


def grid() -> Iterator[object]:
    """Fast: every family once, greedy and sampled in turn; the others are marked slow."""
    for turn, family in enumerate(BY_KERNEL):
        for method, mode, rows in product(METHODS, (GREEDY, SAMPLED), ROWS):
            own_turn = (GREEDY, SAMPLED)[turn % 2] is mode and ROWS[turn // 2 % 2] == rows
            whole = family in REPRESENTATIVE[:2] and not interpreting()
            fast = method == METHODS[0] and (own_turn or whole)
            name = f"{family}-{method}-{mode.name}-{rows}"
            marks = [] if fast else [pytest.mark.slow]
            yield pytest.param(family, method, mode, rows, id=name, marks=marks)


@pytest.mark.parametrize(("family", "method", "mode", "rows"), list(grid()))
def test_text(family: str, method: str, mode: Mode, rows: int, ledger: Ledger) -> None:
    case = Case(family, mode, rows, torch.float32, BACKEND)
    stats = case.check(ledger, method, case.truth())
    assert f"verified a token tree with tree attention ({BACKEND})" in stats.mode_reason
    ledger.settle()


@pytest.mark.parametrize("family", BY_KERNEL)
def test_keys_are_read_where_they_are_cached(family: str) -> None:
    found = with_attention(
        model_of(family, torch.float32), capability(model_of(family, torch.float32)), BACKEND
    )
    assert found.backend == BACKEND, found.reason
    assert found.attention[BACKEND].in_place == (family not in KEYS_MADE_ANEW)


@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_who_does_not_ask_keeps_dense_masks(family: str, ledger: Ledger) -> None:
    case = Case(family, SAMPLED, 3, torch.float32, BACKEND)
    stats = case.check(ledger, "oracle", case.truth())
    assert "its self-test verified a token tree with dense masks" in stats.mode_reason
    layers = FAMILIES[family].build(torch.float32).config.num_hidden_layers
    assert f"attention interface 0 times, and {layers} of them have a cache" in stats.mode_reason
    ledger.settle()


@pytest.mark.parametrize("family", CAP_LEFT_OUT)
def test_what_plain_leaves_out_is_left_out(family: str, ledger: Ledger) -> None:
    case = Case(family, SAMPLED, 3, torch.float32, BACKEND)
    stats = case.check(ledger, "oracle", case.truth())
    assert "its self-test verified a token tree with dense masks" in stats.mode_reason
    assert f"({BACKEND}) a token tree changes its logits" in stats.mode_reason
    ledger.settle()


# What the layers are told


def both_targets(family: str, lengths: list[int]) -> tuple[HFTarget, HFTarget]:
    """The same prompt behind dense masks and behind tree attention."""
    model, generator = model_of(family, torch.float32), torch.Generator().manual_seed(3)
    ids = torch.randint(15, VOCAB, (len(lengths), max(lengths)), generator=generator)
    found = []
    for backend in (None, BACKEND):
        cache = TreeCache(len(lengths), CPU, 24)  # grows in the middle
        target = HFTarget(model, Prompt(ids, None, lengths), cache, backend=backend)
        target.prefill()
        found.append(target)
    return found[0], found[1]


def a_tree(lengths: list[int], generator: torch.Generator) -> TreeBatch:
    """Nine nodes in the first row and fewer in the others."""
    tokens = torch.randint(15, VOCAB, (9,), generator=generator).tolist()
    tree = TokenTree(tokens, [-1, 0, 1, 2, 0, 4, 5, 6, 4])
    rows = [tree.limited(9 - 2 * row, 9, VOCAB) for row in range(len(lengths))]
    return TreeBatch.from_rows(rows, CPU)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[17], [17, 11, 6]], ids=["alone", "ragged"])
@pytest.mark.parametrize("family", REPRESENTATIVE)
def test_logits_are_those_of_dense_masks(family: str, lengths: list[int]) -> None:
    """Before and behind windows, after commits, and while the buffers grow."""
    dense, fused = both_targets(family, lengths)
    generator = torch.Generator().manual_seed(4)
    for _ in range(3):
        trees = a_tree(lengths, generator)
        live = trees.live()[..., None]
        wanted, got = (target.forward_tree(trees).logits * live for target in (dense, fused))
        assert float((got - wanted).abs().max() / wanted.abs().max()) <= 2e-4
        accepted = [[4, 5, 6][: 3 - row] for row in range(len(lengths))]
        path = torch.tensor([nodes + [-1] * (3 - len(nodes)) for nodes in accepted])
        for target in (dense, fused):
            target.commit(path, accepted, [True] * len(lengths))
        assert fused.lengths.tolist() == dense.lengths.tolist()
    assert fused.cache.capacity > 24
    assert fused.reads_in_place == (family not in KEYS_MADE_ANEW)


class Told:
    """Stands before the kernel and keeps what it was called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []
        self.slots: list[int] = []
        kernel = tree_attention.tree_attention

        def watched(q: Tensor, k: Tensor, v: Tensor, tree: Any, **more: Any) -> Any:
            self.calls.append(more)
            self.slots.append(k.shape[2])
            return kernel(q, k, v, tree, **more)

        monkeypatch.setattr(tree_attention, "tree_attention", watched)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mistral_sw", "gemma2", "gemma3n_kvshare", "llama4_text"])
def test_every_layer_is_told_its_window_or_chunk(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, fused = both_targets(family, [17])
    told = Told(monkeypatch)
    fused.forward_tree(a_tree([17], torch.Generator().manual_seed(1)))
    config = fused.model.config
    kinds = config.layer_types if family != "mistral_sw" else ["sliding_attention"] * 2
    spans = {"sliding_attention": (WINDOW, 0), "chunked_attention": (0, WINDOW)}
    wanted = [spans.get(kind, (0, 0)) for kind in kinds]
    assert [(call["window"], call["chunk"]) for call in told.calls] == wanted
    assert max(wanted) > (0, 0)


@torch.no_grad()
def test_caps_scales_and_sinks_reach_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch)
    for family in ("gemma2", "gpt_oss", "opt"):
        both_targets(family, [9])[1].forward_tree(a_tree([9], torch.Generator().manual_seed(1)))
    gemma2, gpt_oss, opt = told.calls[0], told.calls[2], told.calls[4]
    assert gemma2["softcap"] == model_of("gemma2", torch.float32).config.attn_logit_softcapping
    assert gpt_oss["sinks"].shape == (4,)
    assert (opt["scale"], opt["softcap"], opt["sinks"]) == (1.0, 0.0, None)


@torch.no_grad()
def test_shapes_do_not_change_from_round_to_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """All slots are shown, however many are committed; prefill sees those that are written."""
    model = model_of("gemma3", torch.float32)
    cache = TreeCache(2, CPU, 64)
    ids = torch.randint(15, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    target = HFTarget(model, Prompt(ids, None, [9, 9]), cache, backend=BACKEND)
    target.prefill()
    assert (cache.start, cache.stop) == (0, 9)
    told = Told(monkeypatch)
    for _ in range(3):
        target.forward_tree(a_tree([9, 9], torch.Generator().manual_seed(1)))
        target.commit(torch.zeros(2, 0), [[], []], [True, True])
    assert set(told.slots) == {64}


@torch.no_grad()
def test_prefill_keeps_the_models_own_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama", torch.float32)
    names: list[tuple[int, str | None, str]] = []
    update = TreeLayer.update

    def watched(self: TreeLayer, keys: Tensor, *args: Any, **kwargs: Any) -> Any:
        names.append(
            (keys.shape[2], attention_name(model.config), model.config._attn_implementation)
        )
        return update(self, keys, *args, **kwargs)

    monkeypatch.setattr(TreeLayer, "update", watched)
    _, fused = both_targets("llama", [17])
    names.clear()
    fused.prefill()
    fused.forward_tree(a_tree([17], torch.Generator().manual_seed(1)))
    assert set(names) == {(17, "sdpa", "sdpa"), (9, "sdpa", BORROWED)}
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kernels", ["off", "auto"])
def test_without_kernels_nothing_is_borrowed(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECDEC_KERNELS", raising=False)
    told = Told(monkeypatch)
    case = Case("gemma3", GREEDY, dtype=torch.float32)
    config = SpecConfig("prompt_lookup", kernels=kernels)
    case.generate(specdec=config)
    assert not told.calls
    reason = specdec.last_stats(case.model).mode_reason
    assert reason == "its self-test verified a token tree"
