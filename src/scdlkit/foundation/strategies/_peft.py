"""What the strategies that go through peft share."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch import nn

from scdlkit.foundation._dropout import Dropout

if TYPE_CHECKING:
    from peft import PeftConfig

    from scdlkit.foundation.model import ScGPTEncoder

LINEARS = ("q", "k", "v", "out", "fc1", "fc2")


def inject(encoder: ScGPTEncoder, config: PeftConfig) -> None:
    """Let peft wrap layers of the encoder in place; what it adds trains, all else is frozen.

    Raises
    ------
    ValueError
        If peft cannot do this on the encoder, with peft's reason.
    """
    from peft import get_peft_model  # brings transformers, which takes seconds to import

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # peft's advice for language models
            get_peft_model(encoder, config)  # the wrapper it returns is not needed: layers are replaced in place
    except (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError, KeyError) as error:
        # by method and version peft says no in each of these ways; the user needs to know what was asked of what
        raise ValueError(
            f"peft cannot apply {type(config).__name__} to the encoder, whose blocks have the Linear layers "
            f"{', '.join(LINEARS)}: {error}"
        ) from error
    for module in list(encoder.modules()):  # of LoRA, on the input of every layer
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p))


def check_linears(names: Any) -> tuple[str, ...]:
    """Names of Linear layers of a block as a tuple, or a ValueError."""
    if isinstance(names, str):
        names = (names,)
    names = tuple(names)
    if not names or set(names) - set(LINEARS) or len(set(names)) < len(names):
        found = ", ".join(map(repr, names)) or "none"
        raise ValueError(f"target_modules must be different layers of {', '.join(LINEARS)}, found {found}.")
    return names


def check_layers(layers: Any) -> None:
    """Raise a ValueError unless ``layers`` is None or ``"last:k"``."""
    if layers is None:
        return
    number = layers.removeprefix("last:") if isinstance(layers, str) and layers.startswith("last:") else ""
    if not number.isdigit() or int(number) < 1:
        raise ValueError(f"layers must be None or 'last:k' with k at least 1, found {layers!r}.")
