"""What a checkpoint must not be: refusals name the field, and fuzzed files raise nothing else."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import foreign_heads as foreign
from specdec.artifacts.target_fingerprint import TargetFingerprint
from specdec.errors import ConfigError, SpecdecError
from specdec.heads.checkpoints.load import load_head, save_head

TARGET = TargetFingerprint("llama", foreign.HT, foreign.LAYERS, foreign.V, None)
Raw, Weights = dict[str, Any], dict[str, Tensor]


def checkpoint(folder: Path, dialect: str, change: Callable[[Raw, Weights], object]) -> Path:
    """A checkpoint with something wrong in it."""
    kind = foreign.Variant()
    raw, weights = foreign.config(kind, dialect), foreign.renamed(foreign.tensors(kind), dialect)
    change(raw, weights)
    return foreign.write(folder, raw, weights)


def put(**fields: Any) -> Callable[[Raw, Weights], None]:
    return lambda raw, weights: raw.update(fields)


def drop(name: str) -> Callable[[Raw, Weights], object]:
    return lambda raw, weights: raw.pop(name)


def put_tensor(name: str, value: Any) -> Callable[[Raw, Weights], None]:
    return lambda raw, weights: weights.update({name: value})


def drop_tensor(name: str) -> Callable[[Raw, Weights], object]:
    return lambda raw, weights: weights.pop(name)


def absolute(raw: Raw, weights: Weights) -> None:
    weights["d2t"] = weights["d2t"] + torch.arange(28)


def without_mask(raw: Raw, weights: Weights) -> None:
    absolute(raw, weights)
    del weights["t2d"]


def inner(**fields: Any) -> Callable[[Raw, Weights], None]:
    return lambda raw, weights: raw["eagle_config"].update(fields)


def layer(**fields: Any) -> Callable[[Raw, Weights], None]:
    return lambda raw, weights: raw["transformer_layer_config"].update(fields)


IDS = "eagle_aux_hidden_state_layer_ids"
WRONG: dict[str, tuple[str, Callable[[Raw, Weights], object], str]] = {
    "last layer, output": ("specforge", inner(**{IDS: [2, 5, 11]}), f"eagle_config.{IDS}"),
    "last layer, hidden": ("speculators", put(**{IDS: [3, 6, 12]}), IDS),
    "layers too high": ("specforge", inner(**{IDS: [2, 5, 30]}), f"eagle_config.{IDS}"),
    "layers of text": ("specforge", inner(**{IDS: ["a"]}), f"eagle_config.{IDS}"),
    "layers contradict": ("specforge", put(**{IDS: [2, 5, 9]}), f"eagle_config.{IDS}"),
    "other number of layers": ("specforge", inner(**{IDS: [2, 5]}), "fc.weight"),
    "num_aux": ("specforge", put(num_aux_hidden_states=4), "num_aux_hidden_states"),
    "absolute d2t": ("specforge", absolute, "d2t holds absolute ids"),
    "absolute d2t, no mask": ("specforge", without_mask, "d2t holds absolute ids"),
    "d2t missing": ("specforge", drop_tensor("d2t"), "'d2t' is missing"),
    "d2t negative": ("specforge", put_tensor("d2t", -torch.arange(28)), "d2t must be offsets"),
    "d2t huge": ("specforge", put_tensor("d2t", torch.full((28,), 2**62)), "d2t must be offsets"),
    "d2t of floats": ("specforge", put_tensor("d2t", torch.zeros(28)), "'d2t' must be"),
    "d2t too long": ("specforge", put_tensor("d2t", torch.zeros(29).long()), "'d2t' must be"),
    "t2d of others": ("specforge", put_tensor("t2d", torch.ones(60).bool()), "t2d and d2t name"),
    "t2d too short": ("specforge", put_tensor("t2d", torch.ones(6).bool()), "'t2d' must be"),
    "key missing": ("specforge", drop_tensor("midlayer.mlp.up_proj.weight"), "mlp.up_proj.weight"),
    "lm_head missing": ("specforge", drop_tensor("lm_head.weight"), "lm_head.weight"),
    "key unknown": ("specforge", put_tensor("extra.weight", torch.ones(2)), "'extra.weight'"),
    "key twice": ("specforge", put_tensor("model.fc.weight", torch.ones(2)), "one and the same"),
    "p-eagle": ("specforge", put_tensor("mask_hidden", torch.ones(1, 1, 3)), "P-EAGLE"),
    "model.lm_head": ("nemo", put_tensor("model.lm_head.weight", torch.ones(2)), "model.lm_head"),
    "wrong shape": ("specforge", put_tensor("fc.weight", torch.ones(16, 3)), "'fc.weight'"),
    "wrong rank": ("specforge", put_tensor("norm.weight", torch.ones(4, 4)), "'norm.weight'"),
    "wrong lm_head": ("specforge", put_tensor("lm_head.weight", torch.ones(9, 16)), "draft_vocab"),
    "quantised": ("specforge", put_tensor("norm.weight", torch.ones(16).char()), "quantised"),
    "k without q norm": (
        "specforge",
        put_tensor("midlayer.self_attn.k_norm.weight", torch.ones(4)),
        "k_norm",
    ),
    "width huge": ("specforge", put(hidden_size=2**40), "hidden_size"),
    "width negative": ("specforge", put(hidden_size=-16), "hidden_size"),
    "width of text": ("specforge", put(hidden_size="16"), "hidden_size"),
    "width true": ("specforge", put(hidden_size=True), "hidden_size"),
    "width float": ("specforge", put(hidden_size=16.0), "hidden_size"),
    "width missing": ("specforge", drop("hidden_size"), "hidden_size is missing"),
    "vocabulary missing": ("specforge", drop("vocab_size"), "vocab_size is missing"),
    "heads 0": ("specforge", put(num_attention_heads=0), "num_attention_heads"),
    "draft missing": ("speculators", drop("draft_vocab_size"), "draft_vocab_size is missing"),
    "eps 0": ("specforge", put(rms_norm_eps=0), "rms_norm_eps"),
    "eps text": ("specforge", put(rms_norm_eps="1e-6"), "rms_norm_eps"),
    "activation list": ("specforge", put(hidden_act=["silu"]), "hidden_act"),
    "activation unknown": ("specforge", put(hidden_act="nothing"), "hidden_act"),
    "activation with weights": ("specforge", put(hidden_act="prelu"), "hidden_act"),
    "flag text": ("specforge", put(norm_before_residual="yes"), "norm_before_residual"),
    "flag 1": ("specforge", put(norm_before_residual=1), "norm_before_residual"),
    "fc_norm without tensors": ("specforge", put(fc_norm=True), "fc_norm"),
    "norm_before_fc without": ("specforge", put(norm_before_fc=True), "norm_before_fc"),
    "norm_output text": ("nemo", put(norm_output="true"), "norm_output"),
    "no last norm": ("modelopt", inner(use_last_layernorm=False), "use_last_layernorm"),
    "eagle-1": ("specforge", inner(use_aux_hidden_state=False), "use_aux_hidden_state"),
    "eagle_config list": ("specforge", put(eagle_config=[1]), "eagle_config"),
    "architecture": ("specforge", put(architectures=["DFlashDraftModel"]), "architectures"),
    "architecture list": ("specforge", put(architectures="Llama"), "architectures"),
    "model type list": ("specforge", put(model_type=["llama"]), "model_type"),
    "speculators kind": ("speculators", put(speculators_model_type="peagle"), "speculators_model"),
    "no layer config": ("speculators", drop("transformer_layer_config"), "transformer_layer"),
    "layer types": ("speculators", layer(layer_types=["linear"]), "layer_types"),
    "window missing": (
        "speculators", layer(layer_types=["sliding_attention"]), "sliding_window is missing"
    ),
    "window 0": (
        "speculators",
        layer(layer_types=["sliding_attention"], sliding_window=0),
        "sliding_window",
    ),
    "rope kind": ("specforge", put(rope_parameters={"rope_type": "spiral"}), "rope_type"),
    "rope list": ("specforge", put(rope_parameters=[1]), "rope_parameters"),
    "rope lacks": ("specforge", put(rope_parameters={"rope_type": "llama3"}), "rope"),
    "rope nested": (
        "specforge", put(rope_parameters={"rope_type": "yarn", "factor": {}}), "rope_parameters"
    ),
    "rope two": (
        "specforge",
        put(rope_scaling={"rope_type": "linear", "factor": 2.0}),
        "rope_parameters",
    ),
    "theta two": ("specforge", put(rope_theta=1e6), "rope_theta"),
    "theta negative": ("safeailab", put(rope_theta=-5.0), "rope_theta"),
    "theta 0": ("safeailab", put(rope_theta=0), "rope"),
    "factor 0": ("specforge", put(rope_parameters={"rope_type": "linear", "factor": 0}), "rope"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_checkpoints_are_refused_by_name(name: str, tmp_path: Path) -> None:
    dialect, change, said = WRONG[name]
    source = checkpoint(tmp_path / "head", dialect, change)
    with pytest.raises(ConfigError) as refusal:
        load_head(source, target=TARGET)
    assert said in str(refusal.value)
    assert len(str(refusal.value)) < 700


def test_all_of_these_are_right_without_the_change(tmp_path: Path) -> None:
    for dialect in foreign.DIALECTS:
        load_head(checkpoint(tmp_path / dialect, dialect, put()), target=TARGET)


def test_both_norms_of_features_have_no_order(tmp_path: Path) -> None:
    kind = foreign.Variant(fc_norm=True, norm_before_fc=True)
    source = foreign.foreign_head(tmp_path / "head", "specforge", kind)
    with pytest.raises(ConfigError, match="fc_norm and norm_before_fc"):
        load_head(source)


def test_whose_layers_nobody_knows(tmp_path: Path) -> None:
    source = foreign.foreign_head(tmp_path / "head", "safeailab")
    with pytest.raises(ConfigError, match=r"aux_output_layers .*--target"):
        load_head(source)
    with pytest.raises(ConfigError, match="aux_output_layers"):
        load_head(source, target=TargetFingerprint("llama", foreign.HT, 6, foreign.V, None))
    chosen = load_head(source, overrides={"aux_output_layers": [0, 1, 4]})
    assert chosen.head.config.aux_output_layers == (0, 1, 4)
    with pytest.raises(ConfigError, match="no flag 'layers'"):
        load_head(source, target=TARGET, overrides={"layers": [0, 1, 4]})
    with pytest.raises(ConfigError, match="feed_post_norm must be true or false"):
        load_head(source, target=TARGET, overrides={"feed_post_norm": "maybe"})


def test_what_was_assumed_is_said(tmp_path: Path) -> None:
    old = load_head(foreign.foreign_head(tmp_path / "a", "safeailab"), target=TARGET)
    assert "output layers [1, 5, 8] of 12" in old.assumed[-1]
    assert "norm_before_residual not stated" in old.assumed[0]
    template = load_head(foreign.foreign_head(tmp_path / "b", "modelopt"))
    assert "its template for vLLM says true" in template.assumed[0]
    silent = checkpoint(tmp_path / "c", "speculators", drop("norm_before_residual"))
    assert "as vLLM takes it" in load_head(silent).assumed[0]
    assert load_head(silent).head.config.norm_before_residual
    assert load_head(silent, overrides={"norm_before_residual": False}).assumed == ()
    twice = checkpoint(tmp_path / "d", "specforge", put(norm_output=True))
    assert load_head(twice).head.config.feed_post_norm
    assert "SpecForge before then meant" in load_head(twice).assumed[-1]
    post = checkpoint(tmp_path / "e", "nemo", put(norm_output=True))
    assert load_head(post, target=TARGET).head.config.feed_post_norm
    bare = checkpoint(tmp_path / "f", "specforge", drop("rope_parameters"))
    assert "rope not stated" in load_head(bare).assumed[0]
    deep = TargetFingerprint("deepseek_v3", foreign.HT, 12, foreign.V, None)
    odd = load_head(foreign.foreign_head(tmp_path / "g", "specforge"), target=deep)
    assert "SGLang may count from one lower" in odd.assumed[-1]


def test_a_head_of_another_target_is_refused(tmp_path: Path) -> None:
    source = foreign.foreign_head(tmp_path / "head", "specforge")
    wide = TargetFingerprint("llama", 32, 12, foreign.V, None)
    with pytest.raises(ConfigError, match="target_hidden_size: 24 and 32"):
        load_head(source, target=wide)
    few = TargetFingerprint("llama", foreign.HT, 12, 50, None)
    with pytest.raises(ConfigError, match="vocab_size: 60 and 50"):
        load_head(source, target=few)
    padded = TargetFingerprint("llama", foreign.HT, 12, 64, None)
    assert "padding" in load_head(source, target=padded).assumed[-1]
    known = TargetFingerprint("llama", foreign.HT, 12, foreign.V, "a" * 64)
    save_head(load_head(source).head, tmp_path / "own", fingerprint=known, num_target_layers=12)
    other = TargetFingerprint("qwen3", foreign.HT, 12, foreign.V, "b" * 64)
    with pytest.raises(ConfigError, match=r"model_type: llama and qwen3; tokenizer: aaaaaaaaaaaa"):
        load_head(tmp_path / "own", target=other)
    deeper = TargetFingerprint("llama", foreign.HT, 14, foreign.V, None)
    save_head(load_head(source).head, tmp_path / "bare", fingerprint=None, num_target_layers=12)
    with pytest.raises(ConfigError, match="layers: 12 and 14"):
        load_head(tmp_path / "bare", target=deeper)


MUTATIONS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 16, 60, 61, 2**31, 2**63, 2**70, -(2**40), 1e308, 0.5, "",
    "llama", "\u0000", "x" * 3000, [], [1], [1, 2, 3], [[]], [None], {}, {"a": 1}, {"factor": 0},
    {"rope_type": "yarn"}, {"rope_type": "yarn", "factor": 0.0, "rope_theta": 0},
    ["LlamaForCausalLM"],
    {"rope_type": "longrope", "rope_theta": 1, "long_factor": [1], "short_factor": [2]},
    {"rope_type": "dynamic", "factor": 1e12, "rope_theta": 1e12}, [0] * 5000,
)  # fmt: skip


def mutated(raw: Raw, rng: random.Random) -> Raw:
    """A configuration with one to three fields changed, added or removed, at any depth."""
    raw = copy.deepcopy(raw)
    for _ in range(rng.randint(1, 3)):
        place = raw
        nested = [value for value in raw.values() if isinstance(value, dict)]
        if nested and rng.random() < 0.4:
            place = rng.choice(nested)
        extra = [
            "rope_scaling",
            "rope_theta",
            "layer_types",
            "sliding_window",
            "norm_output",
            "eagle_config",
            IDS,
            "quantization_config",
            "tie_word_embeddings",
            "fc_norm",
        ]
        name = rng.choice([*place, *extra])
        if rng.random() < 0.15:
            place.pop(name, None)
        else:
            place[name] = copy.deepcopy(rng.choice(MUTATIONS))
    return raw


@pytest.mark.parametrize("dialect", [*foreign.DIALECTS, "ours"])
def test_fuzzed_configurations_raise_nothing_else(dialect: str, tmp_path: Path) -> None:
    rng = random.Random(dialect)
    source = foreign.foreign_head(tmp_path / "head", "nemo" if dialect == "ours" else dialect)
    name = "config.json"
    if dialect == "ours":
        save_head(
            load_head(source, target=TARGET).head,
            tmp_path / "own",
            fingerprint=TARGET,
            num_target_layers=12,
        )
        source, name = tmp_path / "own", "specdec_config.json"
    raw = json.loads((source / name).read_text())
    refused = 0
    for _ in range(350):
        (source / name).write_text(json.dumps(mutated(raw, rng)))
        try:
            found = load_head(source, target=TARGET)
        except SpecdecError:
            refused += 1
        else:
            assert found.head.config.feature_width == 3 * foreign.HT
    assert refused > 100


def test_fuzzed_headers_raise_nothing_else(tmp_path: Path) -> None:
    source = foreign.foreign_head(tmp_path / "head", "specforge")
    path = source / "model.safetensors"
    whole = path.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(5)
    refused = 0
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(length)] = rng.choice(b'0123456789{}[]",:x \x00\xff')
        path.write_bytes(content[: rng.choice([len(content)] * 9 + [rng.randrange(len(content))])])
        try:
            load_head(source)
        except SpecdecError:
            refused += 1
    assert refused > 300
