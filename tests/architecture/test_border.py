"""Private names of Hugging Face transformers are used in `specdec/hf/` and nowhere else."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

ROOT = Path(__file__).resolve().parents[2]
BORDER = ROOT / "specdec" / "hf"
FOLDERS = ("specdec", "draft_training/specdec_training", "benchmarks/specdec_bench")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

# Modules whose names come and go with releases; the rest of transformers is documented.
UNDOCUMENTED = (
    "transformers.generation.utils",
    "transformers.generation.logits_process",
    "transformers.generation.stopping_criteria",
    "transformers.masking_utils",
    "transformers.modeling_utils",
    "transformers.utils.output_capturing",
)
CLASSES = (
    GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel, Cache, CacheLayerMixin,
)  # fmt: skip
ON_OBJECTS = {"_hf_hook", "_mask_length", "_name_or_path", "_pad_token_tensor"}
READERS = ("getattr", "hasattr", "setattr", "delattr")


def private_names() -> set[str]:
    """Names with one underscore that transformers gives to its models, settings and caches."""
    found = {name for kind in CLASSES for name in dir(kind)} - set(dir(torch.nn.Module))
    return {name for name in found | ON_OBJECTS if name.startswith("_") and name[1] != "_"}


def used_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, attribute) of every access, by a dot or by name; not of `self`'s own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in READERS:
            name = node.args[1]
            if isinstance(name, ast.Constant):
                yield node.lineno, name.value


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, full name) of everything that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def trespasses(source: str) -> list[str]:
    """What a file uses that belongs behind the border."""
    tree, private = ast.parse(source), private_names()
    found = [f"{line}: {name}" for line, name in used_names(tree) if name in private]
    for line, name in imported(tree):
        parts = name.split(".")
        hidden = any(part.startswith("_") for part in parts) or name.startswith(UNDOCUMENTED)
        if parts[0] == "transformers" and hidden:
            found.append(f"{line}: {name}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_names_stay_behind_the_border(path: Path) -> None:
    if not path.is_relative_to(BORDER):
        assert trespasses(path.read_text(encoding="utf-8")) == []


def test_the_border_has_something_to_keep() -> None:
    assert any(trespasses(path.read_text(encoding="utf-8")) for path in BORDER.glob("*.py"))


@pytest.mark.parametrize(
    "line",
    [
        "model._sample(ids)",
        "getattr(model.config, '_attn_implementation', None)",
        "settings._pad_token_tensor",
        "from transformers.generation import utils",
        "from transformers.generation.utils import GenerateOutput",
        "import transformers.masking_utils",
        "from transformers.utils import _LazyModule",
    ],
)
def test_a_trespass_is_seen(line: str) -> None:
    assert len(trespasses(line)) == 1


@pytest.mark.parametrize(
    "line", ["self._sample(ids)", "model.generate(ids)", "from transformers import DynamicCache"]
)
def test_documented_names_are_free(line: str) -> None:
    assert trespasses(line) == []
