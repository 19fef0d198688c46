"""Recognise the cells of a fit by their content, wherever they turn up again."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class KnownCells:
    """Cells of the fit by content: their split, and their embedding while the runner lives."""

    keys: np.ndarray  # uint64, sorted, unique
    split: np.ndarray  # int8
    embedding_keys: np.ndarray  # uint64, sorted, unique
    embedding: np.ndarray | None

    @classmethod
    def none(cls) -> KnownCells:
        """No cells."""
        return cls(np.empty(0, np.uint64), np.empty(0, np.int8), np.empty(0, np.uint64), None)

    @classmethod
    def of(cls, keys: np.ndarray, assignment: np.ndarray) -> KnownCells:
        """Cells with equal content count as training cells if one of them is (train 0 < val 1 < test 2)."""
        used = np.flatnonzero(assignment >= 0)
        used = used[np.argsort(assignment[used], kind="stable")]
        unique, first = np.unique(keys[used], return_index=True)
        return cls(unique, assignment[used][first].astype(np.int8), np.empty(0, np.uint64), None)

    def with_embedding(self, keys: np.ndarray, embedding: np.ndarray | None) -> KnownCells:
        """The same cells with their embedding, float32 ``[cells, embsize]``."""
        if embedding is None:
            return self
        unique, first = np.unique(keys, return_index=True)
        return replace(self, embedding_keys=unique, embedding=embedding[first])

    def split_of(self, keys: np.ndarray) -> np.ndarray:
        """int8 ``[cells]``: 0 train, 1 val, 2 test, -1 not in the fit."""
        at, found = _find(self.keys, keys)
        return (
            np.where(found, self.split[at], -1).astype(np.int8) if len(self.keys) else np.full(len(keys), -1, np.int8)
        )

    def embedding_of(self, keys: np.ndarray) -> np.ndarray | None:
        """float32 ``[cells, embsize]`` with NaN rows for cells that are not known; None if none can be."""
        if self.embedding is None:
            return None
        at, found = _find(self.embedding_keys, keys)
        return np.where(found[:, None], self.embedding[at], np.float32(np.nan))


def _find(sorted_keys: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    at = np.searchsorted(sorted_keys, keys).clip(max=max(len(sorted_keys) - 1, 0))
    return at, (sorted_keys[at] == keys if len(sorted_keys) else np.zeros(len(keys), bool))
