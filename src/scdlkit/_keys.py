"""Every key scdlkit writes into an AnnData, in one place."""

from __future__ import annotations

from dataclasses import dataclass

UNASSIGNED = "unassigned"
SPLITS = ("train", "val", "test", "unlabelled")
DEFAULT_KEY = "scgpt"
# Tables of a comparison in .uns, and the attributes of AnnotationRunner that hold them.
TABLES = {
    "strategies": "results_",
    "folds": "folds_",
    "differences": "differences_",
    "leakage": "leakage_",  # in .uns only with a group_key
    "per_class": "per_class_",
    "history": "history_",
}
DEFAULT_EMBEDDING_KEY = "X_scgpt"
DEFAULT_EFFICIENCY_KEY = "scgpt_label_efficiency"

TOKEN_ID = "scgpt_token_id"  # .var, -1: unknown to the checkpoint
BINS_LAYER = "scgpt_bins"  # .layers
TOKENS_UNS = "scgpt_tokens"  # .uns


def check_key_added(key_added: object) -> None:
    """Raise a ValueError for what no file could hold as a key."""
    if not isinstance(key_added, str) or not key_added or "/" in key_added:
        raise ValueError(f"key_added must be a name without '/', found {key_added!r}.")


@dataclass(frozen=True)
class ResultKeys:
    """Keys of one annotation result, derived from ``key`` unless given.

    Parameters
    ----------
    key
        ``key_added``; also the key of ``.uns`` with params, classes and the tables of the comparison.
    label
        Column of ``.obs`` with the predicted label.
    embedding
        Key of ``.obsm`` with the embedding under the best strategy.
    """

    key: str = DEFAULT_KEY
    label: str = ""
    embedding: str = ""

    def __post_init__(self) -> None:
        check_key_added(self.key)
        object.__setattr__(self, "label", self.label or f"{self.key}_label")
        object.__setattr__(self, "embedding", self.embedding or f"X_{self.key}_best")

    @property
    def label_code(self) -> str:
        """Column of ``.obs``: position of the label in the classes, -1 for unassigned."""
        return f"{self.label}_code"

    @property
    def confidence(self) -> str:
        """Column of ``.obs``: probability of the predicted label, NaN for unassigned."""
        return f"{self.label}_confidence"

    @property
    def split(self) -> str:
        """Column of ``.obs``: train, val, test or unlabelled."""
        return f"{self.key}_split"

    @property
    def colors(self) -> str:
        """Key of ``.uns`` where scanpy keeps the colours of the labels."""
        return f"{self.label}_colors"

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns of ``.obs`` that are written."""
        return self.label, self.label_code, self.confidence, self.split

    @property
    def probabilities(self) -> str:
        """Key of ``.obsm``: class probabilities, cells x classes."""
        return f"{self.key}_proba"

    @property
    def uns(self) -> str:
        """Key of ``.uns``."""
        return self.key
