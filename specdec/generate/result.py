"""The way back: what plain `generate` would return, and the cache as it would have left it."""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from specdec.caches import user_cache
from specdec.contracts import BatchState
from specdec.generate.call import PADDING_CHUNK, PreparedCall
from specdec.generate.outputs import Recorder
from specdec.hf.names import CACHE
from specdec.round.tree import TokenTree, TreeBatch
from specdec.targets.chain_target import ChainTarget
from specdec.targets.tree_target import HFTarget


def result_of(
    call: PreparedCall, state: BatchState, target: HFTarget | ChainTarget, recorder: Recorder
) -> Any:
    """What plain `generate` returns; fills the call's cache where anybody can see it."""
    as_object = bool(call.prompt.config.return_dict_in_generate)
    if call.keeps_cache or as_object:
        _write_back(call, state, target, recorder)
    input_ids = call.prompt.input_ids
    tails = torch.tensor(_padded_tails(call, state), device=input_ids.device)
    sequences = torch.cat([input_ids, tails], dim=1)
    if not as_object:
        return sequences
    fields = {CACHE: call.prompt.cache, **recorder.outputs(tails.shape[1])}
    return GenerateDecoderOnlyOutput(sequences=sequences, **fields)


def _padded_tails(call: PreparedCall, state: BatchState) -> list[list[int]]:
    """Emitted ids by row, ended rows padded as plain `generate` pads them."""
    lengths, pad = state.prompt_lengths, call.ends.pad_id or 0
    emitted = [row[start:] for row, start in zip(state.tokens, lengths, strict=True)]
    steps = max(map(len, emitted))
    return [row + [pad] * (steps - len(row)) for row in emitted]


def _write_back(
    call: PreparedCall, state: BatchState, target: HFTarget | ChainTarget, recorder: Recorder
) -> None:
    """Puts the call's tokens into the cache that plain `generate` would have filled."""
    prompt, tails = call.prompt, _padded_tails(call, state)
    if isinstance(target, ChainTarget):
        for output, first, counts in target.settle([tail[:-1] for tail in tails], any(call.wanted)):
            recorder.add_padding(output, first, counts, call.ends.pad_id or 0)
        target.cache.hand_over(prompt.cache)
        return
    _pad_ended_rows(call, state, target, recorder)
    length = prompt.total + len(tails[0]) - 1
    new = torch.arange(prompt.total, length)
    slots = [torch.cat([row, new]) for row in prompt.slots]
    user_cache.write_back(target.cache, prompt.cache, slots, length, prompt.chunks)


def _pad_ended_rows(
    call: PreparedCall, state: BatchState, target: HFTarget, recorder: Recorder
) -> None:
    """Runs ended rows over their padding, as plain `generate` does: the cache stays.

    A later turn attends to these slots when its mask does not hide them.
    """
    tails = _padded_tails(call, state)
    missing = [tail[state.emitted(row) - 1 : -1] for row, tail in enumerate(tails)]
    steps = [state.emitted(row) for row in range(len(tails))]
    while any(missing):
        now = [tokens[:PADDING_CHUNK] for tokens in missing]
        missing = [tokens[PADDING_CHUNK:] for tokens in missing]
        trees = [TokenTree.chain(tokens[0], tokens[1:]) if tokens else TokenTree([0], [-1])
                 for tokens in now]  # fmt: skip
        batch = TreeBatch.from_rows(trees, target.lengths.device)
        counts = list(map(len, now))
        recorder.add_padding(target.forward_tree(batch), steps, counts, call.ends.pad_id or 0)
        steps = [step + count for step, count in zip(steps, counts, strict=True)]
        kept = [list(range(1, len(tokens))) for tokens in now]
        target.commit(batch.parents[:, :0], kept, [bool(tokens) for tokens in now])
