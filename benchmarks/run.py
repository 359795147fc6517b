"""Measures speed-ups: the same as `specdec bench run`, from a checkout.

python benchmarks/run.py --tasks smoke
"""

from __future__ import annotations

import sys

from specdec.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(["bench", "run", *sys.argv[1:]]))
