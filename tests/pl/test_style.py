from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scdlkit import pl
from scdlkit.pl import _style

FIGURES = [
    "strategy_comparison", "strategy_differences", "strategy_tradeoff", "leakage_gap", "per_class_f1",
    "confusion_matrix", "training_history", "reliability", "label_efficiency",
]  # fmt: skip


@given(st.lists(st.text(max_size=80), unique=True, max_size=12), st.integers(12, 40))
def test_shorten_keeps_names_apart(names, width):
    short = _style.shorten(names, width)
    shown = [name if name.strip() else "(empty)" for name in names]
    assert len(set(short)) == len(set(shown))
    for name, text in zip(shown, short, strict=True):
        assert len(text) <= max(len(name), width)
        if len(name) <= width:
            assert text == name


def test_shorten_keeps_both_ends_and_the_difference():
    names = [
        "naive thymus-derived CD8-positive, alpha-beta T cell",
        "naive thymus-derived CD4-positive, alpha-beta T cell",
        "CD4-positive, alpha-beta memory T cell",
        "B",
        "",
    ]
    assert _style.shorten(names) == [
        "naive thymus-derived CD8…T cell",
        "naive thymus-derived CD4…T cell",
        "CD4-positive…memory T cell",
        "B",
        "(empty)",
    ]


def test_styles_differ_and_do_not_depend_on_row_order():
    names = [f"s{i}" for i in range(12)] + ["base"]
    table = pd.DataFrame({"strategy": names, "role": ["strategy"] * 12 + ["baseline"]})
    styles = _style.strategy_styles(table)
    assert len({(s.color, s.marker) for s in styles.values()}) == 13
    assert len({(s.color, s.dashes) for s in styles.values()}) == 13
    assert styles["base"].color == _style.GREY
    assert styles == _style.strategy_styles(table.iloc[::-1])


@pytest.mark.parametrize(
    ("value", "text"), [(0.0124, "+0.012"), (-0.5, "−0.500"), (-0.0004, "0.000"), (0.0, "0.000"), (np.nan, "+nan")]
)
def test_signed(value, text):
    assert _style.signed(value) == text


@pytest.mark.parametrize("values", [[0.5], [0.99, 1.0], [np.nan, 0.2], []])
def test_padded_is_never_narrow_and_holds_all(values):
    low, high = _style.padded(np.array(values, dtype=float), top=1.01)
    assert high - low >= 0.08 - 1e-12 and high <= 1.01
    assert all(low < value < high for value in values if np.isfinite(value))


@pytest.mark.parametrize(
    ("splits", "text"),
    [
        (["test"] * 1200, "1,200 test cells"),
        (["val"], "1 validation cells\nused to choose the strategy"),
        (["test", "train"], "2 training + test cells\nseen in training: no measure of quality"),
        ([""], "1 labelled cells"),
    ],
)
def test_describe_cells(splits, text):
    assert _style.describe_cells(pd.Series(splits)) == text


@pytest.mark.parametrize("name", FIGURES)
def test_show_false_returns_open_axes(three_often, name):
    ax = getattr(pl, name)(three_often, show=False)
    assert isinstance(ax, plt.Axes)
    assert plt.get_fignums() == [ax.figure.number]
    plt.close(ax.figure)


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_save_writes_and_closes(three, suffix, tmp_path):
    path = tmp_path / f"figure.{suffix}"
    assert isinstance(pl.strategy_tradeoff(three, save=path, show=False), plt.Axes)
    assert plt.get_fignums() == []
    assert pl.strategy_tradeoff(three, save=path) is None
    assert path.stat().st_size > 2000
    if suffix == "svg":
        assert ">full_finetune</text>" in path.read_text()


@pytest.mark.parametrize("name", FIGURES)
def test_results_read_from_disk_can_be_drawn(from_disk, name, tmp_path):
    getattr(pl, name)(from_disk, save=str(tmp_path / "figure.png"))


OLD = [
    "strategy_comparison",
    "strategy_tradeoff",
    "per_class_f1",
    "confusion_matrix",
    "training_history",
    "reliability",
]


@pytest.mark.parametrize("name", OLD)
def test_results_of_an_older_version_can_be_drawn(older, name, tmp_path):
    getattr(pl, name)(older, save=tmp_path / "figure.png")


@pytest.mark.parametrize("layout", [None, "constrained"])
@pytest.mark.parametrize("name", FIGURES)
def test_own_axes_stay_open_and_in_their_place(three_often, name, layout, tmp_path):
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout=layout)
    untouched = axes[1].get_subplotspec()
    assert getattr(pl, name)(three_often, ax=axes[0], save=tmp_path / "both.png") is None
    assert plt.get_fignums() == [figure.number]
    assert axes[1].get_subplotspec() is untouched
    assert axes[0].has_data()
    plt.close(figure)


def test_axes_in_a_subfigure_and_without_a_grid(three, tmp_path):
    figure = plt.figure(figsize=(10, 5), layout="constrained")
    left, right = figure.subfigures(1, 2)
    ax = pl.training_history(three, ax=left.subplots(), show=False, save=tmp_path / "a.png")
    assert _style.root_figure(ax) is figure
    pl.strategy_tradeoff(three, ax=right.subplots())
    plt.close(figure)
    figure = plt.figure()
    free = figure.add_axes((0.1, 0.1, 0.8, 0.8))
    pl.reliability(three, ax=free)
    lower = figure.axes[1].get_position()
    np.testing.assert_allclose(lower.y0, 0.1)
    assert lower.y1 < free.get_position().y0
    plt.close(figure)


def test_not_shown_nor_saved_stays_current_without_a_screen(three):
    assert pl.strategy_comparison(three) is None
    assert len(plt.get_fignums()) == 1
    plt.close()


@pytest.mark.parametrize("show", [None, True])
def test_shown_once_and_closed_on_a_screen(three, show, monkeypatch):
    shown = []
    monkeypatch.setattr(plt, "get_backend", lambda: "TkAgg")
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.get_fignums()))
    pl.strategy_comparison(three, show=show)
    assert len(shown) == 1 and len(shown[0]) == 1


def test_wrong_ax_and_save(three):
    with pytest.raises(TypeError, match="ax must be a matplotlib Axes, found ndarray"):
        pl.reliability(three, ax=np.array([1]))
    with pytest.raises(TypeError, match="save must be a path such as 'figure.png' or None, found True"):
        pl.reliability(three, save=True)
