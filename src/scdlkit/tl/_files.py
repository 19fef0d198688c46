"""Annotate and embed the cells of a file into a file, in flat memory; what is done survives a kill."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from scdlkit._keys import DEFAULT_EMBEDDING_KEY, DEFAULT_KEY, ResultKeys, check_key_added
from scdlkit._optional import require_foundation

from ._embed import embedding_params, make_reader
from ._predict import find_runner

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from distributed import Client

    from scdlkit.runner import AnnotationRunner


def predict_file(
    cells: str | os.PathLike[str] | AnnData,
    runner: AnnotationRunner | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    strategy: str | None = None,
    key_added: str = DEFAULT_KEY,
    arrays: bool | None = None,
    resume: bool = False,
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] | None = None,
    client: Client | Literal[False] | None = None,
) -> pd.Series:
    """Annotate the cells of a file with a fitted model, and write the labels to another file.

    Cells are read and annotated piece by piece, and what is done is kept beside ``out`` until all is done: a run that was
    killed goes on from there with ``resume=True``. Memory does not grow with the number of cells, but for 100 to
    200 bytes of each (its name, its label). ``out`` appears complete or not at all.

    Parameters
    ----------
    cells
        An ``.h5ad`` file or a ``.zarr`` folder; or an AnnData, best with its matrix on disk or in dask, which is read only.
    runner
        A fitted :class:`scdlkit.AnnotationRunner`, or the path of a saved one.
    out
        Where to write; an earlier file is replaced.

        ``.parquet`` (needs the extra ``parquet``) or ``.csv``
            A table: one row a cell, in the order of the cells, with the columns that :func:`scdlkit.tl.predict` adds to
            ``.obs``, by name of the cell.
        ``.h5ad``, ``.zarr``
            A copy of the file ``cells``, which must have the same ending, with all that :func:`scdlkit.tl.predict` adds.
    strategy
        Name of a fitted strategy or baseline; the best strategy by default.
    key_added
        Prefix of all keys.
    arrays
        Write embedding and class probabilities too: as columns of lists in ``.parquet``, not possible in ``.csv``. By
        default they are in ``.h5ad`` and ``.zarr`` and not in tables.
    resume
        Go on with a run that did not end; begin if there is none. Model, cells and settings must be the same.
    precision
        See :func:`scdlkit.tl.predict`.
    client
        A ``dask.distributed.Client`` whose cluster shares the work, see :func:`scdlkit.tl.predict`. Workers read files by
        themselves, so they must see ``cells``.

    Returns
    -------
    Series
        Cells of each label, most first.

    Raises
    ------
    FileNotFoundError
        If ``cells`` or the model is not there.
    ImportError
        If PyTorch, or what ``client`` or the kind of ``out`` needs, is missing.
    ValueError
        If model, cells or ``out`` cannot be used, or there is something of a run that did not end, or ``resume`` is
        asked for and that was another run; the message says what to do. What was done so far stays.

    Example
    -------
    >>> sk.tl.predict_file("atlas.zarr", "model/", "labels.parquet", resume=True)
    >>> labels = pd.read_parquet("labels.parquet")
    """
    require_foundation()
    from scdlkit._annotation import result_columns
    from scdlkit._prediction import annotate_parts
    from scdlkit._recipes import predicted
    from scdlkit._saved import fingerprint
    from scdlkit.foundation._device import embedding_precision, resolve_device

    from ._file_run import FileRun

    run = FileRun(cells, out, others=(".parquet", ".csv"), client=client)
    arrays = run.writes_cells if arrays is None else arrays
    if arrays and run.target.suffix == ".csv":
        raise ValueError("arrays=True, but a .csv table cannot hold them; write .parquet, .h5ad or .zarr.")
    runner = find_runner(runner)
    runner._check_fitted("predict")
    how = embedding_precision(precision, resolve_device(runner.device))
    name, keys = runner._find_fitted(strategy).name, ResultKeys(key_added)
    run.check_columns(keys, (runner.label_key_, runner.config.group_key))
    with run.opened() as adata:
        expression = runner._reader.choose(adata)
        what = {"task": "predict", "model": fingerprint(runner, name), "strategy": name, "arrays": arrays}
        what["precision"] = how
        with run.store(expression, what, resume=resume) as store:
            path = run.readable(expression)
            parts = predicted(
                runner, expression, name, arrays=arrays, precision=how, client=client, path=path, skip=store.done
            )
            run.collect(store, parts, expression.n_cells)
            found = annotate_parts(store.parts("label_codes", "confidence", "split"), expression.n_cells)
            columns = result_columns(found, keys=keys, classes=runner.classes_)
            run.write(
                store,
                expression,
                columns=columns,
                arrays={keys.embedding: "latent", keys.probabilities: "probabilities"} if arrays else {},
                uns={keys.uns: runner._describe(keys, name)},
                stale=(keys.colors,),
            )
    store.remove()
    return columns[keys.label].value_counts().sort_values(ascending=False, kind="stable").rename("cells")


def embed_file(
    cells: str | os.PathLike[str] | AnnData,
    out: str | os.PathLike[str],
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
    resume: bool = False,
    client: Client | Literal[False] | None = None,
) -> None:
    """Embed the cells of a file with a pretrained scGPT, and write the embedding to another file.

    Works as :func:`scdlkit.tl.predict_file` does: in flat memory, resumable, all or nothing.

    Parameters
    ----------
    cells
        An ``.h5ad`` file or a ``.zarr`` folder; or an AnnData, best with its matrix on disk or in dask, which is read only.
    out
        Where to write; an earlier file is replaced. ``.npy``: float32, cells x embsize, for ``np.load(out, mmap_mode="r")``.
        ``.parquet`` (needs the extra ``parquet``): a column of lists named ``key_added``, by name of the cell.
        ``.h5ad``, ``.zarr``: a copy of the file ``cells``, which must have the same ending, with all that
        :func:`scdlkit.tl.embed` adds.
    checkpoint, key_added, layer, use_raw, batch_size, max_length, ties, duplicates, n_draws, random_state, device, precision, progress
        See :func:`scdlkit.tl.embed`.
    resume, client
        See :func:`scdlkit.tl.predict_file`.

    Raises
    ------
    FileNotFoundError, ImportError, ValueError
        As :func:`scdlkit.tl.predict_file`.

    Example
    -------
    >>> sk.tl.embed_file("atlas.zarr", "embedding.npy", checkpoint="mini")
    """
    require_foundation()
    from scdlkit._prediction import Embedder, report_empty
    from scdlkit._recipes import embedded

    from ._file_run import FileRun

    check_key_added(key_added)
    run = FileRun(cells, out, others=(".npy", ".parquet"), client=client)
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
    with run.opened() as adata:
        expression = reader.choose(adata)
        params = embedding_params(reader, expression)
        with run.store(expression, {"task": "embed", **params}, resume=resume) as store:
            parts = embedded(
                expression, Embedder(reader, batch_size), client=client, path=run.readable(expression), skip=store.done
            )
            run.collect(store, parts, expression.n_cells)
            report_empty(sum(int((~part["embedding"].any(axis=1)).sum()) for _, part in store.parts("embedding")))
            run.write(
                store, expression, columns={}, arrays={key_added: "embedding"}, uns={key_added: {"params": params}}
            )
    store.remove()
