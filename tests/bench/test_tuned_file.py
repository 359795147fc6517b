"""A tuned file sets an augmented model up, or is refused in words."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import specdec
from specdec.artifacts.target_fingerprint import TargetFingerprint
from specdec.cost.tuned_file import TunedChoice, TunedFile, conditions, read_tuned, write_tuned
from specdec.errors import ConfigError

PROMPT = torch.arange(2, 14)[None]


def make_model(layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_model()


def tuned_for(model: Any, **choices: TunedChoice) -> TunedFile:
    found = {int(name.removeprefix("b")): choice for name, choice in choices.items()}
    found = found or {1: TunedChoice("recycling", {"nodes": 5, "top_k": 4}, 1.2, (1.1, 1.0, 1.3))}
    return TunedFile(TargetFingerprint.of(model.config), choices=found, **conditions(model))


@pytest.fixture
def path(model: LlamaForCausalLM, tmp_path: Path) -> Path:
    write_tuned(tmp_path / "tuned.json", tuned_for(model))
    return tmp_path / "tuned.json"


def test_what_is_written_is_read(model: LlamaForCausalLM, tmp_path: Path) -> None:
    tuned = replace(tuned_for(model), details={"batches": {"1": [1.5, None, "x"]}})
    where = tmp_path / "new folder" / "tuned.json"
    write_tuned(where, tuned)
    assert read_tuned(where) == tuned
    assert read_tuned(str(where)) == tuned
    assert [file.name for file in where.parent.iterdir()] == ["tuned.json"]


def test_augment_uses_it_and_the_text_stays(model: LlamaForCausalLM, path: Path) -> None:
    plain = model.generate(PROMPT, max_new_tokens=24, do_sample=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        specdec.augment(model, tuned=path)
    text = model.generate(PROMPT, max_new_tokens=24, do_sample=False)
    stats = specdec.last_stats(model)
    specdec.restore(model)
    assert torch.equal(text, plain)
    assert (stats.method, stats.options) == ("recycling", {"nodes": 5, "top_k": 4})
    with specdec.augmented(model, tuned=str(path)):
        model.generate(PROMPT, max_new_tokens=4, do_sample=False)
        assert specdec.last_stats(model).method == "recycling"
    assert "generate" not in vars(model)


@pytest.mark.parametrize(
    ("rows", "copies", "method"),
    [(1, 1, "suffix"), (3, 1, "suffix"), (4, 1, "recycling"), (9, 1, "none"), (2, 2, "recycling")],
)
def test_each_batch_size_has_its_own_choice(
    model: LlamaForCausalLM, tmp_path: Path, rows: int, copies: int, method: str
) -> None:
    write_tuned(
        tmp_path / "t.json",
        tuned_for(
            model,
            b2=TunedChoice("suffix"),
            b4=TunedChoice("recycling", {"nodes": 3}),
            b8=TunedChoice("none"),
        ),
    )
    with specdec.augmented(model, tuned=tmp_path / "t.json"):
        inputs = PROMPT.expand(rows, -1)
        extra: dict[str, Any] = {"do_sample": False}
        if copies > 1:
            extra = {"do_sample": True, "num_return_sequences": copies}
        model.generate(inputs, max_new_tokens=4, **extra)
        assert specdec.last_stats(model).method == method
        model.generate(inputs=inputs, max_new_tokens=4, **extra)
        assert specdec.last_stats(model).method == method
        model.generate(inputs, max_new_tokens=4, specdec=specdec.SpecConfig("jacobi"), **extra)
        assert specdec.last_stats(model).method == "jacobi"


def test_far_larger_batches_run_plain_and_say_so_once(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    two = TunedChoice("recycling", {"nodes": 3})
    write_tuned(tmp_path / "t.json", tuned_for(model, b1=TunedChoice("suffix"), b2=two))
    plain = model.generate(PROMPT.expand(5, -1), max_new_tokens=4, do_sample=False)
    with specdec.augmented(model, tuned=tmp_path / "t.json"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.generate(PROMPT.expand(4, -1), max_new_tokens=4, do_sample=False)
            assert specdec.last_stats(model).method == "recycling"
            model.generate(PROMPT.expand(5, -1), max_new_tokens=4, do_sample=False,
                           specdec=specdec.SpecConfig("jacobi"))  # fmt: skip
            assert specdec.last_stats(model).method == "jacobi"
        with pytest.warns(UserWarning, match="a batch of 5 is far above 2") as caught:
            text = model.generate(PROMPT.expand(5, -1), max_new_tokens=4, do_sample=False)
        assert caught[0].filename == __file__
        assert torch.equal(text, plain)
        assert specdec.last_stats(model).method == "none"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.generate(PROMPT.expand(64, -1), max_new_tokens=2, do_sample=False)
        assert specdec.last_stats(model).method == "none"
        model.generate(PROMPT, max_new_tokens=4, do_sample=False)
        assert specdec.last_stats(model).method == "suffix"


def test_callbacks_join_it_and_other_options_do_not(model: LlamaForCausalLM, path: Path) -> None:
    seen: list[Any] = []
    with specdec.augmented(model, tuned=path, on_round=seen.append):
        model.generate(PROMPT, max_new_tokens=8, do_sample=False)
    assert seen
    for extra in ({"nodes": 3}, {"budget": 3}, {"top_k": 2}):
        with pytest.raises(ConfigError, match="cannot join tuned="):
            specdec.augment(model, tuned=path, **extra)
    for extra in ({"method": "suffix"}, {"config": specdec.SpecConfig("suffix")}):
        with pytest.raises(ConfigError, match="not both"):
            specdec.augment(model, tuned=path, **extra)
    assert "generate" not in vars(model)


def test_another_target_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"another target.*num_hidden_layers: 2 and 3"):
        specdec.augment(make_model(layers=3), tuned=path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "cuda NVIDIA H200"}, "NVIDIA H200"),
        ({"dtype": "bfloat16"}, "'bfloat16' there, 'float32' here"),
        ({"threads": 64}, "64 threads there"),
    ],
)
def test_other_conditions_are_warned_of(
    model: LlamaForCausalLM, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    write_tuned(tmp_path / "t.json", replace(tuned_for(model), **change))
    with pytest.warns(UserWarning, match=words) as caught:
        specdec.augment(model, tuned=tmp_path / "t.json")
    specdec.restore(model)
    assert caught[0].filename == __file__


def _without(name: str) -> Any:
    return lambda facts: facts.pop(name)


def _with(**values: Any) -> Any:
    return lambda facts: facts.update(values)


def _choice(**values: Any) -> Any:
    return lambda facts: facts["choices"]["1"].update(values)


BREAK = [
    _without("format"), _without("target"), _without("device"), _without("choices"),
    _with(version=2), _with(version=True), _with(format="x"), _with(target=3), _with(target={}),
    _with(device=""), _with(dtype=None), _with(threads=0), _with(threads=1.5), _with(threads=True),
    _with(choices={}), _with(choices=[]), _with(choices={"0": {}}), _with(choices={"-1": {}}),
    _with(choices={"x": {}}), _with(choices={"\u0661": {}}), _with(choices={"9" * 5000: {}}),
    _with(choices={"1": 3}), _with(details=[]),
    _choice(method=None), _choice(method=""), _choice(options=[]), _choice(options={"a": [1]}),
    _choice(options={"a": {}}), _choice(options={"a": float("nan")}),
    _choice(options={"a": "x" * 2000}), _choice(predicted="1"), _choice(predicted=None),
    _choice(predicted=float("inf")), _choice(measured=[1]), _choice(measured=[1, 2, "3"]),
    _choice(measured=1.0),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BREAK)))
def test_broken_files_are_refused(path: Path, number: int) -> None:
    facts = json.loads(path.read_text())
    BREAK[number](facts)
    path.write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match=r"tuned\.json"):
        read_tuned(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"null", b"[" * 100_000])
def test_what_is_no_json_object_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="no tuned file"):
        read_tuned(path)


def test_what_cannot_be_read_or_written_is_refused(path: Path, tmp_path: Path) -> None:
    tuned = read_tuned(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_tuned(tmp_path / "missing.json")
    with pytest.raises(ConfigError, match="cannot read"):
        read_tuned(tmp_path)
    with pytest.raises(ConfigError, match="path of a file"):
        read_tuned(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cannot write"):
        write_tuned(path / "below" / "a file.json", tuned)
    with pytest.raises(ConfigError, match="JSON does not hold"):
        write_tuned(path, replace(tuned, details={"x": object()}))
    assert read_tuned(path) == tuned


def test_unknown_methods_and_options_of_a_file_are_refused(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    for choice in (TunedChoice("telepathy"), TunedChoice("suffix", {"windows": 3}),
                   TunedChoice("suffix", {"max_nodes": "many"}),
                   TunedChoice("eagle3", {"draft": "/nowhere/at/all"})):  # fmt: skip
        write_tuned(tmp_path / "t.json", tuned_for(model, b1=choice))
        with pytest.raises(ConfigError):
            specdec.augment(model, tuned=tmp_path / "t.json")
        assert "generate" not in vars(model)


def test_a_deep_copy_keeps_its_choices(model: LlamaForCausalLM, path: Path) -> None:
    with specdec.augmented(model, tuned=path):
        twin = copy.deepcopy(model)
    twin.generate(PROMPT, max_new_tokens=4, do_sample=False)
    assert specdec.last_stats(twin).method == "recycling"
