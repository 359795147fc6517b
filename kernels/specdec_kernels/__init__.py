"""Fused Triton kernels for token trees, and the torch reference of each.

Imports nothing of specdec. Importing this package imports torch alone; Triton is imported by the
first call that runs on it.
"""

from specdec_kernels.commit import KVBuffers, commit_kv
from specdec_kernels.dispatch import Backend, KernelError, chosen_backend
from specdec_kernels.head import rms_norm, rotate_into_cache
from specdec_kernels.loss import Given, Projected, SoftTarget, soft_cross_entropy
from specdec_kernels.picks import expand_topk, row_argmax, sampled_picks
from specdec_kernels.tree import Tree, tree_ancestors
from specdec_kernels.tree_attention import tree_attention
from specdec_kernels.walk import walk
from specdec_kernels.words import tree_words

__all__ = [
    "Backend",
    "Given",
    "KVBuffers",
    "KernelError",
    "Projected",
    "SoftTarget",
    "Tree",
    "chosen_backend",
    "commit_kv",
    "expand_topk",
    "rms_norm",
    "rotate_into_cache",
    "row_argmax",
    "sampled_picks",
    "soft_cross_entropy",
    "tree_ancestors",
    "tree_attention",
    "tree_words",
    "walk",
]
