"""Pieces of the report's page: tables, legends, stamps and the token view. Escapes everything."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from specdec_bench.report.tables import Cell, Table
from specdec_bench.results.records import ViewRecord

_TINTS = 4
_BREAK = ":,_+"  # where a long name of an arm may go on in the next line


def table(found: Table | None, style: str = "") -> str:
    """A table in a box that scrolls when it is wider than the screen; nothing for None."""
    if found is None:
        return ""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in found.head)
    rows = "".join(
        f"<tr>{_cell(row[0], _BREAK)}{''.join(map(_cell, row[1:]))}</tr>" for row in found.rows
    )
    kind = f' class="{style}"' if style else ""
    # A box that scrolls must be reachable by keyboard.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(found.title)}">'
        f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        + (f'<p class="note">{escape(found.note)}</p>' if found.note else "")
    )


def _cell(cell: Cell, breaks: str = "") -> str:
    """A cell whose text may break after the characters of `breaks`."""
    styles: list[str] = [cell.tone] if cell.tone else []
    tint = ""
    if cell.heat is not None:
        styles.append("up" if cell.heat > 0 else "down")
        tint = f' style="--heat: {abs(cell.heat):.2f}"'
    kind = f' class="{" ".join(styles)}"' if styles else ""
    more = f"<small>{escape(cell.more)}</small>" if cell.more else ""
    words = escape(cell.text)
    for character in breaks:
        words = words.replace(character, f"{character}<wbr>")
    return f"<td{kind}{tint}>{words}{more}</td>"


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values."""
    rows = "".join(f"<tr><td>{escape(n)}</td><td>{escape(v)}</td></tr>" for n, v in pairs)
    return f'<table class="facts words"><tbody>{rows}</tbody></table>'


def card(title: str, *content: str) -> str:
    """A framed section; nothing without content."""
    inner = "".join(content)
    return f'<section class="card"><h3>{escape(title)}</h3>{inner}</section>' if inner else ""


def legend(names: Sequence[str], colours: Sequence[str]) -> str:
    """Names beside their colours, which are variables of the style sheet."""
    items = "".join(
        f'<li><i style="background: var(--{colour})"></i>{escape(name)}</li>'
        for name, colour in zip(names, colours, strict=True)
    )
    return f'<ul class="legend">{items}</ul>'


def stamp(tone: str, words: str, lines: Sequence[str]) -> str:
    """A warning that nobody overlooks."""
    more = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f'<div class="stamp {tone}" role="alert"><strong>{escape(words)}</strong>{more}</div>'


def tile(figure: str, words: str, tone: str = "") -> str:
    """One figure at a glance."""
    return f'<div class="tile {tone}"><b>{escape(figure)}</b><span>{escape(words)}</span></div>'


def answer(view: ViewRecord, note: str, is_open: bool) -> str:
    """An answer as text: a tint per round, a thin rule after each token."""
    pieces = []
    for number, tokens in enumerate(view.rounds):
        if not tokens:
            continue
        inside = "".join(f"<span>{escape(token)}</span>" for token in tokens)
        plural = "" if len(tokens) == 1 else "s"
        where = "prefill" if number == 0 else f"round {number}"
        hint = f"{where}: {len(tokens)} token{plural}"
        pieces.append(f'<span class="r r{number % _TINTS}" title="{hint}">{inside}</span>')
    emitted = sum(map(len, view.rounds))
    said = f"{emitted} tokens in {max(len(view.rounds) - 1, 0)} rounds{note}"
    return (
        f"<details{' open' if is_open else ''}><summary>{escape(view.arm)} <small>{escape(said)}"
        f'</small></summary><p class="tokens"><span class="prompt">{escape(view.prompt)}</span>'
        f"{''.join(pieces)}</p></details>"
    )
