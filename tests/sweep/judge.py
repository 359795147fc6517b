"""Whether two texts differ by no more than rounding: the only difference that is excused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sweep import situations, tiny
from sweep.situations import SEED, Situation, prompts

ROUNDING = 1e-3  # of the spread of the scores: more than that excuses nothing


def near_ties(model: Any, situation: Situation, got: Tensor, wanted: Tensor) -> bool:
    """Whether every row first differs at a margin below the model's own rounding noise there.

    The noise is what two ways to run the class that are both its own differ by: one forward over
    the whole prefix, and token by token. It must be rounding, or nothing is excused.
    """
    if got.shape != wanted.shape:
        return False
    width = prompts(situation.rows)["input_ids"].shape[1]
    for row in range(len(got)):
        unequal = (got[row] != wanted[row]).nonzero()
        if not len(unequal):
            continue
        at = int(unequal[0])
        try:
            whole, steps = (
                _scores(model, situation, wanted[:, :at], row, w) for w in (True, False)
            )
        except Exception:  # noqa: BLE001 - what cannot be judged is not excused
            return False
        spread = (whole - steps)[whole.isfinite() & steps.isfinite()]
        bound = float(spread.max() - spread.min()) if len(spread) else 0.0
        margin = float((steps[wanted[row, at]] - steps[got[row, at]]).abs())
        size = float(steps[steps.isfinite()].std())
        if at < width or not margin <= bound <= ROUNDING * size:
            return False
    return True


@torch.no_grad()
def _scores(model: Any, situation: Situation, prefix: Tensor, row: int, whole: bool) -> Tensor:
    """[V] what plain takes the argmax of after `prefix` [B, S]; -inf where it is filtered out."""
    mask = prompts(situation.rows)["attention_mask"][row]
    ids, new = prefix[row : row + 1, len(mask) - int(mask.sum()) :], prefix.shape[1] - len(mask)
    if whole:
        logits = model(input_ids=ids, use_cache=False).logits[0, -1]
    else:
        forced = ids[0, ids.shape[1] - new :].tolist()

        def force(_: int, sent: Tensor) -> list[int]:
            done = sent.shape[-1] - (ids.shape[1] - new)
            return [forced[done]] if done < new else list(range(tiny.VOCAB))

        output = type(model).generate(
            model,
            ids[:, : ids.shape[1] - new],
            do_sample=False,
            max_new_tokens=new + 1,
            output_logits=True,
            return_dict_in_generate=True,
            prefix_allowed_tokens_fn=force,
        )
        logits = output.logits[-1][0]
    return _as_picked(model, situation, prefix, row, logits)


def _as_picked(
    model: Any, situation: Situation, prefix: Tensor, row: int, logits: Tensor
) -> Tensor:
    """The logits as the call's processors, and its noise when it samples, leave them."""
    found: list[Any] = []

    def capture(_model: Any, ids: Tensor, logits_processor: Any, *_: Any, **__: Any) -> Tensor:
        found.append(logits_processor)
        return ids

    situations.call(model, situation, specdec=False, custom_generate=capture)
    scores: Tensor = found[0](prefix, logits.double().repeat(len(prefix), 1))[row]
    if not situation.options["do_sample"]:
        return scores
    torch.manual_seed(SEED)
    width = prompts(situation.rows)["input_ids"].shape[1]
    for _ in range(prefix.shape[1] - width + 1):
        noise = torch.empty(len(prefix), len(logits)).exponential_(1)
    return scores.log_softmax(-1) - noise[row].double().log()
