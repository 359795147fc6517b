"""`specdec train`: from options to a trained head, and the table at the end."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from specdec.artifacts.atomic_files import make_folder
from specdec.artifacts.run_lock import RunLock
from specdec.artifacts.target_fingerprint import TargetFingerprint
from specdec.artifacts.terminal import colour_wanted, say, say_next
from specdec.errors import ConfigError, SpecdecError
from specdec.heads.checkpoints.load import load_head, save_head
from specdec.heads.eagle3.config import Eagle3Config
from specdec.heads.eagle3.head import Eagle3Head
from specdec.heads.ready import has_bf16_products
from specdec.loading import load_config, load_model, load_tokenizer, pick_device, sentence
from specdec_training.contracts import FeatureSource
from specdec_training.data.batches import RowSampler, Sizes
from specdec_training.data.prepared import PreparedData
from specdec_training.features.cache import CachedFeatures
from specdec_training.features.layers import chosen_layers
from specdec_training.features.online import OnlineFeatures
from specdec_training.features.target_output import weights_hash
from specdec_training.run.evaluate import Acceptance, AcceptanceMeter, DraftShape
from specdec_training.run.folder import check_run_folder
from specdec_training.run.options import TrainOptions, check_train_options, resolved
from specdec_training.run.progress import summary
from specdec_training.run.provenance import provenance
from specdec_training.run.stepping import deepspeed_plugin
from specdec_training.run.trainer import RunParts, RunResult, Trainer

_ROPE_KINDS = ("default", "linear", "llama3", "yarn")  # what a head may copy from its target
_WAIT = datetime.timedelta(hours=2)  # for the process that measures, or loads


def run_train(options: TrainOptions) -> int:
    """Trains a head.

    Returns:
        Exit code: 0, or 128 and the signal's number when one ended the run.

    Raises:
        SpecdecError: An option, the data, the target or the folder is wrong; or training failed.
    """
    check_train_options(options)
    if options.output is None or options.data is None:
        raise ConfigError("--data and --output are missing")
    folder = options.output.expanduser()
    check_run_folder(folder)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    chosen_layers(options.taps, load_config(options.target))
    device = _device(options.device)
    if options.precision == "auto":
        fast = _bf16_is_faster(device.type)
        options = replace(options, precision="bf16" if fast else "fp32")
    accelerator = _accelerator(options, device)
    lock: Any = RunLock(folder) if accelerator.is_main_process else None
    try:
        make_folder(folder)
        if lock is not None:
            lock.__enter__()
        result = _run(options, accelerator, folder)
    except BrokenPipeError:
        raise
    except OSError as problem:
        reason, place = problem.strerror or problem, problem.filename or folder
        raise SpecdecError(f"cannot write {str(place)!r}: {reason}") from problem
    finally:
        if lock is not None:
            lock.__exit__(None, None, None)
        accelerator.end_training()
    if accelerator.is_main_process:
        _say_result(result, folder, options)
    return 0 if result.signal is None else 128 + result.signal


def _run(options: TrainOptions, accelerator: Any, folder: Path) -> RunResult:
    data = PreparedData.load(options.data)  # type: ignore[arg-type]
    device = str(accelerator.device)
    target = load_model(options.target, options.dtype, device, options.target_device_map)
    tokenizer = load_tokenizer(options.target)
    fingerprint = TargetFingerprint.of(target.config, tokenizer)
    different = data.meta.target.differences(fingerprint)
    if different:
        raise ConfigError(f"--data was prepared for another target: {'; '.join(different)}")
    options = resolved(options, target.config.get_text_config().hidden_size)
    torch.manual_seed(options.seed)
    head = make_head(options, target, data, accelerator.device)
    longest = _longest(options, target)
    sampler = RowSampler(Sizes.of(data.examples, longest), longest, options.seed)
    facts = {
        "data": data.meta.data_hash,
        "vocabulary": data.meta.vocab_hash,
        "target": fingerprint.to_dict(),
        "layers": list(head.config.aux_output_layers),
    }
    parts = RunParts(
        head=head,
        source=_source(options, target, head, data, fingerprint),
        examples=data.examples,
        sampler=sampler,
        max_length=longest,
        meter=_meter(options, target, data),
        accelerator=accelerator,
        folder=folder,
        save_head=_saver(head, folder / "head", target, fingerprint),
        facts=facts,
        provenance=provenance(options, data.meta.data_hash, fingerprint),
    )
    return Trainer(parts, options).run()


def _device(name: str) -> torch.device:
    """The device to train on, refused at once where it cannot be used; `auto` takes any."""
    if name != "auto":
        return pick_device(name)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def _accelerator(options: TrainOptions, device: torch.device) -> Any:
    from accelerate import Accelerator, InitProcessGroupKwargs

    bf16 = options.precision == "bf16"
    try:
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        made = Accelerator(
            mixed_precision="bf16" if bf16 else "no",
            cpu=device.type == "cpu",
            deepspeed_plugin=deepspeed_plugin(options.deepspeed),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_WAIT)],
        )
    except SpecdecError:
        raise
    except (RuntimeError, ValueError, AssertionError) as problem:
        raise ConfigError(
            f"--device {options.device} with --precision {options.precision} cannot be used: "
            f"{sentence(problem)}"
        ) from problem
    if options.device != "auto" and made.device.type != device.type:
        raise ConfigError(
            f"--device {options.device} cannot be used: accelerate trains on {made.device.type}"
        )
    return made


def _bf16_is_faster(kind: str) -> bool:
    """Whether bf16 matrix products beat fp32: on a CPU it depends on the instruction set."""
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return kind == "cpu" and has_bf16_products()


def _longest(options: TrainOptions, target: Any) -> int:
    """Tokens of the longest document: the option, or what the target's context holds."""
    context = getattr(target.config.get_text_config(), "max_position_embeddings", None)
    longest = options.max_length or 2048
    return min(longest, context) if context else longest


def head_config(options: TrainOptions, model_config: Any, draft_vocab: int) -> Eagle3Config:
    """The shape of a new head: that of one layer of the target.

    Args:
        options: Flags of the head, and the widths that differ from the target's.
        draft_vocab: D, tokens that the head can propose.
    """
    text = model_config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or max(text.hidden_size // 64, 1)
    middle = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return Eagle3Config(
        hidden_size=text.hidden_size,
        intermediate_size=options.intermediate_size or middle,
        num_attention_heads=heads,
        num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab_size=text.vocab_size,
        draft_vocab_size=draft_vocab,
        target_hidden_size=text.hidden_size,
        aux_output_layers=chosen_layers(options.taps, text),
        rms_norm_eps=float(getattr(text, "rms_norm_eps", None) or 1e-6),
        rope=_rope(text),
        max_position_embeddings=getattr(text, "max_position_embeddings", None) or 2048,
        norm_before_residual=options.norm_before_residual,
        fc_norm=options.fc_norm,
        feed_post_norm=options.feed_post_norm,
    )


def _rope(text: Any) -> dict[str, Any]:
    """The target's rotary parameters, where a head can have the same."""
    found = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in found.values() if isinstance(value, dict)]
    found = dict(nested[0] if nested else found)
    if found.get("rope_type") in _ROPE_KINDS and found.get("partial_rotary_factor", 1) == 1:
        return found
    return {"rope_type": "default", "rope_theta": float(found.get("rope_theta") or 10_000.0)}


def make_head(
    options: TrainOptions, target: Any, data: PreparedData, device: torch.device
) -> Eagle3Head:
    """A head in fp32 on the device: new, or the one that --init-from names.

    A new one starts with those rows of the target's output matrix that the draft vocabulary names;
    the embeddings are the target's and stay as they are.

    Raises:
        ConfigError: The shape is impossible, or the given head does not fit target and data.
    """
    embeddings = target.get_input_embeddings().weight
    output = target.get_output_embeddings().weight.detach().to(device)
    if options.init_from is not None:
        head = _loaded_head(options.init_from, target, data, device)
    else:
        config = head_config(options, target.config, data.meta.draft_vocab_size)
        head = Eagle3Head(config)
        head.set_vocabulary(data.vocabulary)
        head.to(device)
    head.attach(embeddings, output)
    if options.init_from is None and head.lm_head is not None:
        with torch.no_grad():
            head.lm_head.weight.copy_(output[data.vocabulary.ids.to(device)])
    head.owns_lm_head = True  # from here on it differs from the target's
    head.requires_grad_(True)
    if head.embed_tokens is not None:
        head.embed_tokens.requires_grad_(False)
    return head.train()


def _loaded_head(source: str, target: Any, data: PreparedData, device: torch.device) -> Eagle3Head:
    fingerprint = TargetFingerprint.of(target.config)
    head: Eagle3Head = load_head(
        source, target=fingerprint, dtype=torch.float32, device=device
    ).head
    if head.vocabulary != data.vocabulary:
        raise ConfigError(
            f"--init-from {source!r} drafts from another vocabulary than --data names; prepare the "
            f"data with --draft-vocab-of {source!r}"
        )
    return head


def _source(
    options: TrainOptions,
    target: Any,
    head: Eagle3Head,
    data: PreparedData,
    fingerprint: TargetFingerprint,
) -> FeatureSource:
    device, layers = head.fc.weight.device, head.config.aux_output_layers
    if options.features is None:
        low = torch.bfloat16 if options.precision == "bf16" else None
        return OnlineFeatures(target, layers, device, low)
    return CachedFeatures(
        options.features, data.meta.data_hash, fingerprint, layers, device, weights_hash(target)
    )


def _meter(options: TrainOptions, target: Any, data: PreparedData) -> AcceptanceMeter | None:
    if options.eval_every == 0 or not data.held_out:
        return None
    shape = DraftShape(options.depth, options.top_k, options.nodes)
    prompts = data.held_out[: options.eval_prompts]
    return AcceptanceMeter(target, prompts, options.eval_tokens, shape, options.seed)


def _saver(
    head: Eagle3Head, folder: Path, target: Any, fingerprint: TargetFingerprint
) -> Callable[[Acceptance | None], None]:
    def save(found: Acceptance | None) -> None:
        facts = {} if found is None else {
            "step": found.step, "acceptance_length": dict(found.acceptance_length)
        }  # fmt: skip
        layers = target.config.get_text_config().num_hidden_layers
        save_head(
            head,
            folder,
            fingerprint=fingerprint,
            num_target_layers=layers,
            facts=facts,
            dtype=torch.bfloat16,
        )

    return save


def _say_result(result: RunResult, folder: Path, options: TrainOptions) -> None:
    colour = colour_wanted(sys.stdout, options.no_colour)
    say(f"{result.steps} steps; {result.reason}")
    if result.skipped:
        say(f"{result.skipped} steps were skipped, see {folder / 'bad_batches.jsonl'}")
    for line in summary(result.history, result.baselines, colour):
        say(line)
    head = folder / "head"
    if head.is_dir():
        say(f"head: {head}")
        say_next(
            "write with it, and compare with plain generate",
            *("generate", "--model", options.target, "--method", "eagle3"),
            *("--option", f"draft={head}", "--prompt", "Once upon a time", "--compare"),
        )
