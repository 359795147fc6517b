"""specdec: same text, fewer forwards. Speculative decoding inside Hugging Face `generate`.

Every name is imported when it is first used, so that the command line answers `--help`, a mistyped
option or Ctrl-C without waiting seconds for torch and transformers.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.api import augment, augmented, last_stats, restore
    from specdec.config import SpecConfig
    from specdec.contracts import Drafter, Needs
    from specdec.drafters.row import RowDrafter
    from specdec.errors import SpecdecError
    from specdec.registry import register_drafter
    from specdec.round.tree import TokenTree, TreeBatch
    from specdec.stats import GenerationStats

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

_PLACES = {
    "api": ("augment", "augmented", "last_stats", "restore"),
    "config": ("SpecConfig",),
    "contracts": ("Drafter", "Needs"),
    "drafters.row": ("RowDrafter",),
    "errors": ("SpecdecError",),
    "registry": ("register_drafter",),
    "stats": ("GenerationStats",),
    "round.tree": ("TokenTree", "TreeBatch"),
}
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    """A public name, from its module, or a module of the package (PEP 562)."""
    if name in _MODULE_OF:
        found = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = found  # from now on without this function
        return found
    place = f"{__name__}.{name}"
    if name.isidentifier() and not name.startswith("_") and find_spec(place) is not None:
        return import_module(place)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
