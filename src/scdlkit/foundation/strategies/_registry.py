"""Strategies by name."""

from __future__ import annotations

from typing import Literal, TypeVar

from ._base import Strategy

S = TypeVar("S", bound=Strategy)
_REGISTRY: dict[str, type[Strategy]] = {}


def register(cls: type[S]) -> type[S]:
    """Make a strategy known by its ``name``; use as a class decorator.

    Raises
    ------
    ValueError
        If another class has the name already.

    Example
    -------
    >>> @register
    ... class Mine(Strategy):
    ...     name = "mine"
    """
    known = _REGISTRY.get(cls.name)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"Strategy name {cls.name!r} is taken by {known.__module__}.{known.__qualname__}.")
    _REGISTRY[cls.name] = cls
    return cls


def get_strategy(name: str) -> type[Strategy]:
    """The strategy class of a name.

    Raises
    ------
    ValueError
        If there is none; lists the known ones.

    Example
    -------
    >>> get_strategy("head").config_class.__name__
    'HeadConfig'
    """
    if name not in _REGISTRY:
        raise ValueError(f"Unknown strategy {name!r}; known are {', '.join(available_strategies())}.")
    return _REGISTRY[name]


def available_strategies(role: Literal["strategy", "baseline"] | None = None) -> tuple[str, ...]:
    """Names of the registered strategies, of one role or of all.

    Example
    -------
    >>> available_strategies("baseline")
    ('celltypist', 'knn_frozen', 'logreg_genes', 'pca_logreg')
    """
    if role not in (None, "strategy", "baseline"):
        raise ValueError(f"role must be 'strategy', 'baseline' or None, found {role!r}.")
    return tuple(name for name, cls in _REGISTRY.items() if role is None or cls.role == role)
