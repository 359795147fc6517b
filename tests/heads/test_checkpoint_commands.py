"""`specdec inspect` and `specdec convert`, and the one pickle that is ever opened."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers import foreign_heads as foreign
from helpers.foreign_heads import small_target
from helpers.trained_heads import NEW_TOKENS, PROMPTS, trained_head
from specdec import demo
from specdec.artifacts.target_fingerprint import TargetFingerprint
from specdec.cli.head_options import ConvertOptions, InspectOptions
from specdec.cli.heads import run_convert, run_inspect, settings
from specdec.errors import ConfigError
from specdec.heads.checkpoints.legacy import legacy_tensors
from specdec.heads.checkpoints.load import load_head, save_head

TARGET = TargetFingerprint("llama", foreign.HT, foreign.LAYERS, foreign.V, None)


def legacy(folder: Path, content: Any = None) -> Path:
    """A head as SafeAILab published its first ones."""
    source = foreign.foreign_head(folder, "safeailab", foreign.Variant(draft=foreign.V))
    (source / "model.safetensors").unlink()
    if content is None:
        content = foreign.renamed(foreign.tensors(foreign.Variant(draft=foreign.V)), "safeailab")
    torch.save(content, source / "pytorch_model.bin")
    return source


def test_inspect_says_everything_that_a_head_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = foreign.foreign_head(tmp_path / "head", "specforge", foreign.Variant(kv=2))
    assert run_inspect(InspectOptions(str(source))) == 0
    said = capsys.readouterr().out
    for words in (
        "specforge",
        "28 of the target's 60",
        "4 heads of 4, 2 for keys and values",
        "[2, 5, 9] (specdec, SpecForge, ModelOpt)",
        "[3, 6, 10] (Hugging Face, vLLM, speculators)",
        "depends on the target's class",
        "no fingerprint",
        "assumed: norm_before_residual not stated",
        "F32",
    ):
        assert words in said
    assert "\x1b" not in said


def test_inspect_of_a_head_that_names_no_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = foreign.foreign_head(tmp_path / "head", "safeailab", foreign.Variant(target=foreign.H))
    assert run_inspect(InspectOptions(str(source))) == 0
    assert "names none, --target NAME tells" in capsys.readouterr().out
    target = small_target(tmp_path / "target")
    assert run_inspect(InspectOptions(str(source), target=str(target))) == 0
    said = capsys.readouterr().out
    assert "[1, 5, 8] (specdec" in said
    assert "left out: the default" in said
    assert "nothing differs" in said


def test_inspect_of_our_own_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = load_head(foreign.foreign_head(tmp_path / "head", "specforge")).head
    save_head(head, tmp_path / "out", engine="sglang", fingerprint=TARGET, num_target_layers=12,
              facts={"seed": 17})  # fmt: skip
    assert run_inspect(InspectOptions(str(tmp_path / "out"))) == 0
    said = capsys.readouterr().out
    assert "written for sglang" in said
    assert "llama, hidden size 24, 12 layers, no tokenizer recorded" in said
    assert "seed  17" in said
    assert "assumed" not in said
    assert run_inspect(InspectOptions(str(tmp_path / "out"), target="demo")) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "hidden_size: 24 and 192" in said
    assert "another target" in said


def test_inspect_options_that_make_no_sense(tmp_path: Path) -> None:
    source = str(foreign.foreign_head(tmp_path / "head", "specforge"))
    for options, said in (
        (InspectOptions(source, probe=True), "--probe needs --target"),
        (InspectOptions(source, prompts=Path("x")), "--prompts needs --probe"),
        (InspectOptions(source, new_tokens=2), "--new-tokens must be at least 8"),
        (InspectOptions(source, set=("x",)), "--set takes NAME=VALUE"),
        (InspectOptions(source, set=("no_flag=1",)), "no flag 'no_flag'"),
        (InspectOptions(source, set=("fc_norm=true",)), "fc_norm"),
        (InspectOptions(str(tmp_path / "none")), "there is no folder"),
    ):
        with pytest.raises(ConfigError, match=said):
            run_inspect(options)
    assert settings(("a=true", "b=[1,2]", "c-d=x")) == {"a": True, "b": [1, 2], "c_d": "x"}


def test_convert_between_dialects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind = foreign.Variant(target=foreign.H)
    source = foreign.foreign_head(tmp_path / "head", "specforge", kind)
    with pytest.raises(ConfigError, match=r"how many layers its target has.*--target"):
        run_convert(ConvertOptions(str(source), tmp_path / "no"))
    target = small_target(tmp_path / "target")
    out = tmp_path / "out"
    assert run_convert(ConvertOptions(str(source), out, to="speculators", engine="vllm",
                                      target=str(target), dtype="bfloat16")) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "assumed: norm_before_residual not stated" in said
    assert f"wrote {out}: speculators for vllm, from specforge" in said
    raw = json.loads((out / "config.json").read_text())
    assert raw["transformer_layer_config"]["max_position_embeddings"] == 4096  # the target's
    assert raw["speculators_config"]["verifier"]["name_or_path"] == str(target)
    loaded = load_head(out)
    assert loaded.head.fc.weight.dtype == torch.bfloat16
    assert loaded.facts["converted_from"] == {"name": "head", "dialect": "specforge"}
    assert loaded.fingerprint is not None
    # The embeddings that came along are the target's, so they go again.
    back = tmp_path / "back"
    assert run_convert(ConvertOptions(str(out), back, engine="sglang", target=str(target))) == 0
    assert "embed_tokens.weight" not in load_file(back / "model.safetensors")
    assert run_convert(ConvertOptions(str(out), tmp_path / "again")) == 0  # knows its target now


def test_sglang_never_reads_other_embeddings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = foreign.foreign_head(tmp_path / "a", "speculators", foreign.Variant(target=foreign.H))
    target = str(small_target(tmp_path / "target"))
    with pytest.raises(ConfigError, match="embed_tokens of the head differ"):
        run_convert(ConvertOptions(str(source), tmp_path / "b", engine="sglang", target=target))
    assert (
        run_convert(ConvertOptions(str(source), tmp_path / "b", engine="vllm", target=target)) == 0
    )
    assert "embeddings of its own, which are kept" in capsys.readouterr().out
    assert load_head(tmp_path / "b").head.owns_embeddings


def test_a_corrected_flag_is_converted_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = foreign.foreign_head(tmp_path / "head", "modelopt", foreign.Variant(target=foreign.H))
    target = str(small_target(tmp_path / "target"))
    chosen = ("norm_before_residual=true", "aux_output_layers=[1,4,8]")
    options = ConvertOptions(str(source), tmp_path / "out", target=target, set=chosen)
    assert run_convert(options) == 0
    config = load_head(tmp_path / "out").head.config
    assert config.norm_before_residual
    assert config.aux_output_layers == (1, 4, 8)
    warned = "norm_before_residual: specdec reads this back"
    assert warned in capsys.readouterr().out
    assert run_convert(replace(options, to="speculators", destination=tmp_path / "named")) == 0
    assert warned not in capsys.readouterr().out  # that dialect has a field for it


def test_a_legacy_head_is_converted_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = legacy(tmp_path / "head")
    with pytest.raises(ConfigError, match="a pickle, which is not loaded"):
        run_inspect(InspectOptions(str(source)))
    chosen = ("aux_output_layers=[1,5,8]",)
    with pytest.raises(ConfigError, match="how many layers"):
        run_convert(ConvertOptions(str(source), tmp_path / "no", set=chosen))
    with pytest.raises(ConfigError, match="was made for another target"):
        run_convert(
            ConvertOptions(
                str(source), tmp_path / "no", target="demo", set=("aux_output_layers=[1,2,4]",)
            )
        )
    assert "is a pickle" in " ".join(capsys.readouterr().err.split())
    stored = legacy_tensors(source)
    wanted = foreign.tensors(foreign.Variant(draft=foreign.V))
    assert torch.equal(stored.read(["fc.weight"])["fc.weight"], wanted["fc.weight"])


def test_a_legacy_head_makes_the_round_trip(tmp_path: Path) -> None:
    kind = foreign.Variant(target=foreign.H)
    source = foreign.foreign_head(tmp_path / "head", "safeailab", kind)
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(weights, source / "pytorch_model.bin")
    target = str(small_target(tmp_path / "target"))
    assert (
        run_convert(ConvertOptions(str(source), tmp_path / "out", to="safeailab", target=target))
        == 0
    )
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == set(weights)
    assert all(torch.equal(written[name], weights[name]) for name in weights)


class Payload:
    """Runs when it is unpickled without restriction."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    weights = foreign.renamed(foreign.tensors(foreign.Variant(draft=foreign.V)), "safeailab")
    source = legacy(tmp_path / "head", {**weights, "more": Payload(mark)})
    with pytest.raises(ConfigError, match="is no file of plain tensors"):
        run_convert(ConvertOptions(str(source), tmp_path / "out", target="demo"))
    assert not mark.exists()
    torch.load(source / "pytorch_model.bin", weights_only=False)  # noqa: TID251 - it does work
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([torch.ones(2)], "must hold named tensors"),
        ({"a": 1}, "'a', which is no tensor"),
        ({1: torch.ones(2)}, "1, which is no tensor"),
        ({}, "must hold named tensors"),
        ({"a": torch.ones(1).expand(2**31)}, "claims"),
        ({"a": torch.ones(2).to_sparse()}, "sparse"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "complex64"),
    ],
    ids=["list", "number", "key", "nothing", "expanded", "sparse", "complex"],
)
def test_other_content_of_a_pickle_is_refused(content: Any, said: str, tmp_path: Path) -> None:
    source = legacy(tmp_path / "head", content)
    with pytest.raises(ConfigError, match=said):
        legacy_tensors(source)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_broken_pickle_is_refused(tmp_path: Path) -> None:
    source = legacy(tmp_path / "head")
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04" + b"nonsense")
    with pytest.raises(ConfigError, match="is no file of plain tensors"):
        legacy_tensors(source)


def test_probe_finds_the_flag_that_the_checkpoint_does_not_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = demo.load_target(), demo.load_tokenizer()
    head = trained_head(model, tokenizer, norm_before_residual=True)
    out = tmp_path / "out"
    save_head(head, out, fingerprint=None, num_target_layers=6)
    (out / "specdec_config.json").unlink()
    raw = json.loads((out / "config.json").read_text())
    del raw["norm_before_residual"]
    (out / "config.json").write_text(json.dumps(raw))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    options = InspectOptions(str(out), target="demo", probe=True, prompts=prompts,
                             new_tokens=NEW_TOKENS)  # fmt: skip
    assert run_inspect(options) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "norm_before_residual not stated; false" in said
    assert "the head was trained with" in said
    assert "norm_before_residual=true" in said
    (tmp_path / "bad.jsonl").write_text('{"no": 1}\n')
    for name, reason in (("bad.jsonl", "line 1 of --prompts"), ("none.txt", "cannot read")):
        with pytest.raises(ConfigError, match=reason):
            run_inspect(InspectOptions(str(out), target="demo", probe=True,
                                       prompts=tmp_path / name))  # fmt: skip
