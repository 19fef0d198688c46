from __future__ import annotations

import numpy as np
import pytest
from scipy.stats.contingency import association

from scdlkit.foundation.confounding import STRONG, confounding_warnings, cramers_v


def count(codes: np.ndarray, groups: np.ndarray) -> np.ndarray:
    table = np.zeros((groups.max() + 1, codes.max() + 1), dtype=int)
    np.add.at(table, (groups, codes), 1)
    return table


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_scipy_on_many_cells(seed: int) -> None:
    """The correction vanishes with the number of cells."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(5, size=200_000)
    groups = np.where(rng.random(200_000) < 0.2 * seed + 0.1, codes % 4, rng.integers(4, size=200_000))
    table = count(codes, groups)
    assert cramers_v(table) == pytest.approx(association(table, method="cramer"), abs=2e-3)
    assert cramers_v(table.T) == pytest.approx(cramers_v(table))


def test_many_small_groups_are_not_taken_for_confounded() -> None:
    rng = np.random.default_rng(0)
    found, plain = [], []
    for _ in range(20):
        table = count(rng.integers(8, size=400), rng.permutation(np.arange(400) % 100))
        found.append(cramers_v(table))
        plain.append(association(table, method="cramer"))
    assert np.mean(found) < 0.1 < 0.4 < np.mean(plain)


def test_extremes() -> None:
    assert cramers_v(np.diag([10, 20, 5])) == pytest.approx(1)
    assert cramers_v(np.outer([10, 20], [3, 4, 5])) == 0
    assert cramers_v(np.array([[5, 0, 0], [0, 5, 0], [0, 0, 0]])) == pytest.approx(1)  # what is empty does not count
    for table in (np.ones((1, 3)), np.ones((3, 1)), np.eye(2)):
        assert np.isnan(cramers_v(table))  # two cells say nothing


def warn(codes: np.ndarray, groups: np.ndarray) -> list[str]:
    return confounding_warnings(codes, groups, classes=["B", "NK/T", ""], group_key="donor")


def test_warnings_name_classes_and_numbers() -> None:
    codes, groups = np.tile([0, 1, 2], 100), np.repeat([f"d{i}" for i in range(10)], 30)
    assert warn(codes, groups) == []
    alone = np.where((codes == 1) & (groups != "d3"), -1, codes)  # ten cells of one class are left, in one group
    (text,) = warn(alone, groups)
    assert text.startswith("1 of 3 classes occur in one value of 'donor' alone: NK/T (d3, 10 cells).")
    strong, text = warn(codes, np.array(["x", "y", "z"])[codes])
    assert strong.startswith("Labels and 'donor' are confounded (Cramér's V 1.00;")
    assert text.startswith("3 of 3 classes occur in one value of 'donor' alone: B (x, 100 cells), NK/T (y, 100 cells)")


@pytest.mark.parametrize(("share", "expected"), [(STRONG - 0.1, False), (STRONG + 0.1, True)])
def test_strength_of_the_association_decides(share: float, expected: bool) -> None:
    """A group that is the label for a share of the cells, and chance else, is associated by just this share."""
    rng = np.random.default_rng(0)
    codes = rng.integers(3, size=30_000)
    groups = np.where(rng.random(30_000) < share, codes, rng.integers(3, size=30_000))
    assert cramers_v(count(codes, groups)) == pytest.approx(share, abs=0.02)
    assert any("confounded" in text for text in warn(codes, groups.astype(str))) == expected
