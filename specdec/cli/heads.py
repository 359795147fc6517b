"""`specdec inspect` and `specdec convert`: what a draft head is, and how to write it otherwise."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec import demo
from specdec.artifacts.target_fingerprint import TargetFingerprint
from specdec.artifacts.terminal import colour_wanted, facts, say, say_next, wrapped
from specdec.cli.head_options import ConvertOptions, InspectOptions
from specdec.cli.probing import show_probe
from specdec.errors import ConfigError, SpecdecError
from specdec.heads.checkpoints.aux_layers import hidden_states_ids, sglang_ids
from specdec.heads.checkpoints.legacy import has_legacy_weights, legacy_tensors
from specdec.heads.checkpoints.load import (
    HeadDescription,
    LoadedHead,
    build_head,
    describe_head,
    locate_head,
    read_head_config,
    save_head,
)
from specdec.heads.checkpoints.save import check_destination
from specdec.heads.checkpoints.strict_files import LEGACY, StoredTensors, stored_tensors
from specdec.heads.checkpoints.tensors import EMBEDDINGS, LM_HEAD, check_numbers
from specdec.heads.checkpoints.write_dialects import unknown_flags
from specdec.loading import TOY, load_config, load_model, load_tokenizer

_RED, _YELLOW, _RESET = "\x1b[31m", "\x1b[33m", "\x1b[0m"
_FLAGS = (
    "norm_before_residual", "norm_before_fc", "fc_norm", "feed_post_norm", "qk_norm",
    "attention_bias", "fc_bias", "output_bias", "mlp_bias",
)  # fmt: skip
# Of these, a larger `max_position_embeddings` leaves the rotary table as it is.
_ROPES_OF_ANY_LENGTH = ("default", "llama3", "linear")


def run_inspect(options: InspectOptions) -> int:
    """Runs `specdec inspect`; 1 when the head is another target's, else 0."""
    if options.probe and options.target is None:
        raise ConfigError("--probe needs --target NAME: it drafts along that model's own text")
    if options.prompts is not None and not options.probe:
        raise ConfigError("--prompts needs --probe")
    if options.new_tokens < 8:
        raise ConfigError(f"--new-tokens must be at least 8, got {options.new_tokens}")
    colour = colour_wanted(sys.stdout, options.no_colour)
    chosen = settings(options.set)
    folder = locate_head(options.head)
    stored = stored_tensors(folder)
    found = describe_head(folder, stored, overrides=chosen, layers_needed=False)
    for name in stored.infos:
        check_numbers(stored.read([name]))
    target, problem = _target(options.target), ""
    if target is not None:
        try:
            found = describe_head(
                folder, stored, target=target, overrides=chosen, layers_needed=False
            )
        except ConfigError as refusal:
            problem = str(refusal)
    _show(options, found, target, colour)
    if problem:
        say(_paint(wrapped(f"{options.target}: {problem}"), _RED, colour))
        return 1
    if options.target is not None:
        say(f"compared with {options.target}: nothing differs")
    if options.probe:
        show_probe(options, build_head(found, stored).head, found)
    return 0


def run_convert(options: ConvertOptions) -> int:
    """Runs `specdec convert`."""
    colour = colour_wanted(sys.stdout, options.no_colour)
    folder = locate_head(options.source, legacy=True)
    check_destination(options.destination, folder, options.overwrite)
    stored = _stored(folder, colour)
    target = _target(options.target)
    found = describe_head(folder, stored, target=target, overrides=settings(options.set))
    if found.num_target_layers is None:
        raise ConfigError(
            "the head does not say how many layers its target has, by which layers are counted; "
            "name the target: --target NAME"
        )
    loaded = build_head(found, stored)
    _assumed(loaded.assumed, colour)
    made = _facts(options, found)
    if options.target is not None:
        made |= _use_target(options, loaded, colour)
    save_head(
        loaded.head,
        options.destination,
        dialect=options.to,
        engine=None if options.engine == "any" else options.engine,
        fingerprint=target or found.fingerprint,
        num_target_layers=found.num_target_layers,
        facts=made,
        dtype=None if options.dtype == "auto" else getattr(torch, options.dtype),
    )
    read_head_config(options.destination)  # what was written is what loads
    engine = "" if options.engine == "any" else f" for {options.engine}"
    say(f"wrote {options.destination}: {options.to}{engine}, from {found.dialect}")
    unknown = [] if engine else unknown_flags(loaded.head.config, options.to)
    if unknown:
        text = (
            f"{', '.join(unknown)}: specdec reads this back, and --engine says whether an engine "
            f"does; the trainer that {options.to} comes from does not, and would draft badly"
        )
        say(_paint(wrapped(text), _YELLOW, colour))
    compared = () if options.target is None else ("--target", options.target)
    say_next("see what it is now", "inspect", options.destination, *compared)
    return 0


def settings(pairs: Sequence[str]) -> dict[str, Any]:
    """`norm_before_residual=true` and the like as values; lists and numbers as in JSON.

    Raises:
        ConfigError: A pair is no NAME=VALUE.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign or not name.strip():
            raise ConfigError(
                f"--set takes NAME=VALUE, for example norm_before_residual=true, got {pair!r}"
            )
        try:
            found[name.strip().replace("-", "_")] = json.loads(text)
        except (ValueError, RecursionError):
            found[name.strip().replace("-", "_")] = text
    return found


def _paint(text: str, code: str, colour: bool) -> str:
    return f"{code}{text}{_RESET}" if colour else text


def _target(name: str | None) -> TargetFingerprint | None:
    if name is None:
        return None
    try:
        tokenizer = load_tokenizer(name)
    except SpecdecError:
        tokenizer = None  # without one, the sizes have to do
    return TargetFingerprint.of(load_config(name), tokenizer)


def _stored(folder: Path, colour: bool) -> StoredTensors:
    if not has_legacy_weights(folder):
        return stored_tensors(folder)
    text = (
        f"warning: {folder / LEGACY} is a pickle; it is opened by PyTorch's restricted loader, "
        "which builds nothing but tensors. Convert only heads whose origin you trust."
    )
    say(_paint(wrapped(text), _RED, colour), sys.stderr)
    return legacy_tensors(folder)


def _use_target(options: ConvertOptions, loaded: LoadedHead, colour: bool) -> dict[str, Any]:
    """Takes from the target what the dialect keeps and the head lacks; facts about the target."""
    head = loaded.head
    model = load_model(options.target, "auto", "cpu")
    output = model.get_output_embeddings()
    inputs = model.get_input_embeddings().weight
    if head.embed_tokens is not None:
        own = head.embed_tokens.weight
        same = inputs.shape[1] == own.shape[1] and torch.equal(own, _like(inputs, own))
        if same:
            head.owns_embeddings = False
        elif options.engine == "sglang":
            raise ConfigError(
                "embed_tokens of the head differ from the target's, and sglang always takes the "
                "target's: the head would draft badly; export it for vllm"
            )
        else:
            say(_paint("the head has embeddings of its own, which are kept", _YELLOW, colour))
    head.attach(inputs, None if output is None else output.weight)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    kind = head.config.rope.get("rope_type")
    if isinstance(longest, int) and kind in _ROPES_OF_ANY_LENGTH:
        most = max(longest, head.config.max_position_embeddings)
        head.config = replace(head.config, max_position_embeddings=most)
    architectures = list(model.config.architectures or [])
    name = options.target
    if name == TOY and options.to == "speculators":  # its readers load the target by this name
        name = str(demo.target_path())
    return {"target": name, "target_architectures": architectures}


def _like(inputs: Tensor, own: Tensor) -> Tensor:
    return inputs.detach()[: len(own)].to(own)


def _facts(options: ConvertOptions, found: HeadDescription) -> dict[str, Any]:
    source = {"name": _public(options.source), "dialect": found.dialect}
    return {**found.facts, "converted_from": source}


def _public(name: str) -> str:
    """A hub id, or the last part of a path: a checkpoint is handed on, and homes are private."""
    return Path(name).expanduser().name if Path(name).expanduser().exists() else name


def _assumed(sentences: Sequence[str], colour: bool) -> None:
    for sentence in sentences:
        say(_paint(wrapped(f"assumed: {sentence}", 9), _YELLOW, colour))


def _show(
    options: InspectOptions, found: HeadDescription, target: TargetFingerprint | None, colour: bool
) -> None:
    config = found.config
    engine = f", written for {found.engine}" if found.engine else ""
    weights = {n: t for n, t in found.tensors.items() if n not in ("d2t", "t2d")}
    sizes = {n: _numel(t.shape) for n, t in weights.items()}
    own = sum(sizes.values()) - sizes.get(EMBEDDINGS, 0)
    count = f"{own:,}"
    if EMBEDDINGS in sizes:
        count += f", and {sizes[EMBEDDINGS]:,} of embeddings"
    if LM_HEAD not in sizes:
        count += "; the output matrix is the target's"
    window = config.sliding_window
    lines = [
        ("dialect", f"{found.dialect}{engine}"),
        ("parameters", f"{count}, {' and '.join(sorted({t.dtype for t in weights.values()}))}"),
        ("hidden size", f"{config.hidden_size}, MLP {config.intermediate_size}"),
        (
            "attention",
            f"{config.num_attention_heads} heads of {config.head_dim}, {config.num_key_value_heads}"
            f" for keys and values, {f'the newest {window}' if window else 'all'} positions",
        ),
        ("positions", f"{_rope(config.rope)}, made for {config.max_position_embeddings:,}"),
        ("draft ids", f"{config.draft_vocab_size:,} of the target's {config.vocab_size:,}"),
        ("target", _made_for(found)),
    ]
    say(f"draft head {options.head}")
    say("\n".join(facts(lines, indent=2)))
    say("layers of the target that it reads")
    say("\n".join(facts(_layers(found, target), indent=2)))
    say("flags")
    say("\n".join(facts([(n, "yes" if getattr(config, n) else "no") for n in _FLAGS], indent=2)))
    if found.facts:
        say("facts")
        say("\n".join(facts([(n, f"{v}"[:200]) for n, v in found.facts.items()], indent=2)))
    _assumed(found.assumed, colour)
    if found.assumed and not options.probe:
        name = options.target or "NAME"
        say(f"`specdec inspect {options.head} --target {name} --probe` tries what can be tried")


def _rope(rope: Mapping[str, Any]) -> str:
    more = {k: v for k, v in rope.items() if k not in ("rope_type", "rope_theta")}
    kind = rope.get("rope_type", "default")
    return f"rotary ({kind}), base {rope.get('rope_theta', 0):,.0f}{f', {more}' if more else ''}"


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _made_for(found: HeadDescription) -> str:
    made, width = found.fingerprint, found.config.target_hidden_size
    if made is None:
        layers = found.num_target_layers
        return f"hidden size {width}, {layers or 'unknown number of'} layers; no fingerprint"
    tokenizer = f"tokenizer {made.tokenizer[:12]}" if made.tokenizer else "no tokenizer recorded"
    return f"{made.model_type}, hidden size {width}, {made.num_hidden_layers} layers, {tokenizer}"


def _layers(found: HeadDescription, target: TargetFingerprint | None) -> list[tuple[str, str]]:
    """The same layers in every way of counting them."""
    layers = found.config.aux_output_layers
    if not found.layers_known:
        return [
            ("unknown", f"{len(layers)} of them; the checkpoint names none, --target NAME tells")
        ]
    made = target or found.fingerprint
    lines = [
        ("output of layer", f"{list(layers)} (specdec, SpecForge, ModelOpt)"),
        ("hidden_states", f"{hidden_states_ids(layers)} (Hugging Face, vLLM, speculators)"),
    ]
    try:
        kind = None if made is None else made.model_type
        if kind is None or found.num_target_layers is None:
            ids = "depends on the target's class"
        else:
            ids = str(sglang_ids(layers, kind, found.num_target_layers) or "left out: the default")
    except ConfigError as problem:
        ids = str(problem)
    return [*lines, ("for SGLang", ids)]
