"""The main job in one call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from scdlkit._annotation import check_target
from scdlkit._keys import DEFAULT_KEY, ResultKeys
from scdlkit._labels import DEFAULT_LABEL_KEY
from scdlkit._optional import require_foundation

if TYPE_CHECKING:
    from anndata import AnnData

    from scdlkit.foundation.strategies import LoRAConfig
    from scdlkit.runner import AnnotationRunner


def adapt_annotation(
    adata: AnnData,
    label_key: str | None = None,
    *,
    checkpoint: str | os.PathLike[str] = "whole-human",
    strategies: Sequence[str] | Literal["all"] = ("frozen_probe", "head"),
    baselines: Sequence[str] | Literal["all"] = ("pca_logreg",),
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
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    key_added: str = DEFAULT_KEY,
    progress: bool | None = None,
) -> AnnotationRunner:
    """Adapt a pretrained scGPT to the cell types of ``adata``, compare strategies honestly, annotate every cell.

    Labelled cells are split into train, validation and test. Every strategy and baseline learns from the same training
    cells, validation cells rank them, and test cells, which chose nothing, tell how good each is. The best strategy
    annotates all cells. After an interrupt (Ctrl-C) that is done with the strategies that are finished, and a warning,
    ``runner.interrupted_`` and the table say what is missing. scGPT: Cui et al. 2024, https://doi.org/10.1038/s41592-024-02201-0.

    Parameters
    ----------
    adata
        Cells x genes: counts, normalised or log1p values; in memory, backed, lazy or dask. Of what is not in memory the
        tokens are kept in files (5 bytes a gene of each cell) in ``scdlkit.settings.temp_dir``, ``output_dir`` or the
        system's temporary folder while it is fitted.
    label_key
        Column of ``.obs`` with cell types; ``"cell_type"`` where it exists. Cells without a label are annotated, not
        trained on.
    checkpoint
        Registered name (see :func:`scdlkit.foundation.list_checkpoints`) or folder in the official layout.
    strategies, baselines
        What to compare, ``"all"`` for every one. On the frozen embedding, computed once: ``frozen_probe``, logistic
        regression, and ``head``, scGPT's annotation head. Inside the encoder: ``lora``, ``ia3``, ``adapter``,
        ``prefix_tuning``, ``bitfit`` and ``full_finetune``. Baselines with no foundation model at all: ``pca_logreg``,
        ``logreg_genes`` and ``celltypist`` (needs the extra); ``knn_frozen`` is one on its embedding.
    strategy_configs
        Name → config of that strategy; under a name of your own also a second config of a strategy, or any
        ``peft.PeftConfig``.
    lora_config
        Short for ``strategy_configs={"lora": ...}``.
    layer, use_raw
        Which matrix; chosen and reported by default.
    group_key
        Column of ``.obs``; cells of one value (donor, study) never straddle the split.
    val_size, test_size
        Shares of the labelled cells; with ``cv`` a fold is the test.
    n_repeats
        Fit everything on so many splits, for a spread over them and narrower intervals.
    cv
        Number of folds, in each of which every strategy is fitted: every labelled cell is a test cell once a repeat.
    leakage_gap
        With a ``group_key``, fit everything also on splits by cell, to see what cells of one group on both sides would
        seem to gain. Doubles the time of the fits.
    small_classes
        Classes too small to be split: ``"error"``, or ``"drop"`` them (their cells count as unlabelled; reported).
    batch_size
        Cells of a training step.
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
    output_dir
        Also write tables (``strategy_metrics.csv``, ``folds.csv``, …), ``report.md``, figures and the saved ``model/``
        into this folder. On the way, every epoch and every finished strategy are kept in ``training/`` in it.
    resume
        Go on with an interrupted run in ``output_dir``, see :meth:`scdlkit.AnnotationRunner.fit_compare`. False starts
        over.
    key_added
        Prefix of all keys.
    progress
        Show progress bars; the setting by default.

    Returns
    -------
    AnnotationRunner
        Fitted; ``adata`` has the fields that :meth:`scdlkit.AnnotationRunner.annotate_adata` lists.

    Raises
    ------
    ImportError
        If PyTorch, or the package of a baseline, is missing; says what to install.
    ValueError
        If the data cannot be used, or ``output_dir`` holds another run to ``resume``; the message says why and what to
        do. ``adata`` is then unchanged.
    OSError
        If the tokens of cells that are not in memory do not fit on the disk.
    KeyboardInterrupt
        If it was interrupted before any strategy was finished.

    Example
    -------
    >>> runner = sk.tl.adapt_annotation(adata, "bulk_labels", checkpoint="mini")
    >>> runner.results_[["strategy", "val_macro_f1", "test_macro_f1"]]
    >>> sc.pl.umap(adata, color="scgpt_label")
    """
    require_foundation()
    from scdlkit.runner import AnnotationRunner

    keys = ResultKeys(key_added)
    check_target(adata, keys, inputs=(label_key or DEFAULT_LABEL_KEY, group_key))
    runner = AnnotationRunner(
        label_key,
        checkpoint=checkpoint,
        strategies=strategies,
        baselines=baselines,
        strategy_configs=strategy_configs,
        lora_config=lora_config,
        layer=layer,
        use_raw=use_raw,
        group_key=group_key,
        val_size=val_size,
        test_size=test_size,
        n_repeats=n_repeats,
        cv=cv,
        leakage_gap=leakage_gap,
        small_classes=small_classes,
        batch_size=batch_size,
        max_length=max_length,
        ties=ties,
        duplicates=duplicates,
        n_draws=n_draws,
        random_state=random_state,
        device=device,
        progress=progress,
    )
    if output_dir is not None:
        from ._artefacts import prepare_folder, write_artefacts

        prepare_folder(output_dir)
    runner.fit_compare(adata, output_dir=output_dir, resume=resume)
    runner.annotate_adata(  # here, where the model is: workers might not see it
        adata, obs_key=keys.label, embedding_key=keys.embedding, key_added=key_added, client=False
    )
    if output_dir is not None:
        write_artefacts(adata, runner, output_dir, key=key_added)
    return runner
