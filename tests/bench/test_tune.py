"""The tuner: predictions are what real answers show, and the choice follows the clock."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import specdec
import specdec_bench.tune.tuner as tune_module
from helpers.families import model_of
from specdec.artifacts.places import DRAFT_HEAD, DRAFT_MODEL, head_path, target_path
from specdec.cost.tuned_file import read_tuned
from specdec.errors import ConfigError, SpecdecError
from specdec.loading import load_model, load_tokenizer
from specdec_bench.measure.arms import Workbench
from specdec_bench.measure.runner import clear_generation_config
from specdec_bench.measure.units import SHORTEST, Maker, Unit, padded
from specdec_bench.results.records import CurveRecord, Setting, UnitRecord
from specdec_bench.summary.intervals import Ratio
from specdec_bench.tasks import load_tasks
from specdec_bench.tune import search as tune_search
from specdec_bench.tune import timing as tune_timing
from specdec_bench.tune.command import run_tune
from specdec_bench.tune.forced import STATE_READERS, force, verifies_trees
from specdec_bench.tune.grid import Candidate, Grid, climb, grid_of, tunable
from specdec_bench.tune.measured import PLAIN, Bench, Rounds, beginning
from specdec_bench.tune.options import TuneOptions, check_tune_options
from specdec_bench.tune.replayed import replay
from specdec_bench.tune.search import Forecast, best_of, text_rounds
from specdec_bench.tune.timing import Race
from specdec_bench.tune.tuner import tune

CURVE = CurveRecord("float32", 1, {"1": 1.0, "4": 1.2, "16": 2.0, "64": 5.0})


def candidate(method: str, **options: Any) -> Candidate:
    return Candidate(method, tuple(options.items()))


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    found = load_model("demo", "auto", "cpu")
    clear_generation_config(found)
    specdec.augment(found, "none")
    yield found
    specdec.restore(found)


@cache
def make_bench(model: Any, batch: int) -> Bench:
    tokenizer, setting = load_tokenizer("demo"), Setting(batch=batch)
    drafts = {DRAFT_HEAD: lambda: str(head_path())}
    workbench = Workbench(model, tokenizer, setting, drafts)
    maker = Maker(model, tokenizer, setting, workbench.sampling(), 56, frozenset())
    units, _ = maker.make(0, load_tasks(["smoke"], limit=3 * batch))
    return Bench(workbench, units, CURVE)


@pytest.fixture(scope="module")
def bench(model: Any) -> Bench:
    return make_bench(model, 1)


# --- predictions against real answers ---


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "tried",
    [
        candidate("prompt_lookup", max_ngram=2, num_draft_tokens=3, tokens_per_match=5),
        candidate("suffix", max_nodes=7, extra_nodes=1, min_probability=0.35),
        candidate("suffix"),
    ],
    ids=str,
)
def test_replayed_rounds_are_the_real_ones(model: Any, batch: int, tried: Candidate) -> None:
    bench = make_bench(model, batch)
    assert bench.units
    for unit in bench.units[:2]:
        real, replayed = bench.run(tried, [unit]), replay(tried, unit, 4096)
        assert replayed.tokens == real.tokens
        assert replayed.sizes == real.sizes
        assert len(replayed.stages["draft"]) == len(replayed.sizes)


@pytest.mark.parametrize("batch", [2])
def test_trees_of_all_sizes_come_from_one_pass(model: Any, batch: int) -> None:
    """Tokens and sizes of every round, but for the last ones of a text, where drafts are cut."""
    bench = make_bench(model, batch)
    units = bench.units[:2]
    options: dict[str, Any] = {"depth": 5, "top_k": 8, "nodes": 300, "draft": str(head_path())}
    assert options.keys() >= STATE_READERS["eagle3"].keys()
    forced = force("eagle3", options, model, units)
    for sizes in (
        {"depth": 3, "top_k": 1, "nodes": 63, "confidence_threshold": 0.0},
        {"depth": 5, "top_k": 1, "nodes": 63, "confidence_threshold": 0.05},
        {"depth": 4, "top_k": 3, "nodes": 7, "confidence_threshold": 0.0},
        {"depth": 5, "top_k": 8, "nodes": 31, "confidence_threshold": 0.0},
        {"depth": 4, "top_k": 3, "beam": 1, "nodes": 7, "confidence_threshold": 0.0},
        {"depth": 4, "top_k": 6, "beam": 2, "nodes": 15, "confidence_threshold": 0.0},
        {"depth": 5, "top_k": 4, "nodes": 15, "confidence_threshold": 0.1},
    ):
        tried = Candidate("eagle3", tuple(sizes.items()))
        simulated, levels = forced.simulate(tried)
        real = bench.run(tried, units)
        assert sum(simulated.tokens) == sum(real.tokens)
        assert len(simulated.sizes) == pytest.approx(len(real.sizes), abs=1)
        assert simulated.tau == pytest.approx(real.tau, rel=0.02)
        assert simulated.nodes == pytest.approx(real.nodes, rel=0.12, abs=0.3)
        assert 1 <= levels <= sizes["depth"]


def test_every_part_is_like_all_of_them(bench: Bench) -> None:
    first = bench.units[0]
    units = [replace(first, record=replace(first.record, unit=str(i))) for i in range(9)]
    own = Bench(bench.workbench, units, CURVE)
    own.text_rounds = [[rounds] for rounds in (40, 40, 10, 10, 25, 25, 40, 10, 25)]
    parts = [[int(unit.record.unit) for unit in own.part(number)] for number in range(3)]
    assert sorted(itertools.chain(*parts)) == list(range(9))
    assert [sum(own.text_rounds[i][0] for i in part) for part in parts] == [75] * 3
    assert own.part(1) == own.part(1)
    assert [len(rounds) for rounds in text_rounds(bench)] == [4] * len(bench.units)


@pytest.mark.parametrize("count", range(2, 12))
def test_parts_of_few_units_overlap(bench: Bench, count: int) -> None:
    units = [replace(bench.units[0]) for _ in range(count)]
    own = Bench(bench.workbench, units, CURVE, text_rounds=[[10]] * count)
    parts = [own.part(number) for number in range(3)]
    assert all(2 <= len(part) == len({id(unit) for unit in part}) for part in parts)
    everyone = [id(unit) for part in parts for unit in part]
    assert set(everyone) == {id(unit) for unit in units}
    assert len(everyone) == max(count, 6)


def test_one_slow_round_does_not_count() -> None:
    rounds = Rounds([3] * 5, [2] * 5, {"draft": [1.0, 1.0, 50.0, 1.0, 1.0]})
    assert rounds.costs().stages["draft"] == 5.0
    assert rounds.costs({"draft": 2.0}).stages["draft"] == 10.0
    assert (rounds.tau, rounds.nodes) == (2.0, 2.0)
    assert Rounds().tau == 0.0


def test_plain_is_measured_on_beginnings(model: Any) -> None:
    bench = make_bench(model, 2)
    own = Bench(bench.workbench, bench.units, CURVE)
    own.measure_plain()
    for unit, rounds in zip(own.units, own.plain, strict=True):
        assert unit.record.new_tokens > SHORTEST
        assert rounds.sizes == [1] * (unit.record.new_tokens - 1)
        assert len(rounds.tokens) == 2 * len(rounds.sizes)
        assert len(rounds.stages["forward"]) == SHORTEST - 1
        assert rounds.prefill > 0
    assert own.passes == len(own.units) + 1
    short = beginning(own.units[0], SHORTEST)
    assert [len(row) for row in short.text_ids] == [SHORTEST] * 2
    assert beginning(short, SHORTEST) is short


def test_a_pass_is_put_at_the_pace_of_plain(bench: Bench) -> None:
    """A machine that was half as fast while a method was looked at does not make it slow."""
    own = Bench(bench.workbench, bench.units, CURVE)
    own.plain = [Rounds([1] * 9, [1] * 9, {"forward": [1.0] * 9}) for _ in own.units]
    looked_at = Rounds([4] * 5, [2] * 5, {"draft": [0.6] * 5, "forward": [2.4] * 5})
    assert own.paced(looked_at)["draft"] == pytest.approx(0.3)  # forwards over 4 tokens take 1.2
    assert own.paced(looked_at)["forward"] == pytest.approx(1.2)
    own.curve = CurveRecord("float32", 1, {})
    assert own.paced(looked_at)["draft"] == 0.6


def test_few_answers_tell_what_all_drafts_cost(bench: Bench, monkeypatch: Any) -> None:
    """Of eagle3: one level; four of a chain, a beam of one, the narrowest and the widest trees."""
    seconds = {(1, 1, 10): 1.0, (4, 1, 10): 2.5, (4, 2, 1): 3.0, (4, 2, 10): 4.0, (4, 10, 10): 8.0}
    asked: list[tuple[int, int, int]] = []

    def run(candidate: Candidate, units: list[Unit]) -> Rounds:
        sizes = candidate.mapping
        assert [unit.record.new_tokens for unit in units] <= [32]
        asked.append((sizes["depth"], sizes["top_k"], sizes["beam"]))
        return Rounds([1], [1], {"draft": [seconds[asked[-1]]], "forward": [1.0]})

    own = Bench(bench.workbench, bench.units, CurveRecord("float32", 1, {}))
    monkeypatch.setattr(own, "run", run)
    search, grid = tune_search.Search(own, "eagle3"), grid_of("eagle3", on_cpu=True)

    def draft(width: int, levels: float, beam: int = 10) -> float:
        sizes = {"depth": 5, "top_k": width, "beam": beam, "nodes": 63, "confidence_threshold": 0.0}
        return search._draft_costs(candidate("eagle3", **sizes), grid, levels)["draft"]

    assert draft(1, 4.0) == 2.5
    assert draft(1, 2.0) == pytest.approx(1.5)
    assert draft(1, 7.0) == pytest.approx(4.0)
    assert draft(2, 4.0) == 4.0
    assert draft(6, 4.0) == 6.0
    assert draft(10, 4.0) == 8.0
    assert draft(10, 4.0, beam=2) == 4.0
    assert draft(10, 4.0, beam=1) == draft(3, 4.0, beam=1) == 3.0
    assert draft(10, 1.0) == draft(2, 0.5) == 1.0
    assert sorted(asked) == sorted(seconds)


# --- the grid and the way through it ---


def test_every_grid_is_made_of_candidates_that_exist() -> None:
    for method in tunable():
        grid = grid_of(method, on_cpu=True)
        candidates = grid.candidates()
        assert len(set(candidates)) == len(candidates) > 10
        for start in grid.starts:
            assert grid.at(tuple(start)) in set(candidates), (method, start)
    heads = [candidate.mapping for candidate in grid_of("eagle3", True).candidates()]
    assert not any(sizes["depth"] == 1 and sizes["confidence_threshold"] for sizes in heads)
    assert not any(c.mapping["confidence_threshold"] for c in grid_of("eagle3", False).candidates())
    with pytest.raises(ConfigError, match="nothing to tune in method 'none'"):
        grid_of("none", on_cpu=True)


def test_climbs_find_the_top_and_ask_once() -> None:
    grid, asked = Grid("x", {"a": range(20), "b": range(20)}, ((0, 0), (19, 19))), []

    def value(found: Candidate) -> float | None:
        asked.append(found)
        a, b = found.mapping["a"], found.mapping["b"]
        return None if (a, b) == (5, 5) else -abs(a - 7) - abs(b - 12)

    grid_methods = _accepting("x")
    with grid_methods:
        found = climb(grid, value, 500)
        assert max(found, key=lambda c: found[c]).mapping == {"a": 7, "b": 12}
        assert len(asked) == len(set(asked)) < 50  # looking all around at every step takes 98
        asked.clear()
        assert len(climb(grid, value, 7)) <= 7
        assert len(asked) == 7
        assert climb(grid, lambda _: None, 10) == {}


class _accepting:
    """A method with options a and b, for as long as the block runs."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        from dataclasses import make_dataclass

        from specdec.drafters.prompt_lookup import PromptLookup

        config = make_dataclass("Config", [("a", int, 0), ("b", int, 0)], frozen=True)
        specdec.register_drafter(self._name, type("Two", (PromptLookup,), {"Config": config}))

    def __exit__(self, *_: object) -> None:
        from specdec.registry import methods

        methods.unregister(self._name)


def test_the_best_of_each_method_are_timed_unless_hopeless() -> None:
    def forecasts(method: str, *values: float) -> list[Forecast]:
        return [Forecast(candidate(method, n=i), value, 2.0 + 0.2 * i, 5.0 + i)
                for i, value in enumerate(values)]  # fmt: skip

    found = {
        "a": forecasts("a", 2.0, 1.99, 1.98, 1.97, 1.96),
        "b": forecasts("b", 1.9, 1.2),
        "c": forecasts("c", 1.1),
        "d": [],
    }
    chosen = best_of(found, 4, 3)
    assert [str(c) for c in chosen] == ["a:n=0", "b:n=0", "a:n=1", "a:n=2"]
    twins = [Forecast(candidate("a", n=i), 2.0 - i / 100, 3.0, 8.0) for i in range(5)]
    assert len(best_of({"a": twins}, 4, 4)) == 1
    assert best_of({}, 4, 4) == []


# --- the race ---


class FakeRace(Race):
    """Answers take what a table says, on a clock of their own."""

    speeds: dict[str, float]
    now = 0.0

    def _once(self, candidate: Candidate, unit: Unit) -> float:
        self.timings += 1
        if candidate.method == "breaks":
            raise SpecdecError("it breaks")
        return self.speeds[candidate.method] * (1 + 0.5 * self.bench.units.index(unit))


def test_the_race_ends_with_the_fastest(bench: Bench) -> None:
    bench.text_rounds = [[10]] * len(bench.units)
    race = FakeRace(bench)
    race.speeds = {"none": 1.0, **{f"m{i}": 0.5 + 0.1 * i for i in range(8)}}
    entrants = [candidate(f"m{i}") for i in (3, 0, 7, 5, 1, 2, 6, 4)] + [candidate("breaks")]
    left = race.run(entrants)
    assert [c.method for c in left] == ["m0", "m1"]
    assert race.finalists == left
    assert race.gain(left[0]).value == pytest.approx(2.0)
    assert race.failed == {candidate("breaks"): "it breaks"}
    # Losers were left alone after the first rounds.
    answers = {c: sum(map(len, found.values())) for c, found in race.seconds.items()}
    assert answers[candidate("m7")] < answers[candidate("m0")]


def test_every_answer_has_one_plain_answer_beside_it(bench: Bench) -> None:
    """Whoever comes first in a repeat is another one every time: a drift hits all alike."""
    order: list[str] = []

    class Noted(FakeRace):
        def _once(self, candidate: Candidate, unit: Unit) -> float:
            order.append(candidate.method)
            return super()._once(candidate, unit)

    race = Noted(bench)
    race.speeds = {"none": 1.0, "a": 0.5, "b": 0.8}
    race.time([candidate("a"), candidate("b"), candidate("breaks")], bench.units[:1], 1)
    order.clear()
    race.time([candidate("a"), candidate("b"), candidate("breaks")], bench.units, 2)
    repeats = [order[at : at + 3] for at in range(0, len(order), 3)]
    assert len(repeats) == 2 * len(bench.units)
    assert all(sorted(arms) == ["a", "b", "none"] for arms in repeats)
    assert {arms[0] for arms in repeats} == {"a", "b", "none"}
    assert race.gain(candidate("a")).value == pytest.approx(2.0)
    assert [len(found) for found in race.seconds[candidate("a")].values()] == [3, 2, 2]


def test_rounds_shrink_and_look_at_other_prompts(bench: Bench) -> None:
    units = [replace(bench.units[0]) for _ in range(9)]
    own = Bench(bench.workbench, units, CURVE, text_rounds=[[10]] * 9)
    seen: dict[int, set[str]] = {}

    class Noted(FakeRace):
        def _once(self, candidate: Candidate, unit: Unit) -> float:
            seen.setdefault(units.index(unit), set()).add(candidate.method)
            return super()._once(candidate, unit)

    race = Noted(own)
    race.speeds = {"none": 1.0, **{f"m{i}": 0.5 + 0.1 * i for i in range(12)}}
    assert len(race.run([candidate(f"m{i}") for i in range(12)])) == 2
    counts = [{len(seen[units.index(unit)]) - 1 for unit in own.part(part)} for part in range(3)]
    assert counts == [{2}, {12}, {5}]  # the last round is on all of them
    assert len(race.final[candidate("m0")]) == 9
    assert [len(repeats) for repeats in race.final[candidate("m1")].values()] == [2] * 9


def test_plain_must_run(bench: Bench) -> None:
    class Broken(FakeRace):
        def _once(self, candidate: Candidate, unit: Unit) -> float:
            if candidate == PLAIN:
                raise SpecdecError("plain is broken")
            return super()._once(candidate, unit)

    race = Broken(bench)
    race.speeds = {"a": 1.0}
    with pytest.raises(SpecdecError, match="plain is broken"):
        race.time([candidate("a")], bench.units, 1)


def test_the_choice_is_by_the_last_round_alone(bench: Bench) -> None:
    """A candidate that was only lucky before is none, and one that is shown to pay is chosen."""
    bench.text_rounds = [[10]] * len(bench.units)
    lucky, steady = candidate("lucky"), candidate("steady")

    class Late(FakeRace):
        """Lucky is fast while finalists are chosen, and slower than plain when it counts."""

        def _time_unit(self, left: Any, unit: Unit, shift: int, is_last: bool) -> None:
            self.speeds = {**self.speeds, "lucky": 1.2 if is_last else 0.5}
            super()._time_unit(left, unit, shift, is_last)

    for speeds, chosen in (
        ({"none": 1.0, "lucky": 0.5, "steady": 0.9, "slow": 2.0}, "steady"),
        ({"none": 1.0, "lucky": 0.5, "steady": 1.1, "slow": 2.0}, "none"),
    ):
        race = Late(bench)
        race.speeds = speeds
        race.run([lucky, steady, candidate("slow")])
        assert set(race.finalists) == {lucky, steady}
        forecasts = [Forecast(c, 1.5, 2.0, 4.0) for c in race.finalists]
        found = tune_module._choose(race, forecasts, TuneOptions())
        assert found.method == chosen
        if chosen != "none":
            assert found.measured is not None
            assert found.measured[1] > 1
            assert found.measured[0] == pytest.approx(1 / 0.9)


def test_trees_are_forced_on_one_part_of_the_prompts(bench: Bench, short: None) -> None:
    units = [replace(unit) for unit in (*bench.units, *bench.units)]
    own = Bench(bench.workbench, units, CURVE, text_rounds=text_rounds(bench) * 2)
    own.measure_plain()
    before = own.passes
    search = tune_search.Search(own, "eagle3")
    assert search.run()
    assert search._forced is not None
    grown = [len(rows[0]) for rows in search._forced.grown]
    assert grown == [unit.record.new_tokens for unit in own.part(0)]
    assert len(grown) < len(units)
    assert own.passes - before <= len(grown) + 4


def test_without_an_interval_nothing_is_shown_to_pay(bench: Bench) -> None:
    class One(FakeRace):
        def final_gain(self, candidate: Candidate) -> Ratio:
            return Ratio(5.0, 0.0, math.inf, "nothing")

    race = One(bench)
    race.finalists = [candidate("a")]
    assert tune_module._choose(race, [], TuneOptions()).method == "none"


def test_answers_are_timed_by_both_clocks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import time

    states: list[bool] = []

    class Sleeper:
        def run(self, unit: Unit) -> None:
            states.append(gc.isenabled())
            time.sleep(0.05)

    monkeypatch.setattr(tune_timing, "arm_of", lambda *_: Sleeper())
    wall, cpu = (Race(bench, by_cpu)._once(PLAIN, bench.units[0]) for by_cpu in (False, True))
    assert wall >= 0.05 > 2 * cpu
    assert states == [False, False]


def test_a_draft_is_named_by_its_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "head").mkdir()
    (tmp_path / "head" / "config.json").write_text("{}")
    assert tune_module.located("head", DRAFT_HEAD) == str(tmp_path / "head")
    assert tune_module.located("someone/head", DRAFT_HEAD) == "someone/head"
    assert tune_module.located("demo", DRAFT_HEAD) == str(head_path())
    assert tune_module.located("demo", DRAFT_MODEL) == str(target_path())


def test_a_race_that_nobody_survives_is_empty(bench: Bench) -> None:
    bench.text_rounds = [[10]] * len(bench.units)
    race = FakeRace(bench)
    race.speeds = {"none": 1.0}
    assert race.run([candidate("breaks")]) == []


# --- all of it ---


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few looks and few timings."""
    monkeypatch.setattr(tune_module, "_CURVE_SECONDS", 0.2)
    monkeypatch.setattr(tune_timing, "ROUNDS", ((1, 1), (None, 1)))
    for method in ("prompt_lookup", "eagle3"):
        monkeypatch.setitem(tune_search._MOST_LOOKED_AT, method, 6)
    monkeypatch.setitem(STATE_READERS, "eagle3", {"depth": 5, "top_k": 8, "nodes": 300})


def options(tmp_path: Path, **change: Any) -> TuneOptions:
    start = TuneOptions(output=tmp_path / "tuned.json", limit=3, max_new_tokens=20, candidates=3,
                        methods="prompt_lookup,eagle3")  # fmt: skip
    return replace(start, **change)


def test_tune_writes_a_file_that_augment_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], short: None
) -> None:
    assert run_tune(options(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "chosen: " in printed
    found = read_tuned(tmp_path / "tuned.json")
    assert (found.dtype, found.threads) == ("float32", 1)
    details = found.details["batches"]["1"]
    assert set(details["curve"]) >= {"1", "2"}
    timed = [row for row in details["candidates"] if row["measured"] is not None]
    assert 1 <= len(timed) <= 3
    assert {row["method"] for row in details["candidates"]} == {"prompt_lookup", "eagle3"}
    assert all(math.isfinite(row["predicted"]) for row in details["candidates"])
    assert found.details["provenance"]["prompts"] == 3
    model, tokenizer = load_model("demo", "auto", "cpu"), load_tokenizer("demo")
    ids = tokenizer("def f(", return_tensors="pt").input_ids
    plain = model.generate(ids, max_new_tokens=16, do_sample=False)
    with specdec.augmented(model, tuned=tmp_path / "tuned.json"):
        assert torch.equal(model.generate(ids, max_new_tokens=16, do_sample=False), plain)
        assert specdec.last_stats(model).method == found.choices[1].method
    json.loads((tmp_path / "tuned.json").read_text(), parse_constant=pytest.fail)


def test_do_not_speculate_is_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: None
) -> None:
    """Where forwards over several tokens cost what the tokens cost one by one, nothing pays."""
    real = Race._once

    def slow(self: Race, candidate: Candidate, unit: Unit) -> float:
        return real(self, candidate, unit) * (1.0 if candidate == PLAIN else 4.0)

    monkeypatch.setattr(Race, "_once", slow)
    found, results = tune(options(tmp_path, methods="prompt_lookup", candidates=1))
    assert found.choices[1].method == "none"
    assert found.choices[1].measured is None
    assert next(iter(results[1].gains.values())).value < 1


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
        ({"target": "somewhere", "methods": "eagle3"}, "--head"),
        ({"methods": "draft_model"}, "--draft"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_tune_options(options(tmp_path, **change))
    with pytest.raises(ConfigError, match="nothing to tune in method 'none'"):
        tune(options(tmp_path, methods="none"))
    with pytest.raises(ConfigError, match="nothing to tune in method 'telepathy'"):
        tune(options(tmp_path, methods="telepathy"))
    (tmp_path / "tuned.json").write_text("mine")
    with pytest.raises(ConfigError, match="cannot write --output"):
        tune(options(tmp_path, output=tmp_path / "tuned.json" / "below"))
    with pytest.raises(ConfigError, match="--overwrite"):
        tune(options(tmp_path))
    assert (tmp_path / "tuned.json").read_text() == "mine"


def test_too_few_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs two batches"):
        tune(options(tmp_path, limit=1))


def test_targets_without_trees_are_judged_by_real_answers(short: None) -> None:
    """A recurrent target takes chains only: no curve, no simulated trees, still a forecast."""
    model = model_of("mamba2", torch.float32)
    clear_generation_config(model)
    specdec.augment(model, "none")
    assert not verifies_trees(model)
    units = []
    for index, prompt in enumerate(([3, 4, 5, 6] * 4, [9, 8, 7] * 5)):
        ids, mask = padded([prompt], model)
        output = type(model).generate(model, ids, attention_mask=mask, max_new_tokens=16)
        text = output[:, len(prompt) :].tolist()
        record = UnitRecord(0, str(index), str(index), "k", 0, [len(prompt)], 16, 0.0, "")
        units.append(Unit(record, index, [prompt], text, ids, mask))
    curve = tune_module._curve(model, Setting())
    assert curve.seconds == {}
    bench = Bench(Workbench(model, None, Setting()), units, curve)
    bench.measure_plain()
    bench.text_rounds = text_rounds(bench)
    search = tune_search.Search(bench, "prompt_lookup")
    found = search.run()
    assert not search.skipped
    assert found
    assert all(math.isfinite(forecast.speedup) and forecast.tau >= 1 for forecast in found)
    left = Race(bench).run([found[0].candidate])
    assert left == [found[0].candidate]


def test_a_method_that_cannot_run_says_why(bench: Bench) -> None:
    broken = replace(bench.workbench, drafts={DRAFT_HEAD: lambda: "/nowhere/at/all"})
    search = tune_search.Search(Bench(broken, bench.units, CURVE), "eagle3")
    assert search.run() == []
    assert "/nowhere/at/all" in search.skipped
