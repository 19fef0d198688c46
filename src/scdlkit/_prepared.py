"""The labelled cells of a data set, read once: what every fit on them shares."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ._labels import Labels, drop_small_classes, find_label_key, read_groups, read_labels
from ._reader import scratch_folder
from ._settings import logger
from .foundation._device import resolve_device
from .foundation.lower_states import LowerStates
from .foundation.strategies import CellData
from .inspection import ScGPTAnnotationDataReport, build_report

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

    from ._reader import CellReader
    from ._run_config import RunnerConfig
    from .foundation.expression import Expression
    from .foundation.known_cells import KnownCells
    from .foundation.stored_tokens import StoredTokens
    from .foundation.strategies import Strategy


@dataclass(frozen=True)
class PreparedCells:
    """Labelled cells with at least one known gene, in a canonical order: that of the file must not reach any training.

    Parameters
    ----------
    cells
        Tokens and label codes of the n cells. :meth:`load` adds what is costly.
    names
        str ``[n]``.
    keys
        uint64 ``[n]``, hash of the content of each cell.
    groups
        str ``[n]``, or None without a ``group_key``.
    classes
        Class names.
    label_key
        Column of ``.obs`` that was read.
    report
        What inspection found.
    expression, draws
        Matrix and tokens of all cells of the data set.
    rows
        int64 ``[n]``, positions of the n cells in these.
    place
        Folder for large temporary files.
    """

    cells: CellData
    names: np.ndarray
    keys: np.ndarray
    groups: np.ndarray | None
    classes: np.ndarray
    label_key: str
    report: ScGPTAnnotationDataReport
    expression: Expression
    draws: list[StoredTokens]
    rows: np.ndarray
    place: Path

    @property
    def codes(self) -> np.ndarray:
        """int64 ``[n]``, positions in ``classes``."""
        return np.asarray(self.cells.codes)

    @property
    def known_genes(self) -> np.ndarray:
        """Names of the genes that the checkpoint knows."""
        genes = self.expression.genes
        return genes.names[genes.token_ids >= 0]

    def load(
        self, reader: CellReader, strategies: Sequence[Strategy], *, known: KnownCells | None = None
    ) -> tuple[CellData, float]:
        """The cells with the embedding and whatever else the strategies read, and the seconds this took.

        Call it once: all fits share the result.
        """
        start = time.perf_counter()
        cells = reader.cells(self.expression, self.draws, self.rows, strategies, known=known)
        states = LowerStates(
            self.draws[0][self.rows],
            reader,
            resolve_device(reader.device),
            self.place,
            checkpoint_sha256=reader.checkpoint.sha256,
        )
        return replace(cells, states=states.rows, codes=self.cells.codes), time.perf_counter() - start


class Columns(NamedTuple):
    """What is read of ``.obs``."""

    label_key: str
    labels: Labels
    groups: np.ndarray | None


def read_columns(adata: AnnData, config: RunnerConfig) -> Columns:
    """Labels and groups of all cells; a ValueError where a column is missing or unfit, before anything is fetched."""
    label_key = find_label_key(adata, config.label_key)
    return Columns(label_key, read_labels(adata, label_key), read_groups(adata, config.group_key))


def prepare(
    adata: AnnData, columns: Columns, config: RunnerConfig, reader: CellReader, *, place: Path | None = None
) -> PreparedCells:
    """Read matrix and tokens, inspect all and give the warnings; ``adata`` is read only.

    Tokens that are too many for the memory are kept in files in ``place``, see :meth:`CellReader.read`.

    Raises
    ------
    ValueError
        If the data cannot be used; whether the cells can be split is left to the split.
    """
    label_key, labels, groups = columns
    expression, draws = reader.read(adata, place=place)
    tokens = draws[0]
    if not tokens.lengths.any():
        raise ValueError(f"None of the {expression.n_cells} cells has a value of a gene that the checkpoint knows.")
    # a cell without known genes teaches nothing
    labels = replace(labels, codes=np.where(tokens.lengths > 0, labels.codes, -1))
    dropped: list[str] = []
    if config.small_classes == "drop":
        labels, dropped = drop_small_classes(labels, groups, config.plan)
    report = build_report(
        adata,
        expression=expression,
        n_expressed=tokens.n_expressed,
        config=reader.tokenizer,
        checkpoint=reader.checkpoint.name,
        labels=labels,
        label_key=label_key,
        groups=groups,
        group_key=config.group_key or "",
        plan=config.plan,
        dropped=dropped,
    )
    for text in report.warnings:
        if text not in expression.warnings:  # these were given when the matrix was chosen
            logger.warning("%s", text)
    rows = np.flatnonzero(labels.codes >= 0)
    names = expression.cell_names.astype(str)
    rows = rows[np.lexsort((names[rows], tokens.cell_keys[rows]))]
    return PreparedCells(
        cells=CellData(tokens=tokens[rows], codes=labels.codes[rows]),
        names=names[rows],
        keys=tokens.cell_keys[rows],
        groups=None if groups is None else groups[rows],
        classes=labels.classes,
        label_key=label_key,
        report=report,
        expression=expression,
        draws=draws,
        rows=rows,
        place=scratch_folder(place),
    )
