"""Tables with bars, as notebooks draw them."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple, TypeAlias


class Bar(NamedTuple):
    """A cell that is drawn: a share in [0, 1] of the width."""

    share: float


Cell: TypeAlias = str | Bar

# Gray that can be read on white and on black; what else there is takes the notebook's own colours.
TRACK = "width:8em;height:0.7em;background:rgba(127,127,127,0.25)"
FILL = "height:100%;background:#4a86c5"


def table(head: Sequence[str], rows: Iterable[Sequence[Cell]], *, left: Iterable[int] = ()) -> str:
    """Write a table; columns are aligned to the right but those in ``left``."""
    to_the_left = set(left)

    def line(tag: str, row: Sequence[Cell]) -> str:
        sides = ["left" if i in to_the_left else "right" for i in range(len(row))]
        cells = [_cell(tag, *cell) for cell in zip(row, sides, strict=True)]
        return f"<tr>{''.join(cells)}</tr>"

    return f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"


def _cell(tag: str, cell: Cell, side: str) -> str:
    style = f"text-align:{side};vertical-align:top;padding:2px 8px"
    return f'<{tag} style="{style}">{_drawn(cell)}</{tag}>'


def _drawn(cell: Cell) -> str:
    if isinstance(cell, Bar):
        return f'<div style="{TRACK}"><div style="{FILL};width:{cell.share:.1%}"></div></div>'
    return lines(cell.split("\n"))


def lines(texts: Iterable[str]) -> str:
    """Write text as it is, one line below the other."""
    return "<br>".join(map(escape, texts))
