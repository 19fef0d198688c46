"""``knn_frozen``: nearest neighbours in the frozen embedding, the use of a foundation model that trains nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ._base import Strategy, Trainer, check_tensors
from ._cells import CellData
from ._config import Config, check_number
from ._registry import register
from ._scores import log_loss, macro_f1

if TYPE_CHECKING:
    import torch

NEIGHBOURS = (1, 5, 10, 20)
_BLOCK = 20_000_000  # distances held at once
_SAME = 1e-9  # cosine distances that differ by less are the same: rounding must not choose a neighbour


@dataclass(frozen=True)
class KNNFrozenConfig(Config):
    """Settings of the nearest neighbours.

    Parameters
    ----------
    n_neighbors
        Training cells that vote. None: the number among 1, 5, 10 and 20 with the best macro-F1 on the validation
        cells (then the lowest log loss there).
    max_cells
        Training cells that are kept, at most, as many of each class as its share; they are all that the model is, so
        this bounds its size and the time of a prediction.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    strategy = "knn_frozen"

    n_neighbors: int | None = None
    max_cells: int = 20_000

    def __post_init__(self) -> None:
        check_number("n_neighbors", self.n_neighbors, low=1, integer=True, optional=True)
        check_number("max_cells", self.max_cells, low=1, integer=True)


@register
class KNNFrozen(Strategy):
    """Vote of the nearest training cells, by the cosine of the frozen ``<cls>`` embeddings.

    How scGPT maps cells to a reference without training (Cui et al. 2024, https://doi.org/10.1038/s41592-024-02201-0).
    It shows what the embedding is worth as it comes, so it is a baseline for strategies that train, not one for the
    foundation model. Cells as near as the last neighbour vote too: no order of cells decides.

    A saved model holds the embedding of the training cells.

    Example
    -------
    >>> baseline = KNNFrozen(KNNFrozenConfig(n_neighbors=10))
    >>> baseline.fit(cells.subset(split.train), cells.subset(split.val), n_classes=8)
    """

    name = "knn_frozen"
    config_class = KNNFrozenConfig
    role = "baseline"
    needs = frozenset({"embedding"})

    def fit(
        self,
        train: CellData,
        val: CellData,
        *,
        n_classes: int,
        seed: int = 0,
        device: str = "cpu",
        trainer: Trainer | None = None,
    ) -> None:
        """See :meth:`Strategy.fit`; keeps the cells and chooses their number, on the CPU. ``seed`` draws ``max_cells``."""
        self._check_training_cells(train, val, n_classes)
        for cells in (train, val):
            if not np.isfinite(np.asarray(cells.embedding)).all():
                raise ValueError("embedding has NaN or infinite values; check the checkpoint's weights.")
        kept = _draw(np.asarray(train.codes), self.config.max_cells, seed)
        self._reference = _unit(np.asarray(train.embedding)[kept]).astype(np.float32)
        self._codes = np.asarray(train.codes, dtype=np.int64)[kept]
        wanted = NEIGHBOURS if self.config.n_neighbors is None else (self.config.n_neighbors,)
        numbers = sorted({min(number, len(self._codes)) for number in wanted})
        val_codes = np.asarray(val.codes)
        tried = [
            {
                "n_neighbors": number,
                "val_loss": log_loss(val_codes, votes),
                "val_macro_f1": macro_f1(val_codes, votes.argmax(1), n_classes),
            }
            for number, votes in zip(numbers, self._votes(val, numbers, n_classes), strict=True)
        ]
        best = max(tried, key=lambda row: (row["val_macro_f1"], -row["val_loss"]))
        self._neighbours: dict[str, Any] = {
            "n_neighbors": int(best["n_neighbors"]),
            "tried": [{name: row[name] for name in ("n_neighbors", "val_macro_f1")} for row in tried],
        }
        self.n_classes, self.n_trainable = n_classes, 0
        self.history = [
            {"epoch": 0, "train_loss": float("nan"), **{name: best[name] for name in ("val_loss", "val_macro_f1")}}
        ]

    def predict_proba(self, cells: CellData) -> np.ndarray:
        """Share of the neighbours in each class, float32 ``[n, n_classes]``."""
        self._check_fitted()
        self._check_cells(cells)
        if np.asarray(cells.embedding).shape[1] != self._reference.shape[1]:
            raise ValueError(
                f"embedding has {np.asarray(cells.embedding).shape[1]} dimensions, the training cells have "
                f"{self._reference.shape[1]}."
            )
        return self._votes(cells, [self._neighbours["n_neighbors"]], self.n_classes)[0].astype(np.float32)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Embedding of the training cells, of length 1 (float32), and their label codes (int64)."""
        import torch

        self._check_fitted()
        return {"reference": torch.tensor(self._reference), "codes": torch.tensor(self._codes)}

    def metadata(self) -> dict[str, Any]:
        """Also ``neighbours``: the number in use and the validation macro-F1 of all that were tried."""
        return {**super().metadata(), "neighbours": self._neighbours}

    def load_state(self, state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
        """See :meth:`Strategy.load_state`."""
        self._load_metadata(metadata, "neighbours")
        n_cells = len(state["codes"]) if "codes" in state else None
        check_tensors(self.name, state, {"reference": (n_cells, None), "codes": (n_cells,)})
        self._reference = state["reference"].numpy().astype(np.float32)
        self._codes = state["codes"].numpy().astype(np.int64)
        if self._codes.min() < 0 or self._codes.max() >= self.n_classes:
            raise ValueError(f"The saved codes of strategy {self.name!r} must be in [0, {self.n_classes}).")
        self._neighbours = dict(metadata["neighbours"])

    def _votes(self, cells: CellData, numbers: list[int], n_classes: int) -> list[np.ndarray]:
        """For each number of neighbours their shares in the classes, float64 ``[cells, n_classes]``."""
        embedding, reference = _unit(np.asarray(cells.embedding)), self._reference.astype(np.float64)
        of_class = np.eye(n_classes)[self._codes]
        votes = [np.empty((len(embedding), n_classes)) for _ in numbers]
        block = max(1, _BLOCK // len(reference))
        for start in range(0, len(embedding), block):
            rows = slice(start, start + block)
            distances = 1 - embedding[rows] @ reference.T
            ordered = np.sort(distances, axis=1) if len(numbers) > 1 else np.partition(distances, numbers[0] - 1)
            for share, number in zip(votes, numbers, strict=True):
                near = distances <= ordered[:, [number - 1]] + _SAME
                share[rows] = (near @ of_class) / near.sum(1, keepdims=True)
        return votes


def _unit(embedding: np.ndarray) -> np.ndarray:
    """Rows of length 1, float64; all-zero rows stay."""
    wide = embedding.astype(np.float64)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.where(length > 0, length, 1.0)


def _draw(codes: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Ascending positions of at most ``most`` cells, of each class about its share, and one at least where there is room."""
    if len(codes) <= most:
        return np.arange(len(codes))
    order = np.random.default_rng(seed).permutation(len(codes))
    place = np.empty(len(codes))
    for code in np.unique(codes):
        members = order[codes[order] == code]
        place[members] = np.arange(len(members)) / len(members)
    return np.sort(np.lexsort((order, place))[:most])
