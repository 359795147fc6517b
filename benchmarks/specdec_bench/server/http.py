"""Talks HTTP to an inference server: JSON, plain text, and streams of server-sent events.

Every failure names the address and says what to do; nothing is retried, for a repeated request
would be a second measurement.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from specdec.errors import ConfigError

_MOST_BYTES = 64 * 2**20  # of an answer that is read at once
_SHOWN = 200  # characters of an answer that are quoted
_DONE = "[DONE]"


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a stream.

    Attributes:
        seconds: When it came, since the request was sent.
        value: What it held.
    """

    seconds: float
    value: Mapping[str, Any]


@dataclass(frozen=True)
class Endpoint:
    """A server's address.

    Attributes:
        url: For example "http://localhost:8000"; a trailing "/v1" is left out.
        timeout: Seconds without a byte after which it is given up.
        headers: Sent with every request.
    """

    url: str
    timeout: float = 300.0
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, url: str, timeout: float = 300.0, key: str | None = None) -> Endpoint:
        """A checked address.

        Args:
            url: Address, with or without the "/v1" of its OpenAI part.
            timeout: Seconds.
            key: Sent as a bearer token.

        Raises:
            ConfigError: It is no http(s) address, or holds a password.
        """
        try:
            parts = urllib.parse.urlsplit(url)
            fine = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port that is none
            fine = False
        if not fine or parts.query or parts.fragment:
            raise ConfigError(f"{url!r} is no address of a server, as http://localhost:8000")
        if parts.username or parts.password:
            raise ConfigError("leave passwords out of a server's address; it is written to files")
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return cls(url.rstrip("/").removesuffix("/v1").rstrip("/"), timeout, headers)

    def text(self, path: str) -> str:
        """What a GET gives, as text.

        Raises:
            ConfigError: The server cannot be reached, or refuses.
        """
        with self._opened(path, None) as response:
            return str(response.read(_MOST_BYTES).decode("utf-8", errors="replace"))

    def json(self, path: str) -> Any:
        """What a GET gives, as JSON.

        Raises:
            ConfigError: As `text`, or it is not JSON.
        """
        return self._parsed(path, self.text(path))

    def post(self, path: str) -> str:
        """What an empty POST gives, as text.

        Raises:
            ConfigError: As `text`.
        """
        with self._opened(path, {}) as response:
            return str(response.read(_MOST_BYTES).decode("utf-8", errors="replace"))

    def events(self, path: str, body: Mapping[str, Any]) -> Iterator[Event]:
        """The events that a POST streams, until the server says that they are done.

        Raises:
            ConfigError: As `json`; or the stream breaks off, or holds an error.
        """
        start, ended = time.perf_counter(), False
        with self._opened(path, body) as response:
            for line in response:
                name, _, data = line.decode("utf-8", errors="replace").partition(":")
                data = data.strip()
                if name.strip() != "data":
                    if name.lstrip().startswith("{"):  # no stream, but an error as one object
                        self._refuse(path, self._parsed(path, f"{name}:{data}"))
                    continue
                if data == _DONE:
                    ended = True
                    break
                value = self._parsed(path, data)
                self._refuse(path, value)
                yield Event(time.perf_counter() - start, value)
        if not ended:
            raise ConfigError(f"{self.url}{path} broke its stream off; the server's log says why")

    @contextmanager
    def _opened(self, path: str, body: Mapping[str, Any] | None) -> Iterator[Any]:
        data = None if body is None else json.dumps(body).encode("utf-8")
        request = urllib.request.Request(  # noqa: S310 - `of` has checked the scheme
            self.url + path, data, {"Content-Type": "application/json", **self.headers}
        )
        # No proxy: what stands between us and the server would be measured as well.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=self.timeout) as response:
                yield response
        except urllib.error.HTTPError as problem:
            said = _quoted(problem.read(_MOST_BYTES).decode("utf-8", errors="replace"))
            raise ConfigError(
                f"{self.url}{path} answered {problem.code} {problem.reason}{said}"
            ) from problem
        except TimeoutError as problem:
            raise self._silent(path) from problem
        except urllib.error.URLError as problem:
            if isinstance(problem.reason, TimeoutError | socket.timeout):
                raise self._silent(path) from problem
            raise ConfigError(
                f"cannot reach {self.url}: {problem.reason}; is the server running there?"
            ) from problem
        except (OSError, http.client.HTTPException) as problem:
            raise ConfigError(f"{self.url}{path} broke off: {problem!r}") from problem

    def _silent(self, path: str) -> ConfigError:
        return ConfigError(f"{self.url}{path} sent nothing for {self.timeout:g} seconds")

    def _parsed(self, path: str, text: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as problem:
            raise ConfigError(
                f"{self.url}{path} answered something that is not JSON{_quoted(text)}"
            ) from problem

    def _refuse(self, path: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise ConfigError(f"{self.url}{path} streams no objects, but {type(value).__name__}")
        error = value.get("error") or (
            value.get("message") if value.get("object") == "error" else None
        )
        if error:
            raise ConfigError(f"{self.url}{path} refused{_quoted(json.dumps(error))}")


def _quoted(text: str) -> str:
    """The beginning of what a server said, or its message where it is JSON."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        error = value.get("error", value)
        message = error.get("message") if isinstance(error, dict) else error
        text = str(message or text)
    text = " ".join(text.split())
    return f": {text if len(text) <= _SHOWN else text[:_SHOWN] + '...'}" if text else ""
