"""Every method's rounds on fixed prompts, as integers: what each drafted and what was accepted.

The laws hold the text, which no drafter can change; this holds the speed. A change that is meant to
draft otherwise changes the table, which

    PYTHONPATH=tests python tests/drafting/test_pinned_rounds.py

prints anew. Say in the commit which methods became better or worse, and why.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import specdec
from helpers.families import FAMILIES
from helpers.heads import head_for
from specdec import SpecConfig, demo
from specdec.demo.prompts import PROMPTS
from specdec.registry import _BUILT_IN
from specdec.stats import RoundRecord

TOKENS = 32
METHODS = [name for name in _BUILT_IN if name != "none"]  # which is one token a round
CALLS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0},
}
TARGETS = {"tree": "tree", "batch": "tree", "causal": "chain", "mamba2": "chain"}

# Target, call, method; nodes drafted; tokens emitted in each round, a digit or letter (base 36) a
# round, rows after one another.
TABLE = """
tree   greedy   lookahead       362  11511411394
tree   greedy   jacobi          354  115151112a3
tree   greedy   prompt_lookup    36  11411141111149
tree   greedy   suffix           62  1151141111167
tree   greedy   draft_model      58  626665
tree   greedy   eagle3          288  664663
tree   greedy   recycling       422  1151151115135
tree   sampled  lookahead       557  111111121161211414
tree   sampled  jacobi          409  111111111116113414
tree   sampled  prompt_lookup    42  1111111111114111111111114
tree   sampled  suffix           51  1111111111115111112214
tree   sampled  draft_model     112  113435231323
tree   sampled  eagle3          432  112463554
tree   sampled  recycling       453  1111111112411131324
batch  greedy   lookahead       525  11511411394 119965
batch  greedy   jacobi          467  115151112a3 12fd
batch  greedy   prompt_lookup    61  11411141111149 114bb3
batch  greedy   suffix           89  1151141111167 119k
batch  greedy   draft_model     120  626665 166666
batch  greedy   eagle3          584  664663 1664662
batch  greedy   recycling      1082  1151131111161115 1191442221112
causal greedy   lookahead        95  1151141111194
causal greedy   jacobi          137  11141712d
causal greedy   prompt_lookup    36  11411141111149
causal greedy   suffix           45  1151141111149
causal greedy   draft_model      30  616666
causal greedy   eagle3           32  6163663
causal greedy   recycling        68  11511411111311341
causal sampled  lookahead       150  1111111121611111111114
causal sampled  jacobi          252  11111111112522112114
causal sampled  prompt_lookup    42  1111111111114111111111114
causal sampled  suffix           39  11111111111151111111214
causal sampled  draft_model      57  113336222314
causal sampled  eagle3           67  11111362142314
causal sampled  recycling        44  111111111111311111113114
mamba2 greedy   lookahead       157  111121111111111111211122111
mamba2 greedy   jacobi          315  111111111112112112111211111
mamba2 greedy   prompt_lookup    28  11111111111111111112111211111
mamba2 greedy   suffix           59  11111111111111111112111211111
mamba2 greedy   draft_model      35  452226622
mamba2 greedy   eagle3          135  121111111111111111111111111111
mamba2 greedy   recycling        59  111111111111111111121111111111
"""


def _causal_only(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention that heeds no mask: trees come out wrong, so the target takes chains alone."""
    groups, new, known = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    hidden = torch.ones(new, known, dtype=torch.bool).triu(known - new + 1)
    scores = (query @ key.transpose(2, 3) * options["scaling"]).masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


_CAUSAL_ONLY = "specdec_test_causal_only"
transformers.AttentionInterface.register(_CAUSAL_ONLY, _causal_only)


def _noisy(model: Any, amount: float) -> Any:
    """The model with all weights a little off, the same on every version of everything."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.mul_(1 + amount * noise)
    return model


@cache
def _mamba2() -> Any:
    """Random weights that do not depend on how transformers begins a model."""
    model = FAMILIES["mamba2"].build(torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.2 * noise if parameter.ndim > 1 else 1 + 0.1 * noise)
    return model


@cache
def model_of(target: str) -> Any:
    """The augmented target; methods are chosen per call."""
    if target == "mamba2":
        return specdec.augment(_mamba2(), "none")
    model = demo.load_target(torch.float64)
    if target == "causal":
        model.set_attn_implementation(_CAUSAL_ONLY)
    return specdec.augment(model, "none")


@cache
def draft_of(target: str) -> Any:
    """The target itself with weights that are a little off."""
    model = FAMILIES["mamba2"].build(torch.float64) if target == "mamba2" else None
    if model is None:
        return _noisy(demo.load_target(torch.float64), 0.08)
    model.load_state_dict(_mamba2().state_dict())
    return _noisy(model, 0.02)


def options_of(target: str, method: str) -> dict[str, Any]:
    """What a method cannot do without; the sizes are the defaults, those of trees."""
    if method == "draft_model":
        return {"draft": draft_of(target), "top_k": 2}
    if method == "eagle3":
        head = head_for(model_of(target)) if target == "mamba2" else str(demo.head_path())
        return {"draft": head, "depth": 5}
    return {}


@cache
def inputs_of(target: str) -> dict[str, Tensor]:
    """The prompt, or two of unequal length."""
    if target == "mamba2":
        ids = torch.tensor([[17, 50, 33, 71, 17, 50, 33, 20, 88]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    tokenizer = demo.load_tokenizer()
    tokenizer.padding_side = "left"
    texts = [text[: 100 + 80 * n] for n, text in enumerate(list(PROMPTS.values())[1:3])]
    texts = texts if target == "batch" else texts[:1]
    return dict(tokenizer(texts, return_tensors="pt", padding=True))


def line_of(target: str, call: str, method: str) -> str:
    """One line of the table, from a call."""
    records: list[RoundRecord] = []
    model, inputs = model_of(target), inputs_of(target)
    config = SpecConfig(method, options_of(target, method), on_round=records.append)
    limits = {"max_new_tokens": TOKENS, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(5)
    model.generate(**inputs, **limits, **CALLS[call], specdec=config)
    stats = specdec.last_stats(model)
    assert (stats.mode, stats.method) == (TARGETS[target], method), stats.mode_reason
    rows = [
        "".join(_digit(len(record.tokens[row])) for record in records[1:] if record.tokens[row])
        for row in range(len(inputs["input_ids"]))
    ]
    return f"{target:7}{call:8} {method:14}{stats.drafted_nodes:5}  {' '.join(rows)}"


def _digit(count: int) -> str:
    return "0123456789abcdefghijklmnopqrstuvwxyz"[count]


CELLS = [
    (target, call, method)
    for target in TARGETS
    for call in (("greedy",) if target in ("batch", "mamba2") else CALLS)
    for method in METHODS
]


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_rounds_are_the_pinned_ones(cell: tuple[str, str, str]) -> None:
    pinned = {tuple(line.split()[:3]): line for line in TABLE.strip().splitlines()}
    assert line_of(*cell) == pinned.get(cell)


def test_the_table_holds_nothing_else() -> None:
    assert [tuple(line.split()[:3]) for line in TABLE.strip().splitlines()] == CELLS


if __name__ == "__main__":
    for cell in CELLS:
        print(line_of(*cell), flush=True)
