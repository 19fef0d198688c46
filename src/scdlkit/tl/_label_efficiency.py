"""How many labels does it take?"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from scdlkit._annotation import check_target, storable, to_actual
from scdlkit._keys import DEFAULT_EFFICIENCY_KEY, check_key_added
from scdlkit._optional import require_foundation

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData


def label_efficiency(
    adata: AnnData,
    label_key: str | None = None,
    *,
    fractions: Sequence[float] = (0.01, 0.05, 0.1, 0.5, 1.0),
    checkpoint: str | os.PathLike[str] = "whole-human",
    strategies: Sequence[str] | Literal["all"] = ("frozen_probe", "head"),
    baselines: Sequence[str] | Literal["all"] = ("pca_logreg",),
    strategy_configs: Mapping[str, Any] | None = None,
    group_key: str | None = None,
    val_size: float = 0.15,
    test_size: float = 0.15,
    n_repeats: int = 5,
    small_classes: Literal["error", "drop"] = "error",
    batch_size: int = 64,
    layer: str | None = None,
    use_raw: bool | None = None,
    max_length: int | None = None,
    random_state: int = 42,
    device: str | None = None,
    key_added: str = DEFAULT_EFFICIENCY_KEY,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Score strategies with ever fewer labels: is a foundation model worth it before much has been annotated?

    Cells are split as in :func:`scdlkit.tl.adapt_annotation`. Then all but a share of the labels of training and
    validation cells are hidden, class by class, at least one cell of each class staying in either; test cells stay as
    they are. Smaller shares are contained in larger ones, and the embedding is computed once for all. Which cells stay
    depends on their names and on ``random_state`` alone.

    Parameters
    ----------
    adata
        Cells with labels.
    label_key
        Column of ``.obs`` with cell types; ``"cell_type"`` where it exists.
    fractions
        Shares of the labels of training and validation cells.
    checkpoint, strategies, baselines, strategy_configs, group_key, val_size, test_size, small_classes, batch_size, \
layer, use_raw, max_length, random_state, device, progress
        See :func:`scdlkit.tl.adapt_annotation`.
    n_repeats
        Splits; with few labels one says little.
    key_added
        Key of ``.uns``.

    Returns
    -------
    DataFrame
        One row a share and strategy: ``strategy``, ``role``, ``uses_encoder``, ``fraction``, ``n_labelled`` (mean number of
        training and validation cells with a label), ``n_train``, ``n_val``, ``val_*`` and ``test_*`` metrics as means
        over the repeats, ``*_macro_f1_sd``, ``_low`` and ``_high`` (95 % interval), ``n_trainable``, ``fit_seconds``,
        ``n_fits`` that finished, and ``error`` (empty, or why it failed; its scores are then NaN).

        Sets ``adata.uns[key_added]`` = ``{"efficiency": this table, "params": the settings}``.

    Raises
    ------
    ImportError
        If PyTorch is missing.
    ValueError
        If ``fractions`` or the data cannot be used; ``adata`` is then unchanged.

    Example
    -------
    >>> sk.tl.label_efficiency(adata, "bulk_labels", checkpoint="mini", fractions=(0.05, 0.2, 1.0))
    >>> sk.pl.label_efficiency(adata)
    """
    require_foundation()
    from scdlkit.foundation._device import resolve_device
    from scdlkit.foundation.label_efficiency import check_fractions
    from scdlkit.foundation.label_efficiency import label_efficiency as efficiency
    from scdlkit.runner import AnnotationRunner

    check_fractions(fractions)
    check_target(adata)
    check_key_added(key_added)
    runner = AnnotationRunner(
        label_key,
        checkpoint=checkpoint,
        strategies=strategies,
        baselines=baselines,
        strategy_configs=strategy_configs,
        layer=layer,
        use_raw=use_raw,
        group_key=group_key,
        val_size=val_size,
        test_size=test_size,
        n_repeats=n_repeats,
        leakage_gap=False,
        small_classes=small_classes,
        batch_size=batch_size,
        max_length=max_length,
        random_state=random_state,
        device=device,
        progress=progress,
    )
    prepared, cells, fits = runner._cells_and_fits(adata)
    table = efficiency(
        runner._strategies,
        cells,
        fits,
        prepared.classes,
        prepared.names,
        fractions=fractions,
        seed=random_state,
        device=str(resolve_device(device)),
        progress=progress,
    )
    to_actual(adata)
    params = {
        "label_key": prepared.label_key,
        "checkpoint": runner._reader.checkpoint.name,
        "checkpoint_sha256": runner._reader.checkpoint.sha256,
        "fractions": [float(value) for value in sorted(fractions)],
        "group_key": group_key or "",
        "n_repeats": n_repeats,
        "random_state": random_state,
    }
    adata.uns[key_added] = {"params": params, "efficiency": storable(table)}
    return table
