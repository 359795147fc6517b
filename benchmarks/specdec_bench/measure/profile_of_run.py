"""A run's acceptance as `speculation_profile.json`, which engines' simulators read."""

from __future__ import annotations

from pathlib import Path

from specdec.artifacts.places import DRAFT_HEAD, DRAFT_MODEL, Kind
from specdec.errors import SpecdecError
from specdec.registry import methods
from specdec_bench.arm_names import SERVER, ArmSpec, parse_arm
from specdec_bench.results.records import Results, repeated_arm
from specdec_bench.summary.acceptance import Counts
from specdec_bench.summary.speculation_profile import Measured, draft_length, write_profile


def write_run_profile(path: Path, results: Results) -> str:
    """Writes the profile of the first arm that drafted anything, in the first setting of batch 1.

    Of prompts that were decoded together only joint counts are kept, and a profile has requests.

    Args:
        path: Where to.
        results: Of a run.

    Returns:
        Name of the arm.

    Raises:
        SpecdecError: No setting has batch 1, no arm drafted in it, or the file cannot be written.
    """
    index = _first_single(results)
    arm = _first_drafting(results, index)
    by_category: dict[str, list[Counts]] = {}
    for (setting, name), unit in results.units.items():
        found = results.passes.get((index, name, arm.name)) if setting == index else None
        if found is not None:
            counts = Counts(found.histogram, found.drafted, found.chain)
            by_category.setdefault(unit.category, []).append(counts)
    conditions, facts = results.header.settings[index], results.header.provenance
    given: dict[Kind | None, str] = {DRAFT_HEAD: "head", DRAFT_MODEL: "draft"}
    measured = Measured(
        method=arm.method,
        num_speculative_tokens=_length(arm),
        target=str(facts.get("target")),
        draft=results.header.config.get(given.get(arm.draft_kind, "")),
        conditions={
            "dataset": ", ".join(facts.get("tasks", [])),
            "dtype": conditions.dtype,
            "batch": conditions.batch,
            "temperature": conditions.temperature,
            "device": facts.get("device_name"),
            "arm": arm.name,
        },
        drafts_with=arm.draft_kind if arm.is_ours else None,
    )
    write_profile(path, measured, by_category)
    return arm.name


def _first_single(results: Results) -> int:
    """Index of the first setting in which every prompt was decoded alone."""
    for index, setting in enumerate(results.header.settings):
        if setting.batch == 1:
            return index
    raise SpecdecError(
        "no profile: all settings decode prompts together, and a profile counts single requests; "
        "add --batches 1"
    )


def _first_drafting(results: Results, index: int) -> ArmSpec:
    baseline = results.header.baseline
    for name in results.header.arms:
        if name in (baseline, repeated_arm(baseline)):
            continue
        found = [p for (s, _, arm), p in results.passes.items() if s == index and arm == name]
        if any(one.drafted and one.histogram for one in found):
            try:
                return parse_arm(name)
            except SpecdecError:  # an arm of the caller's own
                return ArmSpec(name, name)
    raise SpecdecError("no profile: no arm of this run drafted anything whose rounds are counted")


def _length(arm: ArmSpec) -> int:
    """Length of a draft that the arm's options ask for; 0 where they do not say."""
    if not arm.is_ours:
        return int(next(iter(arm.options.values()), 0)) if arm.method != SERVER else 0
    given = {"draft": "unused"} if arm.needs_draft else {}
    return draft_length(methods.configure(arm.method, {**arm.options, **given}))
