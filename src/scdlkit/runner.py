"""AnnotationRunner: one labelled data set in, compared strategies and a model for new cells out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from ._fitted import FittedModel
from ._prepared import PreparedCells, prepare, read_columns
from ._run_config import RunnerConfig
from ._settings import logger
from ._state import load_cells, open_state
from .foundation._device import resolve_device
from .foundation._processes import processes
from .foundation.checkpoints import ensure_checkpoint
from .foundation.known_cells import KnownCells
from .foundation.plan import Fit
from .foundation.repeated import Comparison, compare
from .foundation.strategies import CellData, LoRAConfig, all_baselines, available_strategies, build_strategies
from .inspection import ScGPTAnnotationDataReport, inspect_annotation_data

if TYPE_CHECKING:
    from anndata import AnnData

DEFAULT_STRATEGIES = ("frozen_probe", "head")
DEFAULT_BASELINES = ("pca_logreg",)
ALL_STRATEGIES = tuple(name for name in available_strategies("strategy") if name != "any_peft")  # which needs a config


class AnnotationRunner(FittedModel):
    """Fit strategies to one labelled data set, compare them honestly, annotate this or other data.

    ``fit_compare`` splits the labelled cells, once or several times, trains every strategy on the same training cells,
    ranks them on the validation cells and reports the untouched test cells. The fitted strategies of the first split
    are kept. :func:`scdlkit.tl.adapt_annotation` does all steps at once.

    Parameters
    ----------
    label_key
        Column of ``.obs`` with cell types; ``"cell_type"`` where it exists. Cells without a label are not trained on.
    checkpoint
        Registered name or folder in the official layout.
    strategies
        Names, see :func:`scdlkit.foundation.available_strategies`, or ``"all"``.
    baselines
        What stands in the same table to compare with, ``"all"`` for every baseline that is installed. Without the
        foundation model: ``pca_logreg``, ``logreg_genes`` and ``celltypist``. On its embedding, without training:
        ``knn_frozen``.
    strategy_configs
        Name → config of that strategy, where the defaults do not fit; under a name of your own also a second config of
        a strategy, or any ``peft.PeftConfig``.
    lora_config
        Short for ``strategy_configs={"lora": ...}``.
    layer, use_raw
        Which matrix; chosen and reported by default.
    group_key
        Column of ``.obs``; cells of one value (donor, study) never straddle the split.
    val_size, test_size
        Shares of the labelled cells; with ``cv`` a fold is the test.
    n_repeats
        Repeat everything but the embedding on so many splits, for a spread and narrower intervals.
    cv
        Number of folds: every labelled cell is a test cell once, and once a repeat.
    leakage_gap
        With a ``group_key``, run all fits also on splits by cell, to see what cells of one group on both sides would
        seem to gain. Doubles the time of the fits.
    small_classes
        Classes too small to be split: ``"error"``, or ``"drop"`` them (their cells count as unlabelled; reported).
    batch_size
        Cells of a training step, for strategies without a config of their own.
    max_length
        Most tokens of a cell, ``<cls>`` included; the checkpoint's by default.
    ties, duplicates
        See :class:`scdlkit.foundation.TokenizerConfig`.
    n_draws
        Average each embedding over this many draws of ties and gene subsets.
    random_state
        Seed of the split, the tokens and the training.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, …; the setting by default.
    progress
        Show progress bars; the setting by default.

    Attributes
    ----------
    report_
        What inspection found.
    results_
        One row a strategy: metrics on validation and test cells (means over the fits), spread and 95 % interval of the
        macro-F1, parameters, time, memory, rank. ``fit_seconds`` is one fit, ``embed_seconds`` the one embedding pass
        that strategies on the frozen embedding share. A strategy that failed in one fit counts as failed.
    folds_
        One row a strategy and fit.
    differences_
        Macro-F1 of each strategy against the best baseline and the best strategy, with 95 % interval.
    leakage_
        Scores on splits by cell and by group side by side; without rows unless there is a ``group_key``.
    history_, per_class_
        Rows per epoch of each fit, and per class.
    classes_
        Class names; ``label_codes`` are positions in it.
    best_strategy_
        Best-ranked strategy on the validation cells (baselines do not count).
    recommendation_
        One sentence: the simplest strategy within one standard error of the best on the validation cells, and whether
        the foundation model is worth it here.
    interrupted_
        What an interrupt has cut off, as a sentence; empty if nothing.

    Example
    -------
    >>> runner = sk.AnnotationRunner("bulk_labels", checkpoint="mini")
    >>> runner.fit_compare(adata)
    >>> runner.annotate_adata(query)
    >>> runner.save("model/")
    """

    def __init__(
        self,
        label_key: str | None = None,
        *,
        checkpoint: str | os.PathLike[str] = "whole-human",
        strategies: Sequence[str] | Literal["all"] = DEFAULT_STRATEGIES,
        baselines: Sequence[str] | Literal["all"] = DEFAULT_BASELINES,
        strategy_configs: Mapping[str, Any] | None = None,
        lora_config: LoRAConfig | None = None,
        layer: str | None = None,
        use_raw: bool | None = None,
        group_key: str | None = None,
        val_size: float = 0.15,
        test_size: float = 0.15,
        n_repeats: int = 1,
        cv: int | None = None,
        leakage_gap: bool = True,
        small_classes: Literal["error", "drop"] = "error",
        batch_size: int = 64,
        max_length: int | None = None,
        ties: Literal["random", "mid"] = "random",
        duplicates: Literal["sum", "first"] = "sum",
        n_draws: int = 1,
        random_state: int = 42,
        device: str | None = None,
        progress: bool | None = None,
    ) -> None:
        config = RunnerConfig(
            label_key, group_key, layer, use_raw, val_size, test_size, n_repeats, cv, leakage_gap, small_classes,
            max_length, ties, duplicates, n_draws, random_state,
        )  # fmt: skip
        if strategies == "all":
            strategies = ALL_STRATEGIES
        if baselines == "all":
            baselines = all_baselines()
        if lora_config is not None:
            if strategy_configs is not None:
                raise ValueError("lora_config is short for strategy_configs={'lora': ...}; give one of the two.")
            strategy_configs = {"lora": lora_config}
        for name, value in (("strategies", strategies), ("baselines", baselines)):
            if isinstance(value, str):
                raise TypeError(f"{name} must be a sequence of names, found the string {value!r}; write ({value!r},).")
        chosen = build_strategies([*strategies, *baselines], strategy_configs, batch_size=batch_size)
        self._restore(config, checkpoint, chosen, device, progress)

    def inspect(self, adata: AnnData) -> ScGPTAnnotationDataReport:
        """:func:`scdlkit.pp.inspect_annotation_data` with this runner's settings."""
        config = self.config
        return inspect_annotation_data(
            adata,
            config.label_key,
            checkpoint=self.checkpoint,
            layer=config.layer,
            use_raw=config.use_raw,
            group_key=config.group_key,
            val_size=config.val_size,
            test_size=config.test_size,
            cv=config.cv,
            small_classes=config.small_classes,
            max_length=config.max_length,
            duplicates=config.duplicates,
            random_state=config.random_state,
        )

    def fit_compare(
        self, adata: AnnData, *, output_dir: str | os.PathLike[str] | None = None, resume: bool = False
    ) -> pd.DataFrame:
        """Train and compare the strategies on the labelled cells; ``adata`` is read only.

        An interrupt (Ctrl-C) loses nothing that is finished: the strategies that were done with the first split are
        compared, or all of them on the splits that were complete; ``interrupted_`` and a warning say what is missing.

        Parameters
        ----------
        adata
            Cells with labels.
        output_dir
            Keep the embedding, every epoch and every finished strategy in the folder ``training`` in it.
        resume
            Go on with what is there: the same call gives, on a CPU, exactly the result of a run without interruption.
            Strategies, repeats and folds may be added. False removes the state of an earlier run and starts over.

        Returns
        -------
        DataFrame
            ``results_``: one row a strategy, best first.

        Raises
        ------
        ValueError
            If inspection or the split finds the data unusable, or ``output_dir`` holds another run; the message says
            what to do.
        RuntimeError
            If every strategy failed; the reasons are listed. If several processes were launched and do not find each
            other.
        KeyboardInterrupt
            If it was interrupted before any strategy was finished, or while several processes work together.
        """
        if resume and output_dir is None:
            raise ValueError("resume=True needs output_dir, the folder of the run that was interrupted.")
        device = resolve_device(self.device)
        processes(device)  # raises before hours of work if they do not find each other
        prepared = self._prepare(adata, place=None if output_dir is None else Path(output_dir))
        self.report_ = prepared.report
        fits = self._plan_fits(prepared)
        first = fits[0].split
        self._known = KnownCells.of(prepared.keys, first.assignment)
        if twins := int((self._known.split_of(prepared.keys) < first.assignment).sum()):
            logger.warning(
                "%d validation or test cells have the same genes in the same order of values as a cell that is used "
                "before them (training, then validation): are cells in the data twice? Scores are then too good.",
                twins,
            )
        state = open_state(
            output_dir, resume=resume, config=self.config, prepared=prepared, reader=self._reader,
            strategies=self._strategies, device=device,
        )  # fmt: skip
        cells, seconds = load_cells(prepared, self._reader, self._strategies, state)
        for strategy in self._strategies:
            strategy.source = self._reader
        comparison = compare(
            self._strategies,
            cells,
            fits,
            prepared.classes,
            device=str(device),
            progress=self.progress,
            state=state,
        )
        self._take(comparison, embed_seconds=seconds)
        self.classes_ = prepared.classes
        self.label_key_ = prepared.label_key
        self._genes = prepared.known_genes
        self._known = self._known.with_embedding(prepared.keys, cells.embedding)
        return self.results_

    def __repr__(self) -> str:
        names = ", ".join(strategy.name for strategy in self._strategies)
        state = f"best: {self.best_strategy_}" if self._fitted else "not fitted"
        return f"AnnotationRunner(checkpoint={str(self.checkpoint)!r}, strategies: {names}; {state})"

    def _prepare(self, adata: AnnData, *, place: Path | None = None) -> PreparedCells:
        """The labelled cells, read once; what an earlier fit left is dropped, or a failure would leave half of it."""
        columns = read_columns(adata, self.config)
        self._use_checkpoint(ensure_checkpoint(self.checkpoint, progress=self.progress))
        self._fitted.clear()
        self._known = KnownCells.none()
        self._folder = None
        return prepare(adata, columns, self.config, self._reader, place=place)

    def _cells_and_fits(self, adata: AnnData) -> tuple[PreparedCells, CellData, list[Fit]]:
        """What there is to be trained on: the cells, read and embedded, and their splits."""
        prepared = self._prepare(adata)
        fits = self._plan_fits(prepared)
        cells, _ = prepared.load(self._reader, self._strategies)
        for strategy in self._strategies:
            strategy.source = self._reader
        return prepared, cells, fits

    def _plan_fits(self, prepared: PreparedCells) -> list[Fit]:
        """Every fit; with groups and unless switched off, the same fits by cell after them."""
        plan, cells = self.config.plan, (prepared.codes, prepared.names)
        fits = plan.fits(*cells, classes=prepared.classes, groups=prepared.groups)
        for text in plan.warnings(fits, *cells, prepared.classes):
            logger.warning("%s", text)
        if prepared.groups is not None and self.config.leakage_gap:
            fits += plan.fits_by_cell(fits, *cells, classes=prepared.classes)
        return fits

    def _take(self, comparison: Comparison, *, embed_seconds: float) -> None:
        table = comparison.table.sort_values("rank").reset_index(drop=True)
        embedded = [
            name in comparison.fitted and "embedding" in comparison.fitted[name].needs for name in table["strategy"]
        ]
        # one pass that strategies share; without it the foundation model would look as cheap as the baseline
        table.insert(
            list(table.columns).index("fit_seconds") + 1, "embed_seconds", np.where(embedded, embed_seconds, 0.0)
        )
        self.results_ = table
        self.folds_ = comparison.folds
        self.differences_ = comparison.differences
        self.leakage_ = comparison.leakage
        self.history_ = comparison.history
        self.per_class_ = comparison.per_class
        self.best_strategy_ = comparison.best
        self.recommendation_ = comparison.recommendation
        logger.info(self.recommendation_)
        self.interrupted_ = comparison.interrupted
        self._fitted = dict(comparison.fitted)
