"""The bundled demo target: a toy, so that the demo and the tests need no download.

It is a Llama of about 3.4 million parameters that was trained for about an hour on one CPU core on
the Python standard library. It writes text that looks like Python and knows nothing; judge a method
on the models you use, which load by name or path. The card beside its weights says how it was made.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.errors import SpecdecError

if TYPE_CHECKING:
    import torch

__all__ = ["head_path", "load_target", "load_tokenizer", "target_path"]


def target_path() -> Path:
    """Folder of the bundled model, in Hugging Face's format.

    Raises:
        SpecdecError: The folder is not there, or has no model in it.
    """
    path = Path(__file__).parent / "target"
    if not (path / "config.json").is_file():
        raise SpecdecError(
            f"the bundled demo target is missing: no model in {path}; install specdec again, or "
            "train it with `python -m specdec.demo.build_target`"
        )
    return path


def head_path() -> Path:
    """Folder of the bundled EAGLE-3 head, trained for the bundled model.

    Raises:
        SpecdecError: The folder is not there, or has no head in it.
    """
    path = Path(__file__).parent / "head"
    if not (path / "config.json").is_file():
        raise SpecdecError(
            f"the bundled draft head is missing: nothing in {path}; install specdec again, or "
            "train it with `make demo-head`"
        )
    return path


def load_target(dtype: torch.dtype | str | None = None) -> Any:
    """The bundled model, in evaluation mode on the CPU.

    Args:
        dtype: None for float32, in which identical text is a promise; the file holds bfloat16.
    """
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        target_path(), dtype="float32" if dtype is None else dtype, local_files_only=True
    ).eval()


def load_tokenizer() -> Any:
    """The bundled model's tokenizer: byte-level BPE, so that it takes any text."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(target_path(), local_files_only=True)
