"""What `augment` says of a head: what was assumed, and that it does not keep its promise."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import specdec
from specdec import demo
from specdec.errors import ConfigError, HeadWarning
from specdec.heads.checkpoints.load import load_head
from specdec.heads.promise import Promise

PROMPTS = (
    "class Stack:\n    def push(self, item):\n",
    "def read(self, size=-1):",
    "import json\n\n",
)
CALLS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 0},
    "hot": {"do_sample": True, "temperature": 2.0, "top_k": 0},
}


@pytest.fixture(scope="module")
def model() -> Any:
    return demo.load_target()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return demo.load_tokenizer()


def bare(folder: Path, change: Callable[[dict[str, Any]], object] = lambda raw: None) -> str:
    """The bundled head as another program would publish it: without the file of our own."""
    shutil.copytree(demo.head_path(), folder)
    (folder / "specdec_config.json").unlink()
    raw = json.loads((folder / "config.json").read_text())
    change(raw)
    (folder / "config.json").write_text(json.dumps(raw))
    return str(folder)


def said(found: list[warnings.WarningMessage]) -> list[str]:
    return [str(one.message) for one in found if one.category is HeadWarning]


def decode(model: Any, tokenizer: Any, rounds: int, **call: Any) -> tuple[float, int]:
    """(tokens a round, rounds) over the prompts, until there were so many rounds."""
    done = tokens = 0
    for seed in range(60):
        ids = tokenizer(PROMPTS[seed % len(PROMPTS)], return_tensors="pt")
        torch.manual_seed(seed)
        model.generate(**ids, max_new_tokens=96, **call)
        stats = specdec.last_stats(model)
        done, tokens = done + stats.rounds, tokens + stats.new_tokens
        if done >= rounds:
            break
    return tokens / done, done


MISSING: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "feedback": (lambda raw: None, "norm_output is true"),
    "residual": (lambda raw: raw.pop("norm_before_residual"), "norm_before_residual not stated"),
    "eps": (lambda raw: raw.pop("rms_norm_eps"), "rms_norm_eps not stated"),
    "MLP": (lambda raw: raw.update(intermediate_size=100), "intermediate_size is 100"),
    "rope": (lambda raw: [raw.pop(n) for n in tuple(raw) if "rope" in n], "rope not stated"),
}


@pytest.mark.parametrize("name", MISSING)
def test_augment_says_what_it_assumed(
    name: str, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    change, wanted = MISSING[name]
    path = bare(tmp_path / "head", change)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        specdec.augment(model, "eagle3", draft=path)
        decode(model, tokenizer, 8, do_sample=False)
    (text,) = said(found)  # once, however often it drafts
    assert wanted in text
    assert f"`specdec inspect {path} --target" in text
    assert "--probe`" in text


def test_a_head_that_says_everything_is_not_spoken_of(model: Any, tokenizer: Any) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        specdec.augment(model, "eagle3", draft=str(demo.head_path()))
    assert said(found) == []


def test_a_published_head_drafts_as_well_as_ours(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    found = {}
    for path in (str(demo.head_path()), bare(tmp_path / "head")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HeadWarning)
            specdec.augment(model, "eagle3", draft=path)
        found[path] = decode(model, tokenizer, 20, do_sample=False)
    ours, theirs = found.values()
    assert ours == theirs


@pytest.mark.parametrize(
    ("top_k", "call"),
    [pytest.param(8, "greedy", marks=pytest.mark.slow), (8, "sampled"), (1, "greedy"), (1, "hot")],
)
def test_a_good_head_keeps_its_promise(top_k: int, call: str, model: Any, tokenizer: Any) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        specdec.augment(model, "eagle3", draft=str(demo.head_path()), top_k=top_k)
        decode(model, tokenizer, 200 if call == "greedy" else 120, **CALLS[call])
    assert said(found) == []


@pytest.mark.parametrize(
    ("top_k", "call"),
    [(8, "greedy"), pytest.param(8, "sampled", marks=pytest.mark.slow), (1, "sampled")],
)
def test_a_head_that_is_run_wrong_is_found_out(
    top_k: int, call: str, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    path = bare(tmp_path / "head", lambda raw: raw.update(feed_post_norm=False))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        specdec.augment(model, "eagle3", draft=path, top_k=top_k)
        decode(model, tokenizer, 130, **CALLS[call])
    (text,) = said(found)
    assert "drafts far worse than it promises: of its likeliest tokens after the first" in text
    assert f"`specdec inspect {path} --target" in text


def test_layers_that_mean_nothing_are_found_out(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """A head that was made for other states is wrong from its first token on."""
    head = load_head(str(demo.head_path()), dtype=torch.float32).head
    assert head.lm_head is not None
    with torch.no_grad():  # as sure as before, of other tokens
        head.lm_head.weight.copy_(head.lm_head.weight.roll(7, 0))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        specdec.augment(model, "eagle3", draft=head)
        decode(model, tokenizer, 80, do_sample=False)
    (text,) = said(found)
    assert "of its likeliest first tokens" in text


def test_nothing_is_read_from_the_device_while_it_drafts(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    broken = Promise.broken
    monkeypatch.setattr(Promise, "broken", lambda self: (asked.append(1), broken(self))[1])
    specdec.augment(model, "eagle3", draft=str(demo.head_path()))
    decode(model, tokenizer, 1, do_sample=False)
    stats = specdec.last_stats(model)
    assert asked == [1]  # at the end of the call
    assert stats.device_to_host_copies == stats.rounds + 1


def test_a_head_of_no_numbers_is_refused(model: Any, tmp_path: Path) -> None:
    path = Path(bare(tmp_path / "head"))
    weights = load_file(path / "model.safetensors")
    weights["fc.weight"][0, :4] = float("nan")
    save_file(weights, path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"'fc\.weight' of the draft head holds 4 of 110,592"):
        specdec.augment(model, "eagle3", draft=str(path))
