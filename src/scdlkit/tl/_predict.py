"""Annotate new cells with a fitted model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from scdlkit._annotation import check_target
from scdlkit._keys import DEFAULT_KEY, ResultKeys
from scdlkit._optional import require_foundation

if TYPE_CHECKING:
    from anndata import AnnData

    from scdlkit.runner import AnnotationRunner


def predict(
    adata: AnnData,
    runner: AnnotationRunner | str | os.PathLike[str],
    *,
    strategy: str | None = None,
    key_added: str = DEFAULT_KEY,
    copy: bool = False,
) -> AnnData | None:
    """Annotate cells with a fitted model; they may have other genes, in another order, than the training data.

    Parameters
    ----------
    adata
        Cells to annotate.
    runner
        A fitted :class:`scdlkit.AnnotationRunner`, or the path of a saved one.
    strategy
        Name of a fitted strategy or baseline; the best strategy by default.
    key_added
        Prefix of all keys.
    copy
        Return a changed copy instead of changing ``adata``.

    Returns
    -------
    AnnData or None
        Sets the fields that :meth:`scdlkit.AnnotationRunner.annotate_adata` lists.

    Raises
    ------
    ImportError
        If PyTorch is missing.
    RuntimeError
        If the runner is not fitted.
    ValueError
        If the model or the cells cannot be used; the message says why.

    Example
    -------
    >>> sk.tl.predict(query, "model/")
    >>> query.obs["scgpt_label"]
    """
    require_foundation()
    from scdlkit.runner import AnnotationRunner

    check_target(adata, copy=copy)
    if not isinstance(runner, AnnotationRunner):
        if not isinstance(runner, str | os.PathLike):
            raise TypeError(
                f"runner must be an AnnotationRunner or the path of a saved one, found {type(runner).__name__}."
            )
        runner = AnnotationRunner.load(runner)
    keys = ResultKeys(key_added)
    target = adata.copy() if copy else adata
    runner.annotate_adata(
        target, obs_key=keys.label, embedding_key=keys.embedding, key_added=key_added, strategy=strategy
    )
    return target if copy else None
