"""Trains the bundled demo target from scratch: tokenizer, model, model card.

Run it with `python -m specdec.demo.build_target`. One core is enough; the card that it writes says
how long it took. The text is the standard library (`corpus.py`), the model a plain
`LlamaForCausalLM`, so nothing here is needed to load the result.
"""

import hashlib
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specdec.demo.corpus import HELD_OUT_MODULES, fingerprint, read_sources

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
# Words with their leading space, digits one by one, runs of spaces kept apart from the last one.
_SPLIT = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class BuildConfig:
    """How the demo target is built."""

    out: Path = Path(__file__).parent / "target"
    """Folder that receives weights, tokenizer and card."""
    steps: int = 4800
    """Optimiser steps."""
    batch: int = 4
    """Sequences a step."""
    context: int = 1024
    """Tokens a sequence."""
    vocab_size: int = 4096
    """Entries of the byte-level BPE vocabulary."""
    matrix_lr: float = 0.02
    """Peak learning rate of Muon, which trains the weight matrices."""
    vector_lr: float = 0.004
    """Peak learning rate of AdamW, which trains embeddings and norms."""
    warmup: int = 100
    """Steps of linear warm-up."""
    decay: float = 0.5
    """Share of the steps over which the learning rate falls linearly to zero."""
    eval_every: int = 500
    """Steps between evaluations on the held-out modules; a checkpoint is written at each."""
    threads: int = 1
    """Torch threads."""
    seed: int = 0
    """Seed of initialisation and of the order of the text."""


@dataclass
class Progress:
    """What the card reports about a run."""

    step: int = 0
    train_loss: float = float("nan")
    held_out_loss: float = float("nan")
    held_out_bits_per_byte: float = float("nan")
    seconds: float = 0.0


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer trained on `texts`; round-trips any string."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[Tensor]:
    """Token ids of each text, int64, opened by the end-of-text token."""
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [torch.tensor([tokenizer.eos_token_id, *row]) for row in rows]


def batches(documents: list[Tensor], config: BuildConfig) -> Iterator[Tensor]:
    """Endless [batch, context] blocks; every epoch shuffles the documents and packs them anew."""
    generator = torch.Generator().manual_seed(config.seed)
    size = config.batch * config.context
    while True:
        order = torch.randperm(len(documents), generator=generator).tolist()
        packed = torch.cat([documents[i] for i in order])
        blocks = packed[: len(packed) // config.context * config.context]
        blocks = blocks.view(-1, config.context)
        blocks = blocks[torch.randperm(len(blocks), generator=generator)]
        for start in range(0, len(blocks) - config.batch + 1, config.batch):
            yield blocks[start : start + config.batch].view(-1)[:size].view(config.batch, -1)


def build_model(config: BuildConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A 3.4 M parameter Llama: head_dim 32 and grouped queries, as large models have."""
    torch.manual_seed(config.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=192,
            intermediate_size=576,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=config.context,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def optimisers(model: LlamaForCausalLM, config: BuildConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for everything else."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=config.matrix_lr, weight_decay=0.01),
        torch.optim.AdamW(others, lr=config.vector_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def schedule(step: int, config: BuildConfig) -> float:
    """Learning-rate factor: warm-up, plateau, linear decay to zero."""
    decay_start = config.steps * (1 - config.decay)
    fall = (config.steps - step) / max(1.0, config.steps - decay_start)
    return min((step + 1) / config.warmup, 1.0, fall)


def bf16_is_faster() -> bool:
    """Whether bf16 matrix products beat fp32 here: it depends on the instruction set."""

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.randn(4096, 192).to(dtype), torch.randn(192, 576).to(dtype)
        a @ b
        start = time.perf_counter()
        for _ in range(20):
            a @ b
        return time.perf_counter() - start

    return seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, documents: list[Tensor], context: int) -> float:
    """Mean cross-entropy in nats per token over the held-out documents."""
    packed = torch.cat(documents)[: 96 * context]
    blocks = packed[: len(packed) // context * context].view(-1, context)
    losses = [float(model(input_ids=b, labels=b).loss) for b in blocks.split(4)]
    return sum(losses) / len(losses)


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: tuple[list[str], list[str]],
    config: BuildConfig,
) -> None:
    """Trains in place and writes a checkpoint with its card at every evaluation."""
    documents, held_out = encode(tokenizer, texts[0]), encode(tokenizer, texts[1])
    held_out_tokens = sum(len(d) - 1 for d in held_out)
    held_out_bytes = sum(len(t.encode()) for t in texts[1])
    optims = optimisers(model, config)
    peaks = [o.param_groups[0]["lr"] for o in optims]
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16_is_faster())
    progress, start, average = Progress(), time.perf_counter(), None
    stream = batches(documents, config)
    for step in tqdm(range(config.steps), desc="training the demo target", mininterval=5):
        with autocast:
            block = next(stream)
            loss = model(input_ids=block, labels=block).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim, peak in zip(optims, peaks, strict=True):
            optim.param_groups[0]["lr"] = peak * schedule(step, config)
            optim.step()
            optim.zero_grad(set_to_none=True)
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            progress.step, progress.train_loss = step + 1, average
            progress.held_out_loss = held_out_loss(model, held_out, config.context)
            bits = progress.held_out_loss / 0.6931471805599453
            progress.held_out_bits_per_byte = bits * held_out_tokens / held_out_bytes
            progress.seconds = time.perf_counter() - start
            save(model, tokenizer, config.out)
            write_card(config, progress, texts, sum(map(len, documents)))
            tqdm.write(f"{progress}")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes bf16 safetensors, config and tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(weights)
    copy.save_pretrained(out)
    tokenizer.save_pretrained(out)


def write_card(
    config: BuildConfig, progress: Progress, texts: tuple[list[str], list[str]], tokens: int
) -> None:
    """Writes the model card from what was measured in this run."""
    weights = (config.out / "model.safetensors").read_bytes()
    facts = {
        "parameters": f"{len(weights) // 2 / 1e6:.2f} M (bf16, head_dim 32, 6 query / 2 KV heads)",
        "text": f"CPython {platform.python_version()} standard library, {len(texts[0])} files, "
        f"{tokens / 1e6:.2f} M tokens",
        "text sha256": fingerprint(texts[0]),
        "held-out modules": ", ".join(sorted(HELD_OUT_MODULES)),
        "steps": f"{progress.step} of {config.steps} "
        f"({progress.step * config.batch * config.context / 1e6:.1f} M tokens)",
        "training loss": f"{progress.train_loss:.3f} nats per token (running mean)",
        "held-out loss": f"{progress.held_out_loss:.3f} nats per token, "
        f"{progress.held_out_bits_per_byte:.3f} bits per byte ({len(texts[1])} files)",
        "time": f"{progress.seconds / 60:.0f} minutes, {config.threads} CPU thread(s), shared",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "weights sha256": hashlib.sha256(weights).hexdigest(),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    (config.out / "README.md").write_text(_CARD.format(rows=rows), encoding="utf-8")


_CARD = """---
license: apache-2.0
---
# specdec demo target

A toy: a small Llama that writes plausible-looking Python, so that `specdec demo` and the tests
need no download. It knows nothing beyond that; load real models by name or path.

| | |
|---|---|
{rows}

The training text is the Python standard library, copyright Python Software Foundation, licence
PSF-2.0. Rebuild with `make demo-target` (`python -m specdec.demo.build_target`).
"""


def main() -> None:
    """Command line of the build."""
    config = tyro.cli(BuildConfig, description=__doc__)
    torch.set_num_threads(config.threads)
    texts = (read_sources(), read_sources(held_out=True))
    tokenizer = train_tokenizer(texts[0], config.vocab_size)
    train(build_model(config, tokenizer), tokenizer, texts, config)


if __name__ == "__main__":
    main()
