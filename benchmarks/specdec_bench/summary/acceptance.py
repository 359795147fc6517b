"""How much of what was drafted was accepted, all of it from one histogram.

The histogram says how many tokens a row emitted in a round, and how often. A round emits the drafts
that it accepted and one token of the target's own (the bonus or the correction), so n tokens mean
n - 1 accepted drafts. From that alone follow, exactly,

    tau           = tokens / rounds                        the acceptance length, bonus included
    marginal[i]   = rounds with at least i + 1 accepted drafts / rounds
    conditional[i]= marginal[i] / marginal[i - 1]          given that the i drafts before were
    tau           = 1 + sum(marginal)                      whatever the histogram

Denominators are all rounds, also those in which a drafter proposed less or nothing: rates describe
the method on this text, not the quality of a draft that it does propose. For trees, positions are
depths: a round has reached depth i when its accepted path did.

Where counting is not quite counting: an answer ends in the middle of a round. At its length limit
the loop drafts no deeper than the limit lets it emit, so the count holds but the last round of an
answer had less to accept; and where an accepted draft itself is the end of text, no bonus token
follows it, and it is counted as the target's own. Either can lower `accepted` and tau, by the last
round of each answer at most: `tau_without_last` leaves those rounds out, where they are known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from specdec.errors import SpecdecError
from specdec_bench.results.records import PassRecord

Histogram = Mapping[int, int] | Mapping[str, int]
_IDENTITY = 1e-9


@dataclass(frozen=True, slots=True)
class Counts:
    """What was counted in one request.

    Attributes:
        histogram: Tokens that a row emitted in a round -> how often; keys may be strings.
        drafted: Nodes proposed below the root; None where nobody counted them.
        chain: All proposals were chains.
        last: Tokens of the last round of each answer; None where they are not known.
    """

    histogram: Histogram
    drafted: int | None = None
    chain: bool = True
    last: Sequence[int] | None = None

    @classmethod
    def of_pass(cls, found: PassRecord, rows: int = 1) -> Counts:
        """The counts of an instrumented answer of `rows` prompts decoded together."""
        last = None
        if rows == 1 and found.gaps:
            ended = int(found.gaps[-1][0])
            # Bursts as a server sends them need not be rounds.
            last = (ended,) if ended in _checked(found.histogram) else None
        return cls(found.histogram, found.drafted, found.chain, last)


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Acceptance over one or more requests.

    Attributes:
        histogram: Tokens of a row in a round -> how often, ascending.
        drafted: Nodes proposed below the root; None where nobody counted them.
        chain: Positions are those of a chain; otherwise they are depths of a tree.
        tau_per_step: Tokens over rounds; long answers count more.
        tau_per_request: Mean over requests of their own tau; each request counts the same.
        tau_without_last: Tau without the last round of each answer, which the end of the answer
            cuts; None where those are not known.
        requests: How many requests.
    """

    histogram: Mapping[int, int]
    drafted: int | None
    chain: bool
    tau_per_step: float
    tau_per_request: float
    tau_without_last: float | None
    requests: int

    @classmethod
    def of(cls, histogram: Histogram, drafted: int | None = None, chain: bool = True) -> Acceptance:
        """The acceptance in one histogram, taken as that of one request.

        Raises:
            SpecdecError: As `of_requests`.
        """
        return cls.of_requests([Counts(histogram, drafted, chain)])

    @classmethod
    def of_requests(cls, requests: Sequence[Counts]) -> Acceptance:
        """The acceptance over several requests; those without a round are left out.

        Raises:
            SpecdecError: No request has a round, or the counts contradict each other.
        """
        histograms = [_checked(request.histogram) for request in requests]
        counted = [
            (found, request)
            for found, request in zip(histograms, requests, strict=True)
            if found.total()
        ]
        if not counted:
            raise SpecdecError("acceptance needs at least one round; no request has any")
        pooled: Counter[int] = Counter()
        for found, _ in counted:
            pooled.update(found)
        drafts = [request.drafted for _, request in counted]
        drafted = None if None in drafts else sum(d for d in drafts if d is not None)
        accepted = _tokens(pooled) - pooled.total()
        if drafted is not None and drafted < accepted:
            raise SpecdecError(
                f"{accepted} drafts were accepted, but only {drafted} were proposed; the counters "
                "are not of the same answers"
            )
        taus = [_tokens(found) / found.total() for found, _ in counted]
        result = cls(
            dict(sorted(pooled.items())),
            drafted,
            all(request.chain for _, request in counted),
            _tokens(pooled) / pooled.total(),
            sum(taus) / len(taus),
            _without_last(pooled, [request.last for _, request in counted]),
            len(counted),
        )
        result._check_identity()
        return result

    @property
    def rounds(self) -> int:
        """Rounds, each row's counted by itself."""
        return sum(self.histogram.values())

    @property
    def tokens(self) -> int:
        """Tokens that the rounds emitted; an answer's first token comes from its prefill."""
        return _tokens(self.histogram)

    @property
    def accepted(self) -> int:
        """Accepted drafts: all emitted tokens but the target's own, one a round."""
        return self.tokens - self.rounds

    @property
    def positions(self) -> int:
        """Most drafts that any round accepted: the length of the rates."""
        return max(self.histogram) - 1

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the rounds in which a row emitted 1, 2, ... tokens."""
        return tuple(
            self.histogram.get(tokens, 0) / self.rounds
            for tokens in range(1, max(self.histogram) + 1)
        )

    @property
    def marginal(self) -> tuple[float, ...]:
        """P(at least i + 1 drafts accepted) at position i, over all rounds."""
        return tuple(count / self.rounds for count in self._survivors()[1:])

    @property
    def conditional(self) -> tuple[float, ...]:
        """P(draft i + 1 accepted, given that the i before were) at position i."""
        return tuple(after / before for before, after in pairwise(self._survivors()))

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over proposed drafts; None where proposals were not counted, or there were none.

        Of a tree it says how much of it was wasted, not how good it was: one path of it can win.
        """
        return self.accepted / self.drafted if self.drafted else None

    @property
    def wasted_per_round(self) -> float | None:
        """Proposed nodes a round that were verified in vain; None where nobody counted them."""
        return None if self.drafted is None else (self.drafted - self.accepted) / self.rounds

    def _survivors(self) -> list[int]:
        """Rounds with at least i accepted drafts, for i from 0 to the most that occurred."""
        left, found = self.rounds, []
        for emitted in range(1, max(self.histogram) + 1):
            found.append(left)
            left -= self.histogram.get(emitted, 0)
        return found

    def _check_identity(self) -> None:
        implied = 1 + sum(self.marginal)
        if abs(implied - self.tau_per_step) > _IDENTITY * self.tau_per_step:
            raise SpecdecError(  # a bug here, not in what was measured
                f"1 + sum of the marginal rates is {implied!r}, tau is {self.tau_per_step!r}"
            )


def acceptance_of(
    passes: Sequence[PassRecord], rows: Sequence[int] | None = None
) -> Acceptance | None:
    """The acceptance of one arm, or None where it counted no rounds.

    Args:
        passes: Its instrumented answers; the rows of a batch count as one request.
        rows: Prompts decoded together in each; None for one each.

    Raises:
        SpecdecError: The counts contradict each other.
    """
    rows = [1] * len(passes) if rows is None else rows
    counts = [Counts.of_pass(found, n) for found, n in zip(passes, rows, strict=True)]
    counts = [c for c in counts if any(c.histogram.values())]
    return Acceptance.of_requests(counts) if counts else None


def _checked(histogram: Histogram) -> Counter[int]:
    """The histogram with integer keys, without what never occurred."""
    found: Counter[int] = Counter()
    for tokens, times in histogram.items():
        key = int(tokens) if isinstance(tokens, str) and tokens.isdecimal() else tokens
        if not isinstance(key, int) or isinstance(key, bool) or key < 1:
            raise SpecdecError(f"a round emits a whole number of tokens from 1 on, got {tokens!r}")
        if not isinstance(times, int) or isinstance(times, bool) or times < 0:
            raise SpecdecError(f"rounds of {key} tokens were counted {times!r} times")
        if times:
            found[key] += times
    return found


def _tokens(histogram: Mapping[int, int]) -> int:
    return sum(tokens * times for tokens, times in histogram.items())


def _without_last(pooled: Mapping[int, int], lasts: Sequence[Sequence[int] | None]) -> float | None:
    if any(last is None for last in lasts):
        return None
    dropped = Counter(tokens for last in lasts for tokens in last or ())
    if any(pooled.get(tokens, 0) < times for tokens, times in dropped.items()):
        raise SpecdecError("an answer ends with a round that is not in its histogram")
    left = Counter(pooled)
    left.subtract(dropped)
    return _tokens(left) / left.total() if left.total() else None
