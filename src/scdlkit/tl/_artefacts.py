"""What ``output_dir`` gets: metrics, a report, figures and the saved model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from scdlkit._keys import UNASSIGNED
from scdlkit._settings import logger

from ._report_tables import escape, sureness, table

if TYPE_CHECKING:
    from anndata import AnnData

    from scdlkit.runner import AnnotationRunner

_METRICS = ("macro_f1", "accuracy", "balanced_accuracy", "weighted_f1", "mcc", "auroc_ovr")


def prepare_folder(folder: str | os.PathLike[str]) -> None:
    """Make the folder, and find out before any training whether all can be written.

    Raises
    ------
    ValueError
        If it is a file, or its ``model`` holds anything but an earlier model.
    """
    from scdlkit.foundation.bundle import check_folder

    if Path(folder).is_file():
        raise ValueError(f"output_dir={str(folder)!r} is a file; give a folder.")
    Path(folder).mkdir(parents=True, exist_ok=True)
    check_folder(Path(folder) / "model")


def write_artefacts(
    adata: AnnData, runner: AnnotationRunner, folder: str | os.PathLike[str], *, key: str
) -> dict[str, Path]:
    """Write tables as CSV, ``report.md``, figures and ``model/``; each file appears complete or not at all.

    Of several processes that were launched together the first one writes, the others return at once.

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
    from scdlkit.foundation._processes import is_main_process

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {
        "metrics": folder / "strategy_metrics.csv",
        "folds": folder / "folds.csv",
        "differences": folder / "differences.csv",
        "leakage": folder / "leakage.csv",
        "comparison": folder / "strategy_comparison.png",
        "tradeoff": folder / "strategy_tradeoff.png",
        "confusion": folder / "confusion_matrix.png",
        "reliability": folder / "reliability.png",
        "umap": folder / "embedding_umap.png",
        "report": folder / "report.md",
        "model": folder / "model",
    }
    if not is_main_process():
        return paths
    runner.save(paths["model"])
    tables = {"metrics": runner.results_, "folds": runner.folds_, "differences": runner.differences_}
    if len(runner.leakage_):
        tables["leakage"] = runner.leakage_
    else:
        paths.pop("leakage").unlink(missing_ok=True)  # of an earlier run, with groups
    for name, content in tables.items():
        _write_text(paths[name], content.to_csv(index=False))
    figures: dict[str, Callable[..., object]] = {
        "comparison": pl.strategy_comparison,
        "tradeoff": pl.strategy_tradeoff,
        "confusion": pl.confusion_matrix,
        "reliability": pl.reliability,
        "umap": pl.annotation_umap,
    }
    for name, draw in figures.items():
        unfinished = paths[name].with_name(f".{paths[name].name}")
        draw(adata, key=key, save=unfinished, show=False)
        unfinished.replace(paths[name])
    _write_text(paths["report"], _report(runner, paths))
    logger.info("Model, metrics, report and figures: %s", folder)
    return paths


def _report(runner: AnnotationRunner, paths: dict[str, Path]) -> str:
    """The run as Markdown: what was used, what came out, what to make of it."""
    report, results = runner.report_, runner.results_
    header = [
        "strategy",
        "role",
        *(f"{split} {m}" for split in ("val", "test") for m in _METRICS[:3]),
        "parameters",
        "s",
    ]
    rows = []
    for row in results.to_dict("records"):
        scores = [f"{row[f'{split}_{m}']:.3f}" for split in ("val", "test") for m in _METRICS[:3]]
        cells = [
            row["strategy"],
            row["role"],
            *scores,
            f"{row['n_trainable']:,.0f}",
            f"{row['embed_seconds'] + row['fit_seconds']:.1f}",
        ]
        rows.append(cells)
    failed = [f"- `{row['strategy']}` failed: {row['error']}" for row in results.to_dict("records") if row["error"]]
    figures = [
        f"![{name}]({paths[name].name})" for name in ("comparison", "confusion", "umap", "reliability", "tradeoff")
    ]
    facts = [f"| {escape(name)} | {escape(text)} |" for name, text in report._rows()]
    return "\n".join(
        [
            f"# Annotation report: {escape(runner.label_key_)}",
            "",
            f"**{runner.recommendation_}**",
            "",
            *([f"**{escape(runner.interrupted_)}**", ""] if runner.interrupted_ else []),
            f"Best strategy on the validation cells: `{runner.best_strategy_}`. Test cells chose nothing.",
            "",
            *table(header, rows),
            "",
            *failed,
            "",
            *sureness(runner),
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


def _write_text(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
