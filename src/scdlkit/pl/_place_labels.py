"""Labels next to points that cover neither each other nor the points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ._style import GREY, SMALL_SIZE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

_DISTANCES = (7, 12, 20, 30, 42, 56, 72)  # points
_ANGLES = np.deg2rad([0, 180, 45, 315, 135, 225, 90, 270, 20, 340, 160, 200, 65, 295, 115, 245])
_LEADER_FROM = 18  # points: farther labels get a line to their point
_POINT_RADIUS = 5  # points


def place_labels(
    ax: Axes,
    x: Sequence[float],
    y: Sequence[float],
    texts: Sequence[str],
    colors: Sequence[str],
    line: tuple[Sequence[float], Sequence[float]] | None = None,
) -> list[Annotation]:
    """Write ``texts`` next to the points (data coordinates).

    Every label tries near places first and takes the one that covers least of the points, the labels so far, the
    ``line`` (corners in data coordinates) and what is outside the frame. To be called last: limits, scale and size of the axes must be final.
    """
    figure = ax.figure.figure
    figure.draw_without_rendering()  # runs the layout, so that pixel positions are true
    pixels_per_point = figure.dpi / 72
    points = ax.transData.transform(np.column_stack([np.asarray(x, float), np.asarray(y, float)]))
    radius = _POINT_RADIUS * pixels_per_point
    taken = np.column_stack([points - radius, points + radius])
    if line is not None:
        taken = np.vstack([taken, _boxes_along(ax.transData.transform(np.column_stack(line)), pixels_per_point)])
    frame = np.array(ax.get_window_extent().extents)
    placed = []
    for index in _crowded_first(points):
        label = ax.annotate(
            texts[index],
            (x[index], y[index]),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=SMALL_SIZE,
            color=colors[index],
            ha="center",
            va="center",
            parse_math=False,
            zorder=5,
        )
        label.set_in_layout(False)
        extent = label.get_window_extent()
        half = np.array([extent.width, extent.height]) / 2 + pixels_per_point
        best_cost, best_offset, best_box = np.inf, np.zeros(2), taken[index]
        for distance in _DISTANCES:
            for angle in _ANGLES:
                way = np.array([np.cos(angle), np.sin(angle)])
                # The label's edge, not its centre, keeps the distance.
                offset = way * distance * pixels_per_point + np.sign(np.round(way, 6)) * half * _reach(way)
                centre = points[index] + offset
                box = np.concatenate([centre - half, centre + half])
                others = np.delete(taken, index, axis=0)
                covered = _overlap(box, others).sum() + _outside(box, frame)
                cost = covered * 10 + distance
                if cost < best_cost:
                    best_cost, best_offset, best_box = cost, offset, box
            if best_cost <= distance:
                break
        label.set_position(tuple(best_offset / pixels_per_point))
        taken = np.vstack([taken, best_box])
        gap = np.maximum(np.abs(best_offset) - half, 0)
        if np.hypot(*gap) > _LEADER_FROM * pixels_per_point:
            _leader(ax, label, x[index], y[index])
        placed.append(label)
    return placed


def _reach(way: np.ndarray) -> np.ndarray:
    """How much of the half box lies along each axis: all of it sideways, little of it across."""
    return np.minimum(np.abs(way) * 1.6, 1.0)


def _leader(ax: Axes, label: Annotation, x: float, y: float) -> None:
    line = ax.annotate(
        "",
        (x, y),
        xytext=label.get_position(),
        textcoords="offset points",
        arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 6, "shrinkB": 4},
        zorder=1,
    )
    line.set_in_layout(False)


def _crowded_first(points: np.ndarray) -> np.ndarray:
    gaps = np.hypot(*(points[:, None] - points[None]).transpose(2, 0, 1))
    np.fill_diagonal(gaps, np.inf)
    nearest = gaps.min(axis=1) if len(points) > 1 else np.zeros(len(points))
    return np.argsort(nearest, kind="stable")


def _boxes_along(corners: np.ndarray, half: float) -> np.ndarray:
    """Small boxes that cover a broken line (pixels)."""
    pieces = []
    for start, end in zip(corners[:-1], corners[1:], strict=True):
        steps = max(int(np.ceil(np.hypot(*(end - start)) / (2 * half))), 1)
        pieces.append(np.linspace(start, end, steps + 1))
    along = np.vstack(pieces)
    return np.column_stack([along - half, along + half])


def _overlap(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    width = np.minimum(box[2], boxes[:, 2]) - np.maximum(box[0], boxes[:, 0])
    height = np.minimum(box[3], boxes[:, 3]) - np.maximum(box[1], boxes[:, 1])
    return np.clip(width, 0, None) * np.clip(height, 0, None)


def _outside(box: np.ndarray, frame: np.ndarray) -> float:
    area = (box[2] - box[0]) * (box[3] - box[1])
    return float(area - _overlap(box, frame[None])[0])
