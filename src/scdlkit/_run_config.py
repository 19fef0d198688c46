"""What a run depends on besides the cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from .foundation.plan import SplitPlan


@dataclass(frozen=True)
class RunnerConfig:
    """Everything a run depends on besides the cells; see :class:`scdlkit.AnnotationRunner` for the meaning of each."""

    label_key: str | None
    group_key: str | None
    layer: str | None
    use_raw: bool | None
    val_size: float
    test_size: float
    n_repeats: int
    cv: int | None
    leakage_gap: bool
    small_classes: Literal["error", "drop"]
    max_length: int | None
    ties: Literal["random", "mid"]
    duplicates: Literal["sum", "first"]
    n_draws: int
    random_state: int

    def __post_init__(self) -> None:
        for name in ("val_size", "test_size"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, found {getattr(self, name)!r}.")
        if self.cv is None and self.val_size + self.test_size >= 1:
            raise ValueError(
                f"val_size + test_size must leave cells to train on, found {self.val_size} + {self.test_size}."
            )
        if isinstance(self.random_state, bool) or not isinstance(self.random_state, int | np.integer):
            raise ValueError(f"random_state must be an integer, found {self.random_state!r}.")
        if self.small_classes not in ("error", "drop"):
            raise ValueError(f"small_classes must be 'error' or 'drop', found {self.small_classes!r}.")
        if not isinstance(self.leakage_gap, bool):
            raise ValueError(f"leakage_gap must be True or False, found {self.leakage_gap!r}.")
        _ = self.plan  # checks its own numbers

    @property
    def plan(self) -> SplitPlan:
        """How the labelled cells are split, and how often."""
        return SplitPlan(self.val_size, self.test_size, self.n_repeats, self.cv, int(self.random_state))
