"""The gate: what it must fail, what it must let pass, and what it must refuse to judge."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.fake_results import ARMS, PROVENANCE, Fake, FakeArm, sampled, with_arm, write
from specdec.errors import ConfigError, SpecdecError
from specdec_bench.gate.command import run_gate
from specdec_bench.gate.judge import Judgement, compare
from specdec_bench.gate.options import GateOptions
from specdec_bench.results.records import Results, Setting

EAGLE = "eagle3:depth=3,top_k=1"
SOMEWHERE = Path("base.jsonl"), Path("new.jsonl")
BASE = Fake(seed=1, prompts=15, pairs=6, noise=0.06)
NEW = replace(BASE, seed=2)


BASE_HOT = replace(BASE, settings=(Setting(temperature=1.0),))


def gate(base: Fake | Results, new: Fake | Results, **options: object) -> Judgement:
    runs = [run.results() if isinstance(run, Fake) else run for run in (base, new)]
    return compare(*runs, GateOptions(*SOMEWHERE, **options))  # type: ignore[arg-type]


def slower(fake: Fake, name: str, share: float) -> Fake:
    """Planted work of this share of the answer."""
    return with_arm(fake, name, speed=fake.arms[name].speed / (1 + share))


def test_nothing_changed() -> None:
    found = gate(BASE, NEW)
    assert found.failures == []
    assert found.reference == "hf"
    assert [c.arm for c in found.comparisons] == [
        name for name in ARMS if name not in ("hf", "loop0_again")
    ]
    speeds = [speed for c in found.comparisons for speed in c.speeds.values()]
    assert len(speeds) == 2 * len(found.comparisons)
    assert all(speed.low <= 1.02 and speed.high >= 0.98 for speed in speeds)


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_a_sleep_of_ten_percent_fails_and_one_of_two_percent_passes(clock: str) -> None:
    found = gate(BASE, slower(NEW, EAGLE, 0.10), clock=clock)
    assert len(found.failures) == 1
    assert found.failures[0].startswith(
        f"{EAGLE}, float32, batch 1, greedy: speed by {clock} time fell to 0.9"
    )
    assert gate(BASE, slower(NEW, EAGLE, 0.02), clock=clock).failures == []


@pytest.mark.statistical
def test_how_often_the_gate_is_wrong() -> None:
    """Twenty pairs of runs each; a slowdown of 2 % must never fail, one of 10 % always."""
    small = {n: a for n, a in ARMS.items() if n in ("hf", "loop0", EAGLE)}
    for seed in range(20):
        base = replace(BASE, seed=2 * seed, arms=small)
        new = replace(base, seed=2 * seed + 1)
        assert gate(base, slower(new, EAGLE, 0.02)).failures == []
        assert gate(base, slower(new, EAGLE, 0.10)).failures


def test_a_sleep_uses_no_processor_and_is_seen_all_the_same() -> None:
    asleep = with_arm(NEW, EAGLE, sleep=0.10)
    assert "by wall time" in gate(BASE, asleep).failures[0]
    assert gate(BASE, asleep, clock="cpu").failures == []
    assert gate(BASE, with_arm(NEW, EAGLE, sleep=0.02)).failures == []


def test_a_slower_loop_shows_against_hf_and_hides_behind_loop0() -> None:
    both = slower(slower(NEW, EAGLE, 0.12), "loop0", 0.12)
    worse = [c.arm for c in gate(BASE, both).comparisons if c.failures]
    assert worse == ["loop0", EAGLE]
    hidden = gate(BASE, both, relative_to="loop0")
    assert not [f for f in hidden.failures if EAGLE in f]


def test_a_slower_machine_is_no_slower_code() -> None:
    machine = replace(NEW, token_seconds=BASE.token_seconds * 1.3)
    assert gate(BASE, machine).failures == []
    assert gate(BASE, machine, absolute=True).failures
    assert gate(BASE, machine, absolute=True).reference is None


def test_absolute_sees_the_same_sleep() -> None:
    quiet = replace(BASE, drift=0.0)
    new = replace(quiet, seed=2)
    assert gate(quiet, slower(new, EAGLE, 0.02), absolute=True).failures == []
    assert gate(quiet, slower(new, EAGLE, 0.10), absolute=True).failures


def test_limit_is_an_option() -> None:
    assert gate(BASE, slower(NEW, EAGLE, 0.10), max_slowdown=0.2).failures == []
    assert gate(BASE, slower(NEW, EAGLE, 0.10), max_slowdown=0.03).failures


def test_without_hf_the_baseline_is_the_reference() -> None:
    arms = {name: arm for name, arm in ARMS.items() if name != "hf"}
    found = gate(replace(BASE, arms=arms), slower(replace(NEW, arms=arms), EAGLE, 0.1))
    assert found.reference == "loop0"
    assert found.failures


def test_wrong_text_fails_however_fast() -> None:
    found = gate(BASE, with_arm(NEW, EAGLE, wrong=(4,), speed=3.0))
    assert any("WRONG TEXT in 1 of 15 requests" in words for words in found.failures)
    new_arm = replace(NEW, arms={**NEW.arms, "extra": FakeArm(wrong=(0,))})
    assert any(words.startswith("extra") for words in gate(BASE, new_arm).failures)


def test_unchecked_text_fails() -> None:
    new = with_arm(NEW, EAGLE, near_tie=(2,)).results()
    assert gate(BASE, new).failures == []
    unchecked = replace(new, checks=[c for c in new.checks if c.verdict == "exact"])
    assert any("nobody checked it" in words for words in gate(BASE, unchecked).failures)


def test_a_drop_of_acceptance_fails() -> None:
    found = gate(BASE, with_arm(NEW, EAGLE, tau=2.2))
    assert len(found.failures) == 1
    assert "tokens per round fell to 0.8" in found.failures[0]
    assert gate(BASE, with_arm(NEW, EAGLE, tau=3.0)).failures == []


def test_an_arm_that_only_fails_now_fails_the_gate() -> None:
    one = replace(BASE, pairs=1)
    failing = with_arm(replace(NEW, pairs=1), EAGLE, errors=range(15))
    assert any("could be timed any more" in words for words in gate(one, failing).failures)
    errors = with_arm(NEW, EAGLE, errors=(1, 2))
    some, words = gate(BASE, errors), f"{EAGLE} fails on 2 requests, and failed on 0"
    assert len(some.failures) == 1
    assert words in some.failures[0]
    allowed = gate(BASE, errors, allow_missing=True)
    assert allowed.failures == []
    assert any(words in warning for warning in allowed.warnings)
    assert gate(with_arm(BASE, EAGLE, errors=(1, 2)), errors).failures == []
    hf = gate(BASE, with_arm(NEW, "hf", errors=(1, 2)))  # the arm that speeds are relative to
    assert any("hf fails on 2 requests" in words for words in hf.failures)


def test_an_arm_that_is_gone_fails_the_gate() -> None:
    for name in (EAGLE, "hf"):
        gone = replace(NEW, arms={n: a for n, a in ARMS.items() if n != name})
        words = f"{name} is not in the new run"
        assert any(words in failure for failure in gate(BASE, gone).failures)
        allowed = gate(BASE, gone, allow_missing=True)
        assert allowed.failures == []
        assert any(words in warning for warning in allowed.warnings)


def test_a_wrong_distribution_fails() -> None:
    new = NEW.results()
    wrong = gate(BASE, replace(new, sampling=[sampled(EAGLE, False)])).failures
    assert len(wrong) == 1
    assert wrong[0].startswith(f"{EAGLE}, float32, batch 1, greedy: WRONG DISTRIBUTION, p = 1e-09")
    assert gate(BASE, replace(new, sampling=[sampled(EAGLE, True)])).failures == []


def test_texts_that_are_not_promised_pass_against_themselves() -> None:
    facts = {**PROVENANCE, "not_promised": {"0": ["hf_prompt_lookup"]}}
    hot = replace(BASE, settings=(Setting(temperature=1.0),), provenance=facts)
    hot = with_arm(hot, "hf_prompt_lookup", own_texts=True)
    found = gate(hot, replace(hot, seed=2))
    assert found.failures == []
    assert "hf_prompt_lookup" in [c.arm for c in found.comparisons]
    unsaid = replace(hot, provenance=PROVENANCE)
    assert any("nobody checked it" in words for words in gate(BASE_HOT, unsaid).failures)


def test_warnings() -> None:
    old_wrong = gate(with_arm(BASE, EAGLE, wrong=(1,)), NEW)
    assert any("the old text" in words for words in old_wrong.warnings)
    assert EAGLE not in [c.arm for c in old_wrong.comparisons]
    noisy = gate(replace(BASE, noise=0.5), replace(NEW, noise=0.5), clock="wall")
    assert any(
        "too wide to show a slowdown of 5.0% of loop0, prompt" in words for words in noisy.warnings
    )
    assert any("too noisy" in words for words in noisy.warnings)
    threads = gate(BASE, replace(NEW, provenance={**PROVENANCE, "device_name": "other"}))
    assert any(words == "device name: None then, other now" for words in threads.warnings)
    assert any("same run" in words for words in gate(BASE, BASE).warnings)


def test_plains_text_changed_in_some_requests() -> None:
    new = NEW.results()
    units = dict(new.units)
    for number, key in enumerate(list(units)):
        if number < 5:
            units[key] = replace(units[key], text_sha256="other")
    others = {u.unit for u in units.values() if u.text_sha256 == "other"}
    times = [
        replace(t, text_sha256="other") if t.unit in others and not t.error else t
        for t in new.times
    ]
    checks = [c for c in new.checks if c.unit not in others]
    found = gate(BASE, replace(new, units=units, times=times, checks=checks))
    assert found.failures == []
    assert any("differs in 5 of 15 requests; left out" in words for words in found.warnings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"provenance": {**PROVENANCE, "target_sha256": "0" * 64}}, "different targets"),
        ({"provenance": {**PROVENANCE, "prompts_sha256": "0" * 64}}, "different prompts"),
        ({"settings": (Setting(batch=2),)}, "different settings, only one of them has"),
        ({"settings": (Setting(), Setting(batch=2))}, "different settings"),
        ({"categories": ("x", "y", "z")}, "only 0 of 15 requests are the same work"),
        ({"text": "another"}, "only 0 of 15 requests are the same work"),
        ({"prompts": 4}, "only 4 of 15 requests"),
        ({"arms": {"loop0": FakeArm(), "other": FakeArm()}}, "nothing to compare"),
    ],
)
def test_refused(changes: dict, words: str) -> None:
    with pytest.raises(SpecdecError, match=words):
        gate(BASE, replace(NEW, **changes), allow_missing=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_slowdown": 1.0}, "--max-slowdown must be"),
        ({"max_slowdown": -0.1}, "--max-slowdown must be"),
        ({"max_slowdown": float("nan")}, "--max-slowdown must be"),
        ({"relative_to": "nobody"}, "--relative-to nobody is not in both runs"),
        ({"relative_to": "hf", "absolute": True}, "not both"),
    ],
)
def test_bad_options(options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        gate(BASE, NEW, **options)


def test_a_reference_with_wrong_text_is_none() -> None:
    wrong = with_arm(BASE, "hf", wrong=(0,))
    with pytest.raises(SpecdecError, match="text of hf is wrong"):
        gate(wrong, NEW)
    assert gate(wrong, NEW, relative_to="loop0").failures == []


def test_a_setting_without_requests_is_passed_over() -> None:
    pair = [replace(run, settings=(Setting(), Setting(batch=4))).results() for run in (BASE, NEW)]
    empty = [
        replace(
            run,
            units={k: u for k, u in run.units.items() if k[0] == 0},
            times=[t for t in run.times if t.setting == 0],
            passes={k: p for k, p in run.passes.items() if k[0] == 0},
            checks=[c for c in run.checks if c.setting == 0],
        )
        for run in pair
    ]
    found = gate(*empty)
    assert found.failures == []
    assert {c.setting for c in found.comparisons} == {Setting()}
    assert any("no request of this setting" in words for words in found.warnings)


def test_cpu_clock_must_mean_something() -> None:
    threads = {**PROVENANCE, "threads": 2}
    pair = replace(BASE, provenance=threads), replace(NEW, provenance=threads)
    with pytest.raises(ConfigError, match="--clock cpu needs"):
        gate(*pair, clock="cpu")
    assert {tuple(c.speeds) for c in gate(*pair).comparisons} == {("wall",)}
    assert {tuple(c.speeds) for c in gate(BASE, NEW).comparisons} == {("wall", "cpu")}
    cpu = gate(BASE, NEW, clock="cpu").comparisons
    assert {tuple(c.speeds) for c in cpu} == {("cpu",)}


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write(BASE.results(), tmp_path / "base.jsonl")
    new = write(NEW.results(), tmp_path / "new.jsonl")
    assert run_gate(GateOptions(base, new)) == 0
    said = capsys.readouterr().out
    assert "relative to hf in the same run" in said
    assert "passed" in said
    slow = write(slower(NEW, EAGLE, 0.1).results(), tmp_path / "slow.jsonl")
    assert run_gate(GateOptions(base, slow)) == 1
    said = capsys.readouterr().out
    assert "WORSE" in said
    assert "FAILED: " + EAGLE in said


def test_files_that_are_no_results_are_refused(tmp_path: Path) -> None:
    whole = write(BASE.results(), tmp_path / "base.jsonl")
    lines = whole.read_bytes().splitlines(keepends=True)
    bad = {
        "truncated": b"".join(lines[:-1]),
        "torn": b"".join(lines)[:-40],
        "lost": b"".join(lines[:50] + lines[51:]),
        "empty": b"",
        "foreign": json.dumps({"results": []}).encode() + b"\n",
        "binary": bytes(range(256)),
    }
    for name, content in bad.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(content)
        for pair in ((whole, path), (path, whole)):
            with pytest.raises(SpecdecError):
                run_gate(GateOptions(*pair))
    with pytest.raises(SpecdecError, match="cannot read"):
        run_gate(GateOptions(whole, tmp_path / "none.jsonl"))
