"""Plots of a report, read back from what was drawn."""

from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvat_dist.evaluation.report.plot import Axis, Plot, Point, Series, spread, svg

XLINK = "{http://www.w3.org/1999/xlink}href"


def parsed(drawn: str) -> ElementTree.Element:
    return ElementTree.fromstring(
        drawn.replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1)
    )


def groups(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [group for group in root.iter("g") if group.get("class", "").startswith(name)]


def marks(root: ElementTree.Element, series: int) -> list[tuple[float, float]]:
    """Centres of a series' marks."""
    (group,) = groups(root, f"series-{series}")
    return [(float(use.get("x", "")), float(use.get("y", ""))) for use in group.iter("use")]


def ticks(root: ElementTree.Element, axis: str) -> dict[float, float]:
    """Place of each number at an axis, by its label."""
    places = {}
    for group in groups(root, f"{axis}tick"):
        (use,), (text,) = list(group.iter("use")), list(group.iter("text"))
        places[float((text.text or "").replace("\N{MINUS SIGN}", "-"))] = float(use.get(axis, ""))
    return places


def read(ticks: dict[float, float], place: float, *, log: bool = False) -> float:
    """The value at a place, by the labels of the axis."""
    values = np.log10(list(ticks)) if log else np.array(list(ticks))
    slope, start = np.polyfit(np.array(list(ticks.values())), values, 1)
    value = slope * place + start
    return float(10**value if log else value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("log", [False, True])
def test_marks_stand_where_the_axes_say(log):
    points = [Point(0.6, 2.1), Point(2.0, 2.4, 2.3, 2.5), Point(13.5, -1.25)]
    root = parsed(svg(Plot("title", Axis("cost", log=log), Axis("score"), [Series("student", points, 2)])))
    drawn = marks(root, 0)
    assert len(drawn) == 3
    for (x, y), point in zip(drawn, points, strict=True):
        assert read(ticks(root, "x"), x, log=log) == pytest.approx(point.x, rel=0.02, abs=0.03)
        assert read(ticks(root, "y"), y) == pytest.approx(point.y, abs=0.02)
    (bar,) = groups(root, "interval-0")
    (path,) = bar.iter("path")
    ends = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", path.get("d", ""))]
    assert [read(ticks(root, "y"), end) for end in ends] == pytest.approx([2.3, 2.5], abs=0.02)
    assert f"stroke: var(--s{2})" in path.get("style", "")


def test_series_over_the_same_number_stand_side_by_side():
    series = [Series(name, [Point(1, 2, 1, 3), Point(10, 3)], style) for style, name in enumerate("abc")]
    root = parsed(svg(Plot("t", Axis("x", log=True), Axis("y"), series, offset=5)))
    first = [marks(root, number)[0][0] for number in range(3)]
    assert np.diff(first) == pytest.approx([5, 5], abs=0.01)
    assert read(ticks(root, "x"), first[1], log=True) == pytest.approx(1, rel=0.02)


@pytest.mark.filterwarnings("error")
def test_one_point_and_equal_points_can_be_drawn():
    for points in ([Point(1, 0)], [Point(5, 2), Point(5, 2)]):
        drawn = svg(Plot("t", Axis("x"), Axis("y"), [Series("a", points, 0, joined=True)]))
        assert "nan" not in drawn
        assert len(marks(parsed(drawn), 0)) == len(points)


def test_a_ring_a_level_and_names_are_drawn_and_described():
    plot = Plot(
        "quality <by> cost",
        Axis("cost"),
        Axis("score"),
        [Series("mvat", [Point(1, 2, ringed=True), Point(2, 3)], 0), Series("teacher", [Point(3, 4)], None)],
        levels=[("all views", 2.5)],
        notes=[(1, "$small$"), (2, "big")],
    )
    drawn = svg(plot)
    root = parsed(drawn)
    assert len(groups(root, "ring")) == 1
    texts = {text.text for text in root.iter("text")}
    assert {"mvat", "teacher", "all views", "$small$", "big", "cost", "score"} <= texts
    described = root.get("aria-label", "")
    for words in ("quality <by> cost", "mvat: 2 points from 2 to 3", "teacher: 4", "all views: 2.5"):
        assert words in described
    assert "#0000" not in drawn
    assert "#0001" not in drawn


@pytest.mark.filterwarnings("error")
def test_a_name_that_begins_with_an_underscore_is_in_the_legend():
    plot = Plot("t", Axis("x"), Axis("y"), [Series("_tiny", [Point(1, 2)], 0)], levels=[("_noisy", 1.5)])
    texts = [text.text for text in parsed(svg(plot)).iter("text")]
    assert texts.count("_tiny") == texts.count("_noisy") == 1


def test_plots_of_one_page_share_no_identifier_and_equal_plots_are_equal_text():
    def plot(title: str) -> str:
        return svg(Plot(title, Axis("x"), Axis("y"), [Series("a", [Point(1, 1), Point(2, 3)], 1)]))

    def identifiers(drawn: str) -> set[str]:
        return {element.attrib["id"] for element in parsed(drawn).iter() if "id" in element.attrib}

    assert plot("one") == plot("one")
    assert identifiers(plot("one"))
    assert not identifiers(plot("one")) & identifiers(plot("another"))
    uses = {use.attrib[XLINK].removeprefix("#") for use in parsed(plot("one")).iter("use")}
    assert uses <= identifiers(plot("one"))


@given(st.lists(st.floats(0, 100), max_size=8))
def test_labels_keep_their_distance_and_their_order(positions):
    placed = spread(positions, 10, 0, 100)
    assert all(-1e-9 <= place <= 100 + 1e-9 for place in placed)
    assert all(after - before >= 10 - 1e-9 for before, after in pairwise(sorted(placed)))
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    assert [placed[index] for index in order] == sorted(placed)
    if all(after - before >= 10 for before, after in pairwise(sorted(positions))):
        assert placed == pytest.approx(positions)
