"""Baselines without the foundation model: quality and time of one CPU core.

    OMP_NUM_THREADS=1 python benchmarks/bench_baselines.py cells.h5ad [more.h5ad] --seeds 3

Each seed draws its own split of the cells, classes too small to be split are dropped. Prints means over the seeds of the
macro-F1 on validation and test cells and of the CPU seconds of a fit, which a busy machine changes little.
"""

from __future__ import annotations

import argparse
import importlib
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from _report import add_json_option, write_report

from scdlkit.foundation import CellData, make_split
from scdlkit.foundation.splits import usable_classes
from scdlkit.foundation.strategies import LogRegGenesConfig, all_baselines, build_strategies
from scdlkit.foundation.strategies._scores import macro_f1

SCALED = "logreg_genes, scaled"


def measure(path: Path, label_key: str, names: list[str], seed: int) -> list[dict[str, object]]:
    adata = ad.read_h5ad(path)
    labels = adata.obs[label_key].astype("category")
    codes, classes = labels.cat.codes.to_numpy().astype(np.int64), labels.cat.categories.to_numpy()
    kept = usable_classes(codes, classes, seed=seed)
    codes = np.append(np.where(kept, np.cumsum(kept) - 1, -1), -1)[codes]
    classes = classes[kept]
    split = make_split(codes, adata.obs_names.to_numpy(), classes=classes, seed=seed)
    cells = CellData(
        expression=sp.csr_matrix(adata.X), gene_names=adata.var_names.to_numpy(), kind="counts", codes=codes
    )
    train, val, test = (cells.subset(getattr(split, part)) for part in ("train", "val", "test"))
    rows = []
    # the first of the list only satisfies the rule that not all are baselines
    for strategy in build_strategies(
        ["head", *names], {SCALED: LogRegGenesConfig(scale=True)} if SCALED in names else {}
    )[1:]:
        for library in strategy.libraries:
            importlib.import_module(library)
        start = time.process_time()
        strategy.fit(train, val, n_classes=len(classes), seed=seed)
        seconds = time.process_time() - start
        score = macro_f1(test.codes, strategy.predict_proba(test).argmax(1), len(classes))
        rows.append(
            {
                "data": path.stem,
                "cells": train.n_cells,
                "classes": len(classes),
                "baseline": strategy.name,
                "seed": seed,
                "val": strategy.history[0]["val_macro_f1"],
                "test": score,
                "seconds": seconds,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--label-key", default="cell_type")
    parser.add_argument("--baselines", nargs="+", default=[n for n in all_baselines() if n != "knn_frozen"] + [SCALED])
    parser.add_argument("--seeds", type=int, default=3)
    add_json_option(parser)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    rows = [
        row
        for path in arguments.files
        for seed in range(arguments.seeds)
        for row in measure(path, arguments.label_key, arguments.baselines, seed)
    ]
    table = pd.DataFrame(rows).groupby(["data", "cells", "classes", "baseline"], sort=False)
    print(table[["val", "test", "seconds"]].mean().round(3).to_string())
    write_report(arguments.json, __file__, rows)


if __name__ == "__main__":
    main()
