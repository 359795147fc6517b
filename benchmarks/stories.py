"""Tokens per forward and time on a tiny story model, beside Hugging Face's prompt lookup.

Five story openings (or fifty), 120 tokens each, greedy, fp32, one thread; every text is compared
with plain `generate`. Drafter state is fresh for each prompt. Run:

    python benchmarks/stories.py --model PATH_TO_STORIES260K
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer

import specdec
from specdec.stats import RoundRecord
from specdec_bench.drafts import first_layers
from specdec_bench.paired import ratio, time_arms

_NAMES = ("Lily", "Tim", "Mia", "Ben", "Sue", "Max", "Anna", "Jack", "Lucy", "Sam")
_BEGINNINGS = (
    "Once upon a time, there was a little bear named {}.",
    "One day, {} found a shiny key in the garden.",
    "{} liked to play with a red ball.",
    "It was raining, and {} was sad.",
    "{} and a big dog went to the park.",
)

OPENINGS = {
    "fifty": tuple(start.format(name) for start in _BEGINNINGS for name in _NAMES),
    "long": (
        "Once upon a time, there was a little girl named Lily.",
        "One day, a boy named Tim went to the park with his mom.",
        "Once there was a big dog who liked to play with a ball.",
        "Lucy and her brother Tom found a shiny red box in the garden.",
        "The little bird was sad because it could not fly.",
    ),
    "short": (  # stories that repeat themselves more
        "Tom and Sam are friends.",
        "The sun was bright.",
        "Mia had a red ball.",
        "Ben saw a big truck.",
        "A little fish lived in the sea.",
    ),
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("none", {}),
    "prompt_lookup": ("prompt_lookup", {}),
    "lookahead 3,3,3": ("lookahead", {"window": 3, "ngram": 3, "guesses": 3}),
    "lookahead 7,5,7": ("lookahead", {"window": 7, "ngram": 5, "guesses": 7}),
    "lookahead 15,5,15": ("lookahead", {"window": 15, "ngram": 5, "guesses": 15}),
    "lookahead 7,5,7 plain pool": (
        "lookahead",
        {"window": 7, "ngram": 5, "guesses": 7, "extend_guesses": False, "harvest": False},
    ),
    "suffix": ("suffix", {}),
    "jacobi": ("jacobi", {}),
    "recycling, 16 nodes": ("recycling", {"nodes": 16, "top_k": 4}),
    "recycling": ("recycling", {}),
    "draft_model, first two layers": ("draft_model", {"num_draft_tokens": 3}),
    "draft_model, the same, top 3": ("draft_model", {"num_draft_tokens": 3, "top_k": 3}),
}


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: Path
    """Folder of the story model."""
    openings: Literal["long", "short", "fifty"] = "long"
    """Which openings."""
    tokens: int = 120
    """New tokens a story."""
    repeats: int = 8
    """Timed repeats of every arm."""


class BonusCounter:
    """Counts tokens that the target added after a fully accepted path."""

    def __init__(self) -> None:
        self.bonus = 0

    def __call__(self, record: RoundRecord) -> None:
        """Looks whether the last accepted node was a leaf of a real tree."""
        for tree, path, tokens in zip(record.trees or [], record.paths, record.tokens, strict=True):
            is_leaf = bool(path) and path[-1] not in tree.parents
            self.bonus += is_leaf and len(tokens) > len(path)


def main() -> None:
    """Measures and prints the table last."""
    options = tyro.cli(Options, description=__doc__)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    prompts = [
        tokenizer(text, return_tensors="pt").input_ids for text in OPENINGS[options.openings]
    ]
    length = {"max_new_tokens": options.tokens, "do_sample": False}
    forwards = Counter[str]()
    model.register_forward_pre_hook(lambda *_: forwards.update(["all"]))
    plain: Callable[..., torch.Tensor] = type(model).generate
    texts = [plain(model, ids, **length) for ids in prompts]
    draft = first_layers(model, 2)
    new_tokens = sum(t.shape[1] - p.shape[1] for t, p in zip(texts, prompts, strict=True))

    def speculative(name: str, **extra: Any) -> Callable[[int], torch.Tensor]:
        method, chosen = METHODS[name]
        options = {**chosen, "draft": draft} if method == "draft_model" else chosen
        config = specdec.SpecConfig(method=method, options=options, **extra)
        return lambda unit: model.generate(prompts[unit], specdec=config, **length)

    specdec.augment(model, "none")
    arms: dict[str, Callable[[int], torch.Tensor]] = {
        "hf generate": lambda unit: plain(model, prompts[unit], **length),
        "hf prompt lookup": lambda unit: plain(
            model, prompts[unit], prompt_lookup_num_tokens=10, **length
        ),
        **{name: speculative(name) for name in METHODS},
    }
    rows = []
    for name, arm in arms.items():
        forwards.clear()
        same = sum(torch.equal(arm(unit), texts[unit]) for unit in range(len(prompts)))
        sources, bonus = Counter[str](), BonusCounter()
        per_forward = new_tokens / forwards["all"]
        if name in METHODS:
            watched = speculative(name, on_round=bonus)
            for unit in range(len(prompts)):
                watched(unit)
                sources.update(specdec.last_stats(model).tokens_by_source)
        rows.append((name, same, per_forward, sources, bonus.bonus))
    seconds = time_arms(arms, len(prompts), options.repeats, clock=time.process_time)
    print(f"{len(prompts)} openings, {new_tokens} tokens, fp32, one thread, CPU time\n")
    print("| method | text identical | tokens per forward | time over plain | tokens won by |")
    print("|---|---|---|---|---|")
    for name, same, per_forward, sources, bonus in rows:
        won = ", ".join(f"{source} {count}" for source, count in sources.most_common())
        won += f" (bonus {bonus})" if bonus else ""
        gain = ratio(seconds["hf generate"], seconds[name])
        print(f"| {name} | {same}/{len(prompts)} | {per_forward:.2f} | {gain}x | {won} |")


if __name__ == "__main__":
    main()
