"""Labels of the trade-off chart: clear of each other, of the points and of the line, and inside of the frame."""

from itertools import combinations, pairwise

import matplotlib as mpl
import pytest

from app.evaluation.metrics import Perplexity
from app.evaluation.report.charts import STYLE, ChartPoint, trade_offs
from app.evaluation.report.label_placement import Box, place_labels
from app.evaluation.speed import STANDARD

FRAME = Box(0, 0, 300, 200)


def overlaps(points, boxes, segments, gap):
    """Every pair of things that overlap, by sampling each segment rather than by clipping it."""
    marks = [Box(x - gap / 2, y - gap / 2, x + gap / 2, y + gap / 2) for x, y in points]
    found = [(a, b) for a, b in combinations(boxes, 2) if a.meets(b)]
    found += [(box, mark) for box in boxes for mark in marks if box.meets(mark)]
    for (x, y), (x_end, y_end) in segments:
        places = [(x + (x_end - x) * i / 500, y + (y_end - y) * i / 500) for i in range(501)]
        dots = [Box(a - 1e-6, b - 1e-6, a + 1e-6, b + 1e-6) for a, b in places]
        found += [(box, dot) for box in boxes for dot in dots if box.meets(dot)]
    return found


@pytest.mark.parametrize(
    "points",
    [
        [(50, 60), (120, 45), (280, 30)],
        [(150, 100), (158, 104)],  # closer than a label is long
        [(10, 10), (290, 10), (290, 190), (10, 190)],  # in the corners
        [(100, 20), (100, 45), (100, 70), (100, 95), (100, 120)],
        [(60, 60), (90, 66), (120, 70), (150, 60)],
    ],
)
def test_labels_overlap_nothing_where_there_is_room(points):
    segments = list(pairwise(points))
    boxes = place_labels(points, [(60, 10)] * len(points), segments, FRAME, gap=8)
    assert overlaps(points, boxes, segments, gap=8) == []
    for (x, y), box in zip(points, boxes, strict=True):
        assert (box.right - box.left, box.top - box.bottom) == pytest.approx((60, 10))
        assert FRAME.holds(box)
        assert max(box.left - x, x - box.right, box.bottom - y, y - box.top) < 24  # still beside its own point


def test_a_label_without_room_still_stands_inside_of_the_frame():
    points = [(150 + i, 100 + i) for i in range(30)]
    assert all(FRAME.holds(box) for box in place_labels(points, [(60, 10)] * 30, [], FRAME, gap=8))


@pytest.mark.parametrize(
    ("segment", "crossed"),
    [
        (((0, 0), (10, 10)), True),
        (((5, -5), (5, 20)), True),
        (((5, 5), (6, 6)), True),  # inside
        (((0, 3), (3, 0)), False),
        (((0, 5), (3, 5)), False),  # ends before it
        (((4, 0), (4, 10)), False),  # along an edge
    ],
)
def test_what_crosses_a_box(segment, crossed):
    assert Box(4, 4, 8, 8).crossed_by(segment) == Box(4, 4, 8, 8).crossed_by(segment[::-1]) == crossed


def test_the_names_on_the_chart_are_apart():
    """Five steps of a pipeline, of which the first and the fourth are close and on the Pareto front."""
    figures = {
        "01-teacher": (39.88, 10.82e6, 143.0),
        "02-student": (41.75, 6.46e6, 252.0),
        "03-narrow": (42.84, 5.64e6, 355.4),
        "04-recovered": (40.40, 5.64e6, 338.3),
        "05-quantized": (40.66, 2.00e6, 491.0),
    }
    steps = [ChartPoint(name, ppl, (ppl, ppl), stored, rate) for name, (ppl, stored, rate) in figures.items()]
    with mpl.rc_context(STYLE):
        figure = trade_offs(steps, Perplexity(), STANDARD.throughputs[0]).figure()
        figure.draw_without_rendering()
        for panel in figure.axes:
            assert [text.get_text() for text in panel.texts] == list(figures)
            boxes = [Box(*text.get_window_extent().extents) for text in panel.texts]
            points = [tuple(panel.transData.transform(text.xy)) for text in panel.texts]
            segments = list(pairwise(map(tuple, panel.transData.transform(panel.lines[0].get_xydata()))))
            assert overlaps(points, boxes, segments, gap=7) == []
