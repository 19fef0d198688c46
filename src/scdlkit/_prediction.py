"""Predict cells with one fitted strategy, or embed them without any, piece by piece."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ._keys import UNASSIGNED
from ._settings import logger
from ._stream import Result, put_together
from .foundation._device import embedding_precision, resolve_device
from .foundation.inference import normalise

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ._reader import CellReader
    from .foundation.expression import Expression
    from .foundation.known_cells import KnownCells
    from .foundation.strategies import Strategy
    from .foundation.tokens import Tokens

_CLOSE = 3


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

    def prepare(self, piece: Expression) -> list[Tokens]:
        """One set of tokens a draw."""
        return self.reader.tokenize(piece)

    def __call__(self, piece: Expression, draws: Sequence[Tokens]) -> Result:
        """``embedding`` float32 ``[cells, embsize]``, L2-normalised, all zero for cells without any known gene."""
        return {"embedding": normalise(self.reader.embed(draws, batch_size=self.batch_size))}


@dataclass(frozen=True)
class Predictor:
    """Labels, probabilities and embeddings, under one fitted strategy, of pieces of an expression matrix.

    In another precision than fp32 the encoder runs a second time, in fp32, over the cells whose label is a close call.

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
    arrays
        Whether embedding and probabilities are wanted.
    """

    strategy: Strategy
    reader: CellReader
    classes: np.ndarray
    known: KnownCells
    device: str | None
    arrays: bool = True

    def prepare(self, piece: Expression) -> list[Tokens]:
        """One set of tokens a draw."""
        return self.reader.tokenize(piece)

    def __call__(self, piece: Expression, draws: Sequence[Tokens]) -> Result:
        """By cell: ``label_codes``, ``confidence`` and ``split``; with arrays also ``probabilities`` and ``latent``.

        ``split`` is int8: 0 train, 1 val, 2 test, -1 not in the fit. The others are what
        :meth:`scdlkit.AnnotationRunner.predict` returns, ``confidence`` the probability of the label (NaN: unassigned).
        """
        occupied = np.flatnonzero(draws[0].lengths > 0)
        probabilities = np.full((piece.n_cells, len(self.classes)), np.nan, dtype=np.float32)
        latent = np.zeros((piece.n_cells, self.reader.embsize), dtype=np.float32)
        codes = np.full(piece.n_cells, -1, dtype=np.int64)
        if len(occupied):
            device = resolve_device(self.device)
            self.strategy.to(device)
            self.strategy.cover(piece.genes.known_ids)
            precision = embedding_precision(self.reader.precision, device) if self.strategy.uses_encoder else "fp32"
            probabilities[occupied], latent[occupied] = self._outputs(piece, draws, occupied, precision)
            if precision != "fp32" and len(close := occupied[close_calls(probabilities[occupied])]):
                probabilities[close], latent[close] = self._outputs(piece, draws, close, "fp32")
            codes[occupied] = probabilities[occupied].argmax(axis=1)
        confidence = np.take_along_axis(probabilities, codes[:, None].clip(min=0), axis=1)[:, 0]
        result: Result = {
            "label_codes": codes,
            "confidence": confidence,
            "split": self.known.split_of(draws[0].cell_keys),
        }
        return {**result, "probabilities": probabilities, "latent": latent} if self.arrays else result

    def _outputs(
        self, piece: Expression, draws: Sequence[Tokens], rows: np.ndarray, precision: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities and embedding, averaged over the draws, of some cells with known genes."""
        strategy = self.strategy
        strategy.precision = precision
        embed = strategy.frozen and (self.arrays or "embedding" in strategy.needs)
        reader = self.reader.at(precision)
        cells = reader.cells(piece, draws, rows, [strategy], known=self.known, embed=embed)
        if strategy.frozen and not embed:  # a baseline, and nobody wants the embedding
            return strategy.predict_proba(cells), np.zeros((len(rows), reader.embsize), dtype=np.float32)
        # a frozen embedding is averaged over the draws already
        parts = [cells] if strategy.frozen else [replace(cells, tokens=tokens[rows]) for tokens in draws]
        probabilities, latents = zip(*(strategy.outputs(part) for part in parts), strict=True)
        return np.mean(probabilities, axis=0), normalise(np.mean(latents, axis=0))


def close_calls(probabilities: np.ndarray) -> np.ndarray:
    """Positions of cells ``[n, classes]`` whose second label is more than a third as likely as the first.

    Rounding to bfloat16 or int8 may change the label of these, and hardly that of others.
    """
    second, first = np.partition(probabilities, -2, axis=1)[:, -2:].T
    return np.flatnonzero(_CLOSE * second > first)


def annotate_parts(parts: Iterable[tuple[slice, Result]], n_cells: int) -> Result:
    """What :class:`Predictor` made of all cells; cells without a label are reported."""
    found = put_together(parts, n_cells)
    if empty := int((found["label_codes"] < 0).sum()):
        logger.warning("%d cells have no gene that the checkpoint knows: %r.", empty, UNASSIGNED)
    return found


def embedding_of(parts: Iterable[tuple[slice, Result]], n_cells: int) -> np.ndarray:
    """What :class:`Embedder` made of all cells; cells that could not be embedded are reported."""
    embedding = put_together(parts, n_cells)["embedding"]
    report_empty(int((~embedding.any(axis=1)).sum()))
    return embedding


def report_empty(n_cells: int) -> None:
    """Warn of cells that could not be embedded."""
    if n_cells:
        logger.warning("%d cells have no gene that the checkpoint knows; their embedding is all zero.", n_cells)
