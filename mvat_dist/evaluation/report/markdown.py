"""The Markdown twin of the page: the same words and figures, without plots and players."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tabulate import tabulate

from mvat_dist.evaluation.report.blocks import (
    SYMBOL,
    Block,
    Cell,
    Code,
    Figures,
    Fold,
    Items,
    Missing,
    Report,
    Section,
    Sounds,
    Table,
    Text,
)


def render(report: Report) -> str:
    """The whole report as GitHub's Markdown."""
    parts = [f"# {_safe(report.title)}", *map(_safe, report.summary)]
    for section in report.sections:
        parts += _section(section, 2)
    return "\n\n".join(parts) + "\n"


def _section(section: Section, level: int) -> list[str]:
    return [f"{'#' * level} {_safe(section.title)}", *_blocks(section.blocks, level)]


def _blocks(blocks: Iterable[Block], level: int) -> list[str]:
    return [part for block in blocks for part in _block(block, level)]


def _block(block: Block, level: int) -> list[str]:
    match block:
        case Text(text):
            return [_safe(text)]
        case Missing(text):
            return [f"*{_safe(text)}*"]
        case Items(items):
            return ["\n".join(f"- {_safe(item)}" for item in items)]
        case Table():
            return _table(block)
        case Figures(figures):
            return ["\n".join(f"- Plot in the page: {_safe(one.caption)}" for one in figures)]
        case Sounds(title, sounds):
            heard = ", ".join(_safe(sound.label) for sound in sounds)
            return [f"- To be heard in the page: {_safe(title)}: {heard}"]
        case Code(text):
            return [_code(text)]
        case Fold(title, inner):
            return [f"**{_safe(title)}**", *_blocks(inner, level)]
        case Section():
            return _section(block, level + 1)


def _table(table: Table) -> list[str]:
    rows = [[_cell(cell) for cell in row] for row in table.rows]
    body = tabulate(rows, [_safe(head) for head in table.heads], tablefmt="github", disable_numparse=True)
    return [f"**{_safe(table.caption)}**", body]


def _cell(cell: Cell) -> str:
    note = f"({_safe(cell.note)})" if cell.note else ""
    text = "; ".join(map(_safe, cell.text.split("\n")))
    return " ".join(filter(None, (text, note, SYMBOL[cell.mark])))


def _code(text: str) -> str:
    """A fence longer than any in the text."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`*", text)))
    return f"{fence}sh\n{text}\n{fence}"


def _safe(text: str) -> str:
    """Text that Markdown shows as it is: names come from folders and from configurations."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))
