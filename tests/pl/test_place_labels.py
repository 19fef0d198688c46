from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest

from scdlkit.pl._place_labels import place_labels


def _overlap(a, b):
    return min(a.x1, b.x1) > max(a.x0, b.x0) and min(a.y1, b.y1) > max(a.y0, b.y0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread", [1.0, 0.25, 0.08])
def test_labels_cover_neither_each_other_nor_points(seed, spread):
    rng = np.random.default_rng(seed)
    figure, ax = plt.subplots(figsize=(6, 4.2), layout="constrained")
    x, y = rng.uniform(0.5 - spread / 2, 0.5 + spread / 2, (2, 9))
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    ax.scatter(x, y)
    labels = place_labels(ax, x, y, [f"strategy_{i}" for i in range(9)], ["black"] * 9)
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in labels]
    frame = ax.get_window_extent()
    for one, other in itertools.combinations(boxes, 2):
        assert not _overlap(one, other)
    points = ax.transData.transform(np.column_stack([x, y]))
    for box in boxes:
        assert box.x0 >= frame.x0 and box.x1 <= frame.x1 and box.y0 >= frame.y0 and box.y1 <= frame.y1
        assert not any(box.contains(*point) for point in points)
    plt.close(figure)


def test_one_point_and_its_text():
    figure, ax = plt.subplots()
    (label,) = place_labels(ax, [0.5], [0.5], ["$a_b"], ["black"])
    assert label.get_text() == "$a_b"
    figure.canvas.draw()
    plt.close(figure)


def test_line_is_avoided():
    figure, ax = plt.subplots(layout="constrained")
    line = ([0.2, 1.0], [0.5, 0.5])
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    (label,) = place_labels(ax, [0.2], [0.5], ["name"], ["black"], line)
    figure.canvas.draw()
    height = ax.transData.transform((0, 0.5))[1]
    box = label.get_window_extent()
    start = ax.transData.transform((0.2, 0.5))[0]
    assert box.x1 < start or box.y0 > height or box.y1 < height
    plt.close(figure)
