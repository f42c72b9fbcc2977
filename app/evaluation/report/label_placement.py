"""Label placement on a chart: beside the points, and clear of each other, other points and lines.

All lengths and places are in one unit, x to the right and y upwards (a chart uses pixels).
"""

from collections.abc import Sequence
from typing import NamedTuple

Point = tuple[float, float]
Segment = tuple[Point, Point]

SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))  # tried in this order
DISTANCES = (1.0, 1.6, 2.4)  # of a label from its point, in gaps
OUTSIDE = 100  # what leaving the frame costs, in things that are overlapped


class Box(NamedTuple):
    """A rectangle by its sides."""

    left: float
    bottom: float
    right: float
    top: float

    def meets(self, other: "Box") -> bool:
        """Whether the two share more than an edge."""
        across = self.left < other.right and other.left < self.right
        return across and self.bottom < other.top and other.bottom < self.top

    def holds(self, other: "Box") -> bool:
        """Whether the other lies inside."""
        across = self.left <= other.left and other.right <= self.right
        return across and self.bottom <= other.bottom and other.top <= self.top

    def crossed_by(self, segment: Segment) -> bool:
        """Whether a line segment runs through the inside (Liang and Barsky 1984: clip it side by side)."""
        (x, y), (x_end, y_end) = segment
        enter, leave = 0.0, 1.0
        for start, move, low, high in ((x, x_end - x, self.left, self.right), (y, y_end - y, self.bottom, self.top)):
            if move == 0:
                if not low < start < high:
                    return False
                continue
            first, last = sorted(((low - start) / move, (high - start) / move))
            enter, leave = max(enter, first), min(leave, last)
        return enter < leave


def candidates(point: Point, size: tuple[float, float], gap: float) -> list[Box]:
    """The places of a label of this (width, height) around its point, the best first."""
    (x, y), (width, height) = point, size
    boxes = []
    for distance in (gap * step for step in DISTANCES):
        for across, up in SIDES:
            rise = distance if across == 0 else distance / 2  # beside a point, a label need not clear it upwards
            left = x + across * distance - width * (1 - across) / 2
            bottom = y + up * rise - height * (1 - up) / 2
            boxes.append(Box(left, bottom, left + width, bottom + height))
    return boxes


def place_labels(
    points: Sequence[Point],
    sizes: Sequence[tuple[float, float]],
    segments: Sequence[Segment],
    frame: Box,
    gap: float,
) -> list[Box]:
    """Choose a place for the label of each point, the one that overlaps the fewest labels, points and segments.

    The label with the fewest free places chooses first.

    Args:
        points: what is labelled, (P,).
        sizes: width and height of each label, (P,).
        segments: lines that are drawn.
        frame: what the labels stay inside of.
        gap: between a point and its label; a point takes a square of this side.
    """
    half = gap / 2
    marks = [Box(x - half, y - half, x + half, y + half) for x, y in points]
    placed: dict[int, Box] = {}

    def cost(box: Box) -> int:
        overlapped = sum(box.meets(other) for other in (*marks, *placed.values()))
        crossed = sum(box.crossed_by(segment) for segment in segments)
        return overlapped + crossed + OUTSIDE * (not frame.holds(box))

    choices = [candidates(point, size, gap) for point, size in zip(points, sizes, strict=True)]
    while waiting := [index for index in range(len(points)) if index not in placed]:
        costs = {index: [cost(box) for box in choices[index]] for index in waiting}
        index = min(waiting, key=lambda index: (costs[index].count(0), index))
        placed[index] = choices[index][costs[index].index(min(costs[index]))]
    return [placed[index] for index in range(len(points))]
