"""A model that changes under its augmentation: modes, modules, hooks and adapters, and chance."""

from __future__ import annotations

import copy
import pickle  # noqa: TID251 - that a model survives it is what is tested
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import specdec
from helpers.hf import VOCAB, fallbacks, prompt, tiny_llama
from specdec import SpecConfig
from specdec.api import capability
from specdec.errors import ConfigError, FallbackWarning
from specdec.targets import watched_test
from specdec.targets.model_state import ModelState
from specdec.targets.prompts import Taps

NEW = 24
MODES: tuple[dict[str, Any], ...] = ({"do_sample": False}, {"do_sample": True, "temperature": 1.3})


def augmented(**changes: Any) -> Any:
    return specdec.augment(tiny_llama(**changes), "prompt_lookup")


def texts(model: Any, **more: Any) -> list[str]:
    """Compares greedy and sampled calls with plain ones, ids and generators; the warnings."""
    found: list[str] = []
    for mode in MODES:
        outcomes = []
        for how in ({"specdec": False}, {}):
            torch.manual_seed(3)
            random.seed(3)
            np.random.seed(3)
            with fallbacks() as warned:
                ids = model.generate(prompt(), max_new_tokens=NEW, **mode, **how, **more)
            outcomes.append((ids.tolist(), torch.get_rng_state().tolist(), random.getstate()))
            found += warned
        assert outcomes[0] == outcomes[1]
    return found


def mode_of(model: Any) -> str:
    return specdec.last_stats(model).mode


class Around(nn.Module):
    """Runs what it is given over the output of a module."""

    def __init__(self, inner: nn.Module, change: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.change = inner, [change]
        self.on = True

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.inner(hidden)
        return self.change[0](self, out) if self.on else out


def around(change: Callable[[Any, Tensor], Tensor]) -> Callable[[Any], None]:
    def plant(model: Any) -> None:
        mlp = model.model.layers[0].mlp
        mlp.down_proj = Around(mlp.down_proj, change)

    return plant


def behind(module: nn.Module) -> Callable[[Any], None]:
    """Plants a module behind one of the model's own."""

    def plant(model: Any) -> None:
        mlp = model.model.layers[0].mlp
        mlp.down_proj = nn.Sequential(mlp.down_proj, copy.deepcopy(module))

    return plant


class Quieter(nn.Dropout):
    """A subclass with another name for it."""


class StochasticDepth(nn.Module):
    """Foreign: drops whole rows."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, hidden: Tensor) -> Tensor:
        kept = torch.rand(len(hidden), 1, 1) >= self.rate if self.training else 1
        return hidden * kept


class RunningMean(nn.Module):
    """Takes off the mean of what it has seen in training mode, as batch normalisation does."""

    track_running_stats = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(32, dtype=torch.float64))

    def forward(self, hidden: Tensor) -> Tensor:
        if self.training:
            self.running_mean += 0.1 * (hidden.mean((0, 1)) - self.running_mean)
        return hidden - self.running_mean


def lora(model: Any, **more: Any) -> Any:
    """The model with adapters that do something, and dropout in front of them."""
    peft = pytest.importorskip("peft")
    options = {"r": 4, "lora_alpha": 32, "lora_dropout": 0.4, "target_modules": ["q_proj"], **more}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.3)
    return wrapped


def set_attention_dropout(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3


def skipped_layers(draw: Callable[[], float]) -> Callable[[Any], None]:
    """A layer is left out by chance in training mode, as LayerDrop does."""
    return around(lambda own, out: out * float(draw() > 0.5) if own.training else out)


TRAINING: dict[str, tuple[Callable[[Any], Any], str]] = {
    "dropout": (behind(nn.Dropout(0.3)), r"mlp.down_proj.1 \(Dropout\) is random, with p=0.3"),
    "a subclass": (behind(Quieter(0.3)), r"\(Quieter\) is random, with p=0.3"),
    "alpha dropout": (behind(nn.AlphaDropout(0.2)), r"\(AlphaDropout\)"),
    "a foreign class": (behind(StochasticDepth(0.4)), r"\(StochasticDepth\)|draws random numbers"),
    "a function": (
        around(lambda own, out: nn.functional.dropout(out, 0.3, own.training)),
        "draws random numbers from torch's generator in training mode",
    ),
    "attention": (set_attention_dropout, r"\(LlamaAttention\) is random, with attention_dropout"),
    "layers left out": (skipped_layers(random.random), "from Python's random in training mode"),
    "layers left out by numpy": (skipped_layers(np.random.random), "from numpy.random"),
    "checkpointing": (lambda model: model.gradient_checkpointing_enable(), "checkpointing"),
    "statistics": (behind(RunningMean()), "updates its running statistics"),
    "another forward": (
        around(lambda own, out: out * (2 if own.training else 1)),
        "its forward in training mode is not that of eval mode",
    ),
}


@pytest.mark.parametrize("kind", TRAINING)
@pytest.mark.parametrize("late", [False, True])
def test_chance_in_training_mode(kind: str, late: bool) -> None:
    plant, why = TRAINING[kind]
    model = tiny_llama()
    if late:
        specdec.augment(model, "prompt_lookup")
    plant(model)
    model.train()
    if not late:
        specdec.augment(model, "prompt_lookup")
    with pytest.warns(FallbackWarning, match=why):
        model.generate(prompt(), max_new_tokens=4)
    assert mode_of(model) == "plain"
    if kind != "statistics":  # every call changes them
        texts(model)
        assert mode_of(model) == "plain"
    model.eval()
    assert texts(model) == []
    assert mode_of(model) == "tree"


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_of_adapters(dora: bool) -> None:
    model = specdec.augment(lora(tiny_llama(torch.float32), use_dora=dora), "prompt_lookup")
    model.train()
    assert any("lora_dropout" in text for text in texts(model))
    assert mode_of(model) == "plain"
    with model.disable_adapter():  # nothing is dropped where nothing is added
        assert texts(model) == []
        assert mode_of(model) == "tree"
    texts(model)
    assert mode_of(model) == "plain"
    model.eval()
    assert texts(model) == []
    assert mode_of(model) == "tree"


def test_jitter_of_a_router() -> None:
    config = transformers.MixtralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, router_jitter_noise=0.3,
        max_position_embeddings=256, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = specdec.augment(transformers.MixtralForCausalLM(config), "prompt_lookup")
    model.generation_config.pad_token_id = 0
    model.train()
    assert any("jitter" in text for text in texts(model))
    assert mode_of(model) == "plain"


NOISY = {
    "noise": lambda own, out: out + 0.05 * torch.randn_like(out),
    "dropout for good": lambda own, out: nn.functional.dropout(out, 0.2, training=True),
    "noise of numpy": lambda own, out: out * np.random.uniform(0.9, 1.1),
}


@pytest.mark.parametrize("kind", NOISY)
@pytest.mark.parametrize("late", [False, True])
def test_chance_in_eval_mode(kind: str, late: bool) -> None:
    model = tiny_llama()
    if late:
        specdec.augment(model, "prompt_lookup")
    around(NOISY[kind])(model)
    if not late:
        specdec.augment(model, "prompt_lookup")
    assert len(texts(model)) == len(MODES)
    assert mode_of(model) == "plain"
    assert "in eval mode" in specdec.last_stats(model).mode_reason
    model.model.layers[0].mlp.down_proj.on = False
    assert texts(model) == []
    assert mode_of(model) == "tree"


def test_chance_from_a_generator_of_its_own() -> None:
    """No generator of the user's moves; the logits do."""
    own = torch.Generator().manual_seed(0)
    model = augmented()
    around(lambda _, out: out + torch.randn(out.shape, generator=own, dtype=out.dtype))(model)
    with pytest.warns(FallbackWarning, match="other logits for the same tokens each time"):
        model.generate(prompt(), max_new_tokens=4)


HARMLESS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda model: None,
    "dropout of nothing": behind(nn.Dropout(0.0)),
    "dropout that stays in eval mode": behind(nn.Dropout(0.5)),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_training_mode_without_chance_speculates(kind: str) -> None:
    model = augmented()
    HARMLESS[kind](model)
    model.train()
    for module in model.modules():
        if kind == "dropout that stays in eval mode" and isinstance(module, nn.Dropout):
            module.eval()
    assert texts(model) == []
    assert mode_of(model) == "tree"


def test_a_configuration_is_not_asked() -> None:
    """It may speak of dropout that somebody switched off, as trainers do."""
    model = augmented(attention_dropout=0.3)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    model.train()
    assert texts(model) == []
    assert mode_of(model) == "tree"


def test_the_trial_moves_no_generator() -> None:
    model = tiny_llama()
    around(NOISY["noise"])(model)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    specdec.augment(model, "prompt_lookup")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


# The self-test follows the model


def coupled(hidden: Tensor) -> Tensor:
    """One scale for all tokens of a forward, as in-place quantisers have it."""
    scale = hidden.abs().max() / 7
    return (hidden / scale).round() * scale


def hook(model: Any) -> Callable[[], None]:
    handle = model.model.layers[0].register_forward_hook(lambda m, i, out: coupled(out))
    return handle.remove  # type: ignore[no-any-return]


def pre_hook(model: Any) -> Callable[[], None]:
    down = model.model.layers[1].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda m, inputs: (coupled(inputs[0]),))
    return handle.remove  # type: ignore[no-any-return]


def replaced_module(model: Any) -> Callable[[], None]:
    mlp = model.model.layers[0].mlp
    before = mlp.down_proj
    mlp.down_proj = Around(before, lambda own, out: coupled(out))
    return lambda: setattr(mlp, "down_proj", before)


def replaced_forward(model: Any) -> Callable[[], None]:
    mlp = model.model.layers[0].mlp
    whole = type(mlp).forward
    mlp.forward = lambda hidden: coupled(whole(mlp, hidden))
    return lambda: delattr(mlp, "forward")


def replaced_function(model: Any) -> Callable[[], None]:
    mlp = model.model.layers[0].mlp
    before = mlp.act_fn
    del mlp.act_fn
    mlp.act_fn = lambda hidden: coupled(before(hidden))

    def undo() -> None:
        del mlp.act_fn
        mlp.act_fn = before

    return undo


def patched_class(model: Any) -> Callable[[], None]:
    kind = type(model.model.layers[0].mlp)
    before = kind.forward
    kind.forward = lambda self, hidden: coupled(before(self, hidden))
    return lambda: setattr(kind, "forward", before)


def global_hook(model: Any) -> Callable[[], None]:
    def couple(module: nn.Module, inputs: Any, out: Any) -> Any:
        return coupled(out) if isinstance(module, type(model.model.layers[0].mlp)) else out

    handle = nn.modules.module.register_module_forward_hook(couple)
    return handle.remove  # type: ignore[no-any-return]


CHANGES: dict[str, Callable[[Any], Callable[[], None]]] = {
    "hook": hook,
    "pre-hook": pre_hook,
    "module": replaced_module,
    "forward": replaced_forward,
    "activation": replaced_function,
    "class": patched_class,
    "hook on every module": global_hook,
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_is_tested_before_the_next_call(kind: str) -> None:
    model = augmented()
    assert texts(model) == []
    undo = CHANGES[kind](model)
    try:
        assert len(texts(model)) == len(MODES)
        assert mode_of(model) == capability(model).mode == "plain"
    finally:
        undo()
    assert texts(model) == []
    assert mode_of(model) == capability(model).mode == "tree"


@pytest.fixture
def tests_run(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every self-test that is run."""
    found: list[Any] = []
    real = watched_test.self_test

    def counted(model: Any) -> Any:
        found.append(model)
        return real(model)

    monkeypatch.setattr(watched_test, "self_test", counted)
    return found


def run(model: Any) -> None:
    model.generate(prompt(), max_new_tokens=3)


RETESTED: dict[str, Callable[[Any], Any]] = {
    "dtype": lambda model: model.to(torch.float32),
    "half": lambda model: model.half(),
    "a part in another dtype": lambda model: (
        model.lm_head.to(torch.float32).to(torch.float64)
        and model.model.layers[0].mlp.up_proj.to(torch.float32)
    ),
    "attention": lambda model: model.set_attn_implementation("eager"),
    "window": lambda model: setattr(model.config, "sliding_window", 4),
    "rope": lambda model: model.config.rope_parameters.update(rope_theta=77.0),
    "layer types": lambda model: setattr(model.config, "layer_types", ["full_attention"] * 2),
    "a number of a layer": lambda model: setattr(model.model.layers[1].self_attn, "scaling", 0.5),
    "training mode": lambda model: model.train(),
    "training mode of a part": lambda model: model.model.layers[1].train(),
    "a layer less": lambda model: model.model.layers.__delitem__(1),
    "inputs": lambda model: setattr(
        model, "prepare_inputs_for_generation", copy.copy(model.prepare_inputs_for_generation)
    ),
}


@pytest.mark.parametrize("kind", RETESTED)
def test_what_is_tested_again(kind: str, tests_run: list[Any]) -> None:
    model = augmented()
    run(model)
    assert len(tests_run) == 1
    RETESTED[kind](model)
    try:
        run(model)
    except RuntimeError:
        assert "dtype" in kind  # nothing runs, plain generate neither
    assert len(tests_run) == 2


def test_adapters_are_tested_as_they_come_and_go(tests_run: list[Any]) -> None:
    model = lora(tiny_llama(torch.float32), lora_dropout=0.0)
    specdec.augment(model, "prompt_lookup")
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    assert texts(model) == []
    assert len(tests_run) == 2
    model.set_adapter("other")
    assert texts(model) == []
    assert len(tests_run) == 3
    with model.disable_adapter():
        assert texts(model) == []
    assert len(tests_run) == 4
    assert texts(model) == []  # as before: known
    assert len(tests_run) == 4
    model.merge_adapter()
    assert texts(model) == []
    assert len(tests_run) == 5
    model.unmerge_adapter()
    assert texts(model) == []
    assert len(tests_run) == 5


def test_what_is_not_tested_again(tests_run: list[Any]) -> None:
    """Calls, weights, gradients, and going back to what is known."""
    model = augmented()
    for _ in range(2):
        texts(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    model(prompt(), labels=prompt()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.requires_grad_(False)
    model(prompt(), output_hidden_states=True)  # transformers leaves its own hooks on the model
    texts(model)
    assert len(tests_run) == 1
    for _ in range(3):
        model.train()
        run(model)
        model.eval()
        run(model)
    assert len(tests_run) == 2
    twin = copy.deepcopy(model)
    run(twin)
    assert len(tests_run) == 2
    assert twin._specdec is not model._specdec


def test_a_module_that_counts_is_not_tested_for_ever(tests_run: list[Any]) -> None:
    """Values that running changes, and values that somebody sets before every call."""
    model = augmented()

    def count(own: Any, out: Tensor) -> Tensor:
        own.calls = getattr(own, "calls", 0) + 1
        return out

    around(count)(model)
    run(model)
    known = len(tests_run)
    for step in range(8):
        model.model.step = step
        run(model)
    assert len(tests_run) <= known + 4
    run(model)
    assert len(tests_run) <= known + 4


def test_a_pickled_model_is_tested_anew(tests_run: list[Any]) -> None:
    model = augmented()
    revived = pickle.loads(pickle.dumps(model._specdec.test))  # noqa: S301
    assert revived.verdict(model).mode == "tree"
    assert len(tests_run) == 2


def test_hooks_of_a_call_are_not_the_models(tests_run: list[Any]) -> None:
    """Another thread's call may have its hook on the model at this moment."""
    model = augmented()
    before = ModelState.of(model)
    with Taps((), model.config).collected(model):
        assert ModelState.of(model).same_as(before)
        run(model)
    assert len(tests_run) == 1


def test_a_draft_model_is_watched_too(tests_run: list[Any]) -> None:
    draft = tiny_llama()
    model = specdec.augment(tiny_llama(), "draft_model", draft=draft)
    texts(model)
    assert tests_run == [model, draft]
    draft.train()  # it drafts in eval mode
    texts(model)
    assert tests_run == [model, draft]
    undo = replaced_module(draft)
    with pytest.raises(ConfigError, match=r"cannot draft, because .*change a token's"):
        run(model)
    undo()
    texts(model)
    assert len(tests_run) == 3


def test_a_draft_model_that_draws_is_refused(tests_run: list[Any]) -> None:
    """Its draws would come between those of the target."""
    draft = tiny_llama()
    model = specdec.augment(tiny_llama(), "draft_model", draft=draft)
    around(NOISY["noise"])(draft)
    with pytest.raises(ConfigError, match="cannot draft, because its forward draws random"):
        run(model)


@pytest.fixture(autouse=True)
def _own_seeds() -> Iterator[None]:
    """The tests move every generator."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    yield
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])


def test_a_setting_of_a_call_needs_no_test(tests_run: list[Any]) -> None:
    model = augmented()
    model.generate(prompt(), max_new_tokens=3, specdec=SpecConfig("lookahead"))
    assert len(tests_run) == 1
