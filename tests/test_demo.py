from __future__ import annotations

import anndata as ad
import pandas as pd

from scdlkit._demo import demo_cells, run_demo


def test_demo_does_the_main_job(tmp_path):
    lines: list[str] = []
    run_demo(tmp_path / "demo", echo=lambda line: lines.append(str(line)))
    text = "\n".join(lines)
    assert "765 of 765 matched" in text and "pca_logreg baseline" in text and "scdlkit adapt" in text
    table = pd.read_csv(tmp_path / "demo" / "strategy_metrics.csv").set_index("strategy")
    assert table.loc["frozen_probe", "test_macro_f1"] > 0.4  # chance is below 0.1
    query = ad.read_h5ad(tmp_path / "demo" / "annotated_query.h5ad")
    truth = demo_cells()[1].obs["bulk_labels"].astype(str)
    right = (query.obs["scgpt_label"].astype(str) == truth).mean()
    assert right > 0.6 and f"{right:.0%} as their hidden labels say" in text
    assert "bulk_labels" not in query.obs and (query.obs["scgpt_split"] == "unlabelled").all()
