from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

SPREAD = 0.012
PLAIN_BASELINE = "pca_logreg"


@pytest.fixture(autouse=True)
def headless():
    """Draw without a screen; a test that leaves a figure open or a global setting changed fails."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    before = mpl.rcParams.copy()
    yield
    left = plt.get_fignums()
    plt.close("all")
    assert not left, f"{len(left)} figures left open"
    assert mpl.rcParams == before


@pytest.fixture(scope="session")
def three(make_annotated):
    return make_annotated(3)


@pytest.fixture(scope="session")
def forty(make_annotated):
    return make_annotated(40, 4000)


def of_several_fits(adata, n_repeats: int = 5, *, seed: int = 0):
    """Turn a result of one fit into one of several, with intervals, differences, leakage gap and label efficiency."""
    rng = np.random.default_rng(seed)
    result = adata.uns["scgpt"]
    table = result["strategies"].copy()
    more = [("knn_frozen", "baseline", 0.79), ("logreg_genes", "baseline", 0.851), ("lora_wide", "strategy", 0.869)]
    for name, role, score in more:
        row = table.iloc[[0]].assign(strategy=name, role=role, n_trainable=0 if role == "baseline" else 300_000)
        scores = [column for column in table if column.startswith(("val_", "test_"))]
        row[scores] = score + rng.normal(0, 0.006, len(scores))
        table = pd.concat([table, row.assign(fit_seconds=rng.uniform(1, 300))], ignore_index=True)
    failed = table["error"] != ""
    table["uses_encoder"] = ~table["strategy"].isin([PLAIN_BASELINE, "logreg_genes"])
    order = table.assign(failed=failed).sort_values(["failed", "val_macro_f1"], ascending=[True, False])
    table.loc[order.index, "rank"] = np.arange(1, len(table) + 1)
    for part in ("val", "test"):
        table[f"{part}_macro_f1_sd"] = np.where(failed, np.nan, rng.uniform(0.5, 1.5, len(table)) * SPREAD)
        for bound, sign in (("low", -1), ("high", 1)):
            wide = sign * 2 * SPREAD * rng.uniform(0.7, 1.3, len(table))
            table[f"{part}_macro_f1_{bound}"] = table[f"{part}_macro_f1"] + wide
    table["n_fits"] = np.where(failed, n_repeats - 2, n_repeats)
    result["strategies"] = table

    pieces = []
    for name, rows in result["history"].query("repeat == 0").groupby("strategy", sort=False):
        for repeat in range(n_repeats):
            part = rows.head(int(rng.integers(3, len(rows) + 1)))
            noise = rng.normal(0, 0.01, len(part))
            pieces.append(part.assign(repeat=repeat, fold=0, val_macro_f1=part["val_macro_f1"] + noise, strategy=name))
    result["history"] = pd.concat(pieces, ignore_index=True)
    classes = [str(name) for name in result["classes"]]
    hard = rng.uniform(0, 0.5, len(classes))
    rows = [
        {
            "strategy": name,
            "split": part,
            "class": label,
            "precision": 0.8,
            "recall": 0.7,
            "f1": float(np.clip(1.05 * score - hardness + rng.normal(0, 0.05), 0, 1)),
            "f1_sd": 0.02,
            "support": float(place % 7) * 1.2 + 1,
        }
        for name, score in zip(table["strategy"][~failed], table["test_macro_f1"][~failed], strict=True)
        for part in ("val", "test")
        for place, (label, hardness) in enumerate(zip(classes, hard, strict=True))
    ]
    result["per_class"] = pd.DataFrame(rows)
    names = table[~failed].sort_values("rank")
    rows = []
    for reference, role in ((PLAIN_BASELINE, "baseline"), ("lora", "best")):
        for part in ("val", "test"):
            scores = names.set_index("strategy")[f"{part}_macro_f1"]
            for name in scores.index.drop(reference):
                value, half = scores[name] - scores[reference], rng.uniform(0.008, 0.02)
                low, high = value - half, value + half
                rows.append((name, reference, role, part, value, low, high, low > 0 or high < 0))
    columns = ["strategy", "reference", "reference_role", "split", "difference", "low", "high", "excludes_zero"]
    result["differences"] = pd.DataFrame(rows, columns=columns)
    leakage = []
    for part in ("val", "test"):
        piece = table[["strategy", "role"]].assign(split=part, by_group=table[f"{part}_macro_f1"])
        piece["gap"] = np.where(failed, np.nan, rng.uniform(-0.01, 0.06, len(table)))
        piece = piece.assign(
            by_cell=piece["by_group"] + piece["gap"], low=piece["gap"] - 0.02, high=piece["gap"] + 0.02
        )
        leakage.append(piece)
    columns = ["strategy", "role", "split", "by_cell", "by_group", "gap", "low", "high"]
    result["leakage"] = pd.concat(leakage, ignore_index=True)[columns]
    result["params"]["group_key"] = "donor"
    adata.uns["scgpt_label_efficiency"] = {"params": {"label_key": "cell_type"}, "efficiency": _efficiency(table, rng)}
    return adata


def of_an_older_version(adata):
    """Take away what results had not before there were several fits."""
    adata = adata.copy()
    result = adata.uns["scgpt"]
    for name in ("folds", "differences", "leakage"):
        result.pop(name, None)
    new = ("uses_encoder", "n_fits", "repeat", "fold", "f1_sd")
    for name in ("strategies", "history", "per_class"):
        gone = [column for column in result[name] if column in new or column.endswith(("_sd", "_low", "_high"))]
        result[name] = result[name].drop(columns=gone)
    return adata


def _efficiency(table: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    rows = []
    chosen = table[table["strategy"].isin(["frozen_probe", "head", "lora", PLAIN_BASELINE])]
    for fraction, n in ((0.01, 12), (0.05, 60), (0.1, 119), (0.5, 595), (1.0, 1190)):
        for row in chosen.to_dict("records"):
            failed = row["strategy"] == "head" and fraction == 0.05
            score = row["test_macro_f1"] - 0.35 * np.exp(-n / 60) * rng.uniform(0.9, 1.1)
            rows.append(
                {
                    "strategy": row["strategy"],
                    "role": row["role"],
                    "uses_encoder": row["uses_encoder"],
                    "fraction": fraction,
                    "n_labelled": float(n),
                    "n_train": float(round(0.8 * n)),
                    "n_val": float(round(0.2 * n)),
                    **{f"{part}_{metric}": score for part in ("val", "test") for metric in ("macro_f1", "accuracy")},
                    **{f"{part}_macro_f1_low": score - 0.8 / np.sqrt(n + 40) * 0.3 for part in ("val", "test")},
                    **{f"{part}_macro_f1_high": score + 0.8 / np.sqrt(n + 40) * 0.3 for part in ("val", "test")},
                    "n_fits": 5,
                    "error": "ValueError: loss is NaN" if failed else "",
                }
            )
    frame = pd.DataFrame(rows)
    scores = [column for column in frame if column.startswith(("val_", "test_"))]
    frame.loc[frame["error"] != "", scores] = np.nan
    return frame


@pytest.fixture(scope="session")
def older(three):
    return of_an_older_version(three)


@pytest.fixture(scope="session")
def three_often(make_annotated):
    return of_several_fits(make_annotated(3))


@pytest.fixture(scope="session")
def forty_often(make_annotated):
    return of_several_fits(make_annotated(40, 4000))


@pytest.fixture(scope="session", params=["h5ad", "zarr"])
def from_disk(request, make_annotated, through_disk, tmp_path_factory):
    return through_disk(of_several_fits(make_annotated(12)), tmp_path_factory.mktemp("result"), request.param)
