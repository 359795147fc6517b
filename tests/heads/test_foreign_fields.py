"""Heads whose configuration is partly their target's: the tensors say what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from helpers import foreign_heads as foreign
from helpers.head_reference import apart, logits, reference
from specdec.artifacts.target_fingerprint import TargetFingerprint
from specdec.errors import ConfigError
from specdec.heads.checkpoints.load import LoadedHead, load_head, save_head
from specdec.heads.eagle3.config import Eagle3Config

TARGET = TargetFingerprint("llama", foreign.HT, foreign.LAYERS, foreign.V, None)
NARROW = TargetFingerprint("llama", foreign.H, foreign.LAYERS, foreign.V, None)
NEMO = foreign.Variant(kv=2, target=foreign.H)
IDS = "eagle_aux_hidden_state_layer_ids"


def written(folder: Path, dialect: str, **fields: Any) -> Path:
    """A head of this dialect with fields of its layer replaced."""
    source = foreign.foreign_head(folder, dialect, foreign.Variant(kv=2))
    raw = json.loads((source / "config.json").read_text())
    raw.get("transformer_layer_config", raw).update(fields)
    (source / "config.json").write_text(json.dumps(raw))
    return source


@pytest.mark.parametrize("target", foreign.nemo_targets())
@pytest.mark.parametrize("post", [False, True])
def test_nemos_files_load_for_every_target(target: str, post: bool, tmp_path: Path) -> None:
    bias = target == "gpt-oss"  # whose attention has biases, and so the draft's
    kind = foreign.Variant(
        kv=2, target=foreign.H, fc_norm=post, post=post, bias=bias, output_bias=bias
    )
    loaded = load_head(foreign.nemo_head(tmp_path / "head", target, kind), target=NARROW)
    config = loaded.head.config
    assert loaded.dialect == "nemo"
    assert config.sliding_window is None
    assert config.intermediate_size == foreign.MLP
    assert config.feed_post_norm is post
    assert apart(logits(loaded.head), reference(kind)) < 1e-5
    said = {"qwen3_moe": "intermediate_size is 7", "gemma": "full_attention is taken"}
    assert said.get(target, "aux_output_layers") in " ".join(loaded.assumed)
    assert not any("sliding" in sentence for sentence in loaded.assumed if target != "gemma")


def test_nemo_flattens_gemmas_rotary_parameters(tmp_path: Path) -> None:
    flat = {
        "rope_theta": 5000.0, "rope_parameters": None, "rope_scaling": None,
        "hidden_act": "silu", "partial_rotary_factor": 1.0,
    }  # fmt: skip
    source = foreign.nemo_head(tmp_path / "head", "gemma", NEMO)
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**raw, **flat}))
    loaded = load_head(source, target=NARROW)
    assert apart(logits(loaded.head), reference(NEMO)) < 1e-5
    assert not any("rope" in sentence for sentence in loaded.assumed)


def test_nemos_layer_does_not_know_longrope(tmp_path: Path) -> None:
    source = foreign.nemo_head(tmp_path / "head", "phi3", NEMO)
    raw = json.loads((source / "config.json").read_text())
    raw["rope_parameters"] = {
        "rope_type": "longrope", "rope_theta": 5000.0, "short_factor": [2.0, 2.0],
        "long_factor": [4.0, 4.0], "original_max_position_embeddings": 128,
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(raw))
    loaded = load_head(source, target=NARROW)
    assert apart(logits(loaded.head), reference(NEMO)) < 1e-5
    assert any("longrope is left out" in sentence for sentence in loaded.assumed)


SAME: dict[str, dict[str, Any]] = {  # copied, and says nothing about the head
    "depth": {"num_hidden_layers": 42},
    "class": {"model_type": "gemma3_text"},
    "another class": {"model_type": "mamba"},
    "quantised target": {"quantization_config": {"bits": 4, "quant_method": "gptq"}},
    "biases": {"mlp_bias": True, "attention_bias": True},
    "window": {"sliding_window": 2, "use_sliding_window": True},
    "experts": {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 7},
    "windows of a target": {"layer_types": ["sliding_attention"] * 3, "sliding_window": 2},
    "mixers of a target": {"layer_types": ["linear_attention", "full_attention"]},
    "mrope": {
        "rope_parameters": {
            "rope_type": "mrope", "rope_theta": 5000.0, "mrope_section": [1, 1, 0],
            "mrope_interleaved": True,
        }
    },
    "one entry a type": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        }
    },
}  # fmt: skip
SAID: dict[str, tuple[dict[str, Any], str]] = {  # copied, and it has to be said what was taken
    "MLP": ({"intermediate_size": 9}, "intermediate_size is 9"),
    "width": ({"hidden_size": 32}, "hidden_size is 32"),
    "heads": ({"num_attention_heads": 8}, "num_attention_heads is 8"),
    "heads of keys": ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
    "width of a head": ({"head_dim": 8}, "head_dim is 8"),
    "part of a head": ({"partial_rotary_factor": 0.25}, "partial_rotary_factor 0.25"),
    "scale of logits": ({"logit_scale": 0.06}, "logit_scale 0.06"),
    "types apart": (
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 7.0},
                "full_attention": {
                    "rope_type": "proportional", "rope_theta": 5000.0, "partial_rotary_factor": 0.25
                },
            }
        },
        "full_attention is taken",
    ),
}  # fmt: skip


def check_same(loaded: LoadedHead) -> None:
    assert apart(logits(loaded.head), reference(foreign.Variant(kv=2))) < 1e-5


@pytest.mark.parametrize("dialect", ["safeailab", "specforge", "modelopt", "nemo"])
@pytest.mark.parametrize("name", SAME)
def test_what_was_copied_means_nothing(name: str, dialect: str, tmp_path: Path) -> None:
    layers = {"aux_output_layers": (2, 5, 9)}
    plain = load_head(written(tmp_path / "plain", dialect), overrides=layers)
    loaded = load_head(written(tmp_path / "head", dialect, **SAME[name]), overrides=layers)
    check_same(loaded)
    assert loaded.head.config == plain.head.config
    assert loaded.assumed == plain.assumed


@pytest.mark.parametrize("dialect", ["specforge", "speculators", "nemo"])
@pytest.mark.parametrize("name", SAID)
def test_what_the_tensors_contradict_is_said(name: str, dialect: str, tmp_path: Path) -> None:
    fields, said = SAID[name]
    layers = {"aux_output_layers": (2, 5, 9)}
    loaded = load_head(written(tmp_path / "head", dialect, **fields), overrides=layers)
    check_same(loaded)
    if (name, dialect) != ("scale of logits", "nemo"):  # where it is the target's for certain
        assert said in " ".join(loaded.assumed)


def test_the_vocabulary_is_the_tensors(tmp_path: Path) -> None:
    loaded = load_head(written(tmp_path / "head", "nemo", draft_vocab_size=50), target=TARGET)
    check_same(loaded)
    assert "draft_vocab_size is 50" in " ".join(loaded.assumed)
    loaded = load_head(written(tmp_path / "b", "nemo", vocab_size=64), target=TARGET)
    assert loaded.head.config.vocab_size == foreign.V


def test_the_targets_width_is_what_fc_reads(tmp_path: Path) -> None:
    source = written(tmp_path / "head", "specforge", target_hidden_size=None)
    loaded = load_head(source)
    check_same(loaded)
    assert loaded.head.config.target_hidden_size == foreign.HT
    assert "target_hidden_size not stated; 24" in " ".join(loaded.assumed)


def test_a_text_configuration_may_be_nested(tmp_path: Path) -> None:
    source = foreign.nemo_head(tmp_path / "head", "vision", NEMO)
    raw = json.loads((source / "config.json").read_text())
    outer = {n: raw.pop(n) for n in ("architectures", "draft_vocab_size", "norm_output")}
    (source / "config.json").write_text(
        json.dumps({**outer, "model_type": "qwen2_5_vl", "text_config": raw, "hidden_size": None})
    )
    loaded = load_head(source, target=NARROW)
    assert apart(logits(loaded.head), reference(NEMO)) < 1e-5


@pytest.mark.parametrize("layers", [-1, 0, 10**9, 1.5, "1", True])
def test_absurd_depths_are_refused(layers: Any, tmp_path: Path) -> None:
    for dialect in foreign.DIALECTS:
        source = written(tmp_path / dialect, dialect, num_hidden_layers=layers)
        with pytest.raises(ConfigError, match=r"num_hidden_layers in config\.json must be a whole"):
            load_head(source, target=TARGET)


@pytest.mark.parametrize("size", [10**9, 2**62, -3, 0])
@pytest.mark.parametrize(
    "name", ["hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "head_dim"]
)
def test_absurd_sizes_are_refused_by_name(name: str, size: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^{name} in config.json must be"):
        load_head(written(tmp_path / "head", "specforge", **{name: size}), target=TARGET)


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # field -> what a user says instead
    "flag": ({"norm_before_residual": "no"}, {"norm_before_residual": False}),
    "size": ({"hidden_size": -1}, {"hidden_size": foreign.H}),
    "missing": ({"intermediate_size": None}, {"intermediate_size": foreign.MLP}),
    "heads": (
        {"head_dim": 6, "num_attention_heads": 3, "num_key_value_heads": 1}, {"head_dim": 4}
    ),
    "rope": (
        {"rope_parameters": {"rope_type": "spiral"}},
        {"rope": {"rope_type": "default", "rope_theta": 5000.0}},
    ),
    "layers": ({IDS: [9, "a"], "num_aux_hidden_states": 9}, {"aux_output_layers": [2, 5, 9]}),
    "activation": ({"hidden_act": ["x"]}, {"hidden_act": "silu"}),
    "eps": ({"rms_norm_eps": "much"}, {"rms_norm_eps": 1e-5}),
    "feedback": ({"norm_output": "both"}, {"feed_post_norm": False}),
    "norm": ({"fc_norm": True}, {"fc_norm": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_a_user_says_is_read_first(name: str, tmp_path: Path) -> None:
    fields, says = WRONG[name]
    source = written(tmp_path / "head", "specforge", **fields)
    if name != "heads":  # which load, in a way of their own
        with pytest.raises(ConfigError):
            load_head(source, target=TARGET)
    loaded = load_head(source, target=TARGET, overrides=says)
    check_same(loaded)
    assert not any(next(iter(says)) in sentence.split(";")[0] for sentence in loaded.assumed)


def test_what_a_user_says_wins_over_our_own_file(tmp_path: Path) -> None:
    head = load_head(written(tmp_path / "head", "specforge")).head
    save_head(head, tmp_path / "own", fingerprint=None, num_target_layers=12)
    path = tmp_path / "own" / "specdec_config.json"
    raw = json.loads(path.read_text())
    raw["config"]["rms_norm_eps"] = -1
    path.write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="rms_norm_eps"):
        load_head(tmp_path / "own")
    check_same(load_head(tmp_path / "own", overrides={"rms_norm_eps": 1e-5}))


def feedback(source: Path, **fields: Any) -> tuple[bool, str]:
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**raw, **fields}))
    found = load_head(source, target=TARGET)
    return found.head.config.feed_post_norm, " ".join(found.assumed)


@pytest.mark.parametrize("dialect", ["specforge", "safeailab", "modelopt"])
def test_norm_output_means_what_engines_mean(dialect: str, tmp_path: Path) -> None:
    source = foreign.foreign_head(tmp_path / "head", dialect, foreign.Variant())
    assert not feedback(source)[0]
    assert "norm_output" not in feedback(source)[1]
    post, said = feedback(source, norm_output=True)
    assert post
    assert "SpecForge before then meant the norm before lm_head" in said
    assert feedback(source, norm_output=False)[0] is False
    # Our own field says which is meant, whatever else a reader makes of the other.
    for value in (True, False):
        post, said = feedback(source, norm_output=True, feed_post_norm=value)
        assert post is value
        assert "norm_output" not in said


def test_an_export_says_which_feedback_it_means(tmp_path: Path) -> None:
    kind = foreign.Variant(fc_norm=True, post=True)
    head = load_head(foreign.foreign_head(tmp_path / "a", "speculators", kind)).head
    for dialect in ("specforge", "safeailab", "modelopt", "nemo"):
        save_head(head, tmp_path / dialect, dialect=dialect, fingerprint=None, num_target_layers=12)
        (tmp_path / dialect / "specdec_config.json").unlink()
        found = load_head(tmp_path / dialect)
        assert found.head.config.feed_post_norm
        assert found.assumed == ()


def test_fields_may_stand_in_eagle_config(tmp_path: Path) -> None:
    source = foreign.foreign_head(tmp_path / "head", "specforge", foreign.Variant(nbr=True))
    raw = json.loads((source / "config.json").read_text())
    raw["eagle_config"] |= {"norm_before_residual": True, "norm_output": False}
    (source / "config.json").write_text(json.dumps(raw))
    assert apart(logits(load_head(source).head), reference(foreign.Variant(nbr=True))) < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["norm.weight", "midlayer.mlp.up_proj.weight", "lm_head.weight"])
def test_numbers_that_are_none_are_refused(name: str, value: float, tmp_path: Path) -> None:
    source = foreign.foreign_head(tmp_path / "head", "specforge")
    weights = load_file(source / "model.safetensors")
    weights[name].view(-1)[3:5] = value
    save_file(weights, source / "model.safetensors")
    said = rf"tensor '{name}' of the draft head holds 2 of [\d,]+ values that are NaN or infinite"
    with pytest.raises(ConfigError, match=said):
        load_head(source)


def test_later_fields_are_written_only_when_they_are_on(tmp_path: Path) -> None:
    """An older specdec reads a head that needs none of them."""
    head = load_head(written(tmp_path / "head", "specforge")).head
    save_head(head, tmp_path / "own", fingerprint=None, num_target_layers=12)
    stored = json.loads((tmp_path / "own" / "specdec_config.json").read_text())["config"]
    assert not {"output_bias", "mlp_bias"} & set(stored)
    kind = foreign.Variant(bias=True, output_bias=True, mlp_bias=True)
    head = load_head(foreign.foreign_head(tmp_path / "b", "specforge", kind)).head
    save_head(head, tmp_path / "all", fingerprint=None, num_target_layers=12)
    assert load_head(tmp_path / "all").head.config == head.config
    assert isinstance(head.config, Eagle3Config)
    assert head.config.output_bias


def test_a_window_of_the_heads_own_is_said(tmp_path: Path) -> None:
    own = {"layer_types": ["sliding_attention"], "sliding_window": 4}
    for dialect, window in (("specforge", 4), ("speculators", 4), ("nemo", None)):
        loaded = load_head(written(tmp_path / dialect, dialect, **own), target=TARGET)
        assert loaded.head.config.sliding_window == window
        said = any("sliding_window is 4" in sentence for sentence in loaded.assumed)
        assert said == (dialect == "specforge")
    unused = written(tmp_path / "b", "speculators", **own, use_sliding_window=False)
    assert load_head(unused).head.config.sliding_window is None
