"""Golden test against the classes of SpecForge and speculators themselves, where they import.

`docs/checkpoints.md` says how to install them beside each other. Ours is saved in their dialect,
loaded by their code, and both compute the same logits over a teacher-forced pass; then back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers import foreign_heads as foreign
from specdec.heads.checkpoints.load import load_head, save_head
from specdec.heads.eagle3.head import Eagle3Head

STEPS, LENGTH = 4, 19
KINDS = {
    "plain": foreign.Variant(target=foreign.H),
    "whole vocabulary": foreign.Variant(target=foreign.H, draft=foreign.V),
    "gqa": foreign.Variant(target=foreign.H, kv=2, dim=6),
    "fc_norm": foreign.Variant(target=foreign.H, fc_norm=True),
}
SPECULATORS_KINDS = {
    **KINDS,
    "norm_before_residual": foreign.Variant(target=foreign.H, nbr=True),
    "norm_before_fc": foreign.Variant(target=foreign.H, norm_before_fc=True),
    "norm_output": foreign.Variant(target=foreign.H, fc_norm=True, post=True),
    "qk_norm": foreign.Variant(target=foreign.H, qk_norm=True, kv=1),
}


def ours(tmp_path: Path, kind: foreign.Variant) -> Eagle3Head:
    """A head of ours with embeddings."""
    head = load_head(foreign.foreign_head(tmp_path / "hand-written", "speculators", kind)).head
    return head


def inputs(kind: foreign.Variant) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(11)
    ids = torch.randint(0, foreign.V, (1, LENGTH), generator=gen)
    return ids, torch.randn(1, LENGTH, 3 * kind.target, generator=gen)


@torch.no_grad()
def our_logits(head: Eagle3Head, kind: foreign.Variant) -> list[Tensor]:
    ids, aux = inputs(kind)
    head.attach(foreign.embeddings())
    return list(head.train_logits(ids, head.features(aux), STEPS))


def apart(one: list[Tensor], other: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


@torch.no_grad()
def specforge_logits(model: Any, kind: foreign.Variant) -> Iterator[Tensor]:
    ids, aux = inputs(kind)
    hidden = model.project_hidden_states(aux)
    seen = torch.ones(1, LENGTH, dtype=torch.bool)
    mask = model.prepare_decoder_attention_mask(seen, hidden, 1, LENGTH, 0)
    places, kept = torch.arange(LENGTH)[None], [[], []]
    for _ in range(STEPS):
        ids = torch.cat([ids[:, 1:], ids.new_zeros(1, 1)], 1)
        hidden = model.backbone(model.embed_input_ids(ids), hidden, kept, mask, places, None, True)
        yield model.compute_logits(hidden)


@torch.no_grad()
def speculators_logits(model: Any, kind: foreign.Variant) -> list[Tensor]:
    ids, aux = inputs(kind)
    found: list[Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda _, __, out: found.append(out.detach()))
    ids = torch.cat([ids[:, 1:], ids.new_zeros(1, 1)], 1)
    documents = torch.zeros(1, LENGTH, dtype=torch.long)
    model(hidden_states=aux, input_ids=ids, document_ids=documents, ttt_steps=STEPS)
    hook.remove()
    return found


@pytest.mark.parametrize("name", KINDS)
def test_specforge_computes_the_same(name: str, tmp_path: Path) -> None:
    pytest.importorskip(
        "specforge", reason="the peers' environment has it, see docs/checkpoints.md"
    )
    from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
    from transformers import LlamaConfig

    kind = KINDS[name]
    head = ours(tmp_path, kind)
    wanted = our_logits(head, kind)
    save_head(head, tmp_path / "out", dialect="specforge", fingerprint=None, num_target_layers=12)
    config = LlamaConfig.from_pretrained(tmp_path / "out")
    peer = LlamaForCausalLMEagle3(config, attention_backend="sdpa").eval()
    loaded = peer.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=False)
    assert not loaded.unexpected_keys
    assert set(loaded.missing_keys) <= {"embed_tokens.weight", "d2t", "t2d"}
    peer.embed_tokens.weight.data.copy_(foreign.embeddings())
    assert apart(list(specforge_logits(peer, kind)), wanted) <= 1e-5
    peer.save_pretrained(tmp_path / "theirs")
    back = load_head(tmp_path / "theirs", overrides={"aux_output_layers": [2, 5, 9]})
    assert back.dialect == "specforge"
    assert apart(our_logits(back.head, kind), wanted) <= 1e-6


@pytest.mark.parametrize("name", SPECULATORS_KINDS)
def test_speculators_computes_the_same(name: str, tmp_path: Path) -> None:
    pytest.importorskip(
        "speculators", reason="the peers' environment has it, see docs/checkpoints.md"
    )
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig

    kind = SPECULATORS_KINDS[name]
    head = ours(tmp_path, kind)
    wanted = our_logits(head, kind)
    save_head(head, tmp_path / "out", dialect="speculators", fingerprint=None, num_target_layers=12)
    config = Eagle3SpeculatorConfig.from_pretrained(tmp_path / "out")
    config.transformer_layer_config._attn_implementation = "eager"
    peer = Eagle3DraftModel(config).eval()
    loaded = peer.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=False)
    assert not loaded.unexpected_keys
    assert {key.split(".")[0] for key in loaded.missing_keys} <= {
        "verifier_lm_head",
        "verifier_norm",
    }
    assert peer.config.eagle_aux_hidden_state_layer_ids == [3, 6, 10]
    assert apart(speculators_logits(peer, kind), wanted) <= 1e-5
    peer.save_pretrained(tmp_path / "theirs")
    raw = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert raw["speculators_model_type"] == "eagle3"
    back = load_head(tmp_path / "theirs")
    assert back.assumed == ()
    assert back.head.config.aux_output_layers == (2, 5, 9)
    assert apart(our_logits(back.head, kind), wanted) <= 1e-6
