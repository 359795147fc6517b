"""PEFT, accelerate, pipelines, threads, low precision and flash attention around a model."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

import specdec
from helpers.heads import head_for
from helpers.hf import (
    STORIES,
    fallbacks,
    left_padded,
    letter_tokenizer,
    needs_stories,
    oracle,
    plain,
    prompt,
    run_both,
    tiny_gemma3,
    tiny_llama,
)
from helpers.names import CACHE, cache_of

NEW = 16


def lora(model: Any) -> Any:
    """The model in a LoRA wrapper whose adapters change the text."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(model, config)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return wrapped.eval()


def test_augmented_peft_wrapper() -> None:
    wrapped = specdec.augment(lora(tiny_llama()), "prompt_lookup")
    without = plain(tiny_llama(), prompt(), max_new_tokens=NEW)
    both = run_both(wrapped, input_ids=prompt(), max_new_tokens=NEW)
    assert not torch.equal(both.ours, without), "the adapters do nothing: the test shows nothing"
    run_both(wrapped, **left_padded(), max_new_tokens=NEW, do_sample=True, top_k=0)
    with wrapped.disable_adapter():
        both = run_both(wrapped, input_ids=prompt(), max_new_tokens=NEW)
    assert torch.equal(both.ours, without)
    specdec.restore(wrapped)
    assert "generate" not in vars(wrapped)


def test_wrapper_around_an_augmented_base() -> None:
    base = specdec.augment(tiny_llama(), "prompt_lookup")
    wrapped = lora(base)
    expected = wrapped.generate(input_ids=prompt(), max_new_tokens=NEW, specdec=False)
    with fallbacks() as texts:
        got = wrapped.generate(input_ids=prompt(), max_new_tokens=NEW, specdec=oracle(expected, 9))
    assert not texts
    assert torch.equal(got, expected)
    assert specdec.last_stats(base).mode == "tree"
    assert specdec.last_stats(base).rounds < NEW - 2


def test_wrapper_and_base_both_augmented() -> None:
    base = specdec.augment(tiny_llama(), "prompt_lookup")
    wrapped = specdec.augment(lora(base), "prompt_lookup")
    expected = plain(wrapped, input_ids=prompt(), max_new_tokens=NEW, specdec=False)
    with fallbacks() as texts:
        got = wrapped.generate(input_ids=prompt(), max_new_tokens=NEW, specdec=oracle(expected, 9))
    assert not texts
    assert torch.equal(got, expected)
    assert specdec.last_stats(wrapped).rounds < NEW - 2


@pytest.mark.parametrize("outside", [True, False])
def test_prompt_tuning_is_not_ignored(outside: bool) -> None:
    """Virtual tokens enter through `prepare_inputs_for_generation`, which our loop never calls."""
    peft = pytest.importorskip("peft")
    base = tiny_llama(torch.float32)
    torch.manual_seed(0)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    if outside:
        model = wrapped = specdec.augment(peft.get_peft_model(base, config), "prompt_lookup")
    else:
        model = specdec.augment(base, "prompt_lookup")
        wrapped = peft.get_peft_model(base, config)
    specdec.restore(model)
    expected = wrapped.generate(input_ids=prompt(), max_new_tokens=NEW)
    specdec.augment(model, "prompt_lookup")
    with fallbacks() as texts:
        got = wrapped.generate(input_ids=prompt(), max_new_tokens=NEW)
    assert torch.equal(got, expected)
    assert len(texts) == 1


def test_device_map(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    tiny_llama().save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map={"": "cpu"}, dtype=torch.float64
    )
    specdec.augment(model, "prompt_lookup")
    run_both(model, input_ids=prompt(), max_new_tokens=NEW)


@pytest.mark.parametrize("embeddings", ["cpu", "disk"])
def test_dispatched_model_with_hooks(tmp_path: Path, embeddings: str) -> None:
    """Offloaded embeddings too, where `model.device` is "meta"."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny_llama()
    free = plain(model, prompt(), max_new_tokens=NEW)
    parts = {"model.embed_tokens": embeddings, "model.layers.0": "cpu", "model.layers.1": "disk",
             "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    accelerate.dispatch_model(model, parts, main_device="cpu", offload_dir=tmp_path)
    assert hasattr(model, "_hf_hook")
    specdec.augment(model, "prompt_lookup")
    both = run_both(model, input_ids=prompt(), max_new_tokens=NEW)
    assert torch.equal(both.ours, free)


def test_cpu_offload() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(tiny_llama(), execution_device="cpu")
    assert model.device.type == "meta"
    specdec.augment(model, "prompt_lookup")
    run_both(model, input_ids=prompt(), max_new_tokens=NEW)


def test_compiled_after_augment() -> None:
    model = specdec.augment(tiny_llama(), "prompt_lookup")
    compiled = torch.compile(model, backend="eager")
    expected = plain(model, prompt(), max_new_tokens=NEW)
    assert torch.equal(compiled.generate(prompt(), max_new_tokens=NEW), expected)
    assert specdec.last_stats(model).mode == "tree"


def test_inference_mode_then_no_grad(llama: Any) -> None:
    with torch.inference_mode():
        run_both(llama, input_ids=prompt(), max_new_tokens=NEW)
    run_both(llama, input_ids=prompt(), max_new_tokens=NEW)


def check_pipeline(model: Any, tokenizer: Any, texts: list[str]) -> None:
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    for settings in (
        {"do_sample": False, "max_new_tokens": 40},
        {"do_sample": True, "max_new_tokens": 30, "temperature": 0.7},
        {"do_sample": False, "max_new_tokens": 40, "return_full_text": False},
        {"do_sample": False, "max_new_tokens": 20, "batch_size": 2},
    ):
        torch.manual_seed(0)
        expected = pipe(texts, **settings)
        with specdec.augmented(model, "prompt_lookup"), fallbacks() as warned:
            torch.manual_seed(0)
            assert pipe(texts, **settings) == expected
            assert specdec.last_stats(model).mode == "tree"
        assert not warned


def test_text_generation_pipeline() -> None:
    check_pipeline(tiny_llama(), letter_tokenizer(), ["onceUponAtime", "Tom3"])


@needs_stories
def test_pipeline_of_a_trained_model() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(STORIES)
    model = transformers.AutoModelForCausalLM.from_pretrained(STORIES)
    check_pipeline(model, tokenizer, ["Once upon a time, there was a girl.", "Tom had a dog."])


def test_two_models_in_two_threads() -> None:
    models = [
        specdec.augment(tiny_llama(), "prompt_lookup"),
        specdec.augment(tiny_gemma3(), "none"),
    ]
    inputs = [prompt(9, seed=1), prompt(12, seed=2)]
    expected = [plain(m, ids, max_new_tokens=60) for m, ids in zip(models, inputs, strict=True)]
    got: dict[int, list[Tensor]] = {0: [], 1: []}

    def work(index: int) -> None:
        for _ in range(3):
            got[index].append(models[index].generate(inputs[index], max_new_tokens=60))

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in (0, 1):
        assert len(got[index]) == 3
        assert all(torch.equal(one, expected[index]) for one in got[index])
    assert [specdec.last_stats(model).method for model in models] == ["prompt_lookup", "none"]


def test_one_model_in_two_threads(llama: Any) -> None:
    """Calls share no state but the newest statistics."""
    inputs = [prompt(9, seed=1), prompt(12, seed=2)]
    expected = [plain(llama, ids, max_new_tokens=60) for ids in inputs]
    got: dict[int, Tensor] = {}

    def work(index: int) -> None:
        got[index] = llama.generate(inputs[index], max_new_tokens=60)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[index], expected[index]) for index in (0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma3])
def test_low_precision_runs(build: Any, dtype: torch.dtype) -> None:
    """Rounding may change the text here (`specdec.audit.exactness` bounds it), nothing else may."""
    model = specdec.augment(build(dtype), "prompt_lookup")
    for inputs in ({"input_ids": prompt(20)}, left_padded((20, 3))):
        with fallbacks() as texts:
            got = model.generate(
                **inputs, max_new_tokens=NEW, return_dict_in_generate=True,
                output_hidden_states=True, output_scores=True,
            )  # fmt: skip
        assert not texts
        assert got.sequences.shape[1] == 20 + NEW
        assert got.scores[0].dtype == torch.float32
        assert got.hidden_states[1][0].dtype == dtype
        assert cache_of(got).layers[0].keys.dtype == dtype
        assert specdec.last_stats(model).mode == "tree"


def test_autocast() -> None:
    model = specdec.augment(tiny_llama(torch.float32), "prompt_lookup")
    with torch.autocast("cpu", torch.bfloat16), fallbacks() as texts:
        expected = plain(model, prompt(), max_new_tokens=NEW, output_logits=True,
                         return_dict_in_generate=True)  # fmt: skip
        got = model.generate(
            prompt(), max_new_tokens=NEW, output_logits=True, return_dict_in_generate=True,
            specdec=oracle(expected, 9),
        )  # fmt: skip
        model.generate(**left_padded(), max_new_tokens=NEW)
    assert not texts
    assert specdec.last_stats(model).mode == "tree"
    torch.testing.assert_close(got.logits[0], expected.logits[0], atol=0.2, rtol=0.05)
    torch.testing.assert_close(got.logits[1], expected.logits[1], atol=0.2, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [{"top_k": 1}, {"top_k": 3, "nodes": 10}], ids=str)
def test_autocast_is_not_the_draft_heads(dtype: torch.dtype, sizes: dict[str, int]) -> None:
    """Ragged rows, whose old and new keys would otherwise meet in two dtypes."""
    model, made = tiny_llama(torch.float32), []
    head = head_for(model, fc_norm=True)
    begin = head.begin
    head.begin = lambda *args: made.append(begin(*args)) or made[-1]  # type: ignore[method-assign]
    with torch.autocast("cpu", dtype), specdec.augmented(model, "eagle3", draft=head, **sizes):
        for inputs in ({"input_ids": prompt(20)}, left_padded((20, 9, 3))):
            assert model.generate(**inputs, max_new_tokens=NEW).shape[1] == 20 + NEW
    assert len(made) == 2
    for state in made:
        assert state.cache.layer(0).keys.dtype == state.hidden.dtype == torch.float32


class FlashLike:
    """Stands in for flash attention: counts its calls and refuses any 4-D mask."""

    def __init__(self) -> None:
        self.widths: list[int] = []

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> Any:
        assert mask is None or mask.ndim < 4, "flash attention was given a dense mask"
        self.widths.append(query.shape[2])
        causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(
            key.shape[2] - query.shape[2]
        )
        seen = causal.expand(query.shape[0], 1, -1, -1)
        if mask is not None:
            seen = seen & mask[:, None, None, :].bool()
        dense = torch.zeros_like(seen, dtype=query.dtype)
        dense.masked_fill_(~seen, torch.finfo(query.dtype).min)
        return sdpa_attention_forward(module, query, key, value, dense, **kwargs)


def _padding_mask(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
    return attention_mask


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> FlashLike:
    """Registered under a name that says flash, for one test."""
    fake = FlashLike()
    backends = ((AttentionInterface, fake), (AttentionMaskInterface, _padding_mask))
    for interface, function in backends:
        mapping = dict(interface._global_mapping)
        mapping["fake_flash_attention"] = function
        monkeypatch.setattr(interface, "_global_mapping", mapping)
    return fake


def test_trees_never_reach_flash_attention(flash: FlashLike) -> None:
    model, reference = tiny_llama(), tiny_llama()
    expected = plain(reference, prompt(), max_new_tokens=NEW)
    model.config._attn_implementation = "fake_flash_attention"
    specdec.augment(model, "prompt_lookup")
    for chunk in (None, 4):
        flash.widths.clear()
        with fallbacks() as texts:
            got = model.generate(
                prompt(), max_new_tokens=NEW, specdec=oracle(expected, 9), prefill_chunk_size=chunk
            )
        assert not texts
        assert torch.equal(got, expected)
        assert specdec.last_stats(model).rounds < NEW - 2
        prefill = [9] if chunk is None else [4, 4, 1]
        trees = [width for width in flash.widths if width > 1][len(prefill) * 2 :]
        assert flash.widths[0] == prefill[0], "prefill keeps the user's backend"
        assert sum(flash.widths[: 2 * len(prefill)]) == 18
        assert not trees
    assert model.config._attn_implementation == "fake_flash_attention"


def test_ragged_prefill_never_gives_flash_attention_a_mask(flash: FlashLike) -> None:
    """A second turn of a left-padded batch prefills rows of different length onto their caches."""
    model, reference = tiny_llama(), tiny_llama()
    model.config._attn_implementation = "fake_flash_attention"
    specdec.augment(model, "prompt_lookup")
    caches = DynamicCache(), DynamicCache()
    inputs = left_padded()
    for turn in range(2):
        call = {**inputs, "max_new_tokens": 6}
        expected = plain(reference, **call, **{CACHE: caches[0]})
        got = model.generate(
            **call, **{CACHE: caches[1]}, specdec=oracle(expected, expected.shape[1] - 6)
        )
        assert torch.equal(got, expected)
        more = prompt(3, 4, seed=turn)
        ones = torch.ones(4, 9, dtype=torch.long)
        inputs = {
            "input_ids": torch.cat([got, more], 1),
            "attention_mask": torch.cat([inputs["attention_mask"], ones], 1),
        }


def test_flash_detour_survives_an_exception(flash: FlashLike) -> None:
    model = tiny_llama()
    model.config._attn_implementation = "fake_flash_attention"
    specdec.augment(model, "prompt_lookup")

    def broken(batch: int, ids: Tensor) -> list[int]:
        if len(ids) > 12:
            raise RuntimeError("the user's function fails")
        return list(range(3, 60))

    with pytest.raises(RuntimeError, match="the user's function"):
        model.generate(prompt(), max_new_tokens=NEW, prefix_allowed_tokens_fn=broken)
    assert model.config._attn_implementation == "fake_flash_attention"


def test_fake_flash_is_as_good_as_sdpa(flash: FlashLike) -> None:
    """Guards the stand-in itself."""
    model = tiny_llama()
    expected = plain(model, prompt(), max_new_tokens=NEW)
    model.config._attn_implementation = "fake_flash_attention"
    assert torch.equal(plain(model, prompt(), max_new_tokens=NEW), expected)
