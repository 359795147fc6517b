"""Every dialect loads, converts to every other one and back, and computes the same numbers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from helpers import foreign_heads as foreign
from helpers.head_reference import apart, logits, reference
from specdec.artifacts.target_fingerprint import TargetFingerprint
from specdec.errors import ConfigError
from specdec.heads.checkpoints.load import load_head, read_head_config, save_head

TARGET = TargetFingerprint("llama", foreign.HT, foreign.LAYERS, foreign.V, None)


@pytest.mark.parametrize("variant", foreign.VARIANTS)
@pytest.mark.parametrize("dialect", foreign.DIALECTS)
def test_a_foreign_head_means_what_its_trainer_meant(
    dialect: str, variant: str, tmp_path: Path
) -> None:
    kind = foreign.VARIANTS[variant]
    source = foreign.foreign_head(tmp_path / "head", dialect, kind)
    flags = foreign.overrides_of(kind, dialect)
    loaded = load_head(source, target=TARGET, overrides=flags)
    assert loaded.dialect == dialect
    assert loaded.head.config.aux_output_layers == foreign.layers_of(dialect)
    assert not loaded.head.training
    assert apart(logits(loaded.head), reference(kind)) < 1e-5
    described = read_head_config(source, target=TARGET, overrides=flags)
    assert described.config == loaded.head.config
    assert described.assumed == loaded.assumed


@pytest.mark.parametrize("variant", foreign.VARIANTS)
def test_every_dialect_converts_to_every_other_and_back(variant: str, tmp_path: Path) -> None:
    kind = foreign.VARIANTS[variant]
    for start, other in itertools.permutations(foreign.DIALECTS, 2):
        source = foreign.foreign_head(tmp_path / f"{start} {other}", start, kind)
        flags = foreign.overrides_of(kind, start)
        first = load_head(source, target=TARGET, overrides=flags).head
        wanted = logits(first)
        there, back = tmp_path / f"{start}-{other}", tmp_path / f"{start}-{other}-{start}"
        save_head(first, there, dialect=other, fingerprint=TARGET, num_target_layers=12)
        second = load_head(there)  # nothing has to be said any more
        assert second.dialect == other
        assert second.assumed == ()
        assert second.fingerprint == TARGET
        assert second.head.config == first.config
        assert apart(logits(second.head), wanted) <= 1e-6
        save_head(second.head, back, dialect=start, fingerprint=None, num_target_layers=12)
        third = load_head(back, target=TARGET)
        assert third.head.config == first.config
        assert apart(logits(third.head), wanted) <= 1e-6


@pytest.mark.parametrize("dialect", foreign.DIALECTS)
def test_without_our_file_the_dialect_alone_still_says_all_it_can(
    dialect: str, tmp_path: Path
) -> None:
    """What a foreign reader sees of our export: only `config.json` and the tensors."""
    source = foreign.foreign_head(tmp_path / "head", "speculators", foreign.Variant(nbr=True))
    first = load_head(source).head
    first.attach(foreign.embeddings())
    save_head(first, tmp_path / "out", dialect=dialect, fingerprint=None, num_target_layers=12)
    (tmp_path / "out" / "specdec_config.json").unlink()
    second = load_head(tmp_path / "out")
    assert second.dialect == dialect
    assert second.head.config == first.config
    assert apart(logits(second.head), logits(first)) <= 1e-6
    assert second.assumed == ()


def test_dtypes_stay(tmp_path: Path) -> None:
    weights = foreign.renamed(foreign.tensors(foreign.Variant()), "specforge")
    half = {
        n: x.half() if x.is_floating_point() else x.int() if n == "d2t" else x
        for n, x in weights.items()
    }
    raw = foreign.config(foreign.Variant(), "specforge")
    source = foreign.write(tmp_path / "head", raw, half)
    loaded = load_head(source)
    assert {p.dtype for p in loaded.head.parameters()} == {torch.float16}
    assert loaded.head.d2t is not None
    assert loaded.head.d2t.dtype == torch.int64
    save_head(loaded.head, tmp_path / "out", fingerprint=None, num_target_layers=12)
    assert load_head(tmp_path / "out").head.fc.weight.dtype == torch.float16
    assert load_head(tmp_path / "out", dtype=torch.bfloat16).head.fc.weight.dtype == torch.bfloat16
    save_head(
        loaded.head, tmp_path / "wide", fingerprint=None, num_target_layers=12, dtype=torch.float32
    )
    assert read_head_config(tmp_path / "wide").tensors["fc.weight"].dtype == "F32"
    mixed = {n: x.float() if n == "norm.weight" else x for n, x in half.items()}
    loaded = load_head(foreign.write(tmp_path / "mixed", raw, mixed))
    assert "F16 and F32" in loaded.assumed[-1]
    assert loaded.head.norm.weight.dtype == torch.float16


def test_a_head_without_lm_head_takes_rows_of_the_targets(tmp_path: Path) -> None:
    weights = foreign.renamed(foreign.tensors(foreign.Variant()), "modelopt")
    del weights["lm_head.weight"]
    source = foreign.write(
        tmp_path / "head", foreign.config(foreign.Variant(), "modelopt"), weights
    )
    loaded = load_head(source)
    assert not loaded.head.owns_lm_head
    with pytest.raises(ConfigError, match="lm_head is missing, and specforge keeps one"):
        save_head(loaded.head, tmp_path / "no", fingerprint=None, num_target_layers=12)
    save_head(
        loaded.head, tmp_path / "same", dialect="modelopt", fingerprint=None, num_target_layers=12
    )
    assert load_head(tmp_path / "same").head.lm_head is None
    output = torch.randn(foreign.V, foreign.H)
    loaded.head.attach(foreign.embeddings(), output)
    assert loaded.head.t2d is not None
    assert loaded.head.lm_head is not None
    assert torch.equal(loaded.head.lm_head.weight, output[loaded.head.t2d])
    save_head(
        loaded.head, tmp_path / "shared", dialect="modelopt", fingerprint=None, num_target_layers=12
    )
    assert load_head(tmp_path / "shared").head.lm_head is None  # what was attached is not its own
    save_head(loaded.head, tmp_path / "out", fingerprint=None, num_target_layers=12)
    assert load_head(tmp_path / "out").head.lm_head is not None


def test_embeddings_are_kept_where_the_dialect_keeps_them(tmp_path: Path) -> None:
    head = load_head(foreign.foreign_head(tmp_path / "a", "specforge")).head
    with pytest.raises(ConfigError, match="embed_tokens is missing, and speculators keeps"):
        save_head(
            head, tmp_path / "b", dialect="speculators", fingerprint=None, num_target_layers=12
        )
    head.attach(foreign.embeddings())
    for dialect in foreign.DIALECTS:
        save_head(head, tmp_path / dialect, dialect=dialect, fingerprint=None, num_target_layers=12)
        loaded = load_head(tmp_path / dialect).head
        assert loaded.owns_embeddings == (dialect in ("speculators", "nemo"))
    own = load_head(tmp_path / "nemo").head
    save_head(own, tmp_path / "own", dialect="specforge", fingerprint=None, num_target_layers=12)
    assert load_head(tmp_path / "own").head.owns_embeddings


def test_a_sharded_checkpoint_loads(tmp_path: Path) -> None:
    source = foreign.foreign_head(tmp_path / "head", "specforge")
    wanted = logits(load_head(source).head)
    weights = foreign.renamed(foreign.tensors(foreign.Variant()), "specforge")
    first = {n: x for n, x in weights.items() if "mlp" in n}
    (source / "model.safetensors").unlink()
    names = {}
    for name, part in (
        ("one.safetensors", first),
        ("two.safetensors", {n: x for n, x in weights.items() if n not in first}),
    ):
        foreign.write(tmp_path / name, {}, part)
        (tmp_path / name / "model.safetensors").rename(source / name)
        names |= dict.fromkeys(part, name)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert apart(logits(load_head(source).head), wanted) == 0


def test_parameters_can_be_trained_and_embeddings_not(tmp_path: Path) -> None:
    head = load_head(foreign.foreign_head(tmp_path / "a", "nemo"), target=TARGET).head
    frozen = {name for name, p in head.named_parameters() if not p.requires_grad}
    assert frozen == {"embed_tokens.weight"}
    assert not any(p.is_meta for p in head.parameters())
