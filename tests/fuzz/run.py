"""Random calls of `generate`, each plain and speculatively; every difference is printed as Python.

python tests/fuzz/run.py --calls 3000 --jobs 2
python tests/fuzz/run.py --seed 0 --only 1234
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from tqdm import tqdm

from fuzz import calls, parts
from fuzz.calls import Result
from fuzz.draw import draw
from helpers.families import FAMILIES

EVERYTHING = ("demo", *FAMILIES)
KINDS = (
    *("demo", "llama", "gemma2", "gemma3", "gemma3n_kvshare", "gpt2", "gpt_oss", "llama4_text"),
    *("mistral_sw", "deepseek_v3", "opt", "qwen3_moe", "falcon_rope"),
    *("qwen3_5", "lfm2", "mamba2", "bloom", "mpt"),
)
"""A family of each kind: windows, chunks, sinks, experts, MLA, shared keys, positions, states."""


def _work(task: tuple[int, int, tuple[str, ...]]) -> Result:
    call = draw(*task)
    try:
        return calls.check(call)
    except Exception:  # noqa: BLE001 - one call must not end the others
        return Result(call, found=[f"the comparison failed: {traceback.format_exc(limit=-2)}"])


def _begin() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    parts.register()


def results(
    seed: int, numbers: Sequence[int], families: Sequence[str], jobs: int
) -> Iterator[Result]:
    """The results of a seed's calls, in the order in which they end."""
    tasks = [(seed, number, tuple(families)) for number in numbers]
    if jobs == 1:
        _begin()
        yield from map(_work, tasks)
        return
    with get_context("spawn").Pool(jobs, _begin) as pool:
        yield from pool.imap_unordered(_work, tasks, chunksize=8)


def main() -> int:
    """Runs the fuzz; the exit code is 1 when a call differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="what calls are drawn from")
    parser.add_argument("--calls", type=int, default=3000, help="how many (default: 3000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first (default: 0)")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="these calls alone")
    parser.add_argument("--families", nargs="+", choices=EVERYTHING, default=KINDS, metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--show", action="store_true", help="print every call, not only bad ones")
    options = parser.parse_args()
    numbers = options.only or range(options.first, options.first + options.calls)
    jobs = 1 if options.only else options.jobs
    modes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    wrong, start = 0, time.perf_counter()
    with tqdm(total=len(numbers), unit="call") as bar:
        for result in results(options.seed, numbers, options.families, jobs):
            modes.update(result.modes)
            reasons.update(result.reasons)
            wrong += bool(result.found)
            if result.found or options.show:
                found = "\n".join(f"# {text}" for text in result.found or ["nothing differs"])
                bar.write(f"{result.call.source()}\n{found}\n")
            bar.set_postfix_str(f"{wrong} differing", refresh=False)
            bar.update()
    for name, count in [*modes.most_common(), *reasons.most_common()]:
        print(f"{count:6} {name}")
    turns, seconds = sum(modes.values()), time.perf_counter() - start
    print(
        f"{len(numbers)} calls of {turns} turns, seed {options.seed}, transformers "
        f"{transformers.__version__}, {seconds:.0f} s: {wrong} differing"
    )
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
