from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from scdlkit.foundation.model import AnnotationHead
from scdlkit.foundation.strategies import CellData, Head, HeadConfig, TrainingConfig
from scdlkit.foundation.training import Trainer

QUIET = Trainer(progress=False)


def test_is_the_annotation_head_on_the_standardised_embedding(train: CellData, val: CellData) -> None:
    head = Head(HeadConfig(n_layers=2, training=TrainingConfig(max_epochs=2)))
    head.fit(train, val, n_classes=3, trainer=QUIET)
    state = head.state_dict()
    mean, scale = state.pop("mean"), state.pop("scale")
    np.testing.assert_allclose(mean, train.embedding.astype(float).mean(0))
    np.testing.assert_allclose(scale, train.embedding.astype(float).std(0))
    module = AnnotationHead(32, 3, 2)
    module.load_state_dict(state)
    with torch.no_grad():
        expected = module(((torch.from_numpy(val.embedding) - mean) / scale).float()).softmax(-1)
    np.testing.assert_allclose(head.predict_proba(val), expected, atol=1e-6)
    assert head.n_trainable == sum(value.numel() for value in module.parameters())


def test_learns_from_small_differences_on_a_large_offset(train: CellData, val: CellData) -> None:
    far = [replace(cells, embedding=cells.embedding + 100) for cells in (train, val)]
    head = Head(HeadConfig(training=TrainingConfig(max_epochs=25, learning_rate=0.01)))
    head.fit(*far, n_classes=3, trainer=QUIET)
    assert max(row["val_macro_f1"] for row in head.history) > 0.9
    raw = Head(HeadConfig(standardise=False, training=TrainingConfig(max_epochs=2)))
    raw.fit(*far, n_classes=3, trainer=QUIET)
    assert (raw.state_dict()["scale"] == 1).all()


def test_initialisation_depends_on_the_seed_alone(train: CellData) -> None:
    states = []
    for seed in (1, 1, 2):
        head = Head()
        head.build(train, n_classes=3, seed=seed)
        torch.rand(3)
        states.append(head.trained_module().out.weight.detach())
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    assert states[0].abs().max() <= 1 / np.sqrt(32)


def test_needs_a_trainer(train: CellData, val: CellData) -> None:
    with pytest.raises(ValueError, match="pass trainer="):
        Head().fit(train, val, n_classes=3)
    with pytest.raises(RuntimeError, match="no module"):
        Head().logits(train)
