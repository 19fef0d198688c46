"""The main job on real cells that come with scanpy: inspect, adapt, compare, annotate, figures, saved model."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ._settings import logger

if TYPE_CHECKING:
    from anndata import AnnData

LABEL_KEY = "bulk_labels"
N_QUERY = 150  # cells whose labels are hidden, to be annotated by the saved model


def run_demo(folder: Path, *, echo: Callable[[str], object] = logger.info) -> None:
    """Run every step and say what happens.

    Parameters
    ----------
    folder
        Where figures, tables and the model go.
    echo
        Receives each line of text.
    """
    from . import pp, tl

    start = time.perf_counter()
    reference, query = demo_cells()
    echo(f"1. {reference.n_obs} labelled blood cells (Zheng et al. 2017), {query.n_obs} more with their labels hidden.")
    echo("   Checkpoint: mini, small and embedded; for real work use whole-human.\n")
    echo(_indent(str(pp.inspect_annotation_data(reference, LABEL_KEY, checkpoint="mini"))))

    echo("\n2. Adapt and compare: every row learns from the same cells and is judged on the same cells.\n")
    level = logger.level
    logger.setLevel(logging.ERROR)  # the report above has said it all
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            runner = tl.adapt_annotation(reference, LABEL_KEY, checkpoint="mini", output_dir=folder)
            model = folder / "model"
            truth = query.obs[LABEL_KEY].astype(str)
            del query.obs[LABEL_KEY]
            tl.predict(query, model)
    finally:
        logger.setLevel(level)
    echo(_indent(short_table(runner.results_)))
    echo(f"\n   {runner.recommendation_}")

    right = (query.obs["scgpt_label"].astype(str) == truth).mean()
    echo(f"\n3. The saved model annotates the {query.n_obs} other cells: {right:.0%} as their hidden labels say.")
    query.write_h5ad(folder / "annotated_query.h5ad")
    echo(f"\nDone in {time.perf_counter() - start:.0f} s. Written:")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        echo(f"   {path}")
    echo(
        "\nNext, with your own labelled cells:\n"
        "   scdlkit inspect cells.h5ad --label-key cell_type\n"
        "   scdlkit adapt cells.h5ad --label-key cell_type --out results/\n"
        "   scdlkit predict new_cells.h5ad results/model --out annotated.h5ad\n"
        "or in Python: sk.tl.adapt_annotation(adata, 'cell_type'), then sc.pl.umap(adata, color='scgpt_label')."
    )


def demo_cells() -> tuple[AnnData, AnnData]:
    """Log-normalised blood cells that come with scanpy, as a labelled reference and a query."""
    import numpy as np
    import scanpy as sc

    cells = sc.datasets.pbmc68k_reduced().raw.to_adata()
    is_query = np.zeros(cells.n_obs, dtype=bool)
    is_query[np.random.default_rng(0).choice(cells.n_obs, N_QUERY, replace=False)] = True
    return cells[~is_query].copy(), cells[is_query].copy()


def short_table(table) -> str:  # type: ignore[no-untyped-def]
    """The columns that matter first, rounded, as text."""
    columns = ["strategy", "role", "val_macro_f1", "test_macro_f1", "test_accuracy", "n_trainable"]
    columns += ["embed_seconds", "fit_seconds"]
    return table[columns].round(3).to_string(index=False)


def _indent(text: str) -> str:
    return "\n".join(f"   {line}" for line in text.splitlines())
