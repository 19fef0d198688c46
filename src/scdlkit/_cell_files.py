"""Files of cells (h5ad, zarr): opened without reading their matrices, and copied with results written in."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from anndata import AnnData

FORMATS = (".h5ad", ".zarr")
_ARRAY_ROWS = 16_384  # of a chunk of a written array


def columns_of(path: Path) -> list[str]:
    """Names of the columns of ``.obs``."""
    with _open(path, "r") as file:
        return [str(name) for name in file["obs"].attrs.get("column-order", [])]


def check_cells_path(path: Path, argument: str = "cells") -> None:
    """Raise an error that names ``argument`` unless ``path`` is an h5ad file or a zarr folder that is there."""
    if path.suffix not in FORMATS:
        raise ValueError(f"{argument} must end in .h5ad or .zarr, found {path}.")
    if not path.exists():
        raise FileNotFoundError(f"{argument}: {path} does not exist.")


@contextmanager
def open_cells(path: Path) -> Iterator[AnnData]:
    """The cells of a file: matrices stay on disk, ``.obs`` has names alone; for reading."""
    from anndata import AnnData
    from anndata.io import read_elem
    from pandas import DataFrame

    check_cells_path(path)
    with _open(path, "r") as file:
        if "encoding-type" not in file["obs"].attrs:
            raise ValueError(f"{path} is of a format before anndata 0.7; read and write it once with anndata.")
        names = read_elem(file["obs"][file["obs"].attrs["_index"]])
        raw = None
        if _has(file, "raw"):
            raw = {"X": matrix_of(file["raw/X"]), "var": read_elem(file["raw/var"])}
        yield AnnData(
            X=matrix_of(file["X"]) if _has(file, "X") else None,
            obs=DataFrame(index=names),
            var=read_elem(file["var"]),
            layers={name: matrix_of(file["layers"][name]) for name in file["layers"]} if "layers" in file else None,
            raw=raw,
            uns={"log1p": {}} if "uns" in file and "log1p" in file["uns"] else {},
        )


def _has(file: Any, name: str) -> bool:
    return name in file and file[name].attrs.get("encoding-type") != "null"  # None is written too


def matrix_of(element: Any) -> Any:
    """A matrix of an open file, of which rows can be read."""
    from anndata.io import sparse_dataset

    return sparse_dataset(element) if "encoding-type" in element.attrs and hasattr(element, "keys") else element


@contextmanager
def _open(path: Path, mode: Literal["r", "r+"]) -> Iterator[Any]:
    if path.suffix == ".h5ad":
        import h5py

        with h5py.File(path, mode) as file:
            yield file
    else:
        import zarr

        # what is written is not in metadata that was gathered before
        options: dict[str, Any] = {"use_consolidated": False} if mode != "r" and zarr.__version__[0] != "2" else {}
        yield zarr.open_group(str(path), mode=mode, **options)


@contextmanager
def matrix_on_disk(path: Path, name: str) -> Iterator[Any]:
    """A matrix of a file by its name in it (``"X"``, ``"raw/X"``, ``"layers/counts"``)."""
    with _open(path, "r") as file:
        yield matrix_of(file[name])


def copy_with_results(
    source: Path,
    target: Path,
    *,
    columns: Mapping[str, Any],
    arrays: Mapping[str, Iterable[tuple[slice, np.ndarray]]],
    uns: Mapping[str, Any],
    stale: Iterable[str] = (),
) -> None:
    """Copy a file of cells and write results into the copy, which appears complete or not at all.

    Parameters
    ----------
    source, target
        Paths with the same ending; a target that is there is replaced.
    columns
        Name → values, of ``.obs``.
    arrays
        Name → pieces float32 ``[cells, width]``, of ``.obsm``.
    uns
        Name → content, of ``.uns``.
    stale
        Names in ``.uns`` that go.
    """
    from anndata.io import write_elem

    with appearing(target) as unfinished:
        if source.is_dir():
            shutil.copytree(source, unfinished)
        else:
            shutil.copyfile(source, unfinished)
        with _open(unfinished, "r+") as file:
            obs = file["obs"]
            n_cells = obs[obs.attrs["_index"]].shape[0]
            for name, values in columns.items():
                _remove(obs, name)
                write_elem(obs, name, values)
            order = [str(name) for name in obs.attrs["column-order"]]
            obs.attrs["column-order"] = [*order, *(name for name in columns if name not in order)]
            for name, pieces in arrays.items():
                _remove(file["obsm"], name)
                array = None
                for cells, rows in pieces:
                    if array is None:
                        array = _empty_array(file["obsm"], name, (n_cells, rows.shape[1]))
                    array[cells] = rows
            for name in stale:
                _remove(file["uns"], name)
            for name, content in uns.items():
                _remove(file["uns"], name)
                write_elem(file["uns"], name, content)
        if (unfinished / ".zmetadata").exists():  # of zarr, gathered: what was written is not in it yet
            import zarr

            zarr.consolidate_metadata(str(unfinished))


def _remove(group: Any, name: str) -> None:
    if name in group:
        del group[name]


def _empty_array(group: Any, name: str, shape: tuple[int, int]) -> Any:
    create = group.create_array if hasattr(group, "create_array") else group.create_dataset
    array = create(name, shape=shape, dtype="float32", chunks=(min(_ARRAY_ROWS, max(1, shape[0])), shape[1]))
    array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    return array


def check_replaceable(target: Path) -> None:
    """Raise a ValueError if ``target`` is there and is not what it is called."""
    is_zarr = target.suffix == ".zarr"
    if target.is_dir() and not (is_zarr and any((target / name).exists() for name in (".zgroup", "zarr.json"))):
        raise ValueError(f"out: {target} is a folder and no result of an earlier run; choose another name.")
    if target.is_file() and is_zarr:
        raise ValueError(f"out: {target} is a file; choose another name for a zarr folder.")


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A path beside the target to write to; it takes the target's place when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.stem}-{os.getpid()}{target.suffix}")
    _discard(unfinished)
    try:
        yield unfinished
        if target.is_dir():  # a folder cannot be replaced by renaming
            old = unfinished.with_name(f"{unfinished.name}-old")
            target.replace(old)
            unfinished.replace(target)
            _discard(old)
        else:
            unfinished.replace(target)
    finally:
        _discard(unfinished)


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
