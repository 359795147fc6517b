"""Statistics, `on_round` and the JSONL trace."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import specdec
from helpers.hf import left_padded, oracle, plain, prompt, run_both, tiny_llama
from specdec import GenerationStats, SpecConfig
from specdec.stats import RoundRecord

NEW = 21


def run(model: Any, depth: int = 4, **call: Any) -> tuple[Any, list[RoundRecord], GenerationStats]:
    """A call with the oracle, its records and its statistics."""
    records: list[RoundRecord] = []
    torch.manual_seed(4)
    expected = plain(model, **call)
    width = call["input_ids"].shape[1]
    beyond = torch.cat([expected, expected[:, -1:].expand(-1, depth)], dim=1)
    settings = replace(oracle(beyond, width, depth=depth), on_round=records.append)
    torch.manual_seed(4)
    got = model.generate(**call, specdec=settings)
    assert torch.equal(got, expected)
    return got[:, width:], records, specdec.last_stats(model)


def recount(records: list[RoundRecord]) -> Counter[int]:
    return Counter(len(row) for record in records[1:] for row in record.tokens if row)


def test_rounds_add_up(llama: Any) -> None:
    text, records, stats = run(llama, input_ids=prompt(), max_new_tokens=NEW)
    assert [record.index for record in records] == list(range(5))
    assert [token for record in records for token in record.tokens[0]] == text[0].tolist()
    assert records[0].tokens == [[text[0, 0].item()]]
    assert stats.new_tokens == NEW
    assert stats.rounds == len(records) - 1 == 4
    assert stats.histogram == recount(records) == {5: 4}
    assert stats.acceptance_length == 5.0
    assert stats.prefill_forwards == 1
    assert stats.tokens_per_forward == NEW / 5
    assert stats.tokens_by_source == {"draft": 16, "target": 5}
    assert stats.drafted_nodes == sum(len(record.trees[0]) - 1 for record in records[1:])
    assert set(stats.seconds) == {"draft", "forward", "verify", "commit", "observe"}
    assert all(value >= 0 for value in stats.seconds.values())
    assert stats.device_to_host_copies == len(records)


def test_rounds_of_a_batch_add_up(llama: Any) -> None:
    free = plain(llama, **left_padded(), max_new_tokens=NEW)[:, 9:].tolist()
    ends = [free[0][6], free[1][11], 63]
    text, records, stats = run(llama, **left_padded(), max_new_tokens=NEW, eos_token_id=ends)
    emitted = [[token for record in records for token in record.tokens[row]] for row in range(4)]
    for row, tokens in enumerate(emitted):
        assert text[row, : len(tokens)].tolist() == tokens
        assert not text[row, len(tokens) :].any()
    assert stats.new_tokens == sum(map(len, emitted))
    assert stats.histogram == recount(records)
    rounds = recount(records)
    tau = sum(n * times for n, times in rounds.items()) / sum(rounds.values())
    assert stats.acceptance_length == pytest.approx(tau)
    assert sum(stats.tokens_by_source.values()) == stats.new_tokens
    assert any(not tokens for tokens in records[-1].tokens), "all rows ended together"


@pytest.mark.parametrize("depth_of_end", [1, 2, 3, 4, 5])
def test_an_end_inside_a_block_is_not_overcounted(llama: Any, depth_of_end: int) -> None:
    """EOS at depth 2 of 5: two tokens count, and the path is cut before the last of them."""
    torch.manual_seed(4)
    sampled = {"do_sample": True, "top_k": 0, "temperature": 9.0}
    free = plain(llama, prompt(), max_new_tokens=NEW, **sampled)[0, 9:].tolist()
    end = free[depth_of_end]
    assert end not in free[:depth_of_end], "the seed makes this test show nothing"
    text, records, stats = run(
        llama, 5, input_ids=prompt(), max_new_tokens=NEW, eos_token_id=end, **sampled
    )
    assert text[0].tolist() == free[: depth_of_end + 1]
    assert stats.new_tokens == depth_of_end + 1
    assert stats.rounds == 1
    assert stats.histogram == {depth_of_end: 1}
    assert stats.acceptance_length == depth_of_end
    assert len(records[1].paths[0]) == depth_of_end - 1
    assert sum(stats.tokens_by_source.values()) == stats.new_tokens


def test_the_length_limit_is_not_overcounted(llama: Any) -> None:
    for limit in (1, 2, 3, 7):
        text, _, stats = run(llama, 5, input_ids=prompt(), max_new_tokens=limit)
        assert stats.new_tokens == text.shape[1] == limit
        assert sum(n * times for n, times in stats.histogram.items()) == limit - 1


def test_records_describe_their_trees(llama: Any) -> None:
    _, records, _ = run(llama, input_ids=prompt(), max_new_tokens=NEW)
    pending = records[0].tokens[0][-1]
    for record in records[1:]:
        tree = record.trees[0]
        assert tree.tokens[0] == pending
        assert record.nodes >= len(tree)
        path, parent = record.paths[0], 0
        for node, token in zip(path, record.tokens[0], strict=False):
            assert tree.parents[node] == parent
            assert tree.tokens[node] == token
            parent = node
        assert len(record.tokens[0]) in (len(path), len(path) + 1)
        assert set(record.seconds) == {"draft", "forward", "verify", "commit", "observe"}
        pending = record.tokens[0][-1]


def test_records_survive_json(llama: Any) -> None:
    _, records, _ = run(llama, input_ids=prompt(), max_new_tokens=NEW)
    for record in records:
        found = json.loads(json.dumps(record.to_json()))
        assert found["tokens"] == record.tokens
        assert found["paths"] == record.paths
        assert found["index"] == record.index
        assert found["trees"][0]["tokens"] == record.trees[0].tokens
        assert found["trees"][0]["parents"] == record.trees[0].parents


@pytest.mark.parametrize("as_text", [True, False])
def test_trace_file(llama: Any, tmp_path: Path, as_text: bool) -> None:
    path = tmp_path / "trace.jsonl"
    records: list[RoundRecord] = []
    settings = SpecConfig(
        "lookahead", {"window": 2, "ngram": 3, "guesses": 2}, on_round=records.append,
        trace=str(path) if as_text else path,
    )  # fmt: skip
    got = llama.generate(prompt(), max_new_tokens=NEW, specdec=settings)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines == [json.loads(json.dumps(record.to_json())) for record in records]
    assert [token for line in lines for token in line["tokens"][0]] == got[0, 9:].tolist()
    assert all(line["trees"][0]["parents"][0] == -1 for line in lines)
    llama.generate(prompt(), max_new_tokens=NEW, specdec=settings)
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2 * len(lines), "it appends"


def test_trees_are_only_copied_for_somebody(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any) -> None:
        raise AssertionError("a tree was copied to the host")

    monkeypatch.setattr("specdec.round.tree.TreeBatch.to_rows", refuse)
    llama.generate(prompt(), max_new_tokens=NEW)


def test_options_of_augment_reach_the_loop(tmp_path: Path) -> None:
    seen: list[RoundRecord] = []
    path = tmp_path / "trace.jsonl"
    model = tiny_llama()
    specdec.augment(model, "prompt_lookup", budget=1, on_round=seen.append, trace=path)
    model.generate(prompt(), max_new_tokens=NEW)
    assert seen
    assert max(record.nodes for record in seen) <= 2
    assert len(path.read_text(encoding="utf-8").splitlines()) == len(seen)


def test_exception_in_on_round_leaves_the_model_usable(llama: Any) -> None:
    def broken(record: RoundRecord) -> None:
        if record.index == 2:
            raise RuntimeError("the user's callback fails")

    with pytest.raises(RuntimeError, match="the user's callback"):
        llama.generate(prompt(), max_new_tokens=NEW, specdec=SpecConfig(on_round=broken))
    expected = plain(llama, prompt(), max_new_tokens=NEW)
    assert torch.equal(llama.generate(prompt(), max_new_tokens=NEW), expected)


def test_stats_say_what_ran(llama: Any) -> None:
    llama.generate(prompt(), max_new_tokens=4)
    stats = specdec.last_stats(llama)
    assert (stats.method, stats.mode) == ("prompt_lookup", "tree")
    assert "self-test" in stats.mode_reason
    with pytest.warns(specdec.errors.FallbackWarning):
        llama.generate(prompt(), max_new_tokens=4, use_cache=False)
    stats = specdec.last_stats(llama)
    assert stats.mode == "plain"
    assert stats.mode_reason == "use_cache is False"
    assert stats.new_tokens == 0


def test_a_drafted_eos_is_the_drafts(llama: Any) -> None:
    """EOS inside an accepted path: the rules cut the path before it, yet the draft won it."""
    text = plain(llama, prompt(), max_new_tokens=12, do_sample=False)[0, 9:].tolist()
    ends = next(n for n in range(2, 6) if text[n] not in text[:n])
    run_both(
        llama, input_ids=prompt(), max_new_tokens=12, do_sample=False,
        eos_token_id=text[ends], options={"depth": 8},
    )  # fmt: skip
    assert specdec.last_stats(llama).tokens_by_source == {"target": 1, "draft": ends}
