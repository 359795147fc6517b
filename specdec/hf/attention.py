"""A model's attention, run by something of ours for the length of a forward.

transformers looks attention up by a name in the configuration, which all threads share. So a
forward borrows the name, and what runs under it is kept by thread: a thread that has borrowed
nothing finds the model's own attention there, and the last borrower gives the name back.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils, modeling_utils

from specdec.errors import UnsupportedModelError

Attention = Callable[..., tuple[Tensor, "Tensor | None"]]
"""Called as transformers calls attention: (module, query, key, value, mask, **more)."""

BORROWED = "specdec"
"""The name of attention in a configuration while a forward of ours runs."""

_THREAD = threading.local()  # `attend`: what runs the attention of this thread's forward
_LOCK = threading.RLock()


@dataclass
class _Loan:
    """What a configuration says of attention when nobody borrows it, and how many do."""

    own: str | None
    borrowers: int = 0


_LOANS: dict[int, _Loan] = {}  # by configuration, while it is lent


@contextmanager
def attention_by(model: Any, attend: Attention) -> Iterator[None]:
    """Runs `attend` in the place of the model's attention, in this thread alone.

    Only the text part's attention is replaced; the part that sees images keeps its own.
    """
    config = model.config.get_text_config()
    before = getattr(_THREAD, "attend", None)
    _borrow(config)
    _THREAD.attend = attend
    try:
        yield
    finally:
        _THREAD.attend = before
        _give_back(config)


@contextmanager
def dense_attention(model: Any) -> Iterator[None]:
    """Runs tree forwards on a backend that takes a dense mask, unless one of ours runs them.

    Flash attention ignores a 4-D mask and treats tree positions as packed sequences: silently
    wrong. Prefill keeps the user's backend, and so does the part of the model that sees images.
    """
    chosen = attention_name(model.config.get_text_config())
    if getattr(_THREAD, "attend", None) is not None:
        yield
        return
    if chosen is None or not ("flash" in chosen or "flex" in chosen):
        yield
        return
    other = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"

    def attend(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return _own(module, other)(module, *args, **kwargs)

    with attention_by(model, attend):
        yield


def attention_name(config: Any) -> str | None:
    """Name of the attention that a configuration chose, for example "sdpa"; also while it is lent.

    A whole model's configuration and its text part are lent apart.
    """
    with _LOCK:
        loan = _LOANS.get(id(config))
        return getattr(config, "_attn_implementation", None) if loan is None else loan.own


def attention_function(model: Any) -> object:
    """What runs attention under the name that the configuration chose; anybody may register it."""
    name = attention_name(model.config.get_text_config())
    return modeling_utils.ALL_ATTENTION_FUNCTIONS.get(name)


def own_settings(config: Any) -> dict[str, Any]:
    """The attributes of a configuration as they are when nobody borrows its attention."""
    with _LOCK:
        loan, settings = _LOANS.get(id(config)), dict(vars(config))
    if loan is None:
        return settings
    lent = [name for name, value in settings.items() if type(value) is str and value == BORROWED]
    return settings | dict.fromkeys(lent, loan.own)


def _borrow(config: Any) -> None:
    with _LOCK:
        loan = _LOANS.get(id(config))
        if loan is None:
            AttentionInterface.register(BORROWED, _attend)
            AttentionMaskInterface.register(BORROWED, _mask)
            loan = _LOANS[id(config)] = _Loan(config._attn_implementation)
            config._attn_implementation = BORROWED
        loan.borrowers += 1


def _give_back(config: Any) -> None:
    with _LOCK:
        loan = _LOANS[id(config)]
        loan.borrowers -= 1
        if not loan.borrowers:
            config._attn_implementation = loan.own
            del _LOANS[id(config)]


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """What is registered under the borrowed name."""
    attend: Attention | None = getattr(_THREAD, "attend", None)
    if attend is None:  # another thread has borrowed the name, and this one knows nothing of it
        attend = _own(module, attention_name(module.config))
    return attend(module, query, key, value, attention_mask, **kwargs)


def _mask(*args: Any, config: Any, **kwargs: Any) -> Any:
    """The mask for the model's own attention; None where transformers would make none."""
    make = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.get(attention_name(config))
    return None if make is None else make(*args, config=config, **kwargs)


def _own(module: Any, name: str | None) -> Attention:
    """What a layer's own code would run under a name; eager attention is its file's own."""
    space: dict[str, Any] = {}
    for kind in reversed(type(module).__mro__):  # a subclass may stand in another file
        space |= vars(sys.modules[kind.__module__])
    functions = space.get("ALL_ATTENTION_FUNCTIONS", modeling_utils.ALL_ATTENTION_FUNCTIONS)
    found: Attention | None = functions.get(name, space.get("eager_attention_forward"))
    if found is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no attention named {name!r}; set another with "
            "model.set_attn_implementation"
        )
    return found
