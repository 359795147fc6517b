"""What a run measured, as JSON lines: the one format between runner, report, tuner and gate.

A file is a header, then records in the order in which they were measured, then an end mark. Lines
are only ever appended, so a killed run leaves whole lines and at most one torn one; `--resume`
goes on after the last whole line. Without its end mark a file is not a result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from specdec_bench.results.values import (
    Count,
    Flag,
    Lengths,
    Number,
    Place,
    Positive,
    Seconds,
    SecondsBySize,
    SecondsByStage,
    Share,
    Sizes,
    Temperature,
    TokensByVerdict,
    Verdict,
    Whole,
)

SCHEMA = 1
NOT_PROMISED = "not_promised"
"""In the header's provenance: index of a setting, as text -> arms that do not promise plain's text
there, but its distribution only."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Under which conditions units are decoded.

    Attributes:
        dtype: Of the target: "float32", "bfloat16", "float16" or "float64".
        batch: Prompts decoded together.
        temperature: 0 is greedy; otherwise all arms of a unit sample from one seed.
        prompt_tokens: Longest prompt; longer ones keep their end. None keeps all of it.
    """

    dtype: str = "float32"
    batch: Positive = 1
    temperature: Temperature = 0.0
    prompt_tokens: Positive | None = None

    def __str__(self) -> str:
        """A short name, for tables."""
        parts = [self.dtype, f"batch {self.batch}"]
        parts.append(f"T {self.temperature:g}" if self.temperature else "greedy")
        if self.prompt_tokens is not None:
            parts.append(f"prompts <= {self.prompt_tokens}")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Header:
    """First line: what is measured, and where.

    Attributes:
        run_id: Random name of the run; a resumed run keeps it.
        settings: Conditions; records name them by their index here.
        arms: Names of the arms in the order of the tables.
        baseline: Arm that speed-ups are relative to: our loop without speculation.
        config: Options of the command, as given.
        provenance: Versions, device, threads, load, hashes of prompts and target.
    """

    run_id: str
    settings: Sequence[Setting]
    arms: Sequence[str]
    baseline: str
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    schema: Whole = SCHEMA
    kind: Literal["header"] = "header"


@dataclass(frozen=True, slots=True)
class UnitRecord:
    """One request (or `batch` of them together) that every arm answers.

    Attributes:
        setting: Index of the setting.
        unit: Name, unique within its setting.
        cluster: Units of one cluster (the turns of a prompt) are resampled together.
        category: Stratum of the bootstrap, and a row of the table by category.
        seed: Of sampling.
        prompt_tokens: Length of each prompt.
        new_tokens: Tokens that every arm emits for each row: plain's text up to its first
            repetition loop, its end of text, or the limit.
        looping: Share of plain's text that was cut off because it looped.
        text_sha256: Hash of plain's token ids (all rows).
    """

    setting: Whole
    unit: str
    cluster: str
    category: str
    seed: Count
    prompt_tokens: Lengths
    new_tokens: Positive
    looping: Share
    text_sha256: str
    kind: Literal["unit"] = "unit"

    @property
    def tokens(self) -> int:
        """Emitted tokens of an arm over all rows."""
        return self.new_tokens * len(self.prompt_tokens)


@dataclass(frozen=True, slots=True)
class SkippedRecord:
    """Requests of a setting that became no unit; follows the last unit of its setting.

    Attributes:
        setting: Index of the setting.
        asked: Requests (turns of prompts) that there were.
        short: Left out because their text ends or loops before the 16th token.
        ungrouped: Left out because too few were left to fill a batch.
        shortened: Requests whose prompt lost its beginning, to the setting or to the context.
    """

    setting: Whole
    asked: Count
    short: Count
    ungrouped: Count
    shortened: Count
    kind: Literal["skipped"] = "skipped"


@dataclass(frozen=True, slots=True)
class TimeRecord:
    """One timed answer of one arm; nothing but the clocks runs beside it.

    Attributes:
        setting: Index of the setting.
        unit: Name of the unit.
        arm: Name of the arm.
        pair: Number of the repeat, from 0.
        order: When it ran among the arms of its repeat, from 0.
        wall: Seconds.
        cpu: Seconds of processor time of the process; None for an arm in another process.
        text_sha256: Hash of the emitted token ids.
        error: What went wrong, instead of figures; empty when nothing did.
    """

    setting: Whole
    unit: str
    arm: str
    pair: Count
    order: Count
    wall: Seconds
    cpu: Seconds | None
    text_sha256: str
    error: str = ""
    kind: Literal["time"] = "time"


@dataclass(frozen=True, slots=True)
class PassRecord:
    """One instrumented answer of one arm, apart from the timed ones.

    Attributes:
        setting: Index of the setting.
        unit: Name of the unit.
        arm: Name of the arm.
        histogram: Tokens that a row emitted in a round -> how often; the one stored fact about
            acceptance. JSON makes the keys strings. Empty for arms that do not count rounds.
        rounds: Target forwards after the prefill.
        drafted: Nodes proposed below the root, over rows and rounds.
        chain: All proposals were chains, so that position i means depth i.
        stages: Seconds by stage of the loop (prefill, draft, forward, verify, commit, observe).
        seconds: Wall seconds of the whole answer in this pass.
        first_token: Seconds until the first token (TTFT).
        gaps: [tokens, seconds since the burst before] of every burst after the first.
        peak_bytes: Peak memory above that before the answer, where it can be measured.
        joules: Energy, where a counter can be read; of one answer counters are coarse.
        sizes: Tokens a row of a target forward, padding included -> how often; prefill left out.
        first_tokens: Tokens of a row in the first burst, which came with the first token.
    """

    setting: Whole
    unit: str
    arm: str
    histogram: Sizes
    rounds: Count
    drafted: Count
    chain: Flag
    stages: SecondsByStage
    seconds: Seconds
    first_token: Seconds
    gaps: Sequence[tuple[Count, Seconds]]
    peak_bytes: Count | None = None
    joules: Seconds | None = None
    sizes: Sizes = field(default_factory=dict)
    first_tokens: Count = 1
    kind: Literal["pass"] = "pass"


@dataclass(frozen=True, slots=True)
class CheckRecord:
    """How one arm's text of one unit compares with plain's.

    Attributes:
        setting: Index of the setting.
        unit: Name of the unit.
        arm: Name of the arm.
        text_sha256: The text that was looked at; each different text of an arm is checked once.
        verdict: "exact": the same ids. "near_tie" (half precision only): every token is within
            twice the rounding noise of the best one. "wrong": neither.
        tokens: Tokens by verdict; "wrong" and "near_tie" count single tokens.
        first_difference: [row, position] where it parts from plain's text; None when exact.
        worst_ratio: Largest regret over rounding noise; the rule allows 2. None when exact.
    """

    setting: Whole
    unit: str
    arm: str
    text_sha256: str
    verdict: Verdict
    tokens: TokensByVerdict
    first_difference: Place | None = None
    worst_ratio: Number | None = None
    kind: Literal["check"] = "check"


@dataclass(frozen=True, slots=True)
class SamplingRecord:
    """Whether what one arm samples has the target's law (`--check-sampling`).

    Attributes:
        setting: Index of the setting.
        arm: Name of the arm.
        samples: Texts that were drawn, each from a seed of its own.
        tokens: Tokens of each.
        p_value: Of texts as far from the exact law, if it holds; over all tests of the arm.
        limit: The check fails below it: 1e-4 over the number of arms.
        total_variation: Half the summed distance between the shares that cells of texts had and
            those of the exact law; noise alone gives the value in `expected_variation`.
        expected_variation: See there.
        same_text: Texts equal to plain's with the same seed.
        promised: The arm promises that all of them are (fp32 and fp64 only).
        passed: The law holds, and so does the promise.
    """

    setting: Whole
    arm: str
    samples: Count
    tokens: Count
    p_value: Share
    limit: Share
    total_variation: Share
    expected_variation: Share
    same_text: Count
    promised: Flag
    passed: Flag
    kind: Literal["sampling"] = "sampling"


@dataclass(frozen=True, slots=True)
class CurveRecord:
    """t(q): median seconds of a target forward over q tokens a row.

    Attributes:
        dtype: Of the target.
        batch: Rows.
        seconds: q -> seconds; JSON makes the keys strings.
        prompt_tokens: Longest prompt of the settings that it is for; 0 for whole prompts.
        prefix: Tokens of each row before the forward.
    """

    dtype: str
    batch: Count
    seconds: SecondsBySize
    prompt_tokens: Whole = 0
    prefix: Count = 0
    kind: Literal["curve"] = "curve"

    def __str__(self) -> str:
        """A short name, for charts."""
        lengths = f", prompts <= {self.prompt_tokens}" if self.prompt_tokens else ""
        return f"{self.dtype}, batch {self.batch}{lengths}"


@dataclass(frozen=True, slots=True)
class ViewRecord:
    """One answer as text, for the report's token view.

    Attributes:
        setting: Index of the setting.
        unit: Name of the unit.
        arm: Name of the arm.
        prompt: Text of the prompt.
        rounds: Pieces of text that each round emitted; the first is the prefill's.
    """

    setting: Whole
    unit: str
    arm: str
    prompt: str
    rounds: Sequence[Sequence[str]]
    kind: Literal["view"] = "view"


@dataclass(frozen=True, slots=True)
class EndRecord:
    """Last line: the run was not cut off.

    Attributes:
        records: Lines before this one.
        stopped_by: "pairs", "time-budget" or "until-ci".
        seconds: Wall seconds of the last start, and those of the answers that earlier ones
            recorded.
    """

    records: Count
    stopped_by: str
    seconds: Seconds
    kind: Literal["end"] = "end"


Record = Annotated[
    Header
    | UnitRecord
    | SkippedRecord
    | TimeRecord
    | PassRecord
    | CheckRecord
    | SamplingRecord
    | CurveRecord
    | ViewRecord
    | EndRecord,
    Field(discriminator="kind"),
]


@dataclass(frozen=True)
class Results:
    """A whole result file, sorted by kind.

    Attributes:
        header: Its first line.
        units: By (setting, unit).
        times: In the order of measurement.
        passes: By (setting, unit, arm).
        checks: In the order of measurement.
        curves: By (dtype, batch, longest prompt or 0).
        views: Answers as text.
        end: Its last line.
        skipped: What became no unit, by setting.
        sampling: Tests of distributions.
    """

    header: Header
    units: Mapping[tuple[int, str], UnitRecord]
    times: Sequence[TimeRecord]
    passes: Mapping[tuple[int, str, str], PassRecord]
    checks: Sequence[CheckRecord]
    curves: Mapping[tuple[str, int, int], CurveRecord]
    views: Sequence[ViewRecord] = field(default_factory=list)
    end: EndRecord | None = None
    skipped: Mapping[int, SkippedRecord] = field(default_factory=dict)
    sampling: Sequence[SamplingRecord] = field(default_factory=list)


PLAIN = "hf"
"""The arm of plain `generate`, whose time users compare with."""


def repeated_arm(baseline: str) -> str:
    """Name of the arm that is the baseline once more: what it seems to gain is noise (A/A)."""
    return f"{baseline}_again"


def to_json(record: Record) -> dict[str, Any]:
    """The record as plain JSON types."""
    return asdict(record)
