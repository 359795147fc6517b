"""The arithmetic of --probe: what it tries, and when it says that something is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import foreign_heads as foreign
from specdec.cli.probing import verdict
from specdec.heads.checkpoints import probe
from specdec.heads.checkpoints.load import load_head
from specdec.heads.checkpoints.probe import STEPS, Candidate, Score, candidates
from specdec.heads.eagle3.config import Eagle3Config

CONFIG = Eagle3Config(
    hidden_size=16, intermediate_size=20, num_attention_heads=4, num_key_value_heads=4, head_dim=4,
    vocab_size=foreign.V, draft_vocab_size=foreign.V, target_hidden_size=24,
    aux_output_layers=(2, 5, 9),
)  # fmt: skip


def score(candidate: Candidate, gain: float, slots: int = 60, noise: float = 0.5) -> Score:
    flags = 2 * candidate.norm_before_residual + candidate.feed_post_norm
    gen = torch.Generator().manual_seed(100 + 4 * sum(candidate.layers) + flags)
    common = torch.randn(STEPS, slots, generator=torch.Generator().manual_seed(1))
    log_probs = -3 + common + gain + noise * torch.randn(STEPS, slots, generator=gen)
    return Score(candidate, torch.ones(STEPS, slots, dtype=torch.bool), log_probs)


def test_candidates_are_the_likely_mistakes() -> None:
    tried = candidates(CONFIG, 12, layers_known=True)
    assert tried[0] == Candidate((2, 5, 9), "as loaded", False, False)
    layers = {one.layers: one.layers_from for one in tried}
    assert layers == {
        (2, 5, 9): "as loaded",
        (3, 6, 10): "one higher",
        (1, 4, 8): "one lower",
        (9, 5, 2): "in reverse",
        (1, 5, 8): "default rule",
        (2, 6, 9): "default, one higher",
        (0, 4, 7): "default, one lower",
    }
    assert len(tried) == len(set(tried)) == 28
    assert all(one.apply(CONFIG).aux_output_layers == one.layers for one in tried)
    # None reads the last layer, none lies outside.
    assert {one.layers for one in candidates(CONFIG, 11, True)} >= {(1, 4, 8), (2, 5, 9)}
    assert (3, 6, 10) not in {one.layers for one in candidates(CONFIG, 11, True)}
    unknown = candidates(CONFIG, 12, layers_known=False)
    assert unknown[0].layers == (1, 5, 8)
    assert (2, 5, 9) not in {one.layers for one in unknown}
    post = candidates(replace(CONFIG, feed_post_norm=True), 12, True)
    assert post[0].feed_post_norm


def test_a_clear_winner_is_named() -> None:
    tried = candidates(CONFIG, 12, True)[:4]
    scores = [score(tried[0], 1.0), *(score(one, 0.0) for one in tried[1:])]
    assert verdict(scores) == (
        "the head was trained with aux_output_layers=[2,5,9], norm_before_residual=false, "
        "feed_post_norm=false; --set takes these"
    )


def test_what_chance_explains_is_not_said() -> None:
    tried = candidates(CONFIG, 12, True)
    flags = {(one.norm_before_residual, one.feed_post_norm): one for one in tried[:4]}
    best, same = score(flags[False, False], 1.0), score(flags[False, True], 1.0)
    worse = [score(flags[True, False], 0.0), score(flags[True, True], 0.0)]
    said = verdict([best, same, *worse])
    assert "trained with aux_output_layers=[2,5,9], norm_before_residual=false; --set" in said
    assert "This text does not tell feed_post_norm (false or true)" in said
    alike = [score(one, 0.0, slots=6, noise=3.0) for one in tried]
    assert verdict(alike).startswith("this text does not tell")


def test_a_head_that_fits_nothing_is_called_so() -> None:
    poor = score(candidates(CONFIG, 12, True)[0], 1.0)
    poor = replace(poor, hits=torch.zeros(STEPS, 60, dtype=torch.bool))
    assert "no candidate fits: the best agrees at 0.0% of the slots" in verdict([poor])
    nothing = replace(poor, hits=torch.zeros(STEPS, 0).bool(), log_probs=torch.zeros(STEPS, 0))
    assert "no prompt gave enough text" in verdict([nothing])


class Numbered:
    """A target whose hidden states hold the index that Hugging Face gives them."""

    device = torch.device("cpu")

    def generate(self, row: Tensor, **_: Any) -> Tensor:
        return torch.cat([row, torch.arange(20)[None] % foreign.V], 1)

    def __call__(self, text: Tensor, **_: Any) -> Any:
        states = [torch.full((1, text.shape[1], 24), float(i)) for i in range(13)]
        return SimpleNamespace(hidden_states=tuple(states))


def test_each_candidate_is_fed_its_own_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = load_head(foreign.foreign_head(tmp_path / "head", "specforge")).head
    head.attach(foreign.embeddings())
    fed: dict[tuple[int, ...], list[float]] = {}
    draft = probe._draft

    def watch(one: Any, text: Tensor, aux: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
        assert prompt == 5
        fed[one.config.aux_output_layers] = aux[0, 0, ::24].tolist()
        return draft(one, text, aux, prompt)

    monkeypatch.setattr(probe, "_draft", watch)
    tried = candidates(head.config, 12, True)
    scores = probe.probe(head, Numbered(), tried, [torch.arange(5)], 20)
    # Output of layer i is hidden state i + 1.
    assert fed == {one.layers: [layer + 1.0 for layer in one.layers] for one in tried}
    # 25 tokens, 5 of them the prompt's: slots 3 to 20 have three new tokens after them.
    assert all(one.hits.shape == one.log_probs.shape == (STEPS, 18) for one in scores)
    assert [one.likelihood for one in scores] == sorted(
        (o.likelihood for o in scores), reverse=True
    )


def test_a_draft_is_compared_with_the_token_it_stands_for(tmp_path: Path) -> None:
    """Step s at slot t stands for token t + 2 + s; checked against a loop without a batch."""
    head = load_head(foreign.foreign_head(tmp_path / "head", "specforge")).head
    head.attach(foreign.embeddings())
    gen = torch.Generator().manual_seed(4)
    text = torch.randint(0, foreign.V, (1, 14), generator=gen)
    aux = torch.randn(1, 14, 72, generator=gen)
    assert head.d2t is not None
    with torch.no_grad():
        hits, log_probs = probe._draft(head, text, aux, 6)
        steps = list(head.train_logits(text, head.features(aux), STEPS))
    ids = (torch.arange(28) + head.d2t).tolist()
    for step, logits in enumerate(steps):
        for index, slot in enumerate(range(4, 10)):
            token, row = int(text[0, slot + 2 + step]), logits[0, slot].log_softmax(-1)
            assert bool(hits[step, index]) == (ids[int(row.argmax())] == token)
            wanted = max(float(row[ids.index(token)]), -12.0) if token in ids else 0.0
            assert abs(float(log_probs[step, index]) - wanted) < 1e-5
    assert hits.shape == (STEPS, 6)
