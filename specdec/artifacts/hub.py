"""Asks the Hugging Face hub once whether it answers, before anything is fetched from it.

Its client retries for half a minute, and prints every attempt. A hub that does not answer now is
not asked: what is in the cache is used, and what is not is refused in a sentence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from specdec.errors import ConfigError

_SECONDS = 3.0


@contextmanager
def from_hub(name: str, what: str) -> Iterator[bool]:
    """Fetches something within the `with` block; yields whether only the cache can be asked.

    Args:
        name: Hub id.
        what: Kind of what is fetched, in messages.

    Raises:
        ConfigError: The hub does not answer, and the cache does not hold it.
    """
    silence = why_silent()
    try:
        yield silence is not None
    except Exception as problem:
        if silence is None or not isinstance(problem, OSError):
            raise
        raise ConfigError(
            f"cannot fetch the {what} {name!r}: the Hugging Face hub does not answer ({silence}), "
            "and the cache does not hold it whole; check the connection, or name a folder"
        ) from problem


def require_hub(name: str, what: str) -> None:
    """Refuses to ask a hub that does not answer, for libraries that would go on asking.

    With HF_HUB_OFFLINE they look into their cache, and nothing is checked here.

    Args:
        name: Hub id.
        what: Kind of what is fetched, in messages.

    Raises:
        ConfigError: It does not answer.
    """
    from huggingface_hub import constants

    silence = None if constants.HF_HUB_OFFLINE else why_silent()
    if silence is not None:
        raise ConfigError(
            f"cannot fetch the {what} {name!r}: the Hugging Face hub does not answer ({silence}); "
            "check the connection, give files, or set HF_HUB_OFFLINE=1 to use the cache"
        )


def why_silent() -> str | None:
    """Why the hub cannot be asked, in a few words; None when it answers, with whatever."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception as problem:  # noqa: BLE001 - no name, no route, no certificate, no time
        return " ".join(str(problem).split())[:100] or type(problem).__name__
    return None
