"""`specdec train` on the bundled target: what it writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from specdec import demo
from specdec.artifacts.run_lock import RunLock
from specdec.errors import ConfigError, SpecdecError
from specdec.heads.checkpoints.load import load_head
from specdec_training.commands.train import head_config, run_train
from specdec_training.data.options import DataPrepareOptions
from specdec_training.data.prepare import prepare
from specdec_training.data.prepared import PreparedData
from specdec_training.features.writer import write_features
from specdec_training.run.checkpoints import CheckpointStore
from specdec_training.run.options import TrainOptions


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare(
        DataPrepareOptions(
            input=("demo",), limit=120, output=folder / "data", draft_vocab=512, held_out=4,
            max_length=64, cache_dir=folder / "cache",
        )
    )  # fmt: skip
    return folder / "data"


def options(data: Path, output: Path, **changes: Any) -> TrainOptions:
    found = TrainOptions(
        data=data, output=output, steps=12, max_length=64, ttt_steps=2, eval_every=12, lr=5e-4,
        eval_prompts=2, eval_tokens=10, depth=2, nodes=6, device="cpu", precision="fp32",
    )  # fmt: skip
    return replace(found, **changes)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert run_train(options(data, folder)) == 0
    return folder


def test_what_a_run_writes(trained: Path, data: Path) -> None:
    assert {path.name for path in trained.iterdir()} >= {
        "head", "checkpoints", "metrics.json", "log.jsonl", "provenance.json",
    }  # fmt: skip
    metrics = json.loads((trained / "metrics.json").read_text())
    assert set(metrics["acceptance_length"]) == {"chain_t0", "tree_t0", "chain_t1", "tree_t1"}
    assert metrics["text_identical"] is True
    assert metrics["prompt_lookup_t0"] >= 1
    assert 0 <= metrics["looping_share"] < 1
    assert [found["step"] for found in metrics["history"]] == [0, 12]
    assert len((trained / "log.jsonl").read_text().splitlines()) == 12
    known = json.loads((trained / "provenance.json").read_text())
    assert known["options"]["ttt_steps"] == 2
    assert known["data_hash"] == PreparedData.load(data).meta.data_hash


def test_the_head_loads_and_is_in_bfloat16(trained: Path, data: Path) -> None:
    found = load_head(trained / "head")
    assert found.facts["acceptance_length"]["tree_t0"] >= 1
    assert found.head.fc.weight.dtype == torch.bfloat16
    assert found.head.vocabulary == PreparedData.load(data).vocabulary
    assert not found.head.vocabulary.is_whole
    assert found.head.config.aux_output_layers == (0, 2, 4)


def test_a_finished_run_ends_at_once(trained: Path, data: Path) -> None:
    before = (trained / "log.jsonl").read_bytes()
    assert run_train(options(data, trained)) == 0
    assert (trained / "log.jsonl").read_bytes() == before


def test_warm_start(trained: Path, data: Path, tmp_path: Path) -> None:
    head = str(trained / "head")
    assert run_train(options(data, tmp_path, init_from=head, steps=2, eval_every=0)) == 0
    first = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    fresh = json.loads((trained / "log.jsonl").read_text().splitlines()[0])
    assert first["loss"] < fresh["loss"]
    assert (tmp_path / "head" / "model.safetensors").is_file()


def test_warm_start_on_other_data(trained: Path, data: Path, tmp_path: Path) -> None:
    """Other texts have other frequent tokens; a head's vocabulary is kept where it is asked for."""
    head, rows = trained / "head", tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"zebra {n} quagga"}) + "\n" for n in range(40)))
    how = DataPrepareOptions(
        input=(str(rows),), draft_vocab=512, held_out=2, max_length=64,
        cache_dir=tmp_path / "cache", output=tmp_path / "own",
    )  # fmt: skip
    prepare(how)
    with pytest.raises(ConfigError, match=f"--draft-vocab-of '{head}'"):
        run_train(options(tmp_path / "own", tmp_path / "a", init_from=str(head), eval_every=0))
    kept = prepare(replace(how, output=tmp_path / "kept", draft_vocab_of=str(head))).data
    wanted = PreparedData.load(data)
    assert kept.vocabulary == wanted.vocabulary
    assert not kept.vocabulary.is_whole
    assert kept.meta.draft_vocab_size == wanted.meta.draft_vocab_size
    assert kept.meta.draft_vocab_coverage < 1
    run = options(tmp_path / "kept", tmp_path / "b", init_from=str(head), steps=2, eval_every=0)
    assert run_train(run) == 0
    assert load_head(tmp_path / "b" / "head").head.vocabulary == wanted.vocabulary


def test_recorded_features_train_like_the_target(data: Path, trained: Path, tmp_path: Path) -> None:
    write_features(
        demo.load_target(), PreparedData.load(data), (0, 2, 4), tmp_path / "f", "float32"
    )
    run = tmp_path / "run"
    assert run_train(options(data, run, features=tmp_path / "f", eval_every=0)) == 0
    ours, theirs = (
        [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (run, trained)
    )
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_target_that_accelerate_spreads_trains_alike(data: Path, tmp_path: Path) -> None:
    losses = []
    for device_map in (None, "auto"):
        folder = tmp_path / str(device_map)
        run = options(data, folder, steps=2, eval_every=0, target_device_map=device_map)
        assert run_train(run) == 0
        losses.append([json.loads(x)["loss"] for x in (folder / "log.jsonl").open()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_dry_run_writes_no_head(data: Path, tmp_path: Path) -> None:
    assert run_train(options(data, tmp_path, max_steps=0)) == 0
    assert not (tmp_path / "head").exists()
    assert not (tmp_path / "checkpoints").exists()


def test_refusals(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        run_train(options(tmp_path / "nothing", tmp_path / "run"))
    with RunLock(tmp_path / "locked"), pytest.raises(SpecdecError, match="another run"):
        run_train(options(data, tmp_path / "locked"))
    with pytest.raises(SpecdecError, match="no folder"):
        run_train(options(data, tmp_path / "run", target="./nowhere"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"taps": (1, 1, 2)}, "--taps must ascend"),
        ({"taps": (4, 1)}, "--taps must ascend"),
        ({"taps": (1, 5)}, "--taps names the output of the last layer"),
        ({"taps": (99,)}, "--taps takes .* to 4 of this target's 6 layers, got 99"),
        ({"device": "nonsense"}, "--device nonsense cannot be used"),
        ({"device": "cuda:99"}, "--device cuda:99 cannot be used"),
        ({"device": "meta"}, "--device meta cannot be used"),
    ],
    ids=repr,
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(
    changes: dict[str, Any], named: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=named):
        run_train(options(data, tmp_path / "run", max_steps=0, **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore::specdec_training.run.checkpoints.CheckpointWarning")
@pytest.mark.parametrize("lost", ["damaged", "deleted", "and no metrics", "and bad metrics"])
def test_a_run_without_its_checkpoints_is_not_overwritten(
    lost: str, data: Path, trained: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    for checkpoint in (folder / "checkpoints").iterdir():
        if lost == "damaged":
            (checkpoint / "state.json").write_bytes(b"{}")
        else:
            shutil.rmtree(checkpoint)
    if lost == "and no metrics":
        (folder / "metrics.json").unlink()
    elif lost == "and bad metrics":
        (folder / "metrics.json").write_text('{"history": [{"step": 1e999}]}')
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="no checkpoint of it can be used"):
        run_train(options(data, folder))
    del before[folder / "run.lock"]
    assert before == {path: path.read_bytes() for path in before}


def test_a_run_without_measurements_is_not_overwritten_either(data: Path, tmp_path: Path) -> None:
    assert run_train(options(data, tmp_path / "run", steps=2, eval_every=0)) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ConfigError, match="no checkpoint of it can be used"):
        run_train(options(data, tmp_path / "run", steps=2, eval_every=0))


def test_a_run_that_was_killed_before_its_first_checkpoint_may_start_again(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)  # with a head and metrics of a later step
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints" / ".tmp-12-1").mkdir(parents=True)
    (folder / "saved.json").unlink()
    (folder / "log.jsonl").write_text('{"step": 1, "losses": [9.2]}\n{"ste')
    assert run_train(options(data, folder, steps=2, eval_every=0)) == 0
    assert len((folder / "log.jsonl").read_text().splitlines()) == 2


def test_a_refused_call_leaves_the_provenance(data: Path, trained: Path) -> None:
    before = (trained / "provenance.json").read_bytes()
    with pytest.raises(ConfigError, match=r"--lr: .* before, 1e-05 now"):
        run_train(options(data, trained, lr=1e-5))
    assert (trained / "provenance.json").read_bytes() == before


@pytest.mark.parametrize("kind", ["file", "data", "notes", "here"])
def test_an_output_that_holds_something_else_is_refused(
    kind: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / kind
    if kind == "file":
        output.write_text("x")
    elif kind == "data":
        shutil.copytree(data, output)
    else:
        output.mkdir()
        (output / "log.jsonl").write_text("my own notes")
    if kind == "here":
        monkeypatch.chdir(output)
        output = Path()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"--output|not the log of a run"):
        run_train(options(data, output))
    assert before == {path: path.read_bytes() for path in before}


def test_a_lost_head_is_replaced_with_a_word(data: Path, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    shutil.rmtree(folder / "head")
    (folder / "metrics.json").unlink()
    with pytest.warns(UserWarning, match="the head of step .* was gone"):
        assert run_train(options(data, folder)) == 0
    assert load_head(folder / "head").head is not None
    assert (folder / "metrics.json").read_bytes() == (trained / "metrics.json").read_bytes()
    (folder / "head").rename(folder / ".head.99999.old")  # killed between two names
    assert run_train(options(data, folder)) == 0
    assert load_head(folder / "head").head is not None


def test_a_run_with_other_layers_is_not_gone_on_with(data: Path, tmp_path: Path) -> None:
    """Also where the layers of nobody's choice are others than they were."""
    run = options(data, tmp_path / "run", steps=4, max_steps=2, eval_every=0)
    assert run_train(run) == 0
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    found = store.latest()
    assert found is not None
    assert found.state["facts"]["layers"] == [0, 2, 4]
    parts = {name: found.tensors(name) for name in found.parts}
    for before in ({"layers": [1, 2, 4]}, {}):
        facts = {**found.state["facts"], "layers": None, **before}
        store.save(found.step, parts, {**found.state, "facts": facts})
        with pytest.raises(ConfigError, match=r"layers: .* before, \[0, 2, 4\] now"):
            run_train(replace(run, max_steps=None))


def test_a_checkpoint_of_another_release_is_named(data: Path, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    store.save(3, {"head": {"w": torch.zeros(1)}}, {"options": {}})
    with pytest.raises(ConfigError, match="does not hold what this release saves"):
        run_train(options(data, tmp_path / "run"))


def test_a_head_has_the_shape_of_a_layer() -> None:
    config = AutoConfig.from_pretrained(demo.target_path())
    found = head_config(TrainOptions(), config, 1024)
    assert (found.hidden_size, found.num_key_value_heads, found.head_dim) == (192, 2, 32)
    assert found.rope["rope_theta"] == 10_000.0
    assert found.draft_vocab_size == 1024
