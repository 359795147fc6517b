"""The bundled demo target: a toy, so that the demo and the tests need no download.

It is a Llama of about 3.4 million parameters that was trained for about an hour on one CPU core on
the Python standard library. It writes text that looks like Python and knows nothing; judge a method
on the models you use, which load by name or path. The card beside its weights says how it was made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from specdec.artifacts.places import head_path, target_path

if TYPE_CHECKING:
    import torch

__all__ = ["head_path", "load_target", "load_tokenizer", "target_path"]


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
