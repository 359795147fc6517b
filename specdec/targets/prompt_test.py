"""The self-test of a prompt with images or positions of its own, on the call's own prompt.

`capability` tests a model on text. What stands behind other inputs is tested when the first call
brings them: whether a token tree gives the logits of its paths run one by one, as plain decoding
runs them, before and after a branch is committed. Ids that stand for images are among its tokens.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from specdec.caches.tree_cache import TreeCache
from specdec.caches.user_cache import own_copy
from specdec.hf.compat import input_device, placeholder_ids, vocabulary_size
from specdec.hf.names import CACHE, cache_of
from specdec.hf.steps import logits_after
from specdec.round.tree import TokenTree, TreeBatch
from specdec.targets.prompt_target import PlainPrompt, PromptTarget
from specdec.targets.self_test import evaluating

_PARENTS = [-1, 0, 1, 0, 3]  # a root with two branches of two nodes
_BRANCHES = ([0, 1, 2], [0, 3, 4])
_ROOM = 8  # slots behind the prompt


@torch.no_grad()
def why_not_trees(model: Any, prompt: PlainPrompt, noise: float) -> str | None:
    """Why trees behind such a prompt are not verified exactly, or None when they are.

    Args:
        model: A model whose self-test chose tree mode.
        noise: Rounding noise that the model's self-test found.
    """
    try:
        with evaluating(model), warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            error, own = _measure(model, prompt)
    except Exception as problem:  # noqa: BLE001 - any failure of a foreign model means "plain"
        message = str(problem).strip().split("\n")[0][:160]
        return f"its self-test with such inputs failed: {type(problem).__name__}: {message}"
    if not error <= max(1e-4, 4 * min(noise, own), 4 * torch.finfo(model.dtype).eps):
        return f"a token tree behind such inputs changes its logits by {error:.1e} of their size"
    return None


def _measure(model: Any, prompt: PlainPrompt) -> tuple[float, float]:
    """(tree error, rounding noise) against plain steps, both relative to the largest logit."""
    rows = len(prompt.slots)
    output = prompt.run(model, own_copy(prompt.kwargs[CACHE]))
    filled = cache_of(output)
    device = input_device(model)
    target = PromptTarget(model, prompt, TreeCache(rows, device, prompt.total + _ROOM))
    target.adopt(filled)
    drafts = _drafts(model, rows).to(device)
    rooted = [TokenTree(row[:5], _PARENTS) for row in drafts.tolist()]
    trees = TreeBatch.from_rows(rooted, device)
    logits = target.forward_tree(trees).logits[:, : len(_PARENTS)]  # padding behind them
    kept = _BRANCHES[1][1:]
    target.commit(torch.tensor([kept] * rows, device=device), [kept] * rows, [True] * rows)
    after = target.forward_tree(TreeBatch.roots(drafts[:, 5])).logits
    errors, noises, scale = [], [], 1e-6
    for nodes in ([*_BRANCHES[0]], [*_BRANCHES[1], 5]):
        output[CACHE] = own_copy(filled)
        wanted = logits_after(model, prompt.input_ids, output, prompt.kwargs, drafts[:, nodes])
        errors.append(_difference(torch.cat([logits, after], dim=1)[:, nodes], wanted))
        path = prompt.continued(model, own_copy(filled), drafts[:, nodes])
        noises.append(_difference(path, wanted))
        scale = max(scale, float(wanted.abs().max()))
    # torch's max keeps NaN, which passes no bound
    return float(torch.stack(errors).max()) / scale, float(torch.stack(noises).max()) / scale


def _difference(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() - b.double()).abs().max()


def _drafts(model: Any, rows: int) -> Tensor:
    """[B, 6] tokens: a tree of five and one behind it; an image's id on either branch."""
    vocab = vocabulary_size(model)
    generator = torch.Generator().manual_seed(0)
    drafts = torch.randint(1, vocab, (rows, 6), generator=generator)
    known = [token for token in placeholder_ids(model.config) if token < vocab]
    for node, token in zip((1, 4), known * 2, strict=False):
        drafts[:, node] = token
    return drafts
