"""What `specdec bench run` says at its end of wrong texts, wrong laws and texts of arms' own."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len

from bench.fake_results import ARMS, PROVENANCE, Fake, FakeArm, sampled, with_arm
from specdec_bench.arm_names import parse_arm
from specdec_bench.measure import command
from specdec_bench.measure.options import RunOptions
from specdec_bench.measure.setting_run import not_promised
from specdec_bench.measure.terminal_table import print_results
from specdec_bench.results.records import Results, Setting

EAGLE = "eagle3:depth=3,top_k=1"
X = "\u00d7"  # the sign of multiplication


def end_of(
    results: Results, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Exit code and words of a run that gave these results."""
    monkeypatch.setattr(command, "run", lambda *_, **__: results)
    code = command.run_run(RunOptions(output=Path("nowhere.jsonl"), no_colour=True))
    return code, " ".join(capsys.readouterr().out.split())


def test_a_good_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    results = replace(Fake().results(), sampling=[sampled(EAGLE, True)])
    code, words = end_of(results, monkeypatch, capsys)
    assert code == 0
    assert f"1.62{X}" in words
    assert "WRONG" not in words


@pytest.mark.parametrize("name", [EAGLE, "loop0_again"])
def test_a_wrong_text_takes_all_speedups(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    results = with_arm(Fake(), name, wrong=(3,)).results()
    code, words = end_of(results, monkeypatch, capsys)
    assert code == 1
    assert not re.findall(rf"\d{X}", words)
    place = "unit prompt3/0, row 0, token 7"
    assert f"{name}: WRONG TEXT, first at {place}: no speed-up of any arm" in words


def test_a_wrong_law_takes_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = replace(Fake().results(), sampling=[sampled(EAGLE, False)])
    code, words = end_of(results, monkeypatch, capsys)
    assert code == 1
    assert f"WRONG sampling of {EAGLE}: p = 1e-09" in words
    assert f"{EAGLE}: no speed-up: {EAGLE} samples from another distribution" in words
    assert f"1.62{X}" not in words
    assert f"1.21{X}" in words


def test_a_text_that_is_not_promised_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {**PROVENANCE, "not_promised": {"0": ["hf_prompt_lookup"]}}
    hot = Fake(settings=(Setting(temperature=1.0),), provenance=facts)
    run = with_arm(hot, "hf_prompt_lookup", own_texts=True)
    code, words = end_of(run.results(), monkeypatch, capsys)
    assert code == 0
    assert re.search(rf"hf_prompt_lookup not promised 0 of 12 as plain's 0\.8\d{X}", words)
    assert "keeps the target's distribution only" in words


def test_a_gpu_has_no_unexplained_share(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for device, said in (("cpu", True), ("cuda", False)):
        fake = Fake(provenance={**PROVENANCE, "device": device})
        _, words = end_of(with_arm(fake, EAGLE, speed=4.0).results(), monkeypatch, capsys)
        assert ("is unexplained" in words) == said


@pytest.mark.parametrize(("columns", "rest"), [(80, "$"), (200, " +exact 12 of 12 .* 1.6")])
def test_a_table_that_does_not_fit_is_a_list(
    columns: int, rest: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    arms = {**ARMS, "\x1b[2J文": FakeArm(1.3, 2.0)}
    for no_colour in (True, False):
        print_results(Fake(arms=arms).results(), no_colour)
        said = capsys.readouterr().out
        assert ("\x1b[32m" in said) == (not no_colour and columns == 200)
        assert "\x1b[2J" not in said
        plain = re.sub(r"\x1b\[\d*m", "", said).splitlines()
        row = next(line for line in plain if line.startswith(EAGLE))
        assert re.match(re.escape(EAGLE) + rest, row)
        assert plain[plain.index(row) + 1].startswith("  text exact 12 of 12") == (columns == 80)
        assert max(map(cell_len, plain)) <= columns


def test_the_header_says_whose_texts_are_their_own() -> None:
    class Own:
        promises_text = False

    specs = [parse_arm(s) for s in ("hf", "hf_prompt_lookup", "hf_assisted", "suffix")]
    specs.append(parse_arm("draft_model:draft_sampling=true"))
    settings = [Setting(), Setting(temperature=0.7)]
    names = ["hf_prompt_lookup", "hf_assisted", "draft_model:draft_sampling=true"]
    assert not_promised(settings, specs, {}) == {"1": names}
    own = {"mine": Own, "other": lambda _: None}
    assert not_promised(settings, specs, own) == {"0": ["mine"], "1": [*names, "mine"]}
