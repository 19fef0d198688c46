"""How sure a macro-F1, or a difference of two, is: a bootstrap over fits and over the cells in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from .strategies._scores import f1_scores

LEVEL = 0.95
N_RESAMPLES = 1000
_CHUNK = 4_000_000  # numbers of cells drawn at a time


class Estimate(NamedTuple):
    """A value with its 95 % interval and standard error."""

    value: float
    low: float
    high: float
    error: float

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 is outside of the interval."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Resampled:
    """Macro-F1 of every strategy on the fits, and on every resample of them.

    Parameters
    ----------
    scores
        Mean over the fits, by strategy.
    draws
        float64 ``[resamples]``, the same mean on every resample, by strategy. A resample is the same for all, so
        differences are paired.
    """

    scores: dict[str, float]
    draws: dict[str, np.ndarray]

    def score(self, name: str) -> Estimate:
        """Macro-F1 of one strategy."""
        return estimate(self.scores[name], self.draws[name])

    def difference(self, name: str, reference: str) -> Estimate:
        """Macro-F1 of ``name`` minus that of ``reference``, on the same cells of the same fits."""
        return estimate(self.scores[name] - self.scores[reference], self.draws[name] - self.draws[reference])


def estimate(value: float, draws: np.ndarray) -> Estimate:
    """Percentile interval and standard error from resampled values."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), float(low), float(high), float(draws.std(ddof=1)))


def resample_macro_f1(
    true_codes: Sequence[np.ndarray],
    predicted_codes: Mapping[str, Sequence[np.ndarray]],
    n_classes: int,
    *,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> Resampled:
    """Resample fits with replacement, then in each drawn fit its cells with replacement (Davison & Hinkley 1997, 3.8).

    Nothing is trained again, and cells are drawn one by one, not in groups: the interval tells how far the score would
    move with other cells of the same kind and with another split, not with other donors. With one fit only cells are
    drawn.

    Parameters
    ----------
    true_codes
        Labels of the cells of each fit.
    predicted_codes
        Strategy → predictions for the same cells of the same fits.
    n_classes
        Number of classes; a resample counts those that occur among its true or predicted labels.
    n_resamples
        Number of resamples.
    seed
        Of the draws.

    Returns
    -------
    Resampled
        Scores and resampled scores.

    Raises
    ------
    ValueError
        If there is no fit, a fit has no cells, or predictions are not for as many fits and cells.

    Example
    -------
    >>> found = resample_macro_f1([true], {"head": [head], "pca_logreg": [baseline]}, n_classes=8)
    >>> found.difference("head", "pca_logreg").excludes_zero
    """
    n_fits, names = len(true_codes), list(predicted_codes)
    sizes = [len(codes) for codes in true_codes]
    if not sizes or not all(sizes):
        raise ValueError(f"true_codes must hold fits with cells, found {sizes or 'none'}.")
    for name, predicted in predicted_codes.items():
        if (found := [len(codes) for codes in predicted]) != sizes:
            raise ValueError(f"predicted_codes[{name!r}] has fits with {found} cells, true_codes with {sizes}.")
    rng = np.random.default_rng(seed)
    slots = rng.integers(n_fits, size=(n_resamples, n_fits))  # which fits a resample is made of
    resampled = np.empty((len(names), n_resamples, n_fits))
    scores = np.empty((len(names), n_fits))
    for fit, true in enumerate(true_codes):
        labels = np.stack([np.asarray(true), *(np.asarray(predicted_codes[name][fit]) for name in names)])
        # Cells that agree in label and all predictions are alike: draw their numbers, not the cells.
        kinds, counts = np.unique(labels, axis=1, return_counts=True)
        indicators = [
            sp.csr_matrix((np.ones(len(codes)), codes, np.arange(len(codes) + 1)), shape=(len(codes), n_classes))
            for codes in kinds
        ]
        scores[:, fit] = _macro_f1(counts[None], kinds, indicators)[:, 0]
        filled = slots == fit
        drawn = np.empty((len(names), int(filled.sum())))
        step = max(1, _CHUNK // len(counts))
        for start in range(0, drawn.shape[1], step):
            part = slice(start, min(start + step, drawn.shape[1]))
            weights = rng.multinomial(len(true), counts / len(true), size=part.stop - part.start)
            drawn[:, part] = _macro_f1(weights, kinds, indicators)
        resampled[:, filled] = drawn
    return Resampled(
        scores=dict(zip(names, scores.mean(1).tolist(), strict=True)),
        draws=dict(zip(names, resampled.mean(2), strict=True)),
    )


def _macro_f1(weights: np.ndarray, kinds: np.ndarray, indicators: list[sp.csr_matrix]) -> np.ndarray:
    """Macro-F1 ``[strategies, draws]`` where kind ``k`` occurs ``weights[draw, k]`` times."""
    n_true = (indicators[0].T @ weights.T).T
    found = []
    for predicted, indicator in zip(kinds[1:], indicators[1:], strict=True):
        n_right = (indicator.T @ (weights * (predicted == kinds[0])).T).T
        f1 = f1_scores(n_right, n_true, (indicator.T @ weights.T).T)
        found.append(np.nanmean(f1, axis=1))
    return np.array(found).reshape(len(indicators) - 1, len(weights))
