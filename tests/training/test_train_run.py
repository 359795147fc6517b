"""The trainer as a whole: resume after a kill, bad gradients, signals, locks, early stop, tau."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_helpers import (
    VOCAB,
    Example,
    Saved,
    log_lines,
    make_examples,
    make_head,
    make_options,
    make_parts,
    make_target,
    same_tensors,
    train,
)

from specdec.artifacts.run_lock import RunLock
from specdec.errors import ConfigError, SpecdecError
from specdec_training.contracts import FeatureBatch, TokenBatch
from specdec_training.run import trainer
from specdec_training.run.checkpoints import CheckpointStore
from specdec_training.run.evaluate import Acceptance, AcceptanceMeter, DraftShape, Selection
from specdec_training.run.trainer import RunParts, Trainer

HERE = Path(__file__).resolve().parent
_CHILD = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from train_helpers import make_options, make_parts
from specdec_training.run.trainer import Trainer

folder, stop, number = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

class Killed(Trainer):
    def _one_step(self, signals):
        if self.step == stop:
            os.kill(os.getpid(), number)
        return super()._one_step(signals)

found = Killed(make_parts(folder), make_options(folder, noise=0.05, loss="lk")).run()
print(found.reason, found.signal, found.steps)
"""


def child(folder: Path, stop: int, number: int) -> subprocess.CompletedProcess[str]:
    """Trains in a process of its own that gets a signal before step `stop + 1`."""
    root = HERE.parents[1]
    path = os.pathsep.join(map(str, (root, root / "draft_training", HERE)))
    return subprocess.run(
        [sys.executable, "-c", _CHILD, str(folder), str(stop), str(int(number))],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


def newest(folder: Path) -> Any:
    found = CheckpointStore(folder / "checkpoints").latest()
    assert found is not None
    return found


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 steps without an interruption."""
    folder = tmp_path_factory.mktemp("straight")
    train(folder, noise=0.05, loss="lk")
    return folder


def same_runs(one: Path, other: Path) -> None:
    first, second = newest(one), newest(other)
    assert first.step == second.step == 40
    for part in ("head", "optimizer", "random"):
        assert same_tensors(first.tensors(part), second.tensors(part)), part
    for name in ("sampler", "share", "skipped"):
        assert first.state[name] == second.state[name]
    assert log_lines(one) == log_lines(other)
    assert len(log_lines(one)) == 40


@pytest.mark.fault
def test_killed_and_resumed_is_bit_for_bit_straight(straight: Path, tmp_path: Path) -> None:
    done = child(tmp_path, 20, signal.SIGKILL)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert newest(tmp_path).step == 17
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    found = train(tmp_path, noise=0.05, loss="lk")
    assert found.steps == 40
    same_runs(straight, tmp_path)


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_cleanly(straight: Path, tmp_path: Path, number: Any) -> None:
    done = child(tmp_path, 23, number)
    assert done.returncode == 0, done.stderr
    assert f"{int(number)} 24" in done.stdout
    assert "Traceback" not in done.stderr
    assert newest(tmp_path).step == 24  # the step that was under way is finished
    train(tmp_path, noise=0.05, loss="lk")
    same_runs(straight, tmp_path)


def test_without_measurements_checkpoints_come_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    keep = CheckpointStore.save

    def save(store: Any, step: int, *rest: Any) -> Any:
        saved.append(step)
        return keep(store, step, *rest)

    monkeypatch.setattr(CheckpointStore, "save", save)
    train(tmp_path, save_every=None)
    assert (saved[0], saved[-1], len(saved)) == (1, 40, 9)
    assert all(after - before <= 6 for before, after in pairwise(saved))


def test_random_generators_come_back(tmp_path: Path) -> None:
    random.seed(5), np.random.seed(6), torch.manual_seed(7)
    train(tmp_path, steps=4, save_every=4)
    wanted = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    train(tmp_path, steps=4, save_every=4)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == wanted


def test_resume_with_other_options_is_refused_by_name(tmp_path: Path) -> None:
    train(tmp_path, steps=4)
    with pytest.raises(ConfigError, match=r"--lr: 0.001 before, 0.002 now; --seed: 0 before, 1 no"):
        train(tmp_path, steps=4, lr=2e-3, seed=1)
    parts = make_parts(tmp_path)
    parts.facts = {"data": "other"}
    with pytest.raises(ConfigError, match="data: made up before, other now"):
        train(tmp_path, parts, steps=4)
    assert train(tmp_path, steps=4, log_every=3).steps == 4  # that may change


def test_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    parts = make_parts(tmp_path)
    before = {name: t.clone() for name, t in parts.head.state_dict().items()}
    assert train(tmp_path, parts, max_steps=0).steps == 0
    assert same_tensors(before, parts.head.state_dict())
    assert parts.sampler.state()["position"] == 0
    assert not (tmp_path / "checkpoints").exists()


def test_a_dry_run_finds_what_would_fail(tmp_path: Path) -> None:
    parts = make_parts(tmp_path, [Example([VOCAB + 5] * 9, [True] * 9)])
    with pytest.raises(IndexError):
        train(tmp_path, parts, max_steps=0)


class Poisoned:
    """A source that gives infinite features at some calls."""

    def __init__(self, source: Any, bad: Callable[[int], bool], value: float) -> None:
        self.source, self.bad, self.value, self.calls = source, bad, value, 0

    def features(self, batch: TokenBatch) -> FeatureBatch:
        found: FeatureBatch = self.source.features(batch)
        self.calls += 1
        if self.bad(self.calls):
            found.aux[0, 3, 5] = self.value
        return found

    def target_logits(self, last_hidden: torch.Tensor) -> torch.Tensor:
        return self.source.target_logits(last_hidden)  # type: ignore[no-any-return]


@pytest.mark.fault
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_never_reaches_the_optimiser(tmp_path: Path, value: float) -> None:
    parts = make_parts(tmp_path)
    parts.source = Poisoned(parts.source, lambda call: call in (3, 5, 6), value)
    seen: list[bool] = []
    training = Trainer(parts, make_options(tmp_path, steps=8, accumulate=2, batch_rows=1))
    step = training._train_step.stepper.optimizer.step

    def spy(*a: Any, **k: Any) -> Any:
        seen.append(all(bool(p.grad.isfinite().all()) for p in parts.head.parameters()
                        if p.grad is not None))  # fmt: skip
        return step(*a, **k)

    training._train_step.stepper.optimizer.step = spy
    found = training.run()
    assert found.skipped == 2  # calls 3 and 4 are step 2, calls 5 and 6 step 3
    assert seen == [True] * 6
    assert all(bool(p.isfinite().all()) for p in parts.head.parameters())
    lines = [json.loads(x) for x in (tmp_path / "bad_batches.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3]
    assert len(lines[0]["examples"]) == 2


@pytest.mark.fault
def test_too_many_bad_steps_end_the_run(tmp_path: Path) -> None:
    parts = make_parts(tmp_path)
    parts.source = Poisoned(parts.source, lambda call: call > 2, float("nan"))
    with pytest.raises(SpecdecError, match=r"4 steps in a row.*bad_batches"):
        train(tmp_path, parts, max_bad_steps=3)


@pytest.mark.fault
def test_a_second_run_on_the_folder_is_refused(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(SpecdecError, match="another run"), RunLock(tmp_path):
        pass


def test_micro_batches_give_the_same_run(tmp_path: Path) -> None:
    logs = []
    for name, shape in {"a": (4, 1), "b": (1, 4), "c": (2, 2)}.items():
        folder = tmp_path / name
        train(folder, batch_rows=shape[0], accumulate=shape[1], steps=6)
        logs.append([(line["loss"], line["grad_norm"]) for line in log_lines(folder)])
    for other in logs[1:]:
        assert np.allclose(logs[0], other, rtol=1e-4)


def test_training_on_random_tokens_lowers_the_loss(tmp_path: Path) -> None:
    train(tmp_path, steps=40, lr=5e-3)
    losses = [line["loss"] for line in log_lines(tmp_path)]
    assert sum(losses[-5:]) < 0.92 * sum(losses[:5])


class FakeMeter(AcceptanceMeter):
    """Says what it was told, one score a measurement."""

    scores: list[float]

    def measure(self, head: Any, step: int, brief: bool = False) -> Acceptance:
        score = self.scores.pop(0)
        modes = ("chain_t0", "tree_t0", "chain_t1", "tree_t1")
        return Acceptance(step, dict.fromkeys(modes, score), True)

    def prompt_lookup(self) -> float:
        return 1.0

    def looping_share(self) -> float:
        return 0.0


def test_the_best_head_is_kept_and_patience_ends_the_run(tmp_path: Path) -> None:
    meter = FakeMeter(None, [[1]], 4)
    meter.scores = [1.0, 1.4, 1.3, 1.35, 9.0]
    parts = make_parts(tmp_path, meter=meter)
    found = train(tmp_path, parts, eval_every=3, patience=2)
    assert found.reason == "no gain in 2 measurements"
    assert [a.step for a in found.history] == [0, 3, 6, 9]
    assert isinstance(parts.save_head, Saved)
    assert [a.step for a in parts.save_head.calls] == [0, 3]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["acceptance_length"]["tree_t0"] == 1.4
    assert metrics["step"] == 3
    assert len(metrics["history"]) == 4
    (tmp_path / "head").mkdir()  # which `Saved` only counts
    again = train(tmp_path, make_parts(tmp_path, meter=meter), eval_every=3, patience=2)
    assert (again.steps, again.reason) == (found.steps, found.reason)
    more = train(
        tmp_path, make_parts(tmp_path, meter=meter), eval_every=3, patience=3, max_steps=12
    )
    assert (more.steps, more.reason) == (12, "--max-steps 12")


def test_selection_survives_its_state() -> None:
    one, other = Selection(2), Selection(2)
    for step, score in enumerate((1.0, 2.0, 1.5)):
        one.add(Acceptance(step, {"tree_t0": score}, True))
    other.restore(json.loads(json.dumps(one.state())))
    assert other == one
    assert not other.is_over
    other.add(Acceptance(3, {"tree_t0": 2.0}, True))
    assert other.is_over


def test_minutes_follow_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = train(tmp_path, steps=None, minutes=0.03)
    assert found.reason == "its time is over"
    rates = [line["lr"] for line in log_lines(tmp_path)]
    assert rates[-1] < 0.3 * max(rates)
    assert trainer._DEFAULT_STEPS == 1000


def test_the_schedule_waits_for_the_first_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warm-up by the clock that was over before the first step held a run back to its end."""

    def slow(meter: AcceptanceMeter, head: Any, step: int, brief: bool = False) -> Acceptance:
        time.sleep(1.0)
        return Acceptance(step, {"tree_t0": 1.0 + step}, True)

    monkeypatch.setattr(AcceptanceMeter, "measure", slow)
    monkeypatch.setattr(AcceptanceMeter, "prompt_lookup", lambda meter: 1.0)
    monkeypatch.setattr(AcceptanceMeter, "looping_share", lambda meter: 0.0)
    target = make_target()
    meter = AcceptanceMeter(target, [[1, 2, 3]], 8, DraftShape())
    parts = make_parts(tmp_path, meter=meter, target=target)
    train(tmp_path, parts, steps=None, minutes=0.05, warmup=0.5, eval_every=None)
    first, *later = [line["lr"] for line in log_lines(tmp_path)]
    assert first < 0.3 * max(later)


def overfitted(tmp_path: Path, **changes: Any) -> tuple[RunParts, list[list[int]]]:
    """Four texts of the target's own, learnt by heart."""
    target = make_target(hidden=64, layers=3, spread=0.6)
    texts = []
    for first in range(4):
        prompt = torch.tensor([[first + 1, 9, 3 * first + 2, 17, 2 * first + 5]])  # no padding
        texts.append(target.generate(prompt, max_new_tokens=43, do_sample=False)[0].tolist())
    examples = [Example(text, [at >= 5 for at in range(48)]) for text in texts]
    meter = AcceptanceMeter(target, [t[:5] for t in texts], 43, DraftShape(depth=4, nodes=24))
    parts = make_parts(tmp_path, examples, 48, meter, make_head(target, VOCAB), target)
    train(
        tmp_path, parts, steps=120, ttt_steps=4, lr=1e-2, batch_rows=4, eval_every=120,
        save_every=120, **changes,
    )  # fmt: skip
    return parts, texts


def test_four_texts_learnt_by_heart_are_drafted_whole(tmp_path: Path) -> None:
    overfitted(tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    tau = metrics["acceptance_length"]
    assert metrics["text_identical"]
    assert tau["chain_t0"] >= 0.9 * 5
    assert tau["tree_t0"] >= 0.9 * 5
    accuracy = log_lines(tmp_path)[-1]["accuracy"]
    simulated = trainer_length(accuracy)
    assert simulated == pytest.approx(tau["chain_t0"], rel=0.05)
    assert metrics["history"][0]["chain_t0"] < 2


def trainer_length(accuracy: list[float]) -> float:
    from specdec_training.objective.losses import simulated_length

    return simulated_length(accuracy)


def test_examples_are_as_the_tests_assume() -> None:
    assert any(not all(e.loss_mask) for e in make_examples())
