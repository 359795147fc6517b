"""The options of `specdec train`: frozen names, checks, what a resumed run compares."""

from __future__ import annotations

import ast
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import make_head, make_options

from specdec.errors import ConfigError
from specdec_training.features.options import DataFeaturesOptions
from specdec_training.run.evaluate import Acceptance
from specdec_training.run.optim import Guard, lr_factor, make_optimizer
from specdec_training.run.options import TrainOptions, check_train_options, resolved
from specdec_training.run.progress import StepLog, summary
from specdec_training.run.state import Clock

FROZEN = """
target data output features init_from steps minutes max_steps intermediate_size taps fc_norm
feed_post_norm norm_before_residual ttt_steps loss step_decay reduction noise max_length batch_rows
accumulate lr warmup final_lr betas weight_decay clip max_bad_steps precision dtype recompute device
target_device_map deepspeed threads seed eval_every eval_prompts eval_tokens depth top_k nodes
patience save_every keep log_every tensorboard no_colour
"""
GIVEN = TrainOptions(data=Path("d"), output=Path("o"))


def test_option_list_is_frozen() -> None:
    assert [field.name for field in fields(TrainOptions)] == FROZEN.split()


def test_every_option_has_a_help_text() -> None:
    import tyro

    with pytest.raises(SystemExit):
        tyro.cli(TrainOptions, args=["--help"])
    source = Path(sys.modules[TrainOptions.__module__].__file__ or "").read_text()
    body = source.split("class TrainOptions")[1].split("    def ")[0]
    assert body.count('    """') == len(fields(TrainOptions)) + 1


@pytest.mark.parametrize("options", [TrainOptions, DataFeaturesOptions])
def test_layers_are_named_one_by_one(options: type[TrainOptions | DataFeaturesOptions]) -> None:
    """A list option that a second flag overwrites would train on other layers, and not say so."""
    import tyro

    given = ["--taps", "-1", "--taps", "2", "--taps=4"]
    assert tyro.cli(options, args=given).taps == (-1, 2, 4)


def test_options_import_nothing_heavy() -> None:
    tree = ast.parse(Path(sys.modules[TrainOptions.__module__].__file__ or "").read_text())
    found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    found |= {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    assert not found & {"torch", "transformers", "accelerate", "numpy"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data": None}, "--data is missing"),
        ({"output": None}, "--output is missing"),
        ({"steps": 5, "minutes": 1.0}, "--steps or --minutes"),
        ({"steps": 0}, "--steps must be from 1"),
        ({"lr": 0.0}, "--lr must be above 0"),
        ({"lr": float("nan")}, "--lr must be above 0"),
        ({"warmup": 1.5}, "--warmup must be from 0 to 1"),
        ({"noise": -1.0}, "--noise must be from 0 to 100"),
        ({"betas": (0.9, 1.0)}, "--betas"),
        ({"batch_rows": 0}, "--batch-rows"),
        ({"target_device_map": "cuda:7"}, "--target-device-map"),
        ({"depth": 100_000}, "--depth must be from 1 to 4095"),
        ({"lr": float("inf")}, "--lr must be above 0 and finite"),
        ({"init_from": "head", "taps": (1, 2)}, "leave out --taps"),
    ],
)
def test_impossible_values_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check_train_options(replace(GIVEN, **changes))


def test_possible_values_pass() -> None:
    check_train_options(GIVEN)
    check_train_options(replace(GIVEN, minutes=0.5, max_steps=0, eval_every=0))


def test_a_resumed_run_names_what_differs() -> None:
    before = GIVEN.to_json()
    assert GIVEN.differences(before) == []
    assert replace(GIVEN, log_every=3, output=Path("p")).differences(before) == []
    assert replace(GIVEN, lr=1e-3).differences(before) == ["--lr: None before, 0.001 now"]
    assert GIVEN.differences(before | {"gone": 1}) == ["--gone: 1 before, None now"]


def test_defaults_follow_the_targets_width() -> None:
    toy, large = resolved(GIVEN, 192), resolved(GIVEN, 4096)
    assert (toy.ttt_steps, toy.max_length) == (5, 512)
    assert (large.ttt_steps, large.max_length, large.lr) == (7, 2048, 1e-4)
    assert resolved(replace(GIVEN, lr=2e-3, ttt_steps=3), 192).lr == 2e-3


def test_schedule() -> None:
    assert lr_factor(0.01, 0.02, 0.1) == 0.5
    assert lr_factor(0.02, 0.02, 0.1) == 1.0
    assert lr_factor(1.0, 0.02, 0.1) == pytest.approx(0.1)
    assert lr_factor(0.5, 0.0, 0.0) == pytest.approx(0.5)


def test_clock_by_steps_and_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("specdec_training.run.state.time.monotonic", lambda: now[0])
    assert Clock(40, None).share(10) == 0.25
    clock = Clock(None, 2.0, spent=30.0)
    now[0] = 130.0
    assert clock.share(999) == 0.5
    clock.reserve = 40.0
    assert clock.share(0) == 0.75
    now[0] = 900.0
    assert clock.share(0) == 1.0
    clock = Clock(None, 2.0, spent=20.0)  # of 120 seconds
    now[0] = 910.0
    clock.begin()
    assert clock.share(0) == 0
    now[0] = 955.0
    assert clock.share(0) == 0.5
    assert Clock(None, 2.0, spent=75.0, begun=clock.begun).share(0) == 0.5
    clock.reserve = 100.0  # as long as all that is left
    assert clock.share(0) == 1.0


def test_only_matrices_are_decayed(tmp_path: Path) -> None:
    from train_helpers import make_target

    head = make_head(make_target())
    optimizer = make_optimizer(head, make_options(tmp_path, weight_decay=0.1))
    decayed, free = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1
    assert free["weight_decay"] == 0
    assert all(p.ndim == 1 for p in free["params"])
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert head.embed_tokens is not None
    assert id(head.embed_tokens.weight) not in trained


def test_guard_counts_in_a_row() -> None:
    guard = Guard(1)
    assert not guard.passes(float("nan"), 1.0)
    assert guard.passes(1.0, 1.0)
    assert not guard.passes(1.0, float("inf"))
    guard.check("x")
    assert (guard.skipped, guard.in_a_row) == (2, 1)


def test_log_is_cut_where_the_checkpoint_stood(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = StepLog(path)
    log.write({"step": 1})
    size = log.size
    log.write({"step": 2})
    log.close()
    with path.open("ab") as stream:
        stream.write(b'{"half')
    log = StepLog(path, size)
    log.write({"step": 3})
    log.close()
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'
    path.write_bytes(b'{"step": 1}\n{"st')  # the disk was full
    with pytest.warns(UserWarning, match="shorter than when the checkpoint was written"):
        log = StepLog(path, 24)
    log.write({"step": 3})
    log.close()
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_summary_names_start_best_and_end() -> None:
    modes = ("chain_t0", "tree_t0", "chain_t1", "tree_t1")
    scores = ((0, 1.0), (5, 2.5), (9, 2.0))
    history = [Acceptance(step, dict.fromkeys(modes, tau), True) for step, tau in scores]
    text = "\n".join(summary(history, {"prompt_lookup_t0": 1.5}, colour=False))
    assert all(part in text for part in ("best", "2.50", "1.50"))
    assert "every text was that of plain generate" in text
    assert "\x1b[32m" in "\n".join(summary(history, {}, colour=True))
    assert summary([], {}, colour=False)


def test_tensorboard_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from specdec_training.run.progress import Progress

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        Progress(1, 0, True, Path("x"))
    assert torch.is_grad_enabled()
