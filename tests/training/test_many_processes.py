"""Two processes learn what one learns: full copies (DDP) and DeepSpeed's ZeRO, on a CPU.

Every launch is a program of its own, as users start it. A global batch has four rows: all of them
in one process, or two for each, one at a time.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.errors import ConfigError
from specdec_training.run.checkpoints import Checkpoint, CheckpointStore
from specdec_training.run.options import TrainOptions
from specdec_training.run.stepping import _settle

psutil = pytest.importorskip("psutil")  # comes with accelerate

STEPS, BOUND = 20, 1e-5
CONFIGS = Path(__file__).resolve().parents[2] / "draft_training" / "configs"
ZERO2 = CONFIGS / "deepspeed_zero2.json"
SECONDS = 400  # DeepSpeed compiles a helper when it runs for the first time

has_option = "deepspeed" in {field.name for field in dataclasses.fields(TrainOptions)}
needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed"
)
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
needs_option = pytest.mark.skipif(not has_option, reason="the trainer has no --deepspeed")
pytestmark = [needs_accelerate, pytest.mark.timeout(SECONDS + 60)]

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
DDP_CONFIG = [*ACCELERATE, "--config_file", str(CONFIGS / "accelerate_ddp.json")]
ZERO_CONFIG = [
    *ACCELERATE, "--use_deepspeed", "--deepspeed_config_file", str(ZERO2), "--num_processes", "2",
    "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
]  # fmt: skip

TRAIN = """
import json, sys
from pathlib import Path
import torch
from specdec_training.commands.train import run_train
from specdec_training.run.options import TrainOptions
torch.set_num_threads(1)
given = json.loads(sys.argv[1])
for name in ("data", "output", "deepspeed"):
    if name in given:
        given[name] = Path(given[name])
raise SystemExit(run_train(TrainOptions(**given)))
"""


def environment() -> dict[str, str]:
    return {
        **os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }  # fmt: skip


def launch(launcher: Sequence[str], script: Path, *arguments: str) -> str:
    """Runs a script under a launcher; its standard output."""
    done = subprocess.run(
        [sys.executable, *launcher, str(script), *arguments],
        env=environment(), capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@dataclasses.dataclass
class Runs:
    """Trains in a folder."""

    folder: Path
    straight: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    done: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)

    def once(self, name: str, rows: int, accumulate: int, **options: Any) -> list[dict[str, Any]]:
        """The log of a run of two processes that several tests look at."""
        if name not in self.done:
            self.done[name] = self.train(name, TORCHRUN, rows, accumulate, **options)
        return self.done[name]

    def train(
        self, name: str, launcher: Sequence[str], rows: int, accumulate: int, **options: Any
    ) -> list[dict[str, Any]]:
        """The log of a run."""
        launch(launcher, *self.command(name, rows, accumulate, **options))
        lines = (self.folder / name / "log.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def command(self, name: str, rows: int, accumulate: int, **options: Any) -> tuple[Path, str]:
        """(script, its argument)."""
        script = self.folder / "train.py"
        script.write_text(TRAIN)
        given = {
            "data": str(self.folder / "data"), "output": str(self.folder / name), "steps": STEPS,
            "max_length": 96, "ttt_steps": 3, "batch_rows": rows, "accumulate": accumulate,
            "eval_every": 0, "save_every": STEPS, "device": "cpu", "keep": 5, "precision": "fp32",
        } | options  # fmt: skip
        return script, json.dumps(given)

    def kill_after(self, step: int, name: str, **options: Any) -> None:
        """Starts two processes, and kills them and their launcher once a checkpoint is there."""
        script, argument = self.command(name, rows=1, accumulate=2, save_every=step, **options)
        child = subprocess.Popen(
            [sys.executable, *TORCHRUN, str(script), argument], env=environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wanted = self.folder / name / "checkpoints" / f"step-{step:08d}"
        end = time.monotonic() + SECONDS
        while not wanted.exists() and child.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        # Launchers give their workers process groups of their own.
        family = psutil.Process(child.pid).children(recursive=True)
        for process in (child, *family):
            process.kill()
        child.wait()
        psutil.wait_procs(family, timeout=SECONDS)
        assert self.checkpoint(name).step == step, "it was killed too late"

    def checkpoint(self, name: str) -> Checkpoint:
        found = CheckpointStore(self.folder / name / "checkpoints").latest()
        assert found is not None
        return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    from specdec_training.data.options import DataPrepareOptions
    from specdec_training.data.prepare import prepare

    folder = tmp_path_factory.mktemp("runs")
    prepare(
        DataPrepareOptions(
            input=("demo",), limit=60, output=folder / "data", max_length=96, draft_vocab=512
        )
    )
    runs = Runs(folder)
    runs.straight = runs.train("one", [], rows=4, accumulate=1)
    return runs


def assert_same(name: str, runs: Runs, found: list[dict[str, Any]]) -> None:
    """Loss curve, gradient norms and the final weights are those of one process."""
    assert len(found) == len(runs.straight) == STEPS
    worst: dict[str, float] = {}
    for mine, theirs in zip(found, runs.straight, strict=True):
        assert mine["tokens"] == theirs["tokens"]
        assert mine["lr"] == theirs["lr"]
        for key in ("loss", "grad_norm"):
            away = abs(mine[key] - theirs[key]) / abs(theirs[key])
            worst[key] = max(worst.get(key, 0.0), away)
    assert worst["loss"] < BOUND
    assert worst["grad_norm"] < 10 * BOUND  # differences of sums, and clipped away
    one, many = runs.checkpoint("one"), runs.checkpoint(name)
    for part in ("head", "optimizer"):
        ours, theirs_ = many.tensors(part), one.tensors(part)
        assert set(ours) == set(theirs_)
        weights = max(relative(ours[key], value) for key, value in theirs_.items())
        assert weights < 1e-3
        worst[part] = weights
    figures = ", ".join(f"{key} {value:.1e}" for key, value in worst.items())
    print(
        f"{name}: 2 processes against 1 over {STEPS} steps, largest relative difference {figures}"
    )


def relative(one: Tensor, other: Tensor) -> float:
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    one, other = one.double(), other.double()
    return float((one - other).abs().max()) / max(float(other.abs().max()), 1e-12)


def test_two_processes_with_torchrun(runs: Runs) -> None:
    assert_same("ddp", runs, runs.once("ddp", rows=1, accumulate=2))


@pytest.mark.slow
def test_two_processes_with_accelerate(runs: Runs) -> None:
    assert_same("accelerate", runs, runs.train("accelerate", DDP_CONFIG, rows=2, accumulate=1))


@needs_deepspeed
@needs_option
def test_zero_with_torchrun(runs: Runs) -> None:
    assert_same("zero", runs, runs.once("zero", rows=1, accumulate=2, deepspeed=str(ZERO2)))


@pytest.mark.slow
@needs_deepspeed
@needs_option
def test_zero_with_accelerate(runs: Runs) -> None:
    found = runs.train("zero accelerate", ZERO_CONFIG, rows=2, accumulate=1)
    assert_same("zero accelerate", runs, found)


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize(
    "more", [{}, pytest.param({"deepspeed": str(ZERO2)}, marks=[needs_deepspeed, needs_option])],
    ids=["ddp", "zero"],
)  # fmt: skip
def test_a_killed_run_goes_on_exactly(runs: Runs, more: dict[str, Any]) -> None:
    """Killed after nine steps, and started again: the log of an unbroken run, to the last bit."""
    name = "zero" if more else "ddp"
    straight = runs.once(name, rows=1, accumulate=2, **more)
    runs.kill_after(9, f"{name} killed", **more)
    halves = {"rows": 1, "accumulate": 2, "save_every": 9, **more}
    found = runs.train(f"{name} killed", TORCHRUN, **halves)
    for key in ("loss", "grad_norm", "lr", "tokens"):
        assert [line[key] for line in found] == [line[key] for line in straight]
    ours, theirs = runs.checkpoint(f"{name} killed"), runs.checkpoint(name)
    assert ours.step == theirs.step == STEPS
    for part in ("head", "optimizer"):
        mine = ours.tensors(part)
        for tensor, value in theirs.tensors(part).items():
            assert torch.equal(mine[tensor], value), tensor
    print(f"{name}: killed after step 9 of {STEPS}, started again: equal to the last bit")


# ---- DeepSpeed's engine on its own

ENGINE = """
import json, sys
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DeepSpeedPlugin
from specdec_training.run.stepping import make_stepper

torch.set_num_threads(1)


def build(zero):
    torch.manual_seed(0)
    head = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    head[2].bias.requires_grad_(False)
    matrices = [p for p in head.parameters() if p.ndim > 1]
    vectors = [p for p in head.parameters() if p.ndim == 1 and p.requires_grad]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, fused=True)
    return head, make_stepper(accelerator, head, head, optimizer)


def learn(stepper, numbers, bad=()):
    norms = []
    for number in numbers:
        chosen = torch.Generator().manual_seed(number)
        batch = torch.randn(8, 8, generator=chosen)[accelerator.process_index :: 2]
        for half in (0, 1):
            with stepper.part(is_last=half == 1):
                loss = stepper.module(batch[2 * half : 2 * half + 2]).square().sum() / 4
                stepper.backward(loss * (float("inf") if number in bad else 1.0))
        norm = float(stepper.clip(0.5))
        norms.append(norm)
        if norm != float("inf") and norm == norm:
            stepper.step(0.01 / (1 + number))
        stepper.clear()
    return norms


def equal(one, other):
    return [set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)
            for a, b in zip(one, other)]


accelerator = Accelerator(
    deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=json.loads(sys.argv[1])),
    kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
)
found = {}
_, stepper = build(True)
found["before"] = sorted(stepper.tensors()[1])
found["norms"] = learn(stepper, range(6))
straight = stepper.tensors()
found["names"] = [sorted(part) for part in straight]

_, stepper = build(True)
bad_norms = learn(stepper, [0, 1, 2, 99, 3, 4, 98, 5], bad=(99, 98))
found["bad norms"] = [str(bad_norms[3]), str(bad_norms[6])]
found["bad steps change nothing"] = equal(straight, stepper.tensors())

_, stepper = build(True)
learn(stepper, range(3))
kept = [{k: v.clone() for k, v in part.items()} for part in stepper.tensors()]
_, stepper = build(True)
learn(stepper, [7])
stepper.load(*kept)
found["loaded as saved"] = equal(kept, stepper.tensors())
learn(stepper, range(3, 6))
found["loaded goes on"] = equal(straight, stepper.tensors())
_, stepper = build(True)
stepper.load(*kept)
learn(stepper, range(3, 6))
found["loaded into a new one goes on"] = equal(straight, stepper.tensors())
refused = []
for head, optimizer in (({**kept[0], "more": kept[0]["0.bias"]}, {}), ({}, {}),
                        (kept[0], {"0.bias/exp_avg": torch.ones(3)}),
                        (kept[0], {"none/exp_avg": torch.ones(3)})):
    try:
        stepper.load(head, optimizer)
    except ValueError as problem:
        refused.append(str(problem))
found["refused"] = refused
if accelerator.is_main_process:
    print("FOUND" + json.dumps(found))
"""


def plain_norms(steps: int) -> list[float]:
    """The same in one process, with torch alone."""
    torch.manual_seed(0)
    head = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    head[2].bias.requires_grad_(False)
    matrices = [p for p in head.parameters() if p.ndim > 1]
    vectors = [p for p in head.parameters() if p.ndim == 1 and p.requires_grad]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, fused=True)
    norms = []
    for number in range(steps):
        batch = torch.randn(8, 8, generator=torch.Generator().manual_seed(number))
        (head(batch).square().sum() / 8).backward()
        trained = [p for p in head.parameters() if p.requires_grad]
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 0.5)))
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + number)
        optimizer.step()
        optimizer.zero_grad()
    return norms


@needs_deepspeed
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_engine(stage: int, tmp_path: Path) -> None:
    """Norms, skipped steps, and state that goes out and comes back whole."""
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    config = json.loads(ZERO2.read_text())
    config["zero_optimization"]["stage"] = stage
    said = launch(TORCHRUN, script, json.dumps(config))
    found = json.loads(said.partition("FOUND")[2].splitlines()[0])
    trained = ["0.bias", "0.weight", "2.weight"]
    assert found["before"] == []
    assert found["names"][0] == sorted([*trained, "2.bias"])
    assert found["names"][1] == [
        f"{n}/{key}" for n in trained for key in ("exp_avg", "exp_avg_sq", "step")
    ]
    assert found["norms"] == pytest.approx(plain_norms(6), rel=1e-5)
    assert set(found["bad norms"]) <= {"inf", "nan"}
    for name in (
        "bad steps change nothing", "loaded as saved", "loaded goes on",
        "loaded into a new one goes on",
    ):  # fmt: skip
        assert found[name] == [True, True], name
    another, unfit = "the checkpoint is of another head", "the checkpoint's optimiser state"
    for text, start in zip(found["refused"], [another, another, unfit, unfit], strict=True):
        assert text.startswith(start)


# ---- configurations


def zero(**changes: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2}, **changes}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "must be 1 or 2, got None"),
        ({"zero_optimization": {"stage": 3}}, "too small to be worth stage 3"),
        ({"zero_optimization": {"stage": 0}}, "must be 1 or 2, got 0"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer of the DeepSpeed configuration must go",
        ),
        (zero(gradient_accumulation_steps=4), "say --accumulate instead"),
        (zero(optimizer={"type": "Adam"}), "optimizer of the DeepSpeed configuration must go"),
        (zero(scheduler={}), "scheduler of the DeepSpeed configuration must go"),
        (zero(fp16={"enabled": True}), "say --precision bf16"),
    ],
)
def test_what_deepspeed_may_not_do_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _settle(config)


def test_weights_stay_in_fp32() -> None:
    config = zero(bf16={"enabled": True})
    assert _settle(config)  # the forward computes in bfloat16 ...
    assert config["bf16"] == {"enabled": False}  # ... and the weights are not turned into it
    assert not _settle(zero())


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.name)
def test_configurations_are_json(path: Path) -> None:
    assert isinstance(json.loads(path.read_text()), dict)
    if path.name.startswith("deepspeed"):
        _settle(json.loads(path.read_text()))
