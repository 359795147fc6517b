"""The sweep over transformers' classes: a few of them here, all of them behind `-m slow`."""

from __future__ import annotations

import json

import pytest
import torch

from helpers.drafters import THROW_AWAY
from specdec.registry import methods
from sweep import cells, judge, page, tiny
from sweep.cells import Cell, Report
from sweep.situations import SITUATIONS, Situation, call, prompts

pytestmark = pytest.mark.usefixtures("throw_away_methods")

# A kind each, beside the families of the laws: what the self-test says, and the modes calls had.
FEW = {
    "git": ("tree", {"tree", "plain"}),  # its own padded batches are wrong
    "deepseek_v32": ("chain", {"plain"}),  # an indexer, beyond its top-k
    "mamba2": ("chain", {"chain"}),  # a recurrence
    "rwkv": ("plain", {"plain"}),  # no cache that could be put back
}
LONG = ("deepseek_v32", "mamba2")


def assert_like_plain(model_type: str) -> Report:
    report = cells.sweep(model_type)
    assert not page.wrong(report), page.complaint(report)
    assert len(report.cells) == (len(SITUATIONS) - len(report.excluded)) * len(methods.names())
    return report


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in FEW],
)
def test_few(model_type: str) -> None:
    report = assert_like_plain(model_type)
    mode, of_calls = FEW[model_type]
    assert report.mode == mode, report.reason
    assert {c.mode for c in report.cells if c.method not in THROW_AWAY} == of_calls
    assert report.distinct >= 4, "a text that repeats one token would pass with a wrong mask"


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type", [name for name in (*tiny.names(), *tiny.VARIANTS) if name not in FEW]
)
def test_every(model_type: str) -> None:
    if model_type in tiny.UNBUILT:
        pytest.skip(tiny.UNBUILT[model_type])
    assert_like_plain(model_type)


def test_layers_of_every_kind_are_kept() -> None:
    assert tiny.tiny_config("qwen3_next").layer_types == ["linear_attention", "full_attention"]
    assert tiny.tiny_config("gemma3_text").layer_types == ["sliding_attention", "full_attention"]
    assert tiny.tiny_config("llama").num_hidden_layers == 2


def test_names_in_the_tables_exist() -> None:
    """A type that transformers drops, or a class that becomes buildable, must not linger here."""
    assert set(tiny.UNBUILT) <= set(tiny.names())


def test_a_wrong_token_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plainly = call

    def tampered(model, situation, **how):  # type: ignore[no-untyped-def]
        sequences, state = plainly(model, situation, **how)
        if isinstance(how.get("specdec"), cells.SpecConfig) and how["specdec"].method == "oracle":
            sequences = sequences.clone()
            sequences[-1, -3] += 1
        return sequences, state

    monkeypatch.setattr(cells, "call", tampered)
    report = cells.sweep("llama")
    found = {(cell.situation, cell.method) for cell in report.cells if cell.outcome == "differs"}
    assert found == {(situation.name, "oracle") for situation in SITUATIONS}


@pytest.mark.parametrize(
    ("margin", "noise", "excused"), [(5e-5, 1e-4, True), (2e-4, 1e-4, False), (0.1, 0.2, False)]
)
def test_near_ties(
    margin: float, noise: float, excused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A choice is excused when rounding is larger than its margin, and is no more than rounding."""
    situation = SITUATIONS[0]
    width = prompts(1)["input_ids"].shape[1]
    wanted = torch.full((1, width + 2), 5)
    got = wanted.clone()
    got[0, width + 1] = 6
    steps = torch.tensor([-1.0, 1.0, -1.0, 1.0, -1.0, 2.0, 2.0 - margin]).double()
    whole = steps.clone()
    whole[2] += noise
    monkeypatch.setattr(judge, "_scores", lambda *args: whole if args[-1] else steps)
    assert judge.near_ties(None, situation, got, wanted) is excused


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.name)
def test_scores_are_those_of_plain(situation: Situation) -> None:
    """What near-ties are judged by picks the tokens that plain `generate` picked."""
    setup = cells.prepare("llama")
    model = cells.specdec.augment(setup.model, "none")
    wanted, _ = call(model, situation, specdec=False)
    width = prompts(situation.rows)["input_ids"].shape[1]
    for row in range(situation.rows):
        for at in (width, width + 5):
            for whole in (True, False):
                scores = judge._scores(model, situation, wanted[:, :at], row, whole)
                assert int(scores.argmax()) == int(wanted[row, at])


def test_the_page_counts() -> None:
    reports = [
        Report(
            "llama",
            "LlamaForCausalLM",
            "tree",
            "it can",
            cells=[
                Cell("greedy", "none", "same", "tree", "it can"),
                Cell("greedy, 3 padded rows", "none", "differs", "plain", "a|b"),
            ],
        ),
        Report("blt", "BltForCausalLM", excluded={s.name: "it fails" for s in SITUATIONS}),
        Report("rwkv", "RwkvForCausalLM", failed="its process died"),
    ]
    assert Report.from_json(json.loads(json.dumps(reports[0].to_json()))) == reports[0]
    assert [page.wrong(report) for report in reports] == [True, False, True]
    text = page.render(reports)
    assert "1 of 3 model types took part, and 0 variants (1 tree, 0 chain, 0 plain)" in text
    assert "2 cells: 1 differing, 1 errors, 0 margins" in text
    row = r"| llama | `LlamaForCausalLM` | tree | it can; plain in padded batches: a\|b | 2 | 1 |"
    assert row in text
    assert "| blt | everything | it fails |" in text
    assert "its process died" in text
