"""One name for the KV cache, whatever transformers calls it; releases that were not tested."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

import specdec
from helpers.hf import oracle, plain, prompt, tiny_llama
from helpers.names import CACHE, OLD, RENAMED, cache_of
from specdec.errors import UntestedVersionWarning
from specdec.hf import names

NEW = 8
ROOT = Path(specdec.__file__).parent
NAMES = [CACHE, OLD, "cache_params"] if RENAMED else [CACHE]


@pytest.fixture
def fresh_warning() -> Iterator[None]:
    names.warn_when_untested.cache_clear()
    yield
    names.warn_when_untested.cache_clear()


@pytest.mark.parametrize("name", NAMES)
def test_a_users_cache_is_kept_under_every_name_that_generate_takes(name: str) -> None:
    model, ids, reference, cache = tiny_llama(), prompt(), DynamicCache(), DynamicCache()
    wanted = plain(model, ids, max_new_tokens=NEW, **{CACHE: reference})
    specdec.augment(model, config=oracle(wanted, ids.shape[1]))
    got = model.generate(ids, max_new_tokens=NEW, **{name: cache})
    stats = specdec.last_stats(model)
    assert torch.equal(got, wanted)
    assert stats.mode == "tree"
    assert stats.rounds < NEW - 1
    assert cache.get_seq_length() == reference.get_seq_length() == wanted.shape[1] - 1
    more = torch.cat([wanted, prompt(3)], dim=1)
    expected = plain(model, more, max_new_tokens=NEW, **{CACHE: reference})
    assert torch.equal(model.generate(more, max_new_tokens=NEW, **{name: cache}), expected)


@pytest.mark.skipif(not RENAMED, reason="this transformers has one name for the cache")
def test_old_names_keep_their_warning_and_the_new_one_wins() -> None:
    model = specdec.augment(tiny_llama(), "prompt_lookup")
    with pytest.warns(FutureWarning, match=f"{OLD}.* is deprecated"):
        model.generate(prompt(), max_new_tokens=NEW, **{OLD: DynamicCache()})
    ignored, used = DynamicCache(), DynamicCache()
    with pytest.warns(FutureWarning, match=f"ignoring deprecated .{OLD}"):
        got = model.generate(prompt(), max_new_tokens=NEW, **{OLD: ignored, CACHE: used})
    assert used.get_seq_length() == got.shape[1] - 1
    assert ignored.get_seq_length() == 0


def test_no_deprecated_name_is_used_by_a_call() -> None:
    model = specdec.augment(tiny_llama(), "prompt_lookup")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        out = model.generate(prompt(), max_new_tokens=NEW, return_dict_in_generate=True)
    assert specdec.last_stats(model).mode == "tree"
    assert cache_of(out).get_seq_length() == out.sequences.shape[1] - 1
    assert CACHE in out


def test_one_file_knows_the_names() -> None:
    others = [path for path in ROOT.rglob("*.py") if path != ROOT / "hf" / "names.py"]
    others += [*(ROOT.parent / "benchmarks").rglob("*.py")]
    others += [*(ROOT.parent / "draft_training").rglob("*.py")]
    named = re.compile(r"past_key_values|cache_params|ALL_CACHE_NAMES")
    assert [str(path) for path in others if named.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.usefixtures("fresh_warning")
def test_a_newer_transformers_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            specdec.augment(tiny_llama(), "prompt_lookup")
    messages = [str(w.message) for w in said if w.category is UntestedVersionWarning]
    assert len(messages) == 1
    assert "5.99.0 is newer than" in messages[0]
    assert "5.99.0 is newer" in names.tested_range()


@pytest.mark.usefixtures("fresh_warning")
@pytest.mark.parametrize("version", ["5.16.0", "5.24.0", "5.24.3", "5.24.0.dev0"])
def test_a_tested_transformers_is_not(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", version)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntestedVersionWarning)
        specdec.augment(tiny_llama(), "prompt_lookup")


def test_the_pinned_release_is_the_newest_tested_one() -> None:
    constraints = (ROOT.parent / "constraints.txt").read_text(encoding="utf-8")
    pinned = re.search(r"^transformers==(\d+\.\d+)\.", constraints, re.MULTILINE)
    assert pinned is not None
    assert f"to {pinned.group(1)};" in names.tested_range()


@pytest.mark.parametrize("held", [{}, {CACHE: None}])
def test_no_cache_has_the_common_name(held: dict[str, Any]) -> None:
    assert names.cache_argument(held) == (CACHE, None)
    assert names.users_cache(held) is None
