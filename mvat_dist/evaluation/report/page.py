"""The page: one HTML file with its style, plots and sounds inside. It has no script and asks no network."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape

from mvat_dist.evaluation.report.blocks import (
    SYMBOL,
    Block,
    Cell,
    Code,
    Figure,
    Figures,
    Fold,
    Items,
    Missing,
    Report,
    Section,
    Sound,
    Sounds,
    Table,
    Text,
)
from mvat_dist.evaluation.report.charts import svg
from mvat_dist.evaluation.report.style import STYLE

# Should a name ever get past `escape`, the browser still runs nothing and loads nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"

_SHORT = 28
"""Letters that stay on one line in a cell: a mean and its interval."""

_SPOKEN = {"better": "better", "worse": "worse"}


def render(report: Report) -> str:
    """The whole report as one HTML document."""
    links = "".join(
        f'<li><a href="#section-{number}">{escape(section.title)}</a></li>'
        for number, section in enumerate(report.sections)
    )
    summary = "".join(f"<p>{escape(line)}</p>" for line in report.summary)
    body = "".join(
        _section(section, 2, f' id="section-{number}"') for number, section in enumerate(report.sections)
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="color-scheme" content="light dark">
<title>{escape(report.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the results</a>
<header><h1>{escape(report.title)}</h1>{summary}
<nav aria-label="Sections"><ul>{links}</ul></nav></header>
<main id="content">
{body}</main>
</body>
</html>
"""


def _section(section: Section, level: int, identity: str = "") -> str:
    head = f"<h{level}{identity}>{escape(section.title)}</h{level}>"
    return f"<section>{head}\n{_blocks(section.blocks, level)}</section>\n"


def _blocks(blocks: Iterable[Block], level: int) -> str:
    return "".join(_block(block, level) + "\n" for block in blocks)


def _block(block: Block, level: int) -> str:
    match block:
        case Text(text):
            return f"<p>{escape(text)}</p>"
        case Missing(text):
            return f'<p class="missing">{escape(text)}</p>'
        case Items(items):
            return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"
        case Table():
            return _table(block)
        case Figures(figures):
            return '<div class="figures">' + "".join(map(_figure, figures)) + "</div>"
        case Sounds(title, sounds):
            return f"<h{level + 1}>{escape(title)}</h{level + 1}>" + _sounds(title, sounds)
        case Code(text):
            return f'<pre tabindex="0"><code>{escape(text)}</code></pre>'
        case Fold(title, inner):
            return f"<details><summary>{escape(title)}</summary>{_blocks(inner, level)}</details>"
        case Section():
            return _section(block, level + 1)


def _table(table: Table) -> str:
    heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in table.heads)
    rows = "".join(
        "<tr>" + f'<th scope="row">{_inside(row[0])}</th>' + "".join(map(_data, row[1:])) + "</tr>\n"
        for row in table.rows
    )
    # Focusable, so that the arrow keys scroll it where it is wider than the screen.
    caption = escape(table.caption)
    return (
        f'<p class="caption">{caption}</p>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}">'
        f'<table aria-label="{caption}"><thead><tr>{heads}</tr></thead>\n<tbody>{rows}</tbody></table></div>'
    )


def _data(cell: Cell) -> str:
    narrow = len(cell.text) <= _SHORT or "\n" in cell.text
    kinds = [cell.mark, "short" if narrow else ""]
    return f'<td class="{" ".join(filter(None, kinds))}">{_inside(cell)}</td>'


def _inside(cell: Cell) -> str:
    mark = ""
    if cell.mark:
        mark = f' <span class="mark" role="img" aria-label="{_SPOKEN[cell.mark]}">{SYMBOL[cell.mark]}</span>'
    text = "<br>".join(map(escape, cell.text.split("\n")))
    return f"{text}<small>{escape(cell.note)}{mark}</small>" if cell.note else text + mark


def _figure(figure: Figure) -> str:
    caption = escape(figure.caption)
    return (
        f'<figure><div class="scroll" tabindex="0" role="region" aria-label="{caption}">'
        f"{svg(figure.chart)}</div><figcaption>{caption}</figcaption></figure>"
    )


def _sounds(title: str, sounds: Iterable[Sound]) -> str:
    return '<div class="sounds">' + "".join(_sound(title, sound) for sound in sounds) + "</div>"


def _sound(title: str, sound: Sound) -> str:
    label = escape(sound.label)
    named = escape(f"{title}: {sound.label}")
    picture = f'<img src="{_uri("image/png", sound.picture)}" alt="spectrogram of {named}">'
    player = (
        f'<audio controls preload="none" aria-label="{named}" src="{_uri(sound.kind, sound.audio)}"></audio>'
    )
    return f"<figure>{picture}<figcaption>{label}</figcaption>{player}</figure>"


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
