"""Tools: adapt, predict and embed, written into the AnnData."""

from __future__ import annotations

from ._adapt import adapt_annotation
from ._embed import embed
from ._files import embed_file, predict_file
from ._label_efficiency import label_efficiency
from ._predict import predict

__all__ = ["adapt_annotation", "embed", "embed_file", "label_efficiency", "predict", "predict_file"]
