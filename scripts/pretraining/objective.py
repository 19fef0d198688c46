"""What the encoder is asked: masked values from the gene's own output, and values of any gene from the cell embedding.

Both decoders are scGPT's (Cui et al. 2024) and are saved under their official names:

- gene expression prediction: ``decoder.fc`` reads a masked gene's output and predicts its bin;
- gene expression prediction for cell modelling (MVC): ``mvc_decoder`` turns a gene's embedding into a query, whose inner
  product with the cell embedding predicts the bin.

As in scGPT's generative pretraining, a masked gene asks the known ones and nobody sees it, so ``<cls>`` reads in
pretraining what it reads later: known genes only. Three things are ours, because the cells are few:

- scGPT asks the cell embedding for genes that the cell expresses. Here it must answer for a sample of all genes, with
  bin 0 where the cell does not express them: which genes are silent tells cell types apart;
- how many genes are silent mostly tells how deep a cell was sequenced. The part of the error that depth explains
  counts little (``cell_depth``), or the embedding would be about depth before anything else;
- two views of a cell, thinned and drawn apart, should find each other among the other cells of the batch
  (``contrast``; InfoNCE, van den Oord et al. 2018).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scdlkit.foundation.model import Block, ScGPTEncoder


class PretrainingBatch(NamedTuple):
    """Masked cells and what they should be read as; cells are the first dimension unless said otherwise."""

    gene_ids: Tensor  # int64 [B, L], <cls> first, then known genes, then masked ones
    values: Tensor  # float32 [B, L], mask_value at masked genes
    padding: Tensor  # bool [B, L], True where nothing is, among the known and among the masked
    n_known: int  # positions up to the first masked one
    targets: Tensor  # float32 [B, L - n_known]: true bins of the masked genes
    query_ids: Tensor  # int64 [Q], genes asked of every cell
    query_targets: Tensor  # float32 [B, Q]: true bins, 0 where not expressed
    query_weights: Tensor  # float32 [Q], mean 1
    query_trends: Tensor  # float32 [Q, k]: how the bins of these genes move with the depth of a cell

    def to(self, device: torch.device) -> PretrainingBatch:
        """The same batch on another device."""
        return PretrainingBatch(*(part if isinstance(part, int) else part.to(device) for part in self))


class ExpressionDecoder(nn.Module):
    """Value of a gene from its own output."""

    def __init__(self, embsize: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(embsize, embsize),
            nn.LeakyReLU(),
            nn.Linear(embsize, embsize),
            nn.LeakyReLU(),
            nn.Linear(embsize, 1),
        )

    def forward(self, outputs: Tensor) -> Tensor:
        """``[..., embsize]`` to ``[...]``."""
        return self.fc(outputs).squeeze(-1)


class CellDecoder(nn.Module):
    """Values of genes from the cell embedding."""

    def __init__(self, embsize: int) -> None:
        super().__init__()
        self.gene2query = nn.Linear(embsize, embsize)
        self.W = nn.Linear(embsize, embsize, bias=False)
        with torch.no_grad():  # cell embeddings are layer-normalised, hence long: start from predictions near zero
            self.W.weight.mul_(1 / embsize)

    def forward(self, genes: Tensor) -> Tensor:
        """Gene embeddings ``[..., embsize]`` to the vectors whose inner product with the cell embedding is the value."""
        return self.W(torch.sigmoid(self.gene2query(genes)))


class Objective(nn.Module):
    """Encoder, decoders and losses.

    Losses are mean squared errors of bins as a share of the scale (0 to 1): decoders learn at the speed of the rest,
    and :meth:`official_heads` puts them on the scale of bins, as the official ones are.

    Parameters
    ----------
    encoder
        Trained in place.
    weights
        Weights of the losses ``masked``, ``cell``, ``cell_depth`` and ``contrast``.
    temperature
        Of the contrastive loss.
    bfloat16
        Multiply matrices of the blocks in bfloat16.
    """

    def __init__(
        self, encoder: ScGPTEncoder, weights: dict[str, float], *, temperature: float = 0.2, bfloat16: bool = False
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = ExpressionDecoder(encoder.config.embsize)
        self.mvc_decoder = CellDecoder(encoder.config.embsize)
        self.weights = weights
        self.temperature = temperature
        self.bfloat16 = bfloat16
        self.scale = float(encoder.config.n_bins - 1)

    def forward(self, batch: PretrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the losses, and each of them."""
        encoder = self.encoder
        cells, outputs = self.read(batch)
        asked = ~batch.padding[:, batch.n_known :]
        losses = {"masked": F.mse_loss(self.decoder(outputs[asked]), batch.targets[asked] / self.scale)}

        genes = encoder.gene_norm(encoder.gene_embedding(encoder.row_of[batch.query_ids]))
        error = (cells @ self.mvc_decoder(genes).T - batch.query_targets / self.scale) * batch.query_weights.sqrt()
        along = error @ torch.linalg.qr(batch.query_trends * batch.query_weights.sqrt()[:, None]).Q
        losses["cell_depth"] = along.square().sum() / error.numel()
        losses["cell"] = error.square().mean() - losses["cell_depth"]
        if self.weights.get("contrast", 0) > 0:
            losses["contrast"] = self._contrast(cells)
        return sum(self.weights[name] * loss for name, loss in losses.items()), losses

    def read(self, batch: PretrainingBatch) -> tuple[Tensor, Tensor]:
        """Cell embeddings ``[B, d]`` and outputs of the masked genes ``[B, L - n_known, d]``.

        What the encoder computes when masked genes are padding to each other and to the known ones, without computing
        what nobody reads. In bfloat16 where that is faster: weights, sums and losses stay in float32.
        """
        encoder, config = self.encoder, self.encoder.config
        bins = torch.arange(config.pad_value, config.n_bins, dtype=torch.float32, device=batch.values.device)
        values = F.embedding(batch.values.long() - config.pad_value, encoder.value_encoder(bins))
        x = encoder.gene_norm(encoder.gene_embedding(encoder.row_of[batch.gene_ids])) + values
        bias = torch.zeros(batch.gene_ids[:, : batch.n_known].shape, device=x.device)
        bias = bias.masked_fill(batch.padding[:, : batch.n_known], -torch.inf)[:, None, None]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16):
            for block in encoder.blocks:
                known = x[:, : batch.n_known]
                if block is encoder.blocks[-1]:
                    x = torch.cat([x[:, :1], x[:, batch.n_known :]], 1)
                x = _block(block, x, known, bias)
        return x[:, 0].float(), x[:, 1:].float()

    def official_heads(self) -> dict[str, Tensor]:
        """Decoder tensors under their official names, predicting bins."""
        heads = {f"decoder.{name}": tensor for name, tensor in self.decoder.state_dict().items()}
        heads |= {f"mvc_decoder.{name}": tensor for name, tensor in self.mvc_decoder.state_dict().items()}
        for name in ("decoder.fc.4.weight", "decoder.fc.4.bias", "mvc_decoder.W.weight"):
            heads[name] = heads[name] * self.scale
        return heads

    def _contrast(self, cells: Tensor) -> Tensor:
        """Two views of a cell (first and second half of the batch) find each other (InfoNCE).

        Dimensions are standardised over the batch, as a probe does over its training cells: embeddings of one tissue are
        much alike, and what they share would hide what tells them apart.
        """
        unit = F.normalize((cells - cells.mean(0)) / (cells.std(0) + 1e-3), dim=1)
        similarity = unit @ unit.T / self.temperature
        similarity = similarity.masked_fill(torch.eye(len(cells), dtype=torch.bool, device=cells.device), -torch.inf)
        return F.cross_entropy(similarity, torch.arange(len(cells), device=cells.device).roll(len(cells) // 2))


def _block(block: Block, x: Tensor, known: Tensor, bias: Tensor) -> Tensor:
    """A block of the encoder whose queries ``x`` read the ``known`` positions alone.

    Attention is spelled out: for a few hundred keys on a CPU that is faster than the fused kernels, backwards above all.
    """
    queries, keys, values = (
        layer(inputs).unflatten(-1, (block.nheads, -1)).transpose(1, 2)
        for layer, inputs in ((block.q, x), (block.k, known), (block.v, known))
    )
    weights = (queries * queries.shape[-1] ** -0.5 @ keys.transpose(-1, -2) + bias.to(keys.dtype)).softmax(-1)
    attended = F.dropout(weights, block.attention_dropout, block.training) @ values
    hidden = block.norm1(x + block.dropout(block.out(attended.transpose(1, 2).flatten(2))))
    return block.norm2(hidden + block.dropout(block.fc2(block.dropout(F.relu(block.fc1(hidden))))))
