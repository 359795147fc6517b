"""The self-test that decides, per model, how it can be verified: "tree", "chain" or "plain".

There is no list of allowed architectures. A handful of tiny forwards on the model itself show
whether a token tree in one forward gives the logits of its paths run one by one, before and after
committing a branch, for rows of different length. Where it does not, the same is tried with one
path a row, with rejected tokens and rows that are put back.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from specdec.caches.tree_cache import TreeCache
from specdec.caches.user_cache import Laid, laid_out
from specdec.contracts import BatchState
from specdec.errors import UnsupportedModelError
from specdec.hf.compat import accepts_position_ids, has_experts, input_device
from specdec.hf.names import CACHE, cache_of
from specdec.hf.steps import keeps_state, plain_logits, prepared_call
from specdec.round.tree import TokenTree, TreeBatch
from specdec.targets.chain_target import ChainTarget
from specdec.targets.prompts import PaddedPrompt, Prompt
from specdec.targets.tree_target import HFTarget
from specdec_kernels import Backend

Mode = Literal["tree", "chain", "plain"]

_PROMPTS = (7, 5)  # tokens of the two rows: their lengths differ on purpose
_PARENTS = [-1, 0, 1, 0, 3]  # a root with two branches of two nodes
_BRANCHES = ([0, 1, 2], [0, 3, 4])
_MOST_NOISE = 1e-2  # of the logits' size; more is not rounding, and no bound could rest on it


@dataclass(frozen=True, slots=True)
class AttentionTest:
    """What the self-test of fused tree attention found.

    Attributes:
        refused: Why trees keep dense masks, or None when tree attention gives their logits.
        in_place: Whether it reads the cache's own buffers; some layers (MLA) make their keys anew.
    """

    refused: str | None
    in_place: bool = True


@dataclass(frozen=True, slots=True)
class Capability:
    """What the self-test found.

    Attributes:
        mode: "tree" when token trees are verified exactly, "chain" when single paths are, else
            "plain".
        reason: One sentence for the user.
        batched: Whether several rows can be verified at once; always true for trees.
        padded: Whether the model's own left-padded rows are those rows without their padding, which
            is what trees are given.
        error: Largest logit difference relative to the largest logit, tree against paths.
        noise: The same for a path run in two ways that are both right; the model's own rounding.
        prompts: By kind of prompt that the model prepares itself, as with images, why it cannot be
            verified, or None; filled in by the first call with such a prompt.
        laid: Per layer, heads and sizes of the keys and values that a tree's forward wrote; empty
            where trees are not verified.
        attention: By what may run tree attention, what its own test found; filled in when a call
            first wants it.
        backend: What runs tree attention in a call, or None for dense masks.
    """

    mode: Mode
    reason: str
    error: float = 0.0
    noise: float = 0.0
    batched: bool = True
    padded: bool = True
    prompts: dict[tuple[str, ...], str | None] = field(
        default_factory=dict, compare=False, repr=False
    )
    laid: tuple[Laid | None, ...] = field(default=(), compare=False, repr=False)
    attention: dict[Backend, AttentionTest] = field(default_factory=dict, compare=False, repr=False)
    backend: Backend | None = None


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Runs a block in eval mode; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


@torch.no_grad()
def probe(model: Any) -> Capability:
    """Runs the self-test; never raises for a model that merely cannot do it."""
    trees = _try_trees(model)
    if trees.mode == "tree":
        return replace(
            trees, padded=_attempt(model, "tree", "padding", _measure_padding).mode == "tree"
        )
    several = _try_chains(model, rows=2)
    if several.mode == "chain":
        return replace(several, reason=f"{trees.reason}; its self-test verified single paths")
    single = _try_chains(model, rows=1)
    if single.mode == "chain":
        why = f"{trees.reason}; its self-test verified single paths, in one row at a time"
        return replace(single, reason=why, batched=False)
    return Capability("plain", f"{trees.reason}; as for single paths, {single.reason}")


@torch.no_grad()
def probe_attention(model: Any, backend: Backend) -> AttentionTest:
    """Runs the self-test for trees once more, with tree attention in the place of dense masks."""
    targets: list[HFTarget] = []
    measure = partial(_measure, targets=targets, backend=backend)
    found = _attempt(model, "tree", "a token tree", measure)
    if found.mode != "tree":
        return AttentionTest(found.reason)
    return AttentionTest(None, targets[0].reads_in_place)


def _try_trees(model: Any) -> Capability:
    if keeps_state(model):
        why = "its layers fold tokens into a state, from which no branch can be cut"
        return Capability("plain", why)
    if not accepts_position_ids(model):
        return Capability("plain", "its forward takes no position_ids, which a token tree needs")
    targets: list[HFTarget] = []
    found = _attempt(model, "tree", "a token tree", partial(_measure, targets=targets))
    layers = targets[0].cache.layers if targets else ()
    return replace(found, laid=tuple(map(laid_out, layers)))


def _try_chains(model: Any, rows: int) -> Capability:
    return _attempt(model, "chain", "a path of tokens", partial(_measure_chains, rows=rows))


def _attempt(
    model: Any, mode: Mode, what: str, measure: Callable[[Any], tuple[float, float]]
) -> Capability:
    """The mode, if the model's logits in it are those of plain decoding up to rounding."""
    try:
        with evaluating(model), warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            error, noise = measure(model)
    except Exception as problem:  # noqa: BLE001 - any failure of a foreign model means "plain"
        message = str(problem).strip().split("\n")[0][:160]
        return Capability("plain", f"its self-test failed: {type(problem).__name__}: {message}")
    eps = torch.finfo(model.dtype).eps
    if not noise <= max(_MOST_NOISE, 16 * eps):
        why = f"one forward over a text and its decoding differ by {noise:.1e} of the logits' size"
        return Capability("plain", why, error, noise)
    # Rounding may happen to agree in this small sample, so a few steps of the dtype always pass;
    # a wrong mask or position changes logits by a tenth of their size and more.
    bound = max(1e-4, 4 * noise, 4 * eps)
    if not error <= bound:
        why = f"{what} changes its logits by {error:.1e} of their size (rounding: {noise:.1e})"
        return Capability("plain", why, error, noise)
    return Capability(mode, f"its self-test verified {what}", error, noise)


def _measure(
    model: Any, targets: list[HFTarget], backend: Backend | None = None
) -> tuple[float, float]:
    """(tree error, rounding noise), relative to the largest logit.

    Args:
        model: Under test.
        targets: Takes the target that was used.
        backend: What runs tree attention; None for dense masks.
    """
    device, vocab = input_device(model), model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(vocab, (n,), generator=generator).tolist() for n in _PROMPTS]
    drafts = [torch.randint(vocab, (6,), generator=generator).tolist() for _ in _PROMPTS]
    ids = torch.zeros(2, max(_PROMPTS), dtype=torch.long, device=device)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens, device=device)
    cache = TreeCache(2, device, capacity=16)
    target = HFTarget(model, Prompt(ids, None, list(_PROMPTS)), cache, backend=backend)
    targets.append(target)
    target.prefill()
    others = [[d[0], d[1] + 1, d[2] + 1, d[3], d[4]] for d in drafts]  # another first branch
    others = [[token % vocab for token in row] for row in others]
    beside = TreeBatch.from_rows([TokenTree(row, _PARENTS) for row in others], device)
    trees = TreeBatch.from_rows([TokenTree(d[:5], _PARENTS) for d in drafts], device)
    beside_logits = target.forward_tree(beside).logits
    logits = target.forward_tree(trees).logits
    _refuse_influence(model, beside_logits[:, _BRANCHES[1]], logits[:, _BRANCHES[1]])
    path = torch.tensor([_BRANCHES[1][1:]] * 2, device=device)
    target.commit(path, [[3, 4], [3]], [True, True])
    after = target.forward_tree(
        TreeBatch.roots(torch.tensor([d[5] for d in drafts], device=device))
    )
    errors, noises, scales = [], [], [1e-6]
    for row, (tokens, draft) in enumerate(zip(rows, drafts, strict=True)):
        kept = [3, 4] if row == 0 else [3]
        final = [draft[0], *(draft[node] for node in kept), draft[5]]
        checks = [([draft[n] for n in branch], logits[row, branch]) for branch in _BRANCHES]
        checks.append((final, after.logits[row, :1]))
        for continuation, got in checks:
            whole = _full_logits(model, tokens + continuation)[-len(got) :]
            stepwise = _cached_logits(model, tokens, continuation)[-len(got) :]
            errors.append(_difference(got, stepwise))
            noises.append(_difference(whole, stepwise))
            scales.append(float(stepwise.abs().max()))
    worst, noise, scale = (float(torch.tensor(x).max()) for x in (errors, noises, scales))
    return worst / scale, noise / scale  # torch's max keeps NaN, which passes no bound


def _measure_padding(model: Any) -> tuple[float, float]:
    """(error, noise) of plain decoding in a left-padded batch, against the row by itself."""
    device, vocab = input_device(model), model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, vocab, (2, _PROMPTS[0] + 3), generator=generator).to(device)
    prompt, text, padding = tokens[:, : _PROMPTS[0]], tokens[:, _PROMPTS[0] :], 2
    mask = torch.ones_like(prompt)
    mask[1, :padding] = 0
    padded = plain_logits(model, prompt, *prepared_call(model, prompt, mask), text)[1]
    row, alone = prompt[1:, padding:], text[1:]
    own = plain_logits(model, row, *prepared_call(model, row, torch.ones_like(row)), alone)[0]
    scale = max(float(own.abs().max()), 1e-6)
    whole = _full_logits(model, [*row[0].tolist(), *alone[0].tolist()])[row.shape[1] :]
    return _difference(padded, own) / scale, _difference(whole, own) / scale


def _measure_chains(model: Any, rows: int) -> tuple[float, float]:
    """(chain error, rounding noise), relative to the largest logit, against plain decoding.

    One row has a draft rejected and is put back while the other goes on, and takes the right tokens
    again with the next draft.
    """
    device, vocab = input_device(model), model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, vocab, (rows, _PROMPTS[0] + 14), generator=generator).to(device)
    prompt, text = tokens[:, : _PROMPTS[0]], tokens[:, _PROMPTS[0] :]
    padding = [_PROMPTS[0] - _PROMPTS[row] for row in range(rows)]
    mask = (torch.arange(_PROMPTS[0]) >= torch.tensor(padding)[:, None]).long().to(device)
    config, kwargs = prepared_call(model, prompt, mask)
    target, state = _chain_target(model, PaddedPrompt(prompt, config, kwargs))
    target.prefill()
    state.tokens = tokens[:, : _PROMPTS[0] + 1].tolist()
    got: list[list[Tensor]] = [[] for _ in range(rows)]
    for accepted in ([1, 2], [2, 1], [2, 2], [0, 2]):
        drafts = torch.stack([text[row, len(got[row]) :][:3] for row in range(rows)])
        for row in range(rows):
            drafts[row, accepted[row] + 1 :] += 1
        logits = target.forward_tree(TreeBatch.chains(drafts % vocab)).logits
        nodes = [list(range(1, accepted[row] + 1)) for row in range(rows)]
        target.commit(logits.new_empty(rows, 0), nodes, [True] * rows)
        for row in range(rows):
            got[row].extend(logits[row, : accepted[row] + 1])
            known = len(got[row])
            state.tokens[row] = tokens[row, : _PROMPTS[0] + known + 1].tolist()
    # Every call has a cache of its own, so plain steps need arguments of their own, too.
    stepwise = plain_logits(model, prompt, *prepared_call(model, prompt, mask), text)
    config, kwargs = prepared_call(model, prompt, mask)
    other, state = _chain_target(model, PaddedPrompt(prompt, config, kwargs))
    other.prefill()
    state.tokens = tokens[:, : _PROMPTS[0] + 1].tolist()
    head, tail = text[:, :7], (text[:, 7:] + 1) % vocab
    changed = other.forward_tree(TreeBatch.chains(torch.cat([head, tail], dim=1))).logits
    other.rollback()
    whole = other.forward_tree(TreeBatch.chains(text)).logits
    _refuse_influence(model, changed[:, :7], whole[:, :7])
    errors = [
        _difference(torch.stack(got[row]), stepwise[row, : len(got[row])]) for row in range(rows)
    ]
    # A path in one forward differs by rounding, or by a mistake that shows in both; so the bound
    # rests on two causal forwards of the model's own as well.
    noise = min(_difference(whole, stepwise), _own_noise(model, tokens[:1], _PROMPTS[0]))
    scale = max(float(stepwise.abs().max()), 1e-6)
    return float(torch.tensor(errors).max()) / scale, noise / scale


def _chain_target(model: Any, prompt: PaddedPrompt) -> tuple[ChainTarget, BatchState]:
    """A chain target over a prompt of the self-test."""
    ids = prompt.input_ids
    rows, width = ids.shape
    state = BatchState(
        tokens=ids.tolist(),
        prompt_lengths=[width] * rows,
        active=[True] * rows,
        pending=ids[:, -1],
        lengths=torch.zeros_like(ids[:, -1]),
        vocab_size=sys.maxsize,
        max_new_tokens=16,
    )
    return ChainTarget(model, prompt, state), state


def _own_noise(model: Any, tokens: Tensor, prompt: int) -> float:
    """Largest difference between one causal forward and plain decoding, token by token."""
    head, tail = tokens[:, :prompt], tokens[:, prompt:]
    config, kwargs = prepared_call(model, head, torch.ones_like(head))
    stepwise = plain_logits(model, head, config, kwargs, tail)[0]
    return _difference(_full_logits(model, tokens[0].tolist())[prompt:], stepwise)


def _refuse_influence(model: Any, a: Tensor, b: Tensor) -> None:
    """Raises when logits of the same tokens differ, because other tokens of the forward do.

    Forwards of one shape round alike, so this is no noise: a draft would change what follows its
    root (I5), as it does where the activations of a forward are quantised together. Experts are
    given as many tokens as were sent to them, and round by that, so they cannot be told apart.
    """
    if has_experts(model.config):
        return
    changed = _difference(a, b) / max(float(b.abs().max()), 1e-6)
    if not changed <= max(1e-4, 2 * torch.finfo(model.dtype).eps):
        raise UnsupportedModelError(
            f"other tokens of a forward change a token's logits by {changed:.1e} of their size"
        )


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def _full_logits(model: Any, tokens: list[int]) -> Tensor:
    """[n, V] logits of one causal forward without a cache."""
    ids = torch.tensor([tokens], device=input_device(model))
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits


def _cached_logits(model: Any, prompt: list[int], continuation: list[int]) -> Tensor:
    """[n, V] logits of the continuation, token by token over the model's own cache.

    Positions are given: some models would count on from the last prompt that held an image.
    """
    device = input_device(model)
    positions = torch.arange(len(prompt), device=device)[None]
    ids = torch.tensor([prompt], device=device)
    output = model(input_ids=ids, position_ids=positions, use_cache=True)
    rows = []
    for position, token in enumerate(continuation, start=len(prompt)):
        output = model(
            input_ids=torch.tensor([[token]], device=device),
            position_ids=torch.tensor([[position]], device=device),
            **{CACHE: cache_of(output)},
            use_cache=True,
        )
        rows.append(output.logits[0, -1])
    return torch.stack(rows)
