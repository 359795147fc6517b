"""A sample of the random calls, and that the comparison sees what differs. All: `make fuzz`."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fuzz import calls, parts
from fuzz.compare import Outcome, differences
from fuzz.draw import Call, Turn, draw
from helpers.names import CACHE

FEW = ("llama", "gemma3", "gpt2", "lfm2")
SEED, SAMPLE = 14, 40

pytestmark = pytest.mark.usefixtures("throw_away_methods")


def test_a_sample() -> None:
    modes: Counter[str] = Counter()
    for number in range(SAMPLE):
        result = calls.check(draw(SEED, number, FEW))
        assert not result.found, f"{result.call.source()}\n{result.found}"
        modes.update(result.modes)
    assert modes["tree"] >= 10, modes
    assert min(modes[mode] for mode in ("chain", "plain", "raises")) >= 2, modes


def test_calls_do_not_depend_on_each_other() -> None:
    assert [draw(3, n, FEW) for n in (7, 5)] == [draw(3, n, FEW) for n in (7, 5)]
    assert len({draw(3, n, FEW).source() for n in range(50)}) == 50


CALL = Call(0, 0, "llama", "float64", (Turn({
    "input_ids": "rows(1, [5, 3])", "attention_mask": "padding([5, 3])", "do_sample": "True",
    "max_new_tokens": "6", "eos_token_id": "list(range(3, 30))", CACHE: "DynamicCache()",
    "return_dict_in_generate": "True", "output_scores": "True", "output_hidden_states": "True",
    "streamer": "Stream()",
}, "SpecConfig('oracle', {'truth': truth})", 4),))  # fmt: skip


def test_a_printed_call_runs(tmp_path: Path) -> None:
    script = CALL.source() + "\nassert plain.sequences.tolist() == ours.sequences.tolist()\n"
    (tmp_path / "call.py").write_text(script, encoding="utf-8")
    here = Path(parts.__file__).parents[1]
    run = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(here)!r})\n{script}"]
    subprocess.run(run, check=True, timeout=300)


def outcomes() -> tuple[Outcome, Outcome]:
    model, turn = parts.load(CALL.family, torch.float64), CALL.turns[0]
    plain = calls._run(model, turn, CALL, None, None)
    return plain, calls._run(model, turn, CALL, None, plain)


def _text(ours: Outcome) -> None:
    ours.value.sequences[0, -1] += 1


def _scores(ours: Outcome) -> None:
    ours.value.scores[0][1, 7] += 1e-3


def _unscored(ours: Outcome) -> None:
    ours.value.scores[0][1] = 0


def _hidden(ours: Outcome) -> None:
    ours.value.hidden_states[0][-1][0, -1, 3] += 1e-3


def _cache(ours: Outcome) -> None:
    ours.next_turn["logits"][0, 1] += 1e-3


def _slots(ours: Outcome) -> None:
    ours.next_turn["slots"] += 1


def _generator(ours: Outcome) -> None:
    ours.generator = torch.random.fork_rng and ours.generator.roll(1)


def _stream(ours: Outcome) -> None:
    ours.seen[0].pop()


def _argument(ours: Outcome) -> None:
    changed: Tensor = ours.given["input_ids"]
    changed[0, 0] += 1


def _kind(ours: Outcome) -> None:
    ours.value = ours.value.sequences


def _raised(ours: Outcome) -> None:
    ours.value = ValueError("no")


@pytest.mark.parametrize("spoil", [
    _text, _scores, _unscored, _hidden, _cache, _slots, _generator, _stream, _argument, _kind,
    _raised,
])  # fmt: skip
def test_what_differs_is_found(spoil: Any) -> None:
    plain, ours = outcomes()
    assert differences(plain, ours) == []
    spoil(ours)
    assert len(differences(plain, ours)) == 1
