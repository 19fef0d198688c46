"""``full_finetune``: train the whole encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scdlkit.foundation.model import ScGPTEncoder

from ._config import Config, TrainingConfig, check_choice, check_number
from ._encoder import EncoderStrategy
from ._registry import register

_GENES = "encoder.gene_embedding.weight"
_ROW_IDS, _ROWS = "gene_rows/ids", "gene_rows/values"


@dataclass(frozen=True)
class FullFinetuneConfig(Config):
    """Settings of full fine-tuning.

    Parameters
    ----------
    layer_decay
        Learning rate of a block relative to the one above it (Howard & Ruder 2018, https://arxiv.org/abs/1801.06146);
        1 for the same everywhere.
    head_learning_rate
        Learning rate of the annotation head, which starts from nothing; None for that of the encoder.
    freeze_gene_embedding
        Leave the gene embedding as it is, the bulk of the parameters.
    head_layers
        Layers of the annotation head.
    training
        How it is trained; with learning rate 0.0001 of the last block by default, as upstream.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    strategy = "full_finetune"

    layer_decay: float = 0.9
    head_learning_rate: float | None = 3e-3
    freeze_gene_embedding: bool = False
    head_layers: int = 3
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(learning_rate=1e-4))

    def __post_init__(self) -> None:
        check_number("layer_decay", self.layer_decay, low=0, high=1, open_low=True)
        check_number("head_learning_rate", self.head_learning_rate, low=0, open_low=True, optional=True)
        check_choice("freeze_gene_embedding", self.freeze_gene_embedding, (True, False))
        check_number("head_layers", self.head_layers, low=1, integer=True)


@register
class FullFinetune(EncoderStrategy):
    """Train every weight of the encoder and the head; only rows of the gene embedding that cells use can change."""

    name = "full_finetune"
    config_class = FullFinetuneConfig

    def adapt(self, encoder: ScGPTEncoder) -> None:
        """Thaw everything, but for what no gradient can reach."""
        encoder.requires_grad_(True)
        encoder.gene_embedding.weight.requires_grad = not self.config.freeze_gene_embedding
        for block in encoder.blocks:
            block.get_parameter(
                "k.bias"
            ).requires_grad = False  # shifts all scores of a query alike: softmax ignores it

    def learning_rate_scale(self, name: str) -> float:
        """The head's own; full at the last block, less below, least at the embeddings."""
        if not name.startswith("encoder."):
            own = self.config.head_learning_rate
            return 1.0 if own is None else own / self.training.learning_rate
        n_blocks = len(self.encoder.blocks)
        depth = n_blocks
        if name.startswith("encoder.blocks."):
            depth = n_blocks - 1 - int(name.split(".")[2])
        return self.config.layer_decay**depth

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors of the encoder but the gene embedding, of which the changed rows alone are kept."""
        state = super().state_dict()
        if self.config.freeze_gene_embedding:
            return state
        weight = state.pop(_GENES)
        ids = self.encoder.token_ids
        changed = (weight != self._require_source().gene_rows(ids)).any(dim=1)
        return {**state, _ROW_IDS: torch.from_numpy(ids)[changed].long(), _ROWS: weight[changed]}

    def load_state(self, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """See :meth:`Strategy.load_state`."""
        if self.config.freeze_gene_embedding:
            super().load_state(state, metadata)
            return
        if _ROW_IDS not in state or _ROWS not in state:
            raise ValueError(
                f"The saved state of strategy {self.name!r} does not fit: {_ROW_IDS} or {_ROWS} is missing."
            )
        rest = {name: value for name, value in state.items() if name not in (_ROW_IDS, _ROWS)}
        source = self._require_source()
        special = np.array([source.cls_id, source.pad_id])
        pretrained = source.gene_rows(np.sort(special))
        super().load_state({**rest, _GENES: pretrained}, metadata)
        ids = state[_ROW_IDS].numpy()
        self.cover(ids)
        encoder = self.encoder
        with torch.no_grad():
            encoder.gene_embedding.weight[encoder.row_of[state[_ROW_IDS]]] = state[_ROWS]
