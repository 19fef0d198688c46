"""Zero-shot embedding."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

from scdlkit._annotation import check_target, to_actual
from scdlkit._keys import DEFAULT_EMBEDDING_KEY, check_key_added
from scdlkit._optional import require_foundation

if TYPE_CHECKING:
    from anndata import AnnData
    from distributed import Client

    from scdlkit._reader import CellReader
    from scdlkit.foundation.expression import Expression


def embed(
    adata: AnnData,
    *,
    checkpoint: str | os.PathLike[str] = "whole-human",
    key_added: str = DEFAULT_EMBEDDING_KEY,
    layer: str | None = None,
    use_raw: bool | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    ties: Literal["random", "mid"] = "random",
    duplicates: Literal["sum", "first"] = "sum",
    n_draws: int = 1,
    random_state: int = 42,
    device: str | None = None,
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] | None = None,
    progress: bool | None = None,
    client: Client | Literal[False] | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Embed cells with a pretrained scGPT, without any labels (Cui et al. 2024, https://doi.org/10.1038/s41592-024-02201-0).

    The embedding of a cell depends on its content and ``random_state`` alone, not on the order or number of cells.

    Parameters
    ----------
    adata
        Cells x genes: counts, normalised or log1p values.
    checkpoint
        Registered name or folder in the official layout.
    key_added
        Key of ``.obsm``.
    layer, use_raw
        Which matrix; chosen and reported by default, see :func:`scdlkit.foundation.choose_expression`.
    batch_size
        Most cells of a batch; by memory alone by default.
    max_length
        Most tokens of a cell, ``<cls>`` included; the checkpoint's by default.
    ties, duplicates
        See :class:`scdlkit.foundation.TokenizerConfig`.
    n_draws
        Average over this many draws of ties and gene subsets.
    random_state
        Seed of ties and gene subsets.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, …; the setting by default.
    precision
        Of the encoder: ``"fp32"``; ``"bf16"``, ``"int8"`` (CPU) or ``"fp16"`` (GPU), which are faster and less exact;
        ``"auto"``: fp16 on a GPU, else fp32. The setting by default.
    progress
        Show a progress bar; the setting by default.
    client
        Of a dask cluster that shares the work, see :func:`scdlkit.tl.predict`.
    copy
        Return a changed copy instead of changing ``adata``.

    Returns
    -------
    AnnData or None
        Sets the following fields:

        ``adata.obsm[key_added]``
            float32, cells x embsize, L2-normalised. Cells without any known gene are all zero, with a warning.
        ``adata.uns[key_added]``
            params: checkpoint, its sha256, matrix, and the settings.

    Raises
    ------
    ImportError
        If PyTorch is missing.
    ValueError
        If the matrix or the genes cannot be used; the message says why.

    Example
    -------
    >>> sk.tl.embed(adata, checkpoint="mini")
    >>> sc.pp.neighbors(adata, use_rep="X_scgpt")
    """
    require_foundation()
    from scdlkit._prediction import Embedder, embedding_of
    from scdlkit._recipes import embedded

    check_target(adata, copy=copy)
    check_key_added(key_added)
    reader = make_reader(
        checkpoint,
        layer=layer,
        use_raw=use_raw,
        max_length=max_length,
        ties=ties,
        duplicates=duplicates,
        n_draws=n_draws,
        random_state=random_state,
        device=device,
        precision=precision,
        progress=progress,
    )
    expression = reader.choose(adata)
    parts = embedded(expression, Embedder(reader, batch_size), client=client)
    embedding = embedding_of(parts, expression.n_cells)
    target = adata.copy() if copy else adata
    to_actual(target)
    target.obsm[key_added] = embedding
    target.uns[key_added] = {"params": embedding_params(reader, expression)}
    return target if copy else None


def make_reader(
    checkpoint: str | os.PathLike[str],
    *,
    layer: str | None,
    use_raw: bool | None,
    max_length: int | None,
    ties: Literal["random", "mid"],
    duplicates: Literal["sum", "first"],
    n_draws: int,
    random_state: int,
    device: str | None,
    precision: str | None,
    progress: bool | None,
) -> CellReader:
    """What reads and embeds cells with these settings."""
    from scdlkit._reader import CellReader
    from scdlkit.foundation._device import embedding_precision, resolve_device
    from scdlkit.foundation.checkpoints import ensure_checkpoint
    from scdlkit.foundation.tokens import TokenizerConfig

    how = embedding_precision(precision, resolve_device(device))
    found = ensure_checkpoint(checkpoint, progress=progress)
    tokenizer = TokenizerConfig.from_args(
        found.args(), max_length=max_length, ties=ties, duplicates=duplicates, seed=random_state
    )
    return CellReader(
        found,
        tokenizer,
        n_draws=n_draws,
        layer=layer,
        use_raw=use_raw,
        device=device,
        precision=how,
        progress=progress,
    )


def embedding_params(reader: CellReader, expression: Expression) -> dict[str, Any]:
    """What an embedding depends on, as plain values."""
    return {
        "checkpoint": reader.checkpoint.name,
        "checkpoint_sha256": reader.checkpoint.sha256,
        "matrix": expression.source,
        "values": expression.kind,
        "max_length": reader.tokenizer.max_length,
        "ties": reader.tokenizer.ties,
        "duplicates": reader.tokenizer.duplicates,
        "n_draws": reader.n_draws,
        "random_state": reader.tokenizer.seed,
        "precision": reader.precision,
    }
