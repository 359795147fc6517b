"""Sweeps every causal LM class of the installed transformers and writes docs/models.md.

    python tests/sweep/run.py --write docs/models.md
    python tests/sweep/run.py --only llama mamba2 --cells cells.jsonl

Every class runs in a process of its own, because one may crash hard or never end.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from tqdm import tqdm

from sweep import page, tiny
from sweep.cells import Report, register_own_drafters, sweep

_PRELOADED = ["torch", "transformers", "sweep.cells"]


def work(model_type: str, sender: Connection) -> None:
    """Sweeps one class; runs in its own process."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # some classes print
        os.dup2(quiet, stream)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.CRITICAL)
    register_own_drafters()
    start = time.perf_counter()
    report = sweep(model_type)
    report.seconds = round(time.perf_counter() - start, 1)
    sender.send(report.to_json())
    sender.close()


def reports(names: Sequence[str], jobs: int, timeout: float) -> Iterator[Report]:
    """A report of every class, in the order in which they end."""
    context = get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    waiting = list(reversed(names))
    running: dict[Connection, tuple[str, BaseProcess, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(name, sender), daemon=True)
            process.start()
            sender.close()
            running[receiver] = (name, process, time.monotonic())
        ready = wait(list(running), timeout=1)
        late = [c for c, (_, _, start) in running.items() if time.monotonic() - start > timeout]
        for receiver in {*ready, *late}:
            name, process, _ = running.pop(receiver)  # type: ignore[index]
            yield _end(name, process, receiver, receiver in ready, timeout)  # type: ignore[arg-type]


def _end(
    name: str, process: BaseProcess, receiver: Connection, ready: bool, timeout: float
) -> Report:
    """The report that a process sent, or one that says why there is none."""
    try:
        if ready:
            return Report.from_json(receiver.recv())
        why = f"did not end within {timeout:.0f} s"
    except EOFError:
        process.join()
        why = f"its process died with exit code {process.exitcode}"
    finally:
        receiver.close()
        process.kill()
        process.join()
    report = Report(name, tiny.class_name(name))
    report.failed = why
    return report


def _everything() -> list[str]:
    return [*tiny.names(), *tiny.VARIANTS]


def _known_names(values: Sequence[str]) -> list[str]:
    unknown = [value for value in values if value not in _everything()]
    if unknown:
        raise SystemExit(f"{unknown[0]!r} is no model type with a causal LM class")
    return list(values)


def main() -> int:
    """Runs the sweep; the exit code is 1 when a cell differs or fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="model types, variants")
    parser.add_argument("--jobs", type=int, default=2, help="classes at a time (default: 2)")
    parser.add_argument("--timeout", type=float, default=900, help="seconds a class (default: 900)")
    parser.add_argument("--cells", type=Path, help="JSONL of raw cells, a line a class")
    parser.add_argument("--read", type=Path, nargs="+", help="take reports from such JSONL files")
    parser.add_argument("--write", type=Path, help="the page to write, docs/models.md")
    options = parser.parse_args()
    found: dict[str, Report] = {}
    for path in options.read or []:
        for line in path.read_text(encoding="utf-8").splitlines():
            report = Report.from_json(json.loads(line))
            found[report.model_type] = report
    names = _known_names(options.only or ([] if options.read else _everything()))
    out = None if options.cells is None else options.cells.open("w", encoding="utf-8")
    with tqdm(total=len(names), unit="class", disable=not names) as bar:
        for report in reports(names, options.jobs, options.timeout):
            found[report.model_type] = report
            bar.set_postfix_str(report.model_type)
            bar.update()
            if out is not None:
                out.write(json.dumps(report.to_json()) + "\n")
                out.flush()
            if page.wrong(report):
                bar.write(page.complaint(report), file=sys.stderr)
    ordered = [found[name] for name in _everything() if name in found]
    sys.stdout.write("\n".join(page.totals(ordered)) + "\n")
    if options.write is not None:
        options.write.write_text(page.render(ordered), encoding="utf-8")
    return int(any(map(page.wrong, ordered)))


if __name__ == "__main__":
    raise SystemExit(main())
