"""What holds for every registered strategy."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from scdlkit.foundation.strategies import CellData, Strategy, available_strategies, get_strategy
from scdlkit.foundation.training import Trainer

# on plain arrays; those inside the encoder have a contract of their own in test_encoder_strategies.py
NAMES = [name for name in available_strategies() if get_strategy(name).frozen]


def fitted(name: str, train: CellData, val: CellData, **kwargs: Any) -> Strategy:
    config = get_strategy(name).config_class()
    if hasattr(config, "training"):
        config = replace(config, training=replace(config.training, max_epochs=25, learning_rate=0.01))
    strategy = get_strategy(name)(config)
    if strategy.package:
        pytest.importorskip(strategy.package)
    strategy.fit(train, val, n_classes=kwargs.pop("n_classes", 3), trainer=Trainer(progress=False), **kwargs)
    return strategy


@pytest.mark.parametrize("name", NAMES)
def test_learns_and_fills_the_contract(name: str, train: CellData, val: CellData, query: CellData) -> None:
    strategy = fitted(name, train, val, seed=1)
    probabilities = strategy.predict_proba(query)
    assert probabilities.shape == (60, 3)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)
    assert (probabilities.argmax(1) == query.codes).mean() > 0.9
    assert strategy.n_trainable >= 0
    assert strategy.history
    for row in strategy.history:
        assert set(row) == {"epoch", "train_loss", "val_loss", "val_macro_f1"}
        # where nothing is trained there is no training loss
        assert all(np.isfinite(row[key]) for key in row if key != "train_loss" or strategy.n_trainable)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_is_the_same(name: str, train: CellData, val: CellData, query: CellData) -> None:
    strategy = fitted(name, train, val)
    state, metadata = strategy.state_dict(), strategy.metadata()
    assert all(isinstance(value, torch.Tensor) and value.device.type == "cpu" for value in state.values())
    loaded = get_strategy(name)(get_strategy(name).config_class.from_dict(strategy.config.to_dict()))
    loaded.load_state(state, json.loads(json.dumps(metadata)))
    np.testing.assert_array_equal(loaded.predict_proba(query), strategy.predict_proba(query))
    assert loaded.n_trainable == strategy.n_trainable
    assert loaded.metadata() == metadata
    assert {key: value.tolist() for key, value in loaded.state_dict().items()} == {
        key: value.tolist() for key, value in state.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_saved_state_is_checked(name: str, train: CellData, val: CellData) -> None:
    strategy = fitted(name, train, val)
    state, metadata = strategy.state_dict(), strategy.metadata()
    first = next(iter(state))
    for changed, message in (
        ({key: value for key, value in state.items() if key != first}, "missing"),
        (state | {"extra": torch.zeros(1)}, "extra is unknown"),
        (state | {first: torch.zeros(3, 3, 3)}, "has shape"),
        ({}, "missing"),
    ):
        with pytest.raises(ValueError, match=message):
            get_strategy(name)().load_state(changed, metadata)
    with pytest.raises(ValueError, match="lacks n_classes"):
        get_strategy(name)().load_state(state, {key: value for key, value in metadata.items() if key != "n_classes"})


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_without_global_randomness(name: str, train: CellData, val: CellData, query: CellData) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    one = fitted(name, train, val, seed=3).predict_proba(query)
    np.testing.assert_array_equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])
    torch.rand(7)
    np.testing.assert_array_equal(fitted(name, train, val, seed=3).predict_proba(query), one)


@pytest.mark.parametrize("name", NAMES)
def test_prediction_does_not_depend_on_the_other_cells(
    name: str, train: CellData, val: CellData, query: CellData
) -> None:
    strategy = fitted(name, train, val)
    order = np.random.default_rng(0).permutation(60)
    probabilities = strategy.predict_proba(query)
    np.testing.assert_allclose(strategy.predict_proba(query.subset(order)), probabilities[order], atol=1e-6)
    np.testing.assert_allclose(strategy.predict_proba(query.subset(order[:1])), probabilities[order[:1]], atol=1e-6)
    assert strategy.predict_proba(query.subset(order[:0])).shape == (0, 3)


@pytest.mark.parametrize("name", NAMES)
def test_two_classes_and_a_class_without_training_cells(name: str, train: CellData, val: CellData) -> None:
    two = [cells.subset(np.flatnonzero(cells.codes != 1)) for cells in (train, val)]
    probabilities = fitted(name, *two).predict_proba(two[1])
    assert (probabilities.argmax(1) == two[1].codes).mean() > 0.9
    binary = [replace(cells, codes=cells.codes // 2) for cells in two]
    probabilities = fitted(name, *binary, n_classes=2).predict_proba(binary[1])
    assert (probabilities.argmax(1) == binary[1].codes).mean() > 0.9


@pytest.mark.parametrize("name", NAMES)
def test_bad_cells(name: str, train: CellData, val: CellData) -> None:
    strategy = get_strategy(name)()
    nothing = CellData(codes=train.codes)
    arguments: dict[str, Any] = {"n_classes": 3, "trainer": Trainer(progress=False)}
    with pytest.raises(ValueError, match=f"needs {', '.join(strategy.needs)} of the cells"):
        strategy.fit(nothing, val, **arguments)
    with pytest.raises(ValueError, match="labelled validation cells"):
        strategy.fit(train, val.subset(np.array([], dtype=int)), **arguments)
    with pytest.raises(ValueError, match="labelled training cells"):
        strategy.fit(replace(train, codes=None), val, **arguments)
    with pytest.raises(ValueError, match="found -1 to 2"):
        strategy.fit(train, replace(val, codes=np.where(val.codes == 0, -1, val.codes)), **arguments)
    with pytest.raises(ValueError, match="at least two classes"):
        strategy.fit(train.subset(np.flatnonzero(train.codes == 0)), val, **arguments)
    with pytest.raises(RuntimeError, match="not fitted"):
        strategy.predict_proba(val)
    with pytest.raises(RuntimeError, match="not fitted"):
        strategy.state_dict()
    with pytest.raises(RuntimeError, match="not fitted"):
        strategy.metadata()


@pytest.mark.parametrize("name", [name for name in NAMES if "embedding" in get_strategy(name).needs])
def test_embedding_is_checked(name: str, train: CellData, val: CellData) -> None:
    broken = train.embedding.copy()
    broken[3, 2] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        fitted(name, replace(train, embedding=broken), val)
    with pytest.raises(ValueError, match="31 dimensions"):
        fitted(name, train, val).predict_proba(replace(val, embedding=val.embedding[:, :31]))


@pytest.mark.parametrize("name", [name for name in NAMES if "expression" in get_strategy(name).needs])
def test_baselines_see_the_same_values(
    name: str, train: CellData, val: CellData, query: CellData, caplog: pytest.LogCaptureFixture
) -> None:
    """Counts, normalised and log1p values of the same cells, genes in any order, duplicates and absent genes."""
    strategy = fitted(name, train, val)
    expected = strategy.predict_proba(query)
    per_million = sp.csr_matrix(query.expression.multiply(1e6 / query.expression.sum(1)))
    half = query.expression * 0.5
    order = np.random.default_rng(0).permutation(60)
    for changed in (
        replace(query, expression=per_million, kind="normalised"),
        replace(query, expression=(per_million / 100).log1p(), kind="log1p"),
        replace(query, expression=query.expression[:, order], gene_names=query.gene_names[order]),
        replace(query, expression=sp.hstack([half, half]).tocsr(), gene_names=np.tile(query.gene_names, 2)),
    ):
        np.testing.assert_allclose(strategy.predict_proba(changed), expected, atol=1e-4)
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING, "scdlkit"):
        fewer = replace(query, expression=query.expression[:, :45], gene_names=query.gene_names[:45])
        assert (strategy.predict_proba(fewer).argmax(1) == query.codes).mean() > 0.9
    assert f"{name}: 15 of its 60 genes (25 %)" in caplog.text
    with pytest.raises(ValueError, match="None of the 60 genes"):
        strategy.predict_proba(replace(query, gene_names=np.array([f"x{i}" for i in range(60)])))


def test_names_of_instances(train: CellData) -> None:
    assert get_strategy("head")(name="mine").name == "mine"
    assert get_strategy("head")().name == "head"
