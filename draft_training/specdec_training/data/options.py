"""What `specdec data` can be told: one frozen dataclass per subcommand.

Field docstrings are the help texts. Imports nothing heavy, so that the help answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from specdec.artifacts.arguments import Flag, N, X, arg, each


def _required(metavar: str, more: str = "") -> Any:
    """As `_arg`, for what must be given; checked where it is used, with a message of our own."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(required{more})")


_Inputs = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, _required("NAME", "; repeatable")]
_Pairs = Annotated[tuple[str, ...], *each("NAME=VALUE", "none")]
_Names = Annotated[tuple[str, ...], *each("NAME", "none")]


@dataclass(frozen=True)
class ReadOptions:
    """Where rows come from."""

    input: _Inputs = ()
    """File or folder (JSONL, JSON, Parquet, text), Hugging Face data set, or the bundled demo."""
    split: Annotated[str, arg("NAME", "train")] = "train"
    """Split of a Hugging Face data set."""
    subset: Annotated[str | None, arg("NAME")] = None
    """Configuration of a Hugging Face data set."""
    limit: Annotated[int | None, arg("N", "all")] = None
    """Read only the first N rows."""
    as_chat: Flag = False
    """Read a prompt (and its completion) as turns of a conversation."""
    ignore_field: _Names = ()
    """Read rows and their turns as if they had no field of this name."""
    min_lines: Annotated[int, N] = 4
    """Fewest lines of a piece of the bundled corpus."""
    max_lines: Annotated[int, N] = 24
    """Most lines of a piece of the bundled corpus."""
    seed: Annotated[int, N] = 0
    """Seed of everything that is drawn."""
    max_bad_fraction: Annotated[float, X] = 0.01
    """Largest share of bad rows; above it, nothing is written."""


@dataclass(frozen=True)
class DataPrepareOptions(ReadOptions):
    """Turn conversations into token ids with a loss mask, and choose the draft vocabulary."""

    target: Annotated[str, arg("NAME", "the bundled toy")] = "demo"
    """Folder or hub id of the target; demo is the bundled toy."""
    output: Annotated[Path | None, _required("FOLDER")] = None
    """Folder to write."""
    overwrite: Flag = False
    """Replace prepared data that are already there."""
    max_length: Annotated[int, N] = 2048
    """Most tokens of an example; a text goes on in the next one, what else is longer is cut."""
    draft_vocab: Annotated[int, N] = 32000
    """Size of the draft vocabulary; at least the target's vocabulary means all of it."""
    draft_vocab_of: Annotated[str | None, arg("HEAD", "the most frequent tokens")] = None
    """Take the draft vocabulary of this head, or of demo, instead, to train it further."""
    held_out: Annotated[int, N] = 64
    """Prompts kept out of training, to measure acceptance on; at most a tenth of the rows."""
    held_out_input: Annotated[tuple[str, ...], *each("NAME", "--input")] = ()
    """Where these prompts come from instead; demo-held-out: modules that the toy never saw."""
    chat_template: Annotated[Path | None, arg("FILE", "the tokenizer's own")] = None
    """Jinja template to render conversations with."""
    template_option: _Pairs = ()
    """Variable of the chat template, for example enable_thinking=false."""
    turns: Literal["all", "each", "last"] = "all"
    """Assistant turns to learn: all in one example, each in an example of its own, or the last."""
    num_proc: Annotated[int, N] = 1
    """Processes that tokenise."""
    cache_dir: Annotated[Path | None, arg("FOLDER", "that of Hugging Face datasets")] = None
    """Where tokenised rows are kept for the next run with the same options."""


@dataclass(frozen=True)
class DataRegenerateOptions(ReadOptions):
    """Let the target write the answers itself, which is what a draft head has to predict."""

    target: Annotated[str, arg("NAME", "the bundled toy")] = "demo"
    """Folder or hub id of the target; demo is the bundled toy."""
    output: Annotated[Path | None, _required("FILE")] = None
    """JSONL file to write; one that is there is continued."""
    batch_size: Annotated[int, N] = 32
    """Prompts that are answered at the same time."""
    max_new_tokens: Annotated[int, N] = 256
    """Longest answer."""
    temperature: Annotated[float, X] = 0.7
    """Sampling temperature; 0 takes the likeliest token."""
    top_p: Annotated[float, X] = 1.0
    """Nucleus sampling: smallest set with this probability."""
    max_prompt: Annotated[int | None, arg("N", "what the context leaves")] = None
    """Longest prompt in tokens; longer ones are skipped."""
    drop_loops: Flag = False
    """Cut an answer where it falls into a repetition loop."""
    chat_template: Annotated[Path | None, arg("FILE", "the tokenizer's own")] = None
    """Jinja template to render conversations with."""
    template_option: _Pairs = ()
    """Variable of the chat template, for example enable_thinking=false."""
    method: str = "none"
    """Drafting method to generate with; none is plain generate."""
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"] = "auto"
    """Arithmetic; auto takes the checkpoint's own, and float32 for the bundled toy."""
    device: str = "auto"
    """Torch device; auto takes a CUDA device where there is one."""
    threads: Annotated[int | None, arg("N", "1 for the bundled toy, else torch's choice")] = None
    """Torch threads."""


@dataclass(frozen=True)
class DataDoctorOptions:
    """Look at prepared data before they are trained on."""

    data: Annotated[str | None, _required("NAME")] = None
    """Folder that `specdec data prepare` wrote, or an input of it."""
    target: Annotated[str | None, arg("NAME", "not checked")] = None
    """Target to compare the data with: fingerprint, round trip, share of its own tokens."""
    max_length: Annotated[int, N] = 2048
    """Most tokens of an example, for data that are not prepared yet."""
    chat_template: Annotated[Path | None, arg("FILE", "the tokenizer's own")] = None
    """Jinja template to render conversations with, for data that are not prepared yet."""
    template_option: _Pairs = ()
    """Variable of the chat template, for data that are not prepared yet."""
    as_chat: Flag = False
    """Read a prompt and its completion as turns, for data that are not prepared yet."""
    ignore_field: _Names = ()
    """Read rows as if they had no field of this name, for data that are not prepared yet."""
    examples: Annotated[int, N] = 8
    """Examples that the target reads."""
    sample: Annotated[int, N] = 1
    """Examples to print, with the tokens to learn in green."""
    sample_tokens: Annotated[int, N] = 400
    """Longest printed example."""
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"] = "auto"
    """Arithmetic of the target."""
    device: str = "auto"
    """Torch device of the target."""
    no_colour: Flag = False
    """Never colour the tokens. Also when NO_COLOR is set or the output is no terminal."""
