"""Tiny random vision-language models and prompts with images for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor

VOCAB, IMAGE_ID, START_ID, END_ID = 96, 90, 92, 93
_PATCH, _SIDE = 4, 16

_TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False,
    "initializer_range": 0.2,
}  # fmt: skip
_HEAD_DIM = {"head_dim": 8}
_GEMMA = {**_HEAD_DIM, "query_pre_attn_scalar": 8, "sliding_window": 8}
_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
_INTERLEAVED = {**_MROPE, "mrope_interleaved": True}
_DELTA = {
    **_HEAD_DIM, "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rope_parameters": {**_INTERLEAVED, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0},
}  # fmt: skip
_SIZES = {"hidden_size": 32, "intermediate_size": 48}
_QWEN = {"depth": 2, "num_heads": 2, "patch_size": _PATCH, "spatial_merge_size": 2,
         "temporal_patch_size": 2, "in_channels": 3}  # fmt: skip
_QWEN_3 = {**_QWEN, **_SIZES, "out_hidden_size": 32, "num_position_embeddings": 64}
_VIT = {**_SIZES, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": _SIDE,
        "patch_size": _PATCH}  # fmt: skip
_CLIP = {**_VIT, "model_type": "clip_vision_model", "projection_dim": 32}
_SIGLIP = {**_VIT, "model_type": "siglip_vision_model", "vision_use_head": False}
_QWEN_IDS = {"video_token_id": 91, "vision_start_token_id": START_ID, "vision_end_token_id": END_ID}
_PALI = {"projection_dim": 32, "hidden_size": 32}


@dataclass(frozen=True)
class VisionFamily:
    """How to build one tiny model and its inputs.

    Attributes:
        architecture: `<architecture>Config` and `<architecture>ForConditionalGeneration`.
        text: What the text config takes besides the shared part.
        vision: The vision config.
        more: What the whole config takes.
        image: Ids of an image in a prompt; of Qwen models it depends on the image's size.
        types: Name of the input that marks image ids, if the model takes one.
        mode: What the self-test is expected to choose.
        image_id: The id of an image's tokens.
    """

    architecture: str
    text: dict[str, Any]
    vision: dict[str, Any]
    more: dict[str, Any]
    image: int = 0
    types: str | None = None
    mode: str = "tree"
    image_id: int = IMAGE_ID

    def build(self, dtype: torch.dtype) -> Any:
        """The model in eval mode, without an EOS."""
        config = getattr(transformers, f"{self.architecture}Config")(
            text_config={**_TEXT, **self.text}, vision_config=self.vision,
            image_token_id=self.image_id, tie_word_embeddings=False, **self.more,
        )  # fmt: skip
        model_class = getattr(transformers, f"{self.architecture}ForConditionalGeneration")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = model_class(config).to(dtype).eval()
            for parameter in model.parameters():
                if parameter.ndim >= 2 and not parameter.any():  # Gemma 3 would see no image
                    torch.nn.init.normal_(parameter, std=0.2)
        generation = model.generation_config
        generation.eos_token_id, generation.bos_token_id, generation.pad_token_id = None, None, 0
        return model


_QWEN_TYPES = {"types": "mm_token_type_ids"}

VISION: dict[str, VisionFamily] = {
    "qwen2_vl": VisionFamily(
        "Qwen2VL", {"rope_parameters": _MROPE},
        {**_QWEN, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}, _QWEN_IDS, **_QWEN_TYPES,
    ),
    "qwen2_5_vl": VisionFamily(
        "Qwen2_5_VL", {"rope_parameters": _MROPE},
        {**_QWEN, **_SIZES, "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]},
        _QWEN_IDS, **_QWEN_TYPES,
    ),
    "qwen3_vl": VisionFamily(
        "Qwen3VL", {**_HEAD_DIM, "rope_parameters": _INTERLEAVED},
        {**_QWEN_3, "deepstack_visual_indexes": [0, 1]}, _QWEN_IDS, **_QWEN_TYPES,
    ),
    "qwen3_5": VisionFamily(
        "Qwen3_5", _DELTA, {**_QWEN_3, "deepstack_visual_indexes": []}, _QWEN_IDS,
        **_QWEN_TYPES, mode="chain",
    ),
    "llava": VisionFamily(
        "Llava", {"model_type": "llama"}, _CLIP, {"vision_feature_layer": -1}, image=16
    ),
    "gemma3": VisionFamily(
        "Gemma3",
        {**_GEMMA, "num_hidden_layers": 4,
         "layer_types": ["sliding_attention", "full_attention"] * 2},
        _SIGLIP, {"mm_tokens_per_image": 4, "boi_token_index": START_ID, "eoi_token_index": END_ID},
        image=4, types="token_type_ids",
    ),
    "gemma3_beyond": VisionFamily(  # no embedding has the id of an image
        "Gemma3",
        {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
        _SIGLIP, {"mm_tokens_per_image": 4, "boi_token_index": START_ID, "eoi_token_index": END_ID},
        image=4, types="token_type_ids", image_id=VOCAB + 4,
    ),
    "paligemma": VisionFamily(
        "PaliGemma", {**_HEAD_DIM, "model_type": "gemma"}, {**_SIGLIP, "projection_dim": 32},
        _PALI, image=16, types="token_type_ids", mode="chain",  # its prompts are not causal
    ),
    "paligemma2": VisionFamily(
        "PaliGemma", {**_GEMMA, "model_type": "gemma2"}, {**_SIGLIP, "projection_dim": 32},
        _PALI, image=16, types="token_type_ids", mode="chain",
    ),
    "idefics3": VisionFamily(
        "Idefics3", {"model_type": "llama"}, _VIT, {"scale_factor": 2}, image=4
    ),
    "smolvlm": VisionFamily(
        "SmolVLM", {"model_type": "llama"}, _VIT, {"scale_factor": 2}, image=4
    ),
}  # fmt: skip
TREES = [name for name, family in VISION.items() if family.mode == "tree"]

Size = tuple[int, int]
ONE: tuple[Size, ...] = ((4, 4),)
TWO: tuple[Size, ...] = ((4, 8), (4, 4))


@cache
def vision_model(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """One model a family and process; whoever augments it uses it up."""
    return VISION[name].build(dtype)


def image_prompt(
    name: str, sizes: Sequence[Size] = ONE, seed: int = 0, words: int = 5
) -> dict[str, Tensor]:
    """A prompt of one row: words, an image, words again, and so on; float64 pixels.

    Args:
        name: The family.
        sizes: Patches (rows, columns) of every image, for models that take images of any size.
        seed: For words and pixels.
        words: Text tokens before the first image and behind every one.
    """
    family = VISION[name]
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 88, (words,), generator=generator).tolist()
    ids, types = list(text), [0] * words
    for size in sizes:
        count = family.image or size[0] * size[1] // 4
        ids += [START_ID] + [family.image_id] * count + [END_ID] + text
        types += [0] + [1] * count + [0] * (words + 1)
    if name.startswith("paligemma"):
        types = [0] * len(ids)  # the whole prompt is prefix
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
    if family.types:
        inputs[family.types] = torch.tensor([types])
    if sizes:
        inputs |= _pixels(name, sizes, generator)
    return inputs


def _pixels(name: str, sizes: Sequence[Size], generator: torch.Generator) -> dict[str, Tensor]:
    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if name.startswith("qwen"):
        grids = torch.tensor([(1, *size) for size in sizes])
        patches = sum(rows * columns for rows, columns in sizes)
        return {"pixel_values": noise(patches, 3 * 2 * _PATCH**2), "image_grid_thw": grids}
    shape = (len(sizes), 3, _SIDE, _SIDE)
    if name in ("idefics3", "smolvlm"):
        return {"pixel_values": noise(1, *shape)}
    return {"pixel_values": noise(*shape)}


def batched(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Prompts of one row each as a left-padded batch."""
    width = max(row["input_ids"].shape[1] for row in rows)
    joined: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        parts = [row[key] for row in rows if key in row]
        if key.endswith("_ids") or key == "attention_mask":
            parts = [torch.nn.functional.pad(part, (width - part.shape[1], 0)) for part in parts]
        joined[key] = torch.cat(parts)
    return joined
