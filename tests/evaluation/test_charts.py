"""Plots and pictures of a report, read back from what was drawn."""

from __future__ import annotations

import re
import struct
import zlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvat_dist.evaluation.report.charts import Axis, Chart, Point, Series, spread, svg
from mvat_dist.evaluation.report.spectrogram import CEILING_DB, FLOOR_DB, picture


def dots(drawn: str, style: int) -> list[tuple[float, float]]:
    """Centres of a series' marks, without the one beside its name."""
    group = re.search(rf'<g class="s{style}">(.*?)</g>', drawn)
    assert group is not None
    return [
        (float(x), float(y))
        for x, y in re.findall(r'class="dot" transform="translate\((\S+) (\S+)\)"', group[1])
    ]


def ticks(drawn: str, anchor: str) -> dict[float, float]:
    """Place of each number at an axis, from its own label."""
    found = re.findall(rf'<text x="(\S+)" y="(\S+)" class="tick" text-anchor="{anchor}">(\S+)</text>', drawn)
    along = 0 if anchor == "middle" else 1
    return {float(text.replace("\N{MINUS SIGN}", "-")): float((x, y)[along]) for x, y, text in found}


def read(ticks: dict[float, float], place: float, offset: float, *, log: bool = False) -> float:
    """The value at a place, by the labels of the axis."""
    values = np.log10(list(ticks)) if log else np.array(list(ticks))
    slope, start = np.polyfit(np.array(list(ticks.values())) - offset, values, 1)
    value = slope * place + start
    return float(10**value if log else value)


@pytest.mark.parametrize("log", [False, True])
def test_marks_stand_where_the_axes_say(log):
    points = [Point(0.6, 2.1), Point(2.0, 2.4, 2.3, 2.5), Point(13.5, -1.25)]
    drawn = svg(Chart("title", Axis("cost", log=log), Axis("score"), [Series("one", points, 2)]))
    found = dots(drawn, 2)
    assert len(found) == 3
    for (x, y), point in zip(found, points, strict=True):
        assert read(ticks(drawn, "middle"), x, 0, log=log) == pytest.approx(point.x, rel=0.02, abs=0.03)
        # The baseline of a label is 4 pixels below the line that it belongs to.
        assert read(ticks(drawn, "end"), y, 4) == pytest.approx(point.y, abs=0.02)
    (bar,) = re.findall(r'class="bar" d="M\S+ (\S+)V(\S+)"', drawn)
    assert [read(ticks(drawn, "end"), float(y), 4) for y in bar] == pytest.approx([2.3, 2.5], abs=0.02)


def test_one_point_and_equal_points_can_be_drawn():
    for points in ([Point(1, 0)], [Point(5, 2), Point(5, 2)]):
        drawn = svg(Chart("t", Axis("x"), Axis("y"), [Series("a", points, 0, joined=True)]))
        assert "nan" not in drawn
        assert len(dots(drawn, 0)) == len(points)


@given(st.lists(st.floats(0, 100), max_size=8))
def test_labels_keep_their_distance_and_their_order(positions):
    placed = spread(positions, 10, 0, 100)
    assert all(-1e-9 <= one <= 100 + 1e-9 for one in placed)
    assert all(after - before >= 10 - 1e-9 for before, after in pairwise(sorted(placed)))
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    assert [placed[index] for index in order] == sorted(placed)
    if all(after - before >= 10 for before, after in pairwise(sorted(positions))):
        assert placed == pytest.approx(positions)


def test_a_tone_is_a_bright_line_at_its_frequency():
    time = np.arange(32_000) / 16_000
    tone = (10 ** (-20 / 20) * np.sin(2 * np.pi * 2000 * time)).astype(np.float32)
    png = picture(tone)
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        kind, content = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        assert struct.unpack(">I", png[at + 8 + length : at + 12 + length]) == (zlib.crc32(kind + content),)
        chunks[kind] = content
        at += 12 + length
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any()
    # 128 lines from 8 kHz down to 0: 2 kHz is a quarter up from the bottom.
    loudest = rows[:, 1:].mean(axis=1).argmax()
    assert abs(loudest - height * 3 / 4) <= 1
    # A sine of amplitude -20 dB has a power of -23 dB, half of it at the negative frequency, and the Hann
    # window spreads it over 1.5 bins of 31.25 Hz.
    expected = -26.02 - 10 * np.log10(1.5 * 31.25)
    shade = (expected - FLOOR_DB) / (CEILING_DB - FLOOR_DB) * 255
    assert rows[loudest, 1:].mean() == pytest.approx(min(255, shade), abs=2)
    assert picture(np.zeros(10, np.float32)).startswith(b"\x89PNG")
