"""The recipe of a pretraining run, read from YAML."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class PretrainingConfig:
    """Everything that decides the outcome; see ``pretrain_mini.yaml`` for what each setting means."""

    seed: int
    min_cells: int
    embsize: int
    nheads: int
    d_hid: int
    nlayers: int
    dropout: float
    n_bins: int
    max_seq_len: int
    gene_init: str
    gene_init_scale: float
    steps: int
    batch_size: int
    learning_rate: float
    embedding_learning_rate: float
    head_learning_rate: float
    head_steps: int
    weight_decay: float
    warmup: float
    gradient_clip: float
    bfloat16: bool
    source_temperature: float
    one_source: bool
    genes_per_draw: tuple[int, int]
    thinning: tuple[float, float]
    mask_ratios: tuple[float, ...]
    max_asked: int
    n_queries: int
    query_temperature: float
    loss_weights: dict[str, float]
    contrast_temperature: float
    two_views: bool

    def __post_init__(self) -> None:
        if self.gene_init not in ("ppmi", "random"):
            raise ValueError(f"gene_init must be 'ppmi' or 'random', found {self.gene_init!r}.")
        if self.loss_weights.get("contrast", 0) > 0 and not (self.two_views and self.batch_size % 2 == 0):
            raise ValueError("loss_weights.contrast needs two_views and an even batch_size.")

    @classmethod
    def read(cls, path: str | Path, **changes: Any) -> PretrainingConfig:
        """Read a YAML file; ``changes`` replace single settings.

        Raises
        ------
        ValueError
            If settings are missing or unknown.
        """
        given = {**yaml.safe_load(Path(path).read_text()), **changes}
        known = {field.name for field in dataclasses.fields(cls)}
        if wrong := sorted(known ^ given.keys()):
            raise ValueError(f"{path}: missing or unknown settings: {', '.join(wrong)}.")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values."""
        return dataclasses.asdict(self)
