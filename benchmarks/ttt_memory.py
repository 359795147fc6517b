"""Peak memory and time of a training step's attention: merged diagonals against dense masks.

One forward and backward of an EAGLE-3 head of width 256 over one row, in a process of its own for
each form, fp32, one thread. The dense form is the definition that the tests compare with. Run:

    python benchmarks/ttt_memory.py --length 2048 --steps 7
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch
import tyro

from specdec.heads.eagle3 import unrolled
from specdec.heads.eagle3.config import Eagle3Config
from specdec.heads.eagle3.head import Eagle3Head
from specdec.heads.eagle3.ttt_attention import dense_ttt_attention


@dataclass(frozen=True)
class Options:
    """What to measure."""

    length: int = 2048
    """Tokens of the row."""
    steps: int = 7
    """TTT steps."""
    form: Literal["both", "merged", "dense", "idle", "recompute"] = "both"
    """Which; idle is the process without a step, which the others are compared with."""


def measure(options: Options) -> None:
    """Prints seconds and peak MiB of one form, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Eagle3Config(
        hidden_size=256, intermediate_size=768, num_attention_heads=8, num_key_value_heads=4,
        head_dim=32, vocab_size=4096, draft_vocab_size=2048, target_hidden_size=256,
        aux_output_layers=(1, 3, 4),
    )  # fmt: skip
    head = Eagle3Head(config, own_embeddings=True)
    if options.form == "dense":
        unrolled.ttt_attention = dense_ttt_attention  # type: ignore[attr-defined]
    tokens = torch.randint(4096, (1, options.length))
    aux = torch.randn(1, options.length, config.feature_width)
    start = time.process_time()
    if options.form != "idle":
        again = options.form == "recompute"
        states = head.unroll(tokens, head.features(aux), options.steps, recompute=again)
        torch.stack([state.square().mean() for state in states]).sum().backward()
    seconds = time.process_time() - start
    print(f"{seconds:.2f} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}")


def main() -> None:
    """Runs every form in a child and prints the table."""
    options = tyro.cli(Options, description=__doc__)
    if options.form != "both":
        measure(options)
        return
    sizes = ["--length", str(options.length), "--steps", str(options.steps)]
    found = {}
    for form in ("idle", "merged", "recompute", "dense"):
        command = [sys.executable, __file__, "--form", form, *sizes]
        said = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
        seconds, peak = map(float, said.stdout.split()[-2:])
        found[form] = seconds, peak
    print(f"{options.length} tokens, {options.steps} TTT steps, fp32, one thread\n")
    print("| attention | CPU seconds | peak MiB above the idle process |")
    print("|---|---|---|")
    for form, (seconds, peak) in found.items():
        if form != "idle":
            print(f"| {form} | {seconds:.2f} | {peak - found['idle'][1]:.0f} |")


if __name__ == "__main__":
    main()
