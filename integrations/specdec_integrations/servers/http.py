"""Talks HTTP to an inference server: JSON, plain text, and streams of server-sent events.

Every failure names the address and says what to do; nothing is retried, for a repeated request
would be a second measurement.
"""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import httpx2

from specdec.errors import ConfigError

_PIECE, _MOST_PIECES = 2**16, 2**10  # bytes, and how many of them are read of an answer at once
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
        client: Holds its connections; threads may share it.
        timeout: Seconds without a byte after which it is given up.
    """

    url: str
    client: httpx2.Client
    timeout: float

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
            parts = httpx2.URL(url)
            fine = parts.scheme in ("http", "https") and bool(parts.host)
            fine = fine and (parts.port is None or 0 < parts.port < 2**16)
        except (httpx2.InvalidURL, UnicodeError):
            fine = False
        if not fine or parts.query or parts.fragment:
            raise ConfigError(f"{url!r} is no address of a server, as http://localhost:8000")
        if parts.userinfo:
            raise ConfigError("leave passwords out of a server's address; it is written to files")
        headers = {"Accept-Encoding": "identity"}  # packing would be measured as well
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        client = httpx2.Client(
            headers=headers,
            timeout=timeout,
            limits=httpx2.Limits(max_connections=None),  # each row of a batch has one
            trust_env=False,  # what a proxy takes would be measured as well
            verify=ssl.create_default_context(),  # with the user's own certificates
        )
        return cls(url.rstrip("/").removesuffix("/v1").rstrip("/"), client, timeout)

    def text(self, path: str) -> str:
        """What a GET gives, as text.

        Raises:
            ConfigError: The server cannot be reached, or refuses.
        """
        with self._opened(path, None) as response:
            return _body(response)

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
            return _body(response)

    def events(self, path: str, body: Mapping[str, Any]) -> Iterator[Event]:
        """The events that a POST streams, until the server says that they are done.

        Raises:
            ConfigError: As `json`; or the stream breaks off, or holds an error.
        """
        start = time.perf_counter()
        with self._opened(path, body) as response:
            kind, said = response.headers.get("Content-Type", "").lower(), ""
            for line in _lines(response):
                name, _, data = line.partition(":")
                if name.strip() != "data":
                    if name.lstrip().startswith("{"):  # no stream, but an error as one object
                        self._refuse(path, self._parsed(path, line))
                    said = said or line.strip()
                    continue
                if data.strip() == _DONE:
                    return
                value = self._parsed(path, data)
                self._refuse(path, value)
                yield Event(time.perf_counter() - start, value)
        if said and not kind.startswith("text/event-stream"):
            self._parsed(path, said)
        raise ConfigError(f"{self.url}{path} broke its stream off; the server's log says why")

    @contextmanager
    def _opened(self, path: str, body: Mapping[str, Any] | None) -> Iterator[httpx2.Response]:
        method, url = "GET" if body is None else "POST", self.url + path
        try:
            follow = body is None
            with self.client.stream(method, url, json=body, follow_redirects=follow) as response:
                if not response.is_success:
                    code, reason = response.status_code, response.reason_phrase
                    raise ConfigError(f"{url} answered {code} {reason}{_quoted(_body(response))}")
                yield response
        except httpx2.TimeoutException as problem:
            raise ConfigError(f"{url} sent nothing for {self.timeout:g} seconds") from problem
        except httpx2.ConnectError as problem:
            raise ConfigError(
                f"cannot reach {self.url}: {problem}; is the server running there?"
            ) from problem
        except httpx2.HTTPError as problem:
            raise ConfigError(f"{url} broke off: {problem!r}") from problem

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


def _lines(response: httpx2.Response) -> Iterator[str]:
    """Lines of a stream: servers end and divide events in their own ways, each has one line."""
    rest = b""
    for piece in response.iter_bytes():
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield line.decode("utf-8", errors="replace")
        if len(rest) > _PIECE * _MOST_PIECES:
            raise ConfigError("the server sent a line without an end; its log says why")
    yield rest.decode("utf-8", errors="replace")


def _body(response: httpx2.Response) -> str:
    pieces = islice(response.iter_bytes(_PIECE), _MOST_PIECES)
    return b"".join(pieces).decode("utf-8", errors="replace")


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
