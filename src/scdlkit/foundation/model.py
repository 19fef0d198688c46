"""The scGPT encoder and annotation head on one page.

Cui et al. 2024, "scGPT: toward building a foundation model for single-cell multi-omics using generative AI",
https://doi.org/10.1038/s41592-024-02201-0. What is as published, and what is ours:

- token = LayerNorm(gene embedding) + value encoder(bin); no positions, a cell is a set of genes;
- post-norm blocks with ReLU and eps 1e-5, keys at padding masked, the cell embedding is the output at ``<cls>``;
- q, k, v, out, fc1 and fc2 are separate Linears around attention: peft reaches every one of them and there is no fused
  path that could skip an adapter;
- in mixed precision, what goes from block to block is in half precision while training, as layer norms leave it;
- the last block computes its output for ``<cls>`` alone, which is all that annotation reads;
- bins are small integers, so each is embedded once, whether or not its embedding trains, and where the gene embedding is
  frozen too, both are look-ups (:class:`InputTables`);
- the gene embedding may hold only the vocabulary rows in use; callers keep passing vocabulary ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ._block_steps import Cells, add_and_norm, attended, hidden, in_autocast, in_one_step, projected
from ._dropout import Dropout
from ._layer_norm import LayerNorm
from ._linear import Linear
from ._packed import Packed

MAX_VALUE = 512.0  # upstream clamps larger values


@dataclass(frozen=True)
class ScGPTConfig:
    """Shape of an scGPT encoder, as the ``args.json`` of a checkpoint tells it.

    Parameters
    ----------
    n_tokens
        Size of the vocabulary, special tokens included.
    embsize, nheads, d_hid, nlayers
        Width, attention heads, feed-forward width and blocks.
    dropout
        Dropout probability while training.
    n_bins
        Size of the value scale; bins run from 1 to ``n_bins - 1``.
    pad_value, mask_value
        Values of ``<pad>`` and ``<cls>``, and of masked genes in pretraining.
    max_length
        Most tokens a cell may have, ``<cls>`` included.
    n_layers_cls
        Layers of the annotation head.
    """

    n_tokens: int
    embsize: int
    nheads: int
    d_hid: int
    nlayers: int
    dropout: float = 0.2
    n_bins: int = 51
    pad_value: int = -2
    mask_value: int = -1
    max_length: int = 1200
    n_layers_cls: int = 3

    def __post_init__(self) -> None:
        for name in ("n_tokens", "embsize", "nheads", "d_hid", "nlayers", "n_layers_cls"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, found {getattr(self, name)!r}.")
        if self.embsize % self.nheads:
            raise ValueError(f"embsize ({self.embsize}) must be a multiple of nheads ({self.nheads}).")
        for name in ("n_bins", "pad_value", "mask_value", "max_length"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name} must be an integer, found {getattr(self, name)!r}.")
        if not (isinstance(self.dropout, int | float) and 0 <= self.dropout < 1):
            raise ValueError(f"dropout must be in [0, 1), found {self.dropout!r}.")

    @classmethod
    def from_args(cls, args: Mapping[str, Any], n_tokens: int) -> ScGPTConfig:
        """Read the content of ``args.json``.

        Raises
        ------
        ValueError
            If a size is missing, or the checkpoint does not use binned values with a continuous value encoder.
        """
        required = ("embsize", "nheads", "d_hid", "nlayers")
        if missing := [name for name in required if name not in args]:
            raise ValueError(f"args.json lacks {', '.join(missing)}: this is not an scGPT checkpoint.")
        for name, expected in (("input_style", "binned"), ("input_emb_style", "continuous")):
            if args.get(name, expected) != expected:
                raise ValueError(f"args.json has {name}={args[name]!r}; only {expected!r} checkpoints are supported.")
        renamed = {"max_length": "max_seq_len"}
        optional = ("dropout", "n_bins", "pad_value", "mask_value", "max_length", "n_layers_cls")
        given = {name: args[renamed.get(name, name)] for name in optional if renamed.get(name, name) in args}
        return cls(n_tokens=n_tokens, **{name: args[name] for name in required}, **given)


class InputTables(NamedTuple):
    """Both input embeddings of a frozen encoder, computed once for every gene and every value."""

    genes: Tensor  # [rows, embsize]
    values: Tensor  # [values from pad_value to n_bins - 1, embsize]


class ValueEncoder(nn.Module):
    """Embed a scalar value: clamp, Linear, ReLU, Linear, LayerNorm, dropout."""

    def __init__(self, embsize: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(1, embsize)
        self.fc2 = nn.Linear(embsize, embsize)
        self.norm = nn.LayerNorm(embsize)
        self.dropout = Dropout(dropout)

    def forward(self, values: Tensor) -> Tensor:
        """``[..., ]`` values to ``[..., embsize]``."""
        return self.dropout(self._plain(values))

    def look_up(self, values: Tensor, scale: Tensor) -> Tensor:
        """The same for values that are all in ``scale``, which is ascending whole numbers: each is embedded once."""
        return self.dropout(F.embedding(values.long() - scale[0].long(), self._plain(scale)))

    def _plain(self, values: Tensor) -> Tensor:
        hidden = F.relu(self.fc1(values.clamp(max=MAX_VALUE).unsqueeze(-1)))
        return self.norm(self.fc2(hidden))


class Block(nn.Module):
    """Post-norm transformer block."""

    compiled: Callable[[Block, Tensor, Cells], Tensor] | None = None  # see _compiled.py

    def __init__(self, config: ScGPTConfig) -> None:
        super().__init__()
        width = config.embsize
        self.nheads = config.nheads
        self.attention_dropout = config.dropout
        self.q, self.k, self.v, self.out = (Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = Linear(width, config.d_hid), Linear(config.d_hid, width)
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.dropout = Dropout(config.dropout)
        self.prefix: nn.Module | None = None  # further keys and values, see strategies/prefix_tuning.py

    def forward(self, x: Tensor, cells: Cells, *, cls_only: bool = False, again: bool = False) -> Tensor:
        """Outputs of all positions, or of the first one of each cell alone.

        Parameters
        ----------
        x
            ``[B, L, d]``, or ``[tokens, d]`` of cells one behind the other.
        cells
            Boolean ``[B, 1, 1, L]``, False at padded keys, or None where nothing is padded; or where the cells are.
        cls_only
            ``[B, 1, d]`` or ``[cells, d]`` is all that is needed.
        again
            The way back will compute this once more, so as little as possible should be kept.
        """
        # what is rare, and would have to be compiled once more, is not: a single cell, <cls> alone, a prediction
        if self.compiled is not None and self.training and len(x) > 1 and not cls_only:
            return self.compiled(self, x, cells)
        return self.compute(x, cells, cls_only=cls_only, again=again)

    def compute(self, x: Tensor, cells: Cells, *, cls_only: bool = False, again: bool = False) -> Tensor:
        """What :meth:`forward` gives."""
        dropout = self.attention_dropout if self.training else 0.0
        if not cls_only and not again and (whole := in_one_step(self, x, cells, dropout)) is not None:
            return whole
        if cls_only:
            keys, values, x = projected(x, self.k, self.v)
            queries, x = projected(cells.first(x) if isinstance(cells, Packed) else x[:, :1], self.q)
        else:
            queries, keys, values, x = projected(x, self.q, self.k, self.v)
        found = attended(queries, keys, values, self.nheads, cells, dropout, self.prefix)
        x = add_and_norm(x, self.out, found, self.norm1, self.dropout)
        inner, x = hidden(x, self.fc1, self.dropout)
        return add_and_norm(x, self.fc2, inner, self.norm2, self.dropout)


class ScGPTEncoder(nn.Module):
    """scGPT's transformer over the genes of a cell.

    Parameters
    ----------
    config
        Shape.
    token_ids
        Vocabulary ids whose rows the gene embedding holds, sorted and unique; all by default.
    """

    row_of: Tensor
    gradient_checkpointing = False  # while training, compute the blocks again on the way back

    def __init__(self, config: ScGPTConfig, token_ids: np.ndarray | None = None) -> None:
        super().__init__()
        self.config = config
        ids = np.arange(config.n_tokens) if token_ids is None else np.asarray(token_ids, dtype=np.int64)
        if len(ids) == 0 or ids[0] < 0 or ids[-1] >= config.n_tokens or (np.diff(ids) <= 0).any():
            raise ValueError(f"token_ids must be sorted, unique and in [0, {config.n_tokens}).")
        row_of = np.full(config.n_tokens, -1)
        row_of[ids] = np.arange(len(ids))
        self.register_buffer("row_of", torch.from_numpy(row_of), persistent=False)  # vocabulary id -> row
        self.token_ids = ids
        if torch.empty(0).is_meta:  # where to draw numbers would import torch.compile, which takes seconds
            self.gene_embedding = nn.Embedding.from_pretrained(torch.empty(len(ids), config.embsize), freeze=False)
        else:
            self.gene_embedding = nn.Embedding(len(ids), config.embsize)
        self.gene_norm = nn.LayerNorm(config.embsize)
        self.value_encoder = ValueEncoder(config.embsize, config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.nlayers))

    def forward(self, gene_ids: Tensor, values: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Outputs of every position.

        Parameters
        ----------
        gene_ids
            int64 ``[B, L]``, vocabulary ids, ``<cls>`` first.
        values
            float ``[B, L]``, bins; ``pad_value`` at ``<cls>`` and padding.
        padding_mask
            bool ``[B, L]``, True at padding; None where nothing is padded.

        Returns
        -------
        Tensor
            ``[B, L, embsize]``; rows at padded positions mean nothing.
        """
        return self.encode(self.embed_inputs(gene_ids, values), keys_to_keep(padding_mask))

    def cls(
        self,
        gene_ids: Tensor,
        values: Tensor,
        cells: Tensor | Packed | None = None,
        *,
        tables: InputTables | None = None,
    ) -> Tensor:
        """Cell embeddings ``[B, embsize]``: the output at ``<cls>``, not normalised.

        Arguments as in :meth:`forward`, ``cells`` being the padding mask, but values are bins or ``pad_value``, nothing
        between; or ids and values are ``[tokens]`` and ``cells`` says where in them each cell is.
        """
        if tables is not None:
            inputs = self._look_up(tables, gene_ids, values)
        else:  # 53 values instead of one for every token
            inputs = self._embed_genes(gene_ids) + self.value_encoder.look_up(values, self._scale())
        return self.encode_cls(inputs, cells)

    def embed_inputs(self, gene_ids: Tensor, values: Tensor) -> Tensor:
        """Input of the first block ``[B, L, embsize]``."""
        return self._embed_genes(gene_ids) + self.value_encoder(values)

    def _embed_genes(self, gene_ids: Tensor) -> Tensor:
        embedded: Tensor = self.gene_norm(self.gene_embedding(self.row_of[gene_ids]))
        return embedded

    def encode_cls(self, x: Tensor, cells: Tensor | Packed | None, *, start: int = 0) -> Tensor:
        """``[B, embsize]`` at ``<cls>``, from what :meth:`encode` takes; ``cells`` as in :meth:`cls`."""
        if isinstance(cells, Packed):
            return self.encode(x, cells, cls_only=True, start=start)
        return self.encode(x, keys_to_keep(cells), cls_only=True, start=start)[:, 0]

    def encode(
        self,
        x: Tensor,
        cells: Cells,
        *,
        cls_only: bool = False,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """Run the blocks from ``start`` to before ``stop`` (all by default) on embedded inputs, or what the blocks before made of them.

        ``cells`` as in :meth:`Block.forward`. With ``cls_only`` the last block of the encoder answers for ``<cls>`` alone.
        """
        last = len(self.blocks) - 1
        x = in_autocast(x) if self.training else x  # less to keep for the way back
        again = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for index, block in list(enumerate(self.blocks))[start:stop]:
            run = partial(block, cls_only=cls_only and index == last, again=again)
            x = checkpoint(run, x, cells, use_reentrant=False) if again else run(x, cells)
        return x

    def input_tables(self) -> InputTables:
        """Look-up tables for :meth:`cls`; valid while the embeddings do not change and dropout is off."""
        return InputTables(self.gene_norm(self.gene_embedding.weight), self.value_encoder(self._scale()))

    def _scale(self) -> Tensor:
        """All values there are."""
        config, weight = self.config, self.gene_embedding.weight
        return torch.arange(config.pad_value, config.n_bins, dtype=weight.dtype, device=weight.device)

    def _look_up(self, tables: InputTables, gene_ids: Tensor, values: Tensor) -> Tensor:
        return tables.genes[self.row_of[gene_ids]] + tables.values[values.long() - self.config.pad_value]

    def add_tokens(self, token_ids: np.ndarray, rows: Tensor) -> None:
        """Give the gene embedding rows ``[tokens, embsize]`` for further vocabulary ids; the others stay as they are."""
        ids = np.concatenate([self.token_ids, token_ids])
        order = np.argsort(ids, kind="stable")
        if len(np.unique(ids)) < len(ids):
            raise ValueError("token_ids has tokens that this encoder holds already.")
        old = self.gene_embedding.weight
        weight = torch.cat([old.detach(), rows.to(old)])[torch.from_numpy(order).to(old.device)]
        self.gene_embedding = nn.Embedding.from_pretrained(weight, freeze=not old.requires_grad)
        self.token_ids = ids[order]
        self.row_of[torch.from_numpy(self.token_ids).to(old.device)] = torch.arange(len(ids), device=old.device)

    def check_token_ids(self, gene_ids: np.ndarray) -> None:
        """Raise a KeyError if the gene embedding lacks a row for one of ``gene_ids``."""
        missing = np.setdiff1d(gene_ids, self.token_ids)
        if len(missing):
            raise KeyError(
                f"{len(missing)} gene tokens (first id {missing[0]}) are not in this encoder, which holds "
                f"{len(self.token_ids)} of {self.config.n_tokens}; load it with token_ids that cover the data."
            )


def keys_to_keep(padding_mask: Tensor | None) -> Tensor | None:
    """What :class:`Block` takes, of bool ``[B, L]``, True at padding."""
    return None if padding_mask is None else ~padding_mask[:, None, None, :]


class AnnotationHead(nn.Module):
    """Upstream's annotation head: (Linear, ReLU, LayerNorm) x (layers - 1), then Linear to the classes."""

    def __init__(self, embsize: int, n_classes: int, n_layers: int = 3) -> None:
        super().__init__()
        hidden: list[nn.Module] = []
        for _ in range(n_layers - 1):
            hidden += [nn.Linear(embsize, embsize), nn.ReLU(), nn.LayerNorm(embsize)]
        self.hidden = nn.Sequential(*hidden)
        self.out = nn.Linear(embsize, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Cell embeddings ``[B, embsize]`` to logits ``[B, classes]``."""
        return self.out(self.hidden(x))
