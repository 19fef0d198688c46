from __future__ import annotations

import importlib.util
import json
from collections.abc import Container
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from scdlkit.foundation.strategies import CellData, FrozenProbeConfig, Strategy

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


@pytest.fixture(params=["flash_keys", "torch_keys"])
def golden(request):
    """One upstream checkpoint with upstream's tokens and outputs."""
    folder = GOLDEN / request.param
    vocab = json.loads((folder / "vocab.json").read_text())
    return SimpleNamespace(
        name=request.param,
        folder=folder,
        vocab=vocab,
        args=json.loads((folder / "args.json").read_text()),
        expected=dict(np.load(folder / "expected.npz")),
        cls_id=vocab["<cls>"],
        pad_id=vocab["<pad>"],
    )


@pytest.fixture(scope="session")
def fits():
    """The module ``fits.py``: small fits inside a tiny encoder."""
    spec = importlib.util.spec_from_file_location("fits", Path(__file__).with_name("fits.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Fixed(Strategy):
    """Predicts codes it was given for each cell, by the first dimension of the embedding.

    ``failing`` holds the calls to ``fit``, counted over all copies, in which it raises ``error``; every call by default.
    """

    config_class = FrozenProbeConfig
    needs = frozenset({"embedding"})

    def __init__(
        self,
        name: str,
        codes: np.ndarray,
        *,
        role: str = "strategy",
        error: type[BaseException] | None = None,
        failing: Container[int] | None = None,
        calls: list[Any] | None = None,
    ) -> None:
        super().__init__(name=name)
        self.codes, self.role, self.error, self.failing = codes, role, error, failing
        self.calls = [] if calls is None else calls  # (training cells, seed) of every fit

    @property
    def uses_encoder(self) -> bool:
        return self.role == "strategy" or self.name.endswith("_frozen")

    def unfitted(self) -> Fixed:
        return Fixed(self.name, self.codes, role=self.role, error=self.error, failing=self.failing, calls=self.calls)

    def fit(self, train: CellData, val: CellData, *, seed: int = 0, **kwargs: Any) -> None:
        number = len(self.calls)
        self.calls.append((train.embedding[:, 0].astype(int), seed))
        if self.error is not None and (self.failing is None or number in self.failing):
            raise self.error("no luck")
        self.n_trainable = 7
        self.history = [{"epoch": 0, "train_loss": 1.0, "val_loss": 1.0, "val_macro_f1": 0.5}]

    def predict_proba(self, cells: CellData) -> np.ndarray:
        return np.eye(3, dtype=np.float32)[self.codes[cells.embedding[:, 0].astype(int)]]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Any, metadata: Any) -> None: ...


@pytest.fixture(scope="session")
def fixed() -> type[Fixed]:
    """The class of a strategy that predicts what it is told."""
    return Fixed
