"""Units: what is counted of a text, who is batched with whom, whose store holds what."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specdec.artifacts.tokenizers import tokenizer_fingerprint
from specdec.demo import load_tokenizer
from specdec.errors import ConfigError
from specdec.sources.suffix_index import NO_MATCH
from specdec.sources.suffix_store import SuffixStore
from specdec_bench.contracts import Unit, Workbench
from specdec_bench.measure.arms import fill_stores
from specdec_bench.measure.options import RunOptions
from specdec_bench.measure.runner import default_arms, settings_of
from specdec_bench.measure.units import MIXED, Maker, padded, text_hash
from specdec_bench.results.records import Setting
from specdec_bench.tasks import Prompt

END = 99


@dataclass
class Script:
    """A model that answers a prompt with what its first token stands for."""

    answers: dict[int, list[int]]
    asked: list[list[list[int]]] = field(default_factory=list)
    context: int = 1000

    def __post_init__(self) -> None:
        self.config = SimpleNamespace(
            get_text_config=lambda: SimpleNamespace(max_position_embeddings=self.context)
        )
        self.generation_config = SimpleNamespace(pad_token_id=0)

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(num_embeddings=1_000_000)

    def generate(self, ids: Any, attention_mask: Any, max_new_tokens: int, **_: Any) -> Any:
        prompts = [row[mask > 0].tolist() for row, mask in zip(ids, attention_mask, strict=True)]
        self.asked.append(prompts)
        rows = []
        for prompt in prompts:
            text = self.answers[prompt[0]]
            rows.append((text + [7 * i % 97 for i in range(max_new_tokens)])[:max_new_tokens])
        return torch.cat([ids, torch.tensor(rows)], 1)


class Words:
    """A tokenizer whose ids are the numbers that its texts hold."""

    chat_template: Any = None

    def __call__(self, text: str) -> Any:
        return SimpleNamespace(input_ids=[int(word) for word in text.split()])

    def decode(self, ids: list[int], **_: Any) -> str:
        return " " + " ".join(map(str, ids))

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> Any:
        words = [f"{90 + (m['role'] == 'user')} {m['content']}" for m in messages]
        return {"input_ids": self(" ".join(words)).input_ids}


def news(count: int, start: int = 0) -> list[int]:
    """Ids that do not loop."""
    return [(start + i * i) % 97 for i in range(count)]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec_bench.measure.units.input_device", lambda _: torch.device("cpu"))


def maker(model: Script, tokenizer: Any = None, **setting: Any) -> Maker:
    words = tokenizer or Words()
    return Maker(model, words, Setting(**setting), {}, 40, frozenset({END}))


def prompt(name: str, *turns: str, category: str = "k", **more: Any) -> Prompt:
    return Prompt(name, more.get("cluster", name), category, turns, more.get("chat", False))


def test_a_text_counts_up_to_its_end_its_loop_or_the_limit() -> None:
    model = Script(
        {
            1: [*news(20), END, *news(50)],
            2: news(18) + [3, 4, 5] * 20,
            3: news(60),
            4: [*news(10), END],
            5: [8] * 60,
        }
    )
    units, skipped = maker(model).make(0, [prompt(f"p{i}", f"{i} 1") for i in range(1, 6)])
    assert [unit.record.unit for unit in units] == ["p1", "p2", "p3"]
    assert [unit.record.new_tokens for unit in units] == [21, 21, 40]
    assert units[0].text_ids == ((*news(20), END),)
    assert [round(unit.record.looping, 3) for unit in units] == [0.0, round(19 / 40, 3), 0.0]
    assert (skipped.asked, skipped.short, skipped.ungrouped) == (5, 2, 0)
    assert [unit.index for unit in units] == [0, 1, 2]
    assert units[0].record.text_sha256 == text_hash(units[0].text_ids)


class Stoppable(Script):
    """Asks the stopping criteria after every token, and counts them."""

    written = 0

    def generate(
        self,
        ids: Any,
        attention_mask: Any,
        max_new_tokens: int,
        stopping_criteria: Any = (),
        **_: Any,
    ) -> Any:
        whole = super().generate(ids, attention_mask, max_new_tokens)
        for length in range(ids.shape[1] + 1, whole.shape[1] + 1):
            self.written += 1
            if any(bool(stop(whole[:, :length], None).all()) for stop in stopping_criteria):
                return whole[:, :length]
        return whole


@pytest.mark.parametrize("batch", [1, 2])
def test_plain_may_stop_where_nothing_counts_any_more(batch: int) -> None:
    """The units are those of whole texts, for a fraction of the tokens."""
    answers = {
        1: [*news(17), END],
        2: news(18) + [3, 4, 5] * 9,
        3: news(16, 5) + [9] * 9,
        4: news(40),
    }
    prompts = [prompt(f"p{i}", f"{i} 1") for i in answers]
    found, written = [], []
    for only_counted in (False, True):
        model = Stoppable(answers)
        made = maker(model, batch=batch)
        made.only_counted = only_counted
        units, skipped = made.make(0, prompts)
        written.append(model.written)
        found.append([(u.record.unit, u.record.new_tokens, u.text_ids) for u in units])
        assert skipped.short == 0
    assert found[0] == found[1]
    assert len(found[0]) == 4 // batch
    # Looked at every 8 tokens: 24, 32 and 24 of 40, and all of the one that goes on.
    assert written[:2] == [160, 120] if batch == 1 else written[1] < 0.8 * written[0]


@pytest.mark.parametrize("chat", [False, True])
def test_the_second_turn_holds_plains_answer(chat: bool) -> None:
    tokenizer = Words()
    tokenizer.chat_template = "yes" if chat else None
    model = Script({1: [*news(20, 5), END], 91: [*news(20, 5), END]})
    units, _ = maker(model, tokenizer).make(0, [prompt("p", "1 2", "6", chat=chat)])
    answer = [*news(20, 5), END]
    first, second = (list(unit.prompt_ids[0]) for unit in units)
    if chat:
        assert (first, second) == ([91, 1, 2], [91, 1, 2, 90, *answer, 91, 6])
    else:
        assert (first, second) == ([1, 2], [1, 2, *answer, 6])
    assert [unit.record.unit for unit in units] == ["p.1", "p.2"]
    assert len({unit.record.cluster for unit in units}) == 1
    assert units[0].record.seed != units[1].record.seed


def test_long_prompts_keep_their_end_and_are_counted() -> None:
    model = Script({1: news(60), 4: news(60), 6: news(60)})
    prompts = [prompt("p", "1 2 3 4 5 6"), prompt("q", "4 5")]
    units, skipped = maker(model, prompt_tokens=3).make(0, prompts)
    assert [list(unit.prompt_ids[0]) for unit in units] == [[4, 5, 6], [4, 5]]
    assert skipped.shortened == 1
    model.context = 41
    units, skipped = maker(model, prompt_tokens=3).make(0, prompts[:1])
    assert list(units[0].prompt_ids[0]) == [6]
    model.context = 40
    with pytest.raises(ConfigError, match="no room for a prompt"):
        maker(model).make(0, prompts)
    with pytest.raises(ConfigError, match="'empty' has no tokens"):
        maker(Script({})).make(0, [prompt("empty", "")])


@pytest.mark.parametrize(
    ("ids", "room", "kept"),
    [([50, 1, 2, 3], 3, [50, 2, 3]), ([4, 1, 2, 3], 3, [1, 2, 3]), ([50, 1, 2], 1, [2])],
)
def test_a_shortened_prompt_keeps_the_token_that_begins_every_text(
    ids: list[int], room: int, kept: list[int]
) -> None:
    tokenizer = Words()
    tokenizer.bos_token_id = 50  # type: ignore[attr-defined]
    model = Script({kept[0]: news(60)})
    prompts = [prompt("p", " ".join(map(str, ids)))]
    units, _ = maker(model, tokenizer, prompt_tokens=room).make(0, prompts)
    assert list(units[0].prompt_ids[0]) == kept


def test_batches_hold_one_category_and_similar_lengths_and_the_rest_is_mixed() -> None:
    lengths = {1: 20, 2: 39, 3: 21, 4: 38, 5: 30, 6: 31, 7: 25}
    model = Script({i: [*news(n), END] for i, n in lengths.items()})
    prompts = [prompt(f"a{i}", f"{i}", category="a") for i in (1, 2, 3, 4, 5)]
    prompts += [prompt("b6", "6 6 6", category="b"), prompt("c7", "7", category="c")]
    units, skipped = maker(model, batch=2).make(0, prompts)
    assert [u.record.unit for u in units] == ["a1+a3", "a5+a4", "c7+b6"]
    assert [u.record.category for u in units] == ["a", "a", MIXED]
    assert [u.record.new_tokens for u in units] == [21, 31, 26]
    assert skipped.ungrouped == 1
    last = units[-1]
    assert last.input_ids.tolist() == [[0, 0, 7], [6, 6, 6]]
    assert last.attention_mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert model.asked[-1] == [[7], [6, 6, 6]], "plain answered the batch together"
    assert last.record.tokens == 52


def test_batches_that_share_a_cluster_are_one_cluster() -> None:
    model = Script({i: [*news(30 + i), END] for i in range(1, 7)})
    shared = {1: "x", 2: "y", 3: "y", 4: "z", 5: "v", 6: "v"}
    prompts = [prompt(f"p{i}", f"{i}", cluster=c) for i, c in shared.items()]
    units, _ = maker(model, batch=2).make(0, prompts)
    clusters = [unit.record.cluster for unit in units]
    assert clusters[0] == clusters[1] == "x+y+z"
    assert clusters[2] == "v"
    odd = [prompt("p1", "1", cluster="a+b"), prompt("p2", "2", cluster="a")]
    units, _ = maker(model).make(0, odd)
    assert [unit.record.cluster for unit in units] == ["a+b", "a"]


def test_padding_is_on_the_left() -> None:
    ids, mask = padded([[1, 2, 3], [4]], Script({}))
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_sweeps_are_combined_and_defaults_fit_the_target() -> None:
    options = RunOptions(dtypes=("float32", "bfloat16"), batches=(1, 4), temperatures=(0.0, 1.0))
    settings = settings_of(options)
    assert len(settings) == len(set(settings)) == 8
    assert [s.dtype for s in settings] == ["float32"] * 4 + ["bfloat16"] * 4
    assert settings_of(RunOptions()) == [Setting()]
    assert any(arm.startswith("eagle3") for arm in default_arms(RunOptions()))
    other = default_arms(RunOptions(target="someone/model", tasks=("gsm8k",)))
    assert not any(arm.startswith(("eagle3", "draft_model", "hf_assisted")) for arm in other)


def test_a_store_never_holds_texts_of_the_units_own_cluster(tmp_path: Path) -> None:
    model = Script({1: [*news(20), END], 2: [70, *news(25, 3), END], 3: [71, *news(30, 7), END]})
    clusters = {1: "x", 2: "x", 3: "y"}
    prompts = [prompt(f"p{i}", f"{i}", cluster=c) for i, c in clusters.items()]
    units, _ = maker(model).make(0, prompts)
    tokenizer = load_tokenizer()
    bench = Workbench(None, tokenizer, Setting(), stores=tmp_path)
    fill_stores(bench, units)

    def held(owner: Unit, text: Unit) -> bool:
        store = SuffixStore(tmp_path, bench.space_of(owner), tokenizer_fingerprint(tokenizer))
        store.refresh()
        ids = list(text.text_ids[0])
        return store.indexes[0].follow(NO_MATCH, ids).length == len(ids)

    for owner in units:
        for text in units:
            assert held(owner, text) is (owner.record.cluster != text.record.cluster)


def test_many_prompts_share_a_few_stores(tmp_path: Path) -> None:
    model = Script({i: [60 + i, *news(20, i), END] for i in range(1, 21)})
    units, _ = maker(model).make(0, [prompt(f"p{i}", f"{i}") for i in range(1, 21)])
    bench = Workbench(None, load_tokenizer(), Setting(), stores=tmp_path)
    fill_stores(bench, units)
    seen = {bench.space_of(unit) for unit in units}
    assert len(seen) == 8
    fingerprint = tokenizer_fingerprint(bench.tokenizer)
    for unit in units[:9]:
        store = SuffixStore(tmp_path, bench.space_of(unit), fingerprint)
        store.refresh()
        inside = [
            store.indexes[0].follow(NO_MATCH, list(other.text_ids[0])).length
            == len(other.text_ids[0])
            for other in units
        ]
        assert inside == [bench.folds[other.index] != bench.folds[unit.index] for other in units]
        assert not inside[unit.index]
