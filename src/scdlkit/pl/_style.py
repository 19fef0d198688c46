"""What all figures share: colours, axes, text and the way a figure is shown, saved and closed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scdlkit.get._result import find_param

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's colours for all kinds of colour vision, with wine for their yellow, which is too pale on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255")
# One fewer than colours, so that colour and marker do not repeat together.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
BASELINE_MARKERS = ("h", "d", "p", "*")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
BLUE, ORANGE = PALETTE[:2]
GREY, PALE, INK = "#767676", "#D9D9D9", "#262626"
LABEL_SIZE, SMALL_SIZE, TITLE_SIZE = 9, 8, 10.5

METRIC_NAMES = {
    "macro_f1": "macro-F1",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "weighted_f1": "weighted F1",
    "mcc": "Matthews correlation",
    "auroc_ovr": "AUROC, one against rest",
}
SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test", "unlabelled": "unused"}

_SMALLEST_RANGE = 0.08  # of an axis of scores
_WORD_PART = 7  # characters of a cut word that are dropped
_CANNOT_SHOW = {"agg", "cairo", "pdf", "pgf", "ps", "svg", "template"}


@dataclass(frozen=True)
class StrategyStyle:
    """How one strategy looks in every figure: never told apart by colour alone."""

    color: str
    marker: str
    dashes: Any


def strategy_styles(table: pd.DataFrame) -> dict[str, StrategyStyle]:
    """One style a strategy, the same in every figure of a result; baselines are grey."""
    styles, n_strategies, n_baselines = {}, 0, 0
    for name, role in sorted(zip(table["strategy"], table["role"], strict=True)):
        if role == "baseline":
            styles[name] = StrategyStyle(GREY, BASELINE_MARKERS[n_baselines % 4], DASHES[-1 - n_baselines % 4])
            n_baselines += 1
        else:
            # one further after each round of colours, so that colour and dashes do not repeat together either
            dashes = DASHES[(n_strategies + n_strategies // len(PALETTE)) % len(DASHES)]
            styles[name] = StrategyStyle(
                PALETTE[n_strategies % len(PALETTE)], MARKERS[n_strategies % len(MARKERS)], dashes
            )
            n_strategies += 1
    return styles


def is_plain_baseline(table: pd.DataFrame) -> pd.Series:
    """Rows that the foundation model has to beat: baselines without its encoder (all of them in older results)."""
    baseline = table["role"] == "baseline"
    if "uses_encoder" not in table:
        return baseline
    return baseline & ~table["uses_encoder"].astype(bool)


def interval_of(table: pd.DataFrame, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bound of a score (``"test_macro_f1"``), NaN where the result has none."""
    missing = np.full(len(table), np.nan)
    low, high = (
        table[f"{name}_{bound}"].to_numpy(dtype=float) if f"{name}_{bound}" in table else missing
        for bound in ("low", "high")
    )
    return low, high


def describe_fits(table: pd.DataFrame, *, intervals: bool) -> str:
    """How many fits a score is the mean of, and what the bars are."""
    n_fits = int(table["n_fits"].max()) if "n_fits" in table and len(table) else 1
    parts = [f"means of {n_fits} fits"] if n_fits > 1 else []
    parts += ["bars: 95 % intervals"] if intervals else []
    return "; ".join(parts)


def label_strategies(table: pd.DataFrame) -> list[str]:
    """Names with the word baseline where they are one."""
    return [
        f"{name} (baseline)" if role == "baseline" else str(name)
        for name, role in zip(table["strategy"], table["role"], strict=True)
    ]


def signed(value: float, decimals: int = 3) -> str:
    """A difference with its sign, a true minus, and no sign where it rounds to 0."""
    text = f"{value:+.{decimals}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def padded(values: np.ndarray, *, top: float = np.inf) -> tuple[float, float]:
    """Limits of an axis around the finite values, so wide that chance differences do not look large."""
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    pad = max(0.06 * (high - low), (_SMALLEST_RANGE - (high - low)) / 2, 0.005)
    high = min(high + pad, top)
    return min(low - pad, high - _SMALLEST_RANGE), high


def start(ax: Axes | None, size: tuple[float, float]) -> tuple[Axes, bool]:
    """The axes to draw on, and whether their figure is ours (``size`` in inches)."""
    if ax is not None:
        from matplotlib.axes import Axes

        if not isinstance(ax, Axes):
            raise TypeError(f"ax must be a matplotlib Axes, found {type(ax).__name__}.")
        return ax, False
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=size, layout="constrained")
    return ax, True


def companion_below(ax: Axes, ratio: float, *, share_x: bool = True) -> Axes:
    """Give the lower part of the place of ``ax`` (``ratio`` of the height that stays) to new axes."""
    figure = ax.figure
    spec = ax.get_subplotspec()
    shared = ax if share_x else None
    if spec is not None:
        # Constrained layout makes the room for ticks and names itself.
        hspace = 0.03 if figure.figure.get_layout_engine() is not None else 0.08 if share_x else 0.9
        grid = spec.subgridspec(2, 1, height_ratios=[1, ratio], hspace=hspace)
        ax.set_subplotspec(grid[0])
        return figure.add_subplot(grid[1], sharex=shared)
    box = ax.get_position()
    lower = box.height * ratio / (1 + ratio)
    ax.set_position((box.x0, box.y0 + lower, box.width, box.height - lower))
    return figure.add_axes((box.x0, box.y0, box.width, lower * 0.8), sharex=shared)


def tidy(ax: Axes, *, grid: str | None = None) -> None:
    """Open frame, small ticks, and a faint grid along ``grid`` ("x", "y" or "both")."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=LABEL_SIZE)
    if grid is not None:
        ax.grid(axis=grid, color=PALE, linewidth=0.6)  # type: ignore[arg-type]
        ax.set_axisbelow(True)


def title(ax: Axes, text: str, detail: str = "", *, above_legend: bool = False) -> None:
    """A left-aligned title with an optional second line, with room for a legend below it where there is one."""
    # Names of the user may hold a "$", which is not mathematics.
    text = f"{text}\n{detail}" if detail else text
    ax.set_title(text, loc="left", fontsize=TITLE_SIZE, pad=22 if above_legend else 6, parse_math=False)


def legend_on_top(ax: Axes, handles: Sequence[Any]) -> None:
    """A legend of one row between the title and the axes."""
    ax.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=len(handles),
        frameon=False,
        fontsize=SMALL_SIZE,
        borderaxespad=0.2,
        handletextpad=0.4,
        columnspacing=1.2,
    )


def shorten(names: Iterable[str], width: int = 32) -> list[str]:
    """Names of at most ``width`` characters, cut in the middle; longer only where two would look the same.

    Cell types often share a beginning or an end, so names that the middle cut makes equal are cut where they differ.
    """
    names = [name if name.strip() else "(empty)" for name in names]
    short = {name: _cut_at_words(name, width) for name in names}
    alike: dict[str, list[str]] = {}
    for name, text in short.items():
        alike.setdefault(text, []).append(name)
    for text, group in alike.items():
        if len(group) > 1:
            others = {value for value in short.values() if value != text}
            short.update(zip(group, _cut_apart(group, width, others), strict=True))
    return [short[name] for name in names]


def _cut_apart(names: list[str], width: int, taken: set[str]) -> list[str]:
    """Cut the names at the place nearest the middle that keeps them different from each other and from ``taken``."""
    while True:
        middle = (width - 1) // 2
        for head in sorted(range(width), key=lambda place: abs(place - middle)):
            texts = [_cut(name, width, head) for name in names]
            if len(set(texts)) == len(texts) and not taken.intersection(texts):
                return texts
        width += 4


def _cut(name: str, width: int, head: int) -> str:
    """``head`` characters, an ellipsis, and as much of the end as fits."""
    if len(name) <= width:
        return name
    return f"{name[:head].rstrip(' ,;')}…{name[len(name) - (width - 1 - head) :].lstrip(' ,;')}"


def _cut_at_words(name: str, width: int) -> str:
    """Cut in the middle, without the pieces of words there where they are short."""
    if len(name) <= width:
        return name
    head, _, tail = _cut(name, width, (width - 1) // 2).partition("…")
    if 0 < len(head) - head.rfind(" ") <= _WORD_PART < head.rfind(" "):
        head = head[: head.rfind(" ")]
    breaks = [place for place in (tail.find(" "), tail.find("-") + 1) if 0 < place < _WORD_PART]
    if breaks:
        tail = tail[min(breaks) :]
    return f"{head.rstrip(' ,;')}…{tail.lstrip(' ,;')}"


def describe_cells(splits: pd.Series) -> str:
    """Which cells a figure shows, with a warning where the model has seen them."""
    found = [name for name in SPLIT_NAMES if (splits == name).any()]
    n = f"{len(splits):,}"
    if not found:
        return f"{n} labelled cells"
    text = f"{n} {' + '.join(SPLIT_NAMES[name] for name in found)} cells"
    if "train" in found:
        return f"{text}\nseen in training: no measure of quality"
    if "val" in found:
        return f"{text}\nused to choose the strategy"
    return text


def of_strategy(adata: AnnData, key: str) -> str:
    """Words for a title: whose predictions the AnnData holds; empty where that was not recorded."""
    if not isinstance(adata.uns.get(key), Mapping):
        return ""
    strategy = find_param(adata, "strategy", key)
    return f" of {strategy}" if strategy else ""


def check_metric(table: pd.DataFrame, metric: str) -> str:
    """The readable name of ``metric``, or ValueError listing those in the table."""
    known = [
        column.removeprefix("val_")
        for column in table.columns
        if column.startswith("val_") and not column.endswith(("_sd", "_low", "_high"))
    ]
    if metric not in known:
        raise ValueError(f"metric must be one of {', '.join(map(repr, known))}, found {metric!r}.")
    return METRIC_NAMES.get(metric, metric)


def finish(ax: Axes, *, own: bool, show: bool | None, save: str | os.PathLike[str] | None) -> Axes | None:
    """Save, show and close a figure the way ``show`` and ``save`` ask.

    Parameters
    ----------
    ax
        Drawn axes.
    own
        Whether the figure was made by us (no ``ax`` was given); only then it is ever closed.
    show
        True: show now. False: return the axes. None: show a figure of our own where there is a screen or notebook.
    save
        Path with an image suffix (``.png``, ``.pdf``, ``.svg``); the folder must exist. A figure of our own is closed
        after that: pyplot forgets it, returned axes can still be changed and saved.

    Returns
    -------
    Axes or None
        ``ax`` if ``show`` is False, else None.
    """
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    figure = root_figure(ax)
    if save is not None:
        if not isinstance(save, str | os.PathLike):
            if own:
                plt.close(figure)
            raise TypeError(f"save must be a path such as 'figure.png' or None, found {save!r}.")
        # Text stays text in vector files, so that it can be edited for a paper.
        with mpl.rc_context({"pdf.fonttype": 42, "svg.fonttype": "none"}):
            figure.savefig(save, dpi=200, bbox_inches="tight")
    shown = show or (show is None and own and plt.get_backend().lower() not in _CANNOT_SHOW)
    if shown:
        plt.show()
    if own and (shown or save is not None):
        plt.close(figure)
    return ax if show is False else None


def root_figure(ax: Axes) -> Figure:
    """The figure of ``ax``, also from within a subfigure."""
    figure: Any = ax.figure
    while figure is not figure.figure:
        figure = figure.figure
    return figure
