"""Predict cells with one fitted strategy."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ._keys import UNASSIGNED
from ._settings import logger
from .foundation._device import resolve_device
from .foundation.inference import normalise

if TYPE_CHECKING:
    from anndata import AnnData

    from ._reader import CellReader
    from .foundation.known_cells import KnownCells
    from .foundation.strategies import Strategy


def predict_cells(
    adata: AnnData,
    strategy: Strategy,
    reader: CellReader,
    classes: np.ndarray,
    *,
    known: KnownCells,
    device: str | None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Labels, probabilities and embedding of every cell, and its part in the fit.

    Parameters
    ----------
    adata
        Read only.
    strategy
        Fitted.
    reader, classes
        Of the fit.
    known
        Cells of the fit: they are not embedded again.
    device
        As everywhere.

    Returns
    -------
    tuple
        What :meth:`scdlkit.AnnotationRunner.predict` returns, and int8 ``[cells]``: 0 train, 1 val, 2 test, -1 not in
        the fit.
    """
    expression, draws = reader.read(adata)
    occupied = np.flatnonzero(draws[0].lengths > 0)
    if empty := expression.n_cells - len(occupied):
        logger.warning("%d cells have no gene that the checkpoint knows: %r.", empty, UNASSIGNED)
    cells = reader.cells(expression, draws, occupied, [strategy], known=known, embed=strategy.frozen)
    probabilities = np.full((expression.n_cells, len(classes)), np.nan, dtype=np.float32)
    latent = np.zeros((expression.n_cells, reader.embsize), dtype=np.float32)
    codes = np.full(expression.n_cells, -1, dtype=np.int64)
    if len(occupied):
        strategy.to(resolve_device(device))
        # a frozen embedding is averaged over the draws already
        parts = [cells] if strategy.frozen else [replace(cells, tokens=tokens[occupied]) for tokens in draws]
        probabilities[occupied] = np.mean([strategy.predict_proba(part) for part in parts], axis=0)
        latent[occupied] = normalise(np.mean([strategy.latent(part) for part in parts], axis=0))
        codes[occupied] = probabilities[occupied].argmax(axis=1)
    labels = np.append(classes, UNASSIGNED)[codes]
    prediction = {"label_codes": codes, "labels": labels, "probabilities": probabilities, "latent": latent}
    return prediction, known.split_of(draws[0].cell_keys)
