"""What vLLM, SGLang and other OpenAI-compatible servers are asked, and how they count acceptance.

vLLM counts for the whole server, since it was started: counters are read before and after, and
nobody else may use it meanwhile. SGLang counts each request and sends the figures with the answer;
what it shows for the whole server is an average since its start, which has no difference.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from specdec.errors import ConfigError, SpecdecError
from specdec_integrations.servers.http import Endpoint, Event
from specdec_integrations.servers.prefix_cache import PrefixCache, refuse_suffix_decoding

_METRICS = "/metrics"
_WAIT = 2.0  # seconds after an answer within which vLLM's counters have caught up with it
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_NO_PREFIXES = re.compile(r'^vllm:cache_config_info\{.*enable_prefix_caching="False"', re.MULTILINE)
_SAMPLE = re.compile(r"^(vllm:\w+?)(?:_total)?(?:\{(.*)\})?\s+(\S+)(?:\s+\d+)?$")


@dataclass(frozen=True, slots=True)
class Asked:
    """A greedy request.

    Attributes:
        model: Name on the server.
        prompt: Ids.
        tokens: Exactly so many new ones.
        seed: Sent along; a greedy answer should not depend on it.
    """

    model: str
    prompt: Sequence[int]
    tokens: int
    seed: int


@dataclass
class Reply:
    """An answer.

    Attributes:
        ids: New ids; empty where the server sends only text.
        text: The same as text.
        bursts: (tokens, seconds since the request) of every event that brought any; tokens are
            0 where only text came.
        info: What the server said of the request, at its end.
    """

    ids: list[int] = field(default_factory=list)
    text: str = ""
    bursts: list[tuple[int, float]] = field(default_factory=list)
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Counted:
    """Acceptance as the server counted it.

    Attributes:
        histogram: Tokens of a row in a round -> how often.
        drafted: Proposed tokens.
        chain: All proposals were chains.
    """

    histogram: Mapping[int, int]
    drafted: int
    chain: bool


class Dialect(Protocol):
    """How to speak to one kind of server.

    Attributes:
        name: Of the engine.
        counts_rounds: It tells how much was accepted.
        cache: What it keeps of earlier prompts; forgotten before each request.
    """

    name: str
    counts_rounds: bool
    cache: PrefixCache

    def ask(self, asked: Asked) -> Reply:
        """Streams one answer."""
        ...

    def before(self) -> object:
        """What `counted` needs from before the answers."""
        ...

    def counted(self, before: object, replies: Sequence[Reply]) -> Counted | None:
        """Acceptance of the answers that came since."""
        ...


class OpenAI:
    """Any server with /v1/completions; sends text only, and counts nothing."""

    name = "openai"
    counts_rounds = False

    def __init__(self, endpoint: Endpoint, model: str) -> None:
        self.endpoint, self.model = endpoint, model
        self.cache = PrefixCache(endpoint)

    def ask(self, asked: Asked) -> Reply:
        """Streams one answer."""
        return self._completion(asked, {})

    def before(self) -> object:
        """Nothing."""
        return None

    def counted(self, before: object, replies: Sequence[Reply]) -> Counted | None:
        """Nothing."""
        return None

    def _completion(self, asked: Asked, more: Mapping[str, Any]) -> Reply:
        body = {
            "model": asked.model,
            "prompt": list(asked.prompt),
            "max_tokens": asked.tokens,
            "temperature": 0,
            "seed": asked.seed,
            "stream": True,
            **more,
        }
        reply = Reply()
        for event in self.endpoint.events("/v1/completions", body):
            choices = event.value.get("choices") or [{}]
            if not isinstance(choices, list) or not isinstance(choices[0], dict):
                raise ConfigError(
                    f"{self.endpoint.url}/v1/completions gave choices {choices!r:.80}"
                )
            _take(reply, event, choices[0].get("token_ids"), choices[0].get("text") or "")
        return reply


class VLLM(OpenAI):
    """vLLM: token ids come with the stream, counters over Prometheus."""

    name = "vllm"

    def __init__(self, endpoint: Endpoint, model: str) -> None:
        super().__init__(endpoint, model)
        self.counts_rounds = "vllm:spec_decode_num_drafts" in self._counters()
        refuse_suffix_decoding(endpoint)
        is_off = _NO_PREFIXES.search(endpoint.text(_METRICS)) is not None
        self.cache = PrefixCache(endpoint, "/reset_prefix_cache", is_off)

    def ask(self, asked: Asked) -> Reply:
        """Streams one answer."""
        # Whatever the model's generation config says, greedy is greedy.
        plain = {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "presence_penalty": 0.0}
        return self._completion(asked, {"ignore_eos": True, "return_token_ids": True, **plain})

    def before(self) -> dict[str, Counter[str]]:
        """The counters as they stand."""
        return self._counters()

    def counted(self, before: object, replies: Sequence[Reply]) -> Counted | None:
        """By difference; rounds in which nothing was drafted are what is left of the tokens.

        Raises:
            SpecdecError: The counters do not fit the answers: somebody else uses the server.
        """
        if not self.counts_rounds or not isinstance(before, dict):
            return None
        tokens = sum(len(reply.ids) for reply in replies)
        change = self._change(before, tokens)
        drafts, drafted, accepted = (
            change[f"vllm:spec_decode_{name}"].total()
            for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
        )
        by_position = change["vllm:spec_decode_num_accepted_tokens_per_pos"]
        positions = range(1 + max(map(int, by_position), default=-1))
        left = [drafts, *(by_position[str(at)] for at in positions), 0]
        histogram = Counter({at + 1: left[at] - left[at + 1] for at in range(len(left) - 1)})
        generated = change["vllm:generation_tokens"].total()
        undrafted = tokens - len(replies) - drafts - accepted
        # The last round of an answer may have accepted what lies beyond its limit.
        overshoot = len(replies) * max(len(positions), 1)
        fits = min(histogram.values()) >= 0 and sum(left[1:]) == accepted <= drafted
        if not fits or undrafted < -overshoot or generated not in (0, tokens):
            raise SpecdecError(
                f"the counters of {self.endpoint.url} do not fit the answers ({generated} tokens "
                f"for {tokens}, {drafts} drafts, {accepted} accepted); nobody else may use the "
                "server while it is measured"
            )
        histogram[1] += max(undrafted, 0)
        return Counted(+histogram, drafted, True)  # vLLM verifies chains only

    def _change(self, before: Mapping[str, Counter[str]], tokens: int) -> dict[str, Counter[str]]:
        """What the counters grew by, once they have caught up with the answers."""
        end = time.perf_counter() + _WAIT
        while True:
            now = self._counters()
            change: dict[str, Counter[str]] = {name: Counter() for name in _COUNTERS}
            for name, found in now.items():
                change[name] = Counter(found)
                change[name].subtract(before.get(name, Counter()))
                if any(grown < 0 for grown in change[name].values()):
                    raise SpecdecError(f"{self.endpoint.url} was started anew during the run")
            if change["vllm:generation_tokens"].total() >= tokens or time.perf_counter() > end:
                return change
            time.sleep(0.02)

    def _counters(self) -> dict[str, Counter[str]]:
        """Counter -> position (or "") -> value, of this model, over all engines."""
        found: dict[str, Counter[str]] = {}
        for line in self.endpoint.text(_METRICS).splitlines():
            sample = _SAMPLE.match(line)
            if sample is None or sample[1] not in _COUNTERS:
                continue
            labels = dict(_LABEL.findall(sample[2] or ""))
            if labels.get("model_name", self.model) == self.model:
                place = found.setdefault(sample[1], Counter())
                try:
                    place[labels.get("position", "")] += int(float(sample[3]))
                except (ValueError, OverflowError) as problem:
                    raise ConfigError(f"{self.endpoint.url}{_METRICS} has {line!r}") from problem
        return found


_COUNTERS = frozenset(
    {
        "vllm:spec_decode_num_drafts", "vllm:spec_decode_num_draft_tokens",
        "vllm:spec_decode_num_accepted_tokens", "vllm:spec_decode_num_accepted_tokens_per_pos",
        "vllm:generation_tokens",
    }
)  # fmt: skip


class SGLang:
    """SGLang, over its own /generate: the OpenAI part sends no token ids."""

    name = "sglang"

    def __init__(self, endpoint: Endpoint, model: str) -> None:
        self.endpoint, self.model = endpoint, model
        info = endpoint.json("/get_server_info")
        known = info if isinstance(info, dict) else {}
        self.counts_rounds = bool(known.get("speculative_algorithm"))
        if known.get("speculative_algorithm") == "NGRAM":
            raise ConfigError(
                f"{endpoint.url} speculates with NGRAM, which drafts from the answers that it gave "
                "before; every prompt is answered several times, so it would draft its own text"
            )
        self.cache = PrefixCache(endpoint, "/flush_cache", known.get("disable_radix_cache") is True)
        top_k = known.get("speculative_eagle_topk")
        self._chain = top_k in (None, 1)

    def ask(self, asked: Asked) -> Reply:
        """Streams one answer."""
        body = {
            "input_ids": list(asked.prompt),
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": asked.tokens,
                "ignore_eos": True,
                "sampling_seed": asked.seed,
            },
            "stream": True,
        }
        reply = Reply()
        for event in self.endpoint.events("/generate", body):
            ids, text = event.value.get("output_ids"), event.value.get("text") or ""
            info = event.value.get("meta_info") or {}
            total = info.get("completion_tokens")
            if isinstance(ids, list) and total == len(ids) and ids[: len(reply.ids)] == reply.ids:
                ids, text = ids[len(reply.ids) :], text.removeprefix(reply.text)  # all so far
            _take(reply, event, ids, text)
            reply.info = info
        return reply

    def before(self) -> object:
        """Nothing: each answer brings its own figures."""
        return None

    def counted(self, before: object, replies: Sequence[Reply]) -> Counted | None:
        """From what came with the answers; None where a server does not send a histogram.

        Raises:
            SpecdecError: The figures contradict each other.
        """
        histogram: Counter[int] = Counter()
        drafted = 0
        for reply in replies:
            accepted = _first(reply.info, _SGLANG_HISTOGRAMS)
            proposed = _first(reply.info, _SGLANG_PROPOSED)
            if not isinstance(accepted, list) or not isinstance(proposed, int):
                return None
            own = Counter({at + 1: int(times) for at, times in enumerate(accepted) if times})
            if own.total() != reply.info.get("spec_verify_ct"):
                raise SpecdecError(
                    f"{self.endpoint.url} counted {reply.info.get('spec_verify_ct')} "
                    f"verifications, and {own.total()} in its histogram"
                )
            histogram += own
            drafted += proposed
        return Counted(histogram, drafted, self._chain) if histogram else None


_SGLANG_HISTOGRAMS = ("spec_correct_drafts_histogram", "spec_accept_histogram")  # new, old
_SGLANG_PROPOSED = ("spec_num_proposed_drafts", "spec_proposed_drafts", "spec_draft_token_num")


def connect(endpoint: Endpoint, model: str | None) -> tuple[Dialect, str]:
    """The dialect of a server, and the name of the model to ask for.

    Args:
        endpoint: The server.
        model: Name on the server; None takes the only one.

    Raises:
        ConfigError: It is no such server, or has no such model.
    """
    listed = endpoint.json("/v1/models")
    cards = listed.get("data") if isinstance(listed, dict) else None
    if (
        not isinstance(cards, list)
        or not all(isinstance(card, dict) for card in cards)
        or not cards
    ):
        raise ConfigError(f"{endpoint.url}/v1/models lists no models; is it OpenAI-compatible?")
    names = [str(card.get("id")) for card in cards if not card.get("parent")]  # no adapters
    if model is None and len(names) != 1:
        raise ConfigError(
            f"{endpoint.url} serves {', '.join(names) or 'nothing'}; add ,model=NAME to its address"
        )
    chosen = model if model is not None else names[0]
    card = next((card for card in cards if card.get("id") == chosen), None)
    if card is None:
        raise ConfigError(f"{endpoint.url} has no model {chosen!r}; it serves {', '.join(names)}")
    kinds: dict[Any, type[OpenAI] | type[SGLang]] = {"vllm": VLLM, "sglang": SGLang}
    return kinds.get(card.get("owned_by"), OpenAI)(endpoint, chosen), chosen


def rounds_of(counted: Mapping[int, int], replies: Sequence[Reply]) -> Mapping[int, int]:
    """What rounds emitted: from the streams where each event is a round, else as counted.

    A server counts every draft that it accepted, in an answer's last round also those beyond the
    answer's limit, which nobody gets; and vLLM does not count rounds without a draft, whose number
    is then no longer what is left of the tokens. The events of the streams have neither flaw, so
    long as none of them holds two rounds: they and the counters must differ in nothing but rounds
    of one token and the last round of each answer, where as much or more was accepted than came.

    Args:
        counted: Tokens of a row in a round -> how often, by the server.
        replies: The answers.

    Returns:
        The histogram.
    """
    streams = [[tokens for tokens, _ in reply.bursts if tokens] for reply in replies]
    if any(len(stream) < 2 or stream[0] != 1 for stream in streams):
        return counted  # the first event holds more than the prefill's token
    seen = Counter(tokens for stream in streams for tokens in stream[1:-1])
    lasts = sorted((stream[-1] for stream in streams if stream[-1] > 1), reverse=True)
    rest = Counter({n: times - seen[n] for n, times in counted.items() if n > 1})
    rest.subtract({n: times for n, times in seen.items() if n > 1 and n not in counted})
    if any(times < 0 for times in rest.values()):
        return counted
    ends = sorted(rest.elements(), reverse=True)  # what the last rounds had accepted
    fits = len(lasts) <= len(ends) <= len(streams) and all(map(int.__ge__, ends, lasts))
    return seen + Counter(stream[-1] for stream in streams) if fits else counted


def _take(reply: Reply, event: Event, ids: Any, text: Any) -> None:
    """Adds what an event brought."""
    if ids is not None and not (isinstance(ids, list) and all(type(i) is int for i in ids)):
        raise ConfigError(f"the server sent token ids {ids!r:.80}")
    if ids or text:
        reply.ids += ids or []
        reply.text += text
        reply.bursts.append((len(ids or []), event.seconds))


def _first(info: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((info[name] for name in names if name in info), None)
