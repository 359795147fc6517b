"""A run's acceptance as `speculation_profile.json`, which engines' simulators read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from specdec.errors import SpecdecError
from specdec.registry import methods
from specdec_bench.measure.arms import ArmSpec, parse_arm
from specdec_bench.results.records import PassRecord, Results, repeated_arm
from specdec_bench.summary.acceptance import Acceptance, Counts
from specdec_bench.summary.speculation_profile import (
    Measured,
    build_profile,
    draft_length,
    write_profile,
)


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
    units = [unit for (setting, _), unit in results.units.items() if setting == index]
    passes = {unit.unit: results.passes.get((index, unit.unit, arm.name)) for unit in units}
    categories = dict.fromkeys(unit.category for unit in units)
    by_category = {
        name: [p for u in units if u.category == name and (p := passes[u.unit]) is not None]
        for name in categories
    }
    whole = _acceptance([found for found in passes.values() if found is not None])
    setting, facts = results.header.settings[index], results.header.provenance
    config = results.header.config
    drafts = {"eagle3": "head", "draft_model": "draft", "hf_assisted": "draft"}
    measured = Measured(
        method=arm.method,
        num_speculative_tokens=max(_length(arm), whole.positions, 1),
        target=str(facts.get("target")),
        draft=config.get(drafts[arm.method]) if arm.method in drafts else None,
        by_category={
            name: _acceptance(found)
            for name, found in by_category.items()
            if any(one.histogram for one in found)
        },
        conditions={
            "dataset": ", ".join(facts.get("tasks", [])),
            "dtype": setting.dtype,
            "batch": setting.batch,
            "temperature": setting.temperature,
            "device": facts.get("device_name"),
            "arm": arm.name,
        },
    )
    write_profile(path.expanduser(), build_profile(whole, measured))
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


def _acceptance(passes: Sequence[PassRecord]) -> Acceptance:
    return Acceptance.of_requests([Counts(p.histogram, p.drafted, p.chain) for p in passes])


def _length(arm: ArmSpec) -> int:
    """Length of a draft that the arm's options ask for; 0 where they do not say."""
    if arm.method not in methods.names():
        return int(next(iter(arm.options.values()), 0)) if arm.method.startswith("hf") else 0
    options = dict(arm.options)
    if arm.needs_draft:
        options["draft"] = "unused"
    return draft_length(methods.configure(arm.method, options))
