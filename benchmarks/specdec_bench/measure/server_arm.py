"""The arm `server:URL`: an engine behind an OpenAI-compatible address answers the units.

It gets the prompt's token ids, so that no other tokenizer or chat template comes between, answers
greedily, and writes on behind the end of text, as the arms in this process do. Its text is held
against plain's like any other: give the setting the server's own dtype. Rows of a batch are sent at
the same time. Its clock includes the way to the server and back.
"""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from specdec.artifacts.input_files import MOST_TEMPLATE, read_input_text
from specdec.errors import ConfigError, SpecdecError
from specdec_bench.contracts import Unit
from specdec_bench.results.records import PassRecord, Setting
from specdec_integrations.servers.dialects import Asked, Dialect, Reply, connect, rounds_of
from specdec_integrations.servers.http import Endpoint

_OPTIONS = ("model", "timeout", "key_file")


class ServerArm:
    """An arm that is a server.

    Args:
        name: As in the records.
        dialect: How to speak to it.
        model: Name on the server.
        tokenizer: Of the target; makes ids of text where a server sends only that.

    Attributes:
        name: As in the records.
        counts_rounds: The server tells how much was accepted.
        in_process: False: its processor time is not ours.
        engine: Kind of server.
        facts: The same, and what becomes of its prefix cache, for the header of a result file.
        seconds: What the newest answer took, without clearing the cache before it.
    """

    in_process = False

    def __init__(self, name: str, dialect: Dialect, model: str, tokenizer: Any = None) -> None:
        self.name, self.counts_rounds, self.engine = name, dialect.counts_rounds, dialect.name
        self._dialect, self._model, self._tokenizer = dialect, model, tokenizer
        self.facts = {"engine": dialect.name, "prefix_cache": dialect.cache.state}
        self.seconds: float | None = None

    @classmethod
    def of(cls, address: str, model: Any, tokenizer: Any, setting: Setting) -> ServerArm:
        """Connects to a server.

        Args:
            address: URL, and behind commas what else there is to say: `model=NAME` where it serves
                several, `timeout=SECONDS` (300), `key_file=FILE` with a bearer token.
            model: The target in this process; its texts are the reference.
            tokenizer: Of the target.
            setting: The conditions.

        Raises:
            ConfigError: The address is none, the server cannot be reached or lacks the model, or
                the setting samples.
        """
        if setting.temperature:
            raise ConfigError(
                f"arm 'server:{address}' at temperature {setting.temperature:g}: a server's random "
                "numbers are its own, so its text has nothing to be compared with; use 0"
            )
        url, options = _split(address)
        endpoint = Endpoint.of(url, _timeout(options), _key(options))
        dialect, chosen = connect(endpoint, options.get("model"))
        return cls(f"server:{address}", dialect, chosen, tokenizer)

    def run(self, unit: Unit) -> list[list[int]]:
        """New tokens of each row.

        Raises:
            SpecdecError: The server fails, or gives another number of tokens.
        """
        return [self._ids(reply, unit.record.new_tokens) for reply in self._replies(unit)]

    def instrumented(self, unit: Unit) -> PassRecord:
        """One answer with its bursts and what the server counted.

        Bursts are events of the stream. Where they agree with the server's counters, they are the
        rounds, and tell what each emitted; where a server is faster than the network they hold
        several rounds each, and the counters alone speak.

        Raises:
            SpecdecError: The server fails, or its counters do not fit the answer.
        """
        before = self._dialect.before()
        replies = self._replies(unit)
        rows = [self._ids(reply, unit.record.new_tokens) for reply in replies]
        counted = self._dialect.counted(before, replies) if self.counts_rounds else None
        bursts = [burst for burst in replies[0].bursts if burst[0]] or replies[0].bursts
        histogram = {} if counted is None else rounds_of(counted.histogram, replies)
        return PassRecord(
            setting=unit.record.setting,
            unit=unit.record.unit,
            arm=self.name,
            histogram={str(n): times for n, times in sorted(histogram.items())},
            # Rows of a batch are decoded together, and each had its share of the rounds.
            rounds=math.ceil(sum(histogram.values()) / len(rows)),
            drafted=0 if counted is None else counted.drafted,
            chain=counted is None or counted.chain,
            stages={},
            seconds=self.seconds or 0.0,
            first_token=max(reply.bursts[0][1] for reply in replies),
            gaps=[
                (tokens, moment - earlier)
                for (tokens, moment), (_, earlier) in zip(bursts[1:], bursts, strict=False)
            ],
            first_tokens=max(bursts[0][0], 1),
        )

    def _replies(self, unit: Unit) -> list[Reply]:
        record = unit.record
        asked = [
            Asked(self._model, ids, record.new_tokens, record.seed % 2**31)
            for ids in unit.prompt_ids
        ]
        self._dialect.cache.forget()
        start = time.perf_counter()
        if len(asked) == 1:
            replies = [self._dialect.ask(asked[0])]
        else:
            with ThreadPoolExecutor(len(asked)) as pool:
                replies = list(pool.map(self._dialect.ask, asked))
        self.seconds = time.perf_counter() - start
        return replies

    def _ids(self, reply: Reply, wanted: int) -> list[int]:
        ids = reply.ids
        if not ids and reply.text:
            ids = self._encoded(reply.text)
        if len(ids) != wanted:
            hint = "" if reply.ids else "; it sends text only, which need not split as it was made"
            raise SpecdecError(
                f"{self.name} gave {len(ids)} tokens where {wanted} were asked{hint}"
            )
        return list(ids)

    def _encoded(self, text: str) -> list[int]:
        if self._tokenizer is None:
            raise ConfigError(f"{self.name} sends no token ids, and there is no tokenizer here")
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)


def _split(address: str) -> tuple[str, dict[str, str]]:
    """The URL, and what stands behind its commas."""
    url, *pairs = address.split(",")
    options: dict[str, str] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if name not in _OPTIONS or not sign or not value:
            takes = ", ".join(f"{option}=..." for option in _OPTIONS)
            raise ConfigError(
                f"server:{address}: behind the address may stand {takes}; got {pair!r}"
            )
        options[name] = value
    return url, options


def _timeout(options: dict[str, str]) -> float:
    text = options.get("timeout", "300")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise ConfigError(f"timeout must be a number of seconds above 0, got {text!r}")
    return seconds


def _key(options: dict[str, str]) -> str | None:
    if "key_file" not in options:
        return None
    path = Path(options["key_file"])
    words = read_input_text(path, "key_file", MOST_TEMPLATE).split()
    if len(words) != 1 or not words[0].isascii():
        raise ConfigError(f"{path} must hold one key of ASCII characters and nothing else")
    return words[0]
