from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

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
