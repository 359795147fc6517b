"""The attack: hostile input of every kind to every command, in forks of one loaded process.

    make attack                              # all of it
    make attack ARGS="--every 20"            # one in twenty
    make attack ARGS="--kind name --show"    # one kind, with every answer

An attack has failed when the command answers with one sentence that is expected of it (exit status
2), or does what it was asked to. Exit status: 0 when all attacks failed, else 1.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from attack import forks
from attack.forks import Outcome

_SECONDS = 30.0
_SHOWN = 12  # faults of one kind that are printed


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="make attack", description=__doc__.split("\n")[0])
    parser.add_argument("--every", type=int, default=1, help="only one attack in so many")
    parser.add_argument("--kind", action="append", default=[], help="only this kind; repeatable")
    parser.add_argument("--jobs", type=int, default=2, help="attacks made side by side")
    parser.add_argument("--show", action="store_true", help="print every answer")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="specdec-attack-"))
    try:
        forks.preload(root / "caches")
        from attack.world import build  # after the caches have a place of their own

        return _attack(root, build(root), options, begin)
    finally:
        _remove(root)


def _attack(root: Path, world: object, options: argparse.Namespace, begin: float) -> int:
    from attack.attacks import World, all_attacks
    from attack.judge import fault

    assert isinstance(world, World)
    attacks = [one for one in all_attacks(world) if not options.kind or one.kind in options.kind]
    attacks = attacks[:: options.every]
    codes: dict[str, Counter[str]] = defaultdict(Counter)
    faults: dict[str, list[str]] = defaultdict(list)

    def make(number: int) -> Outcome:
        one, folder = attacks[number], root / "runs" / str(number)
        folder.mkdir(parents=True)
        try:
            return forks.run(list(one.arguments), folder, streams=one.streams,
                             environment=one.environment, seconds=_SECONDS)  # fmt: skip
        finally:
            _remove(folder)

    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = tqdm(pool.map(make, range(len(attacks))), total=len(attacks), unit="attack",
                        file=sys.stderr, disable=not sys.stderr.isatty())  # fmt: skip
        for one, outcome in zip(attacks, outcomes, strict=True):
            found = fault(one, outcome)
            codes[one.kind]["ended" if outcome.code is None else str(outcome.code)] += 1
            words = f"specdec {shlex.join(one.arguments)}"[:300]
            if found is not None:
                faults[one.kind].append(f"{words}\n      {found}")
            if options.show:
                last = (outcome.err.strip().splitlines() or [""])[-1]
                print(f"{outcome.code} {outcome.seconds:.1f}s {words!a}\n      {ascii(last)[:500]}")
    _report(codes, faults, time.monotonic() - begin)
    return int(any(faults.values()))


def _report(codes: dict[str, Counter[str]], faults: dict[str, list[str]], seconds: float) -> None:
    for kind, found in faults.items():
        print(f"{kind}: {len(found)} got through")
        for words in found[:_SHOWN]:
            print(f"  {words.encode('utf-8', 'backslashreplace').decode()}")
    print(f"{'kind':16} {'attacks':>8} {'got through':>12}   exit codes")
    for kind, counted in codes.items():
        shown = ", ".join(f"{code}: {count}" for code, count in sorted(counted.items()))
        print(f"{kind:16} {sum(counted.values()):8} {len(faults[kind]):12}   {shown}")
    total = sum(sum(counted.values()) for counted in codes.values())
    print(f"{total} attacks, {sum(map(len, faults.values()))} got through, {seconds:.0f} s")


def _remove(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            os.chmod(path, 0o700)  # noqa: PTH101
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
