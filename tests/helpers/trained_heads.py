"""A head for the demo target that was trained for a few seconds, enough to tell its flags apart."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from specdec.heads.eagle3.config import Eagle3Config
from specdec.heads.eagle3.head import Eagle3Head

LAYERS = (1, 2, 4)
PROMPTS = (
    "def read(self, size=-1):",
    "import unittest\n\nclass StackTest(unittest.TestCase):",
    "for name, value in sorted(items):",
    "if isinstance(value, str):",
    "class Error(Exception):",
)
NEW_TOKENS = 48


def trained_head(model: Any, tokenizer: Any, steps: int = 60, **flags: Any) -> Eagle3Head:
    """Overfits the target's own continuations of `PROMPTS`."""
    rows = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        mask = torch.ones_like(ids)
        rows.append(
            model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS)
        )
    width = min(row.shape[1] for row in rows)
    text = torch.cat([row[:, :width] for row in rows])
    with torch.no_grad():
        states = model(text, output_hidden_states=True).hidden_states
    aux = torch.cat([states[layer + 1] for layer in LAYERS], -1)
    size = model.config.hidden_size
    torch.manual_seed(0)
    head = Eagle3Head(
        Eagle3Config(
            hidden_size=size, intermediate_size=2 * size, num_attention_heads=4,
            num_key_value_heads=4, head_dim=32, vocab_size=model.config.vocab_size,
            draft_vocab_size=model.config.vocab_size, target_hidden_size=size,
            aux_output_layers=LAYERS, **flags,
        )
    )  # fmt: skip
    head.attach(model.get_input_embeddings().weight)
    assert head.lm_head is not None
    head.lm_head.weight.data.copy_(model.get_output_embeddings().weight)
    weights = [p for p in head.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=3e-3)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 8)
        loss = torch.zeros(())
        for j, logits in enumerate(head.train_logits(text, head.features(aux), 3)):
            wanted = text[:, 2 + j :]
            loss = loss + functional.cross_entropy(
                logits[:, : -2 - j].flatten(0, 1), wanted.flatten()
            )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return head.eval()
