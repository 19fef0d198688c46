"""Any method of peft on the encoder, from a ``peft.PeftConfig`` of the user's."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from scdlkit.foundation.model import ScGPTEncoder

from ._config import Config, TrainingConfig, check_number
from ._encoder import EncoderStrategy
from ._peft import LINEARS, inject
from ._registry import register

if TYPE_CHECKING:
    from peft import PeftConfig

_DEFAULT_TARGETS = ["q", "v"]


@dataclass(frozen=True)
class AnyPeftConfig(Config):
    """A peft config as plain values.

    Users pass the ``peft.PeftConfig`` itself, under a name of their own:
    ``strategies=("my_vera",), strategy_configs={"my_vera": peft.VeraConfig(r=64)}``.

    Parameters
    ----------
    peft_type
        peft's name of the method, such as ``"VERA"``.
    settings
        peft's settings. Without ``target_modules``, q and v are adapted.
    head_layers
        Layers of the annotation head.
    training
        How it is trained.

    Raises
    ------
    ValueError
        If peft does not know the method.
    """

    strategy = "any_peft"

    peft_type: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    head_layers: int = 3
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        check_number("head_layers", self.head_layers, low=1, integer=True)
        if not self.peft_type:
            raise ValueError(
                "Strategy 'any_peft' needs a config: pass strategy_configs={'my_name': peft.VeraConfig(...)} with "
                "'my_name' among the strategies."
            )

    @classmethod
    def of(cls, config: PeftConfig, **changes: Any) -> Self:
        """The plain values of a ``peft.PeftConfig``."""
        settings = {name: _plain(value) for name, value in config.to_dict().items() if value is not None}
        peft_type = settings.pop("peft_type")
        settings.pop("peft_version", None)
        return cls(peft_type=peft_type, settings=settings, **changes)

    def peft_config(self) -> PeftConfig:
        """The ``peft.PeftConfig`` again.

        Raises
        ------
        ValueError
            If this version of peft does not know the method or one of its settings.
        """
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        known = {str(_plain(kind)): kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
        if self.peft_type not in known:
            raise ValueError(f"peft knows no method {self.peft_type!r}; it knows {', '.join(sorted(known))}.")
        settings = {"target_modules": _DEFAULT_TARGETS, **self.settings}
        try:
            return PEFT_TYPE_TO_CONFIG_MAPPING[known[self.peft_type]](**settings)
        except TypeError as error:
            raise ValueError(f"peft's {self.peft_type} does not take these settings: {error}") from error


@register
class AnyPeft(EncoderStrategy):
    """Freeze the encoder, train what a peft config adds, and the head."""

    name = "any_peft"
    config_class = AnyPeftConfig

    def adapt(self, encoder: ScGPTEncoder) -> None:
        """Let peft wrap the layers.

        Raises
        ------
        ValueError
            If peft cannot do it on this encoder, or nothing would train.
        """
        inject(encoder, self.config.peft_config())
        if not any(parameter.requires_grad for parameter in encoder.parameters()):
            raise ValueError(
                f"peft's {self.config.peft_type} added nothing that trains; target_modules must name some of "
                f"{', '.join(LINEARS)}."
            )


def _plain(value: Any) -> Any:
    """Enums, sets and tuples as JSON knows them."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value
