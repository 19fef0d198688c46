from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest

if TYPE_CHECKING:
    from anndata import AnnData

# Without a GPU, Triton interprets its kernels; it must know before anything imports it.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Cell Ontology names as they are met in atlases: long, alike at the beginning, with signs and Greek letters.
FORTY = """macrophage|capillary endothelial cell|natural killer cell|type II pneumocyte|classical monocyte
lung ciliated cell|CD4-positive, alpha-beta memory T cell|fibroblast of lung|pericyte cell
naive thymus-derived CD8-positive, alpha-beta T cell|naive thymus-derived CD4-positive, alpha-beta T cell
endothelial cell of artery|bronchial epithelial cell|basophil|bronchial smooth muscle cell|type I pneumocyte
basal cell|B cell|lung microvascular endothelial cell|effector memory CD8-positive, alpha-beta T cell
vascular associated smooth muscle cell|non-classical monocyte|vein endothelial cell|mucus secreting cell
adventitial cell|mast cell|NK/T|γδ T cell|dendritic cell, human|endothelial cell of lymphatic vessel|fibroblast
respiratory goblet cell|CD11c-negative plasmacytoid dendritic cell|intermediate monocyte|plasmacytoid dendritic cell
neutrophil|plasma cell|conventional dendritic cell|$αβ$ T|Müller glia""".replace("\n", "|").split("|")
THREE = ["B", "CD4 T", "γδ T"]
EPOCHS = {"head": 24, "lora": 12, "adapter": 15, "prefix_tuning": 18, "ia3": 20, "bitfit": 16, "full_finetune": 8}


def _strategies(rng: np.random.Generator, n_classes: int) -> pd.DataFrame:
    rows: list[tuple[str, str, float, int, float, str]] = [
        ("lora", "strategy", 0.871, 147_456 + 513 * n_classes, 210.0, ""),
        ("full_finetune", "strategy", 0.868, 38_200_000, 640.0, ""),
        ("adapter", "strategy", 0.862, 810_000, 230.0, ""),
        ("pca_logreg", "baseline", 0.848, 51 * n_classes, 4.2, ""),
        ("bitfit", "strategy", 0.845, 120_000, 190.0, ""),
        ("head", "strategy", 0.842, 528_384 + 513 * n_classes, 21.0, ""),
        ("prefix_tuning", "strategy", 0.836, 98_304, 205.0, ""),
        ("frozen_probe", "strategy", 0.829, 513 * n_classes, 2.1, ""),
        ("ia3", "strategy", np.nan, 36_864, np.nan, "ValueError: loss is NaN at step 12 (batch 3, 64 cells)"),
    ]
    table = pd.DataFrame(rows, columns=["strategy", "role", "score", "n_trainable", "fit_seconds", "error"])
    table.insert(2, "rank", np.arange(1, len(table) + 1))
    score = table.pop("score")
    metrics = {"macro_f1": 0, "accuracy": 0.05, "balanced_accuracy": 0.01, "weighted_f1": 0.045, "mcc": 0.03}
    position = 3
    for split, shift in (("val", 0.0), ("test", -0.012)):
        for metric, offset in {**metrics, "auroc_ovr": 0.1}.items():
            values = np.clip(score + offset + shift + rng.normal(0, 0.006, len(table)), 0, 1)
            table.insert(position, f"{split}_{metric}", score if (split, metric) == ("val", "macro_f1") else values)
            position += 1
    table.insert(position, "auroc_note", "")
    table.insert(position + 3, "peak_memory_mb", table["n_trainable"] * 16 / 2**20 + 350)
    table.insert(2, "uses_encoder", table["role"] == "strategy")
    return table


def _folds(rng: np.random.Generator, table: pd.DataFrame, n_repeats: int) -> pd.DataFrame:
    """Scores that scatter about those of ``table``, with exactly these as means."""
    scores = [name for name in table if name.startswith(("val_", "test_"))]
    noise = rng.normal(0, 0.015, (n_repeats, len(table), 1)) + rng.normal(
        0, 0.004, (n_repeats, len(table), len(scores))
    )
    noise -= noise.mean(0)
    pieces = []
    for repeat in range(n_repeats):
        piece = table[["strategy", "role", *scores, "n_trainable", "fit_seconds", "peak_memory_mb", "error"]].copy()
        piece[scores] += noise[repeat]
        for position, (name, value) in enumerate([("split_by", "cell"), ("repeat", repeat), ("fold", 0)]):
            piece.insert(2 + position, name, value)
        pieces.append(piece)
    return pd.concat(pieces, ignore_index=True)


def _spread(table: pd.DataFrame, folds: pd.DataFrame) -> pd.DataFrame:
    table = table.copy()
    for split in ("val", "test"):
        value = table[f"{split}_macro_f1"]
        sd = folds.groupby("strategy")[f"{split}_macro_f1"].std().reindex(table["strategy"]).to_numpy()
        position = list(table.columns).index(f"{split}_auroc_ovr") + 1
        for name, column in (("sd", sd), ("low", value - 0.02), ("high", value + 0.018)):
            table.insert(position, f"{split}_macro_f1_{name}", column)
            position += 1
    table.insert(
        list(table.columns).index("error"), "n_fits", np.where(table["error"] == "", folds["repeat"].max() + 1, 0)
    )
    return table


def _differences(table: pd.DataFrame) -> pd.DataFrame:
    finished = table[table["error"] == ""].set_index("strategy")
    rows = [
        (name, reference, role, split, value, value - 0.02, value + 0.02, bool(abs(value) > 0.02))
        for reference, role in (("pca_logreg", "baseline"), ("lora", "best"))
        for split in ("val", "test")
        for name, value in (finished[f"{split}_macro_f1"] - finished.loc[reference, f"{split}_macro_f1"]).items()
        if name != reference
    ]
    columns = ["strategy", "reference", "reference_role", "split", "difference", "low", "high", "excludes_zero"]
    return pd.DataFrame(rows, columns=columns)


def _leakage(table: pd.DataFrame) -> pd.DataFrame:
    pieces = []
    for split in ("val", "test"):
        piece = table[["strategy", "role"]].assign(split=split, by_group=table[f"{split}_macro_f1"])
        piece["gap"] = 0.12 - 0.01 * np.arange(len(table)) + 0 * piece["by_group"]
        piece["by_cell"] = piece["by_group"] + piece["gap"]
        pieces.append(piece.assign(low=piece["gap"] - 0.03, high=piece["gap"] + 0.04))
    columns = ["strategy", "role", "split", "by_cell", "by_group", "gap", "low", "high"]
    return pd.concat(pieces, ignore_index=True)[columns]


def _history(rng: np.random.Generator, n_repeats: int = 1) -> pd.DataFrame:
    pieces = []
    for repeat, (order, (name, n)) in product(range(n_repeats), enumerate(EPOCHS.items())):
        epoch = np.arange(1, n + 1)
        fit = 1 - np.exp(-epoch / (2 + order))
        score = 0.4 + (0.44 - 0.01 * order) * fit - 0.002 * np.clip(epoch - 10, 0, None) + rng.normal(0, 0.008, n)
        loss = 2.2 * np.exp(-epoch / (3 + order)) + 0.25 + 0.05 * order + rng.normal(0, 0.01, n)
        pieces.append(
            pd.DataFrame(
                {
                    "strategy": name,
                    "repeat": repeat,
                    "fold": 0,
                    "epoch": epoch,
                    "train_loss": loss,
                    "val_loss": loss + 0.15,
                    "val_macro_f1": score,
                }
            )
        )
    return pd.concat(pieces, ignore_index=True)


def _probabilities(rng: np.random.Generator, codes: np.ndarray, n_classes: int) -> np.ndarray:
    """Softmax over classes on a shuffled circle: neighbours are confused, as kindred cell types are."""
    place = rng.permutation(n_classes)
    distance = np.abs(place[codes][:, None] - place[None])
    distance = np.minimum(distance, n_classes - distance)
    logits = 5.0 * np.exp(-(distance**2) / 1.3) + rng.normal(0, 1.3, distance.shape)
    odds = np.exp(logits * 1.4)
    return odds / odds.sum(axis=1, keepdims=True)


@pytest.fixture(scope="session")
def through_disk() -> Callable[..., object]:
    """A function that writes an AnnData to a folder as h5ad or zarr and reads it back."""

    def write_and_read(adata: AnnData, folder: Path, kind: str) -> object:
        import anndata as ad

        path = folder / f"result.{kind}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # anndata's and zarr's remarks on their formats
            getattr(adata, f"write_{kind}")(path)
        return getattr(ad, f"read_{kind}")(path)

    return write_and_read


@pytest.fixture(scope="session")
def make_annotated() -> Callable[..., object]:
    """A function that builds an AnnData as an annotation run leaves it, of any number of classes up to 40."""

    def make(
        n_classes: int = 3,
        n_cells: int = 1500,
        *,
        key: str = "scgpt",
        seed: int = 0,
        n_repeats: int = 1,
        group_key: str = "",
    ) -> object:
        from anndata import AnnData

        rng = np.random.default_rng(seed)
        classes = (THREE if n_classes == 3 else sorted(FORTY))[:n_classes]
        abundance = 1 / np.arange(1, n_classes + 1) ** 0.7
        codes = rng.choice(n_classes, n_cells, p=abundance / abundance.sum())
        codes[: 6 * n_classes] = np.tile(np.arange(n_classes), 6)
        probabilities = _probabilities(rng, codes, n_classes)
        predicted = probabilities.argmax(axis=1)
        confidence = probabilities.max(axis=1)
        predicted[-4:], confidence[-4:], probabilities[-4:] = -1, np.nan, np.nan  # no known gene
        splits = rng.choice(["train", "val", "test"], n_cells, p=[0.7, 0.15, 0.15]).astype(object)
        splits[: 6 * n_classes] = np.repeat(["train", "val", "test"], 2 * n_classes)
        splits[-4:] = "test"
        true = np.array(classes, dtype=object)[codes]
        true[-24:-4], splits[-24:-4] = None, "unlabelled"

        names = np.array([*classes, "unassigned"], dtype=object)
        obs = pd.DataFrame(
            {
                "cell_type": pd.Categorical(true, categories=classes),
                f"{key}_label": pd.Categorical(names[predicted], categories=names),
                f"{key}_label_code": predicted,
                f"{key}_label_confidence": confidence,
                f"{key}_split": pd.Categorical(splits, categories=["train", "val", "test", "unlabelled"]),
            },
            index=[f"cell{i}" for i in range(n_cells)],
        )
        adata = AnnData(np.ones((n_cells, 2), dtype=np.float32), obs=obs)
        adata.obsm[f"{key}_proba"] = probabilities
        table = _strategies(rng, n_classes)
        folds = _folds(rng, table, n_repeats)
        table = _spread(table, folds)
        scores = [
            {
                "strategy": name,
                "split": split,
                "class": label,
                "precision": 0.8,
                "recall": 0.7,
                "f1": 0.75,
                "f1_sd": 0.05 if n_repeats > 1 else np.nan,
                "support": 9.0,
            }
            for name in table["strategy"]
            for split in ("val", "test")
            for label in classes
        ]
        adata.uns[key] = {
            "params": {
                "label_key": "cell_type",
                "best_strategy": "lora",
                "strategy": "lora",
                "key_added": key,
                "group_key": group_key,
            },
            "classes": np.array(classes, dtype=object),
            "strategies": table,
            "folds": folds,
            "differences": _differences(table),
            "history": _history(rng, n_repeats),
            "per_class": pd.DataFrame(scores),
        }
        if group_key:
            adata.uns[key]["leakage"] = _leakage(table)
        return adata

    return make


GOLDEN = Path(__file__).parent / "data" / "golden"


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """A small random checkpoint in the official layout that knows the genes of ``blood``."""
    return GOLDEN / "flash_keys"


@pytest.fixture(scope="session")
def _blood() -> object:
    import scanpy as sc
    from anndata import AnnData

    cells = sc.datasets.pbmc68k_reduced()
    kept = cells.obs["bulk_labels"].isin(["Dendritic", "CD14+ Monocyte", "CD19+ B", "CD56+ NK"])
    chosen = np.flatnonzero(kept)[:240]
    obs = pd.DataFrame({"cell_type": cells.obs["bulk_labels"].astype(str).to_numpy()[chosen]})
    obs.index = cells.obs_names[chosen]
    obs["cell_type"] = obs["cell_type"].astype("category")
    obs["donor"] = np.resize(["d1", "d2", "d3", "d4", "d5"], len(chosen))
    return AnnData(cells.raw.X[chosen].copy(), obs=obs, var=pd.DataFrame(index=cells.raw.var_names))


@pytest.fixture
def blood(_blood: object) -> object:
    """240 real blood cells of 4 types x 765 genes, log1p."""
    return _blood.copy()  # type: ignore[attr-defined]


@pytest.fixture(params=["backed", "zarr group", "dask", "lazy h5ad", "lazy zarr"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., object]]:
    """A function that puts an AnnData with a CSR matrix on disk and opens it without reading that, in several ways."""
    import anndata as ad
    import scipy.sparse as sp

    opened = []

    def store(adata: AnnData) -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # anndata's and zarr's remarks on their formats
            if "zarr" in request.param:
                adata.write_zarr(tmp_path / "stored.zarr")
            else:
                adata.write_h5ad(tmp_path / "stored.h5ad")
        if request.param == "backed":
            result = ad.read_h5ad(tmp_path / "stored.h5ad", backed="r")
            opened.append(result.file)
        elif request.param == "zarr group":
            zarr = pytest.importorskip("zarr")
            matrix = ad.io.sparse_dataset(zarr.open_group(tmp_path / "stored.zarr", mode="r")["X"])
            result = ad.AnnData(matrix, obs=adata.obs, var=adata.var)
        elif request.param == "dask":
            da = pytest.importorskip("dask.array")
            lazy = da.from_array(adata.X.toarray(), chunks=(11, adata.n_vars)).map_blocks(
                sp.csr_matrix, dtype=adata.X.dtype, meta=sp.csr_matrix((0, 0), dtype=adata.X.dtype)
            )
            result = ad.AnnData(lazy, obs=adata.obs, var=adata.var)
        else:
            pytest.importorskip("xarray")
            result = ad.experimental.read_lazy(tmp_path / f"stored.{request.param.split()[1]}")
            opened.extend([result.file] if "h5ad" in request.param else [])
        return result

    yield store
    for file in opened:
        file.close()


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    from scdlkit import settings

    monkeypatch.setattr(settings, "progress", False)
    monkeypatch.setattr(settings, "device", "cpu")
