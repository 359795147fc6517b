"""The self-test that decides, per model, how it can be verified: "tree" or "plain", and why.

There is no list of allowed architectures. A handful of tiny forwards on the model itself show
whether a token tree in one forward gives the logits of its paths run one by one, before and after
committing a branch, for rows of different length.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from specdec.drafters.base import RowDrafter
from specdec.hf_compat import accepts_position_ids, input_device
from specdec.target import HFTarget, Prompt
from specdec.tree import TokenTree, TreeBatch
from specdec.tree_cache import TreeCache

Mode = Literal["tree", "plain"]

_PROMPTS = (7, 5)  # tokens of the two rows: their lengths differ on purpose
_PARENTS = [-1, 0, 1, 0, 3]  # a root with two branches of two nodes
_BRANCHES = ([0, 1, 2], [0, 3, 4])


@dataclass(frozen=True, slots=True)
class Capability:
    """What the self-test found.

    Attributes:
        mode: "tree" when token trees are verified exactly, else "plain".
        reason: One sentence for the user.
        error: Largest logit difference relative to the largest logit, tree against paths.
        noise: The same for a path run in two ways that are both right; the model's own rounding.
    """

    mode: Mode
    reason: str
    error: float = 0.0
    noise: float = 0.0


class NoDrafter(RowDrafter):
    """Stands in for a drafter where only the target runs."""


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
    if not accepts_position_ids(model):
        return Capability("plain", "its forward takes no position_ids")
    try:
        with evaluating(model):
            error, noise = _measure(model)
    except Exception as problem:  # noqa: BLE001 - any failure of a foreign model means "plain"
        message = str(problem).strip().split("\n")[0][:160]
        return Capability("plain", f"its self-test failed: {type(problem).__name__}: {message}")
    # Rounding may happen to agree in this small sample, so a few steps of the dtype always pass;
    # a wrong mask or position changes logits by a tenth of their size and more.
    bound = max(1e-4, 4 * noise, 4 * torch.finfo(model.dtype).eps)
    if not error <= bound:
        return Capability(
            "plain",
            f"a token tree changes its logits by {error:.1e} of their size (rounding: {noise:.1e})",
            error,
            noise,
        )
    return Capability("tree", "its self-test verified a token tree", error, noise)


def _measure(model: Any) -> tuple[float, float]:
    """(tree error, rounding noise), both relative to the largest logit."""
    device, vocab = input_device(model), model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(vocab, (n,), generator=generator).tolist() for n in _PROMPTS]
    drafts = [torch.randint(vocab, (6,), generator=generator).tolist() for _ in _PROMPTS]
    ids = torch.zeros(2, max(_PROMPTS), dtype=torch.long, device=device)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens, device=device)
    cache = TreeCache(2, device, capacity=16)
    target = HFTarget(model, Prompt(ids, None, list(_PROMPTS)), cache)
    target.prefill(NoDrafter())
    trees = TreeBatch.from_rows([TokenTree(d[:5], _PARENTS) for d in drafts], device)
    logits = target.forward_tree(trees).logits
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


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def _full_logits(model: Any, tokens: list[int]) -> Tensor:
    """[n, V] logits of one causal forward without a cache."""
    ids = torch.tensor([tokens], device=input_device(model))
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits


def _cached_logits(model: Any, prompt: list[int], continuation: list[int]) -> Tensor:
    """[n, V] logits of the continuation, token by token over the model's own cache."""
    output = model(input_ids=torch.tensor([prompt], device=input_device(model)), use_cache=True)
    rows = []
    for token in continuation:
        output = model(
            input_ids=torch.tensor([[token]], device=input_device(model)),
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        rows.append(output.logits[0, -1])
    return torch.stack(rows)
