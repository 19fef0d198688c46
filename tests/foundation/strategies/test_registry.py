from __future__ import annotations

import pytest

from scdlkit.foundation.strategies import FrozenProbe, HeadConfig, available_strategies, get_strategy, register


def test_names_and_roles() -> None:
    inside = ("adapter", "any_peft", "bitfit", "full_finetune", "ia3", "lora", "prefix_tuning")
    assert sorted(available_strategies("strategy")) == sorted(("frozen_probe", "head", *inside))
    assert all(get_strategy(name).frozen == (name not in inside) for name in available_strategies())
    assert sorted(available_strategies("baseline")) == ["celltypist", "knn_frozen", "logreg_genes", "pca_logreg"]
    for name in available_strategies():
        cls = get_strategy(name)
        assert cls.name == cls.config_class.strategy == name


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(ValueError, match="Unknown strategy 'lorra'; known are .*frozen_probe.*head.*lora.*pca_logreg"):
        get_strategy("lorra")
    with pytest.raises(ValueError, match="role must be"):
        available_strategies("other")


def test_a_name_is_taken_once() -> None:
    assert register(FrozenProbe) is FrozenProbe
    with pytest.raises(ValueError, match="'head' is taken by"):
        register(type("Another", (FrozenProbe,), {"name": "head"}))


def test_config_of_the_wrong_strategy_names_both() -> None:
    with pytest.raises(ValueError, match="'frozen_probe' takes a FrozenProbeConfig, found HeadConfig.*'head'"):
        FrozenProbe(HeadConfig())
    with pytest.raises(ValueError, match="found int"):
        FrozenProbe(3)
