"""Highly variable genes as scanpy finds them, from sums over the cells, which may come piece by piece.

The rule is that of ``scanpy.pp.highly_variable_genes`` with the flavour "seurat" (Satija et al. 2015,
https://doi.org/10.1038/nbt.3192); scanpy's function needs all cells at once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from ._genes import LogNormalised

_MEAN_BINS = 20
_ROUNDING = 1e-9  # share of the mean square that a variance may have of rounding alone


class Moments(NamedTuple):
    """Mean and mean square of each gene, float64."""

    mean: np.ndarray
    square: np.ndarray

    @property
    def variance(self) -> np.ndarray:
        """Over all cells, 0 for constant genes."""
        variance = self.square - self.mean**2
        return np.where(variance > _ROUNDING * self.square, np.maximum(variance, 0), 0.0)


def variable_genes(values: LogNormalised, n_top_genes: int) -> np.ndarray:
    """Sorted columns of the most variable genes, none of them constant.

    Raises
    ------
    ValueError
        If all genes are constant.
    """
    logarithms, linear = gene_moments(values)
    varies = np.flatnonzero(logarithms.variance > 0)
    if len(varies) == 0:
        raise ValueError(f"All {len(values.names)} genes are constant over the training cells; nothing to learn from.")
    if len(varies) <= n_top_genes:
        return varies
    mean = linear.mean[varies]
    variance = (linear.square[varies] - mean**2) * (values.n_cells / (values.n_cells - 1))
    return varies[_most_dispersed(mean, variance, n_top_genes)]


def gene_moments(values: LogNormalised) -> tuple[Moments, Moments]:
    """Of the values of each gene, which are logarithms, and of what they are logarithms of."""
    sums = np.zeros((4, len(values.names)))
    for _, rows in values.pieces():
        logarithms = rows.data.astype(np.float64)
        linear = np.expm1(rows.data).astype(np.float64)
        for total, terms in zip(sums, (logarithms, logarithms**2, linear, linear**2), strict=True):
            total += np.bincount(rows.indices, weights=terms, minlength=len(total))
    sums /= values.n_cells
    return Moments(sums[0], sums[1]), Moments(sums[2], sums[3])


def _most_dispersed(mean: np.ndarray, variance: np.ndarray, n_top_genes: int) -> np.ndarray:
    """Positions of the genes with the highest dispersion, among those of about the same mean."""
    mean = np.where(mean == 0, 1e-12, mean)
    dispersion = pd.Series(np.log(np.where(variance > 0, variance, np.nan) / mean))
    alike = dispersion.groupby(pd.cut(np.log1p(mean), bins=_MEAN_BINS), observed=True)
    centre, spread = alike.transform("mean"), alike.transform("std")
    alone = spread.isna()  # in its bin: its dispersion counts as 1
    score = ((dispersion - centre.where(~alone, 0.0)) / spread.where(~alone, centre)).to_numpy()
    score = np.where(np.isnan(score), -np.inf, score)
    return np.flatnonzero(score >= np.sort(score)[-n_top_genes])
