"""The page `docs/in_one_page.py` writes the text of `model.generate`, and that of the library."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import specdec
from helpers.families import model_of
from specdec import demo
from specdec.demo.prompts import PROMPTS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "in_one_page.py"
NEW = 48


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("in_one_page", PAGE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain(model: Any, prompt: list[int], **how: Any) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, **how
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("title", list(PROMPTS))
def test_its_text_is_everybodys(title: str, page: ModuleType) -> None:
    model, tokenizer = demo.load_target(), demo.load_tokenizer()
    prompt = tokenizer(PROMPTS[title]).input_ids
    new, forwards = page.generate(model, prompt, NEW)
    assert new == plain(model, prompt)
    specdec.augment(model, "prompt_lookup")
    assert new == plain(model, prompt)
    assert forwards < len(new)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "deepseek_v3"])
def test_any_model_that_can_crop_its_cache(family: str, page: ModuleType) -> None:
    model = model_of(family)
    prompt = [5, 6, 7, 5, 6, 7, 5, 6]
    assert page.generate(model, prompt, NEW)[0] == plain(model, prompt)


def test_it_stops_where_the_text_ends(page: ModuleType) -> None:
    model, tokenizer = demo.load_target(), demo.load_tokenizer()
    prompt = tokenizer(next(iter(PROMPTS.values()))).input_ids
    end = plain(model, prompt)[NEW // 2]
    for ends in (end, [end, 0]):  # one id, or several
        model.generation_config.eos_token_id = ends
        new, _ = page.generate(model, prompt, NEW)
        assert new == plain(model, prompt)
        assert new[-1] == end
        assert len(new) <= NEW // 2 + 1


def test_drafts_are_what_followed_last_time(page: ModuleType) -> None:
    assert page.draft([1, 2, 3, 9, 1, 2, 4, 1, 2], 3) == [4, 1, 2]  # of equal n-grams, the newest
    assert page.draft([1, 2, 3, 8, 9, 2, 3, 7, 1, 2, 3], 2) == [8, 9]  # the longer one first
    assert page.draft([1, 2, 3], 4) == []
    assert page.draft([1], 4) == []


def test_it_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, PAGE], capture_output=True, text=True, check=True, timeout=300
    )
    assert "64 tokens, " in done.stdout
    assert "same: True" in done.stdout


def test_it_is_a_page() -> None:
    lines = PAGE.read_text("utf-8").splitlines()
    assert len(lines) <= 80
    assert max(map(len, lines)) <= 84
