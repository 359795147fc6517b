"""`run` on the bundled target: nothing leaks, nothing wrong passes, nothing is measured twice."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import specdec.loop
from specdec.errors import ConfigError, SpecdecError
from specdec.round.tree import TreeBatch
from specdec.round.verify import verify
from specdec_bench import RunOptions, read_results, run
from specdec_bench.arm_names import parse_arm
from specdec_bench.contracts import Unit, Workbench
from specdec_bench.measure.arms import GenerateArm
from specdec_bench.measure.command import run_run
from specdec_bench.measure.loaded import Loaded
from specdec_bench.measure.measuring import BurstWatch, warm_up
from specdec_bench.measure.schedule import Stopping, Timings, order
from specdec_bench.measure.units import text_hash
from specdec_bench.results.records import Results, Setting, TimeRecord, UnitRecord
from specdec_bench.summary.summarize import summarize

CODE = "class Stack:\n    def push(self, item):\n        self.items.append(item)\n\n"
PROMPTS = [
    {"id": "a", "category": "code", "turns": [CODE, "    def peek(self):\n"]},
    {"id": "b", "category": "code", "prompt": "import os\nimport sys\n\ndef main(argv=None):\n"},
    {"id": "c", "category": "text", "prompt": "def parse(path):\n    with open(path) as stream:\n"},
]
ARMS = ("hf", "hf_prompt_lookup", "prompt_lookup", "suffix+store", "eagle3:depth=3,top_k=1")
SIZES = {"max_new_tokens": 24, "pairs": 2}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tasks") / "prompts.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    return str(path)


class Broken:
    name, counts_rounds, in_process = "broken", False, True

    def run(self, unit: Unit) -> list[list[int]]:
        raise MemoryError("no room")


class Later:
    """Works when warmed up, and fails when timed."""

    name, counts_rounds, in_process = "later", False, True

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def run(self, unit: Unit) -> list[list[int]]:
        self.calls[unit.record.unit] += 1
        if self.calls[unit.record.unit] > 1:
            raise RuntimeError("worn out")
        return [list(row) for row in unit.text_ids]


class Spying:
    """Ours, and it keeps the units for the tests."""

    def __init__(self, seen: list[Unit]) -> None:
        self.seen = seen

    def __call__(self, bench: Workbench) -> Any:
        seen = self.seen

        class Spy(GenerateArm):
            def answer(self, unit: Unit, *args: Any, **more: Any) -> list[list[int]]:
                if unit not in seen:
                    seen.append(unit)
                return super().answer(unit, *args, **more)

        return Spy(replace(parse_arm("prompt_lookup"), name="spy"), bench)


@pytest.fixture(scope="module")
def measured(tasks: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, list[Unit]]:
    seen: list[Unit] = []
    extra = {"broken": lambda _: Broken(), "later": lambda _: Later(), "spy": Spying(seen)}
    path = tmp_path_factory.mktemp("run") / "run.jsonl"
    options = RunOptions(tasks=(tasks,), arms=ARMS, output=path, **SIZES)
    return run(options, extra_arms=extra), seen


def test_every_arm_answers_every_unit_in_balanced_order(
    measured: tuple[Results, list[Unit]],
) -> None:
    found, _ = measured
    good = [arm for arm in found.header.arms if arm not in ("broken", "later")]
    assert good == ["loop0", "loop0_again", *ARMS, "spy"]
    assert len(found.units) == 4
    timed = Counter((t.arm, t.unit) for t in found.times if not t.error)
    assert set(timed.values()) == {2}
    assert set(timed) == {(arm, unit) for arm in good for _, unit in found.units}
    places = {(t.unit, t.pair): set() for t in found.times if not t.error}
    for taken in found.times:
        places.setdefault((taken.unit, taken.pair), set()).add((taken.order, taken.arm))
        assert taken.error or (taken.wall > 0 and taken.cpu is not None and taken.cpu > 0)
    assert {arm for _, arm in places["prompts/a.1", 0]} > set(good)


def test_a_failing_arm_is_an_error_and_the_others_go_on(
    measured: tuple[Results, list[Unit]],
) -> None:
    found, _ = measured
    errors = [t for t in found.times if t.error]
    assert Counter(t.arm for t in errors) == {"broken": 4, "later": 4}
    assert {t.error for t in errors if t.arm == "broken"} == {"MemoryError: no room"}
    assert {t.error for t in errors if t.arm == "later"} == {"RuntimeError: worn out"}
    assert {t.wall for t in errors} == {0.0}


def test_texts_are_plains_and_were_looked_at(measured: tuple[Results, list[Unit]]) -> None:
    found, _ = measured
    assert {check.verdict for check in found.checks} == {"exact"}
    looked_at = {(c.arm, c.unit, c.text_sha256) for c in found.checks}
    assert {(t.arm, t.unit, t.text_sha256) for t in found.times if not t.error} <= looked_at
    units = {unit: record.text_sha256 for (_, unit), record in found.units.items()}
    assert all(t.text_sha256 == units[t.unit] for t in found.times if not t.error)


def test_the_second_turn_continues_plains_first_answer(
    measured: tuple[Results, list[Unit]],
) -> None:
    found, seen = measured
    first, second = (next(u for u in seen if u.record.unit.endswith(f"a.{n}")) for n in (1, 2))
    assert first.record.cluster == second.record.cluster
    joined = [*first.prompt_ids[0], *first.text_ids[0]]
    assert list(second.prompt_ids[0])[: len(joined) - 2] == joined[:-2]
    assert text_hash(first.text_ids) == first.record.text_sha256
    assert len(found.units) == len(seen)


def test_passes_agree_with_what_came_out(measured: tuple[Results, list[Unit]]) -> None:
    found, _ = measured
    for (_, unit, arm), passed in found.passes.items():
        wanted = found.units[0, unit].new_tokens
        emitted = sum(int(n) * times for n, times in passed.histogram.items())
        burst = sum(tokens for tokens, _ in passed.gaps)
        assert sum(passed.sizes.values()) == passed.rounds
        assert 0 < passed.first_token < passed.seconds
        if arm == "hf":
            assert (passed.histogram, burst) == ({}, wanted - 1)
            continue
        assert burst == emitted, "bursts seen from outside are the rounds that the loop counted"
        if arm != "hf_prompt_lookup":  # its first forward verifies a draft already
            assert emitted == wanted - 1
            assert Counter(str(tokens) for tokens, _ in passed.gaps) == passed.histogram
        if arm in ("loop0", "loop0_again"):
            assert passed.sizes == {"1": passed.rounds}
        assert passed.chain or arm == "suffix+store"
    drafting = [p for (_, _, arm), p in found.passes.items() if arm.startswith("eagle3")]
    assert all(p.drafted > 0 and set(p.stages) > {"draft", "forward"} for p in drafting)


def test_repeats_of_one_prompt_never_see_an_earlier_answer(
    measured: tuple[Results, list[Unit]],
) -> None:
    """The histogram of every repeat is that of the first; a drafter that remembers is caught."""
    _, seen = measured
    bench = Workbench(Loaded(RunOptions(), "float32").model, None, Setting())
    unit = next(u for u in seen if u.record.unit.endswith("b"))

    def repeats(arm: GenerateArm) -> list[dict[int, int]]:
        found = []
        for _ in range(3):
            arm.run(unit)
            found.append(dict(arm.stats.histogram))  # type: ignore[union-attr]
        return found

    for name in ("prompt_lookup", "suffix", "lookahead:window=2,ngram=3,guesses=2", "recycling"):
        first, *others = repeats(GenerateArm(parse_arm(name), bench))
        assert others == [first, first], name
    leaky = parse_arm("lookahead:window=2,ngram=3,guesses=2")
    leaky = replace(leaky, options={**leaky.options, "keep_pool": True})
    first, second, _ = repeats(GenerateArm(leaky, bench))
    assert second != first, "the test can fail"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("lookahead:keep_pool=true", "keep_pool keeps texts"),
        ("suffix:store=folder", "store keeps texts"),
        ("recycling:keep_matrix=yes", "keep_matrix keeps texts"),
        ("jacobi+store", "jacobi has no store"),
        ("guess", "unknown method 'guess'"),
        ("", "unknown method ''"),
        ("prompt_lookup:length=3", "no option 'length'"),
        ("prompt_lookup:max_ngram=x", "whole number"),
        ("eagle3:depth=0", "depth"),
        ("eagle3:budget=-1", "budget must be a whole number"),
        ("eagle3:kernels=cuda", "kernels must be one of auto, triton, reference, off, got 'cuda'"),
        ("hf:fast", "hf takes no options"),
        ("hf_assisted:num_tokens=0", "num_tokens=N"),
        ("server:localhost", "takes an address"),
    ],
)
def test_bad_arms_are_refused(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_arm(spec)


def test_an_arm_names_its_kernels(measured: tuple[Results, list[Unit]]) -> None:
    bench, unit = Workbench(Loaded(RunOptions(), "float32").model, None, Setting()), measured[1][0]
    reasons = []
    for kernels in ("off", "reference"):
        arm = GenerateArm(parse_arm(f"prompt_lookup:max_ngram=3,kernels={kernels}"), bench)
        arm.run(unit)
        assert arm.stats is not None
        reasons.append("with tree attention" in arm.stats.mode_reason)
    assert reasons == [False, True]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arms": ("hf", "hf")}, "twice"),
        ({"arms": ("hf", " hf")}, "twice"),
        ({"batches": (0,)}, "--batches"),
        ({"temperatures": (float("nan"),)}, "--temperatures"),
        ({"until_ci": 1.0}, "--until-ci"),
        ({"time_budget": -1.0}, "--time-budget"),
        ({"max_new_tokens": 15}, "--max-new-tokens"),
        ({"resume": True, "overwrite": True}, "not both"),
        ({"dtypes": ("int8",)}, "--dtypes"),
        ({"max_new_tokens": 1024}, "no room for a prompt"),
        ({"target": "/nowhere"}, "no folder"),
        ({"tasks": ("/nowhere",)}, "/nowhere"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecdecError, match=words):
        run(RunOptions(**{"output": tmp_path / "x.jsonl", "limit": 1, **options}))


def lossy(trees: TreeBatch, picks: torch.Tensor) -> Any:
    """Accepts the first draft token unchecked."""
    if trees.size > 1:
        picks = picks.clone()
        picks[:, 0] = trees.tokens[:, 1]
    return verify(trees, picks)


def test_a_lossy_verifier_is_found_and_gets_no_speed_up(
    tasks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(specdec.loop, "verify", lossy)
    arms = ("hf", "recycling:nodes=8")
    path = tmp_path / "run.jsonl"
    code = run_run(RunOptions(tasks=(tasks,), arms=arms, output=path, **SIZES | {"pairs": 1}))
    assert code == 1
    said = capsys.readouterr().out
    row = next(line for line in said.splitlines() if line.startswith("recycling"))
    assert "WRONG" in row
    assert "×" not in row  # noqa: RUF001
    assert "recycling:nodes=8: WRONG TEXT" in said
    verdicts = {(c.arm, c.verdict) for c in read_results(path).checks}
    assert ("recycling:nodes=8", "wrong") in verdicts
    assert {v for arm, v in verdicts if arm != "recycling:nodes=8"} == {"exact"}


@pytest.mark.parametrize(
    ("arms", "wanted"),
    [
        (("none", "prompt_lookup"), ["hf", "prompt_lookup"]),
        (("prompt_lookup", "hf"), ["prompt_lookup", "hf"]),
    ],
)
def test_plain_generate_is_always_there(
    arms: tuple[str, ...], wanted: list[str], tasks: str, tmp_path: Path
) -> None:
    """Without it, nothing says what the loop itself costs a user."""
    sizes = {"max_new_tokens": 16, "pairs": 1, "limit": 1}
    found = run(RunOptions(tasks=(tasks,), arms=arms, output=tmp_path / "run.jsonl", **sizes))
    assert found.header.arms == ["loop0", "loop0_again", *wanted]
    assert summarize(found).settings[0].loop_gain is not None


@pytest.mark.parametrize("arms", range(2, 9))
def test_every_arm_has_every_place_and_follows_every_other_as_often(arms: int) -> None:
    places: Counter[tuple[int, int]] = Counter()
    follows: Counter[tuple[int, int]] = Counter()
    for pair in range(2):
        for unit in range(arms):
            row = order(arms, pair, unit)
            assert sorted(row) == list(range(arms))
            places.update(enumerate(row))
            follows.update(itertools.pairwise(row))
    assert set(places.values()) == {2}
    assert set(follows.values()) == {2}
    assert len(follows) == arms * (arms - 1)
    assert order(arms, 1, 3) == order(arms, 0, 3)[::-1]


def timings(ratio: float, pairs: int) -> Timings:
    units = [UnitRecord(0, f"u{i}", f"c{i}", "k", 0, [1], 20, 0.0, "") for i in range(8)]
    found = Timings(units, "loop0", by_cpu=False)
    for number, unit in enumerate(units):
        for pair in range(pairs):
            noise = 1 + 0.002 * (number % 3) + 0.0001 * pair
            for arm, seconds in (("loop0", ratio * noise), ("x", 1.0)):
                found.add(TimeRecord(0, unit.unit, arm, pair, 0, seconds, None, ""))
    return found


def test_timing_stops_by_pairs_interval_or_budget() -> None:
    narrow = timings(1.5, 3)
    assert narrow.widest() < 0.01
    assert Stopping(5).reason(3, narrow) == ""
    assert Stopping(3).reason(3, narrow) == "pairs"
    assert Stopping(200, until_ci=0.01).reason(3, narrow) == "until-ci"
    assert Stopping(200, until_ci=1e-6).reason(3, narrow) == ""
    assert Stopping(200, until_ci=0.01).reason(1, narrow) == "", "one repeat is not believed"
    assert Stopping(200, seconds=1e-9).reason(0, narrow) == "", "every arm is timed once"
    assert Stopping(200, seconds=1e-9).reason(1, narrow) == "time-budget"
    assert Timings([], "loop0", by_cpu=True).widest() == float("inf")


def test_bursts_are_what_comes_between_two_forwards() -> None:
    model = torch.nn.Module()
    model.forward = lambda input_ids: None  # type: ignore[method-assign]
    watch = BurstWatch(model, batch=2)
    with watch.watching():
        watch.put(torch.zeros(2, 5))
        for width, tokens in ((5, 1), (4, 3), (1, 1)):
            model(input_ids=torch.zeros(2, width))
            for _ in range(tokens):
                watch.put(torch.zeros(2))
    model(input_ids=torch.zeros(2, 9))
    assert watch.widths == [5, 4, 1]
    assert [tokens for tokens, _ in watch.bursts] == [1, 3, 1]


def test_a_warm_up_sees_chains_and_trees(measured: tuple[Results, list[Unit]]) -> None:
    _, seen = measured
    bench = Workbench(Loaded(RunOptions(), "float32").model, None, Setting())
    for name, chain in (("prompt_lookup", True), ("recycling:nodes=8", False)):
        rows, looked = warm_up(GenerateArm(parse_arm(name), bench), seen[0])
        assert looked.chain is chain
        assert [token for tokens in looked.rounds for token in tokens] == rows[0]
