"""The trees of a draft head, in every round, against a head and a tree without any cleverness."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import specdec
from helpers.families import model_of
from helpers.heads import head_for
from helpers.hf import tiny_llama
from helpers.naive_head import NaiveHead, Sizes, dynamic_trees
from helpers.toy_target import paths_of
from specdec import SpecConfig, demo
from specdec.demo.prompts import PROMPTS
from specdec.heads.checkpoints.load import load_head
from specdec.heads.eagle3.draft_vocabulary import DraftVocabulary
from specdec.heads.eagle3.head import Eagle3Head
from specdec.stats import RoundRecord


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Eagle3Head, dict[str, Tensor]]:
    """The bundled target, its head, and two prompts of unequal length."""
    model = specdec.augment(demo.load_target(torch.float64), "none")
    head = load_head(demo.head_path()).head.double()
    head.attach(model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    tokenizer = demo.load_tokenizer()
    tokenizer.padding_side = "left"
    prompts = [text[:90] for text in list(PROMPTS.values())[:2]]
    return model, head, dict(tokenizer(prompts, return_tensors="pt", padding=True))


@torch.no_grad()
def check(
    model: Any, head: Eagle3Head, inputs: dict[str, Tensor], tokens: int, **options: Any
) -> list[RoundRecord]:
    """Generates, and compares each round's trees: tokens, parents, order and scores."""
    records: list[RoundRecord] = []
    config = SpecConfig("eagle3", {"draft": head, **options}, on_round=records.append)
    call = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    model.generate(**inputs, **call, specdec=config)
    mask = inputs["attention_mask"].bool()
    texts = [row[seen].tolist() for row, seen in zip(inputs["input_ids"], mask, strict=True)]
    prompt_lengths = [len(text) for text in texts]
    top_k = options["top_k"] if specdec.last_stats(model).mode == "tree" else 1
    sizes = Sizes(
        options["depth"], top_k, options.get("nodes", 48), options.get("beam") or top_k,
        options.get("confidence_threshold", 0.0),
    )  # fmt: skip
    for record in records:
        assert record.trees is not None
        emitted = [len(text) - n for text, n in zip(texts, prompt_lengths, strict=True)]
        active = [row for row, own in enumerate(record.tokens) if own]
        left = max(tokens - emitted[row] - 1 for row in active)
        if record.index and left > 0:
            heads = [naive(model, head, texts[row]) for row in active]
            wanted = dynamic_trees(
                [one.log_probs for one in heads], _target_id(head),
                replace(sizes, depth=min(sizes.depth, left)),
            )  # fmt: skip
            for row, nodes in zip(active, wanted, strict=True):
                tree = record.trees[row]
                assert paths_of(tree)[1:] == [path for path, _ in nodes], f"round {record.index}"
                assert tree.scores is not None
                assert tree.scores[1:] == pytest.approx([score for _, score in nodes], abs=2e-5)
        for text, own in zip(texts, record.tokens, strict=True):
            text += own
    return records


def naive(model: Any, head: Eagle3Head, text: list[int]) -> NaiveHead:
    hidden = model(torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states
    aux = torch.cat([hidden[layer + 1][0] for layer in head.config.aux_output_layers], -1)
    return NaiveHead(head, text, aux)


def _target_id(head: Eagle3Head) -> Any:
    offsets = None if head.d2t is None else head.d2t.tolist()
    return lambda index: index if offsets is None else index + offsets[index]


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("options", [
    {"depth": 4, "top_k": 3, "nodes": 10}, {"depth": 5, "top_k": 1},
    {"depth": 4, "top_k": 4, "beam": 2, "nodes": 9}, {"depth": 3, "top_k": 2, "nodes": 48},
    {"depth": 6, "top_k": 2, "confidence_threshold": 0.3, "nodes": 12},
    {"depth": 8, "top_k": 1, "confidence_threshold": 0.4},
], ids=str)  # fmt: skip
def test_the_bundled_heads_trees(bundled: Any, options: dict[str, Any], rows: int) -> None:
    model, head, both = bundled
    inputs = {name: value[:rows] for name, value in both.items()}
    records = check(model, head, inputs, 12, **options)
    accepted = [len(path) for record in records[1:] for path in record.paths]
    assert max(accepted) >= 3
    assert rows == 1 or any(len(set(map(len, record.tokens))) > 1 for record in records)
    if "confidence_threshold" in options:
        depths = {max(tree.depths()) for record in records[1:] for tree in record.trees or ()}
        assert len(depths) > 1


FLAGS: list[dict[str, Any]] = [
    {"norm_before_residual": True, "norm_before_fc": True, "attention_bias": True},
    {"qk_norm": True, "sliding_window": 6, "fc_bias": True}, {"feed_post_norm": True},
    {"fc_norm": True, "draft_vocab": 40},
]  # fmt: skip


@pytest.mark.parametrize("options", [
    {"depth": 3, "top_k": 5, "nodes": 30}, {"depth": 4, "top_k": 4, "beam": 1, "nodes": 9},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_every_kind_of_head(flags: dict[str, Any], options: dict[str, Any]) -> None:
    model = specdec.augment(tiny_llama(), "none")
    head = head_for(model, **flags)
    if "draft_vocab" in flags:
        ids = torch.arange(40) + torch.arange(40) // 2  # 0, 1, 3, 4, 6, ...
        head.set_vocabulary(DraftVocabulary(ids, head.config.vocab_size))
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 64, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    records = check(model, head, {"input_ids": ids, "attention_mask": mask}, 7, **options)
    assert len(records) > 3


@pytest.mark.parametrize("family", ["mamba2", "qwen3_5"])
def test_chains_of_a_target_that_takes_no_trees(family: str) -> None:
    """Where only one path can be verified, the head goes on with its likeliest token alone."""
    model = model_of(family)
    head = head_for(model)
    ids = torch.randint(1, 96, (1, 11), generator=torch.Generator().manual_seed(4))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    records = check(model, head, inputs, 7, depth=4, top_k=4)
    assert max(len(tree) for record in records[1:] for tree in record.trees or ()) == 5
