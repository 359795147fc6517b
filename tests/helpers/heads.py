"""Draft heads for tests: random ones that fit a model."""

from __future__ import annotations

from typing import Any

import torch

from specdec.heads.eagle3.config import Eagle3Config, default_aux_layers
from specdec.heads.eagle3.head import Eagle3Head
from specdec.hf.states import recorded_layers


def head_for(model: Any, seed: int = 0, draft_vocab: int | None = None, **flags: Any) -> Eagle3Head:
    """A random head for `model`, in its dtype, with its embeddings."""
    text = model.config.get_text_config()
    embeddings = model.get_input_embeddings().weight
    config = Eagle3Config(
        hidden_size=embeddings.shape[1],
        intermediate_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=len(embeddings),
        draft_vocab_size=draft_vocab or len(embeddings),
        target_hidden_size=text.hidden_size,
        aux_output_layers=default_aux_layers(recorded_layers(text)),
        **flags,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = Eagle3Head(config)
        for parameter in head.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, 1.0, 0.1)
    head = head.to(model.device, model.dtype).eval()
    head.attach(embeddings)
    return head
