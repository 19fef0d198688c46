"""Look at labelled cells before any training: labels, genes, values, splits, and what may go wrong."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ._keys import UNASSIGNED
from ._labels import Labels, drop_small_classes, find_label_key, group_candidates, read_groups, read_labels
from .foundation.checkpoints import ensure_checkpoint
from .foundation.confounding import confounding_warnings
from .foundation.expression import Expression, check_overlap, choose_expression
from .foundation.plan import SplitPlan
from .foundation.tokens import TokenizerConfig, Tokens, tokenize_pieces
from .foundation.vocabulary import Vocabulary

if TYPE_CHECKING:
    import os

    from anndata import AnnData


@dataclass(frozen=True)
class ScGPTAnnotationDataReport:
    """What :func:`inspect_annotation_data` found; print it, or read its fields.

    Parameters
    ----------
    checkpoint
        Name of the checkpoint.
    label_key, group_key
        Columns of ``.obs``; empty if none.
    n_cells, n_labelled, n_genes
        Cells, cells with a label, genes of the chosen matrix.
    n_matched, overlap, matched_how, n_duplicates
        Genes the vocabulary knows, their share of ``n_genes``, how they were matched, and how many of them share a
        token with an earlier one.
    matrix, values
        Which matrix was chosen, and what its values are: counts, normalised or log1p.
    genes_per_cell
        Known expressed genes of a cell: min, q25, median, q75, max.
    n_empty
        Cells without any known gene; they are labelled "unassigned".
    max_length, share_above_max_length
        Most tokens of a cell, and the share of cells that have more and keep a random subset.
    class_counts, smallest_class
        Cells of each class, and the class with the fewest.
    split_problems
        What stands against the train / val / test split; empty if it is feasible.
    group_candidates
        Columns of ``.obs`` that look like donors, batches or studies, with their number of values.
    warnings
        What may surprise.
    """

    checkpoint: str
    label_key: str
    group_key: str
    n_cells: int
    n_labelled: int
    n_genes: int
    n_matched: int
    overlap: float
    matched_how: Mapping[str, int]
    n_duplicates: int
    matrix: str
    values: str
    genes_per_cell: Mapping[str, float]
    n_empty: int
    max_length: int
    share_above_max_length: float
    class_counts: Mapping[str, int] = field(default_factory=dict)
    smallest_class: str = ""
    split_problems: tuple[str, ...] = ()
    group_candidates: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def feasible(self) -> bool:
        """Whether the labels can be split as asked."""
        return not self.split_problems

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            k: dict(v) if isinstance(v, Mapping) else list(v) if isinstance(v, tuple) else v for k, v in plain.items()
        }

    def _rows(self) -> list[tuple[str, str]]:
        genes = self.genes_per_cell
        how = ", ".join(f"{count:,} by {name}" for name, count in self.matched_how.items()) or "none"
        rows = [
            ("checkpoint", self.checkpoint),
            ("cells", f"{self.n_cells:,}" + (f", {self.n_labelled:,} labelled" if self.label_key else "")),
            ("matrix", f"{self.matrix}, {self.values}"),
            ("genes", f"{self.n_matched:,} of {self.n_genes:,} matched ({self.overlap:.1%}): {how}"),
            (
                "genes per cell",
                f"median {genes['median']:,.0f}, quartiles {genes['q25']:,.0f} to {genes['q75']:,.0f}"
                + (f"; {self.n_empty:,} cells have none" if self.n_empty else ""),
            ),
            (
                "longer than max_length",
                f"{self.share_above_max_length:.1%} of cells have over {self.max_length - 1:,} genes",
            ),
        ]
        if self.label_key:
            smallest = f"{self.smallest_class!r} with {self.class_counts[self.smallest_class]:,} cells"
            rows += [
                ("classes", f"{len(self.class_counts)} in {self.label_key!r}, smallest {smallest}"),
                ("split", "feasible" if self.feasible else "; ".join(self.split_problems)),
            ]
        if self.group_key:
            rows.append(("groups", f"whole values of {self.group_key!r} stay together"))
        elif self.group_candidates:
            found = ", ".join(f"{name!r} ({n})" for name, n in self.group_candidates.items())
            rows.append(("possible groups", f"{found}; group_key keeps them apart in the split"))
        return rows + [("warning", text) for text in self.warnings]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self._rows())
        return "\n".join(f"{name:<{width}}  {text}" for name, text in self._rows())

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(text)}</td></tr>"
            for name, text in self._rows()
        )
        return f"<table>{rows}</table>"


def inspect_annotation_data(
    adata: AnnData,
    label_key: str | None = None,
    *,
    checkpoint: str | os.PathLike[str] = "whole-human",
    layer: str | None = None,
    use_raw: bool | None = None,
    group_key: str | None = None,
    val_size: float = 0.15,
    test_size: float = 0.15,
    cv: int | None = None,
    small_classes: Literal["error", "drop"] = "error",
    max_length: int | None = None,
    duplicates: Literal["sum", "first"] = "sum",
    random_state: int = 42,
) -> ScGPTAnnotationDataReport:
    """Check whether cells can be annotated, and report what will be used and what may surprise.

    Reads ``adata`` only. Needs no PyTorch, and of a registered checkpoint only the vocabulary and the settings, about
    1.3 MB, not the weights.

    Parameters
    ----------
    adata
        Cells x genes.
    label_key
        Column of ``.obs`` with cell types; ``"cell_type"`` where it exists. Pass ``""`` to check genes alone.
    checkpoint
        Registered name (see :func:`scdlkit.foundation.list_checkpoints`) or folder in the official layout.
    layer, use_raw
        Which matrix; chosen and reported by default, see :func:`scdlkit.foundation.choose_expression`.
    group_key
        Column of ``.obs`` with donors, samples or studies that must not straddle the split.
    val_size, test_size
        Shares of the labelled cells.
    cv
        Number of folds, where the cells are to be split into folds.
    small_classes
        ``"drop"``: report the split without the classes that are too small for it, and name these.
    max_length
        Most tokens of a cell, ``<cls>`` included; the checkpoint's by default.
    duplicates
        What becomes of genes that share a token, see :class:`scdlkit.foundation.TokenizerConfig`.
    random_state
        Seed of the split that is tried; with groups, whether there is one may depend on it.

    Returns
    -------
    ScGPTAnnotationDataReport
        Has a readable ``str``, an HTML form for notebooks, and ``to_dict()``.

    Raises
    ------
    TypeError
        If ``adata`` is not an AnnData.
    ValueError
        If there are no cells or genes, too few genes are known, values are negative or not finite, the label column
        is missing, or it has fewer than two labels.

    Example
    -------
    >>> import scanpy as sc, scdlkit as sk
    >>> adata = sc.datasets.pbmc68k_reduced()
    >>> print(sk.pp.inspect_annotation_data(adata, "bulk_labels", checkpoint="mini"))  # doctest: +SKIP
    """
    label_key = find_label_key(adata, label_key) if label_key != "" else ""
    labels = read_labels(adata, label_key) if label_key else None
    groups = read_groups(adata, group_key)
    found = ensure_checkpoint(checkpoint, weights=False)
    vocabulary = Vocabulary.from_json(found.vocab_path)
    config = TokenizerConfig.from_args(found.args(), max_length=max_length, duplicates=duplicates)
    expression = choose_expression(adata, vocabulary, layer=layer, use_raw=use_raw)
    check_overlap(expression.genes)
    n_expressed = np.concatenate([part.n_expressed for part in token_pieces(expression, config)])
    plan = SplitPlan(val_size, test_size, cv=cv, seed=random_state)
    dropped: list[str] = []
    if labels is not None and small_classes == "drop":
        labels, dropped = drop_small_classes(labels, groups, plan)
    return build_report(
        adata,
        expression=expression,
        n_expressed=n_expressed,
        config=config,
        checkpoint=found.name,
        labels=labels,
        label_key=label_key,
        groups=groups,
        group_key=group_key or "",
        plan=plan,
        dropped=dropped,
    )


def build_report(
    adata: AnnData,
    *,
    expression: Expression,
    n_expressed: np.ndarray,
    config: TokenizerConfig,
    checkpoint: str,
    labels: Labels | None,
    label_key: str,
    groups: np.ndarray | None,
    group_key: str,
    plan: SplitPlan,
    dropped: Sequence[str] = (),
) -> ScGPTAnnotationDataReport:
    """The report on cells that are already read and tokenized."""
    genes = expression.genes
    quartiles = np.percentile(n_expressed, [0, 25, 50, 75, 100])
    counts = {} if labels is None else labels.counts
    problems: tuple[str, ...] = ()
    if labels is not None:
        problems = tuple(plan.problems(labels.codes, labels.classes, groups))
    above = float((n_expressed > config.max_length - 1).mean())
    n_empty = int((n_expressed == 0).sum())
    warnings = list(expression.warnings)
    if dropped:
        warnings.append(f"Dropped {len(dropped)} classes too small to split: {', '.join(dropped)}.")
    if genes.n_duplicates:
        warnings.append(
            f"{genes.n_duplicates:,} genes share a token with another gene; "
            + ("their values are summed." if config.duplicates == "sum" else "the first of each counts.")
        )
    if n_empty:
        warnings.append(f"{n_empty:,} cells have no gene that the checkpoint knows; they become {UNASSIGNED!r}.")
    if above > 0.5:
        warnings.append(f"{above:.0%} of cells have more genes than max_length={config.max_length} and keep a subset.")
    if not adata.obs_names.is_unique:
        warnings.append("obs_names are not unique; results are written by position.")
    if labels is not None and groups is not None:
        warnings += confounding_warnings(labels.codes, groups, classes=labels.classes, group_key=group_key)
    if UNASSIGNED in counts:
        warnings.append(f"A class is called {UNASSIGNED!r}, as cells without known genes will be; rename it.")
    return ScGPTAnnotationDataReport(
        checkpoint=checkpoint,
        label_key=label_key,
        group_key=group_key,
        n_cells=expression.n_cells,
        n_labelled=0 if labels is None else int((labels.codes >= 0).sum()),
        n_genes=genes.n_genes,
        n_matched=genes.n_matched,
        overlap=genes.overlap,
        matched_how={
            name: int(n) for name, n in zip(*np.unique(genes.how[genes.how != ""], return_counts=True), strict=True)
        },
        n_duplicates=genes.n_duplicates,
        matrix=expression.source,
        values=expression.kind,
        genes_per_cell=dict(zip(("min", "q25", "median", "q75", "max"), quartiles.tolist(), strict=True)),
        n_empty=n_empty,
        max_length=config.max_length,
        share_above_max_length=above,
        class_counts=counts,
        smallest_class=min(counts, key=lambda name: counts[name]) if counts else "",
        split_problems=problems,
        group_candidates=group_candidates(adata, exclude=(label_key, group_key)),
        warnings=tuple(warnings),
    )


def tokenize_expression(expression: Expression, config: TokenizerConfig) -> Tokens:
    """Tokens of all cells of a matrix, read piece by piece."""
    return Tokens.concatenate(list(token_pieces(expression, config)))


def token_pieces(expression: Expression, config: TokenizerConfig) -> Iterator[Tokens]:
    """The same, the tokens of one piece after another."""
    pieces = (rows for _, rows in expression.chunks())
    return tokenize_pieces(pieces, expression.genes.token_ids, config, log_values=expression.log_values)
