"""Every key scdlkit writes into an AnnData, in one place."""

from __future__ import annotations

from dataclasses import dataclass

UNASSIGNED = "unassigned"
SPLITS = ("train", "val", "test", "unlabelled")
DEFAULT_KEY = "scgpt"
DEFAULT_EMBEDDING_KEY = "X_scgpt"

TOKEN_ID = "scgpt_token_id"  # .var, -1: unknown to the checkpoint
BINS_LAYER = "scgpt_bins"  # .layers
TOKENS_UNS = "scgpt_tokens"  # .uns


@dataclass(frozen=True)
class ResultKeys:
    """Keys of one annotation result, all derived from ``key_added``."""

    key: str = DEFAULT_KEY

    @property
    def label(self) -> str:
        """Column of ``.obs``: predicted label, categorical."""
        return f"{self.key}_label"

    @property
    def label_code(self) -> str:
        """Column of ``.obs``: position of the label in ``.uns[key]["classes"]``, -1 for unassigned."""
        return f"{self.key}_label_code"

    @property
    def confidence(self) -> str:
        """Column of ``.obs``: probability of the predicted label, NaN for unassigned."""
        return f"{self.key}_label_confidence"

    @property
    def split(self) -> str:
        """Column of ``.obs``: train, val, test or unlabelled."""
        return f"{self.key}_split"

    @property
    def embedding(self) -> str:
        """Key of ``.obsm``: embedding under the best strategy."""
        return f"X_{self.key}_best"

    @property
    def probabilities(self) -> str:
        """Key of ``.obsm``: class probabilities, cells x classes."""
        return f"{self.key}_proba"

    @property
    def uns(self) -> str:
        """Key of ``.uns``: params, classes, strategies, history, per_class."""
        return self.key
