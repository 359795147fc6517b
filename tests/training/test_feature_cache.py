"""Recorded features are what the target says; kills, damage and mix-ups are noticed."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from torch import Tensor

from specdec.artifacts.target_fingerprint import TargetFingerprint
from specdec.errors import ConfigError, SpecdecError
from specdec.heads.eagle3.draft_vocabulary import DraftVocabulary
from specdec_training.commands import features as command_module
from specdec_training.commands.features import run_features
from specdec_training.contracts import FeatureSource, TokenBatch
from specdec_training.data.batches import collate
from specdec_training.data.prepared import ExampleList, PreparedData, PreparedMeta
from specdec_training.features import cache, writer
from specdec_training.features.cache import CachedFeatures, FeatureError
from specdec_training.features.online import OnlineFeatures
from specdec_training.features.options import DataFeaturesOptions
from specdec_training.features.target_output import weights_hash
from specdec_training.features.writer import estimate_bytes, write_features

LAYERS = (0, 2, 1)
VOCAB, WIDTH = 97, 32
ROWS = [(3, 7), (1,), (22, 0, 4), (5,)]


def llama(seed: int = 0, **changes: Any) -> Any:
    settings = {
        "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False,
    } | changes  # fmt: skip
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()


def gemma(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.Gemma2Config(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, final_logit_softcapping=1.5,
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config).eval()


def granite(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.GraniteConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, logits_scaling=8.0,
    )  # fmt: skip
    return transformers.GraniteForCausalLM(config).eval()


def prepared_for(model: Any, count: int = 23, seed: int = 1) -> PreparedData:
    chosen = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 40, (count,), generator=chosen).tolist()
    ids = [torch.randint(0, VOCAB, (n,), generator=chosen).tolist() for n in lengths]
    examples = ExampleList(
        datasets.Dataset.from_dict(
            {"token_ids": ids, "loss_mask": [[n % 3 > 0 for n in range(len(i))] for i in ids]}
        )
    )
    learnt = sum(sum(example.loss_mask) for example in examples)
    meta = PreparedMeta(
        format_version=1, target=TargetFingerprint.of(model.config), tokenizer="t" * 64,
        chat_template=None, vocab_size=VOCAB, max_length=40, rows=count, tokens=sum(lengths),
        loss_tokens=learnt, held_out=0, rows_read=count, skipped={}, kinds={},
        draft_vocab_size=VOCAB, draft_vocab_coverage=1.0, data_hash=examples.hash(),
        vocab_hash="v", held_out_hash="h",
    )  # fmt: skip
    return PreparedData(examples, [], meta, DraftVocabulary.whole(VOCAB), torch.zeros(VOCAB))


@dataclasses.dataclass
class Recorded:
    """Features of a tiny target, and how to open them."""

    model: Any
    prepared: PreparedData
    folder: Path

    def write(self, dtype: str = "float32", shard_tokens: int = 100) -> None:
        write_features(
            self.model, self.prepared, LAYERS, self.folder, dtype, shard_tokens, progress=False
        )

    def open(self, **changes: Any) -> CachedFeatures:
        meta = self.prepared.meta
        given = {"data_hash": meta.data_hash, "target": meta.target, "taps": LAYERS} | changes
        return CachedFeatures(self.folder, **given)

    def batch(self, width: int = 60) -> TokenBatch:
        return collate(ROWS, self.prepared.examples, width)


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    model = llama()
    return Recorded(model, prepared_for(model), tmp_path / "features")


def away(one: Tensor, other: Tensor) -> float:
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    return float((one - other).abs().max())


def relative(one: Tensor, other: Tensor) -> float:
    """Largest difference, as a share of the largest value where that is above 1."""
    return away(one, other) / max(1.0, float(other.abs().max()))


# ---- what is recorded


@pytest.mark.parametrize("build", [llama, gemma, granite])
@pytest.mark.parametrize("width", [60, 17])
def test_recorded_is_online(build: Callable[[], Any], width: int, tmp_path: Path) -> None:
    """Features, logits and padding, packed and cut; to 1e-6 in fp32."""
    model = build()
    recorded = Recorded(model, prepared_for(model), tmp_path)
    recorded.write()
    batch = recorded.batch(width)
    sources: list[FeatureSource] = [recorded.open(), OnlineFeatures(model, LAYERS)]
    cached, online = (source.features(batch) for source in sources)
    assert cached.tokens is batch
    logits = [
        s.target_logits(f.last_hidden) for s, f in zip(sources, (cached, online), strict=True)
    ]
    assert relative(cached.aux, online.aux) < 1e-6
    assert relative(cached.last_hidden, online.last_hidden) < 1e-6
    assert relative(*logits) < 1e-6
    own = model(input_ids=torch.tensor([recorded.prepared.examples[5].token_ids[:width]])).logits[0]
    assert away(logits[0][3, : len(own)], own) < 1e-5
    found = recorded.open()
    assert torch.equal(found.embeddings, model.get_input_embeddings().weight)
    assert torch.equal(found.output_matrix, model.get_output_embeddings().weight)
    found.check()


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_smaller_types_round_and_nothing_else(recorded: Recorded, dtype: str, bound: float) -> None:
    recorded.write(dtype)
    online = OnlineFeatures(recorded.model, LAYERS).features(recorded.batch())
    cached = recorded.open().features(recorded.batch())
    assert cached.aux.dtype == getattr(torch, dtype)
    scale = float(online.last_hidden.abs().max())
    assert float((cached.last_hidden.float() - online.last_hidden).abs().max()) <= bound * scale
    assert recorded.open().target_logits(cached.last_hidden).dtype == torch.float32


@pytest.mark.parametrize("tied", [False, True])
def test_the_estimate_is_right(tmp_path: Path, tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    recorded = Recorded(model, prepared_for(model, 400), tmp_path)
    recorded.write("bfloat16", 1000)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    estimate = estimate_bytes(recorded.prepared, model.config, LAYERS, "bfloat16")
    assert 0.95 * size < estimate <= size
    print(f"estimated {estimate:,} bytes, wrote {size:,}")


def test_only_what_is_asked_for_is_read(recorded: Recorded, monkeypatch: Any) -> None:
    """Shards are mapped: a batch reads its own slices, never a whole tensor of a shard."""
    recorded.write(shard_tokens=10**6)
    read: list[int] = []

    class Counted:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __getitem__(self, index: slice) -> Tensor:
            found: Tensor = self.inner[index]
            read.append(len(found))
            return found

    class File:
        def __init__(self, path: Path) -> None:
            self.inner: Any = cache.safe_open(path, "pt")

        def get_slice(self, name: str) -> Counted:
            return Counted(self.inner.get_slice(name))

        def get_tensor(self, name: str) -> Tensor:
            assert name == "offsets"
            found: Tensor = self.inner.get_tensor(name)
            return found

    source = recorded.open()
    monkeypatch.setattr(cache, "_mapped", File)
    batch = recorded.batch()
    source.features(batch)
    assert read == [d.stop - d.start for d in batch.documents for _ in range(3)]


def test_many_shards_are_not_all_open(recorded: Recorded, monkeypatch: Any) -> None:
    recorded.write(shard_tokens=1)  # an example longer than a shard gets one of its own
    assert len(list(recorded.folder.glob("features-*"))) == 23
    monkeypatch.setattr(cache, "_MOST_OPEN", 2)
    source = recorded.open()
    online = OnlineFeatures(recorded.model, LAYERS)
    for batch in (
        recorded.batch(),
        collate([(n,) for n in range(23)], recorded.prepared.examples, 60),
    ):
        assert away(source.features(batch).aux, online.features(batch).aux) < 1e-6
        assert len(source._open) <= 2


# ---- what does not fit


def test_what_differs_is_named(recorded: Recorded) -> None:
    recorded.write()
    target = recorded.prepared.meta.target
    for changes, named in (
        ({"data_hash": "0" * 64}, "data_hash: "),
        ({"taps": (0, 1, 2)}, r"taps: \(0, 2, 1\) and \(0, 1, 2\)"),
        ({"target": dataclasses.replace(target, hidden_size=64)}, "target hidden_size: 32 and 64"),
        ({"weights": weights_hash(llama(seed=1))}, "weights: "),
    ):
        with pytest.raises(FeatureError, match=f"not those that are needed .*{named}"):
            recorded.open(**changes)
    recorded.open(weights=weights_hash(llama(seed=0)))
    recorded.open(weights=weights_hash(llama().to("meta")))  # unknown, so not compared


def test_a_batch_of_other_tokens_is_refused(recorded: Recorded) -> None:
    recorded.write()
    source, batch = recorded.open(), recorded.batch()
    batch.token_ids[0, 1] += 1
    with pytest.raises(FeatureError, match="other tokens for example 3"):
        source.features(batch)
    swapped = [dataclasses.replace(d, example=99) for d in batch.documents]
    with pytest.raises(FeatureError, match="no example 99"):
        source.features(dataclasses.replace(batch, documents=tuple(swapped)))
    with pytest.raises(FeatureError, match="without documents"):
        source.features(dataclasses.replace(batch, documents=()))


def test_an_unfinished_or_missing_folder_is_refused(recorded: Recorded, tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match="there is no folder"):
        recorded.open()
    recorded.write()
    (recorded.folder / "meta.json").unlink()
    with pytest.raises(FeatureError, match=r"no finished features: there is no meta\.json"):
        recorded.open()
    shutil.rmtree(recorded.folder)
    recorded.folder.mkdir()
    (recorded.folder / "thesis.tex").write_text("")
    with pytest.raises(FeatureError, match="holds other files"):
        recorded.write()
    (tmp_path / "file").write_text("")
    recorded.folder = tmp_path / "file"
    with pytest.raises(FeatureError, match="cannot write features"):
        recorded.write()


def test_damage_is_noticed(recorded: Recorded) -> None:
    recorded.write()
    for path in sorted(recorded.folder.iterdir()):
        if path.name == "run.lock":
            continue
        data = path.read_bytes()
        for change in (
            data[:-1],
            b"",
            data[: len(data) // 2] + b"\xff" + data[len(data) // 2 + 1 :],
        ):
            path.write_bytes(change)
            with pytest.raises(SpecdecError):
                recorded.open().check()
        path.unlink()
        with pytest.raises(FeatureError):
            recorded.open()
        path.write_bytes(data)
        path.rename(path.with_suffix(".elsewhere"))
        path.symlink_to(path.with_suffix(".elsewhere"))
        with pytest.raises(FeatureError):
            recorded.open()
        path.unlink()
        path.with_suffix(".elsewhere").rename(path)
    recorded.open().check()


@pytest.mark.parametrize("name", ["meta.json", "index.json"])
def test_hostile_descriptions_are_refused(recorded: Recorded, name: str) -> None:
    recorded.write()
    path = recorded.folder / name
    good = json.loads(path.read_bytes())
    bad: list[Any] = [[], {}, good | {"version": 9}, good | {"key": None}]
    for field, value in (
        ("rows", -1), ("rows", True), ("tokens", "9"), ("dtype", "float8"), ("taps", [None]),
        ("target", {}), ("weights", 3), ("logit_scale", "x"), ("logit_cap", "x"), ("more", 1),
    ):  # fmt: skip
        bad.append(good | {"key": good["key"] | {field: value}})
    if name == "index.json":
        bad += [good | {"shards": s} for s in ([], [[0, 1]], [[0, 9, 9]], [["a", 1, 1]], 3, [3])]
        bad += [good | {"shards": [[1, 23, good["key"]["tokens"]]]}]
    else:
        bad += [good | {"files": f} for f in ([], {}, {"meta.json": 3}, {"index.json": {}})]
    for value in bad:
        path.write_text(json.dumps(value))
        with pytest.raises(SpecdecError):
            recorded.open()
    for text in ("[" * 100_000, "{", "\x00"):
        path.write_text(text)
        with pytest.raises(FeatureError):
            recorded.open()


def test_values_that_do_not_fit_the_type_are_refused(recorded: Recorded) -> None:
    with torch.no_grad():
        recorded.model.model.embed_tokens.weight[11] *= 1e8  # as massive activations do
    with pytest.raises(FeatureError, match=r"reaches .*, which torch\.float16 does not hold"):
        recorded.write("float16")
    shutil.rmtree(recorded.folder)
    recorded.write("bfloat16")
    shutil.rmtree(recorded.folder)
    with torch.no_grad():
        recorded.model.model.embed_tokens.weight[50] = float("nan")
    with pytest.raises(FeatureError, match="holds values that are not finite"):
        recorded.write("bfloat16")


def test_data_of_another_target_are_refused(recorded: Recorded) -> None:
    recorded.model = llama(num_hidden_layers=5)
    with pytest.raises(
        ConfigError, match=r"prepared for another target .num_hidden_layers: 5 and 4"
    ):
        recorded.write()
    with pytest.raises(ConfigError, match="kept as float32, bfloat16, float16, not as 'int8'"):
        recorded.write("int8")
    with pytest.raises(ConfigError, match="shard_tokens must be at least 1"):
        recorded.write(shard_tokens=0)


# ---- kills and full disks


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.fault
@pytest.mark.skipif(not hasattr(os, "fork"), reason="writers are forked")
def test_a_killed_writer_is_continued(recorded: Recorded, monkeypatch: Any) -> None:
    """Killed before each rename: finished shards stay, and the result is the same to the byte."""
    recorded.write()
    wanted = content(recorded.folder)
    shards = len(list(recorded.folder.glob("features-*")))
    shutil.rmtree(recorded.folder)
    real, runs = os.rename, 0
    while not (recorded.folder / "meta.json").exists():
        runs += 1
        child = os.fork()
        if not child:
            left = 2  # this process may rename once more

            def rename(*arguments: Any, **named: Any) -> None:
                nonlocal left
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                real(*arguments, **named)

            os.rename = rename  # type: ignore[assignment]
            os.replace = rename  # type: ignore[assignment]
            try:
                recorded.write()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert runs < 50
        if not (recorded.folder / "meta.json").exists():
            with pytest.raises(FeatureError):
                recorded.open()
    assert runs == shards + 3  # the index, the target and meta.json are renamed, too
    assert content(recorded.folder) == wanted
    computed: list[int] = []
    monkeypatch.setattr(
        writer,
        "_features_of",
        lambda *a: computed.append(1) or {},  # type: ignore[func-returns-value]
    )
    recorded.write()
    assert not computed  # all is there
    print(f"{runs} processes, each killed after one more file, wrote what one writes")


def test_a_damaged_shard_of_a_killed_writer_is_written_again(recorded: Recorded) -> None:
    recorded.write()
    wanted = content(recorded.folder)
    (recorded.folder / "meta.json").unlink()
    (recorded.folder / "features-000002.safetensors").write_bytes(b"half")
    (recorded.folder / "features-000003.safetensors").unlink()
    (recorded.folder / ".features-000003.safetensors.tmp").write_bytes(b"half")
    recorded.write()
    assert content(recorded.folder) == wanted


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda r: setattr(r, "model", llama(seed=1)), "weights: "),
        (lambda r: setattr(r, "prepared", prepared_for(r.model, seed=2)), "data_hash: "),
    ],
)
def test_features_are_never_mixed(
    recorded: Recorded, change: Callable[[Recorded], None], named: str
) -> None:
    recorded.write()
    (recorded.folder / "meta.json").unlink()
    before = content(recorded.folder)
    for arguments, message in (
        ({"dtype": "bfloat16"}, "dtype: float32 and bfloat16"),
        ({"shard_tokens": 50}, "shard_tokens: "),
    ):
        with pytest.raises(FeatureError, match=message):
            recorded.write(**arguments)
    change(recorded)
    with pytest.raises(FeatureError, match=f"holds other features .*{named}"):
        recorded.write()
    assert content(recorded.folder) == before


@pytest.mark.fault
def test_a_full_disk_keeps_the_finished_shards(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, room = os.write, 150_000

    def full(descriptor: int, data: Any) -> int:
        nonlocal room
        room -= memoryview(data).nbytes
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(FeatureError, match=r"No space left on device; .* are free") as caught:
            recorded.write()
    assert "goes on after the shards that are there" in str(caught.value)
    left = {path.name for path in recorded.folder.iterdir()}
    assert "features-000000.safetensors" in left
    assert not any(name.endswith(".tmp") for name in left)
    recorded.write()
    recorded.open().check()


# ---- the command


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataFeaturesOptions:
    from specdec_training.data.options import DataPrepareOptions
    from specdec_training.data.prepare import prepare

    prepare(DataPrepareOptions(input=("demo",), limit=40, output=tmp_path / "data", max_length=64))
    return DataFeaturesOptions(
        data=tmp_path / "data", output=tmp_path / "features", keep_as="float32"
    )


def test_the_command_records_the_bundled_toy(
    command: DataFeaturesOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_features(command) == 0
    said = capsys.readouterr()
    announced = float(said.err.partition("size")[2].split()[0])
    assert said.err.partition("size")[2].split()[1] == "MB"
    size = sum(path.stat().st_size for path in Path(str(command.output)).iterdir())
    assert announced == pytest.approx(size / 1e6, rel=0.02)
    assert "free at" in said.err
    assert str(command.output) in said.out
    from specdec.loading import load_model

    data, model = PreparedData.load(str(command.data)), load_model("demo", "auto", "cpu")
    source = CachedFeatures(str(command.output), data.meta.data_hash, data.meta.target, (0, 2, 4))
    online = OnlineFeatures(model, source.key.taps)
    batch = collate([(0, 1), (5,)], data.examples, 64)
    assert away(source.features(batch).aux, online.features(batch).aux) < 1e-5
    assert run_features(command) == 0  # nothing left to do
    assert "already there" in capsys.readouterr().err


def test_training_on_them_is_training_online(command: DataFeaturesOptions, tmp_path: Path) -> None:
    """The losses of a short run, with the target and with what was recorded of it."""
    pytest.importorskip("accelerate")
    from specdec_training.commands.train import run_train
    from specdec_training.run.options import TrainOptions

    run_features(command)
    losses = []
    for features in (None, command.output):
        options = TrainOptions(
            data=command.data, output=tmp_path / f"run {len(losses)}", features=features, steps=4,
            max_length=64, ttt_steps=2, eval_every=0, device="cpu", batch_rows=2, precision="fp32",
        )  # fmt: skip
        assert run_train(options) == 0
        assert options.output is not None
        lines = (options.output / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == 4


def test_the_command_refuses_what_is_too_large(
    command: DataFeaturesOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_module, "estimate_bytes", lambda *_: 30 * 10**9)
    monkeypatch.setattr(command_module, "free_bytes", lambda _: 25 * 10**9)
    with pytest.raises(FeatureError, match=r"need 30\.0 GB more and 25\.0 GB are free"):
        run_features(command)
    monkeypatch.setattr(command_module, "free_bytes", lambda _: 10**12)
    with pytest.raises(FeatureError, match=r"would write 30\.0 GB; say --yes"):
        run_features(command)
    assert not Path(str(command.output)).exists()
    assert run_features(dataclasses.replace(command, yes=True)) == 0


def test_the_command_spreads_the_target(
    command: DataFeaturesOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("accelerate")
    spread = dataclasses.replace(command, target_device_map="auto", dtype="float32")
    assert run_features(spread) == 0
    assert run_features(command) == 0  # the same features: nothing is left to do
    assert "already there" in capsys.readouterr().err


def test_the_command_names_a_wrong_option(command: DataFeaturesOptions) -> None:
    for changes, message in (
        ({"data": None}, "--data is missing"),
        ({"output": None}, "--output is missing"),
        ({"shard_tokens": 0}, "--shard-tokens must be at least 1"),
        ({"taps": (6,)}, "layers from -1, the embeddings, to 4 of .* 6 layers, got 6"),
        ({"taps": (1, 1)}, "--taps must ascend"),
        ({"target_device_map": "disk"}, "must be auto, balanced or sequential, got 'disk'"),
        ({"data": Path("/nowhere")}, "there is no folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_features(dataclasses.replace(command, **changes))
