"""Strategies from names and configs, as a user gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ._base import Strategy
from ._config import TrainingConfig
from ._registry import get_strategy


def build_strategies(
    names: Sequence[str], configs: Mapping[str, Any] | None = None, *, batch_size: int | None = None
) -> list[Strategy]:
    """Strategies by name, each with its config or the defaults.

    Raises
    ------
    ValueError
        If a name is unknown or given twice, none is a strategy, or a config belongs to none of them.
    """
    configs = dict(configs or {})
    if len(set(names)) < len(names):
        raise ValueError(f"strategies and baselines must name each strategy once, found {', '.join(names)}.")
    if unused := sorted(set(configs) - set(names)):
        raise ValueError(f"strategy_configs has {', '.join(unused)}, not among the strategies: {', '.join(names)}.")
    built = []
    for name in names:
        strategy_class = get_strategy(name)
        config = configs.get(name)
        if config is None and batch_size is not None:
            config = strategy_class.config_class()
            if isinstance(training := getattr(config, "training", None), TrainingConfig):
                config = replace(config, training=replace(training, batch_size=batch_size))  # type: ignore[call-arg]
        built.append(strategy_class(config))
    if not any(strategy.role == "strategy" for strategy in built):
        raise ValueError("strategies must name at least one strategy that is no baseline.")
    return built
