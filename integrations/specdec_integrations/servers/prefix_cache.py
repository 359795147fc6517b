"""What a server remembers of earlier requests, and how it is made to forget.

Each prompt of a run is sent several times. A prefix cache then has its prompt already, so that the
time to the first token is that of no real request; and a drafter that looks into earlier answers
would draft the very text that it is to give.
"""

from __future__ import annotations

import re
import time
from typing import Literal

from specdec.errors import ConfigError, SpecdecError
from specdec_integrations.servers.http import Endpoint

_WAIT = 2.0  # seconds that a server may take to be done with the request before
_REFUSED = re.compile(r'"success"\s*:\s*false')
_SUFFIX = re.compile(r"""\bmethod['"]?\s*[=:]\s*['"]suffix['"]""")
_KEEPS_NONE = re.compile(r"suffix_decoding_max_cached_requests['\"]?\s*[=:]\s*0\b")


class PrefixCache:
    """The cache of prompts of a server.

    Args:
        endpoint: The server.
        path: What clears it; None where no way is known.
        is_off: The server says that it has none.

    Attributes:
        state: "off"; "cleared", before every request; "kept", where the server refuses that; or
            "unknown".
    """

    def __init__(self, endpoint: Endpoint, path: str | None = None, is_off: bool = False) -> None:
        self._endpoint, self._path = endpoint, path
        self.state: Literal["off", "cleared", "kept", "unknown"] = "unknown"
        if is_off:
            self.state = "off"
        elif path is not None:
            self.state = "cleared" if self._clear() else "kept"

    def forget(self) -> None:
        """Clears it, where the server can.

        Raises:
            SpecdecError: It could when it was asked first, and does not now.
        """
        end = time.perf_counter() + _WAIT
        while self.state == "cleared" and not self._clear():
            if time.perf_counter() > end:
                raise SpecdecError(
                    f"{self._endpoint.url}{self._path} no longer clears the prefix cache; nobody "
                    "else may use the server while it is measured"
                )
            time.sleep(0.02)

    def _clear(self) -> bool:
        """Whether it worked: a server refuses while it is at work, or when it does not know how."""
        try:
            return _REFUSED.search(self._endpoint.post(self._path or "")) is None
        except ConfigError:
            return False


def refuse_suffix_decoding(endpoint: Endpoint) -> None:
    """Refuses a vLLM that drafts from earlier answers, if it shows its settings.

    Raises:
        ConfigError: It does.
    """
    try:
        said = endpoint.text("/server_info")
    except ConfigError:  # only servers in development mode have it
        return
    if _SUFFIX.search(said) and not _KEEPS_NONE.search(said):
        raise ConfigError(
            f"{endpoint.url} speculates with suffix decoding, which drafts from answers of before; "
            "every prompt is answered several times, so it would draft its own text. "
            "Start it with suffix_decoding_max_cached_requests=0"
        )
