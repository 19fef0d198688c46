"""Predict cells with one fitted strategy, or embed them without any, piece by piece."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ._keys import UNASSIGNED
from ._settings import logger
from ._stream import Result, put_together, work_through
from .foundation._device import resolve_device
from .foundation.inference import normalise

if TYPE_CHECKING:
    from anndata import AnnData

    from ._reader import CellReader
    from .foundation.expression import Expression
    from .foundation.known_cells import KnownCells
    from .foundation.strategies import Strategy


@dataclass(frozen=True)
class Embedder:
    """The frozen embedding of pieces of an expression matrix.

    Parameters
    ----------
    reader
        Of the checkpoint.
    batch_size
        Most cells of a batch; by memory alone by default.
    """

    reader: CellReader
    batch_size: int | None = None

    def __call__(self, piece: Expression) -> Result:
        """``embedding`` float32 ``[cells, embsize]``, L2-normalised, all zero for cells without any known gene."""
        return {"embedding": normalise(self.reader.embed(self.reader.tokenize(piece), batch_size=self.batch_size))}


@dataclass(frozen=True)
class Predictor:
    """Labels, probabilities and embeddings, under one fitted strategy, of pieces of an expression matrix.

    Parameters
    ----------
    strategy
        Fitted.
    reader, classes
        Of the fit.
    known
        Cells of the fit: they are not embedded again.
    device
        As everywhere.
    """

    strategy: Strategy
    reader: CellReader
    classes: np.ndarray
    known: KnownCells
    device: str | None

    def __call__(self, piece: Expression) -> Result:
        """All by cell: what :meth:`scdlkit.AnnotationRunner.predict` returns but ``labels``, and ``split``.

        ``split`` is int8: 0 train, 1 val, 2 test, -1 not in the fit.
        """
        draws = self.reader.tokenize(piece)
        occupied = np.flatnonzero(draws[0].lengths > 0)
        strategy, frozen = self.strategy, self.strategy.frozen
        probabilities = np.full((piece.n_cells, len(self.classes)), np.nan, dtype=np.float32)
        latent = np.zeros((piece.n_cells, self.reader.embsize), dtype=np.float32)
        codes = np.full(piece.n_cells, -1, dtype=np.int64)
        if len(occupied):
            cells = self.reader.cells(piece, draws, occupied, [strategy], known=self.known, embed=frozen)
            strategy.to(resolve_device(self.device))
            strategy.cover(piece.genes.known_ids)
            # a frozen embedding is averaged over the draws already
            parts = [cells] if frozen else [replace(cells, tokens=tokens[occupied]) for tokens in draws]
            probabilities[occupied] = np.mean([strategy.predict_proba(part) for part in parts], axis=0)
            latent[occupied] = normalise(np.mean([strategy.latent(part) for part in parts], axis=0))
            codes[occupied] = probabilities[occupied].argmax(axis=1)
        split = self.known.split_of(draws[0].cell_keys)
        return {"label_codes": codes, "probabilities": probabilities, "latent": latent, "split": split}


def predict_cells(adata: AnnData, predictor: Predictor) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Labels, probabilities and embedding of every cell, and its part in the fit; ``adata`` is read only.

    Returns
    -------
    tuple
        What :meth:`scdlkit.AnnotationRunner.predict` returns, and ``split`` of :class:`Predictor`.
    """
    expression = predictor.reader.choose(adata)
    found = put_together(work_through(expression, predictor, progress=predictor.reader.progress), expression.n_cells)
    codes = found["label_codes"]
    if empty := int((codes < 0).sum()):
        logger.warning("%d cells have no gene that the checkpoint knows: %r.", empty, UNASSIGNED)
    labels = np.append(predictor.classes, UNASSIGNED)[codes]
    split = found.pop("split")
    return {**found, "labels": labels}, split


def embed_cells(expression: Expression, embedder: Embedder) -> np.ndarray:
    """Frozen embedding of all cells, as :class:`Embedder` gives it for a piece."""
    parts = work_through(expression, embedder, progress=embedder.reader.progress)
    embedding = put_together(parts, expression.n_cells)["embedding"]
    if empty := int((~embedding.any(axis=1)).sum()):
        logger.warning("%d cells have no gene that the checkpoint knows; their embedding is all zero.", empty)
    return embedding
