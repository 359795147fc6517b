"""The suffix drafter: its options, its trees, and a store that helps and never harms."""

from __future__ import annotations

import errno
import os
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

import specdec
from helpers.families import FAMILIES, VOCAB
from helpers.laws import GREEDY, SAMPLED, Case, Mode, prompts, reference
from specdec import SpecConfig, TokenTree
from specdec.drafters.row import RowRound
from specdec.drafters.suffix import Suffix, SuffixConfig, SuffixRow
from specdec.errors import ConfigError
from specdec.sources.suffix_segments import RECORD
from specdec.sources.suffix_store import StoreWarning, SuffixStore

KEY = "c" * 64


def started(history: list[int], **options: Any) -> SuffixRow:
    return SuffixRow(list(history), Suffix(SuffixConfig(**options)))


def play(row: SuffixRow, text: list[int], budget: int) -> int:
    """Rounds needed for `text`, with a target that writes it; checks every tree."""
    at, rounds = 0, 0
    while at < len(text):
        tree = row.propose(budget)
        assert tree.tokens[0] == row.text[-1]
        assert len(tree) <= budget + 1
        path, node = list[int](), tree.child(0, text[at])
        while node is not None and at + len(path) + 1 < len(text):
            path.append(node)
            node = tree.child(node, text[at + len(path)])
        tokens = text[at : at + len(path) + 1]
        row.advance(RowRound(tree, path, tokens))
        at += len(tokens)
        rounds += 1
    return rounds


@pytest.mark.parametrize("budget", [0, 1, 3, 32])
def test_a_text_that_repeats_itself_takes_few_rounds(budget: int) -> None:
    passage = random.Random(0).choices(range(1000), k=60)
    rounds = play(started(passage), passage[5:] + passage, budget)
    full = {0: 115, 1: 58, 3: 30, 32: 12}[budget]
    assert rounds <= full + 6


def test_a_longer_match_gets_more_nodes() -> None:
    text = list(range(100))
    sizes = []
    for match in (1, 2, 3, 50):
        history = [*text, *text[:match]]
        row = started(history, nodes_per_match=3, extra_nodes=1, min_probability=0.01)
        sizes.append(len(row.propose(32)) - 1)
    assert sizes == [4, 7, 10, 24]


def test_depth_nodes_and_probability_are_limits() -> None:
    history = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3]
    shallow = started(history, max_depth=2).propose(32)
    assert shallow.tokens == [3, 4, 5]
    small = started(history, max_nodes=3).propose(32)
    assert small.tokens == [3, 4, 5, 6]
    sure = started(history, min_probability=0.7).propose(32)
    assert sure.tokens == [3, 4]  # 0.75; the next one has 0.75 x 0.8
    assert sure.scores == pytest.approx([0, -0.28768207])


def test_branches_where_the_text_branched_and_one_path_for_chain_targets() -> None:
    history = [1, 2, 5, 6, 1, 2, 7, 8, 1, 2, 7, 8, 1, 2]
    row = started(history)
    tree = row.propose(32)
    assert {tree.tokens[n] for n, parent in enumerate(tree.parents) if parent == 0} == {5, 7}
    row.drafter.chains_only = True
    chain = row.propose(32)
    assert chain.tokens[:4] == [2, 7, 8, 1]
    assert chain.parents == list(range(-1, len(chain) - 1))


@pytest.mark.parametrize(
    "options",
    [
        {"max_depth": 0},
        {"max_nodes": 0},
        {"max_nodes": 5000},
        {"max_depth": 5000},
        {"nodes_per_match": -1},
        {"nodes_per_match": float("nan")},
        {"nodes_per_match": "4"},
        {"extra_nodes": -1},
        {"min_probability": 0},
        {"min_probability": 1.5},
        {"min_probability": float("nan")},
        {"min_probability": True},
        {"max_nodes": 3.5},
        {"store_tokens": 1},
        {"store": "x"},
        {"store": "x", "tokenizer": "abc"},
        {"store": "x", "tokenizer": object()},
        {"store": "", "tokenizer": KEY},
        {"store": 3, "tokenizer": KEY},
        {"store": "x", "tokenizer": KEY, "space": "../y"},
    ],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        specdec.registry.methods.configure("suffix", options)


def test_a_store_needs_a_tokenizer() -> None:
    with pytest.raises(ConfigError, match="mean nothing without the tokenizer"):
        SuffixConfig(store="anywhere")


# With models: the text is plain's, whatever the store holds.


@pytest.fixture
def fresh_memory() -> Iterator[None]:
    """Stores live as long as an augmented model, and the tests share those."""
    yield
    for family in ("gemma3", "qwen3_5"):
        vars(Case(family, GREEDY).model)["_specdec"].memory.clear()


def with_store(folder: Path, **options: Any) -> SpecConfig:
    return SpecConfig("suffix", {"store": folder, "tokenizer": KEY, **options})


def fill(folder: Path, texts: list[list[int]]) -> None:
    store = SuffixStore(folder, "default", KEY)
    for text in texts:
        store.add(text)


def noise() -> list[list[int]]:
    """Every bigram many times, with ids that the model does not have."""
    draw = random.Random(0)
    return [draw.choices([*range(VOCAB), 2**31, VOCAB], k=400) for _ in range(20)]


@pytest.mark.filterwarnings("error::specdec.sources.suffix_store.StoreWarning")
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("mode", [GREEDY, SAMPLED], ids=lambda mode: mode.name)
@pytest.mark.parametrize("family", ["gemma3", "qwen3_5"])
@pytest.mark.parametrize("content", ["other prompts", "these prompts", "noise"])
def test_a_filled_store_changes_no_text(
    content: str, family: str, mode: Mode, rows: int, tmp_path: Path, fresh_memory: None
) -> None:
    """In tree and chain mode; what the model wrote before saves rounds, noise only costs nodes."""
    case = Case(family, mode, rows)
    wanted, wanted_state = reference(case)
    width = prompts(rows)["input_ids"].shape[1]
    if content == "other prompts":
        other = GREEDY if mode is SAMPLED else SAMPLED
        rest = reference(Case(family, other, 4))[0].tolist()
        fill(tmp_path, [row[width:] for row in rest])
    elif content == "these prompts":
        fill(tmp_path, [row[width:] for row in wanted.tolist()])
    else:
        fill(tmp_path, noise())
    got, state = case.generate(specdec=with_store(tmp_path))
    stats = specdec.last_stats(case.model)
    assert torch.equal(got, wanted)
    assert torch.equal(state, wanted_state)
    assert stats.mode == FAMILIES[family].mode
    if content == "these prompts":
        assert stats.tokens_by_source["store"] > 10
        _, without, plain_stats = case.speculate("suffix")
        assert torch.equal(without, wanted_state)
        assert stats.rounds < plain_stats.rounds


def test_calls_learn_from_calls_before_them(tmp_path: Path, fresh_memory: None) -> None:
    """On the same model, and on one that only shares the folder."""
    case = Case("gemma3", GREEDY, 4)
    rounds = []
    for _ in range(2):
        case.generate(specdec=with_store(tmp_path))
        rounds.append(specdec.last_stats(case.model).rounds)
    vars(case.model)["_specdec"].memory.clear()
    case.generate(specdec=with_store(tmp_path))
    rounds.append(specdec.last_stats(case.model).rounds)
    case.generate(specdec=with_store(tmp_path, space="another"))
    rounds.append(specdec.last_stats(case.model).rounds)
    assert rounds[1] == rounds[2] < rounds[0] / 2
    assert rounds[3] == rounds[0]


def test_the_store_holds_what_was_emitted_and_no_prompt(tmp_path: Path, fresh_memory: None) -> None:
    case = Case("gemma3", SAMPLED, 4)
    case.generate(specdec=with_store(tmp_path))
    inputs = prompts(4)["input_ids"]
    outputs = reference(case)[0][:, inputs.shape[1] :].tolist()
    assert stored(tmp_path) == outputs


def stored(folder: Path) -> list[list[int]]:
    """The texts in a store of one segment, byte by byte."""
    (segment,) = folder.rglob("*.seg")
    data = segment.read_bytes()
    texts, at = [], 44
    while at < len(data):
        length = RECORD.unpack_from(data, at)[0]
        payload = data[at + 8 : at + 8 + length]
        texts.append([int.from_bytes(payload[n : n + 4], "little") for n in range(0, length, 4)])
        at += 8 + length
    return texts


def test_an_exception_keeps_what_was_emitted(tmp_path: Path, fresh_memory: None) -> None:
    case = Case("gemma3", GREEDY)
    seen = []

    def stop(record: Any) -> None:
        seen.extend(record.tokens[0])
        if len(seen) > 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        case.generate(specdec=replace(with_store(tmp_path), on_round=stop))
    assert stored(tmp_path) == [seen]
    wanted = reference(case)[0]
    assert torch.equal(case.generate(specdec=with_store(tmp_path))[0], wanted)


@pytest.mark.fault
@pytest.mark.parametrize("problem", ["full disk", "no folder", "no permission", "link", "mode"])
def test_a_failing_store_is_one_warning(
    problem: str, tmp_path: Path, fresh_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, folder = Case("gemma3", SAMPLED, 4), tmp_path / "store"
    wanted, wanted_state = reference(case)

    def full(descriptor: int, data: bytes) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    def denied(self: Path, *args: Any, **kwargs: Any) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if problem == "full disk":
            patch.setattr(os, "write", full)
        elif problem == "no folder":
            folder.write_text("a file")
        elif problem == "link":
            (tmp_path / "elsewhere").mkdir(mode=0o700)
            folder.symlink_to(tmp_path / "elsewhere")
        elif problem == "mode":
            folder.mkdir()
            folder.chmod(0o777)
        else:
            patch.setattr(Path, "mkdir", denied)
        for _ in range(3):
            got, state = case.generate(specdec=with_store(folder))
            assert torch.equal(got, wanted)
            assert torch.equal(state, wanted_state)
    ours = [warning for warning in seen if warning.category is StoreWarning]
    assert len(ours) == 1


def test_nobody_drafts_while_a_thread_changes_the_store(tmp_path: Path) -> None:
    store = SuffixStore(tmp_path, "default", KEY)
    store.add([1, 2, 3, 4])
    drafter = Suffix(SuffixConfig(store=tmp_path, tokenizer=KEY))
    drafter.store = store
    row = SuffixRow([1, 2], drafter)
    outcome = RowRound(TokenTree([2], [-1]), [], [3])
    work: list[Callable[[], object]] = [
        lambda: store.add([5, 6, 7]),
        store.refresh,
        lambda: SuffixRow([1, 2], drafter),
        lambda: row.propose(8),
        lambda: row.advance(outcome),
    ]
    threads = [threading.Thread(target=task) for task in work]
    with store.locked():
        for thread in threads:
            thread.start()
            thread.join(0.1)
            assert thread.is_alive()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_threads_may_share_a_store(tmp_path: Path) -> None:
    """Some write while others draft; nothing raises, and every text arrives."""
    store = SuffixStore(tmp_path, "default", KEY, 10**6)
    config = SuffixConfig(store=tmp_path, tokenizer=KEY)
    failures: list[BaseException] = []
    draw = random.Random(1)
    texts = [draw.choices(range(50), k=200) for _ in range(60)]

    def write(mine: list[list[int]]) -> None:
        for text in mine:
            store.add(text)

    def draft() -> None:
        drafter = Suffix(config)
        drafter.store = store
        row = SuffixRow(texts[0][:5], drafter)
        for token in texts[1] * 2:
            row.propose(32)
            row.advance(RowRound(TokenTree([0], [-1]), [], [token]))

    def guarded(work: Any, *arguments: Any) -> None:
        try:
            work(*arguments)
        except BaseException as failure:  # noqa: BLE001
            failures.append(failure)

    jobs = [(write, texts[:30]), (write, texts[30:]), (draft,), (draft,)]
    threads = [threading.Thread(target=guarded, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(store) == sum(map(len, texts))
