"""Files that lie, paths that lead out, and writing that is whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from helpers import foreign_heads as foreign
from specdec.artifacts.target_fingerprint import TargetFingerprint
from specdec.errors import ConfigError
from specdec.heads.checkpoints.load import load_head, read_head_config, save_head
from specdec.heads.eagle3.head import Eagle3Head

TARGET = TargetFingerprint("llama", foreign.HT, foreign.LAYERS, foreign.V, None)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return foreign.foreign_head(tmp_path / "head", "specforge")


@pytest.fixture
def head(source: Path) -> Eagle3Head:
    return load_head(source).head


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(path: Path, header: object, body: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def longer(entry: dict[str, Any]) -> None:
    entry["shape"] = [16, 2**50]


def negative(entry: dict[str, Any]) -> None:
    entry["shape"] = [-16, -72]


def of_nan(entry: dict[str, Any]) -> None:
    entry["shape"] = [float("nan"), 72]


def past_the_end(entry: dict[str, Any]) -> None:
    size = entry["data_offsets"][1] - entry["data_offsets"][0]
    entry["data_offsets"] = [2**40, 2**40 + size]


def unknown_dtype(entry: dict[str, Any]) -> None:
    entry["dtype"] = "F4_E2M1"


@pytest.mark.parametrize("change", [longer, negative, of_nan, past_the_end, unknown_dtype])
def test_headers_that_lie_are_refused(change: Callable[[Any], None], source: Path) -> None:
    path = source / "model.safetensors"
    header, body = header_of(path)
    change(header["fc.weight"])
    with_header(path, header, body)
    with pytest.raises(ConfigError, match=r"fc\.weight|NaN|holds \d+ bytes"):
        read_head_config(source)


@pytest.mark.parametrize("size", [0, 3, 8, 40, 400, 3000])
def test_a_truncated_file_is_refused(size: int, source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        load_head(source)


@pytest.mark.parametrize("change", [-1, -40, 1, 4096])
def test_a_body_of_another_length_is_seen_without_reading_it(change: int, source: Path) -> None:
    path = source / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + bytes(change))
    with pytest.raises(ConfigError, match=r"holds \d+ bytes of tensors, and its header describes"):
        read_head_config(source)


def test_a_huge_header_is_not_read(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ConfigError, match="header claims"):
        load_head(source)
    path.write_bytes((5 << 20).to_bytes(8, "little") + b" " * (5 << 20))
    with pytest.raises(ConfigError, match="a header has at most"):
        load_head(source)


@pytest.mark.parametrize("text", [b"[]", b"{", b"\xff\xfe", b'{"a": 1}', b'{"a": 1, "a": 2}'])
def test_headers_that_are_no_tables_are_refused(text: bytes, source: Path) -> None:
    with_header(source / "model.safetensors", text, b"")
    with pytest.raises(ConfigError, match=r"header|tensor"):
        load_head(source)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"hidden_size": 16, "hidden_size": 32}', "'hidden_size' stands in it twice"),
        (b'{"rms_norm_eps": NaN}', "NaN is no JSON number"),
        (b'{"rms_norm_eps": -Infinity}', "Infinity"),
        (b"[1]", "must hold a JSON object"),
        (b"\xff", "not valid JSON"),
        (b"[" * 100_000, "config.json"),
        (b" " * (2 << 20), "larger than"),
        (b"", "not valid JSON"),
    ],
    ids=["twice", "nan", "infinite", "list", "bytes", "deep", "large", "empty"],
)
def test_configs_that_are_no_strict_json_are_refused(text: bytes, said: str, source: Path) -> None:
    (source / "config.json").write_bytes(text)
    with pytest.raises(ConfigError, match=r"config\.json") as refusal:
        load_head(source)
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    "name",
    ["../out.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x.bin", "C:\\x.safetensors", 5],
)
def test_shards_stay_in_the_folder(name: object, source: Path) -> None:
    (source / "model.safetensors").rename(source.parent / "out.safetensors")
    index = {"weight_map": {"fc.weight": name}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="weight_map"):
        load_head(source)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_must_have_a_map(index: object, source: Path) -> None:
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="weight_map"):
        load_head(source)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_links_out_of_the_folder_are_not_followed(name: str, source: Path) -> None:
    (source / name).rename(source.parent / name)
    (source / name).symlink_to(source.parent / name)
    with pytest.raises(ConfigError, match=f"{name} in .* is a link out of the folder"):
        load_head(source)


def test_a_snapshot_of_the_hub_cache_is_a_folder_of_links(source: Path, tmp_path: Path) -> None:
    root = tmp_path / "models--a--b"
    (root / "blobs").mkdir(parents=True)
    snapshot = root / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (source / name).rename(root / "blobs" / name)
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / name)
    assert load_head(snapshot).dialect == "specforge"


def test_sources_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name, said in (
        (tmp_path / "empty", "no config.json in it"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "nothing", "there is no folder"),
        ("", "name is empty"),
        ("only-a-name", "there is no folder"),
        ("a/b/c", "there is no folder"),
        ("a\0b", "folder|name"),
        ("~nobody-of-this-name/x", "draft head"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_head(name)


def test_a_hub_id_is_fetched_without_code(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fake(name: str, **how: Any) -> str:
        asked.append((name, how))
        if name == "some/none":
            raise OSError("no such repository")
        return str(source)

    monkeypatch.setattr("specdec.artifacts.hub.why_silent", lambda: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    assert load_head("some/head").dialect == "specforge"
    patterns = asked[0][1]["allow_patterns"]
    assert all(name.endswith(("json", "safetensors")) for name in patterns)
    with pytest.raises(ConfigError, match="cannot fetch the draft head 'some/none': no such repo"):
        load_head("some/none")


def test_a_pickle_is_refused_with_a_way_out(source: Path) -> None:
    (source / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="holds no weights"):
        load_head(source)
    torch.save({}, source / "pytorch_model.bin")
    for refuse in (load_head, read_head_config):
        with pytest.raises(ConfigError, match="specdec convert"):
            refuse(source)


def test_our_file_wins_and_contradictions_raise(head: Eagle3Head, tmp_path: Path) -> None:
    out = tmp_path / "out"
    save_head(head, out, fingerprint=TARGET, num_target_layers=12, facts={"steps": 3})
    loaded = load_head(out)
    assert (loaded.fingerprint, loaded.facts, loaded.assumed) == (TARGET, {"steps": 3}, ())
    ours, theirs = out / "specdec_config.json", out / "config.json"
    good = {path: path.read_text() for path in (ours, theirs)}

    def refused(path: Path, change: Callable[[dict[str, Any]], object], said: str) -> None:
        raw = json.loads(good[path])
        change(raw)
        path.write_text(json.dumps(raw))
        with pytest.raises(ConfigError, match=said):
            load_head(out)
        path.write_text(good[path])

    refused(theirs, lambda raw: raw.update(norm_before_residual=True), "norm_before_residual is")
    refused(theirs, lambda raw: raw.update(rms_norm_eps=1e-3), "rms_norm_eps is 0.001")
    refused(theirs, lambda raw: raw.update(rope_theta=1.0), "rope_theta is 1.0")
    refused(theirs, lambda raw: raw.update(architectures=["LlamaForCausalLM"]), "dialect is")
    last = {"aux_output_layers": [2, 5, 11]}
    refused(ours, lambda raw: raw["config"].update(last), "in specdec_config.json names the output")
    refused(ours, lambda raw: raw.update(format="x"), "format and version")
    refused(ours, lambda raw: raw.update(version=2), "format and version")
    refused(ours, lambda raw: raw.update(engine="tgi"), "engine in")
    refused(ours, lambda raw: raw.update(dialect="other"), "dialect in")
    refused(ours, lambda raw: raw.update(more=1), "'more'")
    refused(ours, lambda raw: raw.pop("facts"), "'facts'")
    refused(ours, lambda raw: raw.update(facts=[]), "facts in")
    refused(ours, lambda raw: raw.update(num_target_layers=10), "num_target_layers|aux_output_l")
    refused(ours, lambda raw: raw.update(fingerprint={"model_type": "x"}), "hidden_size of a targ")
    refused(ours, lambda raw: raw["config"].update(hidden_size=2**60), "hidden_size must be")
    refused(ours, lambda raw: raw["config"].update(fc_norm="no"), "fc_norm must be true or false")
    refused(
        ours, lambda raw: raw["config"].update(aux_output_layers=[2, 5, 8]), "aux_output_layers"
    )
    refused(ours, lambda raw: raw["config"].pop("qk_norm"), "'qk_norm'")
    refused(ours, lambda raw: raw["config"].update(new=1), "'new'")
    assert load_head(out).assumed == ()


def test_only_heads_of_ours_are_written_over(
    head: Eagle3Head, source: Path, tmp_path: Path
) -> None:
    def save(folder: Path, **how: Any) -> None:
        save_head(head, folder, fingerprint=None, num_target_layers=12, **how)

    save(tmp_path / "new" / "deep")
    save(tmp_path / "new" / "deep", dialect="modelopt")
    assert load_head(tmp_path / "new" / "deep").dialect == "modelopt"
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"no head that specdec wrote .*no specdec_config.json"):
        save(source)
    (tmp_path / "empty" / "diary.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"holds diary.txt"):
        save(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is no folder"):
        save(tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "new" / "deep")
    with pytest.raises(ConfigError, match="is no folder"):
        save(tmp_path / "link")
    with pytest.raises(ConfigError, match="facts"):
        save(tmp_path / "facts", facts={"a": object()})
    assert not (tmp_path / "facts").exists()
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.fault
def test_a_failure_leaves_the_older_head(
    head: Eagle3Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    save_head(head, out, fingerprint=None, num_target_layers=12)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    def full_too(*_: Any, **__: Any) -> None:
        raise SafetensorError("No space left on device")

    written, flushed = "heads.checkpoints.save.save_file", "artifacts.whole_folder._flush"
    for name, failure in ((written, full), (written, full_too), (flushed, full)):
        with monkeypatch.context() as patch:
            patch.setattr(f"specdec.{name}", failure)
            with pytest.raises(ConfigError, match="No space left"):
                save_head(head, out, fingerprint=None, num_target_layers=12, dialect="modelopt")
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    renamed = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(
            Path, "rename", lambda path, to: full() if path.suffix == ".tmp" else renamed(path, to)
        )
        with pytest.raises(ConfigError, match="No space left"):
            save_head(head, out, fingerprint=None, num_target_layers=12, dialect="modelopt")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "head"}
