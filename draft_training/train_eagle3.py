"""Trains an EAGLE-3 draft head: what `accelerate launch`, `torchrun` and `deepspeed` start.

The same as `specdec train`, which is enough for one process:

    accelerate launch --num_processes 4 draft_training/train_eagle3.py --target NAME --data DIR ...
"""

from __future__ import annotations

import sys

from specdec.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]]))
