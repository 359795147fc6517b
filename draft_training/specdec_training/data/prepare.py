"""Rows in, prepared data out: tokenises, counts, holds prompts out, chooses the draft vocabulary.

Everything is a function of the input's bytes, the tokenizer, the template and the options, so the
same call writes the same data. Tokenised rows are cached under a fingerprint of exactly those.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import datasets

from specdec.artifacts.tokenizers import tokenizer_fingerprint
from specdec.errors import ConfigError, SpecdecError
from specdec_training.data import draft_vocab
from specdec_training.data.bad_rows import BadDataError, Tally
from specdec_training.data.dataset_bars import quiet_datasets, row_bar
from specdec_training.data.encoding import COLUMNS, FORMAT_VERSION, Encoder
from specdec_training.data.folders import check_folder, fresh_folder
from specdec_training.data.options import DataPrepareOptions
from specdec_training.data.prepared import PreparedData
from specdec_training.data.prepared_writer import write_prepared
from specdec_training.data.row_files import Inputs
from specdec_training.data.target import DataTarget, open_target

_READ_COLUMNS = ("where", "row", "reason", "detail")
_DRAW = 1  # another number holds out other prompts of the same input
_LARGE_GROUP = 8  # rows of one group that may be held out together, whatever the size of the data


@dataclass(frozen=True)
class PrepareResult:
    """What `prepare` did.

    Attributes:
        data: The prepared data, opened.
        tally: What became of the rows.
    """

    data: PreparedData
    tally: Tally


def prepare(options: DataPrepareOptions) -> PrepareResult:
    """Writes the folder `options.output`.

    Raises:
        SpecdecError: An option is wrong, the target or an input cannot be read, too many rows are
            bad, or there is nothing to learn. Then nothing is written.
    """
    check_options(options)
    if options.output is None:
        raise ConfigError("--output is missing; give the folder to write")
    check_folder(options.output, options.overwrite)
    target = open_target(options.target)
    kept = None
    if options.draft_vocab_of is not None:
        kept = draft_vocab.of_head(options.draft_vocab_of, target.fingerprint)
    chat = target.chat(options.chat_template, options.template_option)
    encoder = Encoder(chat, target.vocab_size, options.max_length, options.turns)
    table = encoded_rows(Inputs(options), encoder, options)
    tally = count_rows(table)
    tally.check(options.max_bad_fraction)
    refuse_whole_conversations(table)
    if options.held_out_input:
        others = replace(options, input=options.held_out_input, limit=None)
        apart = encoded_rows(Inputs(others), encoder, options)
        chosen, prompts = hold_out_from(apart, table, options.held_out, options.seed)
    else:
        chosen, prompts = hold_out(table, options.held_out, options.seed)
    if not chosen:
        raise BadDataError("no example is left to train on", tally)
    facts = _facts(target, encoder, options, tally) | {"kept_vocabulary": kept}
    with fresh_folder(options.output, options.overwrite) as folder, quiet_datasets():
        write_prepared(folder, table.select(chosen), prompts, facts)
    return PrepareResult(PreparedData.load(options.output), tally)


def check_options(options: DataPrepareOptions) -> None:
    """Refuses numbers out of range.

    Raises:
        ConfigError: Names the option.
    """
    for name, least in (("max_length", 2), ("draft_vocab", 1), ("held_out", 0), ("num_proc", 1)):
        value = getattr(options, name)
        if value < least:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} must be at least {least}, got {value}")
    check_reading(options.limit, options.max_bad_fraction)


def check_reading(limit: int | None, max_bad_fraction: float) -> None:
    """Refuses numbers out of range, of the options that every reader has.

    Raises:
        ConfigError: Names the option.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit must be at least 1, got {limit}")
    if not 0 <= max_bad_fraction <= 1:
        raise ConfigError(f"--max-bad-fraction must be from 0 to 1, got {max_bad_fraction}")


def encoded_rows(inputs: Inputs, encoder: Encoder, options: DataPrepareOptions) -> Any:
    """The `datasets.Dataset` of `Encoder.batch`: a line for each example and each bad row.

    Raises:
        SpecdecError: An input cannot be read, or a conversation came without a chat template.
    """
    read = _hash(
        FORMAT_VERSION, "rows", inputs.hash(), options.as_chat, sorted(options.ignore_field)
    )
    cache = None if options.cache_dir is None else str(options.cache_dir.expanduser())
    text = datasets.Value("string")
    next(inputs.rows())  # refuses an input without rows, on which `datasets` fails
    try:
        with quiet_datasets():
            rows = datasets.Dataset.from_generator(
                _columns,
                features=datasets.Features(dict.fromkeys(_READ_COLUMNS, text)),
                gen_kwargs={"inputs": inputs},
                fingerprint=read,
                cache_dir=cache,
            )
        return _tokenised(rows, encoder, options.num_proc, read)
    except SpecdecError:
        raise
    except datasets.exceptions.DatasetGenerationError as problem:
        cause = problem.__cause__
        if isinstance(cause, SpecdecError):
            raise cause from None
        raise
    except OSError as problem:
        raise ConfigError(
            f"cannot use the folder for cached rows, {str(cache or 'the default')!r}: {problem}; "
            "name another with --cache-dir"
        ) from problem


def _tokenised(rows: Any, encoder: Encoder, processes: int, read: str) -> Any:
    """The table of `Encoder.batch`, with a bar of ours, or of `datasets` over several processes."""
    how: dict[str, Any] = {
        "batched": True,
        "batch_size": 256,
        "remove_columns": list(_READ_COLUMNS),
        "features": datasets.Features({name: _feature(kind) for name, kind in COLUMNS.items()}),
        "new_fingerprint": _hash(
            FORMAT_VERSION,
            "examples",
            read,
            encoder.chat.hash(),
            _tokenizer(encoder),
            sorted(encoder.chat.stop_ids),
            [encoder.vocab_size, encoder.max_length, encoder.turns],
        ),
        "desc": "tokenising",
    }
    if processes > 1:
        return rows.map(encoder.batch, num_proc=processes, **how)
    with quiet_datasets(), row_bar("tokenising", total=len(rows)) as bar:

        def counted(batch: Any) -> dict[str, list[Any]]:
            found = encoder.batch(batch)
            bar.update(len(batch["row"]))
            return found

        return rows.map(counted, **how)


def count_rows(table: Any) -> Tally:
    """What became of each row of the input."""
    tally = Tally()
    names = ["reason", "where", "detail", "opens"]
    for batch in table.select_columns(names).iter(batch_size=1000):
        for reason, where, detail, opens in zip(*(batch[name] for name in names), strict=True):
            if opens:
                tally.add(reason, where, detail)
    return tally


def hold_out(table: Any, wanted: int, seed: int) -> tuple[list[int], list[list[int]]]:
    """Chooses prompts to keep out of training, with everything that was asked the same.

    Args:
        table: As `encoded_rows` gives it.
        wanted: Prompts; fewer when they would be more than a tenth of what there is.
        seed: Another seed holds out others. Adding rows to the input moves few prompts.

    Returns:
        Lines of `table` that are trained on, and the prompts' token ids.
    """
    groups: dict[str, list[int]] = {}
    lengths: dict[int, int] = {}
    names = ["reason", "group", "prompt_length"]
    line = 0
    for batch in table.select_columns(names).iter(batch_size=1000):
        for reason, group, length in zip(*(batch[name] for name in names), strict=True):
            if not reason:
                groups.setdefault(group, []).append(line)
                lengths[line] = length
            line += 1
    largest = max(_LARGE_GROUP, len(lengths) // 20)
    fit = [g for g, lines in groups.items() if lengths[lines[0]] and len(lines) <= largest]
    fit.sort(key=lambda group: _hash(_DRAW, seed, group))
    most = max(1, len(groups) // 10) if len(groups) > 1 else 0
    held = fit[: min(wanted, most)]
    prompts = [table[groups[g][0]]["token_ids"][: lengths[groups[g][0]]] for g in held]
    taken = {line for group in held for line in groups[group]}
    return [line for line in lengths if line not in taken], prompts


def hold_out_from(
    apart: Any, table: Any, wanted: int, seed: int
) -> tuple[list[int], list[list[int]]]:
    """Like `hold_out`, with prompts of another input, as `encoded_rows` gives it.

    What `table` asks in the same words is not trained on.
    """
    prompts: dict[str, list[int]] = {}
    names = ["reason", "group", "prompt_length", "token_ids"]
    for batch in apart.select_columns(names).iter(batch_size=1000):
        for reason, group, length, ids in zip(*(batch[name] for name in names), strict=True):
            if not reason and length:
                prompts.setdefault(group, ids[:length])
    held = sorted(prompts, key=lambda group: _hash(_DRAW, seed, group))[:wanted]
    if len(held) < wanted:
        raise ConfigError(f"--held-out-input has {len(held)} prompts, --held-out wants {wanted}")
    own = table.select_columns(["reason", "group"])
    rows = enumerate(zip(own["reason"], own["group"], strict=True))
    chosen = [line for line, (reason, group) in rows if not reason and group not in held]
    return chosen, [prompts[group] for group in held]


def refuse_whole_conversations(table: Any) -> None:
    """Refuses chat data of which every token is to be learnt: users would be learnt, too.

    Raises:
        ConfigError: They are such data.
    """
    conversations = False
    names = ["kind", "learnt", "token_ids"]
    for batch in table.select_columns(names).iter(batch_size=1000):
        for kind, learnt, ids in zip(*(batch[name] for name in names), strict=True):
            if kind == "chat" and learnt:
                if learnt < len(ids):
                    return
                conversations = True
    if conversations:
        raise ConfigError(
            "the loss mask covers every token of every conversation, so the chat template marks "
            "all of it as the assistant's; correct its {% generation %} tags"
        )


def _columns(inputs: Inputs) -> Iterator[dict[str, str]]:
    """The rows of the input, bad ones included, as columns of text."""
    for found in row_bar("reading", inputs.rows()):
        problem = found.problem
        yield {
            "where": found.where,
            "row": found.row.to_json() if found.row is not None else "",
            "reason": problem.reason if problem is not None else "",
            "detail": problem.detail if problem is not None else "",
        }


def _feature(kind: str) -> Any:
    if kind.startswith("list "):
        return datasets.List(datasets.Value(kind.removeprefix("list ")))
    return datasets.Value(kind)


def _tokenizer(encoder: Encoder) -> list[Any]:
    """What ids depend on beyond the vocabulary: the tokens that frame a text."""
    tokenizer = encoder.chat.tokenizer
    frame = tokenizer("a")["input_ids"]
    names = sorted(map(str, tokenizer.all_special_tokens))
    return [tokenizer_fingerprint(tokenizer), list(frame), names]


def _hash(*parts: Any) -> str:
    described = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(described.encode()).hexdigest()[:32]


def _facts(
    target: DataTarget, encoder: Encoder, options: DataPrepareOptions, tally: Tally
) -> dict[str, Any]:
    """The part of the description that does not come from the examples."""
    return {
        "target": target,
        "chat_template": encoder.chat.hash(),
        "max_length": options.max_length,
        "draft_vocab": options.draft_vocab,
        "rows_read": tally.rows,
        "skipped": dict(sorted(tally.counts.items())),
    }
