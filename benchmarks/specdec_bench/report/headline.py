"""What stands at the head of the report: warnings, figures at a glance, and where they are from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from specdec_bench.report.cells import Cell, Tone
from specdec_bench.report.format import count, fine, plain_times, share, times
from specdec_bench.summary.types import Gain, Summary

_SHOWN_FACTS = {"revision": "revision", "target_sha256": "target", "prompts_sha256": "prompts"}
_HASH_SHOWN = 12  # characters

Stamp = tuple[str, str, list[str]]
"""Tone, headline and lines of a warning that nobody overlooks."""


def stamps(summary: Summary) -> list[Stamp]:
    """What a reader must know first."""
    found: list[Stamp] = []
    wrong = [
        f"{name} in {figures.setting}: {texts.units['wrong']} of "
        f"{sum(texts.units.values())} units, first at {texts.first_wrong}"
        for figures in summary.settings
        for name, texts in figures.wrong_texts.items()
    ]
    if wrong:
        words = "It is not what the target emits; no speed-up of any arm is shown in its setting."
        found.append(("bad", "WRONG TEXT", [*wrong, words]))
    if summary.wrong_sampling:
        lines = [
            f"{test.arm} in {summary.header.settings[test.setting]}: p = {test.p_value:.3g} over "
            f"{test.samples} texts, {test.same_text} equal to plain's"
            for test in summary.wrong_sampling
        ]
        words = "They sample from another distribution; no speed-up of theirs is shown."
        found.append(("bad", "WRONG DISTRIBUTION", [*lines, words]))
    if summary.noisy:
        lines = [
            f"{clock} time in {figures.setting}: A/A {fine(getattr(figures.again, clock))}"
            for figures in summary.settings
            for clock in figures.noisy
        ]
        words = (
            "The same program timed against itself differs by more than 2 %, or the interval is "
            "wider than 5 % to each side."
        )
        found.append(("warn", "MACHINE TOO NOISY", [*lines, words]))
    if any(figures.again is None for figures in summary.settings):
        words = "The baseline was not timed against itself, so nobody knows this machine's noise."
        found.append(("warn", "NO A/A ROW", [words]))
    return found


def provenance_line(summary: Summary) -> str:
    """What was measured with what, where and when, in a line; the whole list stands below."""
    facts = summary.header.provenance
    packages, threads = facts.get("packages"), facts.get("threads")
    versions = {"specdec": facts.get("specdec")}
    versions |= packages if isinstance(packages, Mapping) else {}
    named = [f"{name} {version}" for name, version in versions.items() if version]
    for name, words in _SHOWN_FACTS.items():
        if facts.get(name) is not None:
            found, plus, more = str(facts[name]).partition("+")
            named.append(f"{words} {found[:_HASH_SHOWN]}{plus}{more}")
    device = facts.get("device_name") or facts.get("device")
    worked = threads and f"{threads} thread{'' if threads == 1 else 's'}"
    named += [str(fact) for fact in (device, worked, facts.get("time")) if fact]
    return "; ".join([f"Run {summary.header.run_id[:_HASH_SHOWN]}", *named])


def target_name(summary: Summary) -> str:
    """Of the target, as it was given."""
    provenance, config = summary.header.provenance, summary.header.config
    return str(config.get("target") or provenance.get("target") or "a run")


def what_ran(summary: Summary) -> str:
    """Target, tasks and device in a sentence."""
    tasks = summary.header.config.get("tasks") or ["smoke"]
    names = ", ".join(map(str, tasks)) if isinstance(tasks, list | tuple) else str(tasks)
    device = summary.header.provenance.get("device", "")
    return f"Target {target_name(summary)} on {names}" + (f", on {device}" if device else "")


def tiles(summary: Summary) -> Iterator[Cell]:
    """Figures at a glance, each with words below it."""
    arms = [(arm, figures) for figures in summary.settings for arm in figures.arms]
    gains = [(a.gain, a.name, s) for a, s in arms if a.gain and a.name != "hf"]
    if gains:
        gain, name, figures = max(gains, key=lambda one: one[0].steadier().value)
        ratio = gain.steadier()
        said = f"{name}, the fastest; {figures.setting}; {times(ratio)}"
        tone: Tone = "warn" if _clock(gain) in figures.noisy else ""
        yield Cell(plain_times(ratio.value), tone, more=said)
    yield _texts_tile(summary)
    again = [(figures.again, figures) for figures in summary.settings if figures.again]
    if again:
        gain, figures = max(again, key=lambda one: abs(one[0].steadier().value - 1))
        ratio = gain.steadier()
        said = "no interval" if ratio.over == "nothing" else f"± {share(ratio.half_width, 1)}"
        said += f": the baseline over itself (A/A, {_clock(gain)} time), the worst setting"
        tone = "warn" if _clock(gain) in figures.noisy else ""
        yield Cell(f"{ratio.value:.3f}", tone, more=said)
    prompts = max((figures.prompts for figures in summary.settings), default=0)
    said = f"prompts, {len(summary.header.arms)} arms, {len(summary.settings)} setting"
    said += "" if len(summary.settings) == 1 else "s"
    said += f", {summary.end.seconds / 60:.1f} minutes" if summary.end is not None else ""
    yield Cell(count(prompts), more=said)


def _texts_tile(summary: Summary) -> Cell:
    """How many texts hold, of those that are promised to be plain's."""
    units = [arm.texts.units for figures in summary.settings for arm in figures.arms]
    free, near, exact = (
        sum(found.get(verdict, 0) for found in units)
        for verdict in ("not_promised", "near_tie", "exact")
    )
    total = sum(sum(found.values()) for found in units) - free
    good = bool(total) and exact + near == total
    said = "texts hold" if good else "texts hold, and the others do not"
    if near:
        said += f": {count(near)} part from plain's at near-ties"
    elif good:
        said += ": they are plain's, token by token"
    said += f"; {count(free)} more are not promised to be" if free else ""
    return Cell(f"{count(exact + near)} of {count(total)}", "good" if good else "bad", more=said)


def _clock(gain: Gain) -> str:
    """Of `Gain.steadier`."""
    return "cpu" if gain.cpu is not None else "wall"
