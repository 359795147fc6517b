"""What a draft model writes ahead, in every round, against a draft that reads the text anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from helpers.families import FAMILIES, SEED, draft_of, model_of
from helpers.laws import prompts
from helpers.naive_head import LogProbs, Path, Sizes, dynamic_trees
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


def log_probs_after(draft: Any, text: Sequence[int]) -> LogProbs:
    """What the draft would write after a path below the text, which it reads anew."""

    @torch.no_grad()
    def after(path: Path) -> torch.Tensor:
        logits = draft(input_ids=torch.tensor([[*text, *path]]), use_cache=False).logits[0, -1]
        found: torch.Tensor = logits.log_softmax(-1)
        return found

    return after


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
    emitted, top_k = [0] * rows, sizes.get("top_k", 1)
    most = min(sizes.get("nodes", 100), 100 if budget is None else budget)
    for record in records:
        assert record.trees is not None
        left = [TOKENS - n - 1 for n in emitted]
        for row, tree in enumerate(record.trees):
            if not record.tokens[row] or not record.index:
                continue
            nodes = len(tree) - 1 if FAMILIES[family].mode == "chain" else most
            depth = min(sizes["num_draft_tokens"], nodes if budget else 100)
            depth = min(depth, left[row] if top_k == 1 or left[row] < 1 else max(left))
            if FAMILIES[family].mode == "chain":
                depth = min(depth, nodes)
            shape = Sizes(depth, top_k, nodes, sizes.get("beam", 1))
            (wanted,) = dynamic_trees([log_probs_after(draft, texts[row])], int, shape)
            assert paths_of(tree)[1:] == [path for path, _ in wanted], f"{record.index}, row {row}"
        for row, tokens in enumerate(record.tokens):
            texts[row] += tokens
            emitted[row] += len(tokens)
    return [len(tokens) for record in records[1:] for tokens in record.tokens if tokens]


@pytest.mark.parametrize("budget", [None, 3])
@pytest.mark.parametrize("sizes", [
    {}, {"top_k": 2}, {"top_k": 3, "beam": 2}, {"top_k": 2, "beam": 2, "nodes": 6}
], ids=str)  # fmt: skip
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_a_tree_target(rows: int, sizes: dict[str, int], budget: int | None) -> None:
    emitted = check("llama", draft_of("llama"), rows, budget, num_draft_tokens=4, **sizes)
    assert max(emitted) > 1


@pytest.mark.parametrize(("family", "rows"), [("mamba2", 1), ("lfm2", 1), ("mamba2", 2)])
def test_chain_targets_and_drafts(family: str, rows: int) -> None:
    """A recurrent draft for one row, a Llama that knows nothing for two of them."""
    draft = disturbed(family) if rows == 1 else draft_of("llama")
    emitted = check(family, draft, rows, None, num_draft_tokens=4)
    assert rows > 1 or max(emitted) > 2
