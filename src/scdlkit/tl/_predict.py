"""Annotate new cells with a fitted model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from scdlkit._annotation import check_target
from scdlkit._keys import DEFAULT_KEY, ResultKeys
from scdlkit._optional import require_foundation

if TYPE_CHECKING:
    from anndata import AnnData
    from distributed import Client

    from scdlkit.runner import AnnotationRunner


def predict(
    adata: AnnData,
    runner: AnnotationRunner | str | os.PathLike[str],
    *,
    strategy: str | None = None,
    key_added: str = DEFAULT_KEY,
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] | None = None,
    client: Client | Literal[False] | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Annotate cells with a fitted model; they may have other genes, in another order, than the training data.

    Cells are read and annotated piece by piece. Where their matrix is on disk or in dask (``backed="r"``,
    :func:`anndata.experimental.read_lazy`), the memory needed does not grow with their number, but for the results. See
    :func:`scdlkit.tl.predict_file` for results that go to a file as they come.

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
    precision
        Of an encoder, as for :func:`scdlkit.tl.embed`; the setting by default. In another one than fp32, cells whose
        label is a close call are computed again in fp32.
    client
        A ``dask.distributed.Client``: the workers of its cluster share the work, each loading the model once. They need
        scdlkit, and must see the folder of the model (the one it was saved to or loaded from; a temporary one
        otherwise) and the checkpoint. By default the client in force if the matrix is a dask array, none otherwise;
        False for none at all.
    copy
        Return a changed copy instead of changing ``adata``.

    Returns
    -------
    AnnData or None
        Sets the fields that :meth:`scdlkit.AnnotationRunner.annotate_adata` lists.

    Raises
    ------
    ImportError
        If PyTorch is missing, or dask where ``client`` is given.
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
    check_target(adata, copy=copy)
    runner = find_runner(runner)
    keys = ResultKeys(key_added)
    target = adata.copy() if copy else adata
    runner.annotate_adata(
        target,
        obs_key=keys.label,
        embedding_key=keys.embedding,
        key_added=key_added,
        strategy=strategy,
        precision=precision,
        client=client,
    )
    return target if copy else None


def find_runner(runner: AnnotationRunner | str | os.PathLike[str]) -> AnnotationRunner:
    """The runner itself, or the one saved in a folder."""
    from scdlkit.runner import AnnotationRunner

    if isinstance(runner, AnnotationRunner):
        return runner
    if not isinstance(runner, str | os.PathLike):
        raise TypeError(
            f"runner must be an AnnotationRunner or the path of a saved one, found {type(runner).__name__}."
        )
    return AnnotationRunner.load(runner)
