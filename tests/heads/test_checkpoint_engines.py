"""Exports for an engine: what its loader will read, and what is refused because it would not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers import foreign_heads as foreign
from specdec.artifacts.target_fingerprint import TargetFingerprint
from specdec.errors import ConfigError
from specdec.heads.checkpoints.load import load_head, read_head_config, save_head
from specdec.heads.eagle3.head import Eagle3Head

IDS = "eagle_aux_hidden_state_layer_ids"


def made_for(model_type: str) -> TargetFingerprint:
    return TargetFingerprint(model_type, foreign.HT, foreign.LAYERS, foreign.V, None)


def head_of(tmp_path: Path, kind: foreign.Variant | None = None) -> Eagle3Head:
    kind = kind or foreign.Variant()
    head = load_head(foreign.foreign_head(tmp_path / "head", "speculators", kind)).head
    assert head.config.aux_output_layers == (2, 5, 9)
    return head


def written(head: Eagle3Head, folder: Path, model_type: str | None, **how: Any) -> dict[str, Any]:
    fingerprint = made_for(model_type) if model_type else None
    save_head(head, folder, fingerprint=fingerprint, num_target_layers=12, **how)
    loaded = load_head(folder)
    assert loaded.head.config == head.config
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_one_checkpoint_serves_both_engines(tmp_path: Path) -> None:
    raw = written(head_of(tmp_path), tmp_path / "out", None)
    assert raw["eagle_config"][IDS] == [2, 5, 9]  # SGLang adds one
    assert raw[IDS] == [3, 6, 10]  # vLLM reads this one first, as it stands
    assert raw["num_aux_hidden_states"] == 3
    assert raw["norm_before_residual"] is False
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 5000.0
    assert raw["rope_scaling"] is None
    assert raw["draft_vocab_size"] == 28
    assert raw["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("model_type", "ids"),
    [
        ("llama", [2, 5, 9]),
        ("qwen3", [2, 5, 9]),
        ("gpt_oss", [2, 5, 9]),
        ("deepseek_v3", [3, 6, 10]),
    ],
)
def test_sglang_gets_its_own_count(model_type: str, ids: list[int], tmp_path: Path) -> None:
    raw = written(head_of(tmp_path), tmp_path / "out", model_type, engine="sglang")
    assert raw["eagle_config"][IDS] == ids
    assert raw[IDS] == [3, 6, 10]
    described = read_head_config(tmp_path / "out")
    assert described.engine == "sglang"
    assert described.config.aux_output_layers == (2, 5, 9)


def test_the_default_layers_are_left_out_for_sglang_alone(tmp_path: Path) -> None:
    head = head_of(tmp_path)
    head.config = replace(head.config, aux_output_layers=(1, 5, 8))
    raw = written(head, tmp_path / "sglang", None, engine="sglang")
    assert IDS not in raw
    assert IDS not in raw.get("eagle_config", {})
    raw = written(head, tmp_path / "vllm", None, engine="vllm")
    assert raw[IDS] == [2, 6, 9]


def test_speculators_for_vllm(tmp_path: Path) -> None:
    head = head_of(tmp_path, foreign.Variant(nbr=True, qk_norm=True))
    raw = written(
        head, tmp_path / "out", "qwen3", dialect="speculators", engine="vllm",
        facts={"target": "some/target", "target_architectures": ["Qwen3ForCausalLM"]},
    )  # fmt: skip
    assert raw["norm_before_residual"] is True
    assert raw[IDS] == [3, 6, 10]
    assert raw["transformer_layer_config"]["model_type"] == "qwen3"
    assert raw["speculators_config"]["verifier"]["name_or_path"] == "some/target"
    assert raw["speculators_config"]["proposal_methods"][0]["speculative_tokens"] >= 1


REFUSED: list[tuple[str, foreign.Variant, str, str]] = [
    ("sglang", foreign.Variant(nbr=True), "specforge", "norm_before_residual"),
    ("sglang", foreign.Variant(qk_norm=True), "specforge", "qk_norm"),
    ("sglang", foreign.Variant(bias=True), "specforge", "attention_bias"),
    ("sglang", foreign.Variant(), "speculators", "does not load heads of the dialect"),
    ("sglang", foreign.Variant(), "nemo", "does not load heads of the dialect"),
    ("sglang", foreign.Variant(), "safeailab", "does not load heads of the dialect"),
    ("vllm", foreign.Variant(fc_bias=True), "specforge", "fc_bias"),
    ("vllm", foreign.Variant(bias=True), "specforge", "attention_bias"),
    ("vllm", foreign.Variant(qk_norm=True), "specforge", "qk_norm"),
    ("vllm", foreign.Variant(), "nemo", "does not load heads of the dialect"),
    ("tgi", foreign.Variant(), "specforge", "engine must be"),
]


@pytest.mark.parametrize(("engine", "kind", "dialect", "said"), REFUSED)
def test_what_an_engine_would_compute_otherwise_is_refused(
    engine: str, kind: foreign.Variant, dialect: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        written(head_of(tmp_path, kind), tmp_path / "out", "llama", dialect=dialect, engine=engine)
    assert not (tmp_path / "out").exists()


def test_other_refusals_of_an_export(tmp_path: Path) -> None:
    head = head_of(tmp_path)
    for said, fields, how in (
        ("sliding_window", {"sliding_window": 64}, {"engine": "sglang"}),
        ("must ascend", {"aux_output_layers": (9, 5, 2)}, {}),
        ("before the target's final norm", {"aux_output_layers": (2, 5, 11)}, {}),
        ("dialect must be one of", {}, {"dialect": "gguf"}),
        ("is not known", {}, {"engine": "sglang", "fingerprint": made_for("brand_new")}),
        ("fingerprint of the target is missing", {}, {"engine": "sglang"}),
        ("num_target_layers is 12", {},
         {"fingerprint": TargetFingerprint("llama", foreign.HT, 14, foreign.V)}),
        ("order is not defined", {"fc_norm": True, "norm_before_fc": True}, {}),
    ):  # fmt: skip
        before = head.config
        head.config = replace(before, **fields)
        options: dict[str, Any] = {"fingerprint": None, **how}
        with pytest.raises(ConfigError, match=said):
            save_head(head, tmp_path / "out", num_target_layers=12, **options)
        head.config = before


def test_post_norm_feedback_reaches_each_reader_in_its_own_word(tmp_path: Path) -> None:
    head = head_of(tmp_path, foreign.Variant(fc_norm=True, post=True))
    head.attach(foreign.embeddings())
    for dialect in foreign.DIALECTS:
        raw = written(head, tmp_path / dialect, None, dialect=dialect)
        assert raw["norm_output"] is True
        assert raw["fc_norm"] is True
    plain = head_of(tmp_path / "plain")
    for dialect in ("specforge", "modelopt", "safeailab"):
        # There the word means something else, so it is not used for a plain head.
        assert "norm_output" not in written(plain, tmp_path / f"p{dialect}", None, dialect=dialect)


def test_a_sliding_window_is_written_as_vllm_reads_it(tmp_path: Path) -> None:
    head = head_of(tmp_path)
    head.config = replace(head.config, sliding_window=2048)
    for dialect in ("specforge", "speculators"):
        raw = written(head, tmp_path / dialect, None, dialect=dialect, engine="vllm")
        layer = raw.get("transformer_layer_config", raw)
        assert layer["layer_types"] == ["sliding_attention"]
        assert layer["sliding_window"] == 2048
        (tmp_path / dialect / "specdec_config.json").unlink()
        assert load_head(tmp_path / dialect).head.config.sliding_window == 2048


def test_four_layers_reach_vllm(tmp_path: Path) -> None:
    weights = foreign.renamed(foreign.tensors(foreign.Variant(target=18)), "specforge")
    raw = foreign.config(foreign.Variant(target=18), "specforge")
    raw["eagle_config"][IDS] = [1, 3, 5]
    head = load_head(foreign.write(tmp_path / "head", raw, weights)).head
    raw = written(head, tmp_path / "out", None, engine="vllm")
    assert raw["num_aux_hidden_states"] == 3
    assert raw["target_hidden_size"] == 18
