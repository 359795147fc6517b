"""What our loop costs on the bundled target: beside Hugging Face `generate`, and by tree size.

Prompts are cut from standard-library modules that the target was not trained on. Arms alternate in
one process, one thread; the first row compares `generate` with itself. Run:

    python benchmarks/loop_cost.py
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro

import specdec
from specdec import RowDrafter, TokenTree
from specdec.demo import load_target, load_tokenizer
from specdec.demo.corpus import read_sources
from specdec.drafters.row import DraftRow
from specdec_bench.paired import ratio, time_arms


@dataclass(frozen=True)
class Options:
    """What to measure."""

    prompts: int = 16
    """Number of prompts."""
    tokens: int = 96
    """New tokens a prompt."""
    repeats: int = 6
    """Timed repeats of every arm."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the target."""


class Ballast(RowDrafter):
    """Proposes a star of `nodes` tokens that the target hardly ever takes: pure cost."""

    needs = specdec.Needs()

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self.max_nodes = nodes

    class Row(DraftRow):
        """A row of it."""

        def propose(self, budget: int) -> TokenTree:
            """`budget` different children of the root."""
            tokens = [2 + (self.text[-1] + 7 * i) % 4000 for i in range(budget)]
            return TokenTree([self.text[-1], *tokens], [-1] + [0] * budget)


def code_prompts(count: int, characters: int = 700) -> list[torch.Tensor]:
    """[1, S] ids of pieces of held-out modules."""
    tokenizer = load_tokenizer()
    texts = [text for text in read_sources(held_out=True) if len(text) > 3 * characters]
    texts = texts[:: max(1, len(texts) // count)][:count]
    pieces = [text[characters : 2 * characters] for text in texts]
    return [tokenizer(piece, return_tensors="pt").input_ids for piece in pieces]


def host_time(model: Any, prompts: list[torch.Tensor], nodes: int, tokens: int) -> str:
    """One table row: host milliseconds a round beside the forward, and their share."""
    name = f"ballast{nodes}"
    specdec.register_drafter(name, lambda _: Ballast(nodes - 1))
    specdec.augment(model, name)
    seconds, rounds, wall = Counter[str](), 0, 0.0
    for ids in prompts:
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=tokens, do_sample=False)
        wall += time.perf_counter() - start
        stats = specdec.last_stats(model)
        seconds.update(stats.seconds)
        rounds += stats.rounds
    stages = ("draft", "verify", "commit", "observe")
    host = sum(seconds[stage] for stage in stages)
    split = ", ".join(f"{stage} {1e3 * seconds[stage] / rounds:.3f}" for stage in stages)
    rest = wall - host - seconds["forward"]  # generate's preparation, prefill, statistics
    return (
        f"| {nodes} | {1e3 * seconds['forward'] / rounds:.3f} | {1e3 * host / rounds:.3f} | "
        f"{100 * host / (host + seconds['forward']):.1f} % | {split} | {1e3 * rest / rounds:.3f} |"
    )


def main() -> None:
    """Measures and prints both tables last."""
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    model = load_target(dtype=getattr(torch, options.dtype))
    prompts = code_prompts(options.prompts)
    length = {"max_new_tokens": options.tokens, "do_sample": False}
    plain: Callable[..., torch.Tensor] = type(model).generate
    specdec.augment(model, "none")
    arms: dict[str, Callable[[int], object]] = {
        "hf": lambda unit: plain(model, prompts[unit], **length),
        "hf again": lambda unit: plain(model, prompts[unit], **length),
        "none": lambda unit: model.generate(prompts[unit], **length),
    }
    lines = [f"\n{len(prompts)} prompts x {options.tokens} tokens, {options.dtype}, one thread"]
    for label, clock in (("wall", time.perf_counter), ("CPU", time.process_time)):
        seconds = time_arms(arms, len(prompts), options.repeats, clock)
        lines.append(f"{label} time, hf over hf again: {ratio(seconds['hf'], seconds['hf again'])}")
        lines.append(f"{label} time, hf over none:     {ratio(seconds['hf'], seconds['none'])}")
    lines.append("\n| T | forward ms | host ms a round | share | split ms | rest of the call ms |")
    lines.append("|---|---|---|---|---|---|")
    lines.extend(host_time(model, prompts, nodes, options.tokens) for nodes in (1, 8, 32))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
