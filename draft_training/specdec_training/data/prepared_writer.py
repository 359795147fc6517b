"""Writes the files of prepared data into a folder; `meta.json` last."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import save_file
from torch import Tensor

from specdec.artifacts.atomic_files import digest_of
from specdec_training.data import draft_vocab
from specdec_training.data.prepared import (
    EXAMPLES,
    FORMAT_VERSION,
    HELD_OUT,
    META,
    VOCABULARY,
    ExampleList,
    PreparedMeta,
)


def write_prepared(
    folder: Path, table: Any, prompts: Sequence[Sequence[int]], facts: Mapping[str, Any]
) -> None:
    """Writes the examples, the held-out prompts, the draft vocabulary and the description.

    Args:
        folder: An empty folder.
        table: `datasets.Dataset` of the examples, as `Encoder.batch` gives them.
        prompts: Token ids of the held-out prompts.
        facts: What the examples do not tell: `target`, `chat_template`, `max_length`,
            `draft_vocab`, `rows_read`, `skipped`; and `kept_vocabulary`, that of a head, or
            None to choose one.

    Raises:
        ConfigError: The draft vocabulary is too small.
    """
    target = facts["target"]
    kinds = Counter(table.select_columns(["kind"])["kind"])
    table.select_columns(["token_ids", "loss_mask"]).save_to_disk(str(folder / EXAMPLES))
    examples = ExampleList(datasets.load_from_disk(str(folder / EXAMPLES)))
    counts, used, tokens = _count(examples, target.vocab_size)
    vocabulary = facts["kept_vocabulary"]
    if vocabulary is None:
        size = min(facts["draft_vocab"], target.vocab_size)
        always = draft_vocab.always_ids(target.tokenizer, target.stop_ids, used, size)
        vocabulary = draft_vocab.build(counts, size, always)
    save_file({"counts": counts, **vocabulary.tensors()}, folder / VOCABULARY)
    (folder / HELD_OUT).write_text(json.dumps([list(prompt) for prompt in prompts]) + "\n")
    meta = PreparedMeta(
        format_version=FORMAT_VERSION,
        target=target.fingerprint,
        tokenizer=target.fingerprint.tokenizer,
        chat_template=facts["chat_template"],
        vocab_size=target.vocab_size,
        max_length=facts["max_length"],
        rows=len(examples),
        tokens=tokens,
        loss_tokens=int(counts.sum()),
        held_out=len(prompts),
        rows_read=facts["rows_read"],
        skipped=facts["skipped"],
        kinds=dict(sorted(kinds.items())),
        draft_vocab_size=len(vocabulary.ids),
        draft_vocab_coverage=draft_vocab.coverage(counts, vocabulary),
        data_hash=examples.hash(),
        vocab_hash=digest_of(folder / VOCABULARY).sha256,
        held_out_hash=digest_of(folder / HELD_OUT).sha256,
    )
    (folder / META).write_text(meta.to_json(), encoding="utf-8")


def _count(examples: ExampleList, vocab_size: int) -> tuple[Tensor, Tensor, int]:
    """How often each token is to be predicted, and occurs at all: int64 [V]; and all tokens."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    used = torch.zeros(vocab_size, dtype=torch.int64)
    tokens = 0
    for _, ids, mask in examples.columns():
        counts += torch.bincount(torch.from_numpy(ids[mask]), minlength=vocab_size)
        used += torch.bincount(torch.from_numpy(ids), minlength=vocab_size)
        tokens += len(ids)
    return counts, used, tokens
