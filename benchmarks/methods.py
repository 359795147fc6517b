"""Every method on the bundled target: speed-up over the loop without speculation.

Greedy, one thread, arms interleaved prompt by prompt in one process. Each text is cut where plain
decoding falls into its first repetition loop, and the share of looping text is printed. Drafters
start fresh with every call; the store arm sees the texts of the other prompts only. Run:

    python benchmarks/methods.py --dtype bfloat16
    python benchmarks/methods.py --prompts-file humaneval.jsonl
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

import specdec
from loop_cost import code_prompts
from specdec import SpecConfig, tuning
from specdec.demo import head_path, load_target, load_tokenizer
from specdec.sources.suffix_store import SuffixStore
from specdec.tokenizers import tokenizer_fingerprint
from specdec_bench.drafts import first_layers
from specdec_bench.paired import ratio, time_arms
from specdec_bench.text import loop_start

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("none", {}),
    "none again": ("none", {}),
    "prompt_lookup": ("prompt_lookup", {}),
    "suffix": ("suffix", {}),
    "suffix + store": ("suffix", {}),
    "lookahead W1 N3 G1": ("lookahead", {"window": 1, "ngram": 3, "guesses": 1}),
    "lookahead W2 N3 G2": ("lookahead", {"window": 2, "ngram": 3, "guesses": 2}),
    "lookahead W2 N4 G2": ("lookahead", {"window": 2, "ngram": 4, "guesses": 2}),
    "lookahead W7 N5 G7": ("lookahead", {"window": 7, "ngram": 5, "guesses": 7}),
    "jacobi": ("jacobi", {}),
    "recycling 8": ("recycling", {"nodes": 8, "top_k": 4}),
    "recycling 16": ("recycling", {"nodes": 16, "top_k": 4}),
    "recycling 80": ("recycling", {}),
    "draft_model, first layer": ("draft_model", {"num_draft_tokens": 3}),
    "eagle3 chain 3": ("eagle3", {"depth": 3, "top_k": 1}),
    "eagle3 chain 5": ("eagle3", {"depth": 5, "top_k": 1}),
    "eagle3 tree 8": ("eagle3", {"depth": 4, "top_k": 3, "nodes": 8}),
    "eagle3 tree 16": ("eagle3", {"depth": 5, "top_k": 4, "nodes": 16}),
    "eagle3 tree 48": ("eagle3", {}),
}
_SHORTEST_CUT = 16  # prompts whose text loops before are left out


@dataclass(frozen=True)
class Options:
    """What to measure."""

    prompts: int = 20
    """Number of prompts."""
    prompts_file: Path | None = None
    """JSONL with a field `prompt`; without it, pieces of modules that the target never saw."""
    tokens: int = 160
    """New tokens a prompt, at most."""
    repeats: int = 4
    """Timed repeats of every arm."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the target."""
    only: tuple[str, ...] = ()
    """Names of arms to run, besides both `none`; all without it."""
    head: Path | None = None
    """Draft head of the eagle3 arms; the bundled one without it."""


def read_prompts(options: Options) -> list[Tensor]:
    """[1, S] ids of the prompts."""
    if options.prompts_file is None:
        return code_prompts(options.prompts)
    tokenizer = load_tokenizer()
    lines = options.prompts_file.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["prompt"] for line in lines if line.strip()]
    texts = texts[:: max(1, len(texts) // options.prompts)][: options.prompts]
    return [tokenizer(text, return_tensors="pt").input_ids[:, :512] for text in texts]


@dataclass
class Units:
    """Prompts, with plain's texts cut at the first loop.

    Attributes:
        prompts: [1, S] ids.
        texts: [1, S + cut] ids.
        cuts: New tokens of each.
        looping: Share of the generated text that was cut off.
    """

    prompts: list[Tensor]
    texts: list[Tensor]
    cuts: list[int]
    looping: float

    @classmethod
    def of(cls, model: Any, prompts: list[Tensor], tokens: int) -> Units:
        """Generates plainly and cuts; prompts that loop at once are left out."""
        texts = [type(model).generate(model, ids, **limits(tokens)) for ids in prompts]
        cuts = [
            loop_start(text[0, ids.shape[1] :].tolist()) or tokens
            for text, ids in zip(texts, prompts, strict=True)
        ]
        kept = [unit for unit, cut in enumerate(cuts) if cut >= _SHORTEST_CUT]
        return cls(
            [prompts[unit] for unit in kept],
            [texts[unit][:, : prompts[unit].shape[1] + cuts[unit]] for unit in kept],
            [cuts[unit] for unit in kept],
            1 - sum(cuts) / (len(cuts) * tokens),
        )

    def fill_stores(self, folder: str, tokenizer: Any) -> None:
        """One store space for each prompt, holding the continuations of all the others."""
        fingerprint = tokenizer_fingerprint(tokenizer)
        for unit in range(len(self.texts)):
            store = SuffixStore(folder, f"unit{unit}", fingerprint)
            for other, (text, prompt) in enumerate(zip(self.texts, self.prompts, strict=True)):
                if other != unit:
                    store.add(text[0, prompt.shape[1] :].tolist())


def limits(new_tokens: int) -> dict[str, Any]:
    """Arguments of every call."""
    return {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}


def make_arms(
    model: Any, units: Units, folder: str, tokenizer: Any, options: Options
) -> dict[str, Callable[[int], Tensor]]:
    """Name -> function of a prompt's index."""
    plain, draft, head = type(model).generate, first_layers(model), options.head or head_path()

    def hugging_face(**extra: Any) -> Callable[[int], Tensor]:
        return lambda u: plain(model, units.prompts[u], **limits(units.cuts[u]), **extra)

    def ours(name: str) -> Callable[[int], Tensor]:
        method, chosen = METHODS[name]
        drafts: dict[str, Any] = {"draft_model": draft, "eagle3": str(head)}
        extra: dict[str, Any] = {"draft": drafts[method]} if method in drafts else {}
        if name.endswith("store"):
            extra = {"store": folder, "tokenizer": tokenizer, "store_update": False}

        def run(unit: int) -> Tensor:
            own = {"space": f"unit{unit}"} if "store" in extra else {}
            config = SpecConfig(method, {**chosen, **extra, **own})
            text: Tensor = model.generate(
                units.prompts[unit], specdec=config, **limits(units.cuts[unit])
            )
            return text

        return run

    only = options.only
    chosen = [name for name in METHODS if not only or name in ("none", "none again", *only)]
    return {
        "hf generate": hugging_face(),
        "hf prompt lookup": hugging_face(prompt_lookup_num_tokens=10),
        **{name: ours(name) for name in chosen},
    }


def main() -> None:
    """Measures and prints the table last."""
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    model, tokenizer = load_target(dtype=getattr(torch, options.dtype)), load_tokenizer()
    model.generation_config.eos_token_id = None
    units = Units.of(model, read_prompts(options), options.tokens)
    specdec.augment(model, "none")
    with tempfile.TemporaryDirectory() as folder:
        units.fill_stores(folder, tokenizer)
        arms = make_arms(model, units, folder, tokenizer, options)
        rows = {n: accepted(model, run, n in METHODS, units) for n, run in arms.items()}
        seconds = time_arms(arms, len(units.prompts), options.repeats, time.perf_counter)
    where = options.prompts_file.name if options.prompts_file else "held-out modules"
    print(
        f"\n{len(units.prompts)} prompts ({where}), {sum(units.cuts)} tokens, {options.dtype}, one "
        f"thread, greedy; {100 * units.looping:.0f} % of the text was looping and is cut off\n"
    )
    print("| method | text identical | tokens per round | speed-up over none (95 % interval) |")
    print("|---|---|---|---|")
    for name, row in rows.items():
        gain, tau = ratio(seconds["none"], seconds[name]), f"{row.tau:.2f}" if row.rounds else ""
        print(f"| {name} | {row.same}/{len(units.prompts)} | {tau} | {gain} |")
    print_costs(model, {name: row for name, row in rows.items() if name in METHODS}, seconds)


@dataclass
class Accepted:
    """One instrumented pass of an arm over all prompts.

    Attributes:
        same: Texts equal to plain's.
        histogram: Tokens of a round -> how often.
        stages: Seconds by stage.
        nodes: Nodes verified besides the roots.
    """

    same: int = 0
    histogram: Counter[int] = field(default_factory=Counter)
    stages: Counter[str] = field(default_factory=Counter)
    nodes: int = 0

    @property
    def rounds(self) -> int:
        """Target forwards after the prefill."""
        return sum(self.histogram.values())

    @property
    def tau(self) -> float:
        """Tokens a round."""
        return sum(size * count for size, count in self.histogram.items()) / self.rounds

    def stage(self, *names: str) -> float:
        """Milliseconds a round."""
        return 1000 * sum(self.stages[name] for name in names) / self.rounds


def accepted(model: Any, run: Callable[[int], Tensor], ours: bool, units: Units) -> Accepted:
    """What one pass of an arm accepted, and what its rounds cost."""
    found = Accepted()
    for unit, text in enumerate(units.texts):
        found.same += torch.equal(run(unit), text)
        if ours:
            stats = specdec.last_stats(model)
            found.histogram.update(stats.histogram)
            found.stages.update(stats.seconds)
            found.nodes += stats.drafted_nodes
    return found


def print_costs(
    model: Any, rows: dict[str, Accepted], seconds: dict[str, list[list[float]]]
) -> None:
    """The cost of a round, and the speed-up that it predicts with the measured cost of a forward.

    Predicted: acceptance length x the time of a round of `none`, over the arm's drafting and
    bookkeeping plus the forward of `none` times what one over its nodes costs relative to one.
    """
    curve, none = tuning.measure_cost(model, 4.0), rows["none"]
    rest = ("verify", "commit", "observe")
    whole = none.stage("draft", "forward", *rest)
    print("\n| method | rounds by tokens 1, 2, 3, ... | nodes | draft ms | forward ms | rest ms "
          "| predicted | measured |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        nodes = row.nodes / row.rounds
        forward = none.stage("forward") * curve.ratio(max(round(nodes) + 1, 1))
        predicted = row.tau * whole / (row.stage("draft", *rest) + forward)
        counts = ", ".join(str(row.histogram[n]) for n in range(1, max(row.histogram) + 1))
        costs = f"{row.stage('draft'):.2f} | {row.stage('forward'):.2f} | {row.stage(*rest):.2f}"
        measured = ratio(seconds["none"], seconds[name]).value
        print(f"| {name} | {counts} | {nodes:.1f} | {costs} | {predicted:.2f} | {measured:.2f} |")


if __name__ == "__main__":
    main()
