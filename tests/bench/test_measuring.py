"""What surrounds the timed answers: threads, budgets, memory, stopping, and what is kept of it."""

from __future__ import annotations

import gc
import json
import math
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.api import _ATTRIBUTE
from specdec.cost.curve import CurveMeter
from specdec.errors import ConfigError, SpecdecError
from specdec_bench import RunOptions, run
from specdec_bench.arm_names import parse_arm
from specdec_bench.contracts import Unit, Workbench
from specdec_bench.measure.loaded import is_on_cpu, torch_threads
from specdec_bench.measure.measuring import PeakMemory
from specdec_bench.measure.runner import _Budget
from specdec_bench.measure.schedule import Stopping, Timings
from specdec_bench.measure.terminal_table import print_results
from specdec_bench.results.provenance import weights_hash
from specdec_bench.results.records import PassRecord, TimeRecord, UnitRecord
from specdec_bench.summary.passes import Passes

CPU = torch.device("cpu")


@pytest.fixture
def tasks(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    prompts = [
        "import os\nimport sys\n\ndef main(argv=None):\n",
        "def parse(path):\n    with open(path) as stream:\n",
    ]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return str(path)


def options(tasks: str, tmp_path: Path, **more: Any) -> RunOptions:
    sizes = {"max_new_tokens": 20, "pairs": 2, "arms": ("hf_prompt_lookup",)}
    return RunOptions(tasks=(tasks,), output=tmp_path / "run.jsonl", **{**sizes, **more})


def test_only_the_processor_gets_one_thread() -> None:
    assert is_on_cpu("cpu")
    assert is_on_cpu("cpu:0")
    assert not is_on_cpu("cuda")
    assert not is_on_cpu("cuda:1")
    assert not is_on_cpu("mps")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for device, wanted, threads in (("cuda", None, 2), ("cpu", None, 1), ("cuda", 1, 1)):
            with torch_threads(device, wanted):
                assert torch.get_num_threads() == threads
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def apart(arms: dict[str, float], noise: float = 1e-4) -> Timings:
    """Prompts that gain very differently, measured with little noise."""
    units = [UnitRecord(0, f"u{i}", f"c{i}", "k", 0, [1], 20, 0.0, "") for i in range(8)]
    found = Timings(units, "loop0", by_cpu=False)
    for number, unit in enumerate(units):
        for pair in range(4):
            for arm, gain in arms.items():
                seconds = 1 / (1 + gain * number) * (1 + noise * ((pair * 7 + number) % 3))
                found.add(TimeRecord(0, unit.unit, arm, pair, 0, seconds, None, ""))
    return found


def test_until_ci_is_about_what_repeats_can_narrow() -> None:
    timings = apart({"loop0": 0.0, "x": 0.3})
    assert timings.widest(over_prompts=True) > 0.1
    assert timings.widest() < 0.001
    assert Stopping(200, until_ci=0.01).reason(4, timings) == "until-ci"
    loud = apart({"loop0": 0.0, "x": 0.3}, noise=0.5)
    assert Stopping(200, until_ci=0.01).reason(4, loud) == ""


def test_an_arm_that_fails_does_not_hold_the_others_up() -> None:
    timings = apart({"loop0": 0.0, "x": 0.3})
    for number in range(8):
        timings.add(TimeRecord(0, f"u{number}", "y", 0, 0, 1.0, None, ""))
        timings.add(TimeRecord(0, f"u{number}", "y", 1, 0, 0.0, None, "", "RuntimeError: worn out"))
    assert timings.widest() < 0.001
    assert math.isinf(apart({"loop0": 0.0}).widest())


def test_it_is_said_when_only_more_prompts_would_help(
    tasks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(options(tasks, tmp_path))
    units = [UnitRecord(0, f"u{i}", f"c{i}", "k", 0, [1], 20, 0.0, "") for i in range(8)]
    spread = [
        TimeRecord(0, unit.unit, arm, pair, 0, seconds * (1 + 1e-4 * pair), seconds, "")
        for number, unit in enumerate(units)
        for pair in range(3)
        for arm, seconds in (("loop0", 1.0), ("loop0_again", 1.0), ("hf_prompt_lookup", 1 + number))
    ]
    facts = {**found.header.provenance, "until_ci": 0.03}
    wide = replace(
        found,
        header=replace(found.header, provenance=facts),
        units={(0, unit.unit): unit for unit in units},
        times=spread,
        passes={},
        checks=[],
    )
    words = "more prompts, not more pairs"
    print_results(wide)
    assert words in " ".join(capsys.readouterr().out.split())
    print_results(replace(wide, header=found.header))
    assert words not in " ".join(capsys.readouterr().out.split())


def test_a_budget_counts_preparation(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    budget = _Budget(60.0, 2, start=90.0)
    now[0] = 110.0  # 10 s before this setting, 10 for its preparation, and 10 for the next one's
    assert budget.left("setting") == pytest.approx((60 - 20 - 10) / 2)
    now[0] = 160.0
    with pytest.warns(UserWarning, match="spent on preparation"):
        assert 0 < budget.left("setting") < 1e-6
    assert _Budget(0.0, 2, start=90.0).left("setting") == 0.0


def test_peak_memory_sees_what_the_heap_had_kept() -> None:
    def plant(pieces: int) -> None:
        torch.stack([torch.ones(1 << 18).sum() for _ in range(2)])
        kept = [torch.ones(1 << 18) for _ in range(pieces)]  # 1 MB each, from the heap
        assert len(kept) == pieces

    memory = PeakMemory(CPU)
    memory.start()
    if memory.stop() is None:
        pytest.skip("this system does not tell")
    large = torch.ones(8 << 18)
    del large  # glibc from now on takes pieces of up to 8 MB from the heap, and keeps them
    found = []
    for pieces in (200, 200, 20):
        plant(pieces)
        memory.start()
        plant(pieces)
        found.append((memory.stop() or 0) / 2**20)
    assert found == pytest.approx([200, 200, 20], abs=8)
    assert PeakMemory(torch.device("meta")).stop() is None


class Watching:
    """Notes what is alive when it is timed."""

    name, counts_rounds, in_process = "watching", False, True

    def __init__(self) -> None:
        self.alive: list[int] = []

    def run(self, unit: Unit) -> list[list[int]]:
        self.alive.append(sum(isinstance(found, CurveMeter) for found in gc.get_objects()))
        return [list(row) for row in unit.text_ids]


def test_passes_curves_and_what_is_let_go(tasks: str, tmp_path: Path) -> None:
    watching = Watching()
    lengths = (6,)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = run(
            options(tasks, tmp_path, prompt_tokens=(*lengths, 500), pairs=1),
            extra_arms={"watching": lambda _: watching},
        )
    assert watching.alive == [1, 1, 0, 0] * 2, "two warm-ups and two timed answers, by setting"
    assert [str(w.message)[:19] for w in said if "shortens no" in str(w.message)] == [
        "--prompt-tokens 500"
    ]
    assert set(found.curves) == {("float32", 1, length) for length in (*lengths, 500)}
    prefixes = [curve.prefix for curve in found.curves.values()]
    assert prefixes == sorted(set(prefixes))
    for (setting, unit, arm), passed in found.passes.items():
        emitted = passed.first_tokens + sum(tokens for tokens, _ in passed.gaps)
        assert emitted == found.units[setting, unit].new_tokens, arm
        largest = max(
            (u for (s, _), u in found.units.items() if s == setting),
            key=lambda u: u.prompt_tokens[0] + u.new_tokens,
        )
        assert unit == largest.unit or passed.peak_bytes is None


def test_half_precision_has_its_reference_before_anything_is_timed(
    tasks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: Any) -> Any:
        raise SpecdecError("no fp64 copy")

    monkeypatch.setattr("specdec_bench.checks.text._fp64_copy", refuse)
    with pytest.raises(SpecdecError, match="no fp64 copy"):
        run(options(tasks, tmp_path, dtypes=("bfloat16",)))
    path = tmp_path / "run.jsonl"
    assert not path.exists() or not path.read_bytes()


class Changing:
    """Gives a text that nobody has looked at when it is timed."""

    name, counts_rounds, in_process = "changing", False, True

    def __init__(self) -> None:
        self.calls = 0

    def run(self, unit: Unit) -> list[list[int]]:
        self.calls += 1
        rows = [list(row) for row in unit.text_ids]
        if self.calls > 2:
            rows[0][-1] = (rows[0][-1] + 1) % 10
        return rows


def test_a_check_that_fails_is_an_error_of_its_arm(
    tasks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specdec_bench.measure import setting_run

    def judge(reference: Any, model: Any, unit: Any, rows: Any, setting: Any) -> Any:
        if [list(row) for row in rows] != [list(row) for row in unit.text_ids]:
            raise SpecdecError("cannot judge")
        return "exact", {"exact": unit.record.new_tokens, "near_tie": 0, "wrong": 0}, None, None

    monkeypatch.setattr(setting_run, "check_text", judge)
    changing = Changing()
    found = run(options(tasks, tmp_path), extra_arms={"changing": lambda _: changing})
    errors = {(t.arm, t.pair, t.error) for t in found.times if t.error}
    assert errors == {("changing", 0, "SpecdecError: cannot judge")}
    others = [t for t in found.times if t.arm != "changing"]
    assert len(others) == 2 * 2 * 4


def test_a_password_never_reaches_a_name() -> None:
    for spec in ("server:http://user:secret@host:8000", "server:https://secret@host/v1"):
        with pytest.raises(ConfigError, match="password") as raised:
            parse_arm(spec)
        assert "secret" not in str(raised.value)
    assert parse_arm("server:http://host:8000/v1,model=a@b").method == "server"


def test_weights_are_known_by_their_files(tmp_path: Path) -> None:
    folder = tmp_path / "head"
    folder.mkdir()
    assert weights_hash(None) is None
    assert weights_hash(str(folder)) == ""
    assert weights_hash("nobody/has-this-model") == ""
    file = folder / "model.safetensors"
    file.write_bytes(bytes(3 << 20))
    first = weights_hash(str(folder))
    file.write_bytes(bytes((3 << 20) - 1) + b"x")
    assert first not in ("", None, weights_hash(str(folder)))


def test_stores_leave_the_models_memory_with_their_setting(tasks: str, tmp_path: Path) -> None:
    seen: list[Any] = []

    def stores() -> list[str]:
        handle = vars(seen[0].model)[_ATTRIBUTE]
        return [name for name in handle.memory if name.startswith("suffix.store")]

    class Counting(Watching):
        def run(self, unit: Unit) -> list[list[int]]:
            self.alive.append(len(stores()))
            return [list(row) for row in unit.text_ids]

    counting = Counting()

    def make(bench: Workbench) -> Counting:
        seen.append(bench)
        return counting

    run(options(tasks, tmp_path, arms=("suffix+store",)), extra_arms={"watching": make})
    assert counting.alive[-1] == 2, "one for each of the two prompts"
    assert stores() == []


def passes(seconds: float, first_tokens: int) -> Passes:
    unit = UnitRecord(0, "u", "c", "k", 0, [1], 20, 0.0, "")
    found = PassRecord(0, "u", "x", {}, 0, 0, True, {}, seconds, 0.1, [(1, 0.1)], joules=5.0,
                       first_tokens=first_tokens)  # fmt: skip
    return Passes([unit], [found])


def test_energy_needs_a_second_and_latency_leaves_the_first_burst_out() -> None:
    assert passes(0.9, 1).joules_per_token() is None
    assert passes(1.1, 1).joules_per_token() == pytest.approx(5 / 20)
    latency = passes(1.1, 4).latency()
    assert latency is not None
    assert latency.per_token == pytest.approx(1.0 / 16)
