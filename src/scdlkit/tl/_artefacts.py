"""What ``output_dir`` gets: metrics, a report, figures and the saved model."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scdlkit._keys import UNASSIGNED, ResultKeys
from scdlkit._settings import logger

if TYPE_CHECKING:
    from anndata import AnnData

    from scdlkit.runner import AnnotationRunner

_METRICS = ("macro_f1", "accuracy", "balanced_accuracy", "weighted_f1", "mcc", "auroc_ovr")
_MOST_CELLS = 20_000  # of the UMAP figure; more add minutes and no picture


def write_artefacts(
    adata: AnnData, runner: AnnotationRunner, folder: str | os.PathLike[str], *, key: str
) -> dict[str, Path]:
    """Write ``strategy_metrics.csv``, ``report.md``, figures and ``model/``; each file appears complete or not at all.

    Parameters
    ----------
    adata
        Annotated cells; read only.
    runner
        Fitted.
    folder
        Target; files of these names are replaced.
    key
        ``key_added`` of the annotation.

    Returns
    -------
    dict
        Name of each artefact → its path.
    """
    from scdlkit import pl

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {
        "metrics": folder / "strategy_metrics.csv",
        "comparison": folder / "strategy_comparison.png",
        "tradeoff": folder / "strategy_tradeoff.png",
        "confusion": folder / "confusion_matrix.png",
        "reliability": folder / "reliability.png",
        "umap": folder / "embedding_umap.png",
        "report": folder / "report.md",
        "model": folder / "model",
    }
    runner.save(paths["model"])
    _write_text(paths["metrics"], runner.results_.to_csv(index=False))
    pl.strategy_comparison(adata, key=key, save=paths["comparison"], show=False)
    pl.strategy_tradeoff(adata, key=key, save=paths["tradeoff"], show=False)
    pl.confusion_matrix(adata, key=key, save=paths["confusion"], show=False)
    pl.reliability(adata, key=key, save=paths["reliability"], show=False)
    draw_umap(adata, key=key, path=paths["umap"])
    _write_text(paths["report"], _report(runner, paths))
    logger.info("Model, metrics, report and figures: %s", folder)
    return paths


def draw_umap(adata: AnnData, *, key: str, path: Path) -> None:
    """UMAP of the embedding, coloured by given and by predicted label, in the same colours."""
    import matplotlib.pyplot as plt
    import scanpy as sc
    from anndata import AnnData

    keys = ResultKeys(key)
    label_key = adata.uns[key]["params"]["label_key"]
    shown = np.flatnonzero(adata.obs[keys.label_code].to_numpy() >= 0)
    if len(shown) > _MOST_CELLS:
        shown = np.sort(np.random.default_rng(0).choice(shown, _MOST_CELLS, replace=False))
    cells = AnnData(adata.obsm[keys.embedding][shown], obs=adata.obs.iloc[shown][[]])
    classes = [str(name) for name in adata.uns[key]["classes"]]
    names = {"given": label_key, "predicted": keys.label}
    for title, column in names.items():
        values = adata.obs[column].iloc[shown].astype(object)
        cells.obs[title] = values.where(values.notna(), None).map(lambda v: v if v is None else str(v))
        cells.obs[title] = cells.obs[title].astype("category").cat.set_categories([*classes])
        cells.uns[f"{title}_colors"] = _colours(len(classes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # umap's and scanpy's, about threads and their own futures
        sc.pp.neighbors(cells, use_rep="X", n_neighbors=min(15, max(2, cells.n_obs - 1)), random_state=0)
        sc.tl.umap(cells, random_state=0)
        figure = sc.pl.umap(
            cells, color=list(names), show=False, return_fig=True, frameon=False, wspace=0.1,
            legend_loc="right margin", title=[f"given ({label_key})", "predicted"], na_in_legend=False,
        )  # fmt: skip
    figure.axes[0].get_legend().remove()  # both panels share the classes and colours
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, dpi=150, bbox_inches="tight", format="png")
    plt.close(figure)
    unfinished.replace(path)


def _colours(n: int) -> list[str]:
    from scanpy.plotting import palettes

    for palette in (palettes.vega_20_scanpy, palettes.default_28, palettes.default_102):
        if n <= len(palette):
            return list(palette[:n])
    return [palettes.default_102[i % 102] for i in range(n)]


def _report(runner: AnnotationRunner, paths: dict[str, Path]) -> str:
    """The run as Markdown: what was used, what came out, what to make of it."""
    report, table = runner.report_, runner.results_
    header = ["strategy", "role", *(f"{split} {m}" for split in ("val", "test") for m in _METRICS[:3]), "parameters", "s"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in table.to_dict("records"):
        scores = [f"{row[f'{split}_{m}']:.3f}" for split in ("val", "test") for m in _METRICS[:3]]
        cells = [row["strategy"], row["role"], *scores, f"{row['n_trainable']:,.0f}", f"{row['fit_seconds']:.1f}"]
        lines.append("| " + " | ".join(_escape(cell) for cell in cells) + " |")
    failed = [f"- `{row['strategy']}` failed: {row['error']}" for row in table.to_dict("records") if row["error"]]
    figures = [f"![{name}]({paths[name].name})" for name in ("comparison", "confusion", "umap", "reliability", "tradeoff")]
    facts = [f"| {_escape(name)} | {_escape(text)} |" for name, text in report._rows()]
    return "\n".join(
        [
            f"# Annotation report: {_escape(runner.label_key_)}",
            "",
            f"**{runner.recommendation_}**",
            "",
            f"Best strategy on the validation cells: `{runner.best_strategy_}`. Test cells chose nothing.",
            "",
            *lines,
            "",
            *failed,
            "",
            "## Data",
            "",
            "| | |",
            "|---|---|",
            *facts,
            "",
            f"Cells without any known gene are labelled {UNASSIGNED!r}.",
            "",
            "## Figures",
            "",
            *figures,
            "",
        ]
    )


def _escape(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _write_text(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
