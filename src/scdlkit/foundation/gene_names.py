"""What a gene's name alone can tell: its Ensembl id, whether it looks like mouse, and what else it is called."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

# "ENSG00000010610", "ENSG00000010610.10", "CD4_ENSG00000010610": the id is the part that counts.
_HUMAN_ID = re.compile(r"ENSG\d{11}")
_MOUSE_ID = re.compile(r"ENSMUSG\d{11}")
_OTHER_ID = re.compile(r"ENS[A-Z]{3,4}G\d{11}|FBgn\d{7}|WBGene\d{8}")
# "Cd3e", "B2m", "Gm1234", "H2-K1", "mt-Nd1", "1700001C02Rik", but not the human "C1orf21".
_MOUSE_SYMBOL = re.compile(r"(?!C[0-9XY]+orf)(?:mt-[A-Z]|H2-[A-Z]|[A-Z][0-9]*[a-z][a-z0-9]*(?:[-.].*)?$|[0-9A-Z]+Rik$)")

# Columns of .var that hold symbols or Ensembl ids in files of CELLxGENE, scanpy, Seurat and the Human Cell Atlas.
_COLUMNS = (
    *("feature_name", "gene_symbols", "gene_symbol", "gene_name", "gene_names", "symbol", "symbols", "hgnc_symbol"),
    *("gene_short_name", "gene", "genename", "features", "gene_ids", "gene_id", "ensembl_id", "ensembl_ids"),
    *("ensembl_gene_id", "ensembl", "ensemblid", "feature_id"),
)


def clean_names(values: Iterable[object]) -> list[str]:
    """Names as stripped strings; whatever is no string (missing values, numbers) names no gene and becomes ``""``."""
    return [value.strip() if isinstance(value, str) else "" for value in values]


def ensembl_id(name: str) -> str:
    """Human Ensembl gene id in a name, without its version, or ``""``.

    Example
    -------
    >>> ensembl_id("ENSG00000010610.10"), ensembl_id("CD4")
    ('ENSG00000010610', '')
    """
    found = _HUMAN_ID.search(name)
    return found.group() if found else ""


def looks_like_mouse(name: str) -> bool:
    """Whether a symbol is written as mouse and rat symbols are: ``Cd3e``, ``H2-K1``, ``mt-Nd1``, ``1700001C02Rik``."""
    return _MOUSE_SYMBOL.match(name) is not None


@cache
def human_genes() -> dict[str, tuple[str, ...]]:
    """Ensembl gene id -> symbols, older first, from the embedded table (60,467 genes; see ``data/``)."""
    packed = files("scdlkit.foundation").joinpath("data", "genes_human.csv.gz").read_bytes()
    rows = (line.split(",") for line in gzip.decompress(packed).decode().splitlines())
    return {gene: tuple(name for name in (older, newer) if name) for gene, older, newer in rows}


@cache
def human_symbols() -> dict[str, str]:
    """Symbol -> Ensembl gene id, ``""`` where a symbol has stood for more than one gene."""
    found: dict[str, str] = {}
    for gene, symbols in human_genes().items():
        for symbol in symbols:
            found[symbol] = "" if symbol in found else gene
    return found


def guess_naming(columns: Iterable[Sequence[str]]) -> str:
    """What at least half of the names of some column look like.

    Returns
    -------
    ``"mouse Ensembl ids"``, ``"other-species Ensembl ids"``, ``"mouse symbols"``, ``"Ensembl ids"``, ``"human symbols"``
    or ``"unknown"``; the first that holds, so that one column of mouse names is enough.
    """
    tests = {
        "mouse Ensembl ids": lambda name: _MOUSE_ID.match(name) is not None,
        "other-species Ensembl ids": lambda name: _OTHER_ID.match(name) is not None,
        "mouse symbols": looks_like_mouse,
        "Ensembl ids": lambda name: _HUMAN_ID.match(name) is not None,
        "human symbols": lambda name: name in human_symbols(),
    }
    filled = [names for names in ([name for name in column if name] for column in columns) if names]
    for guess, test in tests.items():
        if any(2 * sum(map(test, names)) >= len(names) for names in filled):
            return guess
    return "unknown"


def gene_columns(var: Any, also: Any = None) -> dict[str, np.ndarray]:
    """Names a gene goes by: ``var_names``, then the columns of ``.var`` that usually hold symbols or Ensembl ids.

    Parameters
    ----------
    var
        The genes' data frame.
    also
        A second one (``.var`` where the first is ``.raw.var``): its columns are used where the first lacks them, for genes
        of the same name.

    Returns
    -------
    Column -> names, for :meth:`~scdlkit.foundation.vocabulary.Vocabulary.match`.
    """
    columns = {"var_names": np.asarray(var.index, dtype=object), **_text_columns(var)}
    if also is not None and also.index.is_unique:
        positions = also.index.get_indexer(var.index)
        for column, values in _text_columns(also).items():
            if column not in columns and len(values):
                columns[column] = np.where(positions >= 0, values[positions], "")
    return columns


def _text_columns(var: Any) -> dict[str, np.ndarray]:
    spelling = {str(column).lower(): column for column in reversed(list(var.columns))}
    found = {}
    for name in _COLUMNS:
        if name in spelling:
            values = np.asarray(var[spelling[name]], dtype=object)
            if any(isinstance(value, str) for value in values):
                found[str(spelling[name])] = values
    return found
