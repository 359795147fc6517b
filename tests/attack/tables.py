"""Tables of hostile values: what stands where a name, a number, a size or a path is expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WORK = ("limit", "pairs", "repetitions")
"""Options whose large values are no attack but much to do."""

NAMES = (
    "", " ", "\0", "a\0b", "a\udcff", "\ud800", "x" * 300, "x/" + "y" * 300, "x" * 5000, "/" * 3000,
    "~nosuchuser/x", "~", "/no/such", "./nope", "..", "/", "owner/name", "owner/name/more",
    "noslash", "owner/na me", "-", "http://127.0.0.1:9/x", "C:\\x", "owner/..", "%s{}", "\n",
    "\x1b[31m", "datasets/x/y", "a--b/c", ".", "\uff41/\uff42", "*",
)  # fmt: skip
"""Names of models and heads that lead nowhere."""

NUMBERS = ("-1", "0", "nan", "inf", "-inf", "1e400", "9" * 30, "x", "", "1.5", "0x10", "\u0661",
           " 1", "2147483647", "-9223372036854775809", "1_0", "true", "1e-320", "\0",
           "4097")  # fmt: skip
"""What is given to options that take numbers."""

SIZES: Sequence[Any] = (-1, 0, 10**9, 10**12, 1.5, "2", None, [], {}, [1, 2], True, "x" * 400)
"""What stands where a configuration has a size."""

MODEL_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings",
                "rms_norm_eps", "rope_parameters", "hidden_act", "model_type", "architectures",
                "dtype", "eos_token_id", "tie_word_embeddings", "initializer_range",
                "attention_dropout", "quantization_config", "auto_map", "layer_types",
                "transformers_version", "attention_bias", "use_cache",
                "rope_parameters.rope_theta", "rope_parameters.rope_type")  # fmt: skip
HEAD_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
               "num_key_value_heads", "head_dim", "vocab_size", "draft_vocab_size",
               "max_position_embeddings", "rms_norm_eps", "rope_parameters", "hidden_act",
               "model_type", "architectures", "target_hidden_size", "norm_before_residual",
               "eagle_config", "dtype", "attention_bias")  # fmt: skip
OUTPUTS = ("", ".", "/proc", "/proc/self/x", "/dev/full", "/dev/null/x", "LOCKED/x", "FILE/x",
           "x" * 300, "a\0b", "a\udcff", "~nosuchuser/x", "LOOP", "FIFO", "MODEL",
           "LINK")  # fmt: skip
"""Where results cannot go; words in capitals stand for places."""

GENERATION_SETTINGS: Sequence[tuple[str, Any]] = (
    ("eos_token_id", "x"), ("eos_token_id", [[]]), ("max_length", -1), ("temperature", "x"),
    ("num_beams", 10**9), ("pad_token_id", 10**9), ("suppress_tokens", [10**9]),
    ("repetition_penalty", -1),
)  # fmt: skip
TOKENIZER_SETTINGS: Sequence[tuple[str, Any]] = (
    ("tokenizer_class", "Nope"), ("model_max_length", "x"), ("eos_token", 5), ("chat_template", 7),
    ("auto_map", {"a": "b"}), ("tokenizer_class", "GPT2Tokenizer"),
)  # fmt: skip
SIDECAR_SETTINGS: Sequence[tuple[str, Any]] = (
    ("version", 99), ("dialect", []), ("config", []), ("fingerprint", 1), ("num_target_layers", -1),
    ("num_target_layers", 10**9), ("facts", []), ("engine", {}), ("format", "x"),
)  # fmt: skip
"""Settings that make no sense, of the files beside a configuration."""

USAGE: Sequence[tuple[str, ...]] = (
    (), ("nope",), ("generate", "--nope"), ("generate", "--prompt"), ("data",),
    ("data", "nope"), ("bench",), ("bench", "nope"), ("train", "x"), ("inspect",),
    ("convert", "x"), ("bench", "gate", "x"), ("bench", "report"), ("--", "x"),
    ("generate", "--prompt", "x", "--prompt", "y", "--option"), ("--nope", "x"),
    ("generate", "--dtype", "int3"), ("demo", "--sample", "maybe"),
    ("\0",), ("a\udcff",), ("x" * 5000,), ("",), ("train", "--betas", "1"),
    ("generate", "--chat", "--prompt", "x"), ("generate", "--prompt", ""),
    ("generate", "--prompt", "a\udcff"), ("generate", "--prompt", "a\0b\ud800"),
    ("generate",), ("bench", "replay"), ("bench", "tune"), ("data", "features"),
    ("data", "prepare"), ("data", "regenerate"), ("data", "doctor"), ("train",),
    ("inspect", "HEAD", "--probe"), ("inspect", "HEAD", "--set", "x"),
    ("inspect", "HEAD", "--set", "=1"), ("inspect", "HEAD", "--set", "hidden_size=x"),
    ("inspect", "HEAD", "--set", "nope=1"), ("inspect", "HEAD", "--set", "rope=[]"),
    ("inspect", "HEAD", "--set", "aux_output_layers=[[]]"),
    ("inspect", "HEAD", "--set", "aux_output_layers=" + "[" * 99_999),
    ("convert", "HEAD", "new", "--set", "head_dim=-1"),
    ("generate", "--prompt", "x", "--option", "a=b"),
    ("generate", "--prompt", "x", "--device", "nope"),
    ("doctor", "--device", ""), ("doctor", "--device", "cuda:99"),
    ("demo", "--device", "meta"), ("doctor", "--device", "cpu:x"),
    ("doctor", "--device", "mps"), ("doctor", "--device", "a\0b"),
    ("bench", "run", "--arms", "nope"), ("bench", "run", "--arms", ""),
    ("bench", "run", "--arms", "lookahead:window"),
    ("bench", "run", "--arms", "lookahead:window=x"),
    ("bench", "run", "--arms", "server:"), ("bench", "run", "--arms", "server:x:y"),
    ("bench", "run", "--arms", "server:http://127.0.0.1:9"),
    ("bench", "run", "--tasks", "nope"), ("bench", "run", "--tasks", "mt_bench"),
    ("bench", "tune", "--output", "t.json", "--methods", "nope"),
    ("bench", "tune", "--output", "t.json", "--methods", ","),
    ("bench", "replay", "ANSWERS", "--tokenizer", "demo", "--methods", "nope"),
    ("bench", "replay", "ANSWERS", "--tokenizer", "demo", "--methods", "suffix:x=1"),
    ("data", "regenerate", "--input", "demo", "--output", "o.jsonl", "--method", "nope"),
    ("data", "prepare", "--input", "demo", "--output", "o", "--template-option", "x"),
    ("data", "prepare", "--input", "ROWS", "--output", "o", "--target", "demo",
    "--template-option", "x=" + "[" * 99_999),
)  # fmt: skip
"""Arguments that make no sense; HEAD and FILE stand for good ones."""

_SHORT = "generate --prompt=abcab --max-new-tokens=4 --model={}"
GENERATE = _SHORT.format("MODEL")
_MEASURE = "bench run --limit=1 --max-new-tokens=16 --pairs=1 --prompt-tokens=16 --output=r.jsonl"
_TUNE = "bench tune --methods=prompt_lookup --limit=1 --max-new-tokens=16"
_PREPARE = "data prepare --output=o --draft-vocab=64"
_ANSWER = "data regenerate --output=o.jsonl --limit=1 --max-new-tokens=4"
_TRAIN = "train --output=run --max-steps=0"

BASES = {
    "demo": "--max-new-tokens=4 --prompts=1 --repetitions=1",
    "generate": "--model=MODEL --prompt=ab --method=none --sample",
    "train": "--data=DATA --output=run --max-steps=0",
    "data prepare": "--input=ROWS --output=o --draft-vocab=64",
    "data regenerate": "--input=ROWS --output=o.jsonl --limit=1 --max-new-tokens=4",
    "data doctor": "--data=DATA",
    "data features": "--data=DATA --output=o",
    "inspect": "HEAD",
    "bench run": _MEASURE.removeprefix("bench run ") + " --target=MODEL --arms=hf",
    "bench tune": "--target=MODEL --output=t.json --methods=none",
    "bench replay": "ANSWERS --tokenizer=demo",
    "bench gate": "RESULTS RESULTS",
}
"""Command -> options with which it does little."""

NAME_TAKERS = (
    "generate --prompt=x --model=NAME",
    "doctor --model=NAME",
    "inspect -- NAME",
    "inspect HEAD --target=NAME",
    "convert --to=specforge -- NAME new",
    "generate --prompt=x --method=eagle3 --option=draft=NAME",
    "generate --prompt=x --method=draft_model --option=draft=NAME",
    _TRAIN + " --data=DATA --target=NAME",
    _TRAIN + " --data=DATA --init-from=NAME",
    _PREPARE + " --input=ROWS --target=NAME",
    _PREPARE + " --input=ROWS --draft-vocab-of=NAME",
    _PREPARE + " --input=NAME",
    "data doctor --data=NAME",
    "bench run --target=NAME",
    "bench run --arms=eagle3 --head=NAME",
    "bench run --arms=draft_model --draft=NAME",
    "bench tune --output=t.json --target=NAME",
    "bench replay ANSWERS --tokenizer=NAME",
)
"""What takes the name of a model, a head or data."""

MODEL_TAKERS = (
    _SHORT.format("NAME") + " --method=none",
    "doctor --model=NAME",
    GENERATE + " --method=draft_model --option=draft=NAME",
    _PREPARE + " --input=ROWS --target=NAME",
    _SHORT.format("NAME") + " --method=prompt_lookup --stats",
    _ANSWER + " --input=ROWS --target=NAME",
    "inspect HEAD --target=NAME",
    _MEASURE + " --arms=hf --target=NAME",
    "convert HEAD new --target=NAME",
    _TRAIN + " --data=DATA --target=NAME",
    _TUNE + " --output=t.json --target=NAME",
    "bench replay ANSWERS --tokenizer=NAME",
)
"""What loads a model, or its tokenizer or configuration."""

HEAD_TAKERS = (
    "inspect NAME",
    GENERATE + " --method=eagle3 --option=draft=NAME",
    "convert NAME new",
    "inspect NAME --target=MODEL",
    GENERATE + " --method=draft_model --option=draft=NAME",
    _TRAIN + " --data=OWN_DATA --target=MODEL --init-from=NAME",
    "data prepare --output=o --input=ROWS --target=MODEL --draft-vocab-of=NAME",
    _MEASURE + " --target=MODEL --arms=eagle3 --head=NAME",
)
"""What loads a head."""

FILE_TAKERS = (
    "generate --method=none --max-new-tokens=4 --model=MODEL --file=NAME",
    _PREPARE + " --input=NAME",
    _PREPARE + " --input=ROWS --chat-template=NAME",
    "inspect HEAD --target=MODEL --probe --new-tokens=8 --prompts=NAME",
    "bench replay NAME --tokenizer=demo",
    _MEASURE + " --target=MODEL --arms=hf --tasks=NAME",
    "bench report NAME --output=o",
    "bench gate RESULTS NAME",
    "data doctor --target=demo --data=NAME",
    _TRAIN + " --data=DATA --deepspeed=NAME",
    "bench replay ANSWERS --tokenizer=demo --prompts=NAME",
    _ANSWER + " --input=NAME",
    _TRAIN + " --data=NAME",
    "data features --output=o --data=NAME",
    _TRAIN + " --data=DATA --features=NAME",
    _ANSWER + " --input=ROWS --chat-template=NAME",
)
"""What reads a file or a folder."""

OUTPUT_TAKERS = (
    "data prepare --input=ROWS --draft-vocab=64 --output=NAME",
    "data regenerate --input=ROWS --limit=1 --max-new-tokens=4 --output=NAME",
    "data features --data=DATA --output=NAME",
    "train --data=DATA --max-steps=0 --output=NAME",
    "bench run --target=MODEL --arms=hf --limit=1 --max-new-tokens=16 --pairs=1 --output=NAME",
    "bench replay ANSWERS --tokenizer=demo --output=NAME",
    "bench report RESULTS --output=NAME",
    "convert HEAD -- NAME",
    _TUNE + " --target=MODEL --output=NAME",
)
"""What writes."""

QUIET_TAKERS = ("doctor", GENERATE + " --method=none", "--help", "--version", "inspect HEAD",
                "bench gate RESULTS RESULTS",
                "bench replay ANSWERS --tokenizer=demo", "nope")  # fmt: skip
"""Run with a standard output that takes nothing."""

HOMES = ("/dev/null", "/proc/none", "a\nb", "relative", "LOCKED", "", None)
"""What HOME is set to; None removes it."""

HOME_READERS = (
    GENERATE + " --method=none",
    "doctor",
    "generate --file=~/x",
    "inspect ~/head",
)
HOME_WRITERS = (
    GENERATE + " --method=suffix --option=store=~/store",
    "bench report RESULTS --output=~/r",
    _PREPARE + " --input=ROWS",
)
"""Run with such a home; the latter not where it would be a real one."""
