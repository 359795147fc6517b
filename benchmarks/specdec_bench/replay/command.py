"""The subcommand `specdec bench replay`."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from specdec.artifacts.atomic_files import make_folder, replace_file
from specdec.artifacts.terminal import columns, say
from specdec.errors import ConfigError
from specdec_bench.replay.methods import ReplayMethod, parse_methods
from specdec_bench.replay.options import ReplayOptions, check_replay_options
from specdec_bench.replay.profile import write_replay_profile
from specdec_bench.replay.replay import (
    Encoded,
    Figures,
    Replayed,
    by_category,
    counter_figures,
    encode,
    figures,
    replay,
)
from specdec_bench.replay.tokenizer import Encoder, existing, trained, training_texts
from specdec_bench.replay.traces import (
    Answer,
    Reading,
    load_prompts,
    read_answers,
    read_counters,
)

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
    methods = parse_methods(options.methods, options.ngram, options.draft)
    answers = {path: read_answers(path, reading) for path in options.files}
    encoder = _encoder(options, answers)
    files = []
    for path, found in answers.items():
        encoded = encode(found, encoder, options.keep_loops)
        if all(len(one.tokens) < 2 for one in encoded):
            raise ConfigError(f"{path} holds no answer of two tokens or more")
        with tqdm(total=len(encoded) * len(methods), desc=path.name, disable=_quiet()) as bar:
            replayed = {
                one.name: replay(encoded, one, encoder, options.chains, lambda: _tick(bar))
                for one in methods
            }
        files.append(_File(path, encoded, replayed))
        _show(files[-1], encoder)
    if options.output is not None:
        lines = [_header(options, methods, encoder), *_answer_lines(files)]
        _write_lines(options.output, lines)
        say(f"\nHistograms: {options.output}")
    if options.profile is not None:
        write_replay_profile(
            options.profile,
            methods[0],
            [f.replayed for f in files],
            {
                "dataset": ", ".join(file.path.name for file in files),
                "tokenizer": encoder.name,
                "chains": options.chains,
                "arm": methods[0].name,
            },
        )
        say(f"\nProfile of {methods[0].name}: {options.profile}")
    return 0


def _encoder(options: ReplayOptions, answers: dict[Path, list[Answer]]) -> Encoder:
    if options.train_tokenizer is None:
        return existing(options.tokenizer or "demo", options.chat_template)
    size = options.train_tokenizer
    if options.tokenizer_text:
        chars = options.tokenizer_chars
        texts = training_texts(options.tokenizer_text, chars)
        sources = ", ".join(Path(name).name for name in options.tokenizer_text)
        name = f"BPE of {size:,} tokens, trained on {chars:,} characters of each of {sources}"
    else:
        texts = _own_texts(answers)
        name = f"BPE of {size:,} tokens, trained on these very texts"
    return trained(size, texts, name)


def _own_texts(answers: dict[Path, list[Answer]]) -> Iterator[str]:
    for found in answers.values():
        for answer in found:
            yield answer.said[-1][1]
            yield answer.text


def _quiet() -> bool:
    return not sys.stderr.isatty()


def _tick(bar: Any) -> None:
    bar.update()


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
    split = {name: by_category(found) for name, found in file.replayed.items()}
    categories = list(next(iter(split.values())))
    if len(categories) < 2:
        return
    rows = [["category", "answers", *split]]
    for category in categories:
        answers = len(next(iter(split.values()))[category])
        taus = [str(figures(found[category]).tau) for found in split.values()]
        rows.append([category, f"{answers:,}", *taus])
    say("\n" + "\n".join(columns(rows)))


def _show_counters(options: ReplayOptions, reading: Reading) -> int:
    rows = [["file", "answers", "tokens", "steps", "tokens a step", "a request"]]
    lines: list[dict[str, Any]] = []
    for path in options.files:
        counted = read_counters(path, reading)
        found = counter_figures(counted)
        rows.append([
            path.name, f"{found.answers:,}", f"{found.tokens:,}", f"{found.steps:,}",
            str(found.tau), f"{found.per_request:.3f}",
        ])  # fmt: skip
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
    options: ReplayOptions, methods: Sequence[ReplayMethod], encoder: Encoder | None
) -> dict[str, Any]:
    """What was replayed, and how; the files by their content."""
    tokenizer = None
    if encoder is not None:
        tokenizer = {
            "name": encoder.name, "size": encoder.size, "fingerprint": encoder.fingerprint,
        }  # fmt: skip
    return {
        "kind": "replay",
        "schema": SCHEMA,
        "methods": {
            one.name: {"method": one.method, "options": dict(one.options), "budget": one.budget}
            for one in methods
        },
        "tokenizer": tokenizer,
        "files": {path.name: _sha256(path) for path in options.files},
        "chains": options.chains,
        "chat_template": options.chat_template,
        "keep_loops": options.keep_loops,
        "turn": options.turn,
        "limit": options.limit,
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


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
