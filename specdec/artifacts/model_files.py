"""Loads what Hugging Face's files describe, and turns whatever is wrong with them into a sentence.

Nothing in the files is believed: sizes are bounded before a class of transformers builds anything
by them, and a model of which weights are missing or not finite is refused, for it would write
nonsense. Code that comes with a checkpoint is never run.
"""

from __future__ import annotations

import logging
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.utils import logging as hub_logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from specdec.artifacts.hub import from_hub
from specdec.artifacts.places import DRAFT_MODEL, MODEL, TOY, Kind, Place, locate, shown
from specdec.audit.broken_weights import check_weights
from specdec.errors import SpecdecError, UnsupportedModelError

_LONG_LOAD_BYTES = 1_000_000_000  # above it, loading takes seconds and deserves its bar
_MESSAGE_CHARS = 200
_MOST_JSON, _MOST_VOCABULARY = 16 << 20, 256 << 20  # bytes
_FILES = {  # read whole by transformers, and named in a fixed way
    **dict.fromkeys(
        ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja",
         "chat_template.json", "special_tokens_map.json", "added_tokens.json",
         "model.safetensors.index.json"),
        _MOST_JSON,
    ),
    **dict.fromkeys(
        ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model"),
        _MOST_VOCABULARY,
    ),
}  # fmt: skip
_LARGEST = 2**31 - 1
_SIZES = {  # field of a configuration -> least and most
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers"), (1, 4096)
    ),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "vocab_size", "max_position_embeddings",
         "n_positions", "n_ctx"),
        (1, _LARGEST),
    ),
    **dict.fromkeys(
        ("intermediate_size", "num_attention_heads", "num_key_value_heads", "n_head", "head_dim"),
        (0, _LARGEST),
    ),
}  # fmt: skip
_MISPLACED = (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)


def read_config(place: Place) -> Any:
    """The configuration of a decoder-only language model, without its weights.

    Raises:
        SpecdecError: It is missing, broken, or of something else.
    """
    with loading(place) as how:
        raw, _ = transformers.PreTrainedConfig.get_config_dict(place.name, **how)
        _check_raw(raw, place.name)
        config = transformers.AutoConfig.from_pretrained(place.name, **how)
        _check_causal(place.name, config)
        return config


def read_model(
    place: Place, config: Any, dtype: Any, device_map: str | None = None, kind: Kind = MODEL
) -> Any:
    """The model with all its weights, in evaluation mode.

    Args:
        config: As `read_config` gives it.
        dtype: As `from_pretrained` takes it.
        device_map: As `from_pretrained` takes it.
        kind: What it is for, in messages.

    Raises:
        SpecdecError: The weights cannot be read, are not all there, or are not finite.
    """
    with loading(place, kind) as how:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            place.name, config=config, dtype=dtype, device_map=device_map,
            output_loading_info=True, **how,
        )  # fmt: skip
    missing = sorted(found["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise SpecdecError(
            f"{shown(place.name)} lacks weights of the {kind.what}: {missing[0]}{more}; give a "
            "whole checkpoint"
        )
    check_weights(model, shown(place.name))
    return model.eval()


def read_tokenizer(place: Place) -> Any:
    """The tokenizer beside a model.

    Raises:
        SpecdecError: There is none, or it is broken.
    """
    with loading(place, MODEL, "the tokenizer of ") as how:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place.name, **how)
        tokenizer("a")  # what is wrong in its settings may show in use alone
        return tokenizer


def read_draft_model(name: str) -> Any:
    """The draft model that a user named, in its own dtype; "demo" is the bundled model.

    Raises:
        SpecdecError: There is none, or it is broken or no causal language model.
    """
    place = locate(name, DRAFT_MODEL)
    config = read_config(place)
    return read_model(place, config, "float32" if name == TOY else "auto", kind=DRAFT_MODEL)


@contextmanager
def loading(place: Place, kind: Kind = MODEL, part: str = "") -> Iterator[dict[str, bool]]:
    """Yields how to call `from_pretrained`; its output and errors become brief.

    Args:
        kind: What they are, in messages.
        part: Of it, in messages: "the tokenizer of ".

    Raises:
        SpecdecError: Whatever goes wrong in the `with` block.
    """
    transformers_logging.set_verbosity_error()
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    if place.is_folder:
        _check_files(Path(place.name))
        if _size(Path(place.name)) < _LONG_LOAD_BYTES:
            transformers_logging.disable_progress_bar()
    try:
        # Without trust_remote_code=False, transformers would ask on the terminal whether to run
        # the repository's own code; we never do.
        how = {"local_files_only": True, "trust_remote_code": False}
        if place.is_folder:
            yield how
            return
        with from_hub(place.name, kind.what) as cached_only:
            yield {**how, "local_files_only": cached_only}
    except SpecdecError:
        raise
    except Exception as problem:  # any failure to read foreign files means that they are wrong
        raise _refusal(problem, f"{part}{shown(place.name)}", place.name) from problem
    finally:
        transformers_logging.enable_progress_bar()
        hub_logging.set_verbosity(verbosity)


def sentence(problem: BaseException) -> str:
    """The beginning of a library's message, on one line."""
    text = " ".join(str(problem).split()) or type(problem).__name__
    if len(text) <= _MESSAGE_CHARS:
        return text
    start = text[:_MESSAGE_CHARS]
    whole, stop, _ = start.rpartition(". ")
    return whole + stop.strip() if whole else start.rsplit(" ", 1)[0] + " ..."


def _refusal(problem: Exception, what: str, name: str) -> SpecdecError:
    text = str(problem)
    if "custom code" in text:
        return UnsupportedModelError(
            f"{shown(name)} brings its own code (trust_remote_code), which specdec never runs"
        )
    if "ignore_mismatched_sizes" in text:  # transformers' message points to a report in its log
        return SpecdecError(
            f"cannot load {what}: its weights have other shapes than its config.json says; one of "
            "the two is another model's"
        )
    if isinstance(problem, _MISPLACED):
        return SpecdecError(
            f"cannot load {what}: its files make no sense to transformers "
            f"({type(problem).__name__}: {sentence(problem)}); fetch them again"
        )
    return SpecdecError(f"cannot load {what}: {sentence(problem)}")


def _check_files(folder: Path) -> None:
    """Refuses what transformers would wait for, or read without end."""
    for name, most in _FILES.items():
        try:
            found = (folder / name).stat()
        except FileNotFoundError:
            continue
        except OSError as problem:
            raise SpecdecError(f"cannot read {folder / name}: {problem.strerror}") from problem
        if not stat.S_ISREG(found.st_mode):
            raise SpecdecError(f"{folder / name} is no regular file; put the file itself there")
        if found.st_size > most:
            raise SpecdecError(
                f"{folder / name} has {found.st_size:,} bytes, and no such file has more than "
                f"{most:,}; fetch it again"
            )


def _check_raw(raw: Any, name: str) -> None:
    """Refuses a configuration by which transformers would build without end, or fail deeply."""
    if not isinstance(raw, Mapping):
        raise SpecdecError(
            f"config.json of {shown(name)} must hold an object, got {type(raw).__name__}"
        )
    kind, architectures = raw.get("model_type"), raw.get("architectures") or []
    if not isinstance(kind, str | None):
        raise _wrong("model_type", name, "a name", kind)
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise _wrong("architectures", name, "a list of names", architectures)
    is_head = any("eagle" in one.lower() for one in architectures)
    if is_head or "draft_vocab_size" in raw or "speculators_model_type" in raw:
        raise UnsupportedModelError(
            f"{shown(name)} is a draft head ({', '.join(architectures) or kind}), which is no "
            "language model by itself; --method eagle3 drafts with it"
        )
    _check_sizes(raw, name)


def _check_sizes(raw: Mapping[str, Any], name: str) -> None:
    for field, value in raw.items():
        if isinstance(value, Mapping):
            _check_sizes(value, name)
        if field not in _SIZES or value is None or isinstance(value, list):
            continue  # some models have a size for every layer
        least, most = _SIZES[field]
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not least <= value <= most:
            raise _wrong(field, name, f"a whole number from {least} to {most:,}", value)


def _wrong(field: str, name: str, wanted: str, value: Any) -> SpecdecError:
    return SpecdecError(
        f"{field} in config.json of {shown(name)} must be {wanted}, got {value!r:.80}"
    )


def _check_causal(name: str, config: Any) -> None:
    """Refuses what `AutoModelForCausalLM` would load with an untrained head, or not at all."""
    found = ", ".join(config.architectures or []) or type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{shown(name)} is an encoder-decoder model ({found}); specdec needs a decoder-only one"
        )
    causal: set[str] = set()
    for entry in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        causal.update([entry] if isinstance(entry, str) else entry)
    is_known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not is_known or (config.architectures and not causal & set(config.architectures)):
        raise UnsupportedModelError(
            f"{shown(name)} is not a causal language model ({found}); specdec needs one that "
            "AutoModelForCausalLM loads with its own head"
        )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file())
