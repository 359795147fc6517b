"""The subcommand `specdec bench replay`."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from specdec.artifacts.atomic_files import make_folder, replace_file
from specdec.artifacts.terminal import columns, say
from specdec.errors import ConfigError
from specdec.registry import methods
from specdec_bench.arm_names import ArmSpec
from specdec_bench.replay.encoding import Encoder, encoder_of
from specdec_bench.replay.methods import parse_methods
from specdec_bench.replay.options import ReplayOptions, check_replay_options
from specdec_bench.replay.replay import Encoded, Figures, Replayed, encode, figures, replay
from specdec_bench.replay.traces import Reading, load_prompts, read_answers, read_counters
from specdec_bench.summary.acceptance import Counts
from specdec_bench.summary.intervals import mean_ratio_of_counts
from specdec_bench.summary.speculation_profile import Measured, draft_length, write_profile

SCHEMA = 1
_POSITIONS = 4  # rates shown in the table


@dataclass(frozen=True)
class _File:
    """One file with everything that was replayed from it."""

    path: Path
    answers: Sequence[Encoded]
    replayed: dict[str, list[Replayed]]


def run_replay(options: ReplayOptions) -> int:
    """Runs `specdec bench replay`; the exit code.

    Raises:
        SpecdecError: An option, a file or a method is not what it should be.
    """
    check_replay_options(options)
    prompts = None if options.prompts is None else load_prompts(options.prompts)
    reading = Reading(
        options.prompt_field, options.answer_field, prompts, options.turn, options.limit
    )
    if options.counters:
        return _show_counters(options, reading)
    wanted = parse_methods(options.methods)
    answers = {path: read_answers(path, reading) for path in options.files}
    encoder = encoder_of(str(options.tokenizer), options.chat_template)
    files = []
    for path, found in answers.items():
        encoded = encode(found, encoder, options.keep_loops)
        if all(len(one.tokens) < 2 for one in encoded):
            raise ConfigError(f"{path} holds no answer of two tokens or more")
        total, quiet = len(encoded) * len(wanted), not sys.stderr.isatty()
        with tqdm(total=total, desc=path.name, disable=quiet) as bar:
            replayed = {
                one.name: replay(encoded, one, encoder, options.chains, bar.update)
                for one in wanted
            }
        files.append(_File(path, encoded, replayed))
        _show(files[-1], encoder)
    if options.output is not None:
        _write_lines(options.output, [_header(options, wanted, encoder), *_answer_lines(files)])
        say(f"\nHistograms: {options.output}")
    if options.profile is not None:
        _write_profile(options, wanted[0], files)
        say(f"\nProfile of {wanted[0].name}: {options.profile}")
    return 0


def _write_profile(options: ReplayOptions, first: ArmSpec, files: Sequence[_File]) -> None:
    by_category: dict[str, list[Counts]] = {}
    for file in files:
        for one in file.replayed[first.name]:
            by_category.setdefault(one.answer.category, []).append(one.counts)
    length = draft_length(methods.configure(first.method, dict(first.options)))
    conditions = {
        "dataset": ", ".join(file.path.name for file in files),
        "tokenizer": options.tokenizer,
        "chains": options.chains,
        "arm": first.name,
        "replayed": True,
    }
    measured = Measured(first.method, length, conditions=conditions)
    write_profile(Path(str(options.profile)), measured, by_category)


def _show(file: _File, encoder: Encoder) -> None:
    """The tables of one file."""
    tokens = sum(len(one.tokens) for one in file.answers)
    looping = sum(one.looping for one in file.answers)
    prompts = len({one.answer.cluster for one in file.answers})
    short = sum(len(one.tokens) < 2 for one in file.answers)
    counted = f"{len(file.answers):,} answers to {prompts:,} prompts, {tokens:,} tokens"
    say(f"\n{file.path.name}: {counted}")
    say(f"tokenizer: {encoder.name}")
    if looping:
        share = 100 * looping / (tokens + looping)
        say(f"cut off where answers begin to repeat themselves: {looping:,} tokens ({share:.1f} %)")
    if short:
        say(f"left out, for they have no round: {short:,} answers of a single token")
    rows = [_head()]
    rows += [_row(name, figures(found)) for name, found in file.replayed.items()]
    say("\n" + "\n".join(columns(rows)))
    chain = all(one.counts.chain for found in file.replayed.values() for one in found)
    word = "drafts" if chain else "drafts (of a tree: levels)"
    say(f"Intervals are 95 % over prompts. >=N: share of the steps that accepted N {word} or more.")
    _show_categories(file)


def _head() -> list[str]:
    rates = [f">={n}" for n in range(1, _POSITIONS + 1)]
    return ["method", "tokens a step", "a request", "drafted", "accepted", "wasted", *rates]


def _row(name: str, found: Figures) -> list[str]:
    acceptance = found.acceptance
    rate, wasted = acceptance.acceptance_rate, acceptance.wasted_per_round
    marginal = [*acceptance.marginal, *[0.0] * _POSITIONS][:_POSITIONS]
    return [
        name,
        str(found.tau),
        f"{acceptance.tau_per_request:.3f}",
        f"{(acceptance.drafted or 0) / acceptance.rounds:.2f}",
        "-" if rate is None else f"{100 * rate:.1f} %",
        "-" if wasted is None else f"{wasted:.2f}",
        *(f"{share:.3f}" for share in marginal),
    ]


def _show_categories(file: _File) -> None:
    categories = list(dict.fromkeys(one.answer.category for one in file.answers))
    if len(categories) < 2:
        return
    rows = [["category", "answers", *file.replayed]]
    for name in categories:
        kept = [
            [one for one in found if one.answer.category == name]
            for found in file.replayed.values()
        ]
        if kept[0]:
            rows.append([name, f"{len(kept[0]):,}", *(str(figures(found).tau) for found in kept)])
    say("\n" + "\n".join(columns(rows)))


def _show_counters(options: ReplayOptions, reading: Reading) -> int:
    rows = [["file", "answers", "tokens", "steps", "tokens a step", "a request"]]
    lines: list[dict[str, Any]] = []
    for path in options.files:
        counted = read_counters(path, reading)
        tokens, steps = [one.tokens for one in counted], [one.steps for one in counted]
        own = [one.tokens / one.steps for one in counted]
        clusters, strata = [one.cluster for one in counted], [one.category for one in counted]
        tau = str(mean_ratio_of_counts(tokens, steps, clusters, strata))
        counts = [f"{count:,}" for count in (len(counted), sum(tokens), sum(steps))]
        rows.append([path.name, *counts, tau, f"{sum(own) / len(own):.3f}"])
        lines += [
            {
                "kind": "counters", "file": path.name, "id": one.id, "category": one.category,
                "tokens": one.tokens, "steps": one.steps,
            }
            for one in counted
        ]  # fmt: skip
    say("\n".join(columns(rows)))
    say("As the program that wrote the answers counted, with the overshoot of its last step.")
    if options.output is not None:
        _write_lines(options.output, [_header(options, [], None), *lines])
    return 0


def _header(
    options: ReplayOptions, wanted: Sequence[ArmSpec], encoder: Encoder | None
) -> dict[str, Any]:
    """What was replayed, and how; the files by their content."""
    own = ("method", "options", "budget")
    told = ("name", "size", "fingerprint")
    kept = ("chains", "chat_template", "keep_loops", "turn", "limit")
    return {
        "kind": "replay",
        "schema": SCHEMA,
        "methods": {one.name: {name: getattr(one, name) for name in own} for one in wanted},
        "tokenizer": encoder and {name: getattr(encoder, name) for name in told},
        "files": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in options.files
        },
        **{name: getattr(options, name) for name in kept},
    }


def _answer_lines(files: Sequence[_File]) -> list[dict[str, Any]]:
    """One line for every answer and method."""
    return [
        {
            "kind": "answer", "file": file.path.name, "id": one.answer.id,
            "cluster": one.answer.cluster, "category": one.answer.category, "method": name,
            "drafted": one.counts.drafted, "chain": one.counts.chain,
            "histogram": {str(n): t for n, t in sorted(one.counts.histogram.items())},
        }
        for file in files
        for name, found in file.replayed.items()
        for one in found
    ]  # fmt: skip


def _write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    ended = [*lines, {"kind": "end", "records": len(lines)}]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in ended)
    try:
        make_folder(path.absolute().parent)
        replace_file(path, text.encode("utf-8"))
    except OSError as problem:
        raise ConfigError(f"cannot write {path}: {problem.strerror or problem}") from problem
