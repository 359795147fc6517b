"""Fused Triton kernels for token trees, and the torch reference of each.

Imports nothing of specdec. Importing this package imports torch alone; Triton is imported by the
first call that runs on it.
"""

from specdec_kernels.dispatch import Backend, KernelError, chosen_backend
from specdec_kernels.tree import Tree, tree_ancestors, tree_words
from specdec_kernels.tree_attention import tree_attention

__all__ = [
    "Backend",
    "KernelError",
    "Tree",
    "chosen_backend",
    "tree_ancestors",
    "tree_attention",
    "tree_words",
]
