"""Where `specdec convert` writes, and what it never touches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from helpers import foreign_heads as foreign
from helpers.foreign_heads import small_target
from specdec.cli.head_options import ConvertOptions, InspectOptions
from specdec.cli.heads import run_convert, run_inspect
from specdec.errors import ConfigError


def head_and_target(folder: Path) -> tuple[Path, str]:
    kind = foreign.Variant(target=foreign.H)
    source = foreign.foreign_head(folder / "head", "specforge", kind)
    return source, str(small_target(folder / "target"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_convert_replaces_a_head_only_when_it_is_told_to(tmp_path: Path) -> None:
    source, target = head_and_target(tmp_path)
    first = ConvertOptions(str(source), tmp_path / "out", target=target)
    (tmp_path / "out").mkdir()  # an empty folder is nobody's
    assert run_convert(first) == 0
    before = contents(tmp_path / "out")
    for name in ("out", "out/", "./out", "target/../out"):
        with pytest.raises(ConfigError, match=r"holds a draft head already; --overwrite"):
            run_convert(replace(first, destination=tmp_path / name, dtype="bfloat16"))
    assert contents(tmp_path / "out") == before
    assert run_convert(replace(first, overwrite=True, dtype="bfloat16")) == 0
    assert contents(tmp_path / "out") != before
    for name in ("head", "target"):  # which specdec did not write
        kept = contents(tmp_path / name)
        other = replace(first, source=str(tmp_path / "out"), destination=tmp_path / name)
        with pytest.raises(ConfigError, match="is no head that specdec wrote"):
            run_convert(replace(other, overwrite=True))
        assert contents(tmp_path / name) == kept


@pytest.mark.parametrize("way", ["itself", "slash", "dots", "relative", "link", "link above", "."])
def test_convert_never_writes_onto_its_source(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = head_and_target(tmp_path)
    own = tmp_path / "a" / "own"
    assert run_convert(ConvertOptions(str(source), own, target=target)) == 0
    before = contents(own)
    (tmp_path / "link").symlink_to(own)
    (tmp_path / "above").symlink_to(own.parent)
    monkeypatch.chdir(own if way == "." else tmp_path)
    name = {
        "itself": str(own), "slash": f"{own}/", "dots": f"{own.parent}/../a/own",
        "relative": "a/own", "link": str(tmp_path / "link"), "link above": "above/own", ".": ".",
    }[way]  # fmt: skip
    for overwrite in (False, True):
        for one, other in ((str(own), name), (name, str(own)), (str(own), str(own.parent))):
            options = ConvertOptions(one, Path(other), dtype="bfloat16", overwrite=overwrite)
            with pytest.raises(ConfigError, match="where the head is read from, or holds it"):
                run_convert(options)
    assert contents(own) == before


@pytest.mark.parametrize("name", ["/", "..", "x" * 300, "no\0name"])
def test_names_that_no_folder_can_have(name: str, tmp_path: Path) -> None:
    source, target = head_and_target(tmp_path)
    with pytest.raises(ConfigError) as refusal:
        run_convert(ConvertOptions(str(source), tmp_path / name, target=target))
    assert "\n" not in str(refusal.value)


def test_a_head_of_no_numbers_is_neither_shown_nor_converted(tmp_path: Path) -> None:
    source, target = head_and_target(tmp_path)
    weights = load_file(source / "model.safetensors")
    weights["midlayer.mlp.up_proj.weight"][1, 2] = float("inf")
    save_file(weights, source / "model.safetensors")
    said = r"'midlayer\.mlp\.up_proj\.weight' of the draft head holds 1 of 320"
    with pytest.raises(ConfigError, match=said):
        run_inspect(InspectOptions(str(source)))
    with pytest.raises(ConfigError, match=said):
        run_convert(ConvertOptions(str(source), tmp_path / "out", target=target))
    assert not (tmp_path / "out").exists()


def test_inspect_ends_with_the_command_that_probes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = head_and_target(tmp_path)
    run_inspect(InspectOptions(str(source), target=target))
    command = f"`specdec inspect {source} --target {target} --probe` tries"
    assert command in capsys.readouterr().out
