"""`specdec generate --method draft_model`: the draft comes as an option, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

Run = Callable[..., SimpleNamespace]


def generate(run: Run, model: Path, *options: object) -> SimpleNamespace:
    return run(
        "generate", "--model", model, "--prompt", "ab", "--max-new-tokens", 12, "--stats", *options
    )


def test_a_folder_is_the_draft(model_folder: Path, run: Run) -> None:
    """The model itself: five tokens and the bonus a round, and the text of no draft at all."""
    plain = generate(run, model_folder, "--method", "none")
    drafted = generate(
        run, model_folder, "--method", "draft_model", "--option", f"draft={model_folder}"
    )
    assert plain.code == drafted.code == 0
    assert drafted.out == plain.out
    assert "2 rounds" in drafted.err


def test_a_draft_with_other_tokens_is_refused(model_folder: Path, tmp_path: Path, run: Run) -> None:
    """The sizes are the same, the tokens beside the checkpoint are not."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.add_tokens(["ab"])
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer) - 1, hidden_size=16, intermediate_size=16,
                         num_hidden_layers=1, num_attention_heads=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    shown = generate(run, model_folder, "--method", "draft_model", "--option", f"draft={tmp_path}")
    assert shown.code == 2
    assert "the draft's tokenizer is not the target's: 258 and 257 tokens" in shown.err


def test_a_draft_is_asked_for(model_folder: Path, run: Run) -> None:
    shown = generate(run, model_folder, "--method", "draft_model")
    assert shown.code == 2
    assert "draft_model needs draft=" in shown.err


def test_a_store_of_texts_needs_no_more_than_its_folder(
    model_folder: Path, tmp_path: Path, run: Run
) -> None:
    done = generate(run, model_folder, "--method", "suffix", "--option", f"store={tmp_path / 's'}")
    assert done.code == 0, done.err
    assert any((tmp_path / "s").rglob("*"))
