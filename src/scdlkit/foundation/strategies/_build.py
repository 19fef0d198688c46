"""Strategies from names and configs, as a user gives them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from scdlkit._optional import is_installed, require_package
from scdlkit._settings import logger

from ._base import Strategy
from ._config import Config, TrainingConfig
from ._registry import available_strategies, get_strategy
from .any_peft import AnyPeft, AnyPeftConfig


def build_strategies(
    names: Sequence[str], configs: Mapping[str, Any] | None = None, *, batch_size: int | None = None
) -> list[Strategy]:
    """Strategies by name, each with its config or the defaults.

    Parameters
    ----------
    names
        Registered names, or names of one's own that ``configs`` explains.
    configs
        Name → config of that strategy, a mapping of its settings, or, under a name of one's own, any config of ours
        or any ``peft.PeftConfig``.
    batch_size
        Cells of a training step, where there is no config.

    Raises
    ------
    ImportError
        If one needs a package that is missing; says what to install.
    ValueError
        If a name is unknown or given twice, none is a strategy, or a config belongs to none of them.
    """
    configs = dict(configs or {})
    if len(set(names)) < len(names):
        raise ValueError(f"strategies and baselines must name each strategy once, found {', '.join(names)}.")
    if unused := sorted(set(configs) - set(names)):
        raise ValueError(f"strategy_configs has {', '.join(unused)}, not among the strategies: {', '.join(names)}.")
    built = [_build(name, configs.get(name), batch_size) for name in names]
    if not any(strategy.role == "strategy" for strategy in built):
        raise ValueError("strategies must name at least one strategy that is no baseline.")
    return built


def all_baselines() -> tuple[str, ...]:
    """Names of the baselines that can run here; a warning names those that lack their package."""
    names = available_strategies("baseline")
    able = tuple(name for name in names if not get_strategy(name).package or is_installed(get_strategy(name).package))
    for name in sorted(set(names) - set(able)):
        logger.warning(
            'Without the baseline %s, which needs the extra: pip install "scdlkit[%s]"',
            name,
            get_strategy(name).package,
        )
    return able


def _build(name: str, config: Any, batch_size: int | None) -> Strategy:
    """One strategy; a name of the user's own is told by its config."""
    if name not in available_strategies():
        if _is_peft(config):
            return AnyPeft(AnyPeftConfig.of(config, training=_training(TrainingConfig(), batch_size)), name=name)
        if isinstance(config, Config):
            own = get_strategy(config.strategy)
            _check_package(own)
            return own(config, name=name)
    strategy_class = get_strategy(name)
    _check_package(strategy_class)
    if config is None:
        config = strategy_class.config_class()
        if isinstance(training := getattr(config, "training", None), TrainingConfig):
            config = replace(config, training=_training(training, batch_size))
    return strategy_class(config)


def _check_package(strategy_class: type[Strategy]) -> None:
    """Now, not after the others have run."""
    if strategy_class.package:
        require_package(strategy_class.package)


def _training(training: TrainingConfig, batch_size: int | None) -> TrainingConfig:
    return training if batch_size is None else replace(training, batch_size=batch_size)


def _is_peft(config: Any) -> bool:
    """Whether this is a config of peft's, without importing peft (whoever made one has)."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(config, peft.PeftConfig)
