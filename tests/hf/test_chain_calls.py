"""Calls in chain mode: prompts of every kind, outputs, callbacks, and texts at their limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import specdec
from helpers.chains import (
    BATCHES,
    FEW,
    NEW,
    SAMPLINGS,
    families,
    rows_of,
    run_both,
    tolerance,
    with_options,
)
from helpers.drafters import THROW_AWAY
from helpers.families import CHAIN_FAMILIES, model_of
from helpers.hf import plain
from helpers.laws import prompts
from helpers.names import CACHE
from specdec.contracts import BatchState, Needs, RoundResult
from specdec.registry import methods

pytestmark = [
    pytest.mark.usefixtures("throw_away_methods"),
    pytest.mark.filterwarnings("error::specdec.errors.FallbackWarning"),
]


# Other prompts and outputs


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("family", ["qwen3_5", "lfm2", "bloom"])
def test_chunked_prefill(family: str, chunk: int) -> None:
    model = model_of(family)
    for inputs in BATCHES.values():
        both = run_both(model, **inputs, max_new_tokens=NEW, prefill_chunk_size=chunk)
        assert both.stats.prefill_forwards == -(-inputs["input_ids"].shape[1] // chunk)


@pytest.mark.parametrize("family", FEW)
def test_embeddings_as_the_prompt(family: str) -> None:
    model = model_of(family)
    for inputs in (prompts(1), prompts(4)):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        embeds = model.get_input_embeddings()(ids) * 1.1
        both = run_both(model, inputs_embeds=embeds, attention_mask=mask, max_new_tokens=NEW)
        assert both.ours.shape == (len(ids), NEW)
        both = run_both(model, **inputs, inputs_embeds=embeds, max_new_tokens=NEW)
        assert both.ours.shape == (len(ids), ids.shape[1] + NEW)


@pytest.mark.parametrize("family", FEW)
def test_several_sequences_of_a_prompt(family: str) -> None:
    sampled = {"do_sample": True, "top_k": 0, "num_return_sequences": 3}
    for inputs in (prompts(1), rows_of(0, 2)):
        both = run_both(model_of(family), **inputs, **sampled, max_new_tokens=NEW)
        assert len(both.ours) == 3 * len(inputs["input_ids"])


@SAMPLINGS
@pytest.mark.parametrize("family", FEW)
def test_scores_and_logits(family: str, sampled: dict[str, Any]) -> None:
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    model = model_of(family)
    for inputs in (prompts(1), prompts(4)):
        both = run_both(model, **inputs, **sampled, **wanted, max_new_tokens=NEW)
        for name in ("scores", "logits"):
            ours, theirs = torch.stack(both.ours[name]), torch.stack(both.plain[name])
            assert torch.equal(ours.isinf(), theirs.isinf())
            scale = float(theirs[theirs.isfinite()].abs().max())
            worst = (ours - theirs).nan_to_num(0, 0, 0).abs().max()
            assert float(worst) / scale <= max(tolerance(model), 1e-6)


class Processor:
    """Keeps the ids that it is shown."""

    def __init__(self) -> None:
        self.shown: list[list[int]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.shown.append(input_ids[0].tolist())
        return scores


class Criterion:
    """Keeps the ids that it is shown."""

    def __init__(self) -> None:
        self.shown: list[list[int]] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.shown.append(input_ids[0].tolist())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Streamer:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.shown: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        self.shown.append(value.flatten().tolist())

    def end(self) -> None:
        self.shown.append([-1])


@SAMPLINGS
@pytest.mark.parametrize("family", FEW)
def test_processors_criteria_and_streamers(family: str, sampled: dict[str, Any]) -> None:
    """Each sees every emitted prefix or token once, in order, and nothing that was drafted."""
    seen: list[tuple[Processor, Criterion, Streamer]] = []

    def fresh() -> dict[str, Any]:
        processor, criterion, streamer = seen_by = Processor(), Criterion(), Streamer()
        seen.append(seen_by)
        return {
            "logits_processor": [processor],
            "stopping_criteria": [criterion],
            "streamer": streamer,
        }

    both = run_both(model_of(family), fresh, **prompts(1), **sampled, max_new_tokens=NEW)
    text, width = both.ours[0].tolist(), prompts(1)["input_ids"].shape[1]
    for processor, criterion, streamer in seen:
        assert processor.shown == [text[:end] for end in range(width, len(text))]
        assert criterion.shown == [text[:end] for end in range(width + 1, len(text) + 1)]
        assert streamer.shown == [text[:width], *([token] for token in text[width:]), [-1]]


@pytest.mark.parametrize("family", families("mamba2", "bloom", "mpt"))  # without positions
def test_text_beyond_the_declared_positions(family: str) -> None:
    """Rotary models may be led beyond what they declare; plain lets them, without speculation."""
    short = with_options(CHAIN_FAMILIES[family], max_position_embeddings=16)
    model = specdec.augment(short.build(torch.float64), "none")
    for inputs in (prompts(1), prompts(4)):
        run_both(model, **inputs, max_new_tokens=NEW)


def test_text_that_ends_with_the_distance_table() -> None:
    """MPT's biases have a table of slots; rows at its end must not draft beyond it."""
    table = with_options(CHAIN_FAMILIES["mpt"], max_seq_len=prompts(4)["input_ids"].shape[1] + NEW)
    model = specdec.augment(table.build(torch.float32), "none")
    for inputs in BATCHES.values():
        for method in ("oracle", "random_trees"):
            run_both(model, **inputs, method=method, max_new_tokens=NEW)


# Drafters that read hidden states


TAPS = (0, 1)


class Tapping(THROW_AWAY["oracle"]):
    """Keeps what it is shown of the target: features by row and position."""

    needs = Needs(taps=TAPS)
    features: dict[tuple[int, int], Tensor]
    tokens: dict[tuple[int, int], int]

    def start(self, state: BatchState) -> None:
        super().start(state)
        self.state = state

    def _keep(self, row: int, position: int, token: int, features: Tensor) -> None:
        assert (row, position) not in self.features, "a token was shown twice"
        self.features[row, position], self.tokens[row, position] = features, token

    def observe_prefill(
        self, rows: Sequence[int], token_ids: Tensor, features: Tensor | None, offset: int
    ) -> None:
        assert features is not None
        assert features.shape[:2] == token_ids.shape
        for index, row in enumerate(rows):
            for at, token in enumerate(token_ids[index].tolist()):
                self._keep(row, offset + at, token, features[index, at])

    def observe(self, round_result: RoundResult) -> None:
        super().observe(round_result)
        features, host = round_result.output.features, round_result.host
        assert features is not None
        assert features.shape[:2] == round_result.trees.tokens.shape
        for row, tokens in enumerate(host.tokens):
            nodes = [0, *host.paths[row]] if tokens else []
            first = int(self.state.lengths[row]) - len(nodes)
            for at, node in enumerate(nodes):
                token = int(round_result.trees.tokens[row, node])
                self._keep(row, first + at, token, features[row, node])


@pytest.fixture
def tapping() -> Iterator[type[Tapping]]:
    methods.register("tapping", Tapping)
    Tapping.features, Tapping.tokens = {}, {}
    yield Tapping
    methods.unregister("tapping")


@torch.no_grad()
def tapped_alone(model: Any, ids: list[int]) -> Tensor:
    """[n, F] tapped states of a text by itself."""
    output = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    return torch.cat([output.hidden_states[tap + 1][0] for tap in TAPS], -1)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("family", ["qwen3_5", "lfm2", "bloom"])
def test_tapped_states_are_those_of_their_tokens(
    family: str, chunk: int | None, tapping: type[Tapping]
) -> None:
    """Every token of prompt and text once, at its position, however often it was fed."""
    model, inputs = model_of(family), prompts(4)
    both = run_both(model, method="tapping", **inputs, max_new_tokens=NEW, prefill_chunk_size=chunk)
    for row, text in enumerate(both.ours.tolist()):
        text = text[int(inputs["attention_mask"][row].argmax()) :]
        wanted = tapped_alone(model, text)
        for position, token in enumerate(text[:-1]):
            assert tapping.tokens[row, position] == token
            got = tapping.features[row, position]
            error = float((got - wanted[position]).abs().max() / wanted.abs().max())
            assert error <= tolerance(model)


@pytest.mark.parametrize("family", ["qwen3_5", "lfm2", "bloom"])
def test_the_second_turn_shows_what_is_new(family: str, tapping: type[Tapping]) -> None:
    """Positions go on behind the adopted cache, row by row."""
    model, inputs = model_of(family), prompts(4)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for cache in caches:
        said = plain(model, **inputs, max_new_tokens=NEW, **{CACHE: cache})
    ids = torch.cat([said, said[:, :3].clamp(min=15)], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(4, NEW + 3, dtype=torch.long)], 1)
    pair = iter(caches)
    run_both(
        model, lambda: {CACHE: next(pair)}, method="tapping", input_ids=ids,
        attention_mask=mask, max_new_tokens=NEW,
    )  # fmt: skip
    for row, text in enumerate(ids.tolist()):
        padding = int(mask[row].argmax())
        held = said.shape[1] - 1 - padding
        known = {at: token for (r, at), token in tapping.tokens.items() if r == row}
        assert min(known) == held
        for position, token in enumerate(text[padding:]):
            assert known.get(position, token) == token
            assert (position in known) == (position >= held)
