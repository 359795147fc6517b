"""Replay of recorded answers: the walk, the methods, the traces, the command, and known figures."""

import gzip
import json
import random
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import specdec
from specdec.config import SpecConfig
from specdec.demo import load_target, load_tokenizer
from specdec.drafters.row import DraftRow, RowDrafter, RowRound
from specdec.errors import ConfigError, DrafterError, SpecdecError
from specdec.round.tree import TokenTree
from specdec_bench.replay.command import run_replay
from specdec_bench.replay.encoding import Encoder, encoder_of
from specdec_bench.replay.methods import parse_methods
from specdec_bench.replay.options import ReplayOptions
from specdec_bench.replay.replay import Encoded, _state, encode, figures, replay, walk
from specdec_bench.replay.traces import (
    Answer,
    Reading,
    load_prompts,
    read_answers,
    read_counters,
)
from specdec_bench.rows import read_rows
from specdec_bench.summary.speculation_profile import check_profile

SHARED = Path("../shared/data")
TRACES = SHARED / "traces"
needs_data = pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data beside the checkout")


def letters() -> Encoder:
    def ids(text: str) -> list[int]:
        return [ord(c) for c in text]

    return Encoder(
        "letters", "0" * 64, 0x110000, ids, lambda said: ids("\n".join(t for _, t in said))
    )


def answer(prompt: str, text: str, name: str = "a", category: str = "x") -> Answer:
    return Answer(name, prompt, category, (("user", prompt),), text)


def one(method: str, prompt: str, text: str, **more: Any) -> Any:
    encoder = letters()
    encoded = encode([answer(prompt, text)], encoder, keep_loops=True)
    return replay(encoded, parse_methods([method])[0], encoder, **more)[0].counts


class Script(RowDrafter):
    """Proposes what a script says, round by round."""

    max_nodes = 9

    def __init__(self, trees: Sequence[TokenTree]) -> None:
        super().__init__()
        self.trees, self.seen = list(trees), list[RowRound]()

    class Row(DraftRow):
        drafter: Any

        def propose(self, budget: int) -> TokenTree:
            return self.drafter.trees.pop(0)

        def observe(self, outcome: RowRound) -> None:
            self.drafter.seen.append(outcome)


def scripted(trees: Sequence[TokenTree], tokens: list[int], **more: Any) -> tuple[Script, Any]:
    drafter = Script(trees)
    encoded = Encoded(answer("", ""), [7], tokens, 0)
    return drafter, walk(
        drafter, _state(encoded, 100, more.pop("chains", False), {}), tokens, **more
    )


def test_the_walk_by_hand() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 7]
    trees = [
        TokenTree([1, 9, 2, 3, 3], [-1, 0, 0, 2, 2]),  # the branch 2, 3 wins; then 4 is the bonus
        TokenTree.chain(4, [8, 5]),  # nothing
        TokenTree.chain(5, [6, 7, 8]),  # cut to one: the answer ends with the bonus
    ]
    drafter, counts = scripted(trees, tokens)
    assert counts.histogram == {3: 1, 1: 1, 2: 1}
    assert counts.drafted == 4 + 2 + 1
    assert (counts.chain, counts.last) == (False, (2,))
    assert [seen.tokens for seen in drafter.seen] == [[2, 3, 4], [5], [6, 7]]
    assert [seen.path for seen in drafter.seen] == [[2, 3], [], [1]]


def test_budget_chains_and_vocabulary() -> None:
    tokens = [1, 2, 3, 4]
    tree = TokenTree([1, 9, 2, 3], [-1, 0, 0, 2])
    _, counts = scripted([tree, TokenTree([3], [-1])], tokens, budget=2)  # node 3 does not fit
    assert counts.histogram == {2: 1, 1: 1}
    assert counts.drafted == 2
    _, counts = scripted([tree], tokens, chains=True)  # the path 2, 3 is the deepest
    assert (counts.histogram, counts.drafted, counts.chain) == ({3: 1}, 2, True)
    foreign = TokenTree.chain(1, [2, 100])
    _, counts = scripted([foreign, TokenTree([3], [-1])], tokens)
    assert (counts.histogram, counts.drafted) == ({2: 1, 1: 1}, 1)


def test_a_drafter_that_breaks_its_contract() -> None:
    with pytest.raises(DrafterError, match="rooted at the pending token 1"):
        scripted([TokenTree([5], [-1])], [1, 2, 3])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("prompt_lookup", {}),
        ("prompt_lookup:max_ngram=2,num_draft_tokens=5", {"max_ngram": 2, "num_draft_tokens": 5}),
        ("suffix", {}),
        ("suffix:max_nodes=6", {"max_nodes": 6}),
    ],
)
def test_replay_counts_what_the_loop_counts(method: str, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_target(), load_tokenizer()
    model.generation_config.eos_token_id = None
    specdec.augment(model, "none")
    prompt = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    config = SpecConfig(method.partition(":")[0], options)
    text = model.generate(ids, specdec=config, max_new_tokens=60, do_sample=False, pad_token_id=0)
    wanted = specdec.last_stats(model)
    encoder = encoder_of("demo", with_template=False)
    recorded = Encoded(answer(prompt, ""), ids[0].tolist(), text[0, ids.shape[1] :].tolist(), 0)
    counts = replay([recorded], parse_methods([method])[0], encoder)[0].counts
    assert counts.histogram == wanted.histogram
    assert counts.drafted == wanted.drafted_nodes


def test_methods_on_text_that_repeats() -> None:
    prompt, text = "one two three four five. ", "one two three four five. one two"
    lookup = "prompt_lookup:max_ngram=3,num_draft_tokens=5,tokens_per_match=5"
    counts = one(lookup, prompt, text)
    # "o" from the prefill; " t" alone is ambiguous nowhere, so every later round accepts five.
    assert sum(n * times for n, times in counts.histogram.items()) == len(text) - 1
    assert counts.histogram[6] >= 4
    assert counts.chain
    noise = "".join(random.Random(0).choices("abc", k=300))
    assert not one("suffix", noise[:200], noise[200:]).chain
    assert one("suffix", noise[:200], noise[200:], chains=True).chain
    nothing = one("prompt_lookup", "abc", "defghijk")
    assert (nothing.histogram, nothing.drafted) == ({1: 7}, 0)


def test_loops_are_cut_unless_they_are_kept() -> None:
    looping = answer("Say it", "no news " + "and on " * 20)
    cut, kept = (encode([looping], letters(), keep)[0] for keep in (False, True))
    assert cut.looping > 100
    assert len(cut.tokens) + cut.looping == len(kept.tokens)
    assert kept.looping == 0


def test_a_store_never_holds_an_answer_to_the_same_prompt() -> None:
    chosen = random.Random(0)
    first, second = ("".join(chosen.choices("abcdefghijklmnop", k=120)) for _ in range(2))
    encoder = letters()
    method = parse_methods(["suffix+store"])[0]

    def tau(answers: list[Answer]) -> list[float]:
        found = replay(encode(answers, encoder), method, encoder)
        return [figures([each]).acceptance.tau_per_step for each in found]

    twice = tau([answer("?", first, "1"), answer("?", first, "2")])
    assert twice[0] == twice[1] < 1.3  # the same prompt: the first answer is not in the store yet
    shared = tau([answer("?", first, "1"), answer("!", first, "2"), answer(".", second, "3")])
    assert shared[0] == twice[0]
    assert shared[1] > 5 * shared[0]
    assert shared[2] < 1.5


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("lookahead", "cannot be replayed: it guesses with what the target says"),
        ("jacobi", "cannot be replayed: it guesses with what the target says"),
        ("recycling", "cannot be replayed: it needs the target's next best candidates"),
        ("eagle3", "cannot be replayed: it needs forwards of a model"),
        ("draft_model", "cannot be replayed: it needs forwards of a model"),
        ("none", "cannot be replayed: it drafts nothing"),
        ("none", "those that can be are prompt_lookup, suffix"),
        ("hf_prompt_lookup", "it is none of specdec's drafting methods"),
        ("server:http://localhost:8000", "it is none of specdec's drafting methods"),
        ("sufix", "unknown method 'sufix'; choose one of"),
        ("prompt_lookup+store", "prompt_lookup has no store"),
        ("suffix:store=/tmp/x", "store keeps texts from answer to answer"),
        ("prompt_lookup:max_ngram=0", "max_ngram must be a whole number from 1 to 64"),
        ("prompt_lookup:ngram=3", "has no option 'ngram'"),
        ("suffix:budget=-1", "budget must be a whole number"),
        ("suffix,suffix", "named twice"),
    ],
)
def test_methods_that_are_refused(method: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_methods([method])


def test_methods_as_they_are_written() -> None:
    found = parse_methods(["prompt_lookup:max_ngram=5,budget=4, suffix", "suffix+store"])
    assert [one.name for one in found] == [
        "prompt_lookup:max_ngram=5,budget=4", "suffix", "suffix+store",
    ]  # fmt: skip
    assert (found[0].options, found[0].budget, found[1].options) == ({"max_ngram": 5}, 4, {})
    assert (found[1].store, found[2].store) == (False, True)
    assert [one.name for one in parse_methods([])] == ["prompt_lookup", "suffix"]


def test_a_registered_drafter_can_be_replayed() -> None:
    class Repeats(RowDrafter):
        class Row(DraftRow):
            def propose(self, budget: int) -> TokenTree:
                return TokenTree.chain(self.text[-1], [self.text[-1]] * 3)

    specdec.register_drafter("repeats", Repeats)
    # After "a": three of them and the fourth as the bonus; then none, and so on for "b".
    assert one("repeats", "x", "aaaaabbbbb").histogram == {4: 2, 1: 1}


def rows(path: Path, values: list[Any]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def test_all_kinds_of_traces(tmp_path: Path) -> None:
    path = rows(tmp_path / "t.jsonl", [
        {"prompt": "P", "output": "O", "sampling": {"t": 1}},
        {"question": "Q", "deep": {"answer": "A"}, "answer": "B", "category": "maths"},
        {"id": "c", "messages": [
            {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three"}, {"role": "assistant", "content": "four"},
        ]},
        {"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]},
    ])  # fmt: skip
    found = read_answers(path, Reading())
    assert [a.text for a in found] == ["O", "B", "two", "four", "g"]
    assert [a.id for a in found] == ["1", "2", "c.1", "c.2", "4"]
    assert [a.category for a in found] == ["t", "maths", "t", "t", "t"]
    assert found[3].said == (("user", "one"), ("assistant", "two"), ("user", "three"))
    assert found[2].cluster == found[3].cluster
    assert [a.text for a in read_answers(path, Reading(turn=2))] == ["four"]
    second = rows(tmp_path / "d.jsonl", [{"question": "Q", "deep": {"answer": "A"}, "answer": "B"}])
    assert read_answers(second, Reading(answer_field="deep.answer"))[0].text == "A"


def test_several_samples_of_a_prompt_share_a_cluster(tmp_path: Path) -> None:
    path = rows(tmp_path / "t.jsonl", [{"id": 1, "prompt": "P", "output": o} for o in "abc"])
    found = read_answers(path, Reading())
    assert len({a.id for a in found}) == 3
    assert len({a.cluster for a in found}) == 1


@pytest.mark.parametrize(
    ("row", "reading", "message"),
    [
        ({"prompt": "P"}, Reading(), "none of them; it has prompt; say which with --answer-field"),
        ({"prompt": "P", "output": "a", "answer": "b"}, Reading(), "has both output and answer"),
        ({"prompt": "P", "output": ""}, Reading(), "field 'output': is empty"),
        ({"prompt": "P", "output": "a"}, Reading(answer_field="x.y"), "'x.y': is not there"),
        ({"prompt": "P", "output": 3}, Reading(answer_field="output"), "must be text, got int 3"),
        ({"messages": [{"role": "user", "content": "x"}]}, Reading(), "no message of an assist"),
        ({"question_id": 1, "choices": [{"turns": ["x"]}]}, Reading(), "--prompts FILE"),
        ({"question_id": 1, "choices": []}, Reading(), "field 'choices'|--prompts FILE"),
        ({"prompt": "P", "output": "a"}, Reading(turn=2), "holds no answer of turn 2"),
    ],
)
def test_traces_that_are_refused(
    tmp_path: Path, row: dict[str, Any], reading: Reading, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_answers(rows(tmp_path / "t.jsonl", [row]), reading)


def test_prompts_are_found_by_their_id_only(tmp_path: Path) -> None:
    path = rows(tmp_path / "p.jsonl", [{"question_id": 5, "turns": ["One", "Two"]}])
    trace = rows(
        tmp_path / "t.jsonl",
        [{"question_id": 5, "choices": [{"turns": ["a", "b"]}, {"turns": ["another sample"]}]}],
    )
    found = read_answers(trace, Reading(prompts=load_prompts(path)))
    assert [(a.id, a.text, len(a.said)) for a in found] == [("5.1", "a", 1), ("5.2", "b", 3)]
    foreign = rows(tmp_path / "f.jsonl", [{"question_id": 1, "choices": [{"turns": ["a"]}]}])
    with pytest.raises(ConfigError, match="--prompts FILE, and they do not hold it"):
        read_answers(foreign, Reading(prompts=load_prompts(path)))
    nameless = rows(tmp_path / "n.jsonl", [{"turns": ["x"]}])  # its line number is no name
    with pytest.raises(ConfigError, match="no answer can name this prompt"):
        load_prompts(nameless)
    with pytest.raises(ConfigError, match="no file"):
        load_prompts(tmp_path / "absent.jsonl")


def test_a_truncated_trace_is_refused(tmp_path: Path) -> None:
    chosen = random.Random(0)
    lines = "".join(
        json.dumps({"prompt": f"{n}", "output": f"{chosen.random()}"}) + "\n" for n in range(3000)
    )
    packed = gzip.compress(lines.encode())
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(packed[:-20])
    with pytest.raises(ConfigError, match=r"t\.jsonl\.gz: it is cut off or damaged after line"):
        read_answers(path, Reading())
    path.write_text(lines[:-10])  # a torn last line, unpacked
    with pytest.raises(ConfigError, match="line 3000 is not JSON"):
        read_answers(path, Reading())


def test_counters(tmp_path: Path) -> None:
    choice = {"turns": ["a", "b"], "idxs": [9, 4], "new_tokens": [25, 10]}
    path = rows(tmp_path / "t.jsonl", [
        {"question_id": 1, "choices": [choice]},
        {"question_id": 2, "choices": [{"decoding_steps": [5], "new_tokens": [10]}]},
    ])  # fmt: skip
    found = read_counters(path, Reading())
    assert [(c.tokens, c.steps) for c in found] == [(25, 10), (10, 5), (10, 5)]
    assert len(read_counters(path, Reading(turn=1))) == 2
    for change, message in [
        ({"idxs": [9]}, "2 token counts for 1 step counts"),
        ({"idxs": [30, 4]}, "25 tokens in 31 steps"),
        ({"new_tokens": None}, r"'choices\[0\].new_tokens': must be a list of counts"),
        ({"new_tokens": [2.5, 1]}, "must be a list of counts"),
        ({"idxs": [True, 1]}, "must be a list of counts"),
    ]:
        rows(path, [{"question_id": 1, "choices": [{**choice, **change}]}])
        with pytest.raises(ConfigError, match=message):
            read_counters(path, Reading())


@needs_data
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "out.jsonl"
    options = ReplayOptions(
        files=(TRACES / "medusa_vicuna_7b_mt_bench.jsonl.gz",),
        methods=("prompt_lookup,suffix",),
        prompts=SHARED / "prompts" / "mt_bench.jsonl",
        tokenizer="demo",
        limit=9,
        output=output,
    )
    assert run_replay(options) == 0
    said = capsys.readouterr().out
    assert "18 answers to 9 prompts" in said
    assert "tokenizer: demo" in said
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert lines[0]["methods"]["suffix"] == {"method": "suffix", "options": {}, "budget": None}
    assert lines[0]["tokenizer"]["name"] == "demo"
    assert len(lines[0]["files"]["medusa_vicuna_7b_mt_bench.jsonl.gz"]) == 64
    assert lines[-1] == {"kind": "end", "records": len(lines) - 1}
    assert len(lines) == 2 + 2 * 18
    assert str(Path.home()) not in output.read_text()
    with pytest.raises(ConfigError, match="already there; --overwrite"):
        run_replay(options)


def test_the_profile_of_the_first_method(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        text = f"def {name}(a):\n    return a\n\n" * 2 + "print(a)\nprint(b)\nprint(c)\n"
        rows = [{"prompt": f"write {n}", "answer": text + str(n), "id": n} for n in range(3)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    files = (tmp_path / "one.jsonl", tmp_path / "two.jsonl")
    options = ReplayOptions(
        files,
        methods=("prompt_lookup:num_draft_tokens=4", "suffix"),
        tokenizer="demo",
        output=tmp_path / "out.jsonl",
        profile=tmp_path / "new" / "profile.json",
        keep_loops=True,
    )
    assert run_replay(options) == 0
    assert "Profile of prompt_lookup:num_draft_tokens=4" in capsys.readouterr().out
    found = json.loads((tmp_path / "new" / "profile.json").read_text())
    check_profile(found)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    counted: Counter[str] = Counter()
    for line in lines:
        if line["kind"] == "answer" and line["method"].startswith("prompt_lookup"):
            counted.update(line["histogram"])
    assert found["acceptance_length_histogram"] == dict(sorted(counted.items()))
    assert found["num_speculative_tokens"] >= 4
    assert sum(c["num_requests"] for c in found["per_category"].values()) == 6
    assert found["measurement_conditions"]["dataset"] == "one.jsonl, two.jsonl"
    assert str(tmp_path) not in json.dumps(found)
    for change, words in (
        ({"output": None}, "already there; --overwrite"),
        (
            {"output": None, "counters": True, "methods": (), "tokenizer": None},
            "--profile needs positions",
        ),
        ({"output": None, "profile": files[0], "overwrite": True}, "which is needed"),
        ({"output": tmp_path / "p", "profile": tmp_path / "p"}, "which is needed"),
    ):
        with pytest.raises(ConfigError, match=words):
            run_replay(replace(options, **change))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ReplayOptions(), "no FILE"),
        (ReplayOptions((Path("a"), Path("a"))), "--files names .* twice"),
        (ReplayOptions((Path("absent.jsonl"),), tokenizer="demo"), "no file 'absent.jsonl'"),
        (ReplayOptions((Path("a"),), limit=0), "--limit must be from 1"),
        (ReplayOptions((Path("a"),)), "no --tokenizer; name that of the model .*, or demo"),
        (ReplayOptions((Path("a"),), counters=True, methods=("suffix",)), "replays nothing"),
    ],
)
def test_options_that_are_refused(options: ReplayOptions, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_replay(options)


def test_tokenizers_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no chat template"):
        encoder_of("demo", with_template=True)
    with pytest.raises(SpecdecError, match=r"--tokenizer: there is no folder .*absent"):
        encoder_of(str(tmp_path / "absent"), with_template=False)


def test_a_conversation_is_arranged_by_lines_or_by_the_template(tmp_path: Path) -> None:
    said = (("user", "a"), ("assistant", "b"))
    plain = encoder_of("demo", with_template=False)
    assert plain.arrange(said) == plain.encode("a\nb")
    tokenizer = load_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    templated = encoder_of(str(tmp_path), with_template=True)
    assert templated.arrange(said) == plain.encode("user: a;assistant: b;")


@needs_data
def test_medusa_counters_give_the_published_figures(capsys: pytest.CaptureFixture[str]) -> None:
    files = tuple(
        TRACES / f"medusa_vicuna_{size}_mt_bench.jsonl.gz" for size in ("7b", "13b", "33b")
    )
    assert run_replay(ReplayOptions(files, counters=True)) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[4] for line in said[1:4]] == ["2.580", "2.665", "2.532"]


@needs_data
def test_prompt_lookup_on_recorded_answers_gives_known_figures() -> None:
    """With a byte-level BPE of 4,096 tokens, trained on the beginnings of five kinds of text."""
    encoder = byte_level_bpe(4096, five_kinds_of_text(3_000_000))
    prompts = load_prompts(SHARED / "prompts" / "mt_bench.jsonl")
    cases = [
        ("deepseek_v3_0324_oasst_lottery", Reading(limit=150), 1.33),
        ("medusa_vicuna_7b_mt_bench", Reading(prompts=prompts, turn=1), 1.49),
        ("medusa_vicuna_33b_mt_bench", Reading(prompts=prompts, turn=2), 1.90),
        ("gsm8k_model_solutions",
         Reading(limit=200, answer_field="175b_verification.solution"), 1.49),
    ]  # fmt: skip
    sizes = "max_ngram=3,num_draft_tokens=10,tokens_per_match=10"
    method = parse_methods([f"prompt_lookup:{sizes}"])[0]
    for name, reading, wanted in cases:
        answers = encode(read_answers(TRACES / f"{name}.jsonl.gz", reading), encoder)
        found = figures(replay(answers, method, encoder))
        assert abs(found.tau.value - wanted) <= 0.02, name
        assert found.tau.low < wanted < found.tau.high, name


def byte_level_bpe(size: int, texts: list[str]) -> Encoder:
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    size = tokenizer.get_vocab_size()
    return Encoder("test", "0" * 64, size, ids, lambda said: ids("\n".join(t for _, t in said)))


def five_kinds_of_text(characters: int) -> list[str]:
    """The beginning of each: answers, school maths, Shakespeare, short programs, Python itself."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    library = [
        path.read_text(encoding="utf-8", errors="ignore")
        for path in sorted(folder.rglob("*.py"))
        if not left_out & set(path.relative_to(folder).parts)
    ]
    rows = [
        ["\n".join(strings(row.value)) for row in read_rows(SHARED / name)]
        for name in ("train/oasst_pythia12b_1k_prompts.jsonl.gz", "train/gsm8k_train.jsonl.gz",
                     "prompts/mbpp.jsonl")
    ]  # fmt: skip
    rows.insert(2, [(SHARED / "train/tinyshakespeare.txt").read_text(encoding="utf-8")])
    kept = []
    for texts in [*rows, library]:
        left = characters
        for text in texts:
            kept.append(text[: max(left, 0)])
            left -= len(text)
    return [text for text in kept if text]


def strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)
