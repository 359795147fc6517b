"""Fused tree attention inside `generate`: settings, caches, threads, devices, odd models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import specdec
from helpers.families import CHAIN_FAMILIES
from helpers.hf import (
    fallbacks,
    left_padded,
    oracle,
    plain,
    prompt,
    run_both,
    tiny_gemma3,
    tiny_gpt2,
    tiny_llama,
)
from hf import test_caches, test_static_cache, test_threads
from hf.test_wrappers import FlashLike, flash  # noqa: F401 - a fixture
from specdec import SpecConfig
from specdec.api import capability
from specdec.errors import ConfigError, UnsupportedModelError
from specdec.hf import attention
from specdec.hf.compat import MaskKinds
from specdec.targets import attention_choice, tree_attention
from specdec.targets.attention_choice import wanted_backend
from specdec_kernels.dispatch import VARIABLE, interpreting

hurried = test_threads.hurried  # a fixture
NEW = 16
CPU = torch.device("cpu")
WITH = "verified a token tree with tree attention (reference)"


def _steeper(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
    return sdpa_attention_forward(module, q * 1.5, k, v, mask, **kwargs)


STEEPER = "specdec_test_steeper"
AttentionInterface.register(STEEPER, _steeper)
AttentionMaskInterface.register(STEEPER, sdpa_mask)


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that leave it to the library run on the reference."""
    monkeypatch.setenv(VARIABLE, "reference")


def reason(model: Any) -> str:
    return specdec.last_stats(model).mode_reason


# Settings


def test_what_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wanted_backend("auto", CPU) == "reference"
    monkeypatch.delenv(VARIABLE)
    assert wanted_backend("auto", CPU) is None
    assert wanted_backend("off", CPU) is None
    assert wanted_backend("reference", CPU) == "reference"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert wanted_backend("auto", torch.device("cuda")) == "triton"
    assert wanted_backend("off", torch.device("cuda")) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert wanted_backend("auto", torch.device("cuda")) is None


@pytest.mark.skipif(interpreting(), reason="Triton runs on a CPU in this process")
def test_triton_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"kernels='triton' cannot run on cpu: Triton "):
        specdec.augment(tiny_llama(), "prompt_lookup", kernels="triton")
    model = specdec.augment(tiny_llama(), "prompt_lookup")
    with pytest.raises(ConfigError, match="kernels='triton' cannot run on cpu"):
        model.generate(prompt(), specdec=SpecConfig("prompt_lookup", kernels="triton"))


def test_a_wrong_override_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(ConfigError, match=f"{VARIABLE} must be .* got 'cuda'"):
        specdec.augment(tiny_llama(), "prompt_lookup")


@pytest.mark.parametrize("wrong", ["Triton", "", None, True, 1, ["off"]])
def test_wrong_settings_are_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"kernels must be .* got"):
        SpecConfig(kernels=wrong)


def test_per_model_and_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    tests: list[Any] = []
    probe = attention_choice.probe_attention
    monkeypatch.setattr(
        attention_choice, "probe_attention", lambda *a: tests.append(a) or probe(*a)
    )
    model = specdec.augment(tiny_llama(), "prompt_lookup", kernels="reference")
    assert WITH in capability(model).reason
    for config, expected in (
        (None, True),
        (SpecConfig("prompt_lookup"), False),
        (SpecConfig("prompt_lookup", kernels="off"), False),
        (SpecConfig("none", kernels="reference"), True),
        (None, True),
    ):
        model.generate(prompt(), max_new_tokens=4, specdec=config)
        assert (WITH in reason(model)) == expected
    assert len(tests) == 1, "it is tested once"


def test_chain_models_do_not_notice() -> None:
    model = specdec.augment(CHAIN_FAMILIES["lfm2"].build(torch.float32), "prompt_lookup")
    found = capability(model)
    assert (found.mode, found.backend, found.attention) == ("chain", None, {})
    assert "attention" not in found.reason


# Calls of every kind


@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma3, tiny_gpt2])
def test_calls_of_every_kind(build: Callable[[], Any]) -> None:
    model = specdec.augment(build(), "prompt_lookup")
    run_both(model, input_ids=prompt(), max_new_tokens=NEW)
    assert WITH in reason(model)
    run_both(model, **left_padded(), max_new_tokens=NEW, do_sample=True, top_k=0)
    run_both(model, input_ids=prompt(), max_new_tokens=NEW, num_return_sequences=2, do_sample=True)
    run_both(model, input_ids=prompt(), max_new_tokens=NEW, prefill_chunk_size=4)
    wanted = {"return_dict_in_generate": True, "output_hidden_states": True, "output_scores": True}
    both = run_both(model, input_ids=prompt(), max_new_tokens=NEW, **wanted)
    for mine, other in zip(both.ours.hidden_states, both.plain.hidden_states, strict=True):
        for layer, theirs in zip(mine, other, strict=True):
            torch.testing.assert_close(layer, theirs, atol=1e-10, rtol=0)
    embeds = model.get_input_embeddings()(prompt()) * 1.1
    run_both(model, inputs_embeds=embeds, max_new_tokens=NEW)


def test_users_caches() -> None:
    """Adopted, and written back as plain `generate` leaves them."""
    llama = specdec.augment(tiny_llama(), "prompt_lookup")
    gemma3 = specdec.augment(tiny_gemma3(), "prompt_lookup")
    test_caches.converse(llama, left_padded(), DynamicCache)
    test_caches.converse(
        gemma3, {"input_ids": prompt()}, lambda: DynamicCache(config=gemma3.config)
    )
    test_static_cache.converse(gemma3, left_padded())
    assert WITH in reason(gemma3)


def test_what_plain_generate_does_alone_it_still_does() -> None:
    model = specdec.augment(tiny_llama(), "prompt_lookup")
    with fallbacks() as texts:
        beams = model.generate(prompt(), max_new_tokens=NEW, num_beams=2)
    assert torch.equal(beams, plain(model, prompt(), max_new_tokens=NEW, num_beams=2))
    assert "num_beams is 2" in texts[0]


def test_prompts_with_positions_of_their_own_keep_dense_masks() -> None:
    model = specdec.augment(tiny_llama(), "prompt_lookup")
    ids = prompt()
    positions = torch.arange(3, 3 + ids.shape[1])[None]
    run_both(model, input_ids=ids, position_ids=positions, max_new_tokens=NEW)
    assert reason(model).endswith("; behind such a prompt, with dense masks")


@pytest.mark.usefixtures("hurried")
def test_threads_on_one_model() -> None:
    """Prefill, plain calls and calls with dense masks run beside trees whose attention is ours."""
    model = specdec.augment(tiny_gemma3(), "prompt_lookup")
    dense = SpecConfig("prompt_lookup", kernels="off")
    works = [*test_threads.jobs(model, seed=1),
             test_threads.Repeated(model, dense, {"input_ids": prompt(8, seed=3)})]  # fmt: skip
    with fallbacks() as texts:
        test_threads.together(works)
    assert not texts
    assert model.config._attn_implementation == "sdpa"
    assert not attention._LOANS


def test_another_thread_finds_the_models_own_attention() -> None:
    """Also while two forwards have borrowed the name, and when one of them has ended."""
    model = tiny_llama()
    model.config._attn_implementation = STEEPER
    calls = [dict(left_padded()), {"input_ids": prompt()}]
    wanted = [model(**call).logits for call in calls]

    def forward() -> None:
        for call, logits in zip(calls, wanted, strict=True):
            assert torch.equal(model(**call).logits, logits)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("our attention runs in a thread that did not borrow it")

    with attention.attention_by(model, never):
        with attention.attention_by(model, never):
            test_threads.together([forward])
        assert model.config._attn_implementation == attention.BORROWED
        test_threads.together([forward])
    assert model.config._attn_implementation == STEEPER


def test_the_name_is_given_back_after_an_exception() -> None:
    model = specdec.augment(tiny_llama(), "prompt_lookup")

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a layer fails")

    with attention.attention_by(model, broken):
        assert model.config._attn_implementation == attention.BORROWED
        assert attention.attention_name(model.config) == "sdpa"
        with pytest.raises(RuntimeError, match="a layer fails"):
            model(input_ids=prompt())
    assert model.config._attn_implementation == "sdpa"
    assert not attention._LOANS


def test_trees_never_reach_flash_attention(flash: FlashLike) -> None:  # noqa: F811
    model, theirs = tiny_llama(), tiny_llama()
    model.config._attn_implementation = "fake_flash_attention"
    specdec.augment(model, "prompt_lookup")
    expected = plain(theirs, prompt(), max_new_tokens=NEW)
    flash.widths.clear()
    got = model.generate(prompt(), max_new_tokens=NEW, specdec=oracle(expected, 9))
    assert torch.equal(got, expected)
    assert WITH in reason(model)
    assert flash.widths == [9, 9], "prefill alone, in both layers"
    assert model.config._attn_implementation == "fake_flash_attention"


def test_eager_models_keep_eager_prefill() -> None:
    model = tiny_llama(torch.float32)  # eager attention has no float64 softmax
    model.set_attn_implementation("eager")
    specdec.augment(model, "prompt_lookup")
    run_both(model, **left_padded(), max_new_tokens=NEW)
    assert WITH in reason(model)
    assert model.config._attn_implementation == "eager"


# Devices and dtypes


def test_autocast() -> None:
    """As without kernels: it runs, and nothing of the model is changed."""
    model = specdec.augment(tiny_llama(torch.float32), "prompt_lookup")
    with torch.autocast("cpu", torch.bfloat16), fallbacks() as texts:
        got = model.generate(prompt(), max_new_tokens=NEW)
        logits = model(input_ids=got[:, :-1]).logits.detach()
    assert not texts
    assert WITH in reason(model)
    regret = logits.max(-1).values - logits.gather(2, got[:, 1:, None])[..., 0]
    assert float(regret[:, 8:].max() / logits.abs().max()) < 0.05


def test_placeholders_survive_a_move() -> None:
    """Hooks that bring inputs to a layer's device hand on copies of masks."""
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(tiny_gemma3(), execution_device="cpu")

    def moved(_module: Any, _args: Any, kwargs: dict[str, Any]) -> Any:
        return (), {n: v.clone() if isinstance(v, Tensor) else v for n, v in kwargs.items()}

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(moved, with_kwargs=True)
    specdec.augment(model, "prompt_lookup")
    run_both(model, **left_padded(), max_new_tokens=NEW)
    assert WITH in reason(model)


def test_trees_follow_a_layer_to_its_device() -> None:
    kinds = MaskKinds.of(tiny_llama().config)
    tree = tree_attention.Tree(*(torch.zeros(1, 1, 1).long(), *[torch.zeros(1).int()] * 3))
    step = tree_attention.TreeAttention(tree, kinds, None, "reference")  # type: ignore[arg-type]
    assert step._tree_on(CPU) is tree
    other = step._tree_on(torch.device("meta"))
    assert other.prefix.device.type == "meta"
    assert step._tree_on(torch.device("meta")) is other


# Models that are not what they seem


def test_a_mask_of_its_own_is_refused() -> None:
    """A layer that does not hand on the placeholder could be windowed in a way nobody told."""
    model = tiny_llama()
    attend = model.model.layers[1].self_attn
    forward = attend.forward

    def remasked(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        if attention_mask is not None and attention_mask.shape[-1] == 1:
            attention_mask = attention_mask.expand(-1, -1, 5, 16)
        return forward(*args, attention_mask=attention_mask, **kwargs)

    attend.forward = remasked
    specdec.augment(model, "prompt_lookup", kernels="reference")
    found = capability(model)
    assert found.backend is None
    assert "with a mask of its own, of shape (1, 1, 5, 16)" in found.reason


def test_a_bias_is_refused() -> None:
    """However small it is: it could grow with the distance."""
    model = tiny_llama()
    tree = tree_attention.Tree(*(torch.ones(1, 1, 1).long(), *[torch.ones(1).int()] * 3))
    step = tree_attention.TreeAttention(tree, MaskKinds.of(model.config), None, "reference")  # type: ignore[arg-type]
    states = [torch.zeros(1, heads, 1, 8) for heads in (4, 2, 2)]
    attend = model.model.layers[0].self_attn
    with pytest.raises(UnsupportedModelError, match="LlamaAttention adds a bias to its scores"):
        step.attend(attend, *states, torch.zeros(1, 1, 1, 1), position_bias=torch.zeros(1))


def test_a_model_that_changes_is_tested_again() -> None:
    model = specdec.augment(tiny_llama(), "prompt_lookup")
    call = {"input_ids": prompt(), "max_new_tokens": NEW}
    run_both(model, **call)
    assert WITH in reason(model)
    attend = model.model.layers[0].self_attn
    inner = type(attend).forward

    def bypassing(*args: Any, **kwargs: Any) -> Any:
        """Attention that no longer asks transformers which function to run."""
        own, attend.config = attend.config, copy.copy(model.config)
        attend.config._attn_implementation = "sdpa"
        try:
            return inner(attend, *args, **kwargs)
        finally:
            attend.config = own

    attend.forward = bypassing
    run_both(model, **call)
    assert "attention interface 1 times, and 2 of them have a cache" in reason(model)
    del attend.forward
    run_both(model, **call)
    assert WITH in reason(model)


def test_a_window_that_changes_is_followed() -> None:
    model = specdec.augment(tiny_gemma3(), "prompt_lookup")
    run_both(model, input_ids=prompt(), max_new_tokens=NEW)
    model.config.sliding_window = 4
    for layer in model.model.layers:
        if layer.self_attn.sliding_window is not None:
            layer.self_attn.sliding_window = 4
    run_both(model, input_ids=prompt(), max_new_tokens=NEW)
    assert WITH in reason(model)


def test_attention_of_the_users_own_is_tested_against_ours() -> None:
    """A scale of its own inside a registered function: our kernel would leave it out."""
    model = specdec.augment(tiny_llama(), "prompt_lookup")
    assert capability(model).backend == "reference"
    model.config._attn_implementation = STEEPER
    run_both(model, input_ids=prompt(), max_new_tokens=NEW)
    assert "with dense masks; by tree attention (reference) a token tree changes" in reason(model)


def test_a_forward_that_skips_a_layer_is_an_error() -> None:
    """Nothing is emitted from logits that nobody vouches for."""
    kinds = MaskKinds.of(tiny_llama().config)
    cache = tree_attention.TreeCache(1, CPU, 8)
    cache.reserve(1, "capacity")
    for index in range(2):
        cache.layer(index).update(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4))
    tree = tree_attention.Tree(*(torch.ones(1, 1, 1).long(), *[torch.zeros(1).int()] * 3))
    step = tree_attention.TreeAttention(tree, kinds, cache, "reference")
    step.calls = 2
    step.check_calls()
    step.calls = 1
    with pytest.raises(UnsupportedModelError, match="1 times, and 2 of them have a cache"):
        step.check_calls()
