"""A tiny target, a tiny head and made-up examples for the tests of the trainer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.heads.eagle3.config import Eagle3Config, default_aux_layers
from specdec.heads.eagle3.draft_vocabulary import DraftVocabulary
from specdec.heads.eagle3.head import Eagle3Head
from specdec_training.data.batches import RowSampler, Sizes
from specdec_training.features.online import OnlineFeatures
from specdec_training.run.evaluate import AcceptanceMeter
from specdec_training.run.options import TrainOptions
from specdec_training.run.trainer import RunParts, RunResult, Trainer

VOCAB, DRAFT = 48, 32
TIMING = ("seconds", "tokens_per_second", "memory_gb")


@dataclass(frozen=True)
class Example:
    token_ids: list[int]
    loss_mask: list[bool]


@dataclass
class Saved:
    """Records calls of `save_head`."""

    calls: list[Any] = field(default_factory=list)

    def __call__(self, found: Any) -> None:
        self.calls.append(found)


def make_target(hidden: int = 32, layers: int = 3, spread: float = 0.3) -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=hidden, intermediate_size=2 * hidden,
            num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=256, initializer_range=spread, tie_word_embeddings=False,
            bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )
    ).eval()  # fmt: skip


def make_head(target: LlamaForCausalLM, draft: int = DRAFT, seed: int = 2) -> Eagle3Head:
    c = target.config
    torch.manual_seed(seed)
    head = Eagle3Head(
        Eagle3Config(
            c.hidden_size, c.intermediate_size, 4, 2, c.hidden_size // 4, VOCAB, draft,
            c.hidden_size, default_aux_layers(c.num_hidden_layers),
        )
    )  # fmt: skip
    if draft < VOCAB:
        ids = torch.arange(VOCAB)[torch.arange(VOCAB) % 3 != 2][:draft]
        head.set_vocabulary(DraftVocabulary(ids, VOCAB))
    head.attach(target.get_input_embeddings().weight)
    return head


def make_examples(count: int = 24, longest: int = 40, seed: int = 3) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    found = []
    for _ in range(count):
        length, prompt = draw(6, longest), draw(0, 5)
        ids = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        found.append(Example(ids, [at >= prompt for at in range(length)]))
    return found


def make_parts(
    folder: Path,
    examples: Sequence[Example] | None = None,
    max_length: int = 48,
    meter: AcceptanceMeter | None = None,
    head: Eagle3Head | None = None,
    target: LlamaForCausalLM | None = None,
) -> RunParts:
    target = target or make_target()
    head = head or make_head(target)
    examples = make_examples() if examples is None else examples
    folder.mkdir(parents=True, exist_ok=True)
    return RunParts(
        head=head,
        source=OnlineFeatures(target, head.config.aux_output_layers),
        examples=examples,
        sampler=RowSampler(Sizes.of(examples, max_length), max_length, 0),
        max_length=max_length,
        meter=meter,
        accelerator=Accelerator(cpu=True),
        folder=folder,
        save_head=Saved(),
        facts={"data": "made up"},
    )


def make_options(folder: Path, **changes: Any) -> TrainOptions:
    settings: dict[str, Any] = {
        "data": folder, "output": folder, "steps": 40, "ttt_steps": 3, "max_length": 48,
        "batch_rows": 2, "lr": 1e-3, "eval_every": 0, "save_every": 17,
    }  # fmt: skip
    return TrainOptions(**(settings | changes))


def train(folder: Path, parts: RunParts | None = None, **changes: Any) -> RunResult:
    return Trainer(parts or make_parts(folder), make_options(folder, **changes)).run()


def log_lines(folder: Path) -> list[dict[str, Any]]:
    """The step log without what the clock says."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
