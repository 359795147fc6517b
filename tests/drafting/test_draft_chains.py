"""What a draft model writes ahead, in every round, against a draft that reads the text anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from helpers.families import FAMILIES, SEED, draft_of, model_of
from helpers.laws import prompts
from helpers.toy_target import paths_of
from specdec import SpecConfig
from specdec.stats import RoundRecord

TOKENS = 14


def disturbed(family: str) -> Any:
    """A family's own model with weights that are a little off."""
    draft = FAMILIES[family].build(torch.float64)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in draft.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.mul_(1 + 0.02 * noise)
    return draft


@torch.no_grad()
def written_ahead(draft: Any, text: Sequence[int], depth: int, width: int) -> list[tuple[int, ...]]:
    """Level by level the best token, which goes on, and its siblings, which do not."""
    trunk: tuple[int, ...] = ()
    found = []
    for _ in range(depth):
        logits = draft(input_ids=torch.tensor([[*text, *trunk]]), use_cache=False).logits[0, -1]
        best = logits.sort(descending=True).indices.tolist()[:width]
        found += [(*trunk, token) for token in best]
        trunk = (*trunk, best[0])
    return found


def check(family: str, draft: Any, rows: int, budget: int | None, **sizes: int) -> list[int]:
    """Generates and compares every round; how many tokens each emitted."""
    records: list[RoundRecord] = []
    options = {"draft": draft, **sizes}
    config = SpecConfig("draft_model", options, budget=budget, on_round=records.append)
    inputs = prompts(rows)
    model_of(family).generate(
        **inputs, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, specdec=config
    )
    mask = inputs["attention_mask"].bool()
    texts = [row[seen].tolist() for row, seen in zip(inputs["input_ids"], mask, strict=True)]
    emitted, width = [0] * rows, sizes.get("top_k", 1)
    nodes = sizes["num_draft_tokens"] * width if budget is None else budget
    for record in records:
        assert record.trees is not None
        for row, tree in enumerate(record.trees):
            if not record.tokens[row] or not record.index:
                continue
            left = TOKENS - emitted[row] - 1
            allowed = len(tree) - 1 if FAMILIES[family].mode == "chain" else nodes
            depth = min(sizes["num_draft_tokens"], -(-allowed // width), left)
            wanted = written_ahead(draft, texts[row], depth, width)[:allowed]
            assert paths_of(tree)[1:] == wanted, f"round {record.index}, row {row}"
        for row, tokens in enumerate(record.tokens):
            texts[row] += tokens
            emitted[row] += len(tokens)
    return [len(tokens) for record in records[1:] for tokens in record.tokens if tokens]


@pytest.mark.parametrize("budget", [None, 3])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_a_tree_target(rows: int, top_k: int, budget: int | None) -> None:
    emitted = check("llama", draft_of("llama"), rows, budget, num_draft_tokens=4, top_k=top_k)
    assert max(emitted) > 1


@pytest.mark.parametrize(("family", "rows"), [("mamba2", 1), ("lfm2", 1), ("mamba2", 2)])
def test_chain_targets_and_drafts(family: str, rows: int) -> None:
    """A recurrent draft for one row, a Llama that knows nothing for two of them."""
    draft = disturbed(family) if rows == 1 else draft_of("llama")
    emitted = check(family, draft, rows, None, num_draft_tokens=4)
    assert rows > 1 or max(emitted) > 2
