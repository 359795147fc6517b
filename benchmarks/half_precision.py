"""The regret rule in bf16 on the bundled target, greedy and sampled, for every method.

Prompts are cut from standard-library modules that the target was not trained on. Exits 1 when an
emitted token's regret exceeds twice the measured rounding noise. Run:

    python benchmarks/half_precision.py
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
import tyro

import specdec
from loop_cost import code_prompts
from specdec.audit.exactness import Audit, audit, reference_model, replay_noise
from specdec.demo import load_target
from specdec.registry import methods


@dataclass(frozen=True)
class Options:
    """What to check."""

    prompts: int = 24
    """Number of prompts."""
    tokens: int = 96
    """New tokens a prompt."""


def main() -> None:
    """Checks every method and prints the table last."""
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    model = load_target(dtype=torch.bfloat16)
    reference = reference_model(model)
    prompts = code_prompts(options.prompts)
    rows, violations = [], 0
    for method in methods.names():
        if method == "draft_model":  # needs a draft, and takes the same walk
            continue
        for sample in (False, True):
            audits, same = check(model, reference, prompts, method, sample, options.tokens)
            tokens = sum(len(a.regrets) for a in audits)
            broken = sum(a.violations for a in audits)
            violations += broken
            rows.append(
                f"| {method} | {'sampled' if sample else 'greedy'} | {tokens:,} | "
                f"{sum(a.not_best for a in audits)} | {max(a.worst_ratio for a in audits):.2f} | "
                f"{broken} | {same}/{len(prompts)} |"
            )
    print("| method | decoding | tokens | not the fp64 choice | worst regret / noise (limit 2) |"
          " violations | identical strings |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))
    sys.exit(1 if violations else 0)


def check(
    model: Any, reference: Any, prompts: list[torch.Tensor], method: str, sample: bool, tokens: int
) -> tuple[list[Audit], int]:
    """Audits of all prompts, and how many strings equal plain `generate`'s."""
    specdec.augment(model, method)
    audits, same = [], 0
    for seed, ids in enumerate(prompts):
        options: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": sample}
        if sample:
            options |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        torch.manual_seed(seed)
        text = model.generate(ids, **options)
        torch.manual_seed(seed)
        same += torch.equal(text, type(model).generate(model, ids, **options))
        steps = text.shape[1] - ids.shape[1]
        vocab = model.config.vocab_size
        noise = replay_noise(seed, steps, vocab, text.device) if sample else None
        audits.append(audit(reference, model, text[0], ids.shape[1], noise))
    specdec.restore(model)
    return audits, same


if __name__ == "__main__":
    main()
