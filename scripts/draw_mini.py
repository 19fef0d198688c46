"""Draw the figures of the model card of ``mini``.

    python scripts/draw_mini.py --curve RUN/curve.csv --scores SCORES.json --out docs/_static

``--curve`` is written by ``pretrain_mini.py``, ``--scores`` by ``benchmarks/bench_mini.py --json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

LOSSES = {"masked": "masked gene", "cell": "gene from cell embedding", "contrast": "two views of a cell"}
METHODS = {"mini": "mini", "pca_logreg": "pca_logreg", "genes": "genes", "random": "random weights"}
COLOURS = {"mini": "#0072b2", "pca_logreg": "#d55e00", "genes": "#e69f00", "random": "#999999"}


def draw_curve(curve: pd.DataFrame, path: Path) -> None:
    figure, axes = plt.subplots(1, len(LOSSES), figsize=(9, 2.6), layout="constrained")
    for axis, (name, title) in zip(axes, LOSSES.items(), strict=True):
        axis.plot(curve["step"], curve[name], color="#bbbbbb", linewidth=0.8)
        axis.plot(curve["step"], curve[name].rolling(25, center=True, min_periods=10).median(), color="#0072b2")
        low, high = curve[name].iloc[10:].min(), curve[name].iloc[10:].max()
        axis.set(title=title, xlabel="step", ylim=(low - 0.05 * (high - low), high + 0.05 * (high - low)))
    axes[0].set_ylabel("loss")
    figure.savefig(path, dpi=150)


def draw_scores(scores: pd.DataFrame, path: Path) -> None:
    scores = scores[scores["metric"].str.startswith("macro-F1")]
    shares = list(dict.fromkeys(scores["metric"]))
    names = list(dict.fromkeys(scores["data"]))
    figure, axes = plt.subplots(1, len(names), figsize=(2.3 * len(names), 2.8), sharey=True, layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        for method, label in METHODS.items():
            rows = scores[(scores["data"] == name) & (scores["method"] == method)].groupby("metric")["score"]
            axis.errorbar(
                range(len(shares)), rows.mean()[shares], rows.std()[shares],
                color=COLOURS[method], marker="o", markersize=3, capsize=2, label=label,
            )  # fmt: skip
        axis.set_title(name, fontsize=9)
        axis.set_xticks(range(len(shares)), [share.split()[-1] for share in shares])
        axis.set(xlabel="labels", ylim=(0, 1))
    axes[0].set_ylabel("macro-F1, test cells")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS), frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--curve", required=True, type=Path)
    parser.add_argument("--scores", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    for side in ("top", "right"):
        plt.rcParams[f"axes.spines.{side}"] = False
    draw_curve(pd.read_csv(options.curve), options.out / "mini_curves.png")
    draw_scores(pd.DataFrame(json.loads(options.scores.read_text())["results"]), options.out / "mini_labels.png")


if __name__ == "__main__":
    main()
