"""The module that strategies inside the encoder train, and its encoder as a plain one again."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from scdlkit.foundation.batching import AnyBatch, StateBatch
from scdlkit.foundation.model import AnnotationHead, ScGPTEncoder


class AdaptedEncoder(nn.Module):
    """Encoder and head; the embedding is standardised as the frozen one of the training cells is, then classified.

    ``n_frozen`` is how many of the lowest blocks are as they were pretrained, the embeddings below them included. There
    is no dropout in these while the others train, so what they make of a cell is the same in every epoch.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, encoder: ScGPTEncoder, head: AnnotationHead, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.n_frozen = _n_frozen(encoder)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    def forward(self, batch: AnyBatch) -> Tensor:
        """Logits ``[B, classes]``."""
        return self.classify(self.embed(batch))

    def embed(self, batch: AnyBatch) -> Tensor:
        """Adapted embedding ``[B, embsize]``, from tokens or from what the frozen blocks made of them."""
        if isinstance(batch, StateBatch):
            return self.encoder.encode_cls(batch.states.float(), batch.cells, start=self.n_frozen)
        return self.encoder.cls(*batch)

    def classify(self, embedding: Tensor) -> Tensor:
        """Logits from the adapted embedding ``[B, embsize]``."""
        return self.head((embedding - self.mean) / self.scale)

    def train(self, mode: bool = True) -> AdaptedEncoder:
        """As of any module, but the frozen blocks and what is below them stay in eval mode."""
        super().train(mode)
        if self.n_frozen:
            self.encoder.value_encoder.eval()
            self.encoder.blocks[: self.n_frozen].eval()
        return self


def _n_frozen(encoder: ScGPTEncoder) -> int:
    """How many of the lowest blocks do not train; 0 where something below them does."""
    trains = [name for name, value in encoder.named_parameters() if value.requires_grad]
    if not all(name.startswith("blocks.") for name in trains):
        return 0
    return min((int(name.split(".")[1]) for name in trains), default=0)


def merged(encoder: ScGPTEncoder) -> ScGPTEncoder | None:
    """The encoder with whatever was put into it folded into its own weights.

    Returns
    -------
    ScGPTEncoder or None
        The encoder itself where nothing was put in, else a changed copy; None where something cannot be folded in
        (adapters, prefixes).
    """
    if any(getattr(module, "prefix", None) is not None for module in encoder.modules()):
        return None
    wrappers = [module for module in encoder.modules() if hasattr(module, "base_layer")]
    if not wrappers:
        return encoder
    if not all(hasattr(module, "merge") for module in wrappers):  # as peft's have
        return None
    plain = copy.deepcopy(encoder)
    for parent in list(plain.modules()):
        for name, child in parent.named_children():
            if hasattr(child, "base_layer"):
                if not child.merged:
                    child.merge()  # type: ignore[operator]
                setattr(parent, name, child.get_base_layer())  # type: ignore[operator]
    return plain
