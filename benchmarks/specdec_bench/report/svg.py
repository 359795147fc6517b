"""Drawing for the report: an SVG of fixed size whose colours come from the page's style sheet.

Charts are drawn once for wide screens and once for phones, and the style sheet shows one of them:
scaling a single drawing would shrink its labels until nobody can read them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

WIDE, NARROW = 980, 330
"""Widths of the two drawings, in pixels."""

_MARKS, _MOST_LINES = ",:/ ", 8
_CHARACTER = 7.3  # mean width of a character at 12.5 pixels in a wide font


@dataclass
class Canvas:
    """An SVG that is being drawn. Coordinates are pixels from the upper left corner.

    Attributes:
        width: Of the drawing.
        height: Of the drawing.
        title: Name of the chart, for those who cannot see it.
        description: What it shows, in a sentence or the figures themselves.
        parts: Elements so far.
    """

    width: float
    height: float
    title: str
    description: str
    parts: list[str] = field(default_factory=list)

    def line(self, start: tuple[float, float], end: tuple[float, float], style: str) -> None:
        """A straight line; `style` names classes of the style sheet."""
        (x1, y1), (x2, y2) = start, end
        self.parts.append(
            f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
        )

    def path(self, points: Sequence[tuple[float, float]], style: str, closed: bool = False) -> None:
        """Straight lines through points."""
        moves = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.parts.append(f'<path class="{style}" d="M{moves}{" Z" if closed else ""}"/>')

    def bar(
        self, corner: tuple[float, float], size: tuple[float, float], style: str, hint: str = ""
    ) -> None:
        """A rectangle with a text that shows when it is pointed at."""
        (x, y), (width, height) = corner, size
        title = f"<title>{escape(hint)}</title>" if hint else ""
        self.parts.append(
            f'<rect class="{style}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" '
            f'height="{max(height, 0.5):.1f}" rx="1.5">{title}</rect>'
        )

    def dot(self, centre: tuple[float, float], radius: float, style: str, hint: str = "") -> None:
        """A filled circle."""
        title = f"<title>{escape(hint)}</title>" if hint else ""
        self.parts.append(
            f'<circle class="{style}" cx="{centre[0]:.1f}" cy="{centre[1]:.1f}" r="{radius:.1f}">'
            f"{title}</circle>"
        )

    def text(
        self, place: tuple[float, float], words: str, style: str = "", anchor: str = "start"
    ) -> None:
        """Words on a base line; the anchor is start, middle or end."""
        self.parts.append(
            f'<text class="{style}" x="{place[0]:.1f}" y="{place[1]:.1f}" '
            f'text-anchor="{anchor}">{escape(words)}</text>'
        )

    def render(self, style: str) -> str:
        """The element; `style` is its class."""
        return (
            f'<svg class="{style}" role="img" width="{self.width:.0f}" height="{self.height:.0f}" '
            f'viewBox="0 0 {self.width:.0f} {self.height:.0f}">'
            f"<title>{escape(self.title)}</title><desc>{escape(self.description)}</desc>"
            f"{''.join(self.parts)}</svg>"
        )


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


def both(draw: Callable[[float], Canvas]) -> str:
    """The chart for wide screens and for phones.

    Args:
        draw: Draws it at a width.
    """
    return draw(WIDE).render("wide") + draw(NARROW).render("narrow")


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
