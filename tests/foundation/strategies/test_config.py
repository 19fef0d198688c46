from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from scdlkit.foundation.strategies import (
    Config,
    FrozenProbeConfig,
    HeadConfig,
    PCALogRegConfig,
    TrainingConfig,
)


@pytest.mark.parametrize(
    "config",
    [
        FrozenProbeConfig(C=0.5, class_weight="balanced"),
        HeadConfig(n_layers=2, training=TrainingConfig(class_weight="effective", gradient_clip=None)),
        PCALogRegConfig(n_top_genes=10, scale=True),
        TrainingConfig(learning_rate=1, compile=True),
    ],
)
def test_round_trip_through_json(config: Config) -> None:
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.anything = 1


@pytest.mark.parametrize(
    ("cls", "setting", "value"),
    [
        (FrozenProbeConfig, "C", 0.0),
        (FrozenProbeConfig, "C", "1"),
        (FrozenProbeConfig, "class_weight", "effective"),
        (FrozenProbeConfig, "max_iter", 1.5),
        (HeadConfig, "n_layers", 0),
        (HeadConfig, "standardise", "no"),
        (HeadConfig, "training", 3),
        (PCALogRegConfig, "n_top_genes", True),
        (PCALogRegConfig, "n_components", -1),
        (PCALogRegConfig, "scale", None),
        (TrainingConfig, "learning_rate", float("nan")),
        (TrainingConfig, "learning_rate", float("inf")),
        (TrainingConfig, "weight_decay", -0.1),
        (TrainingConfig, "batch_size", 0),
        (TrainingConfig, "max_epochs", None),
        (TrainingConfig, "patience", 0),
        (TrainingConfig, "class_weight", "other"),
        (TrainingConfig, "gradient_clip", 0),
        (TrainingConfig, "compile", "max-autotune"),
    ],
)
def test_out_of_range(cls: type[Config], setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=setting):
        cls(**{setting: value})


def test_unknown_settings_list_the_known() -> None:
    with pytest.raises(ValueError, match="HeadConfig has no setting layers, rank; it has n_layers"):
        HeadConfig.from_dict({"rank": 3, "layers": 2})
    with pytest.raises(ValueError, match="TrainingConfig has no setting lr"):
        HeadConfig.from_dict({"training": {"lr": 3}})
