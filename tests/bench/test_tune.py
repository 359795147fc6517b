"""The tuner: what options declare is tried, real answers decide, the last race alone chooses."""

from __future__ import annotations

import gc
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch

import specdec
from helpers.families import model_of
from specdec.api import capability
from specdec.artifacts.places import DRAFT_HEAD, DRAFT_MODEL, head_path, target_path
from specdec.cost.tuned_file import read_tuned
from specdec.errors import ConfigError, SpecdecError
from specdec.loading import load_model, load_tokenizer
from specdec.method_options import MethodOptions, Range
from specdec.registry import methods
from specdec.stats import GenerationStats
from specdec_bench.measure.arms import ArmSpec, GenerateArm, Workbench
from specdec_bench.measure.loaded import clear_generation_config
from specdec_bench.measure.units import SHORTEST, Unit, padded
from specdec_bench.results.records import Setting, UnitRecord
from specdec_bench.tune import search as search_module
from specdec_bench.tune import tuner as tune_module
from specdec_bench.tune.command import run_tune
from specdec_bench.tune.grid import Grid
from specdec_bench.tune.options import TuneOptions
from specdec_bench.tune.race import PLAIN, Race, Timed, beginning
from specdec_bench.tune.search import Search
from specdec_bench.tune.tuner import grids_of, located, tune

A, B = tuple(range(0, 20, 2)), tuple(range(5))


@dataclass(frozen=True)
class TwoSizes(MethodOptions):
    """Options of the methods that tests register."""

    a: Annotated[int, Range(0, 20, tries=A)] = 7
    b: Annotated[int | None, Range(0, 20, tries=B)] = None
    untried: Annotated[int, Range(0)] = 0

    def check(self) -> None:
        """Not all go together."""
        if self.b is not None and self.a + self.b > 20:
            raise ConfigError("a + b must be at most 20")


class Registered:
    """Drafts as prompt lookup does; somebody else's, as far as the tuner knows."""

    Config = TwoSizes

    def __new__(cls, config: TwoSizes) -> Any:
        """The drafter."""
        sizes = {"num_draft_tokens": config.a + 1}
        return methods.create("prompt_lookup", sizes)


@pytest.fixture
def registered() -> Iterator[list[str]]:
    names = ["first", "second", "third"]
    for name in names:
        methods.register(name, Registered)
    yield names
    for name in names:
        methods.unregister(name)


def make_units(count: int) -> list[Unit]:
    ids = torch.ones(1, 4, dtype=torch.long)
    text = list(range(24))
    return [
        Unit(UnitRecord(0, str(at), str(at), "k", 0, [4], 24, 0.0, ""), at, [[1] * 4], [text], ids,
             ids)
        for at in range(count)
    ]  # fmt: skip


@dataclass
class Stage:
    """Answers that take what a table says; keeps who answered what."""

    seconds: Callable[[ArmSpec, Unit], float]
    answers: list[tuple[str, int]]

    def times(self, name: str) -> Counter[int]:
        """Unit -> answers of a candidate."""
        return Counter(unit for who, unit in self.answers if who == name)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    found = Stage(lambda spec, unit: 1.0, [])
    numbers: dict[str, int] = {}

    def answer(race: Race, arm: GenerateArm, unit: Unit) -> float:
        name = arm.spec.name
        number = numbers.setdefault(name, len(numbers))
        arm.stats = GenerationStats(name, histogram=Counter({2: 10}), drafted_nodes=number)
        if unit.record.new_tokens > SHORTEST:
            found.answers.append((name, unit.index))
        return found.seconds(arm.spec, unit)

    monkeypatch.setattr(Race, "_answer", answer)
    return found


def new_race() -> Race:
    return Race(Workbench(None, None, Setting()))


def search_of(grids: Sequence[str], count: int, lines: list[str] | None = None) -> Search:
    say = (lambda line: None) if lines is None else lines.append
    workbench = Workbench(None, None, Setting())
    return Search(workbench, make_units(count), {name: Grid(name) for name in grids}, 0, say)


def spec_of(method: str, **sizes: Any) -> ArmSpec:
    name = ",".join(f"{option}={value}" for option, value in sizes.items())
    return ArmSpec(f"{method}:{name}", method, sizes)


# --- the grid ---


def test_all_methods_that_need_no_draft_are_tried() -> None:
    options = TuneOptions(target="somewhere")
    without = {name for name in methods.names() if "draft" not in methods.options(name)}
    assert set(grids_of(options)) == without - {"none"}
    assert len(grids_of(options)) >= 5
    with_both = TuneOptions(target="somewhere", head="demo", draft="demo")
    drafts = {name: grid.draft for name, grid in grids_of(with_both).items() if grid.draft}
    assert drafts == {"eagle3": str(head_path()), "draft_model": str(target_path())}
    assert set(grids_of(TuneOptions())) == without - {"none"} | {"eagle3"}


@pytest.mark.parametrize("method", [name for name in methods.names() if name != "none"])
def test_samples_are_accepted_and_spread(method: str) -> None:
    drafts = {name: grid.draft for name, grid in grids_of(
        TuneOptions(draft="demo", methods="draft_model,eagle3")).items()}  # fmt: skip
    grid = Grid(method, drafts.get(method))
    found = grid.sample(12, seed=3)
    assert len({spec.name for spec in found}) == len(found) == 12
    for spec in found:
        methods.configure(method, spec.options)
    known = methods.options(method)
    here = methods.device_defaults(method, on_cpu=True)
    assert {name: found[0].options[name] for name in grid.axes} == {
        name: here.get(name, known[name].default) for name in grid.axes
    }
    for near in grid.around(found[0]):  # one size apart, and of the same kind
        apart = [name for name in grid.axes if near.options[name] != found[0].options[name]]
        assert len(apart) == 1, near.name
    for name, values in grid.axes.items():
        declared = known[name].range
        assert declared is not None
        assert list(values) == sorted(set(values))
        assert all(value in declared for value in values)
        tried = {spec.options[name] for spec in found[1:]}
        assert len(tried) >= min(len(values), 6) - 2, (name, tried)
    assert grid.sample(12, seed=3) == found
    assert grid.sample(12, seed=4) != found
    assert [spec.name for spec in grid.sample(1, seed=5)] == [found[0].name]
    assert 12 < len(grid.sample(100, seed=0)) <= 100


def test_steps_go_to_the_next_value_and_none_is_the_largest(registered: list[str]) -> None:
    grid = Grid("first")
    start = grid.sample(1, 0)[0]
    assert start.options == {"a": 7, "b": None}
    near = [(spec.options["a"], spec.options["b"]) for spec in grid.around(start)]
    assert near == [(6, None), (8, None), (7, 4)]
    ends = spec_of("first", a=18, b=2)
    near = [(spec.options["a"], spec.options["b"]) for spec in grid.around(ends)]
    assert near == [(16, 2), (18, 1)]  # and a + b = 21 is refused
    assert grid.around(ends)[0].name == "first:a=16,b=2"


def test_a_method_that_refuses_everything_says_why() -> None:
    grid = Grid("draft_model", "/nowhere/at/all")
    with pytest.raises(ConfigError, match="/nowhere/at/all"):
        grid.sample(4, 0)


# --- the race ---


def test_every_answer_has_a_plain_one_beside_it(stage: Stage) -> None:
    """In turning order, so that a drift hits all alike."""
    race, units = new_race(), make_units(3)
    specs = [spec_of("m", a=at) for at in range(4)]
    stage.seconds = lambda spec, unit: 1.0 if spec == PLAIN else 0.5 + spec.options["a"] / 10
    race.run(specs, units, 2)
    names = [name for name, _ in stage.answers]
    visits = [names[at : at + 5] for at in range(0, len(names), 5)]
    assert len(visits) == 6
    assert all(sorted(visit) == sorted([PLAIN.name, *race.known]) for visit in visits)
    assert len({visit[0] for visit in visits}) > 2
    ranked = race.ranked(specs)
    assert [found.spec.options["a"] for found in ranked] == [0, 1, 2, 3]
    assert ranked[0].gain.value == pytest.approx(2.0)
    assert all(len(pairs) == 2 for pairs in ranked[0].seconds.values())
    assert ranked[0].to_json()["tau"] == 2.0
    nodes = sorted(found.to_json()["nodes"] for found in ranked)
    assert nodes == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_many_candidates_share_plain_answers_of_their_own_minute(stage: Stage) -> None:
    """A machine that slows down in the middle of a round makes nobody slow."""
    race, units, clock = new_race(), make_units(2), itertools.count()
    specs = [spec_of("m", a=at) for at in range(40)]

    def seconds(spec: ArmSpec, unit: Unit) -> float:
        slow = 1 + next(clock) / 40  # five times as slow at the end
        return slow * (1.0 if spec == PLAIN else 0.5 + spec.options["a"] / 100)

    stage.seconds = seconds
    race.run(specs, units)
    assert all(len(race.known[spec.name].seconds) == 2 for spec in specs)
    for found in race.known.values():
        true = 1 / (0.5 + found.spec.options["a"] / 100)
        assert found.gain.value == pytest.approx(true, rel=0.2)


def test_one_slow_pass_does_not_decide(stage: Stage, registered: list[str]) -> None:
    """All answers to one prompt take four times as long: candidates and plain alike."""

    def seconds(spec: ArmSpec, unit: Unit) -> float:
        slow = 4.0 if unit.index == 3 else 1.0
        return slow * (1.0 if spec == PLAIN else 0.5 + abs(spec.options["a"] - 12) / 40)

    stage.seconds = seconds
    search = search_of(["first"], 8)
    search.run(6)
    best = search.finalists[0]
    assert best.spec.options["a"] == 12
    assert best.gain.value == pytest.approx(2.0)
    assert best.gain.low == pytest.approx(2.0)


def test_what_drafts_the_same_is_there_once(stage: Stage) -> None:
    race, units, specs = new_race(), make_units(2), [spec_of("m", a=1), spec_of("m", a=2)]
    stage.seconds = lambda spec, unit: 1.0 if spec == PLAIN else 1 / spec.options["a"]
    race.run(specs, units)
    slower, faster = race.known.values()
    assert race.ranked(specs) == [faster, slower]
    faster.stats = dict(slower.stats)
    assert race.ranked(specs) == [faster]
    assert race.ranked(specs[:1]) == [slower]


def test_plain_must_run_and_others_may_fail(stage: Stage) -> None:
    def seconds(spec: ArmSpec, unit: Unit) -> float:
        if spec.method == broken and unit.index == 1:
            raise ValueError("it breaks")
        return 1.0

    broken, stage.seconds = "m", seconds
    race, units = new_race(), make_units(2)
    race.run([spec_of("m"), spec_of("n")], units)
    assert race.failed == {"m:": "it breaks"}
    assert list(race.known) == ["n:"]
    broken = PLAIN.method
    with pytest.raises(ValueError, match="it breaks"):
        race.run([spec_of("n")], units)


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    found = load_model("demo", "auto", "cpu")
    clear_generation_config(found)
    specdec.augment(found, "none")
    yield found
    specdec.restore(found)


def real_units(model: Any, prompts: Sequence[Sequence[int]]) -> list[Unit]:
    units = []
    for index, prompt in enumerate(prompts):
        ids, mask = padded([prompt], model)
        output = type(model).generate(model, ids, attention_mask=mask, max_new_tokens=24)
        text = output[:, len(prompt) :].tolist()
        record = UnitRecord(0, str(index), str(index), "k", 0, [len(prompt)], 24, 0.0, "")
        units.append(Unit(record, index, [list(prompt)], text, ids, mask))
    return units


def test_another_text_is_no_answer(model: Any) -> None:
    units = real_units(model, [[3, 4, 5, 6] * 4])
    wrong = [replace(units[0], text_ids=[[*units[0].text_ids[0][:20], 1, 1, 1, 1]])]
    race, specs = Race(Workbench(model, None, Setting())), [spec_of("prompt_lookup")]
    with pytest.raises(SpecdecError, match="another text"):
        race.run(specs, wrong)  # plain is the first that shows it
    race = Race(Workbench(model, None, Setting("bfloat16")))
    race.run(specs, wrong)  # rounds differently, and `bench run` judges that
    assert list(race.known) == ["prompt_lookup:"]


def test_answers_are_timed_by_the_steadier_clock(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[bool] = []

    def sleeps(arm: GenerateArm, unit: Unit) -> list[list[int]]:
        states.append(gc.isenabled())
        time.sleep(0.05)
        return [list(row) for row in unit.text_ids]

    monkeypatch.setattr(GenerateArm, "run", sleeps)
    race, found = Race(Workbench(model, None, Setting())), []
    arm = GenerateArm(PLAIN, race.workbench)
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(race._answer(arm, make_units(1)[0]))
    cpu, wall = found
    assert wall >= 0.05 > 2 * cpu
    assert states == [False, False]


def test_targets_without_trees_are_timed_like_all_others() -> None:
    recurrent = model_of("mamba2", torch.float32)
    clear_generation_config(recurrent)
    specdec.augment(recurrent, "none")
    assert capability(recurrent).mode == "chain"
    units = real_units(recurrent, [[3, 4, 5, 6] * 4, [9, 8, 7] * 5])
    race, specs = Race(Workbench(recurrent, None, Setting())), Grid("prompt_lookup").sample(2, 0)
    race.run(specs, units)
    assert (race.failed, list(race.known)) == ({}, [spec.name for spec in specs])
    assert all(found.to_json()["tau"] >= 1 for found in race.ranked(specs))


# --- the search ---


def test_the_better_half_answers_twice_as_many(stage: Stage, registered: list[str]) -> None:
    lines: list[str] = []
    fast = {"first": 0.5, "second": 0.6, "third": 0.9}

    def seconds(spec: ArmSpec, unit: Unit) -> float:
        return 1.0 if spec == PLAIN else fast[spec.method] + abs(spec.options["a"] - 10) / 50

    stage.seconds = seconds
    search = search_of(registered, 12, lines)
    search.run(8)
    finalists = search.finalists
    said = [line.split(": ")[1].split(" candidates on ") for line in lines if "candidates" in line]
    first = [(int(left), int(on.split()[0])) for left, on in said[:4]]
    assert first == [(24, 1), (12, 2), (6, 4), (3, 8)]
    assert lines[-1] == "float32, batch 1, greedy: the last 2 on all 12 prompts"
    assert finalists[0].spec.method == "first"
    assert finalists[0].spec.options["a"] == 10
    assert finalists[0].gain.value == pytest.approx(2.0)
    assert all(len(found.seconds) == 12 for found in finalists)
    assert all(len(pairs) == 2 for found in finalists for pairs in found.seconds.values())
    # The best of a method that is far behind was not left alone at once.
    third = [name for name in search.known if name.startswith("third")]
    assert max(sum(stage.times(name).values()) for name in third) >= 4
    assert min(sum(stage.times(name).values()) for name in third) == 1
    assert search.skipped == {}
    shown = [row["prompts"] for row in search.table().values()]
    assert shown[:2] == [12, 12]
    assert shown == sorted(shown, reverse=True)


def test_the_best_is_found_between_the_first_sizes(stage: Stage, registered: list[str]) -> None:
    stage.seconds = lambda spec, unit: (
        1.0 if spec == PLAIN else 0.5 + abs(spec.options["a"] - 9) / 50
    )
    search = search_of(["first"], 6)
    search.run(1)
    assert search.finalists[0].spec.options["a"] in (8, 10)  # from 7, in one step or two


@pytest.mark.parametrize(("steady", "method"), [(0.9, "second"), (1.1, "none")])
def test_the_choice_is_by_the_last_race_alone(
    stage: Stage, registered: list[str], steady: float, method: str
) -> None:
    """Whoever was only lucky before is not chosen, and who is shown to pay is."""
    lines: list[str] = []

    def seconds(spec: ArmSpec, unit: Unit) -> float:
        if spec == PLAIN:
            return 1.0
        is_last = "the last" in lines[-1]
        return steady if spec.method == "second" else (1.2 if is_last else 0.5)

    stage.seconds = seconds
    search = search_of(["first", "second"], 6, lines)
    search.run(1)
    choice = search.choice
    assert choice.method == method
    if method != "none":
        assert choice.measured is not None
        assert choice.measured[:2] == pytest.approx((1 / steady, 1 / steady))
        assert choice.predicted == pytest.approx(1 / steady)


def test_without_an_interval_nothing_is_shown_to_pay() -> None:
    search = search_of(["first"], 3)
    assert search.choice.method == "none"
    search.finalists = [Timed(spec_of("m", a=1), {search.units[0]: [(5.0, 1.0)]})]
    assert search.finalists[0].gain.over == "nothing"
    assert search.finalists[0].to_json()["measured"] == [5.0]
    assert search.choice.method == "none"


def test_what_cannot_run_is_skipped_with_its_reason(stage: Stage, registered: list[str]) -> None:
    def seconds(spec: ArmSpec, unit: Unit) -> float:
        if spec.method == "second" or spec.options.get("a") == 0:
            raise SpecdecError(f"{spec.method} breaks")
        return 1.0 if spec == PLAIN else 0.5

    stage.seconds = seconds
    search = search_of(["first", "second"], 3)
    search.run(10)
    assert {found.spec.method for found in search.finalists} == {"first"}
    assert search.skipped == {"second": "second breaks"}
    search = search_of(["second"], 3)
    search.run(3)
    assert (search.finalists, search.choice.method) == ([], "none")
    search = search_of([], 3)
    search.grids = {"draft_model": Grid("draft_model", "/nowhere/at/all")}
    search.run(3)
    assert "/nowhere/at/all" in search.skipped["draft_model"]


def test_a_beginning_is_enough_to_see_that_it_runs() -> None:
    unit = make_units(1)[0]
    short = beginning(unit)
    assert [len(row) for row in short.text_ids] == [SHORTEST]
    assert (short.record.new_tokens, unit.record.new_tokens) == (SHORTEST, 24)


def test_a_draft_is_named_by_its_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "head").mkdir()
    (tmp_path / "head" / "config.json").write_text("{}")
    assert located("head", DRAFT_HEAD) == str(tmp_path / "head")
    assert located("someone/head", DRAFT_HEAD) == "someone/head"
    assert located("demo", DRAFT_HEAD) == str(head_path())
    assert located("demo", DRAFT_MODEL) == str(target_path())


# --- all of it ---


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step only."""
    monkeypatch.setattr(search_module, "_STEPS", 1)


def options(tmp_path: Path, **change: Any) -> TuneOptions:
    start = TuneOptions(output=tmp_path / "tuned.json", limit=3, max_new_tokens=20, candidates=2,
                        methods="prompt_lookup,eagle3")  # fmt: skip
    return replace(start, **change)


def test_tune_writes_a_file_that_augment_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], short: None
) -> None:
    assert run_tune(options(tmp_path)) == 0
    printed = capsys.readouterr()
    assert "chosen: " in printed.out
    assert "measured (95 % interval)" in printed.out
    assert "4 candidates on 1 of 3 prompts" in printed.err
    found = read_tuned(tmp_path / "tuned.json")
    assert (found.dtype, found.threads) == ("float32", 1)
    details = found.details["batches"]["1"]
    assert len(details["candidates"]) >= 4
    assert {row["method"] for row in details["candidates"]} == {"prompt_lookup", "eagle3"}
    for row in details["candidates"]:
        assert row["tau"] >= 1
        assert row["measured"][0] > 0
        assert sorted(row["measured"][1:]) == row["measured"][1:]
    assert found.details["provenance"]["prompts"] == 3
    model, tokenizer = load_model("demo", "auto", "cpu"), load_tokenizer("demo")
    ids = tokenizer("def f(", return_tensors="pt").input_ids
    plain = model.generate(ids, max_new_tokens=16, do_sample=False)
    with specdec.augmented(model, tuned=tmp_path / "tuned.json"):
        assert torch.equal(model.generate(ids, max_new_tokens=16, do_sample=False), plain)
        assert specdec.last_stats(model).method == found.choices[1].method
    json.loads((tmp_path / "tuned.json").read_text(), parse_constant=pytest.fail)


def test_a_drafter_of_ones_own_is_tuned_like_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: None, registered: list[str]
) -> None:
    """By a registered name, and by the place of its class; and the file names it."""
    monkeypatch.setattr(Race, "_answer", _fast_where("first"))
    own = f"{__name__}:Registered"
    search = tune(options(tmp_path, methods=f"first,{own}", candidates=3))[1]
    assert search.choice.method == "first"
    assert {found.spec.method for found in search.known.values()} == {"first", own}
    assert search.skipped == {}
    model = load_model("demo", "auto", "cpu")
    with specdec.augmented(model, tuned=tmp_path / "tuned.json"):
        model.generate(torch.full((1, 4), 7), max_new_tokens=4, do_sample=False)
        assert specdec.last_stats(model).method == "first"


def _fast_where(method: str | None) -> Any:
    """Real answers by a clock of its own: half of plain's time for a method, else four times it."""
    real = Race._answer

    def answer(race: Race, arm: GenerateArm, unit: Unit) -> float:
        real(race, arm, unit)
        return 1.0 if arm.spec == PLAIN else 0.5 if arm.spec.method == method else 4.0

    return answer


def test_do_not_speculate_is_an_answer(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    short: None,
) -> None:
    """Where forwards over several tokens cost what the tokens cost one by one, nothing pays."""
    monkeypatch.setattr(Race, "_answer", _fast_where(None))
    assert run_tune(options(tmp_path, methods="prompt_lookup")) == 0
    assert "do not speculate here" in capsys.readouterr().out
    found = read_tuned(tmp_path / "tuned.json")
    assert (found.choices[1].method, found.choices[1].measured) == ("none", None)
    assert all(row["measured"][0] < 1 for row in found.details["batches"]["1"]["candidates"])


def test_bad_options_are_refused(tmp_path: Path) -> None:
    for change, words in (
        ({"output": None}, "--output is missing"),
        ({"output": tmp_path}, "is a folder"),
        ({"methods": ""}, "names no method"),
        ({"methods": "suffix,suffix"}, "twice"),
        ({"batches": (1, 1)}, "twice"),
        ({"batches": (0,)}, "--batches"),
        ({"limit": 0}, "--limit"),
        ({"candidates": 1000}, "--candidates"),
        ({"max_new_tokens": 3}, "--max-new-tokens"),
    ):
        with pytest.raises(ConfigError, match=words):
            options(tmp_path, **change).check()
    for change, words in (
        ({"target": "somewhere", "methods": "eagle3"}, "--head"),
        ({"methods": "draft_model"}, "--draft"),
        ({"head": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"methods": "none"}, "nothing to tune in method 'none'"),
        ({"methods": "telepathy"}, "unknown method 'telepathy'"),
        ({"output": tmp_path / "tuned.json" / "below"}, "cannot write --output"),
        ({}, "--overwrite"),
    ):
        (tmp_path / "tuned.json").write_text("mine")
        new = {"output": tmp_path / "new.json"} if "output" not in change and change else {}
        with pytest.raises(ConfigError, match=words):
            tune(options(tmp_path, **{**new, **change}))
    assert (tmp_path / "tuned.json").read_text() == "mine"
    assert not (tmp_path / "new.json").exists()


def test_too_few_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs two batches"):
        tune(options(tmp_path, limit=1))


def test_a_target_that_cannot_speculate_says_so(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = replace(capability(model), mode="plain", reason="it folds every token into one state")
    monkeypatch.setattr(tune_module, "capability", lambda _: plain)
    with pytest.raises(SpecdecError, match="demo cannot be sped up: it folds"):
        tune(options(tmp_path))
