"""How `augment` plugs into a model: reversible, per instance, nothing patched, nothing lost."""

from __future__ import annotations

import copy
import io
import json
import pickle  # noqa: TID251 - that a model survives it is what is tested
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor

import specdec
from helpers.hf import fallbacks, left_padded, oracle, plain, prompt, run_both, tiny_llama
from specdec import SpecConfig
from specdec.errors import ConfigError, FallbackWarning, UnsupportedModelError
from specdec.registry import methods

NEW = 12


class Chunks:
    """A streamer that remembers what it was given."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.values.append(value.clone())

    def end(self) -> None:
        self.ended += 1


def test_augment_returns_the_model_and_sets_one_instance_attribute() -> None:
    model = tiny_llama()
    attributes, sample = set(vars(model)), type(model)._sample
    whole = type(model).generate
    assert specdec.augment(model, "prompt_lookup") is model
    assert set(vars(model)) - attributes == {"generate", "_specdec"}
    assert type(model)._sample is sample
    assert type(model).generate is whole is GenerationMixin.generate
    assert "generate" not in vars(tiny_llama()), "another instance of the class is untouched"


def test_restore_gives_the_class_method_back() -> None:
    model = specdec.augment(tiny_llama(), "prompt_lookup")
    assert specdec.restore(model) is model
    assert "generate" not in vars(model)
    assert "_specdec" not in vars(model)
    assert model.generate.__func__ is type(model).generate
    with pytest.raises(ConfigError, match="augment"):
        specdec.last_stats(model)


def test_restore_of_a_model_that_was_never_augmented_changes_nothing() -> None:
    model = tiny_llama()
    before = dict(vars(model))
    assert specdec.restore(model) is model
    assert vars(model) == before
    model.generate = "somebody else's"
    specdec.restore(model)
    assert model.generate == "somebody else's"


def test_augmented_nests_and_survives_exceptions() -> None:
    model, ids = tiny_llama(), prompt()
    with specdec.augmented(model, "prompt_lookup"):
        with specdec.augmented(model, "lookahead", window=3, ngram=3, guesses=3) as inner:
            assert inner is model
            model.generate(ids, max_new_tokens=4)
            assert specdec.last_stats(model).method == "lookahead"
        model.generate(ids, max_new_tokens=4)
        assert specdec.last_stats(model).method == "prompt_lookup"
        with pytest.raises(KeyError), specdec.augmented(model, "none"):
            raise KeyError("the block fails")
        model.generate(ids, max_new_tokens=4)
        assert specdec.last_stats(model).method == "prompt_lookup"
    assert "generate" not in vars(model)
    assert model.generate.__func__ is type(model).generate


def test_augmenting_twice_keeps_the_last_setting() -> None:
    model = specdec.augment(specdec.augment(tiny_llama(), "prompt_lookup"), "none")
    model.generate(prompt(), max_new_tokens=4)
    assert specdec.last_stats(model).method == "none"
    specdec.restore(model)
    assert "generate" not in vars(model)


def test_a_bad_second_augment_leaves_the_first_in_place(llama: Any) -> None:
    with pytest.raises(ConfigError, match="unknown method"):
        specdec.augment(llama, "no such method")
    llama.generate(prompt(), max_new_tokens=4)
    assert specdec.last_stats(llama).method == "prompt_lookup"


def test_per_call_false_runs_plain(llama: Any) -> None:
    llama.generate(prompt(), max_new_tokens=4)
    stats = specdec.last_stats(llama)
    with fallbacks() as texts:
        got = llama.generate(prompt(), max_new_tokens=NEW, specdec=False)
    assert torch.equal(got, plain(llama, prompt(), max_new_tokens=NEW))
    assert not texts
    assert specdec.last_stats(llama) is stats


def test_per_call_config_replaces_or_completes_the_default(llama: Any) -> None:
    expected = plain(llama, prompt(), max_new_tokens=NEW)
    seen: list[int] = []
    settings = SpecConfig(budget=2, on_round=lambda record: seen.append(record.nodes))
    assert torch.equal(llama.generate(prompt(), max_new_tokens=NEW, specdec=settings), expected)
    assert specdec.last_stats(llama).method == "prompt_lookup"
    assert max(seen) <= 3
    settings = oracle(expected, prompt().shape[1])
    assert torch.equal(llama.generate(prompt(), max_new_tokens=NEW, specdec=settings), expected)
    assert specdec.last_stats(llama).rounds < NEW - 2
    llama.generate(prompt(), max_new_tokens=NEW)
    assert specdec.last_stats(llama).method == "prompt_lookup"


def test_streamer_is_not_lost(llama: Any) -> None:
    streamers = [Chunks(), Chunks()]
    made = iter(streamers)
    both = run_both(llama, lambda: {"streamer": next(made)}, input_ids=prompt(), max_new_tokens=NEW)
    theirs, ours = streamers
    assert ours.ended == theirs.ended == 1
    assert [value.tolist() for value in ours.values] == [value.tolist() for value in theirs.values]
    assert torch.cat([value.flatten() for value in ours.values]).tolist() == both.ours[0].tolist()


def test_user_keywords_are_not_stolen(llama: Any) -> None:
    both = run_both(llama, **left_padded(), max_new_tokens=NEW)
    assert both.stats.mode == "tree"
    run_both(llama, **left_padded(), max_new_tokens=NEW, use_cache=True, logits_to_keep=1)


def test_attention_mask_may_be_absent_all_ones_or_none(llama: Any) -> None:
    ids = prompt()
    for mask in ({}, {"attention_mask": torch.ones_like(ids)}, {"attention_mask": None}):
        run_both(llama, input_ids=ids, max_new_tokens=NEW, **mask)
    run_both(llama, input_ids=ids, max_new_tokens=NEW, attention_mask=torch.ones(1, 9).bool())


def test_positional_arguments(llama: Any) -> None:
    ids = prompt()
    config = GenerationConfig(max_new_tokens=NEW, do_sample=True, top_k=5, pad_token_id=0)

    class Shift(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores + input_ids.shape[1] % 3 * torch.arange(scores.shape[1])

    arguments = (ids, config, transformers.LogitsProcessorList([Shift()]))
    torch.manual_seed(5)
    expected = plain(llama, *arguments)
    torch.manual_seed(5)
    assert torch.equal(llama.generate(*arguments), expected)
    assert specdec.last_stats(llama).mode == "tree"


@pytest.mark.parametrize("arguments", [
    {"generation_config": GenerationConfig(max_new_tokens=NEW, pad_token_id=0)},
    {"generation_config": GenerationConfig(max_length=20, pad_token_id=0)},
    {"max_length": 21},
    {"max_new_tokens": 1},
    {"max_new_tokens": 2},
    {"max_length": 16, "min_length": 14, "eos_token_id": [5, 6, 7, 8, 9, 10, 11]},
])  # fmt: skip
def test_lengths_and_generation_config_objects(llama: Any, arguments: dict[str, Any]) -> None:
    config = arguments.get("generation_config")
    before = copy.deepcopy(config)
    run_both(llama, input_ids=prompt(), **arguments)
    assert before is None or config.to_dict() == before.to_dict(), "the user's object was changed"


def test_inputs_keyword(llama: Any) -> None:
    run_both(llama, inputs=prompt(), max_new_tokens=NEW)


def test_deepcopy_drives_the_copy() -> None:
    model = specdec.augment(tiny_llama(), "prompt_lookup")
    before = model.generate(prompt(), max_new_tokens=NEW)
    twin = copy.deepcopy(model)
    assert twin.generate.__self__ is twin
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    assert torch.equal(twin.generate(prompt(), max_new_tokens=NEW), before)
    assert not torch.equal(model.generate(prompt(), max_new_tokens=NEW), before)
    specdec.restore(twin)
    model.generate(prompt(), max_new_tokens=4)
    assert specdec.last_stats(model).new_tokens == 4


def test_pickle_and_torch_save() -> None:
    model = specdec.augment(tiny_llama(), "prompt_lookup")
    expected = model.generate(prompt(), max_new_tokens=NEW)
    twin = pickle.loads(pickle.dumps(model))  # noqa: S301
    assert torch.equal(twin.generate(prompt(), max_new_tokens=NEW), expected)
    specdec.augment(twin, "prompt_lookup")
    assert torch.equal(twin.generate(prompt(), max_new_tokens=NEW), expected)
    assert specdec.last_stats(twin).mode == "tree"
    torch.save(model, io.BytesIO())


def test_save_pretrained_round_trip(tmp_path: Any) -> None:
    model = specdec.augment(tiny_llama(torch.float32), "prompt_lookup")
    expected = model.generate(prompt(), max_new_tokens=NEW)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert not [key for key in saved if "specdec" in key]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "generate" not in vars(loaded)
    assert torch.equal(loaded.generate(prompt(), max_new_tokens=NEW), expected)
    specdec.augment(loaded, "prompt_lookup")
    assert torch.equal(loaded.generate(prompt(), max_new_tokens=NEW), expected)


@pytest.mark.parametrize("method", ["prompt_lookup", None])
def test_training_state_and_generator_are_left_alone(method: str | None) -> None:
    model = tiny_llama(attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()  # a part that the user froze
    modes = [module.training for module in model.modules()]
    state, gradients = torch.get_rng_state(), [p.requires_grad for p in model.parameters()]
    specdec.augment(model, method)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.requires_grad for p in model.parameters()] == gradients
    assert all(p.grad is None for p in model.parameters())


def test_default_method_and_config_object() -> None:
    model = specdec.augment(tiny_llama())
    expected = plain(model, prompt(), max_new_tokens=NEW)
    assert torch.equal(model.generate(prompt(), max_new_tokens=NEW), expected)
    assert specdec.last_stats(model).method in {"none", "lookahead"}
    specdec.augment(model, config=SpecConfig("lookahead", {"window": 2, "ngram": 3, "guesses": 2}))
    assert torch.equal(model.generate(prompt(), max_new_tokens=NEW), expected)


@pytest.mark.parametrize(("arguments", "options", "message"), [
    (("nonsense",), {}, r"unknown method 'nonsense'; choose one of none, lookahead"),
    (("prompt_lookup",), {"depth": 3}, r"'prompt_lookup' has no option 'depth'; it has max_ngram"),
    (("none",), {"depth": 3}, r"'none' has no option 'depth'; it has none"),
    (("prompt_lookup",), {"max_ngram": 0}, r"max_ngram must be .* from 1 to 64, got 0"),
    (("prompt_lookup",), {"max_ngram": 2, "min_ngram": 3}, r"at most max_ngram, got 3 and 2"),
    (("prompt_lookup",), {"num_draft_tokens": 0}, r"must be .* from 1 to 4,096, got 0"),
    (("lookahead",), {"ngram": 1}, r"ngram must be .* from 2 to 4,096, got 1"),
    (("lookahead",), {"window": -1}, r"window must be .* from 0 to 4,096, got -1"),
    (("prompt_lookup",), {"budget": -1}, r"budget must be an integer >= 0, got -1"),
    (("prompt_lookup",), {"budget": 2.5}, r"budget must be an integer >= 0, got 2.5"),
    ((), {"window": 3}, r"option 'window' needs a method"),
    (("none",), {"config": SpecConfig("none")}, r"either config= or a method"),
])  # fmt: skip
def test_bad_options(arguments: Any, options: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    with pytest.raises(ConfigError, match=message):
        specdec.augment(model, *arguments, **options)
    assert "generate" not in vars(model)


def test_bad_per_call_options(llama: Any) -> None:
    with pytest.raises(ConfigError, match="unknown method"):
        llama.generate(prompt(), max_new_tokens=4, specdec=SpecConfig("nonsense"))
    with pytest.raises(ConfigError, match="specdec="):
        llama.generate(prompt(), max_new_tokens=4, specdec="prompt_lookup")
    assert llama.generate(prompt(), max_new_tokens=4).shape[1] == 13


def test_last_stats_before_the_first_call() -> None:
    with pytest.raises(ConfigError, match="no statistics yet"):
        specdec.last_stats(specdec.augment(tiny_llama(), "none"))
    with pytest.raises(ConfigError, match="no statistics yet"):
        specdec.last_stats(tiny_llama())


def _t5() -> Any:
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    return transformers.T5ForConditionalGeneration(config)


def _headless() -> Any:
    return tiny_llama().model


def _classifier() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForSequenceClassification(config)


@pytest.mark.parametrize(("build", "message"), [
    (_t5, "T5ForConditionalGeneration is an encoder-decoder model"),
    (_headless, "LlamaModel.*AutoModelForCausalLM"),
    (_classifier, "LlamaForSequenceClassification.*AutoModelForCausalLM"),
    (lambda: torch.compile(tiny_llama()), "augment the model first, then compile it"),
    (lambda: torch.nn.Linear(2, 2), "Linear is not a Hugging Face model"),
    (lambda: "meta-llama", "str is not a Hugging Face model"),
])  # fmt: skip
def test_unsupported_models(build: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        specdec.augment(build(), "prompt_lookup")


def test_model_that_fails_the_self_test_runs_plain_with_one_warning() -> None:
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)
    model = specdec.augment(transformers.MambaForCausalLM(config).eval(), "prompt_lookup")
    expected = plain(model, prompt(), max_new_tokens=6)
    with pytest.warns(FallbackWarning, match="plain generate, because its"):
        got = model.generate(prompt(), max_new_tokens=6)
    assert torch.equal(got, expected)
    assert specdec.last_stats(model).mode == "plain"


def test_a_drafter_that_is_named_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As module:Class, from the working directory, with one option and state of its own."""
    (tmp_path / "own_drafters.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import Annotated\n"
        "from specdec import RowDrafter, TokenTree, register_drafter\n"
        "from specdec.drafters.row import DraftRow\n"
        "from specdec.method_options import MethodOptions, Range\n"
        "@dataclass(frozen=True)\n"
        "class Options(MethodOptions):\n"
        "    length: Annotated[int, Range(1, 8)] = 4\n"
        "@register_drafter('parrot_of_seam_tests')\n"
        "class Parrot(RowDrafter):\n"
        "    Config = Options\n"
        "    class Row(DraftRow):\n"
        "        def propose(self, budget):\n"
        "            ahead = self.text[-self.config.length :][:budget]\n"
        "            return TokenTree.chain(self.text[-1], ahead)\n"
    )
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    expected = plain(model, prompt(), max_new_tokens=NEW)
    for name in ("own_drafters:Parrot", "parrot_of_seam_tests"):
        specdec.augment(model, name, length=2)
        assert torch.equal(model.generate(prompt(), max_new_tokens=NEW), expected)
        assert specdec.last_stats(model).method == name
        assert specdec.last_stats(model).drafted_nodes > NEW
        with pytest.raises(ConfigError, match="length must be a whole number from 1 to 8, got 9"):
            specdec.augment(model, name, length=9)
    for wrong in ("own_drafters:Missing", "no_such_module:Parrot"):
        with pytest.raises(ConfigError, match=f"method '{wrong}'"):
            specdec.augment(model, wrong)
    methods.unregister("parrot_of_seam_tests")
    assert "own_drafters:Parrot" not in methods.names()
