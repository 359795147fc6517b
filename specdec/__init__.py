"""specdec: same text, fewer forwards. Speculative decoding inside Hugging Face `generate`."""

from specdec.augment import augment, augmented, last_stats, restore
from specdec.config import SpecConfig
from specdec.drafters.base import Drafter, Needs, RowDrafter
from specdec.errors import SpecdecError
from specdec.registry import register_drafter
from specdec.stats import GenerationStats
from specdec.tree import TokenTree, TreeBatch

__version__ = "0.1.0"

__all__ = [
    "Drafter",
    "GenerationStats",
    "Needs",
    "RowDrafter",
    "SpecConfig",
    "SpecdecError",
    "TokenTree",
    "TreeBatch",
    "__version__",
    "augment",
    "augmented",
    "last_stats",
    "register_drafter",
    "restore",
]
