"""Drawing for the report: an SVG of fixed size whose colours come from the page's style sheet.

Charts are drawn once for wide screens and once for phones, and the style sheet shows one of them:
scaling a single drawing would shrink its labels until nobody can read them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.etree import ElementTree

from markupsafe import Markup

WIDE, NARROW = 980, 330
"""Widths of the two drawings, in pixels."""

_MARKS, _MOST_LINES = ",:/ ", 8
_CHARACTER = 7.3  # mean width of a character at 12.5 pixels in a wide font


class Canvas:
    """An SVG that is being drawn. Coordinates are pixels from the upper left corner.

    Hints show when an element is pointed at; together they describe the chart to those who cannot
    see it.

    Args:
        width: Of the drawing.
        height: Of the drawing.
        title: Name of the chart.
    """

    def __init__(self, width: float, height: float, title: str) -> None:
        box = {"width": f"{width:.0f}", "height": f"{height:.0f}"}
        view = f"0 0 {width:.0f} {height:.0f}"
        self._svg = ElementTree.Element("svg", {"role": "img", **box, "viewBox": view})
        ElementTree.SubElement(self._svg, "title").text = title
        self._description = ElementTree.SubElement(self._svg, "desc")
        self._hints: list[str] = []

    def _add(self, tag: str, style: str, hint: str = "", **places: float) -> ElementTree.Element:
        written = {name: f"{place:.1f}" for name, place in places.items()}
        added = ElementTree.SubElement(self._svg, tag, {"class": style, **written})
        if hint:
            ElementTree.SubElement(added, "title").text = hint
            self._hints.append(hint)
        return added

    def line(self, start: tuple[float, float], end: tuple[float, float], style: str) -> None:
        """A straight line; `style` names classes of the style sheet."""
        self._add("line", style, x1=start[0], y1=start[1], x2=end[0], y2=end[1])

    def path(self, points: Sequence[tuple[float, float]], style: str, closed: bool = False) -> None:
        """Straight lines through points."""
        moves = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self._add("path", style).set("d", f"M{moves}{' Z' if closed else ''}")

    def bar(
        self, corner: tuple[float, float], size: tuple[float, float], style: str, hint: str
    ) -> None:
        """A rectangle."""
        width, height = (max(side, 0.5) for side in size)
        self._add("rect", style, hint, x=corner[0], y=corner[1], width=width, height=height, rx=1.5)

    def dot(self, centre: tuple[float, float], radius: float, style: str, hint: str) -> None:
        """A filled circle."""
        self._add("circle", style, hint, cx=centre[0], cy=centre[1], r=radius)

    def text(
        self,
        place: tuple[float, float],
        words: str,
        style: str,
        anchor: str = "middle",
        hint: str = "",
    ) -> None:
        """Words on a base line; the anchor is start, middle or end."""
        added = self._add("text", style, hint, x=place[0], y=place[1])
        added.set("text-anchor", anchor)
        added.text = words

    def across(self, scale: Scale, most: int, ends: tuple[float, float], times: float = 1) -> None:
        """Vertical lines at round figures, which stand below them as `times` as many units."""
        for tick in ticks(scale.low * times, scale.high * times, most):
            x = scale(tick / times)
            self.line((x, ends[0]), (x, ends[1]), "grid")
            self.text((x, ends[1] + 15), f"{tick:g}", "tick")

    def up(self, scale: Scale, levels: Iterable[float], ends: tuple[float, float]) -> None:
        """Horizontal lines from one pixel to another, with their figures left of them."""
        for level in levels:
            y = scale(level)
            self.line((ends[0], y), (ends[1], y), "grid")
            self.text((ends[0] - 6, y + 4), f"{level:g}", "tick", "end")

    def render(self, style: str = "") -> Markup:
        """The element; `style` is its class."""
        self._description.text = "; ".join(self._hints)
        self._svg.attrib = {"class": style, **self._svg.attrib}
        text = ElementTree.tostring(self._svg, encoding="unicode", short_empty_elements=False)
        return Markup(text)  # noqa: S704 - ElementTree has escaped every word


@dataclass(frozen=True, slots=True)
class Scale:
    """From figures to pixels, linearly.

    Attributes:
        low: Figure at `start`.
        high: Figure at `end`.
        start: Pixel.
        end: Pixel; below `start` for an axis that grows upwards.
    """

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Pixel of a figure; figures beyond the ends are drawn at the ends."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def both(draw: Callable[..., Canvas], *shown: object) -> Markup:
    """The chart for wide screens and for phones; `draw` draws it at a width."""
    return draw(WIDE, *shown).render("wide") + draw(NARROW, *shown).render("narrow")


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between two figures, at most about `most`."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def wrapped(words: str, most: int) -> list[str]:
    """A name on lines of at most `most` characters, broken where it has a mark if it can be.

    Names of arms differ at their ends as often as not, so nothing is left out of them before
    there are `_MOST_LINES`.
    """
    lines: list[str] = []
    while len(words) > most and len(lines) < _MOST_LINES - 1:
        mark = max(words.rfind(mark, 0, most) for mark in _MARKS) + 1
        end = mark if mark > most // 3 else most
        lines.append(words[:end])
        words = words[end:]
    return [*lines, words if len(words) <= most else words[: most - 1] + "…"]


def fitting(width: float) -> int:
    """Characters of a name that fit into `width` pixels."""
    return int(width / _CHARACTER)


def spread(places: Sequence[float], least: float) -> list[float]:
    """Places of labels, in their order, moved apart so that neighbours are `least` away."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + least)
    return moved
