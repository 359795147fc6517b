"""What a draft head of the measured acceptance would win on a larger target.

The bundled target is the hardest case for a draft head on a CPU: one pass of its head costs a tenth
of its own forward. Here the target is a Llama of about 60 M random weights, and the head has its
width: every pass of both is real, and so is every verification. Only what is accepted is not: after
the head has drafted, an oracle replaces its tokens by as many of the recorded continuation as a
draw from the histogram says, which was measured on the bundled target just before. The texts are
compared with plain's. Run:

    python benchmarks/larger_target.py --dtype bfloat16
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import specdec
from specdec import SpecConfig
from specdec.contracts import BatchState
from specdec.drafters.head import Eagle3, Eagle3DraftConfig
from specdec.heads.eagle3.config import Eagle3Config
from specdec.heads.eagle3.head import Eagle3Head
from specdec.round.tree import TreeBatch
from specdec_bench import RunOptions, run
from specdec_bench.measure.arms import parse_arm
from specdec_bench.paired import ratio, time_arms

_SHAPE = {
    "hidden_size": 640,
    "intermediate_size": 1728,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "head_dim": 64,
    "vocab_size": 4096,
}
_LAYERS, _PROMPT = 12, 64
_PEAKED = 50.0  # scale of the embeddings
_ORACLE = "eagle3 with an oracle"


@dataclass(frozen=True)
class Options:
    """What to measure."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Data type of both targets."""
    arms: tuple[str, ...] = (
        "eagle3:depth=3,top_k=1",
        "eagle3:depth=5,top_k=1",
        "eagle3:depth=4,top_k=3,nodes=8",
        "eagle3:depth=5,top_k=4,nodes=16",
    )
    """Sizes of the drafts."""
    tasks: tuple[str, ...] = ("smoke",)
    """Prompts for the bundled target, as of `specdec bench run`."""
    prompts: int = 6
    """Prompts for the larger target."""
    tokens: int = 96
    """New tokens a prompt."""
    repeats: int = 4
    """Timed repeats of every arm."""


class Oracle(Eagle3):
    """Drafts with the head, then writes the recorded text over it, as deep as a draw says."""

    def __init__(
        self, config: Eagle3DraftConfig, histogram: Counter[int], text: list[int], seed: int
    ) -> None:
        super().__init__(config)
        self._text, self._random = text, random.Random(seed)
        self._sizes, self._weights = zip(*sorted(histogram.items()), strict=True)

    def propose(self, state: BatchState, budget: int) -> TreeBatch:
        """The head's tree in size and cost; its first path holds what the draw lets be accepted."""
        trees = super().propose(state, budget)
        accepted = self._random.choices(self._sizes, self._weights)[0] - 1
        done = state.emitted(0)
        path = self._text[done : done + min(accepted, trees.size - 1)]
        depth = len(path)
        tokens, parents = trees.tokens.clone(), torch.zeros_like(trees.parents)
        parents[0, 0] = -1
        # What hangs below the root beside the path is never the recorded token.
        wrong = (self._text[done] + 1) % state.vocab_size if done < len(self._text) else 0
        tokens[0, 1:] = wrong
        tokens[0, 1 : depth + 1] = torch.tensor(path)
        parents[0, 1 : depth + 1] = torch.arange(depth, dtype=torch.int32)
        if depth and done + depth < len(self._text):  # nor does the path go on by chance
            tokens[0, depth + 1 :] = wrong
        return replace(trees, tokens=tokens, parents=parents, max_depth=max(depth, 1))


def measured(options: Options) -> dict[str, Counter[int]]:
    """Tokens of a round -> how often, of the bundled head's arms on the bundled target."""
    found: dict[str, Counter[int]] = {name: Counter() for name in options.arms}
    with tempfile.TemporaryDirectory() as folder:
        settings = RunOptions(
            arms=options.arms,
            tasks=options.tasks,
            dtypes=(options.dtype,),
            max_new_tokens=options.tokens,
            pairs=1,
            output=Path(folder) / "run.jsonl",
        )
        for (_, _, arm), record in run(settings).passes.items():
            if arm in found:
                found[arm].update({int(size): n for size, n in record.histogram.items()})
    return found


def tau(histogram: Counter[int]) -> float:
    """Tokens per round."""
    return sum(size * count for size, count in histogram.items()) / sum(histogram.values())


@torch.no_grad()
def larger(dtype: torch.dtype) -> tuple[LlamaForCausalLM, Eagle3Head]:
    """Target and head with random weights.

    Embeddings outweigh what the layers add, and the output matrix holds them in another order: so
    each token has a successor by a wide margin, and rounding in half precision changes no text.
    """
    torch.manual_seed(0)
    config = LlamaConfig(**_SHAPE, num_hidden_layers=_LAYERS, tie_word_embeddings=False)
    target = LlamaForCausalLM(config)
    target.get_input_embeddings().weight.mul_(_PEAKED)
    successors = torch.randperm(config.vocab_size)
    target.lm_head.weight[successors] = target.get_input_embeddings().weight
    target = target.to(dtype).eval()
    target.generation_config.eos_token_id = None
    head = Eagle3Head(
        Eagle3Config(
            **_SHAPE,
            draft_vocab_size=_SHAPE["vocab_size"] // 2,
            target_hidden_size=_SHAPE["hidden_size"],
            aux_output_layers=(1, _LAYERS // 2 - 1, _LAYERS - 4),
        )
    )
    return target, head.to(dtype).eval()


def main() -> None:
    """Measures and prints the table last."""
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    found = measured(options)
    target, head = larger(getattr(torch, options.dtype))
    prompts = [torch.randint(_SHAPE["vocab_size"], (1, _PROMPT)) for _ in range(options.prompts)]
    limits = {"max_new_tokens": options.tokens, "do_sample": False, "pad_token_id": 0}
    plain = type(target).generate
    texts = [plain(target, ids, **limits) for ids in prompts]
    specdec.augment(target, "none")

    def arm(name: str) -> Callable[[int], Tensor]:
        sizes = parse_arm(name).options

        def answer(unit: int) -> Tensor:
            def make(config: Eagle3DraftConfig) -> Oracle:
                text = texts[unit][0, _PROMPT:].tolist()
                return Oracle(config, found[name], text, unit)

            make.Config = Eagle3DraftConfig  # type: ignore[attr-defined]
            specdec.register_drafter(_ORACLE, make)
            settings = SpecConfig(_ORACLE, {**sizes, "draft": head})
            text: Tensor = target.generate(prompts[unit], specdec=settings, **limits)
            return text

        return answer

    arms: dict[str, Callable[[int], Any]] = {
        "hf generate": lambda unit: plain(target, prompts[unit], **limits),
        "none": lambda unit: target.generate(prompts[unit], **limits),
        **{name: arm(name) for name in options.arms},
    }
    same: Counter[str] = Counter()
    here: dict[str, Counter[int]] = {name: Counter() for name in options.arms}
    for name in options.arms:
        for unit, text in enumerate(texts):
            same[name] += torch.equal(arms[name](unit), text)
            here[name].update(specdec.last_stats(target).histogram)
    seconds = time_arms(arms, len(prompts), options.repeats, time.perf_counter)
    size = sum(p.numel() for p in target.parameters()) / 1e6
    print(
        f"\n{size:.1f} M random weights, {options.dtype}, one thread, greedy, oracle acceptance\n"
    )
    print("| method | text identical | tokens per round, bundled target | here | over plain |")
    print("|---|---|---|---|---|")
    print(f"| none | | | | {ratio(seconds['hf generate'], seconds['none'])} |")
    for name in options.arms:
        gain = ratio(seconds["hf generate"], seconds[name])
        taus = f"{tau(found[name]):.2f} | {tau(here[name]):.2f}"
        print(f"| {name} | {same[name]}/{len(prompts)} | {taus} | {gain} |")


if __name__ == "__main__":
    main()
