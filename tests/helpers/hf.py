"""Tiny models, a drafter that knows the answer, and the comparison with plain `generate`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from torch import Tensor

import specdec
from specdec import GenerationStats, RowDrafter, SpecConfig, TokenTree
from specdec.drafters.row import DraftRow
from specdec.errors import FallbackWarning

VOCAB = 64
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,"
STORIES = Path("../shared/models/stories260K/hf")
ORACLE = "oracle_of_hf_tests"

needs_stories = pytest.mark.skipif(
    not (STORIES / "model.safetensors").exists(), reason=f"{STORIES} is not here"
)


@dataclass(frozen=True)
class OracleConfig:
    """Options of `Oracle`."""

    answers: tuple[tuple[int, ...], ...] = ()
    """Per row, what the target will emit."""
    depth: int = 4
    """True tokens proposed a round."""
    chain: bool = False
    """Propose the true tokens alone, without a wrong sibling before each."""


class Oracle(RowDrafter):
    """Proposes the true continuation, each token behind a wrong sibling, and past every end.

    Every row drafts one token fewer than the row above it, so that rows advance unevenly.
    """

    Config = OracleConfig

    class Row(DraftRow):
        def __init__(self, text: list[int], drafter: RowDrafter) -> None:
            super().__init__(text, drafter)
            self.prompt = len(text) - 1

        def propose(self, budget: int) -> TokenTree:
            if self.index >= len(self.config.answers):
                return TokenTree([self.text[-1]], [-1])
            emitted = len(self.text) - self.prompt
            depth = max(1, self.config.depth - self.index)
            ahead = self.config.answers[self.index][emitted : emitted + depth]
            if self.config.chain:
                return TokenTree.chain(self.text[-1], ahead)
            tokens, parents, parent = [self.text[-1]], [-1], 0
            for token in ahead:
                tokens += [(token + 1) % VOCAB, token]
                parents += [parent, parent]
                parent = len(tokens) - 1
            return TokenTree(tokens, parents)

    def __init__(self, config: OracleConfig) -> None:
        super().__init__(config)
        self.max_nodes = 2 * config.depth


def _seeded(build: Callable[[], Any], dtype: torch.dtype) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = build().to(dtype).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    model.generation_config.bos_token_id = None
    return model


def tiny_llama(dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A random Llama of two layers; no EOS, so that tests choose their own."""
    options: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.2,
    }  # fmt: skip
    config = transformers.LlamaConfig(**{**options, **changes}, attn_implementation="sdpa")
    return _seeded(lambda: transformers.LlamaForCausalLM(config), dtype)


def tiny_gemma3(dtype: torch.dtype = torch.float64, window: int = 8) -> Any:
    """Sliding and full layers in turn."""
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8,
        sliding_window=window, layer_types=["sliding_attention", "full_attention"] * 2,
        max_position_embeddings=512, pad_token_id=0, bos_token_id=None, eos_token_id=None,
        initializer_range=0.2, attn_implementation="sdpa",
    )  # fmt: skip
    return _seeded(lambda: transformers.Gemma3ForCausalLM(config), dtype)


def tiny_gpt2(dtype: torch.dtype = torch.float64, positions: int = 64) -> Any:
    """Learned positions, with a table that a clumsy tree would overrun."""
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=positions, pad_token_id=0,
        bos_token_id=None, eos_token_id=None, initializer_range=0.2, attn_implementation="sdpa",
    )  # fmt: skip
    return _seeded(lambda: transformers.GPT2LMHeadModel(config), dtype)


def letter_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One character a token, for the tiny models' ids."""
    inner = Tokenizer(BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    inner.decoder = Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=LETTERS[0], clean_up_tokenization_spaces=False
    )


def prompt(length: int = 9, rows: int = 1, seed: int = 0) -> Tensor:
    """[rows, length] random ids, never the padding id."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)


def left_padded(lengths: tuple[int, ...] = (9, 4, 6, 1), seed: int = 0) -> dict[str, Tensor]:
    """A left-padded batch and its mask."""
    ids = prompt(max(lengths), len(lengths), seed)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : ids.shape[1] - length] = 0
        mask[row, : ids.shape[1] - length] = 0
    return {"input_ids": ids, "attention_mask": mask}


def ids_of(output: Any) -> Tensor:
    """The ids of either return type."""
    return output if isinstance(output, Tensor) else output.sequences


def plain(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The class's own `generate`."""
    return type(model).generate(model, *args, **kwargs)


def oracle(output: Any, width: int, **options: Any) -> SpecConfig:
    """A per-call setting that drafts what `output` holds after the prompt's `width` ids."""
    answers = tuple(map(tuple, ids_of(output)[:, width:].tolist()))
    return SpecConfig(method=ORACLE, options={"answers": answers, **options})


@contextmanager
def fallbacks() -> Iterator[list[str]]:
    """Collects the texts of the `FallbackWarning`s of a block."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(w.message) for w in caught if issubclass(w.category, FallbackWarning)]


@dataclass(frozen=True)
class Both:
    """The same call, plain and speculative.

    Attributes:
        plain: What the class's own `generate` returned.
        ours: What the augmented model returned.
        stats: Of the speculative call.
    """

    plain: Any
    ours: Any
    stats: GenerationStats


def run_both(
    model: Any,
    fresh: Callable[[], Mapping[str, Any]] = dict,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Both:
    """Generates twice from the same seed and compares ids and the generator's final state.

    The speculative call drafts the plain call's own text, and tokens beyond its end, in trees of
    up to four levels: every block border and every overshoot is exercised.

    Args:
        model: An augmented model.
        fresh: Makes the arguments that a call consumes (processors with state, caches, streamers).
        options: Options of the oracle.
        **kwargs: Arguments of both calls.
    """
    torch.manual_seed(1)
    expected = plain(model, **kwargs, **fresh())
    state = torch.get_rng_state()
    ids = kwargs.get("input_ids", kwargs.get("inputs"))
    width = 0 if ids is None else ids.shape[1]
    padded = ids_of(expected)
    beyond = torch.cat([padded, padded[:, -1:].expand(-1, 4)], dim=1)
    torch.manual_seed(1)
    with fallbacks() as texts:
        got = model.generate(**kwargs, **fresh(), specdec=oracle(beyond, width, **(options or {})))
    stats = specdec.last_stats(model)
    assert not texts, texts
    assert stats.mode == "tree"
    assert type(got) is type(expected)
    assert ids_of(got).tolist() == padded.tolist()
    assert torch.equal(torch.get_rng_state(), state), "the generator stands elsewhere than plain's"
    steps = padded.shape[1] - width
    assert stats.rounds <= max(1, -(-(steps - 1) // 2)), f"{stats.rounds} rounds for {steps} tokens"
    return Both(expected, got, stats)
