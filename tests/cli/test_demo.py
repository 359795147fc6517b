"""The demo: its parts on a tiny random model, and the whole on the bundled toy."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import make_dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from helpers.heads import head_for
from specdec import demo, register_drafter
from specdec.artifacts import places
from specdec.artifacts.terminal import bar, by_round, colour_wanted, columns
from specdec.cli import race, show
from specdec.cli.options import DemoOptions
from specdec.cli.race import Arm, ArmResult, choose_arms
from specdec.config import SpecConfig
from specdec.demo.corpus import HELD_OUT_MODULES
from specdec.demo.prompts import PROMPTS
from specdec.drafters.row import DraftRow, RowDrafter
from specdec.errors import SpecdecError
from specdec.heads.checkpoints.load import save_head
from specdec.registry import methods
from specdec.targets.self_test import Capability

Run = Callable[..., SimpleNamespace]
SMALL = ("demo", "--max-new-tokens", 12, "--prompts", 2, "--repetitions", 1)
TOY = Path(demo.__file__).parent / "target" / "config.json"
needs_toy = pytest.mark.skipif(
    not TOY.is_file(), reason="the bundled target is not built: python -m specdec.demo.build_target"
)


@pytest.fixture
def small_target(
    tmp_path: Path, model_writer: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A random model with room for the prompts in place of the bundled one."""
    folder = model_writer(tmp_path / "target")
    config = folder / "config.json"
    text = config.read_text().replace(
        '"max_position_embeddings": 192', '"max_position_embeddings": 1024'
    )
    config.write_text(text)
    monkeypatch.setattr(demo, "target_path", lambda: folder)
    model = demo.load_target()
    layers = model.config.num_hidden_layers
    save_head(head_for(model), tmp_path / "head", fingerprint=None, num_target_layers=layers)
    monkeypatch.setattr(race, "head_path", lambda: tmp_path / "head")
    return folder


def table_of(output: str) -> dict[str, list[str]]:
    """Method -> cells of its row."""
    lines = output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("method "))
    rows = [re.split(r" {2,}", line) for line in lines[start + 1 :]]
    return {row[0]: row[1:] for row in rows[: next(i for i, r in enumerate(rows) if r == [""])]}


def test_demo_prints_every_method(small_target: Path, run: Run) -> None:
    threads = torch.get_num_threads()
    shown = run(*SMALL)
    assert shown.code == 0, shown.err
    table = table_of(shown.out)
    runnable = [name for name in methods.names() if name != "draft_model"]
    assert list(table) == ["plain generate", *runnable]
    assert "draft_model was left out: draft_model needs draft=" in " ".join(shown.out.split())
    assert all(row[-1] == "yes" for name, row in table.items() if name != "plain generate")
    assert table["none"][4] == "22"  # rounds: two prompts, the first token comes from the prefill
    assert "1 thread (--threads)" in shown.out
    assert "\x1b" not in shown.out
    assert torch.get_num_threads() == threads


def test_demo_samples_with_one_seed(small_target: Path, run: Run) -> None:
    shown = run(*SMALL, "--sample", "--seed", 3)
    assert shown.code == 0
    assert "sampled at 0.8, seed 3" in shown.out
    assert {row[-1] for row in table_of(shown.out).values()} == {"-", "yes"}


def test_demo_in_bfloat16_promises_nothing(small_target: Path, run: Run) -> None:
    shown = run(*SMALL, "--dtype", "bfloat16")
    assert shown.code == 0
    assert "bfloat16 rounds" in shown.out
    assert "NO" not in shown.out.split("method ")[-1]


def test_a_differing_text_fails_the_demo(
    small_target: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = show.Race.run

    def wrong(race: show.Race, arm: Arm, prompt: int) -> tuple[list[int], float]:
        tokens, seconds = honest(race, arm, prompt)
        return ([*tokens[:-1], tokens[-1] ^ 1] if arm.name == "prompt_lookup" else tokens), seconds

    monkeypatch.setattr(show.Race, "run", wrong)
    shown = run(*SMALL)
    assert shown.code == 1
    row = table_of(shown.out)["prompt_lookup"]
    assert row[-1] == "NO (0 of 2)"
    assert row[1:3] == ["-", "-"]  # no speed-up for another text


def test_a_target_without_trees_is_said_so(
    small_target: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(show, "capability", lambda _: Capability("plain", "it is odd"))
    failed = run(*SMALL)
    assert failed.code == 2
    assert "nothing to compare: it is odd" in failed.err


@pytest.fixture
def extra_methods() -> Iterator[None]:
    """A method that joins by itself, and one that cannot run without more information."""

    class Joins(RowDrafter):
        class Row(DraftRow):
            def propose(self, budget):
                from specdec import TokenTree

                return TokenTree.chain(self.text[-1], self.text[:2])

    class NeedsMore(RowDrafter):
        pass

    NeedsMore.Config = make_dataclass("Config", [("draft", str)])

    register_drafter("joins", Joins)
    methods.register("needs_more", NeedsMore)
    yield
    for name in ("joins", "needs_more"):
        methods.unregister(name)


def test_new_methods_join_the_demo(extra_methods: None, small_target: Path, run: Run) -> None:
    shown = run(*SMALL)
    assert table_of(shown.out)["joins"][-1] == "yes"
    assert "needs_more was left out" in shown.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-new-tokens", 0), "--max-new-tokens must be at least 1"),
        (("--max-new-tokens", 5000), "--max-new-tokens must be at most"),
        (("--prompts", 99), "--prompts must be 1 to 6"),
        (("--prompts", 0), "--prompts must be 1 to 6"),
        (("--repetitions", 0), "--repetitions must be at least 1"),
        (("--threads", 0), "--threads must be at least 1"),
        (("--seed", -1), "--seed must not be negative"),
        (("--device", "nonsense"), "--device nonsense cannot be used"),
    ],
)
def test_bad_input(
    arguments: tuple[object, ...], message: str, small_target: Path, run: Run
) -> None:
    failed = run("demo", *arguments)
    assert failed.code == 2
    assert failed.err.startswith("specdec: error: ")
    assert message in failed.err
    assert failed.err.count("\n") == 1


def test_a_missing_target_says_what_to_do(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "__file__", str(tmp_path / "places.py"))
    with pytest.raises(SpecdecError, match="bundled demo target is missing"):
        demo.target_path()
    failed = run("demo")
    assert failed.code == 2
    assert "specdec.demo.build_target" in failed.err


def test_rounds_are_coloured_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert colour_wanted(Terminal())
    assert not colour_wanted(Terminal(), no_colour=True)
    assert not colour_wanted(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colour_wanted(Terminal())


def test_by_round() -> None:
    pieces = ["a ", "b\nc", "d"]
    assert by_round(pieces, colour=False) == "a |b\nc|d"
    coloured = by_round(pieces, colour=True)
    assert re.sub(r"\x1b\[\d+m", "", coloured) == "a b\ncd"
    assert len(set(re.findall(r"\x1b\[3\dm", coloured))) == 2
    assert all(line.endswith("\x1b[0m") for line in coloured.split("\n"))


def test_pieces_keep_split_characters_whole(model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = tokenizer("aé€b").input_ids
    assert len(ids) == 7
    for cut in range(1, 7):
        pieces = show._pieces([ids[:cut], ids[cut:]], tokenizer)
        assert "".join(pieces) == "aé€b"
        assert "\ufffd" not in "".join(pieces)


def test_columns_and_bars() -> None:
    assert columns([["a", "1"], ["bb", "100"]], gap=1) == ["a    1", "bb 100"]
    assert bar(0.5, io.TextIOWrapper(io.BytesIO(), "ascii"), width=4) == "##"
    assert bar(0.001, io.TextIOWrapper(io.BytesIO(), "utf-8"), width=4) == "█"
    assert bar(0, io.TextIOWrapper(io.BytesIO(), "utf-8")) == ""


def test_results_compare_texts_and_times() -> None:
    plain = ArmResult(Arm("plain"), [2.0, 2.0], 40, {0: [1, 2], 1: [3, 4]})
    fast = ArmResult(Arm("x", SpecConfig("none")), [1.0, 1.0], 40, {0: [1, 2], 1: [3, 5]})
    assert fast.speed_over(plain) == 2.0
    assert fast.identical_to(plain) == 1
    fast.unstable.add(0)
    assert fast.identical_to(plain) == 0
    assert plain.identical_to(plain) == 2


def test_long_texts_are_shortened() -> None:
    text = "\n".join(map(str, range(40)))
    assert show._shortened(text).endswith("23\n... and 16 lines more")
    assert show._shortened("a\nb") == "a\nb"


def test_prompts_are_our_own_and_short() -> None:
    assert len(PROMPTS) == 6
    for text in PROMPTS.values():
        assert text.endswith("\n")
        assert 10 <= text.count("\n") <= 25


def test_defaults_are_small() -> None:
    options = DemoOptions()
    assert options.threads == 1
    assert options.dtype == "float32"
    assert options.prompts == len(PROMPTS)


@needs_toy
def test_bundled_target() -> None:
    model, tokenizer = demo.load_target(), demo.load_tokenizer()
    assert model.dtype == torch.float32
    assert not model.training
    assert demo.load_target("bfloat16").dtype == torch.bfloat16
    assert 3e6 < sum(p.numel() for p in model.parameters()) < 4e6
    text = "class Stack:\n    def push(self, x):  # é€\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == model.config.vocab_size
    size = sum(path.stat().st_size for path in demo.target_path().iterdir())
    assert size <= 9_000_000
    card = (demo.target_path() / "README.md").read_text()
    assert all(name in card for name in HELD_OUT_MODULES)


@needs_toy
def test_demo_of_the_bundled_target(run: Run) -> None:
    shown = run("demo", "--max-new-tokens", 48, "--prompts", 3, "--repetitions", 1)
    assert shown.code == 0
    table = table_of(shown.out)
    assert {row[-1] for row in table.values()} == {"-", "yes"}
    for method in ("prompt_lookup", "lookahead"):  # tokens a round: no timing in it
        assert float(table[method][3]) > 1.2


@needs_toy
def test_generate_defaults_to_the_bundled_target(run: Run) -> None:
    made = run("generate", "--prompt", "class Stack:\n", "--max-new-tokens", 8, "--method", "none")
    assert made.code == 0
    assert made.out.strip()


@needs_toy
def test_generate_takes_the_toys_own_head(run: Run) -> None:
    given = ("generate", "--prompt", "class Stack:", "--max-new-tokens", 12, "--stats")
    plain, drafted = run(*given), run(*given, "--method", "eagle3", "--option", "depth=3")
    assert (drafted.code, drafted.out) == (0, plain.out), drafted.err
    assert "draft" in drafted.err


def test_choose_arms_covers_all_methods() -> None:
    arms, left_out = choose_arms(demo.load_target())
    assert {arm.name for arm in arms} | set(left_out) == {"plain generate", *methods.names()}
