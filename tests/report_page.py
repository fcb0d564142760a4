"""A report's page as a browser would find it: elements, and tables by caption."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from mvat_dist.report import main

VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """A page's elements, and its tables by caption."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.elements.append((tag, found))
        if tag in VOID:
            if tag == "br":
                self._add("\n")
            return
        self.open.append(tag)
        if tag == "table":
            self._rows = self.tables.setdefault(found["aria-label"], [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        elif tag == "small":
            self._add("|")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self._add(data)

    def _add(self, data: str) -> None:
        self.text += data
        if "td" in self.open or "th" in self.open:
            self._rows[-1][-1] += data

    def table(self, start: str) -> dict[tuple[str, str], str]:
        """Cells of the first table whose caption begins so, by row and column name."""
        rows = next(rows for caption, rows in self.tables.items() if caption.startswith(start))
        return {
            (row[0].partition("|")[0], head): cell
            for row in rows[1:]
            for head, cell in zip(rows[0][1:], row[1:], strict=True)
        }


def make(folder: Path, out: Path, *options: str) -> Page:
    """The report of all runs in a folder."""
    runs = sorted(str(one) for one in folder.iterdir())
    main([*runs, "--out", str(out), *options])
    return Page((out / "report.html").read_text())


def numbers(text: str) -> list[float]:
    return [float(one) for one in re.findall(r"-?\d+\.\d+", text.replace("\N{MINUS SIGN}", "-"))]
