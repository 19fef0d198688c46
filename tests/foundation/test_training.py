from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from scdlkit.foundation import training
from scdlkit.foundation.strategies import CellData, Config, GradientStrategy, Head, HeadConfig, TrainingConfig
from scdlkit.foundation.training import Trainer, class_weights


def cells(n: int, seed: int) -> CellData:
    rng = np.random.default_rng(seed)
    codes = np.arange(n) % 3
    return CellData(
        embedding=(np.eye(3, 6)[codes] + rng.normal(scale=0.6, size=(n, 6))).astype(np.float32), codes=codes
    )


TRAIN, VAL = cells(90, 0), cells(60, 1)


def fitted(**settings: Any) -> Head:
    head = Head(HeadConfig(training=TrainingConfig(**{"schedule": "constant", "warmup": 0.0, **settings})))
    head.fit(TRAIN, VAL, n_classes=3, seed=0, trainer=Trainer(progress=False))
    return head


def test_best_epoch_is_restored() -> None:
    head = fitted(learning_rate=0.03, max_epochs=30, patience=30)
    qualities = [(row["val_macro_f1"], -row["val_loss"]) for row in head.history]
    best = max(range(30), key=qualities.__getitem__)
    assert best < 29
    np.testing.assert_array_equal(
        fitted(learning_rate=0.03, max_epochs=best + 1, patience=30).predict_proba(VAL), head.predict_proba(VAL)
    )
    assert [row["epoch"] for row in head.history] == list(range(1, 31))
    assert not head.trained_module().training


def test_stops_early() -> None:
    head = fitted(learning_rate=0.03, max_epochs=200, patience=3)
    qualities = [(row["val_macro_f1"], -row["val_loss"]) for row in head.history]
    assert len(qualities) == int(np.argmax([q == max(qualities) for q in qualities])) + 1 + 3


def test_loss_falls() -> None:
    head = fitted(learning_rate=0.01, max_epochs=40, patience=40)
    assert head.history[-1]["train_loss"] < 0.5 * head.history[0]["train_loss"]


class Broken(GradientStrategy):
    """Two parameters, one frozen; loss not finite from the second step on."""

    name = "broken"
    config_class = HeadConfig
    needs = frozenset({"embedding"})
    steps = 0

    def build(self, train: CellData, *, n_classes: int, seed: int) -> None:
        self.module = torch.nn.Linear(6, n_classes)
        self.module.bias.requires_grad_(False)
        self.start = {name: value.detach().clone() for name, value in self.module.named_parameters()}

    def logits(self, cells: CellData) -> torch.Tensor:
        self.steps += self.trained_module().training
        return self.trained_module()(torch.from_numpy(cells.embedding)) * (np.nan if self.steps > 5 else 1)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state(self, state: Any, metadata: Any) -> None: ...


def test_loss_that_is_not_finite_stops_and_frozen_parameters_stay() -> None:
    broken = Broken()
    with pytest.raises(FloatingPointError, match="'broken' is nan at epoch 3, step 2"):
        broken.fit(TRAIN, VAL, n_classes=3, trainer=Trainer(progress=False))
    assert broken.n_trainable == 18
    assert torch.equal(broken.module.bias, broken.start["bias"])
    assert not torch.equal(broken.module.weight, broken.start["weight"])


def test_class_weights() -> None:
    codes = np.repeat([0, 1, 3], [100, 10, 1])
    assert class_weights(codes, 4, None).tolist() == [1, 1, 1, 1]
    for how in ("balanced", "effective"):
        weights = class_weights(codes, 4, how)
        assert weights[codes].mean() == pytest.approx(1)
        assert weights[2] == 0
    balanced, effective = class_weights(codes, 4, "balanced"), class_weights(codes, 4, "effective")
    assert balanced[1] / balanced[0] == pytest.approx(10)
    expected = (1 - 0.999**100) / (1 - 0.999**10)
    assert effective[1] / effective[0] == pytest.approx(expected)


def test_class_weights_help_the_rare_class() -> None:
    rng = np.random.default_rng(0)
    codes = (np.arange(400) % 20 == 0).astype(int)
    data = CellData(embedding=(codes[:, None] * 1.0 + rng.normal(size=(400, 4))).astype(np.float32), codes=codes)
    recall = []
    for how in (None, "balanced"):
        head = Head(
            HeadConfig(training=TrainingConfig(class_weight=how, max_epochs=5, schedule="constant", warmup=0.0))
        )
        head.fit(data, data, n_classes=2, trainer=Trainer(progress=False))
        recall.append(head.predict_proba(data)[codes == 1].argmax(1).mean())
    assert recall[1] > recall[0]


def test_warm_up_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    Trainer().warm_up()
    assert torch.equal(torch.get_rng_state(), before)


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    head = Head(HeadConfig(training=TrainingConfig(max_epochs=2)))
    head.fit(TRAIN, VAL, n_classes=3, trainer=Trainer(progress=True))
    assert "val_macro_f1=" in capsys.readouterr().err


def test_progress_bar_shows_loss_and_macro_f1_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, str]] = []
    monkeypatch.setattr(
        training.tqdm,
        "set_postfix",
        lambda self, values=None, refresh=True, **more: shown.append({**(values or {}), **more}),
    )
    head = Head(HeadConfig(training=TrainingConfig(max_epochs=2, batch_size=30)))
    head.fit(TRAIN, VAL, n_classes=3, trainer=Trainer(progress=True))
    first, second = head.history
    of_steps, of_epoch = shown[:3], shown[3]
    assert all(set(values) == {"loss"} for values in of_steps) and len(shown) == 8
    assert of_epoch["loss"] == of_steps[-1]["loss"] == f"{first['train_loss']:.3f}"
    assert {values["val_macro_f1"] for values in shown[4:7]} == {f"{first['val_macro_f1']:.3f}"}
    assert shown[7]["val_macro_f1"] == f"{second['val_macro_f1']:.3f}"


def test_training_config_is_a_config() -> None:
    assert issubclass(TrainingConfig, Config)
