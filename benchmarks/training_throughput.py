"""Training throughput beside other trainers: the same target, batches and head shape.

A Llama of 8.4 M parameters with random weights is the target; every arm reads the same batches,
runs the target, unrolls the head and steps AdamW. A row is a prompt without a loss and an answer
with one, and nearly all of the target's likeliest tokens are in the draft vocabulary, as in real
data. Segments of a few steps alternate within one process, so that a busy machine slows all arms
alike. A peer is measured where its package can be imported: SpecForge (its Triton loss, which needs
a GPU, replaced by the same formula in torch) and speculators. Their classes get what their own
trainers give them, and so their weights the optimiser of those: both leave AdamW as torch sets it
up, and SpecForge's steps copies of the weights. `--same-optimiser` gives all of them the fused one
of this library. Run:

    python benchmarks/training_throughput.py --segments 12
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # speculators compiles its loss on import

import torch
import tyro
from accelerate import Accelerator
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.heads.eagle3.config import Eagle3Config
from specdec.heads.eagle3.draft_vocabulary import DraftVocabulary
from specdec.heads.eagle3.head import Eagle3Head
from specdec_bench.paired import ratio, time_arms
from specdec_training.data.batches import collate
from specdec_training.features.online import OnlineFeatures
from specdec_training.objective.losses import LossKind
from specdec_training.run.options import TrainOptions
from specdec_training.run.train_step import Told, TrainStep

_VOCAB, _DRAFT, _TAPS = 4096, 2048, (1, 3, 4)  # layer outputs, from 0
_HEAD_SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
}
_UNLIKELY = 0.3  # factor of the logits outside the draft vocabulary
_KIND: LossKind = "ce"


@dataclass(frozen=True)
class Options:
    """What to measure."""

    segments: int = 12
    """Timed segments of every arm."""
    steps: int = 4
    """Optimiser steps of a segment."""
    rows: int = 2
    """Rows of a batch."""
    length: int = 256
    """Tokens of a row."""
    prompt: int = 64
    """Tokens at the start of a row that have no loss."""
    ttt: int = 4
    """Training-time test steps."""
    bf16: bool = False
    """bf16 autocast around target and head of every arm."""
    same_optimiser: bool = False
    """Update the weights of the peers with this library's fused AdamW, too."""


Step = Callable[[Tensor], None]
"""One optimiser step on [rows, length] token ids."""


@dataclass(frozen=True)
class Problem:
    """What all arms share.

    Attributes:
        target: In evaluation mode, frozen.
        ids: [_DRAFT] ascending target ids of the draft vocabulary.
        options: Sizes.
    """

    target: LlamaForCausalLM
    ids: Tensor
    options: Options

    @classmethod
    def make(cls, options: Options) -> Problem:
        """With random weights, but for which tokens are likely."""
        torch.manual_seed(0)
        config = LlamaConfig(
            **_HEAD_SHAPE, vocab_size=_VOCAB, num_hidden_layers=8, tie_word_embeddings=False
        )
        target = LlamaForCausalLM(config).eval().requires_grad_(False)
        made = cls(target, torch.randperm(_VOCAB)[:_DRAFT].sort().values, options)
        # A draft vocabulary is made of likely tokens; one of any would leave most slots no loss.
        target.lm_head.weight[~made.mask] *= _UNLIKELY
        return made

    @property
    def offsets(self) -> Tensor:
        """[_DRAFT] what is added to a draft id."""
        return self.ids - torch.arange(_DRAFT)

    @property
    def mask(self) -> Tensor:
        """[_VOCAB] bool, tokens of the draft vocabulary."""
        return torch.zeros(_VOCAB, dtype=torch.bool).index_fill_(0, self.ids, True)

    def answered(self, tokens: Tensor) -> Tensor:
        """[B, T] bool, tokens with a loss."""
        return (torch.arange(tokens.shape[1]) >= self.options.prompt).expand_as(tokens)

    @torch.no_grad()
    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tapped states [B, T, 3 H] and the last hidden state [B, T, H] after the final norm."""
        with self.autocast():
            states = self.target.model(tokens, output_hidden_states=True).hidden_states
        return torch.cat([states[layer + 1] for layer in _TAPS], -1), states[-1]

    def autocast(self) -> Any:
        """bf16 products, when asked for."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.options.bf16)


def optimiser(module: torch.nn.Module, norm: float, fused: bool) -> Callable[[], None]:
    """Clips the gradients of what learns, steps AdamW, and forgets them."""
    learning = [p for p in module.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(learning, lr=1e-3, betas=(0.9, 0.95), fused=fused or None)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(learning, norm)
        adam.step()
        adam.zero_grad()

    return step


def specdec_arm(problem: Problem, folder: str) -> Step:
    """This library's trainer step."""
    config = Eagle3Config(
        **_HEAD_SHAPE, vocab_size=_VOCAB, draft_vocab_size=_DRAFT, target_hidden_size=256,
        aux_output_layers=_TAPS,
    )  # fmt: skip
    head = Eagle3Head(config)
    head.set_vocabulary(DraftVocabulary(problem.offsets + torch.arange(_DRAFT), _VOCAB))
    head.attach(problem.target.get_input_embeddings().weight)
    bf16 = problem.options.bf16
    source = OnlineFeatures(problem.target, _TAPS, low=torch.bfloat16 if bf16 else None)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if bf16 else "no")
    learning = TrainOptions(
        ttt_steps=problem.options.ttt, loss=_KIND, lr=1e-3, warmup=0.0, final_lr=1.0,
        weight_decay=0.01, clip=0.5,
    )  # fmt: skip
    learn = TrainStep(accelerator, head, source, learning)

    def step(tokens: Tensor) -> None:
        rows = zip(tokens.tolist(), problem.answered(tokens).tolist(), strict=True)
        examples = [SimpleNamespace(token_ids=row, loss_mask=mask) for row, mask in rows]
        batch = collate([(i,) for i in range(len(examples))], examples, tokens.shape[1])
        learn([batch], Told(), seed=0)

    return step


def specforge_arm(problem: Problem, folder: str) -> Step:
    """SpecForge's online EAGLE-3 model."""
    from specforge.algorithms.eagle3 import model as peer
    from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
    from specforge.optimizer import BF16Optimizer

    class TorchLoss:
        """The masked mean of the cross-entropy, as its kernel computes it."""

        @staticmethod
        def apply(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
            return -(mask * target * logits.float().log_softmax(-1)).sum(2).mean()

    peer.LogSoftmaxLoss = TorchLoss
    config = LlamaConfig(**_HEAD_SHAPE, vocab_size=_VOCAB, num_hidden_layers=1, pad_token_id=0)
    config.draft_vocab_size, config.architectures = _DRAFT, ["LlamaForCausalLMEagle3"]
    draft = LlamaForCausalLMEagle3(config, attention_backend="sdpa")
    draft.embed_tokens.weight.data.copy_(problem.target.get_input_embeddings().weight)
    draft.freeze_embedding()
    draft.t2d.copy_(problem.mask)
    draft.d2t.copy_(problem.offsets)
    net = peer.OnlineEagle3Model(draft, length=problem.options.ttt, attention_backend="sdpa")
    # Its own optimiser clips, too, and forgets the gradients.
    same = problem.options.same_optimiser
    update = optimiser(net, 0.5, fused=True) if same else BF16Optimizer(net, lr=1e-3).step

    def step(tokens: Tensor) -> None:
        aux, last = problem.read(tokens)
        with torch.no_grad(), problem.autocast():
            logits = problem.target.lm_head(last)
        mask = problem.answered(tokens).float()[..., None].roll(-1, 1)
        mask[:, -1] = 0
        with problem.autocast():
            losses = net(
                input_ids=tokens.roll(-1, 1),
                attention_mask=torch.ones_like(tokens),
                target=logits.roll(-1, 1),
                loss_mask=mask,
                hidden_states=aux,
            )[0]
        sum(0.8**i * loss for i, loss in enumerate(losses)).backward()
        update()

    return step


def speculators_arm(problem: Problem, folder: str) -> Step:
    """speculators' EAGLE-3 model; it packs all rows into one, and wants states before the norm."""
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.losses import resolve_loss_config
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig

    options = problem.options
    problem.target.save_pretrained(folder)
    layer = LlamaConfig(**_HEAD_SHAPE, vocab_size=_VOCAB, num_hidden_layers=1, pad_token_id=0)
    layer._attn_implementation = "sdpa"  # flex, its default, needs compilation
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=_DRAFT,
        norm_before_residual=False,
        eagle_aux_hidden_state_layer_ids=[layer + 1 for layer in _TAPS],
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=options.ttt)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=folder, architectures=["LlamaForCausalLM"]),
        ),
    )
    net = Eagle3DraftModel(config)
    net.load_vocab_mappings(problem.mask, problem.offsets)
    net.load_verifier_weights()
    net.lm_head.weight.requires_grad_(True)
    update = optimiser(net, 1.0, fused=options.same_optimiser)
    loss_config = resolve_loss_config("kl_div", "eager")
    before: dict[str, Tensor] = {}
    problem.target.model.norm.register_forward_pre_hook(
        lambda _, inputs: before.__setitem__("norm", inputs[0])
    )

    def step(tokens: Tensor) -> None:
        rows, length = tokens.shape
        aux, _ = problem.read(tokens)
        slots = rows * (length - 1)
        with problem.autocast():
            loss = net(
                hidden_states=aux[:, :-1].reshape(1, slots, -1),
                input_ids=tokens[:, 1:].reshape(1, -1),
                document_ids=torch.arange(rows).repeat_interleave(length - 1)[None],
                loss_mask=problem.answered(tokens)[:, 1:].reshape(1, slots).float(),
                position_ids=torch.arange(1, length).repeat(rows)[None],
                verifier_last_hidden_states=before["norm"][:, 1:].reshape(1, slots, -1),
                ttt_steps=options.ttt,
                ttt_step_loss_decay=0.8,
                loss_config=loss_config,
            )[1]
        loss.backward()
        update()

    return step


ARMS = {"specdec": specdec_arm, "specforge": specforge_arm, "speculators": speculators_arm}


def main() -> None:
    """Measures and prints the table."""
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)

    def segment(step: Step) -> None:
        for batch in torch.randint(_VOCAB, (options.steps, options.rows, options.length)):
            step(batch)

    with tempfile.TemporaryDirectory() as folder:
        problem = Problem.make(options)
        steps = {name: arm(problem, folder) for name, arm in ARMS.items() if find_spec(name)}
        arms = {name: lambda _, step=step: segment(step) for name, step in steps.items()}
        seconds = time_arms(arms, 1, options.segments, time.process_time)
    tokens = options.rows * options.length * options.steps * options.segments
    kind = "bf16 autocast" if options.bf16 else "fp32"
    sizes = f"{options.rows} x {options.length} tokens, {options.prompt} of a row without a loss"
    adam = "this library's" if options.same_optimiser else "each trainer's own"
    print(f"\n{sizes}, TTT {options.ttt}, {kind}, {adam} optimiser, one thread\n")
    print("| trainer | tokens per CPU-second | specdec's speed over it (95 % interval) |")
    print("|---|---|---|")
    for name, [taken] in seconds.items():
        gain = ratio([taken], seconds["specdec"])
        print(f"| {name} | {tokens / sum(taken):,.0f} | {gain} |")


if __name__ == "__main__":
    main()
