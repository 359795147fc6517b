"""What the interpreter or a version of Triton gets wrong is not written in a kernel."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FUSED = sorted((ROOT / "kernels/specdec_kernels/fused").rglob("*.py"))


def calls(tree: ast.AST, name: str) -> int:
    return sum(isinstance(node, ast.Call) and ast.unparse(node.func) == name
               for node in ast.walk(tree))  # fmt: skip


@pytest.mark.parametrize("path", FUSED, ids=lambda path: path.name)
def test_products_go_through_one_function(path: Path) -> None:
    """`_dot` widens its operands for the interpreter, which would multiply bits of bfloat16."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    within = [node for node in ast.walk(tree)
              if isinstance(node, ast.FunctionDef) and node.name == "_dot"]  # fmt: skip
    assert calls(tree, "tl.dot") == sum(calls(function, "tl.dot") for function in within)
    assert all("UP" in [argument.arg for argument in function.args.args] for function in within)


@pytest.mark.parametrize("path", FUSED, ids=lambda path: path.name)
def test_no_block_pointers(path: Path) -> None:
    """Triton 3.9 has none any more."""
    assert "make_block_ptr" not in path.read_text(encoding="utf-8")
